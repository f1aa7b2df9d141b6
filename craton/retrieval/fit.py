"""How much words count beside vectors in an index: fitted on questions whose documents are known, or told from how well
each of the two finds the index's own passages."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from craton.base import Progress, UserError, amount
from craton.retrieval.index import Index
from craton.retrieval.passages import sentences
from craton.retrieval.search import LEXICAL_SHARE, fused, ndcg

_SHARES = [round(0.05 * i, 2) for i in range(21)]
_MADE = 200  # questions of an index's own
_KEPT = 0.5  # of a sentence's words
# share = _SLOPE / (dense / lexical)^2, of how well each finds passages by half a sentence, which words find too well:
# read off four sets of real questions with a small encoder (docs/ground.md).
_SLOPE, _LEAST, _MOST = 0.105, 0.1, 0.9


def fit(index: Index, queries: Sequence[tuple[str, str]], relevant: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The share of words with the best mean nDCG@10 over questions that have judgements. UserError if none has."""
    known = [(number, text) for number, text in queries if relevant.get(number)]
    if not known:
        raise UserError("none of the questions has a judged document; do --queries and --qrels belong together?")
    sums, progress = np.zeros(len(_SHARES)), Progress()
    names = index.document_names
    for done, (number, text) in enumerate(known, 1):
        lexical, dense = index.legs(text)
        for i, share in enumerate(_SHARES):
            ranking = _documents(index, fused(lexical, dense, share), names)
            sums[i] += ndcg(ranking, relevant[number])
        progress.show(f"fitting: {amount(done, '')} of {amount(len(known), '')} questions")
    progress.clear()
    means = sums / len(known)
    share = min(
        (s for s, m in zip(_SHARES, means, strict=True) if m == means.max()), key=lambda s: abs(s - LEXICAL_SHARE)
    )
    curve = {str(s): round(float(m), 4) for s, m in zip(_SHARES, means, strict=True)}
    return {"share": share, "by": f"{len(known)} questions", "ndcg@10": curve}


def _documents(index: Index, scores: np.ndarray, names: Mapping[int, str]) -> list[str]:
    """The ten best documents."""
    count = min(40, len(scores))
    places = np.argpartition(-scores, count - 1)[:count]
    places = places[np.argsort(-scores[places], kind="stable")]
    return list(dict.fromkeys(names[int(index.numbers[p, 1])] for p in places))[:10]


def guess(index: Index, seed: int = 0) -> dict[str, Any]:
    """The share told from the index alone: half the words of a sentence, drawn by chance, look for its passage."""
    draw, found = random.Random(seed), {"lexical": 0.0, "dense": 0.0}
    places = draw.sample(range(len(index.numbers)), min(2 * _MADE, len(index.numbers)))
    asked, progress = 0, Progress()
    for place in places:
        (passage,) = index.store.passages([int(index.numbers[place, 0])])
        long = [(a, b) for a, b in sentences(passage.text) if len(passage.text[a:b].split()) >= 8]
        if not long or asked == _MADE:
            continue
        a, b = draw.choice(long)
        words = [w for w in passage.text[a:b].split() if draw.random() < _KEPT]
        if len(words) < 2:
            continue
        lexical, dense = index.legs(" ".join(words))
        assert dense is not None
        for name, scores in (("lexical", lexical), ("dense", dense)):
            above = int((scores > scores[place]).sum())
            found[name] += 1 / np.log2(above + 2) if above < 10 else 0.0
        asked += 1
        progress.show(f"fitting: {amount(asked, '')} of {amount(_MADE, '')} of its own sentences")
    progress.clear()
    if asked < 20 or found["lexical"] == 0:
        return {"share": None, "by": f"nothing: {asked} sentences are too few"}
    ratio = found["dense"] / found["lexical"]
    share = float(np.clip(_SLOPE / max(ratio, 1e-3) ** 2, _LEAST, _MOST))
    means = {name: round(value / asked, 4) for name, value in found.items()}
    return {"share": round(share, 3), "by": f"{asked} of its own sentences", "own ndcg@10": means}
