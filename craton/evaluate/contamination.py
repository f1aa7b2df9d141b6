"""Whether the text that a model was trained on holds a task's test items: 13 words in a row, or a whole short item."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from craton.base import Progress, UserError, read_json, span
from craton.corpus.evaluation import NGRAM, SHORTEST
from craton.corpus.store import Corpus
from craton.corpus.words import Words, ngrams
from craton.evaluate.store import Store, key_of
from craton.tasks.rows import Row
from craton.tasks.task import Task

_PIECE = 1 << 20  # tokens that are decoded at once
_OVERLAP = 256


def corpora_of(model: Path) -> list[Path]:
    """The corpora that a model trained here has read, where they are still there."""
    record = model / "record.json"
    if not record.is_file():
        return []
    found = read_json(record)
    return [Path(c["folder"]) for c in found.get("corpora", []) if (Path(c["folder"]) / "manifest.json").is_file()]


def contaminated(task: Task, rows: list[Row], folders: list[Path], store: Store) -> dict[str, Any]:
    """share: of items that have a run of 13 words (GPT-3, arXiv 2005.14165 app. C), or all of their 8 to 12, in the
    training part of the corpora. items: their ids. too_short: items that cannot be looked for. UserError for a folder
    that is no corpus."""
    corpora = [Corpus(folder, verify=False) for folder in folders]
    texts = [task.plain_text(row) for row in rows]
    known = key_of("contamination-1", [c.digest for c in corpora], texts)
    if (found := store.get(known)) is None:
        found = _look(texts, corpora)
        store.put(known, found)
    hits = found["hits"]
    searched = max(1, len(rows) - found["too_short"])
    return {
        "share": len(hits) / searched, "items": [rows[i]["id"] for i in hits], "too_short": found["too_short"],
        "corpora": [str(f) for f in folders],
    }  # fmt: skip


def _look(texts: list[str], corpora: list[Corpus]) -> dict[str, Any]:
    by_length: dict[int, list[tuple[int, np.ndarray]]] = {}
    short = 0
    for i, text in enumerate(texts):
        words = Words(text)
        scale = 2 if words.unspaced > 0.5 else 1
        n = min(NGRAM * scale, len(words.folded))
        if n < SHORTEST * scale:
            short += 1
        else:
            by_length.setdefault(n, []).append((i, ngrams(words.folded, n)))
    tables = {}
    for n, found in by_length.items():
        grams = np.concatenate([g for _, g in found])
        owner = np.concatenate([np.full(len(g), i) for i, g in found])
        tables[n] = (np.unique(grams), grams, owner)
    hits: set[int] = set()
    progress, whole = Progress(), sum(c.length("train") for c in corpora)
    began, done = time.monotonic(), 0
    for corpus in corpora:
        length = corpus.length("train")
        for start in range(0, length, _PIECE):
            first = max(0, start - _OVERLAP)
            piece = corpus.read("train", first, min(length, start + _PIECE) - first)
            folded = Words(corpus.tokenizer.decode(piece.tolist())).folded
            for n, (unique, grams, owner) in tables.items():
                seen = np.intersect1d(unique, ngrams(folded, n))
                if len(seen):
                    hits |= set(owner[np.isin(grams, seen)].tolist())
            done += len(piece)
            left = (time.monotonic() - began) * (whole - done) / max(1, done)
            progress.show(f"contamination: {done} of {whole} tokens, {span(max(0.0, left))} left")
    progress.clear()
    return {"hits": sorted(hits), "too_short": short}


def check_corpus(folder: Path) -> Path:
    """UserError where a folder is no corpus."""
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: no corpus (no manifest.json)", field="corpus")
    return folder
