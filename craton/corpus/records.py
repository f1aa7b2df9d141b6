"""Files that hold many texts: JSON lines, JSON, CSV, notebooks, parquet; and which fields of a record are its text."""

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from craton.base import UserError
from craton.corpus.decode import Decoder

TEXT_FIELDS = ("text", "content", "body", "article", "raw_content", "markdown", "code")
_NAMES = ", ".join(TEXT_FIELDS)
# Records of questions and answers: the fields that are text, the first and the last of which must be there.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "input", "output"))
CONVERSATIONS = ("messages", "conversations")  # of {role, content} (OpenAI) or {from, value} (ShareGPT)
_LICENCES = ("license", "licence")


class Text(NamedTuple):
    """A text of a file. name: where it stands there."""

    name: str
    text: str
    license: str = ""


class NoText(UserError):
    """A record without a field that is known to hold text."""


def text_of(row: Any, where: str, fields: list[str]) -> tuple[str, str]:
    """The text and licence of one record. fields: those that are its text, as the user named them; a.b is within a.
    NoText if it has none."""
    if fields:
        said = [_within(row, field) for field in fields]
        if all(x is None for x in said):
            has = f"it has {', '.join(map(str, list(row)[:12]))}" if isinstance(row, dict) else "it is no object"
            raise NoText(f"{where}: no field {' or '.join(fields)} with text ({has}); --skip-bad passes over it")
        return "\n\n".join(x for x in said if x), _licence(row)
    if isinstance(row, str):
        return row, ""
    if isinstance(row, dict):
        for names in (*((f,) for f in TEXT_FIELDS), *PAIRS):
            if len(names) == 1 and names[0] in row and row[names[0]] is None:
                return "", _licence(row)
            if all(isinstance(row.get(f), str) for f in (names[0], names[-1])):
                return "\n\n".join(row[f] for f in names if isinstance(row.get(f), str) and row[f]), _licence(row)
        for name in CONVERSATIONS:
            if isinstance(row.get(name), list) and (turns := [_turn(m) for m in row[name]]):
                return "\n\n".join(t for t in turns if t), _licence(row)
        lower = {str(k).lower(): v for k, v in row.items()}
        if set(lower) != set(row):  # Text, CONTENT
            with contextlib.suppress(NoText):
                return text_of(lower, where, fields)
    has = f" (it has {', '.join(map(str, list(row)[:12]))})" if isinstance(row, dict) else ""
    fix = f"name its field with --text-field, or call it one of {_NAMES}; --skip-bad passes over it"
    raise NoText(f"{where}: no text in this record{has}; {fix}")


def _licence(row: Any) -> str:
    found = next((row[k] for k in _LICENCES if row.get(k)), "") if isinstance(row, dict) else ""
    return found if isinstance(found, str) else json.dumps(found)


def _within(row: Any, field: str) -> str | None:
    """The text at a.b.c of a record; a list of texts is joined."""
    value = row
    for name in [field] if isinstance(row, dict) and field in row else field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list):
        value = "\n".join(v if isinstance(v, str) else _turn(v) for v in value)
    return value if isinstance(value, str) or value is None else str(value)


def _turn(message: Any) -> str:
    """What is said in a message: text, or the text parts of it."""
    if not isinstance(message, dict):
        return ""
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        return "\n".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return content if isinstance(content, str) else ""


def loads(text: str) -> Any:
    """JSON, whatever its numbers: integers of thousands of digits stay text. ValueError, RecursionError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=_integer)


def _problem(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("\n")[0]


def lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines of a text that comes in pieces; they end with a line feed alone."""
    rest = ""
    for piece in pieces:
        first, *others = piece.split("\n")
        rest += first
        for line in others:
            yield rest
            rest = line
    if rest:
        yield rest


