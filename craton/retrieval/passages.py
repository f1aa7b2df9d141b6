"""Documents cut into passages where their structure says: headings, paragraphs, functions, rows under their header.

Passages lie side by side and together are the whole text, so that places in one are places in the document.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_HEADING = re.compile(r"(#{1,6})[ \t]+(\S.*)")
_UNDERLINE = re.compile(r"([=\-~^\"*+#])\1{2,}\s*$")
_DEFINITION = re.compile(
    r"(?:@|(?:export |public |private |static |async |pub |default )*(?:def|class|function|fn|func|struct|impl|"
    r"interface|enum|trait|module|type|CREATE)\b)"
)
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*(?:\s+|(?<=[。！？]))")
_CLAUSE_END = re.compile(_SENTENCE_END.pattern + r"|(?<=;)\s+")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|Fig|No|Vol|approx|est|U\.S|U\.K)|\b[A-Z])\.$"
)


@dataclass(frozen=True)
class Passage:
    """A piece of a text. start, end: characters. heading: what stands above it, such as titles, or a table's header."""

    start: int
    end: int
    heading: str = ""


@dataclass
class _Block:
    start: int
    end: int
    heading: str
    begins: bool  # something new, such as a chapter or a function


def cut(text: str, kind: str, size: int, count: Callable[[str], int]) -> list[Passage]:
    """Passages of at most about `size` tokens as `count` counts them. kind: prose, code or table."""
    make = {"code": _code, "table": _table}.get(kind, _prose)
    out: list[Passage] = []
    held, start, end, heading = 0, 0, 0, ""
    for block in _small(make(text), text, size, count):
        tokens = count(text[block.start : block.end])
        full = held + tokens > size or (block.begins and held > size // 4) or block.heading != heading and held > 0
        if end > start and full:
            out.append(Passage(start, end, heading))
            start, held = block.start, 0
        if held == 0:
            heading = block.heading
        held, end = held + tokens, block.end
    if end > start:
        out.append(Passage(start, end, heading))
    return out


def _lines(text: str) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        yield at, end
        at = end


def _prose(text: str) -> Iterator[_Block]:
    """Paragraphs, each under the headings above it."""
    titles: list[tuple[int, str]] = []
    start, blank, fenced, begins = 0, False, False, False
    previous = (0, 0)
    for at, end in _lines(text):
        line = text[at:end].strip()
        fenced ^= line.startswith("```")
        found = None if fenced else _HEADING.match(line)
        above = text[previous[0] : previous[1]].strip()
        under = not fenced and above and _UNDERLINE.match(line) and len(line) >= len(above) // 2
        if under and previous[0] >= start and len(above) < 120:  # the line above was the heading
            if previous[0] > start:
                yield _Block(start, previous[0], _path(titles), begins)
            level = {"=": 1, "-": 2}.get(line[0], 3)
            titles = [t for t in titles if t[0] < level] + [(level, above)]
            start, begins, blank = previous[0], True, False
        elif found:
            if at > start:
                yield _Block(start, at, _path(titles), begins)
            level = len(found[1])
            titles = [t for t in titles if t[0] < level] + [(level, found[2].strip("# "))]
            start, begins, blank = at, True, False
        elif line and blank and not fenced:
            if at > start:
                yield _Block(start, at, _path(titles), begins)
            start, begins, blank = at, False, False
        elif not line:
            blank = True
        previous = (at, end)
    if start < len(text):
        yield _Block(start, len(text), _path(titles), begins)


def _path(titles: list[tuple[int, str]]) -> str:
    return " > ".join(title for _, title in titles)


def _code(text: str) -> Iterator[_Block]:
    """Definitions that begin a line, and what lies between."""
    start, begins = 0, False
    decorated = False
    for at, end in _lines(text):
        line = text[at:end]
        if _DEFINITION.match(line) and not decorated:
            if at > start:
                yield _Block(start, at, "", begins)
            start, begins = at, True
        decorated = line.startswith("@")
    if start < len(text):
        yield _Block(start, len(text), "", begins)


def _table(text: str) -> Iterator[_Block]:
    """Rows; the first is the others' header."""
    header = ""
    for number, (at, end) in enumerate(_lines(text)):
        yield _Block(at, end, header, False)
        if number == 0:
            header = text[at:end].strip()[:500]


def _small(blocks: Iterator[_Block], text: str, size: int, count: Callable[[str], int]) -> Iterator[_Block]:
    """Blocks that are larger than a passage in pieces: of sentences, lines or, where there are none, words."""
    for block in blocks:
        if count(text[block.start : block.end]) <= size:
            yield block
            continue
        at = block.start
        for begin, end in _halves(text, block.start, block.end, size, count):
            yield _Block(begin, end, block.heading, block.begins and begin == at)


def _halves(text: str, start: int, end: int, size: int, count: Callable[[str], int]) -> Iterator[tuple[int, int]]:
    """A long piece, halved at the best place near its middle until its parts are small."""
    if end - start < 2 or count(text[start:end]) <= size:
        yield start, end
        return
    middle, reach = (start + end) // 2, max(1, (end - start) // 4)
    low, high = middle - reach, middle + reach
    cuts = [m.end() for m in _SENTENCE_END.finditer(text, low, high)]
    for mark in ("\n", " "):
        cuts = cuts or [i + 1 for i in range(low, high) if text[i] == mark]
    at = min((c for c in cuts if start < c < end), key=lambda c: abs(c - middle), default=middle)
    yield from _halves(text, start, at, size, count)
    yield from _halves(text, at, end, size, count)


def sentences(text: str, clauses: bool = False) -> list[tuple[int, int]]:
    """Where each sentence or line of a text lies, without the blanks around it. clauses: semicolons end one too."""
    ends = _CLAUSE_END if clauses else _SENTENCE_END
    out: list[tuple[int, int]] = []
    for at, end in _lines(text):
        start = at
        for found in ends.finditer(text, at, end):
            if _ABBREVIATION.search(text, start, found.start()):
                continue
            out.append((start, found.end()))
            start = found.end()
        out.append((start, end))
    trimmed = []
    for a, b in out:
        piece = text[a:b]
        if piece.strip():
            trimmed.append((a + len(piece) - len(piece.lstrip()), b - len(piece) + len(piece.rstrip())))
    return trimmed
