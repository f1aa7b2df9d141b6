"""How calls of tools are written, and the parser that reads them, and thinking, from what a model writes."""

import json
import re
import secrets
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from craton.text.fields import Fields, find_first, json_of, literal_end, may_begin, properties_of

ID, ID_LENGTH = "\0", 9  # stands for a call's id, nine letters and digits as Mistral's models want
_TELLING = 3  # characters of a marker that tell it from text
ID_PATTERN = f"[a-zA-Z0-9]{{{ID_LENGTH}}}"


@dataclass(frozen=True)
class CallFormat:
    """opening NAME middle ARGUMENTS [between NAME middle ARGUMENTS]... closing. ID stands in them for a call's id."""

    opening: str
    middle: str
    closing: str
    between: str | None  # None: one call an answer
    native: bool = True  # the template renders calls and results itself
    shows_tools: bool = True  # and tells of the tools there are
    as_text: bool = False  # it wants arguments as JSON text, not as an object
    no_content: bool = False  # it wants a message that calls to have no content
    fields: Fields | None = None  # arguments are not JSON; middle is "" then

    def openings(self, names: Iterable[str]) -> tuple[str, ...]:
        """What tells a call from text: the opening or, where that is as good as any text, it and a function's name."""
        if self.fields is None or not self.fields.quoted:
            return (self.opening,)
        return tuple(self.opening + name + self.fields.begin for name in names)

    def ends(self, last: str) -> tuple[str, ...]:
        """How a call may end whose arguments end with `last`."""
        return tuple(last + after for after in (self.closing, self.between) if after is not None)


_BEGIN, _END = '<tool_call>\n{"name": "', "}\n</tool_call>"
HERMES = CallFormat(_BEGIN, '", "arguments": ', _END, f"{_END}\n{_BEGIN}", native=False, shows_tools=False)


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
        self,
        calls: CallFormat | None,
        markers: tuple[str, str] | None,
        thinking: bool = False,
        may_think: bool = False,
        schemas: dict[str, dict[str, Any]] | None = None,
    ):
        """calls: None if none are read. markers: around thinking. thinking: the text begins amid it. schemas: of
        arguments by name, which tell texts from other values where neither is quoted."""
        self.calls, self.markers, self.schemas = calls, markers, schemas or {}
        self.state = "lead" if thinking else "start" if may_think and self.markers else "content"
        self.buffer, self.call = "", -1
        self.depth, self.quoted, self.escaped = 0, False, False
        self.name, self.key, self.fields = "", "", 0  # of a call whose arguments are not JSON
        self.cut = False
        self.openings = calls.openings(self.schemas) if calls else ()

    def feed(self, text: str, last: bool = False, cut: bool = False) -> Iterator[Part]:
        """The parts that more text makes certain. last: no more comes. cut: because no more was allowed."""
        self.buffer += text
        self.cut = cut
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
        yield from self._until((self.markers[1],), last, "reasoning", "gap")

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
            named = self.calls.opening if self.calls.fields else ""  # the function's name is still to be read
            yield from self._until(self.openings, last, "content", "name", named)

    def _until(self, markers: tuple[str, ...], last: bool, kind: str, then: str, opening: str = "") -> Iterator[Part]:
        """Everything before the first of the markers is of a kind; white space just before it is dropped, as templates
        do. opening: of the marker no more than this is done with."""
        found = min((m for m in (_pattern(k).search(self.buffer) for k in markers) if m), key=_start, default=None)
        if found:
            end = found.start() + len(opening) if opening else found.end()
            text, self.buffer, self.state = self.buffer[: found.start()].rstrip(), self.buffer[end:], then
        else:
            end = len(self.buffer)
            kept = max((_may_begin(self.buffer, m) for m in markers), default=0)
            begun = kept if self.cut and kind == "content" else 0
            if begun >= _TELLING:  # a call that was cut off in its opening
                end = len(self.buffer[: end - begun].rstrip())
            if not last:  # what may begin the marker is kept, and the white space before it
                end = len(self.buffer[: end - kept].rstrip())
            text, self.buffer = self.buffer[:end], self.buffer[end:]
        if text:
            yield Part(kind, text)

    def _name(self, last: bool) -> Iterator[Part]:
        assert self.calls
        if self.calls.fields:
            yield from self._name_before_fields(self.calls, self.calls.fields, last)
            return
        at = self.buffer.find(self.calls.middle.split(ID)[0] or '"')
        if at >= 0 and (found := _pattern(self.calls.middle).match(self.buffer, at)):
            name, self.buffer, self.state = self.buffer[:at], self.buffer[found.end() :], "arguments"
            self.depth, self.quoted, self.escaped = 0, False, False
            yield self._begun(name)
        elif last:
            self.buffer = ""

    def _begun(self, name: str) -> Part:
        self.call += 1
        self.name, self.fields = name, 0
        return Part("call", name, self.call, new_id())

    def _name_before_fields(self, calls: CallFormat, f: Fields, last: bool) -> Iterator[Part]:
        ends = calls.ends(f.empty)
        found = find_first(self.buffer, (f.first, *ends), last)
        if found is None:
            self.buffer = "" if last else self.buffer
            return
        at, option = found
        yield self._begun(self.buffer[:at])
        if option == f.first:
            self.buffer, self.state = self.buffer[at + len(option) :], "key"
        else:
            self.buffer, self.state = self.buffer[at + len(f.empty) :], "after"
            yield Part("arguments", "{}", self.call)

    def _key(self, last: bool) -> Iterator[Part]:
        assert self.calls and self.calls.fields
        key, found, rest = self.buffer.partition(self.calls.fields.key_end)
        if found:
            self.key, self.buffer, self.state = key, rest, "value"
        elif last:
            self.buffer = ""
        return
        yield

    def _value(self, last: bool) -> Iterator[Part]:
        assert self.calls and self.calls.fields
        f = self.calls.fields
        begin = literal_end(self.buffer) if f.quoted else 0
        options = (f.separator, *self.calls.ends(f.last))
        found = None if begin is None else find_first(self.buffer, options, last, begin)
        if found is None:
            self.buffer = "" if last else self.buffer
            return
        at, option = found
        schema = properties_of(self.schemas.get(self.name, {}))[0].get(self.key)
        value = json_of(self.buffer[:at], f.quoted, schema)
        start = "{" if not self.fields else ", "
        self.fields += 1
        whole = option == f.separator
        taken = at + len(f.separator if whole else f.last)
        self.buffer, self.state = self.buffer[taken:], "key" if whole else "after"
        yield Part("arguments", f"{start}{json.dumps(self.key, ensure_ascii=False)}: {value}", self.call)
        if not whole:
            yield Part("arguments", "}", self.call)

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


def new_id() -> str:
    """An id for a call."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LENGTH))


def _start(match: re.Match[str]) -> int:
    return match.start()


def _pattern(literal: str) -> re.Pattern[str]:
    return re.compile(re.escape(literal).replace(re.escape(ID), ID_PATTERN))


def _may_begin(text: str, marker: str) -> int:
    """As may_begin, for a marker with ids in it."""
    fixed = marker.split(ID)[0]
    return may_begin(text, fixed) or (len(text) if ID in marker and fixed in text else 0)
