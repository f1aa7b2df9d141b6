"""The characters of a text file: by its mark, its declaration, UTF-8, or what a detector finds; else refused by name.

A file is read in blocks, so that its size does not matter. Nothing is decoded all or nothing: a stray byte in UTF-8
costs one character, and a file whose lines differ in encoding is read line by line.
"""

import codecs
import re
from collections.abc import Iterator
from typing import Any

from craton.base import UserError

BLOCK = 1 << 20  # bytes that are decoded at a time
LOST = "\ufffd"  # stands for bytes that are no text

# What people name differs from what they mean (WHATWG Encoding Standard, section 4.2).
_MEANT = {
    "iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "euc_kr": "cp949", "shift_jis": "cp932",
}  # fmt: skip
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Each in the files that it is for.
_DECLARED = {
    "html": (
        re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.I),
        re.compile(rb"\A\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w.:-]+)", re.I),
    ),
    "code": (re.compile(rb"\A(?:[^\n]*\n)?[ \t\f]*#[^\n]*?coding[:=][ \t]*([-\w.]+)"),),  # PEP 263
}
_DEFAULT = "cp1252"  # of a text with a few letters that nothing else is known of
_TYPOGRAPHY = frozenset([0x85, *range(0x91, 0x98), 0xA0, 0xA3, 0xA9, 0xAB, 0xAE, 0xB0, 0xB4, 0xB7, 0xBB])
_NOT_WESTERN = frozenset([0x81, 0x8D, 0x8F, 0x90, 0x9D])  # what Windows-1252 does not have
_ASCII = bytes(range(128))
_CONTROLS = bytes([*range(1, 9), *range(14, 27), *range(28, 32)])


def known(name: str) -> str:
    """The codec for an encoding's name. UserError if there is none that gives text."""
    try:
        if not isinstance(b"a".decode(name, "replace"), str):  # refuses codecs of other things than text
            raise LookupError
        found = codecs.lookup(name).name
    except (LookupError, TypeError, ValueError, AssertionError):
        fix = "write it as utf-8, windows-1251, shift_jis, ..."
        raise UserError(f"--encoding {name}: no such encoding; {fix}", field="encoding") from None
    return _MEANT.get(found, found)


class Decoder:
    """The text of one file. After it was read, `replaced` says how many characters stand for bytes that were none."""

    def __init__(self, name: str, given: str | None = None, kind: str = ""):
        """name: for messages. given: the encoding, of a file without a mark. kind: 'html' and 'code' declare theirs."""
        self.name, self.given, self.kind = name, known(given) if given else None, kind
        self.replaced = 0
        self.unread = b""  # the beginning of a character at a block's end
        self.encodings: set[str] = set()
        self.legacy: str | None = None  # of what is not UTF-8, once it was told

    def pieces(self, f: Any) -> Iterator[str]:
        """Text of a binary file, in pieces that end with a line where there are lines. UserError for binary data, and
        where the encoding cannot be told."""
        data = f.read(BLOCK)
        encoding, mark = self._stated(data)
        if encoding is None and _is_binary(data):
            fix = "leave it out, or pass --skip-bad to pass over such files"
            raise UserError(f"{self.name}: binary file, not text; {fix}", code="not_text")
        data = data[mark:]
        if encoding is not None and encoding != "utf-8":
            yield from self._throughout(encoding, data, f)
            return
        rest = b""
        while data:
            more = f.read(BLOCK)
            whole = rest + data
            cut = _boundary(whole) if more else len(whole)
            rest, data = whole[cut:], more
            yield self._block(whole[:cut], encoding is not None, not more)
            rest = self.unread + rest

    def _stated(self, head: bytes) -> tuple[str | None, int]:
        """The encoding that is given or that the file states, and the length of its mark; None where it states none."""
        for mark, name in _MARKS:
            if head.startswith(mark):
                return name, len(mark)
        if self.given:
            return self.given, 0
        if wide := _wide(head):
            return wide, 0
        patterns = _DECLARED.get(self.kind, ())
        found = next((m for m in (p.search(head[:16_384]) for p in patterns) if m), None)
        try:
            name = known(found[1].decode("ascii")) if found else ""
        except UserError:
            name = ""
        if name.startswith(("iso2022", "hz", "utf-7")):  # these are ASCII to the eye
            return name, 0
        if name and not name.startswith("utf"):
            self.legacy = name  # of what is not UTF-8: pages are often saved again, with the old declaration
        return _seven_bits(head), 0

    def _throughout(self, encoding: str, data: bytes, f: Any) -> Iterator[str]:
        """One encoding for all of the file."""
        self.encodings.add(encoding)
        decoder, rest = codecs.getincrementaldecoder(encoding)("replace"), ""
        while data:
            more = f.read(BLOCK)
            text = decoder.decode(data, not more)
            self.replaced += text.count(LOST)
            text = rest + text
            cut = (text.rfind("\n") + 1 if more else len(text)) or len(text)
            yield text[:cut]
            rest, data = text[cut:], more

    def _block(self, data: bytes, utf8: bool, last: bool) -> str:
        """A block that is UTF-8, or mostly, or whose lines are of another encoding. utf8: the file says so."""
        self.unread = b""
        try:
            text = data.decode("utf-8")
            if not data.isascii():
                self.encodings.add("utf-8")
            return text
        except UnicodeDecodeError:
            text = data.decode("utf-8", "replace")
        lost = text.count(LOST) - data.count(LOST.encode())
        sound = len(text) - len(text.encode("ascii", "ignore")) - text.count(LOST)
        if utf8 or 20 * lost <= sound:
            self.encodings.add("utf-8")
            self.replaced += lost
            return text
        lines = data.split(b"\n")
        legacy = self._detect(b"\n".join(line for line in lines if not line.isascii() and not _valid(line)))
        sound_lines = _which_are_utf8(lines)
        out = [line.decode("utf-8" if ok else legacy, "replace") for line, ok in zip(lines, sound_lines, strict=True)]
        if not last and not sound_lines[-1]:  # the block may end within a character
            decoder = codecs.getincrementaldecoder(legacy)("replace")
            out[-1], self.unread = decoder.decode(lines[-1]), decoder.getstate()[0]
        self.replaced += sum(line.count(LOST) for line, ok in zip(out, sound_lines, strict=True) if not ok)
        return "\n".join(out)

    def _detect(self, data: bytes) -> str:
        """The encoding of bytes that are not UTF-8. UserError if nothing fits."""
        if self.legacy is None:
            import chardet

            found = chardet.detect(data)
            name, high = found["encoding"], data[: 1 << 16].translate(None, _ASCII)
            unsure = name is None or (found["confidence"] or 0) < 0.05
            western = not set(high) & _NOT_WESTERN and len(high) * 3 <= len(data[: 1 << 16])
            if (unsure and western) or set(high) <= _TYPOGRAPHY:
                name = _DEFAULT
            elif name is None or unsure:
                fix = "say which with --encoding, or pass --skip-bad to pass over such files"
                raise UserError(f"{self.name}: not UTF-8, and its encoding cannot be told; {fix}", code="not_text")
            self.legacy = known(name)
        self.encodings.add(self.legacy)
        return self.legacy


