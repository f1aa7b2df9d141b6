"""How calls of tools are written, and the parser that reads them, and thinking, from what a model writes."""

import re
import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass

ID, ID_LENGTH = "\0", 9  # stands for a call's id, nine letters and digits as Mistral's models want
ID_PATTERN = f"[a-zA-Z0-9]{{{ID_LENGTH}}}"


@dataclass(frozen=True)
class CallFormat:
    """opening NAME middle ARGUMENTS [between NAME middle ARGUMENTS]... closing. ID stands in them for a call's id."""

    opening: str
    middle: str
    closing: str
    between: str | None  # None: one call an answer
    native: bool = True  # the template renders tools, calls and results itself
    as_text: bool = False  # it wants arguments as JSON text, not as an object


_BEGIN, _END = '<tool_call>\n{"name": "', "}\n</tool_call>"
HERMES = CallFormat(_BEGIN, '", "arguments": ', _END, f"{_END}\n{_BEGIN}", native=False)


@dataclass(frozen=True)
class Part:
    """A piece of an answer. kind: "reasoning", "content", "call" (text is the name) or "arguments"."""

    kind: str
    text: str
    call: int = 0  # which call, from 0
    id: str = ""  # ours: where models write ids at all, some do so after the arguments


class Parser:
    """Text in, parts out; whatever is cut how, the parts join to the same."""

    def __init__(
        self, calls: CallFormat | None, markers: tuple[str, str] | None, thinking: bool = False, may_think: bool = False
    ):
        """calls: None if none are read. markers: around thinking. thinking: the text begins amid it."""
        self.calls, self.markers = calls, markers
        self.state = "lead" if thinking else "start" if may_think and self.markers else "content"
        self.buffer, self.call = "", -1
        self.depth, self.quoted, self.escaped = 0, False, False

    def feed(self, text: str, last: bool = False) -> Iterator[Part]:
        """The parts that more text makes certain. last: no more comes."""
        self.buffer += text
        while True:
            before = self.state, len(self.buffer)
            yield from getattr(self, f"_{self.state}")(last)  # a state's name is its method's
            if (self.state, len(self.buffer)) == before:
                return

    def _start(self, last: bool) -> Iterator[Part]:
        """Thinking may begin here, and only here."""
        assert self.markers
        text = self.buffer.lstrip()
        if text.startswith(self.markers[0]):
            self.buffer, self.state = text[len(self.markers[0]) :], "lead"
        elif last or not self.markers[0].startswith(text):
            self.state = "content"
        return
        yield

    def _lead(self, last: bool) -> Iterator[Part]:
        yield from self._gap(last, "think")

    def _think(self, last: bool) -> Iterator[Part]:
        assert self.markers
        yield from self._until(self.markers[1], last, "reasoning", "gap")

    def _gap(self, last: bool, then: str = "content") -> Iterator[Part]:
        """White space between thinking and answer belongs to neither."""
        self.buffer = self.buffer.lstrip()
        if self.buffer or last:
            self.state = then
        return
        yield

    def _content(self, last: bool) -> Iterator[Part]:
        if self.calls is None:
            if self.buffer:
                yield Part("content", self.buffer)
            self.buffer = ""
        else:
            yield from self._until(self.calls.opening, last, "content", "name")

    def _until(self, marker: str, last: bool, kind: str, then: str) -> Iterator[Part]:
        """Everything before the marker is of a kind; white space just before it is dropped, as templates do."""
        found = _pattern(marker).search(self.buffer)
        if found:
            text, self.buffer, self.state = self.buffer[: found.start()].rstrip(), self.buffer[found.end() :], then
        else:
            end = len(self.buffer)
            if not last:  # what may begin the marker is kept, and the white space before it
                end = len(self.buffer[: end - _may_begin(self.buffer, marker)].rstrip())
            text, self.buffer = self.buffer[:end], self.buffer[end:]
        if text:
            yield Part(kind, text)

    def _name(self, last: bool) -> Iterator[Part]:
        assert self.calls
        at = self.buffer.find(self.calls.middle.split(ID)[0] or '"')
        if at >= 0 and (found := _pattern(self.calls.middle).match(self.buffer, at)):
            name, self.buffer, self.state = self.buffer[:at], self.buffer[found.end() :], "arguments"
            self.call += 1
            self.depth, self.quoted, self.escaped = 0, False, False
            letters = [secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LENGTH)]
            yield Part("call", name, self.call, "".join(letters))
        elif last:
            self.buffer = ""

    def _arguments(self, last: bool) -> Iterator[Part]:
        end = len(self.buffer)
        for i, c in enumerate(self.buffer):
            if self.quoted:
                self.quoted = self.escaped or c != '"'
                self.escaped = c == "\\" and not self.escaped
            elif c == '"':
                self.quoted = True
            elif c in "{[":
                self.depth += 1
            elif c in "}]":
                self.depth -= 1
                if not self.depth:
                    end, self.state = i + 1, "after"
                    break
        text, self.buffer = self.buffer[:end], self.buffer[end:]
        if text:
            yield Part("arguments", text, self.call)

    def _after(self, last: bool) -> Iterator[Part]:
        assert self.calls
        if self.calls.between is not None and (found := _pattern(self.calls.between).match(self.buffer)):
            self.buffer, self.state = self.buffer[found.end() :], "name"
        elif last:
            self.buffer = ""
        return
        yield


def _pattern(literal: str) -> re.Pattern[str]:
    return re.compile(re.escape(literal).replace(re.escape(ID), ID_PATTERN))


def _may_begin(text: str, marker: str) -> int:
    """Characters at the end of text that may be the beginning of the marker."""
    fixed = marker.split(ID)[0]
    return next(
        (n for n in range(min(len(fixed) - 1, len(text)), 0, -1) if text.endswith(fixed[:n])),
        len(text) if ID in marker and fixed in text else 0,
    )
