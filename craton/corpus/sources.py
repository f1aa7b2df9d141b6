"""Where documents come from: files, folders, globs, stdin and hub datasets, read as a stream of `Document`."""

import bz2
import csv
import glob
import gzip
import io
import lzma
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from craton.base import UserError
from craton.corpus import records
from craton.corpus.decode import Decoder
from craton.corpus.records import Text

PROSE = {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc"}
HTML = {".html", ".htm", ".xhtml"}
CODE = set(
    """.py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js .mjs .ts .tsx .jsx .rb .php .swift .cs .sh
    .pl .lua .r .jl .sql .hs .ml .toml .yaml .yml .css""".split()
)
KINDS = {
    "prose": PROSE, "html": HTML, "code": CODE, "jsonl": {".jsonl", ".ndjson", ".jsonlines"}, "json": {".json"},
    "table": {".csv", ".tsv"}, "notebook": {".ipynb"}, "parquet": {".parquet"}, "pdf": {".pdf"}, "docx": {".docx"},
    "pptx": {".pptx"}, "xlsx": {".xlsx"},
}  # fmt: skip
READ = "text, Markdown, HTML, PDF, Word, PowerPoint, Excel, source code, .jsonl, .json, .csv, .ipynb, .parquet"
RECORDS: dict[str, Any] = {
    "jsonl": records.json_lines, "json": records.json_file, "table": records.table, "notebook": records.notebook
}  # fmt: skip
PAPERS = ("pdf", "docx", "pptx", "xlsx")  # taken out of their files in the workers
COMPRESSED = {".gz", ".xz", ".zst", ".bz2"}
PART_CHARACTERS = 128 << 10  # a longer document is cut at a paragraph into parts, so that memory stays bounded
MOST_HTML = 256 << 20  # characters of a page, which is taken apart whole


@dataclass
class Document:
    """One text. name: where it came from (file, file:line); kind: 'prose', 'html', 'code', 'unknown', or one of
    PAPERS, whose text is still in the file."""

    name: str
    text: str
    source: int  # index into the build's list of sources
    kind: str
    license: str = ""
    part: int = 0  # 0: the start of a document; 1...: its continuation
    start: int = 0  # characters of the document before this text
    web: bool = False  # of the web, to be judged by its rules
    page: int = 0  # on which the text begins, from 1; 0 where there are none
    path: str = ""  # of a paper
    named: bool = False  # a paper that was named by hand, not found in a folder


@dataclass(frozen=True)
class SourceFile:
    path: Path
    source: int
    kind: str  # of KINDS; 'hub'; '' where the content has to tell
    named: bool = False  # by hand, not found in a folder


@dataclass
class Reading:
    """How files are read, and what was noticed meanwhile."""

    skip_bad: bool = False
    fields: list[str] = field(default_factory=list)  # of records, that are their text
    encoding: str | None = None
    rules: str | None = None  # 'web' or 'own'; None: by where the documents come from
    bad: list[str] = field(default_factory=list)  # what could not be read
    passed: list[str] = field(default_factory=list)  # files of a folder that hold no text, and why
    encodings: Counter[str] = field(default_factory=Counter)  # files by encoding, of those that are not UTF-8
    replaced: Counter[str] = field(default_factory=Counter)  # characters that stand for bytes that are none, by file
    empty: list[str] = field(default_factory=list)

    def note(self, decoder: Decoder) -> None:
        """What reading a file has shown."""
        self.encodings.update(decoder.encodings - {"utf-8"})
        if decoder.replaced:
            self.replaced[decoder.name] += decoder.replaced


# What libraries raise on damaged files.
UNREADABLE = (
    OSError, EOFError, ValueError, lzma.LZMAError, zstandard.ZstdError, zlib.error, csv.Error, zipfile.BadZipFile
)  # fmt: skip


def shown(path: Path | str) -> str:
    """A file's name as text of one line, whatever its bytes."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\x{ord(m[0]):02x}", name)


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        suffix = path.with_suffix("").suffix.lower()
    return next((kind for kind, known in KINDS.items() if suffix in known), None)


def find(sources: list[str]) -> tuple[list[SourceFile], list[str]]:
    """Files to read, in order, and those passed over, with the reason. UserError for a source that gives none."""
    found: list[SourceFile] = []
    passed: list[str] = []
    for number, source in enumerate(sources):
        if not source:
            raise UserError("a source is empty text; name a file, a folder or '.'")
        path, before = Path(source), len(found)
        if source == "-":
            found.append(SourceFile(path, number, "", named=True))
        elif path.is_dir():
            others = _walk(path, number, found, passed)
            if len(found) == before:
                what = "is empty"
                if others:
                    what = f"holds no text file ({len(others)} of other types, such as {others[0]})"
                elif passed:
                    what = passed[-1].rpartition(": ")[2]
                raise UserError(f"{shown(source)}: the folder {what}; read are {READ}")
        elif named := [path] if path.exists() else [Path(p) for p in sorted(glob.glob(source, recursive=True))]:
            seen = set[Path]()  # ** gives folders and what is in them
            for p in named:
                if p.is_dir():
                    inside: list[SourceFile] = []
                    _walk(p, number, inside, passed)
                    found += [f for f in inside if f.path not in seen]
                    seen.update(f.path for f in inside)
                elif p in seen:
                    continue
                elif not p.is_file() and not p.is_fifo():
                    passed.append(f"{shown(p)}: not a file")
                else:  # named by hand: where the name does not tell what it is, the content does
                    found.append(SourceFile(p, number, _kind(p) or "", named=True))
                    seen.add(p)
            if len(found) == before:
                raise UserError(f"{shown(source)}: no file with text there; read are {READ}")
        elif source.startswith("hf://") or (source.count("/") == 1 and source[0] not in "./~" and not path.suffix):
            found.append(SourceFile(Path(source.removeprefix("hf://")), number, "hub", named=True))
        else:
            raise UserError(f"{shown(source)}: no such file, folder or pattern")
    return found, passed


def _walk(folder: Path, number: int, found: list[SourceFile], passed: list[str]) -> list[str]:
    """Files of a folder and those below, links followed; without hidden ones and caches: what a person sees when
    listing it. Returns the names of files that are passed over for their type."""
    others, files, seen = [], [], {os.path.realpath(folder)}

    def unreadable(error: OSError) -> None:
        passed.append(f"{shown(error.filename)}: cannot be listed ({error.strerror})")

    for root, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if (
            "documents.npy" in names and "manifest.json" in names or ".work" in folders
        ):  # a corpus, or one in the making
            folders[:] = []
            continue
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(root, name))
            if not name.startswith(".") and name != "__pycache__" and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        files += [Path(root, name) for name in names if not name.startswith(".")]
    for p in sorted(files):
        kind = _kind(p)
        if not p.is_file():
            passed.append(f"{shown(p)}: a link to nothing" if p.is_symlink() else f"{shown(p)}: not a file")
        elif kind is None:
            others.append(shown(p))
            passed.append(f"{shown(p)}: {p.suffix.lower() or 'no suffix'}")
        else:
            found.append(SourceFile(p, number, kind))
    return others


class _Zstd(io.RawIOBase):
    """Decompressed bytes of all frames of a .zst file. EOFError if the last one is cut short, which zstandard's own
    stream reader takes for the end of the data. Archives are often many frames (pzstd) or made with --long=31."""

    def __init__(self, file: Any):
        self.file = file
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self.frame: Any = None
        self.compressed = self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            self.compressed = self.compressed or self.file.read(4096)  # small: it may expand 30,000 times
            if not self.compressed:
                if self.frame is not None:
                    raise EOFError("the compressed data ends in the middle of a frame; the file is truncated")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.ready = self.frame.decompress(self.compressed)
            self.compressed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


_BUFFER = 1 << 18  # bytes, of which a file's kind is told


def open_binary(path: Path) -> Any:
    """A file's bytes, decompressed where it is compressed, whatever its name; '-' is stdin."""
    if str(path) == "-":
        file: Any = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    else:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by the caller)
    raw: Any = io.BufferedReader(file, _BUFFER)
    magic = raw.peek(6)[:6]
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(_Zstd(raw), 1 << 20)
    for start, opened in ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ", lzma.open), (b"BZh", bz2.open)):
        if magic.startswith(start):
            return io.BufferedReader(opened(raw), _BUFFER)
    return raw


