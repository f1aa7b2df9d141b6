"""What stands before the API: keys, hosts, sizes, time limits, logs. Plain ASGI.

A request without a key where one is needed learns nothing: the same 401 whatever it asks for, before its body is read.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from craton.serve.served import ApiError, Json

log = logging.getLogger("craton.serve")
OPEN = {"/health", "/ready"}  # need no key, nor does the page, which says nothing of the server
HEADER_SECONDS, BODY_SECONDS, MOST_CONNECTIONS = 15.0, 60.0, 2048
HEAD_BYTES = 64 << 10  # of a request, at most
_STRANGE = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]")
Send = Callable[[Json], Any]


@dataclass
class Settings:
    """Limits, and who may ask. See `craton serve --help`."""

    keys: list[str] = field(default_factory=list)  # none: everybody may ask
    hosts: set[str] | None = None  # values of the Host header that are answered; None: all
    origins: list[str] = field(default_factory=list)
    max_body: int = 16 << 20
    max_n: int = 16
    timeout: float = 600.0
    log_prompts: bool = False
    votes: Path | None = None
    aliases: dict[str, str] = field(default_factory=dict)  # further names of models
    indexes: dict[str, Any] = field(default_factory=dict)  # of documents, by name (grounded.py)


def error_body(path: str, error: ApiError) -> Json:
    """An error as the path's dialect has it."""
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
    }
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    if path.startswith("/v1/messages"):
        # Its clients look for these words.
        long = "prompt is too long: " if error.code == "context_length_exceeded" else ""
        return {"type": "error", "error": {"type": kind, "message": long + error.message}, "request_id": None}
    if error.status >= 500:
        kind = "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


async def send_error(scope: Json, send: Send, error: ApiError) -> None:
    data = json.dumps(error_body(scope["path"], error), ensure_ascii=False).encode()
    head = {"content-type": "application/json", "content-length": str(len(data)), **error.headers}
    headers = [(k.lower().encode(), v.encode("latin-1", "replace")) for k, v in head.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def _plain_json(body: bytearray) -> bool:
    """Whether json.dumps gives what others read too. What is no JSON at all is found later, with a better message."""
    try:
        json.dumps(json.loads(body), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return False
    except (ValueError, RecursionError) as error:
        return isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError)
    return True


class Guard:
    """open_paths: those that need no key; posts: those that take a body."""

    def __init__(self, app: Any, settings: Settings, open_paths: set[str], posts: set[str]):
        self.app, self.settings, self.open, self.posts = app, settings, OPEN | open_paths, posts
        self.keys = [hashlib.sha256(k.encode()).digest() for k in settings.keys]

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def watched(message: Json) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await self._guarded(scope, receive, watched)
        except ApiError as refused:
            if not status:
                await send_error(scope, watched, refused)
        except Exception:
            log.exception("a request failed")
            if not status:
                await send_error(scope, watched, ApiError(500, "the server failed; its log says more"))
        finally:
            method = scope["method"] if scope["method"].isalpha() else "?"
            route = getattr(scope.get("route"), "path", "(no such path)" if status == 404 else "-")
            level = logging.DEBUG if route.startswith("/page") else logging.INFO
            log.log(level, "%s %s %d %.3f s", method, route, status, time.perf_counter() - began)

    async def _guarded(self, scope: Json, receive: Any, send: Send) -> None:
        """Raises ApiError for what does not get through."""
        headers, hosts = dict(scope["headers"]), self.settings.hosts
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).lower().rstrip(".")
        if hosts is not None and host not in hosts:
            raise ApiError(403, "this Host is not served; a server without keys answers to local names only")
        owner = self._owner(headers) if self.keys else ""
        if owner is None and scope["path"] not in self.open:
            asked = {"www-authenticate": "Bearer", "connection": "close"}
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", headers=asked)
        scope["owner"] = owner or ""
        if scope["method"] == "HEAD":  # as GET; the server in front leaves the body out
            scope = {**scope, "method": "GET"}
        if scope["method"] != "POST" or scope["path"] not in self.posts:
            await self.app(scope, receive, send)
            return
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page elsewhere cannot send this without asking first
            raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
        body = await self._body(headers, receive)
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> bytes | None:
        """A request's body; None if nobody waits for an answer. ApiError if it is refused."""
        close, most = {"connection": "close"}, self.settings.max_body
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > most:
            raise ApiError(413, f"the body is larger than {most} bytes", headers=close)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(receive)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", headers=close) from None
        if body is None:
            return None
        if len(body) <= most:
            body = _plain_body(headers.get(b"content-encoding", b"identity").lower(), body, most)
        if len(body) > most:
            raise ApiError(413, f"the body is larger than {most} bytes", headers=close)
        if _STRANGE.search(body) and not _plain_json(body):
            why = "it has NaN, Infinity or half a character"
            raise ApiError(400, f"the body is not JSON that can be written again: {why}")
        if self.settings.log_prompts:
            log.info("body: %s", json.dumps(body[:100_000].decode("utf-8", "replace")))
        return bytes(body)

    async def _read(self, receive: Any) -> bytearray | None:
        """A body, or as much of it as is more than allowed; None if the client is gone."""
        body, more = bytearray(), True
        while more and len(body) <= self.settings.max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return body

    def _owner(self, headers: dict[bytes, bytes]) -> str | None:
        """Whose key this is; every key is compared, in constant time."""
        value = headers.get(b"x-api-key", b"")
        if (bearer := headers.get(b"authorization", b""))[:7].lower() == b"bearer ":
            value = bearer[7:].strip()
        digest, found = hashlib.sha256(value).digest(), None
        for key in self.keys:
            if hmac.compare_digest(digest, key):
                found = key.hex()
        return found


def _plain_body(encoding: bytes, body: bytearray, most: int) -> bytearray:
    """A body without its content-encoding; of what is longer than `most` bytes, one more than that."""
    if encoding in (b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"x-gzip", b"deflate"):
        raise ApiError(415, "content-encoding: only gzip and deflate are understood")
    reader = zlib.decompressobj(47 if encoding != b"deflate" else 15)
    try:
        plain = reader.decompress(body, most + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body is not {encoding.decode()} ({error})") from None
    if not reader.eof and len(plain) <= most:
        raise ApiError(400, f"the body's {encoding.decode()} is cut")
    return bytearray(plain)


def _replay(body: bytes, receive: Any) -> Callable[[], Any]:
    """A `receive` that gives a body that was read already, then what comes after it."""
    given = False

    async def replay() -> Json:
        nonlocal given
        if given:
            message: Json = await receive()
            return message
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class Protocol(HttpToolsProtocol):
    """uvicorn's, with limits on the time and the bytes that a request's head may take, and on connections."""

    deadline: Any = None
    head_bytes: int | None = 0  # of the head that is coming; None: it is complete

    def connection_made(self, transport: Any) -> None:
        """A connection more, or one too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Bytes of a head are counted before the parser keeps them."""
        if self.deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect()
        while data and not self.transport.is_closing():
            if self.head_bytes is None:
                super().data_received(data)
                return
            piece, data = data[: HEAD_BYTES - self.head_bytes], data[HEAD_BYTES - self.head_bytes :]
            self.head_bytes += len(piece)
            super().data_received(piece)
            if self.head_bytes is not None and self.head_bytes >= HEAD_BYTES:
                self._expected()
                self.transport.abort()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self.head_bytes = None
        self._expected()
        super().on_headers_complete()
        self.scope["extensions"] = {"craton.abort": {"call": self.transport.abort}}

    def on_message_complete(self) -> None:
        """What comes next is another head."""
        self.head_bytes = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._expected()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self.deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _expected(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
