"""Whether the text that a model was trained on holds a task's test items: 13 words in a row, or a whole short item."""

from pathlib import Path
from typing import Any

import numpy as np

from craton.base import Progress, UserError, read_json
from craton.corpus.evaluation import item_grams
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
    whole = task.kind == "generated"  # its symbols are few
    known = key_of("contamination-2", [c.digest for c in corpora], texts, whole)
    if (found := store.get(known)) is None:
        found = _look(texts, corpora, whole)
        store.put(known, found)
    hits = found["hits"]
    searched = max(1, len(rows) - found["too_short"])
    return {
        "share": len(hits) / searched, "items": [rows[i]["id"] for i in hits], "too_short": found["too_short"],
        "corpora": [str(f) for f in folders],
    }  # fmt: skip


def _look(texts: list[str], corpora: list[Corpus], whole: bool) -> dict[str, Any]:
    found = [item_grams(text, whole) for text in texts]
    tables = {}  # the n-grams of each length, and the items that they are of
    for n in {one[0] for one in found if one is not None}:
        own = [(i, one[1]) for i, one in enumerate(found) if one is not None and one[0] == n]
        tables[n] = np.concatenate([g for _, g in own]), np.concatenate([np.full(len(g), i) for i, g in own])
    hits: set[int] = set()
    progress, size, done = Progress(), sum(c.length("train") for c in corpora), 0
    for corpus in corpora:
        length = corpus.length("train")
        for start in range(0, length, _PIECE):
            first = max(0, start - _OVERLAP)
            piece = corpus.read("train", first, min(length, start + _PIECE) - first)
            folded = Words(corpus.tokenizer.decode(piece.tolist())).folded
            for n, (grams, owner) in tables.items():
                hits.update(owner[np.isin(grams, ngrams(folded, n))].tolist())
            done += len(piece)
            progress.show_part("contamination: tokens", done, size)
    progress.clear()
    return {"hits": sorted(hits), "too_short": sum(one is None for one in found)}


def check_corpus(folder: Path) -> Path:
    """UserError where a folder is no corpus."""
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: no corpus (no manifest.json)", field="corpus")
    return folder
