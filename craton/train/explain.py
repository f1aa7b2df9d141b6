"""What helps a reader to judge a run: how well simple means do on the same text, and whether the model recites."""

import gzip
import lzma
import math
from typing import Any

import numpy as np

from craton.corpus.store import Corpus
from craton.engine.engine import Engine
from craton.engine.model import Model
from craton.engine.request import Sampling

_TEXT = 1 << 17  # tokens of held-out text that are compared
_COUNTED = 4 << 20  # training tokens that frequencies are counted on
_PASSAGES, _LENGTH = 16, 32  # of a prompt, and of what is to follow


def references(corpora: list[Corpus]) -> dict[str, Any]:
    """Bits per byte of the held-out text by gzip -9, by xz, and by a model that knows only how frequent each token is
    in the training text (add-one smoothed); {} where nothing is held out."""
    held = [_tokens(c, "heldout", _TEXT // len(corpora)) for c in corpora]
    tokenizer = corpora[0].tokenizer
    texts = [tokenizer.decode(ids.tolist()).encode() for ids in held if len(ids)]
    size = sum(map(len, texts))
    if not size:
        return {}
    text = b"\n".join(texts)
    counts = np.ones(tokenizer.vocab_size)
    for corpus in corpora:
        counts += np.bincount(_tokens(corpus, "train", _COUNTED // len(corpora)), minlength=len(counts))
    bits = -np.log2(counts / counts.sum())
    unigram = sum(float(bits[ids].sum()) for ids in held) / size
    packed = {"gzip": len(gzip.compress(text, 9)), "xz": len(lzma.compress(text))}
    return {**{name: 8 * n / size for name, n in packed.items()}, "unigram": unigram, "bytes": size}


def _tokens(corpus: Corpus, split: str, most: int) -> np.ndarray:
    return corpus.read(split, 0, min(most, corpus.length(split)))


def recitation(model: Model, corpora: list[Corpus]) -> dict[str, Any]:
    """How many passages of the training text the model continues word for word, beside passages that it has not seen:
    what it knows by heart (arXiv 2012.07805, 2202.07646)."""
    engine: Engine = model.engine
    length = min(_LENGTH, engine.context // 2)
    out: dict[str, Any] = {"prompt": length, "tokens": length}
    for split in ("train", "heldout"):
        passages = _passages(corpora, split, 2 * length)
        if not passages:
            continue
        answers = engine.generate([p[:length] for p in passages], Sampling(length, 0.0))
        same = [a[0].token_ids == p[length:] for a, p in zip(answers, passages, strict=True)]
        out[split] = {"passages": len(passages), "recited": sum(same)}
    return out


def _passages(corpora: list[Corpus], split: str, length: int) -> list[list[int]]:
    """Of so many tokens, evenly spread over a split, each within one document."""
    found = []
    for corpus in corpora:
        rows = corpus.rows(split)
        rows = rows[rows["tokens"] > length + 1]
        if not len(rows):
            continue
        wanted = -(-_PASSAGES // len(corpora))
        for i in range(wanted):
            row = rows[i * len(rows) // wanted]
            room = int(row["tokens"]) - length
            at = int(row["start"]) + 1 + (i * 7919) % room
            found.append(corpus.read(split, at, length).tolist())
    return [list(p) for p in {tuple(p): None for p in found}][:_PASSAGES]


# Chinchilla's fit (arXiv 2203.15556, approach 3): loss falls with compute to the power alpha beta / (alpha + beta), for
# a model and a text that grow together, towards what no model can guess. The floor is its entropy of web text, 1.69
# nats a token of about 4.3 bytes.
_EXPONENT, _FLOOR = 0.34 * 0.28 / (0.34 + 0.28), 1.69 / math.log(2) / 4.3


def forecast(bits: float, times: float = 10.0) -> float:
    """Bits per byte to expect of so many times the compute. A rule of thumb, not a measurement."""
    return _FLOOR + (bits - _FLOOR) * times**-_EXPONENT if bits > _FLOOR else bits
