"""Which of many documents are copies of an earlier one: exactly, or nearly (MinHash bands, arXiv 2107.06499)."""

import numpy as np


def exact_copies(digests: np.ndarray) -> np.ndarray:
    """digests (n, 2) uint64 -> (n,) True where an earlier row is equal."""
    if not len(digests):
        return np.zeros(0, bool)
    _, first = np.unique(digests.view([("a", "u8"), ("b", "u8")]).ravel(), return_index=True)
    copy = np.ones(len(digests), bool)
    copy[first] = False
    return copy


def near_copies(bands: np.ndarray) -> np.ndarray:
    """bands (n, bands) uint64 -> (n,) True where the row shares a band, directly or through others, with an earlier
    one."""
    parent = np.arange(len(bands))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for column in bands.T:
        order = np.argsort(column, kind="stable")
        same = np.flatnonzero(column[order[1:]] == column[order[:-1]])
        for a, b in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            low, high = sorted((root(a), root(b)))
            parent[high] = low
    return parent != np.arange(len(bands))
