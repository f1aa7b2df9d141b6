"""Documents for an index: the files that a corpus is made of, read by the same readers, with their places kept."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from craton.base import UserError
from craton.corpus import records, sources
from craton.corpus.decode import Decoder
from craton.corpus.pages import html_text
from craton.corpus.papers import pages_of
from craton.corpus.sources import Reading, SourceFile

_IDS, _TITLES = ("_id", "id", "doc_id", "docid"), ("title", "name")


@dataclass
class Source:
    """One text. name: what it is called in answers: a record's own id, else its path. kind: prose, code, table, or
    record, which is kept in one piece where it is short. pages: where each begins, in characters."""

    name: str
    text: str
    kind: str
    title: str = ""
    pages: list[int] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


def read(file: SourceFile, reading: Reading) -> Iterator[Source]:
    """The documents of a file, none longer than what fits into memory. UserError for a file that cannot be read."""
    name = sources.shown(file.path)
    if file.kind == "jsonl" and not sources.holds_one_value(file.path):
        yield from _records(file, reading, name)
        return
    kind = file.kind
    if kind == "table":  # as the file has it, so that places are places in it
        file = SourceFile(file.path, file.source, "prose", file.named)
    for key, group in itertools.groupby(sources.read([file], reading), lambda d: d.name):
        parts = list(group)
        first = parts[0]
        if first.kind in sources.PAPERS:
            texts, failed = pages_of(first.kind, sources.plain(Path(first.path)), first.name)
            reading.bad += failed
            begins = [0, *itertools.accumulate(len(t) + 2 for t in texts[:-1])]
            pages = [] if first.kind == "docx" else begins  # which has none
            kind_of = "table" if first.kind == "xlsx" else "prose"
            yield Source(key, "\n\n".join(texts), kind_of, Path(first.path).stem, pages)
        elif first.kind == "html":
            yield Source(key, html_text("".join(p.text for p in parts), False)[0], "prose", file.path.stem)
        else:
            own = {"code": "code", "unknown": "record"}.get(first.kind, "prose")
            whole = "".join(p.text for p in parts)
            yield Source(key, whole, "table" if kind == "table" else own, "" if own == "record" else file.path.stem)


def _records(file: SourceFile, reading: Reading, name: str) -> Iterator[Source]:
    """Rows of JSON lines; BEIR's have _id, title and text."""
    with sources.open_binary(file.path) as f:
        decoder = Decoder(name, reading.encoding, "jsonl")
        for number, line in enumerate(records.lines(decoder.pieces(f)), 1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                yield _record(_row(line, where), where, reading)
            except UserError as error:
                if not reading.skip_bad:
                    raise
                reading.bad.append(str(error))
        reading.note(decoder)


def _row(line: str, where: str) -> Any:
    try:
        return records.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); mend it, or pass --skip-bad") from None


def _record(row: Any, where: str, reading: Reading) -> Source:
    fields = row if isinstance(row, dict) else {}
    own = next((str(fields[k]) for k in _IDS if isinstance(fields.get(k), str | int) and fields[k] != ""), where)
    title = next((fields[k] for k in _TITLES if isinstance(fields.get(k), str)), "")
    text = records.text_of(row, where, reading.fields)[0].encode("utf-8", "replace").decode()
    small = fields.get("metadata") if isinstance(fields.get("metadata"), dict) else {}
    more = {k: v for k, v in fields.items() if isinstance(v, str | int | float) and len(str(v)) < 100}
    more = {k: v for k, v in more.items() if not isinstance(v, float) or math.isfinite(v)}
    taken = {*_IDS, *_TITLES, *records.TEXT_FIELDS}
    return Source(
        own, text, "record", title, [], {**{k: v for k, v in more.items() if k not in taken}, **(small or {})}
    )


def read_queries(path: Path) -> list[tuple[str, str]]:
    """(id, question) of each line of BEIR's queries.jsonl; question or text, and _id or id. UserError naming what is
    wrong."""
    out = []
    with sources.open_binary(path) as f:
        for number, line in enumerate(records.lines(Decoder(str(path), kind="jsonl").pieces(f)), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            row = row if isinstance(row, dict) else {}
            text = next((row[k] for k in ("text", "question", "query") if isinstance(row.get(k), str)), None)
            if text is None:
                raise UserError(f"{path}:{number}: no text, question or query there")
            out.append((str(next((row[k] for k in _IDS if k in row), number)), text))
    if not out:
        raise UserError(f"{path}: holds no question")
    return out
