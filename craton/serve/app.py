"""The HTTP API over one or more engines: routes, errors, metrics, and how answers go out."""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prometheus_client as prom
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from craton.base import UserError
from craton.serve import anthropic, openai, responses, schema, shapes
from craton.serve.ask import ApiError, Served
from craton.serve.guard import Guard, error_body, send_error
from craton.serve.page import Page
from craton.serve.schema import (
    ChatRequest,
    CompletionRequest,
    CountTokensRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    MessagesRequest,
    ResponsesRequest,
    TokenizeMessages,
    TokenizePrompt,
    VoteRequest,
)
from craton.serve.worker import Failed, Refused

log = logging.getLogger("craton.serve")
SLOW_READER = 60.0  # seconds that a reader may take nothing
FIELDS = {
    name
    for kind in vars(schema).values()
    if isinstance(kind, type) and issubclass(kind, schema.Strict)
    for name in kind.model_fields
} | {"json_schema", "image"}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass
class Settings:
    """Limits, and who may ask. See `craton serve --help`."""

    keys: list[str] = field(default_factory=list)
    hosts: set[str] | None = None
    origins: list[str] = field(default_factory=list)
    max_body: int = 16 << 20
    max_n: int = 16
    timeout: float = 600.0
    log_prompts: bool = False
    votes: Path | None = None


class Metrics:
    """What /metrics shows."""

    def __init__(self, models: dict[str, Served]):
        self.registry = r = prom.CollectorRegistry()
        self.models = models
        self.requests = prom.Counter("craton_requests", "Requests by path and status", ["path", "status"], registry=r)
        self.refused = prom.Counter("craton_refused", "Requests answered with 429", registry=r)
        self.ttft = prom.Histogram(
            "craton_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_SECONDS,
            registry=r,
        )
        self.step = prom.Histogram(
            "craton_step_seconds",
            "One forward pass: the time between two tokens of an answer",
            buckets=_SECONDS,
            registry=r,
        )
        self.generated = prom.Counter("craton_generated_tokens", "Tokens generated", registry=r)
        gauges: dict[str, tuple[str, Callable[[Served], float]]] = {
            "craton_running": ("Answers in the making", lambda m: m.worker.running),
            "craton_waiting": ("Answers that wait for room", lambda m: m.worker.waiting),
            "craton_cache_blocks": ("Blocks of the cache", lambda m: m.engine.scheduler.pool.total),
            "craton_cache_blocks_free": ("Blocks that can be allocated", lambda m: m.engine.scheduler.pool.free),
            "craton_prompt_tokens_total": ("Prompt tokens", lambda m: m.engine.counters.prompt_tokens),
            "craton_cached_prompt_tokens_total": (
                "Prompt tokens found in the cache",
                lambda m: m.engine.counters.cached_prompt_tokens,
            ),
            "craton_preemptions_total": (
                "Answers set back because the cache was full",
                lambda m: m.engine.counters.preemptions,
            ),
            "craton_cancelled_total": ("Answers that nobody waited for", lambda m: m.engine.counters.cancelled),
            "craton_expected_wait_seconds": (
                "What a request that comes now would wait",
                lambda m: m.worker.expected_wait(1),
            ),
        }
        self.gauges = {n: (prom.Gauge(n, text, ["model"], registry=r), get) for n, (text, get) in gauges.items()}

    def observe(self, name: str, value: float) -> None:
        if name == "time_to_first_token":
            self.ttft.observe(value)
        elif name == "step":
            self.step.observe(value)
        else:
            self.generated.inc(value)

    def text(self) -> bytes:
        for gauge, get in self.gauges.values():
            for name, served in self.models.items():
                gauge.labels(name).set(get(served))
        return prom.generate_latest(self.registry)


