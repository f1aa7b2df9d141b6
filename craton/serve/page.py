"""The chat page: files made at installation from web/, kept in memory."""

import gzip
import hashlib
from pathlib import Path

from fastapi.responses import JSONResponse, Response

from craton.serve.guard import error_body
from craton.serve.served import ApiError

FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data: blob:; font-src 'self'; manifest-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
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
            return JSONResponse(error_body("/page", ApiError(404, "Not Found")), 404)
        data = self.files[name]
        etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        headers = {**_HEADERS, "vary": "accept-encoding", "etag": etag}
        if "gzip" in accepted:
            data, headers["content-encoding"] = self.small[name], "gzip"
        return Response(data, headers=headers, media_type=_TYPES[Path(name).suffix])