def _told(f: Any, path: Path) -> str:
    """The kind of a file whose name does not tell it."""
    head = f.peek(1 << 16)[: 1 << 16]
    if head.startswith(b"%PDF-"):
        return "pdf"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = set(archive.namelist())
        known = {"docx": "word/document.xml", "pptx": "ppt/presentation.xml", "xlsx": "xl/workbook.xml"}
        return next((kind for kind, name in known.items() if name in inside), "prose")
    if head[257:262] == b"ustar":
        raise UserError(f"{shown(path)}: an archive (tar); unpack it and give the folder", code="not_text")
    if head.startswith(b"{\\rtf"):
        raise UserError(f"{shown(path)}: RTF; save it as .docx or .txt", code="not_text")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "html"
    if start.startswith(b"{") and b'"cells"' in start and b'"nbformat' in start:
        return "notebook"
    return "json" if start.startswith((b'{"', b"{\n", b"{\r", b"{ ", b"[{", b"[\n", b"[ {", b'["')) else "prose"


def _one_value(f: Any) -> bool:
    """Whether what is called JSON lines is an array, or an object over several lines."""
    start = f.peek(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n")
    return bool(start.startswith(b"[") or start.partition(b"\n")[0].strip() == b"{")


def holds_one_value(path: Path) -> bool:
    """Whether a file of JSON lines is one value over several lines instead."""
    with open_binary(path) as f:
        return _one_value(f)


def plain(path: Path) -> Any:
    """A file for readers that need to seek: its path, or what is in it where it is compressed or no file on a disk."""
    with open_binary(path) as f:
        whole = path.is_file() and isinstance(getattr(f, "raw", None), io.FileIO)
        return str(path) if whole else io.BytesIO(f.read())


def parts(pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    """A text that comes in pieces, in parts of at most PART_CHARACTERS characters, cut after a paragraph, else after a
    line or a word; each with the characters before it."""
    buffer, at, start = "", 0, 0
    for piece in pieces:
        buffer, at = buffer[at:] + piece, 0
        while len(buffer) - at > PART_CHARACTERS:
            half, end = at + PART_CHARACTERS // 2, at + PART_CHARACTERS
            cuts = (
                buffer.rfind(mark, half, end) + len(mark) for mark in ("\n\n", "\n", " ") if mark in buffer[half:end]
            )
            cut = next(cuts, end)
            yield start, buffer[at:cut]
            start, at = start + cut - at, cut
    yield start, buffer[at:]


def _documents(file: SourceFile, reading: Reading) -> Iterator[Document | UserError]:
    """The documents of a file, cut into parts."""
    name = shown(file.path)
    web = reading.rules == "web" or (reading.rules is None and file.kind == "hub")
    if file.kind == "hub":
        yield from _rows(records.hub(str(file.path), reading.fields), file, web)
        return
    with open_binary(file.path) as f:
        kind = file.kind or _told(f, file.path)
        if kind in (*PAPERS, "parquet"):
            if str(file.path) == "-":
                raise UserError(f"stdin: a {kind} file cannot be read from there; save it and give its name")
            if kind == "parquet":
                yield from _rows(records.parquet(plain(file.path), name, reading.fields), file, web)
            else:
                yield Document(name, "", file.source, kind, web=web, path=str(file.path), named=file.named)
            return
        decoder = Decoder(name, reading.encoding, kind)
        if kind == "jsonl" and _one_value(f):
            kind = "json"
        if kind in RECORDS:
            yield from _rows(RECORDS[kind](f, name, decoder, reading.fields), file, web)
        elif kind == "html":
            page = "".join(decoder.pieces(f))
            if len(page) > MOST_HTML:
                most = f"a page of {len(page)} characters, at most {MOST_HTML}"
                raise UserError(f"{name}: {most}; --skip-bad passes over it")
            yield Document(name, page, file.source, kind, web=web)
        else:
            for number, (start, text) in enumerate(parts(decoder.pieces(f))):
                if not text and not number:
                    reading.empty.append(name)
                yield Document(name, text, file.source, kind, "", number, start, web)
        reading.note(decoder)


def _rows(rows: Iterable[Text | UserError], file: SourceFile, web: bool) -> Iterator[Document | UserError]:
    """The documents of records."""
    for row in rows:
        if isinstance(row, UserError):
            yield row
            continue
        for number, (start, text) in enumerate(parts([row.text])):
            yield Document(row.name, text, file.source, "unknown", row.license, number, start, web)


def read(files: list[SourceFile], reading: Reading) -> Iterator[Document]:
    """All documents in order. What cannot be read is a UserError, or with skip_bad is left out and noted; so is a file
    of a folder that turns out to be no text."""
    for file in files:
        documents, gave, first = _documents(file, reading), False, None
        found_as_data = not file.named and file.kind in ("json", "table", "notebook")
        while (item := _next(documents, file)) is not None:
            if isinstance(item, Document):
                gave = True
                yield item
            elif reading.skip_bad or (item.code == "not_text" and not file.named):
                reading.bad.append(str(item))
            elif found_as_data:
                first = first or item
            else:
                raise item
        if first is not None and gave:
            raise first
        if first is not None:  # such as settings: nothing that was written to be read
            reading.passed.append(str(first).partition(";")[0])


def _next(documents: Iterator[Document | UserError], file: SourceFile) -> Document | UserError | None:
    """The next document, or what is wrong with it; None at the end."""
    try:
        return next(documents, None)
    except UserError as error:
        return error
    except UNREADABLE as error:
        fix = "mend it, or pass --skip-bad to pass over what is left of it"
        return UserError(f"{shown(file.path)}: cannot be read ({error}); {fix}")