class Reply(Response):
    """An answer that is being made: streamed as events, or whole. Ends with its reader."""

    def __init__(self, work: AsyncIterator[bytes], streamed: bool, state: "State"):
        self.work, self.streamed, self.state = work, streamed, state
        self.background = None
        self.began, self.sending = time.monotonic(), 0.0
        self.reason = ""  # why it was ended
        self.task: asyncio.Task[Any] | None = None
        self.abort: Callable[[], None] = lambda: None

    def end(self, reason: str) -> None:
        if not self.reason and self.task is not None:
            self.reason = reason
            self.task.cancel()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.task, self.abort = (
            asyncio.current_task(),
            scope.get("extensions", {}).get("craton.abort", {}).get("call", self.abort),
        )
        assert self.task is not None
        self.state.replies.add(self)
        started = False

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.end("gone")

        async def write(data: bytes, more: bool) -> None:
            nonlocal started
            self.sending = time.monotonic()
            if not started:
                started = True
                head = [
                    (b"content-type", b"text/event-stream; charset=utf-8" if self.streamed else b"application/json"),
                    (b"cache-control", b"no-store"),
                ]
                if self.streamed:
                    head.append((b"x-accel-buffering", b"no"))
                else:
                    head.append((b"content-length", str(len(data)).encode()))
                await send({"type": "http.response.start", "status": 200, "headers": head})
            await send({"type": "http.response.body", "body": data, "more_body": more})
            self.sending = 0.0

        async def fail(
            status: int,
            message: str,
            param: str | None = None,
            code: str | None = None,
            headers: dict[str, str] | None = None,
        ) -> None:
            if not started:
                await send_error(scope, send, status, message, param, code, headers)
                return
            body = error_body(scope["path"], status, message, param, code)
            name = b""
            if scope["path"].startswith("/v1/messages"):
                name = b"event: error\n"
            elif scope["path"] == "/v1/responses":
                name, body = (
                    b"event: error\n",
                    {"type": "error", "sequence_number": 0, "code": code, "message": message, "param": param, **body},
                )
            await write(name + openai.event(body), False)

        listener = asyncio.create_task(listen())
        try:
            async for chunk in self.work:
                await write(chunk, self.streamed)
            if self.streamed:
                await write(b"", False)
        except asyncio.CancelledError:
            if not self.reason:
                raise
            self.task.uncancel()
            await self.work.aclose()  # type: ignore[attr-defined]
            if self.reason == "slow" or self.sending:
                self.abort()
            elif self.reason == "late":
                try:
                    async with asyncio.timeout(5):
                        await fail(408, f"the answer took longer than {self.state.settings.timeout:.0f} s")
                except TimeoutError:
                    self.abort()
        except ApiError as error:
            await fail(error.status, error.message, error.param, error.code, error.headers)
        except UserError as error:
            word = str(error).split(":")[0].split(" ")[0]
            await fail(
                400,
                str(error),
                word if word in FIELDS else None,
                "context_length_exceeded" if "the context is" in str(error) else None,
            )
        except Refused as error:
            self.state.metrics.refused.inc()
            await fail(
                429,
                f"too busy: {error}; try again in {error.retry_after} s",
                code="overloaded",
                headers={"retry-after": str(error.retry_after)},
            )
        except Failed as error:
            await fail(503, str(error))
        except Exception:
            log.exception("an answer failed")
            await fail(500, "the server failed; its log says more")
        finally:
            self.state.replies.discard(self)
            listener.cancel()
            await self.work.aclose()  # type: ignore[attr-defined]


@dataclass
class State:
    models: dict[str, Served]
    settings: Settings
    metrics: Metrics
    store: responses.Store = field(default_factory=responses.Store)
    replies: set[Reply] = field(default_factory=set)
    draining: bool = False

    def find(self, name: str | None) -> Served:
        if name is None:
            return next(iter(self.models.values()))
        if (served := self.models.get(name)) is None:
            raise ApiError(
                404, f"there is no model {name[:256]!r}; /v1/models lists what there is", "model", "model_not_found"
            )
        return served

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


