"""`craton index`: an index made or brought up to date, fitted, and what was done said."""

from pathlib import Path
from typing import Any

from craton.base import UserError, count, say
from craton.corpus.sources import Reading
from craton.retrieval import fit
from craton.retrieval.documents import read_queries
from craton.retrieval.index import Index, build
from craton.retrieval.search import LEXICAL_SHARE, read_qrels
from craton.retrieval.store import Store, guarded


def index(
    documents: list[str],
    out: Path,
    encoder: Path | None,
    reading: Reading,
    queries: Path | None = None,
    qrels: Path | None = None,
) -> dict[str, Any]:
    """Returns what was done. queries and qrels: what the two legs' weights are fitted on; where there are none, they
    are told from the index itself."""
    if (queries is None) != (qrels is None):
        raise UserError("--queries and --qrels go together", field="queries" if queries is None else "qrels")
    questions = None if queries is None or qrels is None else (read_queries(queries), read_qrels(qrels))
    with guarded(out):
        facts = build(documents, out, encoder, reading)
        _say(facts, out)
        if facts["encoder"] is not None:
            facts["fit"] = _fitted(out, questions)
    return {"index": str(out), **facts}


def _fitted(out: Path, questions: Any) -> dict[str, Any]:
    opened = Index(out)
    try:
        found = fit.guess(opened) if questions is None else fit.fit(opened, *questions)
    finally:
        opened.close()
    share = found["share"] if found["share"] is not None else LEXICAL_SHARE
    store = Store(out, write=True)
    try:
        store.put("share", str(share))  # of no document, so that nothing is made anew for it
    finally:
        store.close()
    say(f"words count {share:.0%} beside vectors, by {found['by']}")
    return found


def _say(facts: dict[str, Any], out: Path) -> None:
    done = ", ".join(f"{facts[k]} {k}" for k in ("added", "updated", "dropped", "unchanged") if facts[k])
    say(f"{out}: {count(facts['documents'])} documents, {count(facts['passages'])} passages; files: {done or 'none'}")
    for name, why in (("failed", "could not be read"), ("passed", "passed over")):
        some = facts[name]
        if some:
            say(f"{len(some)} {why}, such as {some[0]}")
