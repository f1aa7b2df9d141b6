"""Words and numbers for the person at the terminal."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any


def count(n: float) -> str:
    """1234567 -> '1.23M'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def amount(n: float, unit: str) -> str:
    """1234567, 'B' -> '1.23 MB'."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {prefix}{unit}"
    return f"{n:.3g} {unit}"


def span(seconds: float) -> str:
    """95 -> '1m35s'."""
    s = int(seconds + 0.5)
    if s < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


def speak_anywhere() -> None:
    """Let output show what it can: characters that the terminal's encoding lacks are escaped, not fatal."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (closed by whoever started this process)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str = "") -> None:
    """A line for the reader, on stdout. Work goes on where nobody listens any more."""
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError:  # a closed pipe or terminal, a full disk behind it
        _silence(sys.stdout)


def _silence(stream: Any) -> None:
    """What is said there from now on is lost."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """On a terminal, a word on stderr for as long as something silent takes."""
    live = sys.stderr.isatty()
    if live:
        print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


class Progress:
    """A line on stderr that is rewritten on a terminal, and printed every few seconds elsewhere."""

    def __init__(self, every: float = 5.0):
        self.live = sys.stderr.isatty()
        self.every = 0.1 if self.live else every
        self.began = self.last = time.monotonic()
        self.open = False

    def show(self, text: str) -> None:
        """Show a line, unless one was shown a moment ago."""
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        try:
            if self.live:
                width = os.get_terminal_size(2).columns
                print("\r\x1b[2K" + text[: width - 1], end="", file=sys.stderr, flush=True)
                self.open = True
            else:
                print(text, file=sys.stderr, flush=True)
        except OSError:
            _silence(sys.stderr)

    def show_part(self, label: str, done: int, whole: int) -> None:
        """Show how much is done of what has been under way since this object was made, and the time left."""
        left = (time.monotonic() - self.began) * (whole - done) / max(1, done)
        self.show(f"{label}: {done} of {whole}, {span(max(0.0, left))} left")

    def clear(self) -> None:
        """Take the line away, so that ordinary output can follow."""
        if self.open:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self.open = False
