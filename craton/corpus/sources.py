"""Where documents come from: files, folders, globs and hub datasets, read as a stream of `Document`."""

import codecs
import glob
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from craton.base import UserError

PROSE = {".txt", ".md", ".rst", ".tex", ".org", ".adoc"}
HTML = {".html", ".htm", ".xhtml"}
CODE = set(
    """.py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js .mjs .ts .tsx .jsx .rb .php .swift .cs .sh
    .pl .lua .r .jl .sql .hs .ml .toml .yaml .yml .css""".split()
)
KINDS = {"prose": PROSE, "html": HTML, "code": CODE, "jsonl": {".jsonl", ".ndjson"}, "parquet": {".parquet"}}
COMPRESSED = {".gz", ".xz", ".zst"}
PART_CHARACTERS = 128 << 10  # a longer document is cut at a paragraph into parts, so that memory stays bounded


@dataclass
class Document:
    """One text. name: where it came from (file, file:line); kind: 'prose', 'html', 'code' or 'unknown'."""

    name: str
    text: str
    source: int  # index into the build's list of sources
    kind: str
    license: str = ""
    part: int = 0  # 0: the start of a document; 1...: its continuation


@dataclass(frozen=True)
class SourceFile:
    path: Path
    source: int
    kind: str  # 'prose', 'html', 'code', 'jsonl', 'parquet' or 'hub'


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        suffix = path.with_suffix("").suffix.lower()
    return next((kind for kind, known in KINDS.items() if suffix in known), None)


def find(sources: list[str]) -> tuple[list[SourceFile], list[Path]]:
    """Files to read, in order, and those passed over for their type. UserError for a source that gives none."""
    found: list[SourceFile] = []
    passed: list[Path] = []
    for number, source in enumerate(sources):
        path, before = Path(source), len(found)
        if path.is_dir():
            # No hidden folders, no caches: what a person sees when listing the folder.
            inside = sorted(
                p
                for p in path.rglob("*")
                if p.is_file() and not any(x.startswith(".") or x == "__pycache__" for x in p.relative_to(path).parts)
            )
            for p in inside:
                if (kind := _kind(p)) is None:
                    passed.append(p)
                else:
                    found.append(SourceFile(p, number, kind))
            if len(found) == before:
                what = "is empty"
                if inside:
                    what = f"holds no text file ({len(inside)} files of other types, such as {inside[0].name})"
                raise UserError(f"{source}: the folder {what}; give .txt, .md, .html, source code, .jsonl or .parquet")
        elif named := [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(source, recursive=True))]:
            # Named by hand, a file of unknown type is text: its content decides.
            found += [SourceFile(p, number, _kind(p) or "prose") for p in named if p.is_file()]
        elif source.startswith("hf://") or (source.count("/") == 1 and source[0] not in "./~" and not path.suffix):
            found.append(SourceFile(Path(source.removeprefix("hf://")), number, "hub"))
        else:
            raise UserError(f"{source}: no such file, folder or pattern")
    return found, passed


class _Zstd(io.RawIOBase):
    """Decompressed bytes of all frames of a .zst file. EOFError if the last one is cut short, which zstandard's own
    stream reader takes for the end of the data. Archives are often many frames (pzstd) or made with --long=31."""

    def __init__(self, path: Path):
        self.file = open(path, "rb")  # noqa: SIM115 (closed by close)
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


def open_binary(path: Path) -> Any:
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(path), 1 << 20)
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")


def _decode(data: bytes, path: Path) -> str:
    """UTF-8, else UTF-16 by its mark, else Windows-1252 if that is plausible text. UserError for binary data."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    if b"\0" not in data:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            control = sum(data.count(bytes([c])) for c in (*range(1, 9), *range(14, 27), *range(28, 32)))
            if control <= len(data) / 1000:
                return data.decode("cp1252", errors="replace")
    raise UserError(f"{path}: binary file, not text; leave it out, or pass --skip-bad to pass over such files")


def _parts(text: str) -> Iterator[str]:
    """Pieces of at most PART_CHARACTERS characters, cut after a paragraph or else after a line."""
    at = 0
    while len(text) - at > PART_CHARACTERS:
        half, end = at + PART_CHARACTERS // 2, at + PART_CHARACTERS
        cut = text.rfind("\n\n", half, end) + 2
        if cut == 1:
            cut = text.rfind("\n", half, end) + 1
        cut = cut or end
        yield text[at:cut]
        at = cut
    yield text[at:]


_PIECE = 16 << 20  # bytes of a text file that are decoded at a time


def _whole(file: SourceFile) -> Iterator[tuple[str, str, str]]:
    """A text file as one document, read in pieces so that its size does not matter."""
    with open_binary(file.path) as f:
        piece = f.read(_PIECE)
        if piece[:2] in (b"\xff\xfe", b"\xfe\xff"):
            yield from _utf16(file, f, piece)
            return
        rest = b""
        while piece:
            data, more = rest + piece, f.read(_PIECE)
            cut = (data.rfind(b"\n") + 1 if more else len(data)) or len(data)
            yield str(file.path), _decode(data[:cut], file.path), ""
            rest, piece = data[cut:], more


def _utf16(file: SourceFile, f: Any, piece: bytes) -> Iterator[tuple[str, str, str]]:
    """The byte order is said at the start only, and a line's end may lie across two pieces."""
    decoder, rest = codecs.getincrementaldecoder("utf-16")("replace"), ""
    while piece:
        more = f.read(_PIECE)
        text = rest + decoder.decode(piece, not more)
        cut = (text.rfind("\n") + 1 if more else len(text)) or len(text)
        yield str(file.path), text[:cut], ""
        rest, piece = text[cut:], more


