"""Indexes: made of documents, brought up to date, opened for search."""

import itertools
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from craton.base import Progress, UserError, amount, digest, publish, read_json, say, sha256, write_json
from craton.corpus import sources
from craton.corpus.sources import Reading, SourceFile
from craton.retrieval import documents
from craton.retrieval.encode import TextEncoder
from craton.retrieval.lexical import Lexical, language_of
from craton.retrieval.passages import Passage, cut
from craton.retrieval.store import Store, Stored, searched

PASSAGE_TOKENS = 300  # of a passage, as words and signs are counted
RECORD_TOKENS = 1024  # up to which a record stays in one piece
_AT_ONCE = 2048  # passages whose vectors are kept at once
_SEARCH = "search"  # what searches need beside the documents


@dataclass
class Hit:
    """A passage that was found, the better the higher its score."""

    passage: Stored
    score: float
    lexical: float = 0.0
    dense: float = 0.0


def tokens_of(text: str) -> int:
    """About how many tokens a text is: words, and a third of the signs between them."""
    words = len(text.split())
    return max(words, len(text) // 6)


@dataclass
class _Change:
    added: int = 0
    updated: int = 0
    dropped: int = 0
    unchanged: int = 0
    failed: list[str] = field(default_factory=list)


def build(given: list[str], out: Path, encoder: Path | None = None, reading: Reading | None = None) -> dict[str, Any]:
    """`craton index`: documents into an index, or an index brought up to date with them: new files are added, changed
    ones read again, those that are gone dropped. Each file is kept at once or not at all, so that a call that was cut
    off is simply made again. Returns what was done. UserError names what cannot be read or does not fit."""
    reading = reading or Reading()
    files, passed = sources.find(given)
    store = Store(out, write=True)
    try:
        opened = _encoder(store, encoder)
        change = _update(store, files, given, reading, opened)
        if store.counts()["passages"] == 0 and change.failed:
            raise UserError(change.failed[0])
        if opened is not None:
            _encode(store, opened)
        store.tidy()
        if store.counts()["passages"] == 0:
            raise UserError(f"{out}: none of the {len(files)} files holds text; nothing can be found in it")
        write_search(store)
        if change.failed:  # of files that were named by hand; all others are in the index
            raise UserError(change.failed[0])
        facts: dict[str, Any] = {
            **store.counts(),
            "added": change.added,
            "updated": change.updated,
            "dropped": change.dropped,
        }
        facts |= {"unchanged": change.unchanged, "failed": reading.bad, "passed": [*passed, *reading.passed]}
        language = read_json(store.folder / f"{_SEARCH}-{store.generation}" / "made.json")["language"]
        return facts | {"language": language, "encoder": store.get("encoder")}
    finally:
        store.close()


def _encoder(store: Store, folder: Path | None) -> TextEncoder | None:
    """The encoder that the index is made by, from now on or already."""
    known, named = store.get("encoder_hash"), store.get("encoder")
    if folder is None and known is None:
        return None
    if folder is None and not Path(str(named)).is_dir():
        raise UserError(f"{store.folder}: its encoder is no longer in {named}; say with --encoder where it is")
    opened = TextEncoder(folder or Path(str(named)))
    if known is not None and opened.hash != known:
        fix = f"give --encoder {named}, or a new folder for --out"
        raise UserError(f"{store.folder}: made by another encoder ({named}) than {opened.folder}; {fix}")
    if known is None:
        with store.change():  # what searches need is made anew, with vectors
            store.put("encoder_hash", opened.hash)
    store.put("encoder", str(opened.folder.resolve()))
    return opened


def _update(
    store: Store, files: list[SourceFile], given: list[str], reading: Reading, encoder: TextEncoder | None
) -> _Change:
    known, change, progress = store.files(), _Change(), Progress()
    here = {os.path.realpath(f.path) for f in files}
    roots = [os.path.realpath(g) for g in given if Path(g).is_dir()]
    for path in known:
        if path not in here and _gone(path, roots):
            with store.change():
                store.drop_file(path)
            change.dropped += 1
    for number, file in enumerate(files, 1):
        progress.show(f"reading: {amount(number, '')} of {amount(len(files), '')} files")
        if file.kind == "hub" or str(file.path) == "-":
            raise UserError(f"{file.path}: an index is made of files; save them first")
        file = replace(
            file, path=Path(os.path.realpath(file.path))
        )  # a document has one name, from wherever it is read
        _take(store, file, known.get(str(file.path)), reading, change, encoder)
    progress.clear()
    return change


def _gone(path: str, roots: list[str]) -> bool:
    """Whether a file is there no more, or is no longer one of those that its folder is indexed by. Nothing is gone that
    cannot be seen, as on a disk that is not there."""
    parent = os.path.dirname(path)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    inside = any(parent == root or parent.startswith(root + os.sep) for root in roots)
    seen = os.access(parent, os.R_OK | os.X_OK)
    if os.path.exists(path):
        return inside and seen
    return seen and (inside or parent == os.path.dirname(path))


def _take(
    store: Store,
    file: SourceFile,
    known: tuple[int, int, int, str] | None,
    reading: Reading,
    change: _Change,
    encoder: TextEncoder | None,
) -> None:
    """One file's documents into the store, if they are not there."""
    path = str(file.path)
    try:
        status = os.stat(path)
        if known is not None and known[1:3] == (status.st_size, status.st_mtime_ns):
            change.unchanged += 1
            return
        found = sha256(Path(path))
        if known is not None and known[3] == found:
            store.touch_file(path, status.st_size, status.st_mtime_ns)
            change.unchanged += 1
            return
        with store.change():
            number = store.put_file(path, status.st_size, status.st_mtime_ns, found)
            for source in documents.read(file, reading):
                _add(store, number, source, encoder)
    except (UserError, *sources.UNREADABLE) as error:
        text = str(error) if isinstance(error, UserError) else f"{sources.shown(file.path)}: cannot be read ({error})"
        text += "; its text from before stays in the index" if known is not None else ""
        reading.bad.append(text)
        if file.named and not reading.skip_bad:
            change.failed.append(text)
        return
    change.added += known is None
    change.updated += known is not None


def _add(store: Store, file: int, source: documents.Source, encoder: TextEncoder | None) -> None:
    size = PASSAGE_TOKENS
    if source.kind == "record":
        size = RECORD_TOKENS
    elif encoder is not None:
        size = min(size, encoder.settings.max_length * 3 // 4)  # a word is 1.3 tokens and more
    kind = "prose" if source.kind == "record" else source.kind
    begins = [*source.pages, len(source.text)] if source.pages else [0, len(source.text)]
    rows = []
    for page, (begin, end) in enumerate(itertools.pairwise(begins), 1):  # none lies on two pages
        whole = source.text[begin:end]
        short = source.kind == "record" and tokens_of(whole) <= size
        for piece in [Passage(0, len(whole))] if short else cut(whole, kind, size, tokens_of):
            text = whole[piece.start : piece.end]
            key = digest(searched(source.title, piece.heading, text))
            rows.append((begin + piece.start, page if source.pages else 0, piece.heading, text, key))
    if not source.text.strip():  # a record is a document even so, and counts as one
        rows = [(0, 0, "", "", digest(source.title))] if source.kind == "record" else []
    if rows:
        store.add_document(file, source.name, source.title, source.kind, source.metadata, rows)


def _encode(store: Store, encoder: TextEncoder) -> None:
    """Vectors of what has none. Those that are made are kept, so that a call that was cut off goes on."""
    missing, progress, cut_off = store.without_vector(), Progress(), 0
    for start in range(0, len(missing), _AT_ONCE):
        some = missing[start : start + _AT_ONCE]
        store.put_vectors([key for key, _ in some], encoder.passages([text for _, text in some]))
        cut_off += encoder.cut_off
        progress.show(f"vectors: {amount(start + len(some), '')} of {amount(len(missing), '')} passages")
    progress.clear()
    if cut_off:
        most = f"the {encoder.settings.max_length} tokens that the encoder takes"
        say(f"{cut_off} passages are longer than {most}; what is beyond is found by words alone")


def write_search(store: Store) -> None:
    """What searches need beside the documents, made anew if they have changed."""
    folder = store.folder / f"{_SEARCH}-{store.generation}"
    if (folder / "made.json").is_file():
        return
    numbers: list[tuple[int, int]] = []

    def texts() -> Iterable[str]:
        for number, document, text, _ in store.texts():
            numbers.append((number, document))
            yield text

    every = max(1, store.counts()["passages"] // 64)
    language = language_of(text for _, _, text, _ in itertools.islice(store.texts(), 0, None, every))
    with publish(folder) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        Lexical.write(texts(), temporary / "words", language)
        np.save(temporary / "numbers.npy", np.array(numbers, np.int64))
        if store.get("encoder_hash") is not None:
            _write_vectors(store, temporary / "vectors.npy", len(numbers))
        write_json(temporary / "made.json", {"language": language})
        shutil.rmtree(folder, ignore_errors=True)
    for older in store.folder.glob(f"*{_SEARCH}-*"):
        if older != folder:
            shutil.rmtree(older, ignore_errors=True)


def _write_vectors(store: Store, path: Path, count: int) -> None:
    out: Any = None
    for i, vector in enumerate(store.vectors()):
        if out is None:
            out = np.lib.format.open_memmap(path, "w+", np.float32, (count, len(vector)))
        out[i] = vector
    out.flush()


class Index:
    """An index opened for search. UserError for a folder that holds none."""

    def __init__(self, folder: Path):
        self.store = Store(folder)
        self.folder = folder
        made = self._made()
        self.language = str(read_json(made / "made.json")["language"])
        self.lexical = Lexical(made / "words", self.language)
        self.numbers = np.load(made / "numbers.npy", mmap_mode="r")
        path = made / "vectors.npy"
        self.vectors = np.load(path, mmap_mode="r") if path.is_file() else None
        self._encoder: TextEncoder | None = None

    def _made(self) -> Path:
        """What was last made for searches: of the documents as they are, or, while they are brought up to date, as they
        were before. UserError if there is none."""
        found = [p for p in self.folder.glob(f"{_SEARCH}-*") if (p / "made.json").is_file()]
        if not found:
            raise UserError(f"{self.folder}: not made to its end; run craton index on it again")
        return max(found, key=lambda p: int(p.name.rpartition("-")[2]))

    @property
    def encoder(self) -> TextEncoder:
        """The encoder that the index was made by, opened at first use. UserError if it is gone or another one."""
        if self._encoder is None:
            named = Path(str(self.store.get("encoder")))
            if not named.is_dir():
                raise UserError(f"{self.folder}: its encoder is no longer in {named}; put it back, or index anew")
            self._encoder = TextEncoder(named)
            if self._encoder.hash != self.store.get("encoder_hash"):
                raise UserError(f"{named}: no longer the encoder that {self.folder} was made by; index anew")
        return self._encoder

    @cached_property
    def document_names(self) -> dict[int, str]:
        """By the documents' numbers."""
        return self.store.names()

    def legs(self, query: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Each passage's scores, (passages,) fp32: by words, and by vectors where there are some."""
        if self.vectors is None:
            return self.lexical.scores(query), None
        vector = self.encoder.queries([query])[0]
        return self.lexical.scores(query), self.vectors @ vector

    def close(self) -> None:
        self.store.close()


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the highest scores above 0, the highest first; of equal ones the first."""
    count = min(count, len(scores))
    if count == 0:
        return np.zeros(0, np.int64)
    cut_off = np.partition(scores, len(scores) - count)[len(scores) - count]
    places = np.flatnonzero((scores >= cut_off) & (scores > 0))
    return places[np.lexsort((places, -scores[places]))][:count]
