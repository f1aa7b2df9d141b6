"""The HTTP API over one or more engines: a router a dialect, errors in the dialect's words, what stands before it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from craton.serve import about, adapters, anthropic, grounded, openai_chat, openai_text, responses, schema, tokens
from craton.serve import schema_anthropic as anthropic_schema
from craton.serve import schema_responses as responses_schema
from craton.serve.guard import Guard, Settings, error_body
from craton.serve.metrics import Counting, Metrics
from craton.serve.page import Page
from craton.serve.reply import State
from craton.serve.served import ApiError, Served

# Names of branches of unions, which appear in the paths of validation errors.
_BRANCHES = {n for m in (schema, anthropic_schema, responses_schema) for n, v in vars(m).items() if isinstance(v, type)}


def create_app(models: dict[str, Served], settings: Settings, metrics: Metrics) -> Any:
    """The ASGI application. Its workers start with it and end with it."""
    state, page = State(models, settings, metrics), Page()
    what = "Compatible with OpenAI's, Open Responses' and Anthropic's APIs."
    off: Any = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(
        title="Craton", version="1", description=what, lifespan=_lifespan, docs_url=None, redoc_url=None, telemetry=off
    )
    app.state.craton = state
    dialects = (openai_chat, openai_text, responses, anthropic, tokens)
    routers = [
        *(d.routes(state) for d in dialects),
        adapters.routes(state),
        grounded.routes(state),
        about.routes(state, page),
    ]
    for router in routers:
        app.include_router(router)
    routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
    _handle_errors(app, routes)
    _document(app, state)
    open_paths = {"/", *(f"/page/{n}" for n in page.names)}
    posts = {r.path for r in routes if "POST" in (r.methods or ())}
    guarded: Any = Guard(Counting(app, metrics), settings, open_paths, posts)
    if not settings.origins:
        return guarded
    methods = ["GET", "POST", "DELETE"]
    return CORSMiddleware(guarded, allow_origins=settings.origins, allow_methods=methods, allow_headers=["*"])


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Workers run as long as the application does."""
    state: State = app.state.craton
    loop = asyncio.get_running_loop()
    workers = {s.worker for s in state.models.values()}
    for worker in workers:
        worker.start(loop)
    watcher = asyncio.create_task(state.watch())
    yield
    state.draining = True
    watcher.cancel()
    await asyncio.gather(*(worker.stop(0) for worker in workers))


def _handle_errors(app: FastAPI, routes: list[Route]) -> None:
    """Every error is JSON in the words of its path's dialect."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return JSONResponse(error_body(request.url.path, error), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await known(request, ApiError(400, *explain(error.errors())))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route only
            here = [r for r in routes if r.path_regex.match(request.url.path)]
            methods = {m for r in here if r.include_in_schema for m in r.methods or ()}
            headers["allow"] = ", ".join(sorted(methods))
        return await known(request, ApiError(error.status_code, str(error.detail), headers=headers))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return await known(request, ApiError(500, "the server failed; its log says more"))


def _document(app: FastAPI, state: State) -> None:
    """The OpenAPI document says what the server does: its own errors, the names of its models, keys."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        shapes = document.setdefault("components", {}).setdefault("schemas", {})
        shapes.pop("HTTPValidationError", None)
        shapes.pop("ValidationError", None)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for shape in shapes.values():
            if (model := shape.get("properties", {}).get("model")) is not None:
                (model["anyOf"][0] if "anyOf" in model else model)["enum"] = [*state.models, *state.settings.aliases]
        if state.settings.keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def explain(errors: Any) -> tuple[str, str | None]:
    """One line about what is wrong with a body, and the field; never with what was in it."""
    nearest = _of_nearest(errors)
    other = [e for e in nearest if e["type"] == "literal_error" and e["loc"][-1] in ("type", "role")]
    deepest = max(other or nearest, key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    path = [str(p) for p in deepest["loc"][1:]]
    # Branches of a union are named in the path; the field is what the client wrote.
    written = deepest["type"] in ("extra_forbidden", "missing")
    last = len(path) - 1
    name = ".".join(p for i, p in enumerate(path) if (written and i == last) or not _is_branch(p))
    if deepest["type"] == "extra_forbidden":
        return f"{name}: this field is not supported; leave it out", name
    if deepest["type"] == "json_invalid":
        return "the body is not JSON", None
    text = deepest["msg"].removeprefix("Value error, ")
    return f"{name or 'body'}: {text}"[:500], name or None


def _of_nearest(errors: Any) -> Any:
    """The errors of the branch of a union that is most nearly what was written: whose kind fits, with the fewest."""
    at = next((i for e in errors for i, p in enumerate(e["loc"]) if i and _is_branch(str(p))), None)
    if at is None:
        return errors
    branches: dict[Any, list[Any]] = {}
    for error in errors:
        branches.setdefault(error["loc"][: at + 1], []).append(error)

    def far(found: list[Any]) -> tuple[bool, int]:
        other = ("literal_error", "string_type", "list_type", "model_type", "model_attributes_type", "dict_type")
        return any(e["type"] in other and len(e["loc"]) <= at + 2 for e in found), len(found)

    return min(branches.values(), key=far)


def _is_branch(word: str) -> bool:
    """Whether a word of a path is the name of a union's branch."""
    plain = ("str", "int", "float", "bool", "none")
    return "[" in word or word.startswith("constrained-") or word in plain or word in _BRANCHES
