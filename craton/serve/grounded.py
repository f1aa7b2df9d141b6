"""Search in indexes of documents, and answers from them that cite them."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from craton.base import UserError, say
from craton.retrieval import answer
from craton.retrieval.index import Index
from craton.retrieval.search import said, search
from craton.retrieval.store import guarded
from craton.serve import shapes
from craton.serve.reply import State
from craton.serve.schema import AskRequest, SearchRequest
from craton.serve.served import ApiError

_HIT = shapes.obj(
    document=shapes.STRING, start=shapes.INTEGER, end=shapes.INTEGER, score=shapes.NUMBER, text=shapes.STRING
)
_FOUND = shapes.obj(query=shapes.STRING, results=shapes.many(_HIT))
_CITED = shapes.obj(document=shapes.STRING, start=shapes.INTEGER, end=shapes.INTEGER, quote=shapes.STRING)
_ANSWER = shapes.obj(answer=shapes.STRING, found={"type": "boolean"}, citations=shapes.many(_CITED))


class Shelf:
    """An index that is served: one thread at a time reads it."""

    def __init__(self, folder: Path):
        self.index, self.lock = Index(folder), threading.Lock()

    async def do(self, work: Callable[[Index], Any]) -> Any:
        """What a function makes of the index, in another thread. ApiError for what is wrong with what was asked."""
        try:
            return await asyncio.to_thread(self._locked, work)
        except UserError as error:
            raise ApiError(400, str(error)) from None

    def _locked(self, work: Callable[[Index], Any]) -> Any:
        with self.lock, guarded(self.index.folder):
            return work(self.index)


def open_shelves(given: list[str]) -> dict[str, Shelf]:
    """NAME=DIR each. UserError for a name that is there twice, or a folder that holds no index."""
    out: dict[str, Shelf] = {}
    for item in given:
        name, equals, folder = item.partition("=")
        if not equals or not name:
            name, folder = Path(item).resolve().name, item
        if name in out:
            raise UserError(f"two indexes are named {name!r}; give NAME=DIR", field="index")
        out[name] = Shelf(Path(folder))
        counts = out[name].index.store.counts()
        say(f"{name}: an index of {counts['documents']} documents, {counts['passages']} passages")
    return out


def _shelf(state: State, name: str | None) -> Shelf:
    """The index of a name; the only one may be left out."""
    shelves = state.settings.indexes
    if name is None and len(shelves) == 1:
        return next(iter(shelves.values()))
    if name is None or name not in shelves:
        known = ", ".join(shelves) or "none is served (--index NAME=DIR)"
        raise ApiError(404, f"index: there is no index {name!r}; known: {known}", "index")
    return shelves[name]


def routes(state: State) -> APIRouter:
    """Search, and answers without a model."""
    router = APIRouter()

    @router.post(**state.route("/v1/search", "The passages of an index that fit a query", _FOUND))
    async def find(body: SearchRequest) -> Response:
        def work(index: Index) -> list[dict[str, Any]]:
            return [said(h) for h in search(index, body.query, body.max_num_results, body.filters)]

        return JSONResponse({"query": body.query, "results": await _shelf(state, body.index).do(work)})

    @router.post(**state.route("/v1/ask", "The sentence of an index that answers a question, or none", _ANSWER))
    async def ask(body: AskRequest) -> Response:
        def work(index: Index) -> dict[str, Any]:
            return answer.extract(index, body.question, body.filters).said()

        return JSONResponse(await _shelf(state, body.index).do(work))

    return router
