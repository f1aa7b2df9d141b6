"""One batch of documents through every per-document step; runs in worker processes."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import rensa
import zstandard

from craton.base import UserError
from craton.corpus import quality
from craton.corpus.evaluation import Evaluation
from craton.corpus.offsets import Offsets
from craton.corpus.pages import html_text
from craton.corpus.papers import pages_of
from craton.corpus.sources import PAPERS, Document, parts, plain
from craton.corpus.words import Words, mix, ngrams

STEPS = ("repair", "html", "quality", "english", "exact", "near", "decontaminate")
BANDS, ROWS, SHINGLE, SEED = 14, 8, 5, 1  # FineWeb's MinHash: 112 hashes of word 5-grams, match likely above 0.72

INDEX = np.dtype(
    [
        ("name", "u8"),
        ("part", "u4"),
        ("source", "u4"),
        ("start", "u8"),  # characters of the document before the part
        ("page", "u4"),  # on which it begins; 0 where there are none
        ("bytes", "u8"),
        ("exact", "u8", 2),
        ("bands", "u8", BANDS),
    ]
)


@dataclass
class Dropped:
    """Documents that a rule dropped: how many, their bytes, and a few to look at."""

    documents: int = 0
    bytes: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)  # bytes by number of the source

    def add(self, document: Document, text: str, measured: str = "") -> None:
        """text: as it would have been kept. measured: the value and the limit."""
        size = len(text.encode("utf-8", "surrogatepass"))
        self.documents += 1
        self.bytes += size
        self.sources[str(document.source)] = self.sources.get(str(document.source), 0) + size
        if len(self.examples) < 3:
            self.examples.append(example(document.name, text, measured))

    def merge(self, other: "Dropped") -> None:
        """What another batch dropped by the same rule."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.examples = (self.examples + other.examples)[:3]
        for source, size in other.sources.items():
            self.sources[source] = self.sources.get(source, 0) + size


def example(name: str, text: str, measured: str = "") -> dict[str, str]:
    """A dropped document to look at."""
    out = {"document": name, "text": " ".join(text[:400].split())[:160]}
    return out | {"measured": measured} if measured else out


def bands_of(words: Words, fallback: np.ndarray, web: bool) -> np.ndarray:
    """The 14 keys of a text; texts that share one are near duplicates. Under five words: its exact hash. web: digits
    are alike, as FineWeb has it."""
    shingles = ngrams(words.folded if web else words.folded_but_digits, SHINGLE)
    if not len(shingles):
        return mix(fallback[0] + np.arange(BANDS, dtype=np.uint64))
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], BANDS * ROWS, SEED)
    rows = np.array(matrix.to_rows()[0], np.uint64).reshape(BANDS, ROWS)
    key = np.arange(1, BANDS + 1, dtype=np.uint64)
    for i in range(ROWS):
        key = mix(key * np.uint64(0x9E3779B97F4A7C15) + rows[:, i])
    return key


def _keys(text: str, words: Words | None, web: bool) -> tuple[np.ndarray, np.ndarray]:
    """What equal texts and near duplicates share. words: of the text; None where near duplicates do not matter."""
    exact = np.frombuffer(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest(), np.uint64)
    return exact, np.zeros(BANDS, np.uint64) if words is None else bands_of(words, exact, web)


@dataclass(frozen=True)
class Cleaning:
    """What is done to each document."""

    skip: frozenset[str]
    mask_personal: bool
    evaluation: Evaluation | None
    skip_bad: bool = False


