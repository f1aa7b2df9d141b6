"""Searching an index: by words, by vectors, and by both at once with weights that were fitted."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from craton.base import Progress, UserError, amount, publish
from craton.retrieval.encode import TextEncoder
from craton.retrieval.index import Hit, Index, best

# The share of words beside vectors where an index is too small to be fitted: between the best of four sets of questions
# (docs/ground.md).
LEXICAL_SHARE = 0.3
_COMPARED = 1000  # of the highest scores, whose mean and spread a leg's scores are compared by
_RERANKED = 50


def fused(lexical: np.ndarray, dense: np.ndarray | None, share: float) -> np.ndarray:
    """Scores (passages,) of both legs as one: share of the lexical one, each in standard deviations above the mean of
    its best."""
    if dense is None:
        return lexical
    if not lexical.any():
        return _above(dense)
    return share * _above(lexical) + (1 - share) * _above(dense)


def _above(scores: np.ndarray) -> np.ndarray:
    count = min(_COMPARED, len(scores))
    top = np.partition(scores, len(scores) - count)[len(scores) - count :]
    return (scores - top.mean()) / (top.std() + 1e-9)


def share_of(index: Index) -> float:
    """The lexical share that an index was fitted with, or the usual one."""
    return float(index.store.get("share") or LEXICAL_SHARE)


def search(
    index: Index,
    query: str,
    count: int = 10,
    where: Mapping[str, str] | None = None,
    reranker: TextEncoder | None = None,
) -> list[Hit]:
    """The best passages, the best first. where: what a document's metadata must say, or its name begin with (`name`).
    reranker: a cross-encoder that orders the best anew. UserError for an empty query."""
    if not query.strip():
        raise UserError("the query is empty")
    lexical, dense = index.legs(query)
    scores = fused(lexical, dense, share_of(index))
    wanted = max(count, _RERANKED) if reranker is not None else count
    places = _best(scores, lexical, dense, len(scores) if where else wanted)
    numbers = index.numbers[places, 0]
    hits = []
    for start in range(0, len(places), 512):
        some = places[start : start + 512]
        held = {p.number: p for p in index.store.passages(numbers[start : start + 512].tolist())}
        for place in some:
            passage = held.get(int(index.numbers[place, 0]))
            if passage is None or (where and not matches(passage, where)):  # None: dropped since it was opened
                continue
            own = 0.0 if dense is None else float(dense[place])
            hits.append(Hit(passage, float(scores[place]), float(lexical[place]), own))
        if len(hits) >= wanted:
            break
    hits = hits[:wanted]
    if reranker is not None and hits:
        for hit, score in zip(hits, reranker.scores(query, [h.passage.text for h in hits]), strict=True):
            hit.score = float(score)
        hits.sort(key=lambda h: -h.score)
    return hits[:count]


def _best(scores: np.ndarray, lexical: np.ndarray, dense: np.ndarray | None, count: int) -> np.ndarray:
    """Places of the best; by words alone only those that hold any of the query's."""
    if dense is None:
        return best(lexical, count)
    return best(scores - scores.min() + 1.0, count)


def matches(passage: Any, where: Mapping[str, str]) -> bool:
    """Whether a passage's document says what is asked for."""
    known = {k: str(v) for k, v in passage.metadata.items()}
    return all(passage.document.startswith(v) if k == "name" else known.get(k) == v for k, v in where.items())


def said(hit: Hit) -> dict[str, Any]:
    """A hit as JSON has it."""
    p = hit.passage
    out = {"document": p.document, "start": p.start, "end": p.end, "score": round(hit.score, 5), "text": p.text}
    more = {"page": p.page, "title": p.title, "heading": p.heading, "metadata": p.metadata}
    return out | {k: v for k, v in more.items() if v}


def ranked(index: Index, query: str, count: int) -> list[tuple[str, float]]:
    """The best documents, each with the score of its best passage."""
    lexical, dense = index.legs(query)
    scores = fused(lexical, dense, share_of(index))
    found: dict[int, float] = {}
    wanted = count
    while len(found) < count:
        places = _best(scores, lexical, dense, wanted)
        for place in places:
            found.setdefault(int(index.numbers[place, 1]), float(scores[place]))
        if len(places) < wanted:
            break
        wanted *= 2
    order = list(found.items())[:count]
    names = index.document_names
    best_of: dict[str, float] = {}
    for number, score in order:
        if number in names:
            best_of.setdefault(names[number], score)  # two files may hold one id
    return list(best_of.items())


def write_run(index: Index, queries: Sequence[tuple[str, str]], out: Path, count: int = 1000) -> dict[str, list[str]]:
    """A TREC run: for each query its best documents, a line each (`query Q0 document rank score craton`). Returns
    them."""
    progress, found = Progress(), dict[str, list[str]]()
    with publish(out) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for done, (number, text) in enumerate(queries, 1):
            for rank, (name, score) in enumerate(ranked(index, text, count), 1):
                f.write(f"{_word(number)} Q0 {_word(name)} {rank} {score:.6f} craton\n")
                found.setdefault(number, []).append(name)
            progress.show(f"queries: {amount(done, '')} of {amount(len(queries), '')}")
    progress.clear()
    return found


def _word(name: str) -> str:
    """A name without blanks, which separate the columns of a run."""
    return "_".join(name.split())


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """query -> document -> how relevant, of BEIR's TSV or TREC's four columns. UserError naming the line."""
    out: dict[str, dict[str, int]] = {}
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            parts = line.split()
            if not parts or (number == 1 and not parts[-1].lstrip("-").isdigit()):
                continue
            if len(parts) not in (3, 4) or not parts[-1].lstrip("-").isdigit():
                raise UserError(f"{path}:{number}: not `query document score` or `query 0 document score`")
            out.setdefault(parts[0], {})[parts[-2]] = int(parts[-1])
    return out


def ndcg(ranking: Iterable[str], relevant: Mapping[str, int], count: int = 10) -> float:
    """Normalised discounted cumulative gain (Järvelin and Kekäläinen 2002) with the judgements as gains."""
    gains = [max(0, relevant.get(name, 0)) for name in list(ranking)[:count]]
    ideal = sorted((max(0, g) for g in relevant.values()), reverse=True)[:count]
    discounts = 1 / np.log2(np.arange(2, count + 2))
    most = float(np.dot(ideal, discounts[: len(ideal)]))
    return float(np.dot(gains, discounts[: len(gains)])) / most if most else 0.0


def judged(
    rankings: Mapping[str, Sequence[str]], relevant: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, float]]:
    """nDCG@10, recall@100 and MRR@10 over the queries that have judgements, as trec_eval has them: mean, and half the
    width of its 95 % interval."""
    each: dict[str, list[float]] = {"ndcg@10": [], "recall@100": [], "mrr@10": []}
    for number, own in relevant.items():
        wanted = {name for name, score in own.items() if score > 0}
        if number not in rankings or not wanted:
            continue
        ranking = list(rankings[number])
        first = next((rank for rank, name in enumerate(ranking[:10], 1) if name in wanted), 0)
        each["ndcg@10"].append(ndcg(ranking, own))
        each["recall@100"].append(len(wanted & set(ranking[:100])) / len(wanted))
        each["mrr@10"].append(1 / first if first else 0.0)
    if not each["ndcg@10"]:
        raise UserError("none of the queries has a judged document; do --queries and --qrels belong together?")
    out = {}
    for name, values in each.items():
        half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        out[name] = {"mean": round(float(np.mean(values)), 5), "interval": round(half, 5), "queries": len(values)}
    return out
