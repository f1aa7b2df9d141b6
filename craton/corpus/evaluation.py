"""What a corpus must not contain: the word n-grams of evaluation files."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from craton.base import UserError, say
from craton.corpus import records, sources
from craton.corpus.decode import Decoder
from craton.corpus.papers import pages_of
from craton.corpus.words import Words, ngrams

NGRAM, SHORTEST = 13, 8


@dataclass
class Evaluation:
    """Word n-grams of evaluation items, sorted: {n: hashes}, and how many items were too short to look for."""

    grams: dict[int, np.ndarray]
    items: int
    too_short: int

    def found_in(self, words: Words) -> bool:
        return any(np.isin(ngrams(words.folded, n), g).any() for n, g in self.grams.items())


def item_grams(item: str, whole: bool = False) -> tuple[int, np.ndarray] | None:
    """n and the n-grams of an item: 13 words (GPT-3, arXiv 2005.14165 app. C), an item of 8 to 12 words whole; None for
    a shorter one. Where words are not spaced two characters stand for a word. whole: longer ones too, where symbols are
    few and any 13 in a row are found anywhere."""
    words = Words(item)
    scale = 2 if words.unspaced > 0.5 else 1
    n = len(words.folded) if whole else min(NGRAM * scale, len(words.folded))
    return None if n < SHORTEST * scale else (n, ngrams(words.folded, n))


def evaluation_grams(items: list[str], whole: bool = False) -> Evaluation:
    """The n-grams of all items."""
    grams: dict[int, list[np.ndarray]] = defaultdict(list)
    found = [one for one in (item_grams(item, whole) for item in items) if one is not None]
    for n, own in found:
        grams[n].append(own)
    unique = {n: np.unique(np.concatenate(g)) for n, g in grams.items()}
    return Evaluation(unique, len(found), len(items) - len(found))


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _strings(v)


def _values(file: sources.SourceFile) -> Iterator[Any]:
    """The records of an evaluation file as they are, or its texts."""
    name = sources.shown(file.path)
    decoder = Decoder(name, kind=file.kind)
    if file.kind in sources.PAPERS:
        yield from pages_of(file.kind, sources.plain(file.path), name)[0]
    elif file.kind == "parquet":
        yield from records.parquet_rows(sources.plain(file.path), name)
    elif file.kind in ("jsonl", "json", "table"):
        with sources.open_binary(file.path) as f:
            pieces = decoder.pieces(f)
            yield from records.csv_rows(pieces, name) if file.kind == "table" else records.json_items(pieces, name)
    else:
        yield from (d.text for d in sources.read([file], sources.Reading()))


def _items(file: sources.SourceFile) -> Iterator[str]:
    """Every string of a file. UserError if it cannot be read."""
    try:
        for value in _values(file):
            if isinstance(value, UserError):
                raise value
            yield from _strings(value)
    except sources.UNREADABLE as error:
        raise UserError(f"{sources.shown(file.path)}: cannot be read ({error})") from None


def read_evaluation(paths: list[str]) -> Evaluation | None:
    """Every string in the given evaluation files. UserError for one that cannot be read or has none."""
    if not paths:
        return None
    items: list[str] = []
    files, passed = sources.find(paths)
    if passed:
        say(f"--decontaminate passes over {len(passed)} files that are no text, such as {passed[0]}")
    for file in files:
        own = list(_items(file))
        if not any(item.strip() for item in own):
            raise UserError(f"{sources.shown(file.path)}: no text to look for in the corpus")
        items += own
    found = evaluation_grams(items)
    if not found.grams:
        raise UserError(f"{paths[0]}: no evaluation item of {SHORTEST} words or more to look for")
    return found
