"""One batch of documents through every per-document step; runs in worker processes."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rensa
import zstandard

from craton.corpus import quality
from craton.corpus.sources import Document
from craton.corpus.words import Words, mix, ngrams

STEPS = ("repair", "html", "quality", "english", "exact", "near", "decontaminate")
BANDS, ROWS, SHINGLE, SEED = 14, 8, 5, 1  # FineWeb's MinHash: 112 hashes of word 5-grams, match likely above 0.72

INDEX = np.dtype(
    [("name", "u8"), ("part", "u4"), ("source", "u4"), ("bytes", "u8"), ("exact", "u8", 2), ("bands", "u8", BANDS)]
)


@dataclass
class Dropped:
    """Documents that a rule dropped: how many, their bytes, and a few to look at."""

    documents: int = 0
    bytes: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        self.documents += 1
        self.bytes += len(text.encode("utf-8", "surrogatepass"))
        if len(self.examples) < 3:
            self.examples.append({"document": name, "text": " ".join(text[:400].split())[:160]})

    def merge(self, other: "Dropped") -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.examples = (self.examples + other.examples)[:3]


@dataclass
class Evaluation:
    """Word n-grams of evaluation items, sorted: {n: hashes}, and how many items were too short to look for."""

    grams: dict[int, np.ndarray]
    items: int
    too_short: int

    def found_in(self, words: Words) -> bool:
        return any(np.isin(ngrams(words.folded, n), g).any() for n, g in self.grams.items())


EVALUATION_NGRAM, EVALUATION_SHORTEST = 13, 8


def evaluation_grams(items: list[str]) -> Evaluation:
    """13-grams of each item (GPT-3, arXiv 2005.14165 app. C); an item of 8 to 12 words counts whole."""
    grams: dict[int, list[np.ndarray]] = defaultdict(list)
    short = 0
    for item in items:
        words = Words(item).folded
        n = min(EVALUATION_NGRAM, len(words))
        if n < EVALUATION_SHORTEST:
            short += 1
            continue
        grams[n].append(ngrams(words, n))
    return Evaluation({n: np.unique(np.concatenate(g)) for n, g in grams.items()}, len(items) - short, short)


def bands_of(words: Words, fallback: np.ndarray) -> np.ndarray:
    """The 14 keys of a text; texts that share one are near duplicates. Under five words: its exact hash."""
    shingles = ngrams(words.folded, SHINGLE)
    if not len(shingles):
        return mix(fallback[0] + np.arange(BANDS, dtype=np.uint64))
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], BANDS * ROWS, SEED)
    rows = np.array(matrix.to_rows()[0], np.uint64).reshape(BANDS, ROWS)
    key = np.arange(1, BANDS + 1, dtype=np.uint64)
    for i in range(ROWS):
        key = mix(key * np.uint64(0x9E3779B97F4A7C15) + rows[:, i])
    return key


def _html_text(text: str) -> str:
    import trafilatura

    found = trafilatura.extract(text, favor_precision=True, include_comments=False, deduplicate=False)
    return quality.strip_html_lines(found or "")


def clean(batch: list[Document], skip: frozenset[str], mask: bool, evaluation: Evaluation | None, out: Path) -> None:
    """Write out.zst (a JSON line a kept document), out.npy (INDEX rows) and last out.json (counts)."""
    dropped: dict[str, Dropped] = defaultdict(Dropped)
    counts: Counter[str] = Counter()
    rows, lines = [], []
    for document in batch:
        text, kind = document.text, document.kind
        counts["documents"] += document.part == 0
        counts["parts"] += 1
        counts["bytes"] += len(text.encode("utf-8", "surrogatepass"))
        if "repair" not in skip:
            fixed = quality.repair(text)
            counts["repaired"] += fixed != text
            text = fixed
        if kind == "html" and "html" not in skip:
            text = _html_text(text)
        if mask:
            text, masked = quality.mask_personal(text)
            counts["personal_masked"] += masked
        if not text.strip():
            dropped["empty"].add(document.name, document.text)
            continue
        words = Words(text)
        if "quality" not in skip:
            code = kind == "code" or (kind == "unknown" and quality.kind_of(text) == "code")
            counts["code" if code else "prose"] += 1
            if code:
                why = quality.reject_code(text)
            else:
                why = quality.reject_prose(text, words, kind == "html", "english" not in skip)
            if why and not (document.part and why.startswith("gopher_under")):
                dropped[why].add(document.name, text)
                continue
        if evaluation and evaluation.found_in(words):
            dropped["contaminated"].add(document.name, text)
            continue
        data = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        exact = np.frombuffer(hashlib.blake2b(" ".join(data.split()).encode(), digest_size=16).digest(), np.uint64)
        near = bands_of(words, exact) if "near" not in skip else np.zeros(BANDS, np.uint64)
        name_bytes = document.name.encode("utf-8", "surrogatepass")
        name = int.from_bytes(hashlib.blake2b(name_bytes, digest_size=8).digest(), "little")
        rows.append((name, document.part, document.source, len(data.encode()), exact, near))
        lines.append(json.dumps({"name": document.name, "text": data, "license": document.license}))
    _write(out, lines, rows, {"counts": counts, "dropped": {k: asdict(v) for k, v in dropped.items()}})


def _write(out: Path, lines: list[str], rows: list[tuple[Any, ...]], facts: dict[str, Any]) -> None:
    """The batch's three files; the last one makes it exist."""
    out.with_suffix(".zst").write_bytes(zstandard.ZstdCompressor(1).compress("\n".join(lines).encode()))
    with open(out.with_suffix(".npy"), "wb") as f:
        np.save(f, np.array(rows, INDEX))
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts))
    temporary.rename(out.with_suffix(".json"))


def read_batch(path: Path) -> list[dict[str, str]]:
    data = zstandard.ZstdDecompressor().decompress(path.with_suffix(".zst").read_bytes())
    return [json.loads(line) for line in data.split(b"\n") if line]
