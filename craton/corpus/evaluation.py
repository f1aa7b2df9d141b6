"""What a corpus must not contain: the word n-grams of evaluation files."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from craton.base import UserError
from craton.corpus import records, sources
from craton.corpus.decode import Decoder
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


def evaluation_grams(items: list[str]) -> Evaluation:
    """13-grams of each item (GPT-3, arXiv 2005.14165 app. C); an item of 8 to 12 words counts whole. Where words are
    not spaced two characters stand for a word."""
    grams: dict[int, list[np.ndarray]] = defaultdict(list)
    short = 0
    for item in items:
        all_words = Words(item)
        words, scale = all_words.folded, 2 if all_words.unspaced > 0.5 else 1
        n = min(NGRAM * scale, len(words))
        if n < SHORTEST * scale:
            short += 1
            continue
        grams[n].append(ngrams(words, n))
    return Evaluation({n: np.unique(np.concatenate(g)) for n, g in grams.items()}, len(items) - short, short)


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
    decoder = Decoder(name)
    if file.kind in ("jsonl", "json"):
        with sources.open_binary(file.path) as f:
            yield from records.json_items(decoder.pieces(f), name)
    elif file.kind == "table":
        with sources.open_binary(file.path) as f:
            first, *others = list(records.lines(decoder.pieces(f))) or [""]
            separator = max(",;\t|", key=first.count)
            yield from csv.reader((line + "\n" for line in [first, *others]), delimiter=separator)
    elif file.kind == "parquet":
        yield from records.parquet_rows(file.path, name)
    else:
        yield from (d.text for d in sources.read([file], sources.Reading()))


def read_evaluation(paths: list[str]) -> Evaluation | None:
    """Every string in the given evaluation files. UserError for one that cannot be read or has none."""
    if not paths:
        return None
    items: list[str] = []
    for file in sources.find(paths)[0]:
        before = len(items)
        for value in _values(file):
            items += _strings(value)
        if len(items) == before:
            raise UserError(f"{sources.shown(file.path)}: no text to look for in the corpus")
    found = evaluation_grams(items)
    if not found.grams:
        raise UserError(f"{paths[0]}: no evaluation item of {SHORTEST} words or more to look for")
    return found
