"""`craton search` and `craton ask`: what they find, said."""

import contextlib
from pathlib import Path
from typing import Any

from craton.base import UserError, say
from craton.retrieval import answer
from craton.retrieval.documents import read_queries
from craton.retrieval.encode import TextEncoder
from craton.retrieval.index import Hit, Index
from craton.retrieval.search import judged, read_qrels, said, write_run
from craton.retrieval.search import search as find
from craton.retrieval.store import guarded


def _filters(given: list[str]) -> dict[str, str]:
    """KEY=VALUE to a mapping. UserError for anything else."""
    out = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"--where {item}: give KEY=VALUE", field="where")
        out[key] = value
    return out


def search(
    folder: Path,
    query: str | None,
    count: int,
    queries: Path | None,
    run: Path | None,
    where: list[str],
    reranker: Path | None,
    qrels: Path | None = None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Print the passages found, or write a run, and score it where qrels say what is right. Returns them."""
    if (queries is None) != (run is None) or (query is None) == (queries is None):
        raise UserError("give a QUERY, or --queries FILE with --run FILE")
    if count < 1:
        raise UserError(f"-k is {count}, must be 1 or more", field="k")
    filters = _filters(where)
    with guarded(folder), contextlib.closing(Index(folder)) as opened:
        if queries is not None and run is not None:
            relevant = read_qrels(qrels) if qrels is not None else None
            rankings = write_run(opened, read_queries(queries), run, count)
            lines = sum(map(len, rankings.values()))
            say(f"{run}: {lines} lines")
            out: dict[str, Any] = {"run": str(run), "lines": lines}
            if relevant is not None:
                out["scores"] = judged(rankings, relevant)
                for name, score in out["scores"].items():
                    print(f"{name:<11} {score['mean']:.4f} ± {score['interval']:.4f}  ({score['queries']} queries)")
            return out
        assert query is not None
        order = TextEncoder(reranker) if reranker is not None else None
        hits = find(opened, query, count, filters, order)
        if not quiet:
            for number, hit in enumerate(hits, 1):
                print(_line(number, hit))
            if not hits:
                print("nothing found")
        return {"query": query, "results": [said(h) for h in hits]}


def _line(number: int, hit: Hit) -> str:
    p = hit.passage
    place = f"{p.document}, characters {p.start} to {p.end}" + (f", page {p.page}" if p.page else "")
    text = " ".join(p.text.split())
    return f"{number}. {place} ({hit.score:.3f})\n   {text[:300]}{'...' if len(text) > 300 else ''}"


def ask(
    folder: Path, question: str, model: str | None, where: list[str], reranker: Path | None, *, quiet: bool
) -> dict[str, Any]:
    """Print an answer with its citations. Returns it."""
    if not question.strip():
        raise UserError("the question is empty")
    filters = _filters(where)
    with guarded(folder), contextlib.closing(Index(folder)) as opened:
        order = TextEncoder(reranker) if reranker is not None else None
        if model is None:
            found = answer.extract(opened, question, filters, order)
        else:
            from craton.engine.converse import open_talker

            found = answer.ask(opened, question, open_talker(Path(model).name, model), filters, order)
        if not quiet:
            _print(found)
        return {"question": question, **found.said()}


def _print(found: answer.Answer) -> None:
    print(found.answer)
    for number, c in enumerate(found.citations, 1):
        page = f", page {c.page}" if c.page else ""
        print(f'[{number}] {c.document}{page}, characters {c.start} to {c.end}: "{" ".join(c.quote.split())[:300]}"')
    for sentence in found.own:
        print(f"the model's own, not borne out: {sentence}")
