"""How answers go out: streamed as events or whole, ended with their readers, errors in the path's dialect."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import Response

from craton.base import UserError
from craton.serve import shapes
from craton.serve.guard import Settings, error_body, send_error
from craton.serve.metrics import Metrics
from craton.serve.served import ApiError, Served
from craton.serve.worker import Overloaded, Unavailable

log = logging.getLogger("craton.serve")
SLOW_READER = 60.0  # seconds that a reader may take nothing
PING = 10.0  # seconds without an event, such as in a long prompt, after which a stream says that it lives


@dataclass
class State:
    """What the routes share."""

    models: dict[str, Served]
    settings: Settings
    metrics: Metrics
    replies: set["Reply"] = field(default_factory=set)
    draining: bool = False

    def find(self, name: str | None) -> Served:
        """The model of this name, or the first. ApiError if there is none."""
        if name is None:
            return next(iter(self.models.values()))
        if (served := self.models.get(self.settings.aliases.get(name, name))) is None:
            message = f"there is no model {name[:256]!r}; /v1/models lists what there is"
            raise ApiError(404, message, "model", "model_not_found")
        return served

    def base(self) -> Served:
        """The model that adapters go with: the first."""
        return next(iter(self.models.values()))

    def counted(self, body: Any) -> Served:
        """The model of a request that may ask for several answers. ApiError if for too many."""
        if (getattr(body, "n", None) or 1) > self.settings.max_n:
            raise ApiError(400, f"n is {body.n}; this server makes at most {self.settings.max_n} answers", "n")
        return self.find(body.model)

    def security(self) -> dict[str, Any]:
        """What the OpenAPI document says of keys."""
        return {"openapi_extra": {"security": [{"key": []}]}} if self.settings.keys else {}

    def route(self, path: str, summary: str, answer: shapes.Shape, streamed: bool = False) -> dict[str, Any]:
        """An endpoint, as a router's decorators want it. answer: what it says if all is well."""
        answers = shapes.documented(answer, streamed, path)
        return {"path": path, "summary": summary, "responses": answers, "response_class": Response, **self.security()}

    async def watch(self) -> None:
        """Ends what takes too long, as long as the server runs."""
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            for served in self.models.values():
                served.worker.check()
            for reply in list(self.replies):
                if reply.sending and now - reply.sending > SLOW_READER:
                    reply.end("slow")
                elif now - reply.began > self.settings.timeout:
                    reply.end("late")
                elif reply.streamed and not reply.sending and now - reply.written > PING:
                    reply.pinging = asyncio.create_task(reply.ping())  # which waits for its reader


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """A server-sent event with a name."""
    return f"event: {name}\n".encode() + event(value)


def whole(value: Any) -> bytes:
    """A JSON body."""
    return json.dumps(value, ensure_ascii=False).encode()


class Reply(Response):
    """An answer that is being made."""

    def __init__(self, work: AsyncIterator[bytes], streamed: bool, state: State):
        """work: the body's pieces; streamed: as events, each sent when it is there."""
        self.work, self.streamed, self.state = work, streamed, state
        self.background = None
        self.began, self.sending = time.monotonic(), 0.0
        self.written = self.began  # when something was last sent
        self.reason = ""  # why it was ended
        self.started = False  # something has been sent
        self.task: asyncio.Task[Any] | None = None
        self.pinging: asyncio.Task[None] | None = None
        self.abort: Callable[[], None] = lambda: None

    def end(self, reason: str) -> None:
        """Stop it: "gone", "slow" or "late"."""
        if not self.reason and self.task is not None:
            self.reason = reason
            self.task.cancel()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope, self.send, self.task = scope, send, asyncio.current_task()
        self.abort = scope.get("extensions", {}).get("craton.abort", {}).get("call", self.abort)
        self.state.replies.add(self)
        listener = asyncio.create_task(self._listen(receive))
        try:
            async for chunk in self.work:
                await self._write(chunk, self.streamed)
            if self.streamed:
                await self._write(b"", False)
        except asyncio.CancelledError:
            if not self.reason:
                raise
            await self._ended()
        except Exception as error:
            await self._fail(error)
        finally:
            self.state.replies.discard(self)
            listener.cancel()
            await self.work.aclose()  # type: ignore[attr-defined]

    async def ping(self) -> None:
        """An event that means nothing, so that nobody on the way takes the stream for dead."""
        messages = self.scope["path"].startswith("/v1/messages")
        with contextlib.suppress(OSError):  # the reader has gone, which is noticed elsewhere
            await self._write(named_event("ping", {"type": "ping"}) if messages else b": ping\n\n", True)

    async def _listen(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end("gone")

    async def _write(self, data: bytes, more: bool) -> None:
        self.sending = time.monotonic()
        if not self.started:
            self.started = True
            kind = b"text/event-stream; charset=utf-8" if self.streamed else b"application/json"
            also = (b"x-accel-buffering", b"no") if self.streamed else (b"content-length", b"%d" % len(data))
            head = [(b"content-type", kind), (b"cache-control", b"no-store"), also]
            await self.send({"type": "http.response.start", "status": 200, "headers": head})
        await self.send({"type": "http.response.body", "body": data, "more_body": more})
        self.sending, self.written = 0.0, time.monotonic()

    async def _ended(self) -> None:
        """After `end`: the reader is told, where that is possible."""
        assert self.task is not None
        self.task.uncancel()
        await self.work.aclose()  # type: ignore[attr-defined]
        if self.reason == "slow" or self.sending:
            self.abort()
        elif self.reason == "late":
            late = ApiError(408, f"the answer took longer than {self.state.settings.timeout:.0f} s")
            try:
                async with asyncio.timeout(5):
                    await self._fail(late)
            except TimeoutError:
                self.abort()

    async def _fail(self, error: Exception) -> None:
        known = self._as_api_error(error)
        if not self.started:
            await send_error(self.scope, self.send, known)
            return
        path = self.scope["path"]
        body = error_body(path, known)
        if path == "/v1/responses":
            also = {"code": known.code, "message": known.message, "param": known.param}
            body = {"type": "error", "sequence_number": 0, **also, **body}
        named = path.startswith(("/v1/messages", "/v1/responses"))
        await self._write(named_event("error", body) if named else event(body), False)

    def _as_api_error(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, UserError):
            return ApiError(400, str(error), error.field, error.code)
        if isinstance(error, Overloaded):
            self.state.metrics.refused.inc()
            wait = str(error.retry_after)
            return ApiError(429, f"too busy: {error}; try again in {wait} s", None, "overloaded", {"retry-after": wait})
        if isinstance(error, Unavailable):
            return ApiError(503, str(error))
        log.error("an answer failed", exc_info=error)
        return ApiError(500, "the server failed; its log says more")
