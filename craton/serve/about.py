"""What the server says of itself, votes, and the page."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from craton.serve import shapes
from craton.serve.page import Page
from craton.serve.reply import Reply, State
from craton.serve.schema import VoteRequest
from craton.serve.served import ApiError


def routes(state: State, page: Page) -> APIRouter:
    """Models, health, metrics, votes and the page's files."""
    router = APIRouter()

    @router.get(**state.route("/v1/models", "The models that are served", shapes.MODELS))
    async def models() -> Response:
        data = [s.describe() for s in state.models.values()]
        data += [state.find(alias).describe() | {"id": alias} for alias in state.settings.aliases]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return JSONResponse({"object": "list", "data": data, "has_more": False, **ends})

    @router.get(**state.route("/v1/models/{model}", "One of them", shapes.MODEL))
    async def model(model: str) -> Response:
        return JSONResponse(state.find(model).describe() | {"id": model})

    @router.get("/health", summary="Whether the server lives", responses=shapes.plain(503), response_class=Response)
    async def health() -> Response:
        bad = not all(s.worker.thread.is_alive() for s in state.models.values())
        return JSONResponse({"status": "failed" if bad else "ok"}, 503 if bad else 200)

    @router.get("/ready", summary="Whether it takes requests", responses=shapes.plain(503), response_class=Response)
    async def ready() -> Response:
        return JSONResponse({"status": "draining" if state.draining else "ready"}, 503 if state.draining else 200)

    @router.get("/metrics", summary="Prometheus", response_class=Response, **state.security())
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.post(**state.route("/votes", "Which of two answers is better", shapes.obj(stored=shapes.TRUE)))
    async def votes(body: VoteRequest) -> Reply:
        return Reply(_vote(state, body), False, state)

    @router.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return page.answer("index.html", request.headers.get("accept-encoding", ""))

    @router.get("/page/{name}", include_in_schema=False)
    async def part(name: str, request: Request) -> Response:
        return page.answer(name, request.headers.get("accept-encoding", ""))

    return router


async def _vote(state: State, body: VoteRequest) -> AsyncIterator[bytes]:
    if state.settings.votes is None:
        raise ApiError(404, "votes are not kept by this server", code="no_votes")
    for contender in (body.left, body.right):
        state.find(contender.model)
    line = json.dumps({"time": time.time(), **body.model_dump()}, ensure_ascii=False) + "\n"
    await asyncio.to_thread(_append, state.settings.votes, line)
    yield b'{"stored":true}'


def _append(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(line)
        f.flush()
        os.fsync(f.fileno())
