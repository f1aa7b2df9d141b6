"""Where a place in a repaired text lies in the file's own text, for citations that point into what the user has."""

import re
from bisect import bisect_right

_LINE = re.compile("[^\r\n\x0b\x85]*(?:\r\n|[\r\n\x0b\x85]|$)")  # what a repair makes a line end, one for one
_WORD = re.compile(r"\S+")


class Offsets:
    """Places of a repaired text -> places of the original, both in characters. Exact outside the words that the repair
    changed; within such a word, at or after its beginning."""

    def __init__(self, original: str, repaired: str):
        self.repaired, self.original = [0], [0]  # places that belong together; between them, step for step
        if original != repaired:
            self._align(_LINE, original, repaired, 0, 0)
            self._meet(len(original), len(repaired))

    @classmethod
    def of(cls, repaired: list[int], original: list[int]) -> "Offsets":
        """From what was kept of another."""
        out = cls("", "")
        out.repaired, out.original = repaired, original
        return out

    def _align(self, unit: re.Pattern[str], original: str, repaired: str, a: int, b: int) -> None:
        """Texts that begin at a and b, line by line or word by word. Where their numbers differ only the ends meet."""
        pairs = list(unit.finditer(original)), list(unit.finditer(repaired))
        if len(pairs[0]) != len(pairs[1]):
            return
        for x, y in zip(*pairs, strict=True):
            self._meet(a + x.start(), b + y.start())
            if unit is _LINE and x[0] != y[0]:
                self._align(_WORD, x[0], y[0], a + x.start(), b + y.start())

    def _meet(self, original: int, repaired: int) -> None:
        if original - self.original[-1] != repaired - self.repaired[-1]:
            self.original.append(original)
            self.repaired.append(repaired)

    def original_of(self, place: int) -> int:
        """Where the character at `place` of the repaired text comes from."""
        at = bisect_right(self.repaired, place) - 1
        found = self.original[at] + place - self.repaired[at]
        return min(found, self.original[at + 1]) if at + 1 < len(self.original) else found
