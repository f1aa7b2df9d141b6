"""What every floor stands on: errors meant for people, files that are never half-written, hashes, progress."""

import contextlib
import difflib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input. The message is one line: what file or field, what is wrong, how to fix it. Exit code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the known name nearest to a mistyped one, or ''."""
    found = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


# ---- files ------------------------------------------------------------------------------------------------------


def fsync(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write; on success it is fsynced and renamed to path, on failure removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # some libraries write files that only their owner can read
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_json(value: Any) -> str:
    """The one text that write_json gives a value, so that a file with another text was altered."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, as_json(value))


def read_json(path: Path) -> Any:
    """The JSON in a file. UserError names the file and what is wrong."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# ---- words for people -------------------------------------------------------------------------------------------


def count(n: float) -> str:
    """1234567 -> '1.23M'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def span(seconds: float) -> str:
    """95 -> '1m35s'."""
    s = int(seconds + 0.5)
    if s < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


def say(text: str = "") -> None:
    """A line for the reader, on stdout."""
    print(text, flush=True)


class Progress:
    """A line on stderr that is rewritten on a terminal, and printed every few seconds elsewhere."""

    def __init__(self, every: float = 5.0):
        self.live = sys.stderr.isatty()
        self.every = 0.1 if self.live else every
        self.last = time.monotonic()
        self.open = False

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        if self.live:
            width = os.get_terminal_size(2).columns if self.live else 120
            print("\r\x1b[2K" + text[: width - 1], end="", file=sys.stderr, flush=True)
            self.open = True
        else:
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.open:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self.open = False