TEXT_FIELDS = ("text", "content", "markdown", "code")
_NAMES = ", ".join(TEXT_FIELDS)
# Records of questions and answers: the fields that are text, the first and the last of which must be there.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "input", "output"))


def _text_of(row: Any, where: str) -> tuple[str, str]:
    """The text and licence of one record. UserError if it has no text."""
    if isinstance(row, str):
        return row, ""
    if isinstance(row, dict):
        for fields in (*((f,) for f in TEXT_FIELDS), *PAIRS):
            if all(isinstance(row.get(f), str) for f in (fields[0], fields[-1])):
                said = [row[f] for f in fields if isinstance(row.get(f), str) and row[f]]
                return "\n\n".join(said), str(row.get("license") or row.get("licence") or "")
    raise UserError(f"{where}: no text in this record; expected a field named {_NAMES}; --skip-bad passes over it")


def _jsonl(file: SourceFile) -> Iterator[tuple[str, str, str] | UserError]:
    with open_binary(file.path) as f:
        for number, line in enumerate(f, 1):
            where = f"{file.path}:{number}"
            if not line.strip():
                continue
            try:
                text, license = _text_of(json.loads(line.decode("utf-8")), where)
            except UserError as error:
                yield error
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                yield UserError(f"{where}: broken JSON line ({error}); mend it, or pass --skip-bad to pass over it")
            else:
                yield where, text, license


def _parquet(file: SourceFile) -> Iterator[tuple[str, str, str] | UserError]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{file.path}: reading parquet needs pyarrow; pip install 'craton[parquet]'") from None
    try:
        table = parquet.ParquetFile(file.path)
    except Exception as error:
        raise UserError(f"{file.path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    there = table.schema_arrow.names
    names = [n for n in (*TEXT_FIELDS, "license", "licence") if n in there]
    if not set(names) & set(TEXT_FIELDS):
        raise UserError(f"{file.path}: no column named {_NAMES} (it has {', '.join(there)})")
    number = 0
    for batch in table.iter_batches(batch_size=64, columns=names):
        for row in batch.to_pylist():
            number += 1
            try:
                yield (where := f"{file.path}:{number}", *_text_of(row, where))
            except UserError as error:
                yield error


def _hub(file: SourceFile) -> Iterator[tuple[str, str, str] | UserError]:
    try:
        from datasets import load_dataset
    except ImportError:
        problem = "no such file or folder; if it is a hub dataset, reading it needs pip install 'craton[hf]'"
        raise UserError(f"{file.path}: {problem}") from None
    try:
        rows = load_dataset(str(file.path), split="train", streaming=True)
        for number, row in enumerate(rows):
            try:
                yield (where := f"{file.path}:{number}", *_text_of(row, where))
            except UserError as error:
                yield error
    except Exception as error:
        problem = f"no such path here, and not readable from the hub ({str(error).splitlines()[0]})"
        raise UserError(f"{file.path}: {problem}") from None


def read(files: list[SourceFile], skip_bad: bool, bad: Callable[[str], None]) -> Iterator[Document]:
    """All documents in order. What cannot be read is a UserError, or with skip_bad is passed to `bad` and left out."""
    readers = {"jsonl": _jsonl, "parquet": _parquet, "hub": _hub}
    for file in files:
        kind = "unknown" if file.kind in readers else file.kind
        rows = readers.get(file.kind, _whole)(file)
        part = 0
        while True:
            try:
                row = next(rows, None)
            except UserError as error:
                row = error
            except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError, ValueError) as error:
                row = UserError(f"{file.path}: cannot be read ({error}); mend it, or pass --skip-bad to pass over it")
            if row is None:
                break
            if isinstance(row, UserError):
                if not skip_bad:
                    raise row
                bad(str(row))
                continue
            name, text, license = row
            part = part if file.kind not in readers else 0  # a text file's pieces continue one document
            for piece in _parts(text):
                yield Document(name, piece, file.source, kind, license, part)
                part += 1