def _valid(data: bytes) -> bool:
    """Whether there is UTF-8 beyond ASCII, and nothing else."""
    try:
        return not data.decode("utf-8").isascii()
    except UnicodeDecodeError:
        return False


def _seven_bits(head: bytes) -> str | None:
    """The encodings of the East that shift between ASCII and their own characters, by their shifts."""
    start = head[:16_384]
    if not re.search(rb"\x1b\$[@BAC()]", start) and start.count(b"~{") < 2:
        return None
    import chardet

    found = str(chardet.detect(head)["encoding"])
    return known(found) if found.startswith(("ISO-2022", "HZ")) else None


def _which_are_utf8(lines: list[bytes]) -> list[bool]:
    """Of lines some of which are not UTF-8. A character or two of another encoding may look like UTF-8: a short line
    goes with what most of the others are."""
    high = [len(line.translate(None, _ASCII)) for line in lines]
    valid = [not n or _valid(line) for line, n in zip(lines, high, strict=True)]
    of_utf8 = sum(n for n, ok in zip(high, valid, strict=True) if ok)
    mostly = of_utf8 > sum(high) - of_utf8
    return [ok and (mostly or n >= 8 or not n) for ok, n in zip(valid, high, strict=True)]


def _boundary(data: bytes) -> int:
    """Where a block can be cut: after its last line, else after a space, else before a character of UTF-8."""
    for end in (b"\n", b" "):
        if (cut := data.rfind(end) + 1) > len(data) // 2:
            return cut
    cut = len(data)
    while cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if data[cut - 1] >= 0xC0 else cut


def _wide(head: bytes) -> str | None:
    """UTF-16 without a mark, by the NUL that each ASCII character has there."""
    some = head[:4096]
    if len(some) < 16 or len(some) % 2 or some.count(0) < len(some) // 4:
        return None
    for name, zeros, others in (("utf-16-le", some[1::2], some[::2]), ("utf-16-be", some[::2], some[1::2])):
        if zeros.count(0) > 0.5 * len(zeros) and others.count(0) == 0:
            return name
    return None


def _is_binary(head: bytes) -> bool:
    """More than a stray NUL or control character in a thousand bytes."""
    controls = len(head) - len(head.translate(None, _CONTROLS))
    return head.count(0) > 1 + len(head) / 1000 or controls > 1 + len(head) / 1000
