"""The chat page: files made at installation from web/, kept in memory."""

import gzip
import hashlib
from pathlib import Path

from fastapi.responses import Response

FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}
_HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self' 'unsafe-inline'",
            "connect-src 'self'",
            "img-src 'self' data: blob:",
            "font-src 'self'",
            "manifest-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_MISSING = (
    b"<!doctype html><meta charset=utf-8><title>Craton</title>"
    b"<p>The chat page was not built, because npm was not found when Craton was installed. "
    b"The API works: see <a href=/openapi.json>/openapi.json</a>."
)


class Page:
    def __init__(self) -> None:
        self.files = {p.name: p.read_bytes() for p in sorted(FOLDER.glob("*")) if p.suffix in _TYPES}
        self.files.setdefault("index.html", _MISSING)
        self.small = {n: gzip.compress(d, 9, mtime=0) for n, d in self.files.items()}
        self.names = set(self.files)

    def answer(self, name: str, accepted: str) -> Response:
        if name not in self.files:
            return Response(
                b'{"error":{"message":"Not Found","type":"not_found_error","param":null,"code":null}}',
                404,
                media_type="application/json",
            )
        headers = {
            **_HEADERS,
            "vary": "accept-encoding",
            "etag": f'"{hashlib.sha256(self.files[name]).hexdigest()[:16]}"',
        }
        if "gzip" in accepted:
            return Response(
                self.small[name], headers={**headers, "content-encoding": "gzip"}, media_type=_TYPES[Path(name).suffix]
            )
        return Response(self.files[name], headers=headers, media_type=_TYPES[Path(name).suffix])