def create_app(models: dict[str, Served], settings: Settings, metrics: Metrics) -> Any:
    """The ASGI application. Its workers start with it and end with it."""
    state = State(models, settings, metrics)
    page = Page()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        for served in models.values():
            served.worker.start(loop)
        watcher = asyncio.create_task(state.watch())
        yield
        state.draining = True
        watcher.cancel()
        await asyncio.gather(*(s.worker.stop(0) for s in models.values()))

    keyed: dict[str, Any] = {"openapi_extra": {"security": [{"key": []}]}} if settings.keys else {}
    app = FastAPI(
        title="Craton",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        description="Compatible with OpenAI's, Open Responses' and Anthropic's APIs.",
    )
    app.state.craton = state

    def post(
        path: str, summary: str, answer: dict[str, Any], streamed: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return app.post(
            path, summary=summary, responses=shapes.documented(answer, streamed, path), response_class=Response, **keyed
        )

    def get(
        path: str, summary: str, answer: dict[str, Any] | None = None, **more: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return app.get(
            path,
            summary=summary,
            responses=shapes.documented(answer, False, path) if answer else {},
            response_class=Response,
            **{**keyed, **more},
        )

    def counted(body: Any) -> Served:
        if (getattr(body, "n", None) or 1) > settings.max_n:
            raise ApiError(400, f"n is {body.n}; this server makes at most {settings.max_n} answers", "n")
        return state.find(body.model)

    # ---- generation ----

    @post("/v1/chat/completions", "A chat completion", shapes.CHAT, True)
    async def chat(body: ChatRequest) -> Reply:
        return Reply(openai.chat(counted(body), body), bool(body.stream), state)

    @post("/v1/completions", "A text completion", shapes.COMPLETION, True)
    async def completions(body: CompletionRequest) -> Reply:
        return Reply(openai.completions(counted(body), body), bool(body.stream), state)

    @post("/v1/responses", "A response", shapes.RESPONSE, True)
    async def create_response(body: ResponsesRequest, request: Request) -> Reply:
        return Reply(
            responses.responses(counted(body), body, state.store, request.scope["owner"]), bool(body.stream), state
        )

    @app.post("/v1/responses/compact", include_in_schema=False)
    async def compact() -> Response:
        raise ApiError(404, "compaction is not supported", code="not_supported")

    @get("/v1/responses/{response_id}", "A stored response", shapes.RESPONSE)
    async def read_response(response_id: str, request: Request) -> Response:
        return JSONResponse(state.store.get(request.scope["owner"], response_id)[0])

    @app.delete(
        "/v1/responses/{response_id}",
        summary="Forget a stored response",
        responses=shapes.documented(shapes.DELETED, False, "/v1/responses/"),
        response_class=Response,
        **keyed,
    )
    async def delete_response(response_id: str, request: Request) -> Response:
        state.store.delete(request.scope["owner"], response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @post("/v1/messages", "A message, as Anthropic's API has it", shapes.MESSAGE, True)
    async def messages(body: MessagesRequest) -> Reply:
        return Reply(anthropic.messages(counted(body), body), bool(body.stream), state)

    @post("/v1/messages/count_tokens", "Tokens of a message", shapes.COUNTED)
    async def count_tokens(body: CountTokensRequest) -> Reply:
        return Reply(anthropic.count_tokens(counted(body), body), False, state)

    @post("/v1/embeddings", "Embeddings", shapes.EMBEDDINGS)
    async def embeddings(body: EmbeddingRequest) -> Reply:
        return Reply(openai.embeddings(counted(body), body), False, state)

    # ---- tokens ----

    async def tokens_of(body: TokenizePrompt | TokenizeMessages) -> AsyncIterator[bytes]:
        served = state.find(body.model)

        def work() -> list[int]:
            if isinstance(body, TokenizePrompt):
                return (
                    served.tokenizer.encode(body.prompt)
                    if body.add_special_tokens
                    else served.tokenizer.encode_rendered(body.prompt)
                )
            if served.dialogue is None:
                raise UserError(f"the model {served.name!r} has no chat template; give a prompt")
            tools = [t.model_dump(exclude_none=True) for t in body.tools or ()]
            return served.tokenizer.encode_rendered(
                served.dialogue.render(openai.messages_of([m.model_dump() for m in body.messages]), tools)[0]
            )

        ids = await asyncio.to_thread(work)
        out: dict[str, Any] = {"count": len(ids), "max_model_len": served.engine.context, "tokens": ids}
        if body.return_token_strs:
            out["token_strs"] = [served.tokenizer.bytes_of(i).decode("utf-8", "replace") for i in ids]
        yield json.dumps(out).encode()

    @post("/tokenize", "Tokens of a prompt or of messages", shapes.TOKENS)
    async def tokenize(body: TokenizePrompt | TokenizeMessages) -> Reply:
        return Reply(tokens_of(body), False, state)

    async def text_of_tokens(body: DetokenizeRequest) -> AsyncIterator[bytes]:
        served = state.find(body.model)
        size = served.tokenizer.vocab_size
        if bad := next((t for t in body.tokens if t >= size), None):
            raise ApiError(400, f"tokens: {bad} is outside the vocabulary of {size}", "tokens")
        text = await asyncio.to_thread(lambda: served.tokenizer.backend.decode(body.tokens, skip_special_tokens=False))
        yield json.dumps({"prompt": text}, ensure_ascii=False).encode()

    @post("/detokenize", "Text of tokens", shapes.obj(prompt=shapes.STRING))
    async def detokenize(body: DetokenizeRequest) -> Reply:
        return Reply(text_of_tokens(body), False, state)

    # ---- about the server ----

    @get("/v1/models", "The models that are served", shapes.MODELS)
    async def list_models() -> Response:
        data = [s.describe() for s in models.values()]
        return JSONResponse(
            {"object": "list", "data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
        )

    @get("/v1/models/{model}", "One of them", shapes.MODEL)
    async def one_model(model: str) -> Response:
        return JSONResponse(state.find(model).describe())

    @app.get("/health", summary="Whether the server lives", responses=shapes.plain(503), response_class=Response)
    async def health() -> Response:
        bad = not all(s.worker.thread.is_alive() for s in models.values())
        return JSONResponse({"status": "failed" if bad else "ok"}, 503 if bad else 200)

    @app.get("/ready", summary="Whether it takes requests", responses=shapes.plain(503), response_class=Response)
    async def ready() -> Response:
        return JSONResponse({"status": "draining" if state.draining else "ready"}, 503 if state.draining else 200)

    @get("/metrics", "Prometheus", include_in_schema=True)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def vote_on(body: VoteRequest) -> AsyncIterator[bytes]:
        if settings.votes is None:
            raise ApiError(404, "votes are not kept by this server", code="no_votes")
        for contender in (body.left, body.right):
            state.find(contender.model)
        line = json.dumps({"time": time.time(), **body.model_dump()}, ensure_ascii=False) + "\n"
        await asyncio.to_thread(_append, settings.votes, line)
        yield b'{"stored":true}'

    @post("/votes", "Which of two answers is better", shapes.obj(stored=shapes.TRUE))
    async def votes(body: VoteRequest) -> Reply:
        return Reply(vote_on(body), False, state)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return page.answer("index.html", request.headers.get("accept-encoding", ""))

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str, request: Request) -> Response:
        return page.answer(name, request.headers.get("accept-encoding", ""))

    # ---- errors ----

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = explain(error.errors())
        return JSONResponse(error_body(request.url.path, 400, message, param), 400)

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return JSONResponse(
            error_body(request.url.path, error.status, error.message, error.param, error.code),
            error.status,
            error.headers,
        )

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route only
            routes = [
                r
                for r in app.routes
                if isinstance(r, Route) and r.path_regex.match(request.url.path) and r.include_in_schema
            ]
            headers["allow"] = ", ".join(sorted({m for r in routes for m in r.methods or ()}))
        return JSONResponse(
            error_body(request.url.path, error.status_code, str(error.detail)), error.status_code, headers
        )

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(request.url.path, 500, "the server failed; its log says more"), 500)

    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        document.get("components", {}).get("schemas", {}).pop("HTTPValidationError", None)
        document.get("components", {}).get("schemas", {}).pop("ValidationError", None)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for shape in document["components"]["schemas"].values():
            if (model := shape.get("properties", {}).get("model")) is not None:
                (model["anyOf"][0] if "anyOf" in model else model)["enum"] = list(models)
        if settings.keys:
            document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    counting = _Counting(app, metrics)
    posts = {r.path for r in app.routes if isinstance(r, Route) and "POST" in (r.methods or ())}
    guarded: Any = Guard(
        counting,
        settings.keys,
        settings.hosts,
        {"/", *(f"/page/{n}" for n in page.names)},
        posts,
        settings.max_body,
        settings.log_prompts,
    )
    if settings.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=settings.origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"]
        )
    return guarded


class _Counting:
    """Counts answers by path and status."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(getattr(scope.get("route"), "path", "other"), str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, watched if scope["type"] == "http" else send)


def explain(errors: Any) -> tuple[str, str | None]:
    """One line about what is wrong with a body, and the field; never with what was in it."""
    deepest = max(errors, key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    path = [str(p) for p in deepest["loc"][1:]]
    # Branches of a union are named in the path; the field is what the client wrote.
    written = deepest["type"] in ("extra_forbidden", "missing")
    shown = [
        p
        for i, p in enumerate(path)
        if written
        and i == len(path) - 1
        or not (
            "[" in p
            or p.startswith("constrained-")
            or p in ("str", "int", "float", "bool", "none")
            or isinstance(getattr(schema, p, None), type)
        )
    ]
    name = ".".join(shown)
    if deepest["type"] == "extra_forbidden":
        return f"{name}: this field is not supported; leave it out", name
    if deepest["type"] == "json_invalid":
        return "the body is not JSON", None
    text = deepest["msg"].removeprefix("Value error, ")
    return f"{name or 'body'}: {text}"[:500], name or None


def _append(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(line)
        f.flush()
        os.fsync(f.fileno())
