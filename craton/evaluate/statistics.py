"""How sure a score is, whether two models differ, and whether confidence is earned."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_Z = 1.959964  # of a 95 % interval
_RESAMPLES = 4000


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean, with n - 1."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else 0.0


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, _Z * _Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % of the mean: Wilson's where each item is right or wrong, else by bootstrap with a fixed seed."""
    if all(s in (0.0, 1.0) for s in scores):
        return wilson(sum(scores), len(scores))
    values, r = np.asarray(scores, float), np.random.default_rng(0)
    means = values[r.integers(0, len(values), (_RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """The difference b - a of two models on the same items: its mean, standard error, 95 % interval and p-value, by
    McNemar's exact test where each item is right or wrong, else by flipping signs at random (10,000 times)."""
    difference = np.asarray(b, float) - np.asarray(a, float)
    mean, error = float(difference.mean()), standard_error(difference.tolist())
    if set(difference.tolist()) <= {-1.0, 0.0, 1.0}:
        better, worse = int((difference == 1).sum()), int((difference == -1).sum())
        p = _binomial(min(better, worse), better + worse)
    else:
        r = np.random.default_rng(0)
        signs = r.choice((-1.0, 1.0), (10_000, len(difference)))
        p = float((1 + (abs((signs * difference).mean(1)) >= abs(mean) - 1e-12).sum()) / 10_001)
    return {"difference": mean, "stderr": error, "low": mean - _Z * error, "high": mean + _Z * error, "p": p}


def _binomial(k: int, n: int) -> float:
    """Two-sided, of k or fewer of n at one half."""
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, float(2 * tail / 2**n)) if n < 1000 else math.erfc(abs(n / 2 - k - 0.5) / math.sqrt(n / 2))


def calibration(loglikelihoods: Sequence[Sequence[float]], gold: Sequence[int], bins: int = 10) -> dict[str, Any]:
    """Of choices: probabilities are the softmax over an item's log-likelihoods. ece: the expected calibration error
    (arXiv 1706.04599); curve: (mean confidence, share that is right, items) of each bin that has any."""
    confidence, right = np.empty(len(gold)), np.empty(len(gold))
    for i, (values, g) in enumerate(zip(loglikelihoods, gold, strict=True)):
        p = np.exp(np.asarray(values) - max(values))
        p /= p.sum()
        confidence[i], right[i] = p.max(), float(p.argmax() == g)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    curve = [
        (float(confidence[which == b].mean()), float(right[which == b].mean()), int((which == b).sum()))
        for b in range(bins)
        if (which == b).any()
    ]
    ece = sum(n * abs(c - r) for c, r, n in curve) / max(1, len(gold))
    return {"ece": ece, "curve": curve}