def json_lines(f: Any, name: str, decoder: Decoder, fields: list[str]) -> Iterator[Text | UserError]:
    """An object a line."""
    for number, line in enumerate(lines(decoder.pieces(f)), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            yield Text(where, *text_of(loads(line), where, fields))
        except UserError as error:
            yield error
        except (ValueError, RecursionError) as error:
            fix = "mend it, or pass --skip-bad to pass over it"
            yield UserError(f"{where}: broken JSON line ({_problem(error)}); {fix}")


_BETWEEN = re.compile(r"[\s\x1e,]*")


def json_items(pieces: Iterable[str], name: str) -> Iterator[Any]:
    """The values of a JSON text that comes in pieces: the items of an array, or one value after another. UserError if
    it is broken."""
    more, text, at, array = iter(pieces), "", 0, False
    decoder, problem = json.JSONDecoder(parse_int=_integer), "it ends too early"
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if at < len(text):
            if text[at] in "[]" and (text[at] == "]") == array:
                array, at = not array, at + 1
                continue
            try:
                value, end = decoder.raw_decode(text, at)
            except RecursionError:
                raise UserError(f"{name}: JSON that is nested too deeply") from None
            except ValueError as error:
                problem = str(error).partition("\n")[0]
            else:
                if end < len(text) or isinstance(value, dict | list | str):  # a number may go on
                    yield value
                    at = end
                    continue
        text, at = text[at:], 0
        grown = _at_least(more, len(text))
        if not grown:
            break
        text += grown
    if text.strip() and not array and _is_number(text):
        yield json.loads(text)
    elif text.strip() or array:
        raise UserError(f"{name}: not valid JSON ({problem}); mend it, or pass --skip-bad to pass over it")


def _at_least(pieces: Iterator[str], size: int) -> str:
    """So much more text that a long value is not tried too often; '' at the end."""
    out, length = [], 0
    for piece in pieces:
        out.append(piece)
        length += len(piece)
        if length >= max(1, size):
            break
    return "".join(out)


def _integer(text: str) -> int | str:
    return int(text) if len(text) < 4000 else text


def _is_number(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def json_file(f: Any, name: str, decoder: Decoder, fields: list[str]) -> Iterator[Text | UserError]:
    """A .json file: JSON lines (as C4's and Dolma's are), an array of records, or an object that holds one."""
    head = f.peek(1 << 18).lstrip() if hasattr(f, "peek") else b""
    if head.startswith(b"{") and b"\n{" in head[:-1] and _is_object(head.partition(b"\n")[0]):
        yield from json_lines(f, name, decoder, fields)
        return
    items = json_items(decoder.pieces(f), name)
    try:
        some = list(itertools.islice(items, 2))
        values = itertools.chain(some, items) if len(some) > 1 else _inside(some, name, fields)
        for number, value in enumerate(values, 1):
            where = f"{name}:{number}"
            try:
                yield Text(where, *text_of(value, where, fields))
            except UserError as error:
                yield error
    except UserError as error:
        yield error


def _inside(values: list[Any], name: str, fields: list[str]) -> list[Any]:
    """The records in the one object of a file, as {"data": [...]} or {"id": {...}, ...}; else the object itself."""
    if not values or not isinstance(values[0], dict):
        return values
    inner = [v for v in values[0].values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    try:
        text_of(values[0], name, fields)
        if len(inner) == 1 and "messages" not in values[0] and "conversations" not in values[0]:
            text_of(inner[0][0], name, fields)
            return [values[0], *inner[0]]
    except NoText:
        for field in (*fields, *TEXT_FIELDS):  # columns, as pandas writes them
            column = values[0].get(field)
            texts = list(column.values()) if isinstance(column, dict) else column
            if isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts):
                return texts
        if len(inner) == 1:
            return inner[0]
        if values[0] and all(isinstance(v, dict) for v in values[0].values()):
            return list(values[0].values())
    return values


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(loads(line.decode("utf-8", "replace")), dict)
    except (ValueError, RecursionError):
        return False


def notebook(f: Any, name: str, decoder: Decoder, fields: list[str]) -> Iterator[Text | UserError]:
    """A Jupyter notebook: its text and code cells, in order, without what they printed."""
    try:
        book = next(json_items(decoder.pieces(f), name))
        cells = book["cells"] if "cells" in book else [c for sheet in book["worksheets"] for c in sheet["cells"]]
        sources = [c.get("source", c.get("input", "")) for c in cells]
        said = ["".join(s) if isinstance(s, list) else str(s) for s in sources]
    except UserError as error:
        yield error
        return
    except (AttributeError, StopIteration, KeyError, TypeError):
        yield UserError(f"{name}: not a Jupyter notebook; --skip-bad passes over it")
        return
    yield Text(name, "\n\n".join(s for s in said if s.strip()))


def csv_rows(pieces: Iterable[str], name: str) -> Iterator[list[str] | UserError]:
    """Rows of CSV or tab-separated values, the header first; a text may hold line ends, in quotes. The separator is
    what the header has most of."""
    csv.field_size_limit((1 << 31) - 1)
    ended = (piece.replace("\r\n", "\n").replace("\r", "\n") for piece in pieces)  # Excel for the Macintosh
    rows = (line + "\n" for line in lines(ended))
    first = next((row for row in rows if row.strip()), None)
    if first is None:
        return
    separator = "\t" if ".tsv" in name.lower() else ""
    if said := re.fullmatch(r"sep=(.)\s*", first, re.I):  # Excel's first line
        separator, first = said[1], next(rows, "")
    bare = re.sub(r'"[^"]*"', "", first)
    separator = separator or max(",;\t|", key=bare.count)
    one = separator if separator in bare else "\x1f"  # a single column may hold any of them
    reader = csv.reader(itertools.chain([first], rows), delimiter=one, strict=True)
    width = 0
    for number in itertools.count():
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = "mend its quotes, or pass --skip-bad to pass over it"
            row = []
            yield UserError(f"{name}:{number}: broken row ({error}, near line {reader.line_num}); {fix}")
        width = width or len(row)
        if one == "\t" and width > 1 and (many := max((_lines_like_rows(field, width) for field in row), default=0)):
            fix = "double the quotes within texts, or pass --skip-bad to pass over it"
            yield UserError(f"{name}:{number}: a quote swallows {many} lines that look like rows; {fix}")
        elif any(row):
            yield row


def _lines_like_rows(field: str, width: int) -> int:
    """Lines within a field that have as many tabs as a row."""
    return sum(line.count("\t") == width - 1 for line in field.split("\n")[1:])


def table(f: Any, name: str, decoder: Decoder, fields: list[str]) -> Iterator[Text | UserError]:
    """CSV or tab-separated values with a header."""
    header: list[str] = []
    number = 0
    for row in csv_rows(decoder.pieces(f), name):
        if isinstance(row, UserError):
            yield row
            if not header:
                return
        elif not header:
            header = [h.strip() for h in row]
            if twice := [h for h in header if h and header.count(h) > 1]:
                yield UserError(f"{name}: two columns are named {twice[0]}; rename one")
                return
        else:
            number += 1
            where = f"{name}:{number}"
            if any(row[len(header) :]):
                fix = "put texts with separators in quotes, or pass --skip-bad to pass over it"
                yield UserError(f"{where}: {len(row)} fields where the header has {len(header)}; {fix}")
                continue
            try:
                yield Text(where, *text_of(dict(zip(header, row, strict=False)), where, fields))
            except NoText as error:
                yield error
                if number == 1:  # the header says it for all rows
                    return


def parquet(path: Any, name: str, fields: list[str]) -> Iterator[Text | UserError]:
    """Rows of a parquet file. UserError, NoText."""
    file = _parquet_file(path, name)
    there = file.schema_arrow.names
    wanted = {*TEXT_FIELDS, *CONVERSATIONS, *(f for pair in PAIRS for f in pair)}
    if fields:
        wanted = {f.partition(".")[0] for f in fields} | set(fields)
    columns = [n for n in there if n in wanted or (not fields and n.lower() in wanted)]
    if not columns:
        fix = f"name one with --text-field, or call it one of {_NAMES}"
        raise NoText(f"{name}: no column of text is known (it has {', '.join(there)}); {fix}")
    columns += [n for n in there if n in _LICENCES and n not in columns]
    for number, row in enumerate(_rows_of(file, name, columns), 1):
        yield row if isinstance(row, UserError) else _row(f"{name}:{number}", row, fields)


def parquet_rows(path: Any, name: str) -> Iterator[dict[str, Any]]:
    """Rows with all columns; bytes are text too. UserError."""
    file = _parquet_file(path, name)
    for number, row in enumerate(_rows_of(file, name, file.schema_arrow.names), 1):
        decoded = row if isinstance(row, UserError) else _decoded(f"{name}:{number}", row)
        if isinstance(decoded, UserError):
            raise decoded
        yield decoded


def _parquet_file(path: Any, name: str) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{name}: reading parquet needs pyarrow; pip install 'craton[parquet]'") from None
    try:
        return pq.ParquetFile(path)
    except Exception as error:
        raise UserError(f"{name}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def _rows_of(file: Any, name: str, columns: list[str]) -> Iterator[dict[str, Any] | UserError]:
    """By batches; a group of rows that is damaged is one error and not the end."""
    import pyarrow

    for group in range(file.num_row_groups):
        try:
            for batch in file.iter_batches(batch_size=64, columns=columns, row_groups=[group]):
                values = [_plain(batch.column(i), pyarrow) for i in range(batch.num_columns)]
                for row in zip(*values, strict=True):
                    yield dict(zip(batch.schema.names, row, strict=True))
        except (OSError, pyarrow.ArrowException) as error:
            yield UserError(f"{name}: row group {group + 1} cannot be read ({str(error).splitlines()[0]})")


def _plain(column: Any, pyarrow: Any) -> list[Any]:
    """A column's values; texts as bytes, since one that is not UTF-8 would take its whole batch along."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.view(pyarrow.binary() if pyarrow.types.is_string(column.type) else pyarrow.large_binary())
    return column.to_pylist()


def _decoded(where: str, row: dict[str, Any]) -> dict[str, Any] | UserError:
    """The row with text for its bytes."""
    for key, value in row.items():
        if isinstance(value, bytes):
            try:
                row[key] = "".join(Decoder(where).pieces(io.BytesIO(value)))
            except UserError as error:
                return error
    return row


def _row(where: str, row: dict[str, Any], fields: list[str]) -> Text | UserError:
    decoded = _decoded(where, row)
    if isinstance(decoded, UserError):
        return decoded
    try:
        return Text(where, *text_of(decoded, where, fields))
    except UserError as error:
        return error


def hub(name: str, fields: list[str]) -> Iterator[Text | UserError]:
    """Rows of the training split of a dataset on the hub. UserError."""
    try:
        from datasets import load_dataset
    except ImportError:
        problem = "no such file or folder; if it is a hub dataset, reading it needs pip install 'craton[hf]'"
        raise UserError(f"{name}: {problem}") from None
    try:
        for number, row in enumerate(load_dataset(name, split="train", streaming=True)):
            yield _row(f"{name}:{number}", row, fields)
    except Exception as error:
        problem = f"no such path here, and not readable from the hub ({str(error).splitlines()[0]})"
        raise UserError(f"{name}: {problem}") from None
