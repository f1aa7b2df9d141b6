"""A text's words as arrays: where they lie and what they hash to, made in a few passes of numpy over its bytes.

Filters, near-duplicate search and decontamination all work on these arrays; hashes are the same in every process.
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
_RAW = np.arange(256, dtype=np.uint64)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.cumprod(np.full(1024, 0x100000001B3, np.uint64))


def mix(h: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: spreads every bit over all."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


class Words:
    """Whitespace-separated words of a text."""

    def __init__(self, text: str):
        self.bytes = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        inside = ~_SPACE[self.bytes]
        edge = np.diff(inside.view(np.int8), prepend=0, append=0)
        self.start = np.flatnonzero(edge == 1)
        self.end = np.flatnonzero(edge == -1)

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


def ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Hash of every run of n words: len(words) - n + 1 of them, or none."""
    if len(words) < n:
        return np.empty(0, np.uint64)
    h = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        h = h * _BASE + words[i : len(words) - n + 1 + i]
    return mix(h)