class _Batch:
    """The documents of a batch on their way through the steps."""

    def __init__(self, cleaning: Cleaning):
        self.cleaning = cleaning
        self.dropped: dict[str, Dropped] = defaultdict(Dropped)
        self.counts: Counter[str] = Counter()
        self.source_bytes: Counter[str] = Counter()  # read, by number of the source
        self.bad: list[str] = []
        self.rows: list[tuple[Any, ...]] = []
        self.lines: list[str] = []

    def add(self, document: Document) -> None:
        """A document as it was read."""
        skip, counts = self.cleaning.skip, self.counts
        pages: list[int] = []
        if document.kind in PAPERS and not self._opened(document, pages):
            return
        text, kind = document.text, document.kind
        counts["documents"] += document.part == 0
        size = len(text.encode("utf-8", "surrogatepass"))
        counts["bytes"] += size
        whole = kind == "html" or kind in PAPERS
        if kind == "html" and "html" not in skip:
            text, seen = html_text(text, document.web)
            self._beside(document, len(seen.encode("utf-8", "replace")) - len(text.encode("utf-8", "replace")))
            if not text.strip():
                counts["parts"] += 1
                self.source_bytes[str(document.source)] += size
                self.dropped["html_without_text"].add(document, document.text)
                return
        for number, (start, piece) in enumerate(parts([text]) if whole else [(document.start, text)]):
            page = int(np.searchsorted(pages, start, "right")) if pages else 0
            begins = [(p - start, n) for n, p in enumerate(pages, 1) if start < p < start + len(piece)]
            self._part(replace(document, part=document.part + number, start=start, page=page, text=""), piece, begins)

    def _beside(self, document: Document, size: int) -> None:
        """Bytes of a page that a reader sees and that are not its main text: menus, notes, footers."""
        if size > 0:
            beside = self.dropped["beside_the_main_text"]
            beside.bytes += size
            beside.sources[str(document.source)] = beside.sources.get(str(document.source), 0) + size
            self.source_bytes[str(document.source)] += size

    def _opened(self, document: Document, pages: list[int]) -> bool:
        """The text of a paper; pages: where each begins."""
        try:
            texts, failed = pages_of(document.kind, plain(Path(document.path)), document.name)
            self.bad += failed
            document.text = "\n\n".join(texts)
            if document.kind != "docx":  # which has no pages
                pages += [0, *np.cumsum([len(t) + 2 for t in texts])[:-1].tolist()]
        except UserError as error:
            if document.named and not self.cleaning.skip_bad:
                raise
            self.bad.append(str(error))
            return False
        return True

    def _part(self, document: Document, text: str, pages: list[tuple[int, int]]) -> None:
        """One part through what is left of the steps. pages: places in it at which a page begins, and its number."""
        cleaning, original = self.cleaning, text
        self.counts["parts"] += 1
        self.source_bytes[str(document.source)] += len(text.encode("utf-8", "surrogatepass"))
        if "repair" not in cleaning.skip:
            fixed = quality.repair(text)
            self.counts["repaired"] += fixed != text
            text = fixed
        if cleaning.mask_personal:
            text, masked = quality.mask_personal(text)
            self.counts["personal_masked"] += masked
        if not text.strip():
            self.dropped["empty"].add(document, text)
            return
        words = Words(text)
        if document.web and "quality" not in cleaning.skip and (why := self._rejected(document, text, words)):
            self.dropped[why.rule].add(document, text, why.measured)
            return
        if cleaning.evaluation and cleaning.evaluation.found_in(words):
            self.dropped["contaminated"].add(document, text)
            return
        self._keep(document, original, text, words, pages)

    def _rejected(self, document: Document, text: str, words: Words) -> quality.Rejected | None:
        """The rule for pages of the web that a text fails."""
        code = document.kind == "code" or (document.kind == "unknown" and quality.kind_of(text) == "code")
        self.counts["code" if code else "prose"] += 1
        if code:
            why = quality.reject_code(text)
        else:
            language = quality.language_of(text) if "english" not in self.cleaning.skip else ""
            why = quality.reject_prose(text, words, document.kind == "html", language)
        return None if why and document.part and why.rule.startswith("gopher_under") else why

    def _keep(self, document: Document, original: str, text: str, words: Words, pages: list[tuple[int, int]]) -> None:
        data = text.encode("utf-8", "replace").decode()
        exact, near = _keys(data, words if "near" not in self.cleaning.skip else None, document.web)
        name = int.from_bytes(hashlib.blake2b(document.name.encode(), digest_size=8).digest(), "little")
        place = (name, document.part, document.source, document.start, document.page)
        self.rows.append((*place, len(data.encode()), exact, near))
        line: dict[str, Any] = {"name": document.name, "text": data, "license": document.license}
        if pages:
            line["pages"] = pages
        if data != original:
            offsets = Offsets(original, data)
            line["offsets"] = (offsets.repaired, offsets.original)
        self.lines.append(json.dumps(line))


def clean(batch: list[Document], cleaning: Cleaning, out: Path) -> None:
    """Write out.zst (a JSON line a kept part), out.npy (INDEX rows) and last out.json (counts)."""
    done = _Batch(cleaning)
    for document in batch:
        done.add(document)
    facts = {"counts": done.counts, "bad": done.bad, "sources": done.source_bytes}
    _write(out, done.lines, done.rows, facts | {"dropped": {k: asdict(v) for k, v in done.dropped.items()}})


def _write(out: Path, lines: list[str], rows: list[tuple[Any, ...]], facts: dict[str, Any]) -> None:
    """The batch's three files; the last one makes it exist."""
    out.with_suffix(".zst").write_bytes(zstandard.ZstdCompressor(1).compress("\n".join(lines).encode()))
    with open(out.with_suffix(".npy"), "wb") as f:
        np.save(f, np.array(rows, INDEX))
    temporary = out.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(facts))
    temporary.rename(out.with_suffix(".json"))


def read_batch(path: Path) -> list[dict[str, Any]]:
    data = zstandard.ZstdDecompressor().decompress(path.with_suffix(".zst").read_bytes())
    return [json.loads(line) for line in data.split(b"\n") if line]


def split_part(path: Path, row: int, size: int, out: Path) -> bool:
    """A cleaned batch again, under another name, with about `size` bytes at the end of a part as a part of their own.
    Returns whether that was possible."""
    documents, index = read_batch(path), np.load(path.with_suffix(".npy"), allow_pickle=False)
    facts = json.loads(path.with_suffix(".json").read_text())
    text, whole = documents[row]["text"], index[row]
    wanted = len(text) - max(1, round(len(text) * size / int(whole["bytes"])))
    cuts = (text.rfind(mark, len(text) // 2, wanted + 1) + len(mark) for mark in ("\n\n", "\n", " "))
    cut = next((c for c in cuts if c > len(text) // 2), 0)
    if not cut or not text[cut:].strip():
        return False
    pieces = np.repeat(index[row : row + 1], 2)
    for i, piece in enumerate((text[:cut], text[cut:])):
        exact, bands = _keys(piece, Words(piece) if whole["bands"].any() else None, web=False)
        pieces[i]["exact"], pieces[i]["bands"], pieces[i]["bytes"] = exact, bands, len(piece.encode())
    place = cut
    if "offsets" in documents[row]:
        place = Offsets.of(*documents[row]["offsets"]).original_of(cut)
    pieces[1]["part"], pieces[1]["start"] = whole["part"] + 1, whole["start"] + place
    for begins, number in documents[row].get("pages", []):
        if begins <= place:
            pieces[1]["page"] = number
    plain = {k: documents[row][k] for k in ("name", "license")}
    lines = [json.dumps(d) for d in documents]
    lines[row : row + 1] = [json.dumps({**plain, "text": t}) for t in (text[:cut], text[cut:])]
    _write(out, lines, [tuple(r) for r in np.concatenate([index[:row], pieces, index[row + 1 :]]).tolist()], facts)
    return True
