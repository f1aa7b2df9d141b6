"""Rows of a task's data: files in the shapes that benchmarks are published in, compressed or not, one file or several,
a folder or an archive of them, or a data set of the hub."""

import io
import json
import re
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from craton.base import UserError
from craton.corpus import records
from craton.corpus.decode import Decoder
from craton.corpus.sources import COMPRESSED, UNREADABLE, open_binary

Row = dict[str, Any]
_PARTS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "table", ".tsv": "table"}
_KINDS |= {".parquet": "parquet"}
_NAMES = ("id", "task_id", "question_id", "qid", "key", "_id", "idx", "ind", "uid")


def read_parts(path: Path) -> dict[str, list[Row]]:
    """The rows of "train", "dev" and "test" as file names tell them; a single file is the test part. Each has `id`,
    and `group` where several files make a part, such as the subjects of MMLU. UserError names what cannot be read."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = list(_files(path))
    if not files:
        raise UserError(f"{path}: holds no file of rows; read are {', '.join(_KINDS)}, compressed too, and tar and zip")
    known = {name: _part(name) for name, _ in files}
    alone = len(files) == 1 or not any(known.values())
    parts = {name: "test" if alone else part for name, part in known.items()}
    sizes, out = Counter(parts.values()), dict[str, list[Row]]()
    for name, opened in files:
        part = parts[name]
        if part is None:
            continue
        group = _group(name) if sizes[part] > 1 else ""
        out.setdefault(part, []).extend(_identified(_rows(opened, name), group, name))
    if "test" not in out and "dev" in out:
        out["test"] = out.pop("dev")
    return out


def read_file(path: Path) -> list[Row]:
    """The rows of one file, each with `id`. UserError names what cannot be read."""
    return list(iterate_file(path))


def iterate_file(path: Path) -> Iterator[Row]:
    """The same, row by row."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    yield from _identified(_rows(path, str(path)), "", str(path))


def iterate_stream() -> Iterator[Row]:
    """The rows of JSON lines that come in."""
    yield from _identified(_rows(sys.stdin.buffer, "stdin"), "", "stdin")


def _files(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, a path or bytes) of each file of rows in a file, folder or archive."""
    if path.is_dir():
        for p in sorted(path.rglob("*")):
            if p.is_file() and _kind(p.name):
                yield str(p), p
        return
    try:
        with open_binary(path) as f:
            if _is_tar(f):
                with tarfile.open(fileobj=f, mode="r|") as archive:
                    for member in archive:
                        if member.isfile() and _kind(member.name) and (opened := archive.extractfile(member)):
                            yield member.name, io.BytesIO(opened.read())
                return
        if zipfile.is_zipfile(path) and path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive_zip:
                for name in sorted(archive_zip.namelist()):
                    if _kind(name):
                        yield name, io.BytesIO(archive_zip.read(name))
            return
    except (*UNREADABLE, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0] if str(error) else error!r})") from None
    yield str(path), path


def _is_tar(f: Any) -> bool:
    return f.peek(512)[257:262] == b"ustar"


def _kind(name: str) -> str:
    path = Path(name.lower())
    while path.suffix in COMPRESSED:
        path = path.with_suffix("")
    return _KINDS.get(path.suffix, "")


def _part(name: str) -> str | None:
    """train, dev or test, if the file's name or that of its folder says so."""
    for text in (Path(name).name, Path(name).parent.name):
        for word in re.split(r"[^a-z]+", text.lower()):
            if word in _PARTS:
                return _PARTS[word]
    return None


def _group(name: str) -> str:
    stem = Path(name).name.partition(".")[0]
    return re.sub(r"[-_](train|dev|val|valid|validation|test)$", "", stem)


def _identified(rows: Iterator[Row], group: str, name: str) -> Iterator[Row]:
    for number, row in enumerate(rows):
        own = next((row[n] for n in _NAMES if isinstance(row.get(n), str | int) and row[n] != ""), None)
        there = group or row.get("subject") or row.get("group")
        identity = own if own is not None else f"{group}/{number}" if group else number
        yield row | {"id": identity, "where": f"{name}:{number + 1}"} | ({"group": there} if there else {})


def _rows(source: Any, name: str) -> Iterator[Row]:
    """The objects of one file."""
    kind = _kind(name) or "jsonl"
    try:
        if kind == "parquet":
            yield from records.parquet_rows(source, name)
            return
        with open_binary(source) if isinstance(source, Path) else source as f:
            pieces = Decoder(name).pieces(f)
            values = _table(pieces, name) if kind == "table" else records.json_items(pieces, name)
            for number, value in enumerate(values, 1):
                if not isinstance(value, dict):
                    raise UserError(f"{name}:{number}: a row is {json.dumps(value)[:60]}, must be an object")
                yield from _unpacked(value)
    except UserError as error:  # of a corpus's reader, which has a flag for it
        raise UserError(str(error).partition(", or pass --skip-bad")[0], field=error.field) from None
    except UNREADABLE as error:
        raise UserError(f"{name}: cannot be read ({str(error).splitlines()[0] if str(error) else error!r})") from None


def _unpacked(value: Row) -> Iterator[Row]:
    """SQuAD and TriviaQA publish one object that holds all."""
    items = value.get("data", value.get("Data"))
    if not isinstance(items, list) or not items or not isinstance(items[0], dict):
        yield value
        return
    for item in items:
        if "paragraphs" not in item:
            yield item
        for paragraph in item.get("paragraphs", []):
            yield from ({"context": paragraph["context"], **question} for question in paragraph["qas"])


def _table(pieces: Iterator[str], name: str) -> Iterator[Row]:
    """CSV with a header; MMLU was published without one."""
    header: list[str] | None = None
    for row in records.csv_rows(pieces, name):
        if isinstance(row, UserError):
            raise row
        if header is None:
            bare = len(row) == 6 and row[-1].strip() in tuple("ABCD")
            header = "question A B C D answer".split() if bare else [cell.strip() for cell in row]
            if not bare:
                continue
        yield dict(zip(header, row, strict=False))


def read_hub(text: str) -> dict[str, list[Row]]:
    """The parts of a data set on the hub, ORG/NAME or ORG/NAME#CONFIGURATION. UserError if it cannot be had."""
    name, _, config = text.partition("#")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{name}: reading a data set from the hub needs pip install 'craton[hf]'") from None
    try:
        found = load_dataset(name, config or None)
    except Exception as error:
        raise UserError(f"{name}: not readable from the hub ({str(error).splitlines()[0]})") from None
    out: dict[str, list[Row]] = {}
    for split, rows in found.items():
        if part := _part(f"x/{split}"):
            out[part] = list(_identified(iter(rows), "", f"{name}/{split}"))
    return out
