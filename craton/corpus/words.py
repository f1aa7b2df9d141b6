"""A text's words as arrays: where they lie and what they hash to, made in a few passes of numpy over its bytes.

Filters, near-duplicate search and decontamination all work on these arrays; hashes are the same in every process. In
scripts that are written without spaces each character counts as a word.
"""

from functools import cached_property

import numpy as np

_SPACE = np.zeros(256, bool)
_SPACE[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = True
_FOLD = np.arange(256, dtype=np.uint64)  # lower case, digits alike, punctuation 0
_FOLD[65:91] += 32
_FOLD[48:58] = 48
for _low, _high in ((33, 48), (58, 65), (91, 97), (123, 128)):
    _FOLD[_low:_high] = 0
_FOLD_KEEPING_DIGITS = _FOLD.copy()
_FOLD_KEEPING_DIGITS[48:58] = np.arange(48, 58)
_RAW = np.arange(256, dtype=np.uint64)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.cumprod(np.full(1024, 0x100000001B3, np.uint64))


def mix(h: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: spreads every bit over all."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


# Thai, Lao, Tibetan, Myanmar; Khmer; Tai Le to Tai Tham; Balinese, Javanese; kana, bopomofo; Han; Yi; Han beyond.
_UNSPACED = (
    (0x0E01, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x1AAF), (0x1B00, 0x1B7F), (0xA980, 0xA9DF),
    (0x3040, 0x309F), (0x30A1, 0x30FA), (0x30FC, 0x312F), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x20000, 0x3FFFF),
)  # fmt: skip
_EAST = (
    (0x3040, 0x309F), (0x30A1, 0x30FA), (0x30FC, 0x312F), (0x31F0, 0x31FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F), (0x20000, 0x3FFFF),
)  # fmt: skip
_PUNCTUATION = (
    (0x3000, 0x303F), (0x30A0, 0x30A0), (0x30FB, 0x30FB), (0xFF00, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF65),
)  # fmt: skip


def _within(points: np.ndarray, ranges: tuple[tuple[int, int], ...]) -> np.ndarray:
    """(n,) True for code points in one of the ranges, ends included."""
    found = np.zeros(len(points), bool)
    for low, high in ranges:
        found |= (points >= low) & (points <= high)
    return found


class Words:
    """Words of a text: separated by white space, or single characters of scripts without spaces.

    unspaced: the share of such characters among the words. east: whether most of them are Han or kana.
    """

    def __init__(self, text: str):
        self.bytes = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        inside = ~_SPACE[self.bytes]
        self.unspaced, self.east = 0.0, False
        if (self.bytes >= 0xE0).any():
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            alone = _within(points, _UNSPACED)
            if alone.any():
                self._characters(points, alone, inside)
                return
        edge = np.diff(inside.view(np.int8), prepend=0, append=0)
        self.start = np.flatnonzero(edge == 1)
        self.end = np.flatnonzero(edge == -1)

    def _characters(self, points: np.ndarray, alone: np.ndarray, inside: np.ndarray) -> None:
        """Each character that stands alone is a word; punctuation of the East separates as spaces do."""
        sizes = 1 + (points >= 0x80) + (points >= 0x800).astype(np.int64) + (points >= 0x10000)
        ends = np.cumsum(sizes)
        for at in np.flatnonzero(_within(points, _PUNCTUATION)).tolist():
            inside[ends[at] - sizes[at] : ends[at]] = False
        fresh = np.zeros(len(inside) + 1, bool)  # bytes at which a word begins, whatever is before them
        fresh[(ends - sizes)[alone]] = fresh[ends[alone]] = True
        padded = np.concatenate([[False], inside, [False]])
        begins = padded[1:] & (~padded[:-1] | fresh)
        self.start = np.flatnonzero(begins)
        self.end = np.flatnonzero(padded[:-1] & (~padded[1:] | begins))
        self.unspaced = int(alone.sum()) / max(1, len(self.start))
        self.east = 2 * int(_within(points, _EAST).sum()) > int(alone.sum())

    def __len__(self) -> int:
        return len(self.start)

    @cached_property
    def characters(self) -> np.ndarray:
        """Characters in each word."""
        first = np.concatenate([[0], np.cumsum((self.bytes & 0xC0) != 0x80)])
        return first[self.end] - first[self.start]

    def _hash(self, table: np.ndarray) -> np.ndarray:
        if not len(self):
            return np.empty(0, np.uint64)
        value = table[self.bytes]
        counted = np.cumsum(value != 0)
        before = np.repeat(counted[self.start] - (value[self.start] != 0), np.diff(self.start, append=len(value)))
        place = np.zeros(len(value), np.int64)
        place[self.start[0] :] = counted[self.start[0] :] - before
        term = value * _POWERS[place & 1023]
        term[_SPACE[self.bytes]] = 0
        return np.add.reduceat(term, self.start)

    @cached_property
    def exact(self) -> np.ndarray:
        """uint64 hash of each word as written."""
        return mix(self._hash(_RAW))

    @cached_property
    def folded(self) -> np.ndarray:
        """uint64 hash of each word in lower case, without ASCII punctuation, digits alike; words of nothing else left
        out."""
        h = self._hash(_FOLD)
        return mix(h[h != 0])

    @cached_property
    def folded_but_digits(self) -> np.ndarray:
        """The same with digits as they are: of two bills, say, that differ in their numbers alone."""
        h = self._hash(_FOLD_KEEPING_DIGITS)
        return mix(h[h != 0])


def ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Hash of every run of n words: len(words) - n + 1 of them, or none."""
    if len(words) < n:
        return np.empty(0, np.uint64)
    h = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        h = h * _BASE + words[i : len(words) - n + 1 + i]
    return mix(h)
