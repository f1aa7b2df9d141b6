"""Corpora to training batches: a pure function of (corpora, weights, seed, batch number).

Nothing is drawn from a running generator, so any batch can be made again, on any number of processes, after any
interruption, and its documents can be named.

An epoch of a corpus is its documents in an order drawn from the seed, joined end to end and cut into rows of T + 1
tokens that overlap by one (input and target); rows are dealt out in a second random order, so that a long document
does not fill a batch. Only the tail of an epoch, under one row, is left out. Several corpora are interleaved row by
row in the exact proportion of their weights.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from craton.base import UserError
from craton.corpus.store import Corpus

PATTERN = 1 << 16  # rows over which the weights come out exactly


@dataclass
class Batch:
    """ids, target: (rows, time) int64. weight: (rows, time) fp32, 0 where no loss is taken. document_start: (rows,
    time) int32, the first position of each token's document, or None where documents are not kept apart."""

    ids: Tensor
    target: Tensor
    weight: Tensor
    document_start: Tensor | None


class _Stream:
    """One corpus as an endless sequence of rows of length + 1 tokens."""

    def __init__(self, corpus: Corpus, split: str, length: int, seed: int, shuffle: bool = True):
        self.corpus, self.split, self.length, self.seed, self.shuffle = corpus, split, length, seed, shuffle
        rows = corpus.rows(split)
        first = np.flatnonzero(rows["continued"] == 0) if len(rows) else np.empty(0, int)
        if len(first) and first[0] != 0:
            first = np.concatenate([[0], first])
        self.first = first  # document rows that start a document; its parts follow it
        self.start = rows["start"][first].astype(np.int64)
        end = np.append(self.start[1:], corpus.length(split))
        self.tokens = end - self.start
        self.per_epoch = (int(self.tokens.sum()) - 1) // length if len(first) else 0
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document order, where each begins in the epoch's stream, and row order."""
        if not self.shuffle:
            documents, rows = np.arange(len(self.first)), np.arange(self.per_epoch)
        else:
            random = np.random.default_rng([self.seed, epoch])
            documents, rows = random.permutation(len(self.first)), random.permutation(self.per_epoch)
        begins = np.concatenate([[0], np.cumsum(self.tokens[documents])])
        return documents, begins, rows

    def pieces(self, number: int) -> list[tuple[int, int, int]]:
        """Row `number` as (document, first token within it, tokens)."""
        epoch, place = divmod(number, self.per_epoch)
        documents, begins, rows = self.order(epoch)
        at, left = int(rows[place]) * self.length, self.length + 1
        i = int(np.searchsorted(begins, at, "right")) - 1
        out = []
        while left:
            take = min(left, int(begins[i + 1]) - at)
            if take:
                out.append((int(documents[i]), at - int(begins[i]), take))
            at, left, i = at + take, left - take, i + 1
        return out

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (length + 1,) and, for the first `length`, where their document begins in the row."""
        tokens, starts, at = np.empty(self.length + 1, np.int64), np.empty(self.length + 1, np.int32), 0
        for document, offset, take in self.pieces(number):
            tokens[at : at + take] = self.corpus.read(self.split, int(self.start[document]) + offset, take)
            starts[at : at + take] = at
            at += take
        return tokens, starts[:-1]


def _batch(rows: list[tuple[np.ndarray, np.ndarray]], document_mask: bool) -> Batch:
    """Rows as `_Stream.row` gives them, with a loss at every position."""
    tokens = torch.from_numpy(np.stack([t for t, _ in rows]))
    start = torch.from_numpy(np.stack([s for _, s in rows])) if document_mask else None
    ids, target = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(ids, target, torch.ones(ids.shape), start)


class Batches:
    """`batch(n)` for n = 0, 1, ...: `rows` rows of `length` tokens from weighted corpora."""

    def __init__(
        self, corpora: list[Corpus], weights: list[float], length: int, rows: int, seed: int, document_mask: bool
    ):
        self.streams = [_Stream(c, "train", length, seed * 1_000_003 + i) for i, c in enumerate(corpora)]
        for stream in self.streams:
            if not stream.per_epoch:
                raise UserError(
                    f"{stream.corpus.folder}: {stream.corpus.length('train')} training tokens, fewer than one row of "
                    f"{length}; give more text or a smaller data.sequence_length"
                )
        self.length, self.rows, self.together, self.document_mask = length, rows, 1, document_mask
        self.corpora, self.weights = corpora, weights
        # Sources of PATTERN consecutive rows: shares by largest remainder, placed at random.
        share = np.array(weights, float) / sum(weights) * PATTERN
        counts = np.floor(share).astype(int)
        counts[np.argsort(counts - share)[: PATTERN - counts.sum()]] += 1
        if (counts == 0).any():
            corpus, weight = corpora[int(counts.argmin())], weights[int(counts.argmin())]
            raise UserError(
                f"{corpus.folder}: weight {weight:g} of {sum(weights):g} is less than a row in {PATTERN}, so "
                "nothing of it would ever be read; raise it, or leave the corpus out",
                field="weight",
            )
        self.counts = counts
        self.pattern = np.random.default_rng([seed, 7]).permutation(np.repeat(np.arange(len(corpora)), counts))
        self.rank = np.empty(PATTERN, np.int64)  # of a place among those of its source
        for source in range(len(corpora)):
            places = np.flatnonzero(self.pattern == source)
            self.rank[places] = np.arange(len(places))

    def facts(self) -> dict[str, Any]:
        """Corpora and weights."""
        return {"corpora": [str(c.folder) for c in self.corpora], "weights": self.weights}

    def _place(self, row: int) -> tuple[_Stream, int]:
        """The stream of a global row and its number there."""
        block, i = divmod(row, PATTERN)
        source = int(self.pattern[i])
        return self.streams[source], block * int(self.counts[source]) + int(self.rank[i])

    def batch(self, number: int, share: int = 0, shares: int = 1, network: Any = None) -> Batch:
        """A share of the rows of a batch; the network plays no part."""
        mine = range(number * self.rows + share, (number + 1) * self.rows, shares)
        rows = [stream.row(n) for stream, n in map(self._place, mine)]
        return _batch(rows, self.document_mask)

    def documents(self, number: int) -> list[dict[str, Any]]:
        """The documents that batch `number` is made of."""
        out = []
        for i in range(self.rows):
            stream, n = self._place(number * self.rows + i)
            rows = stream.corpus.rows("train")
            for document, offset, take in stream.pieces(n):
                row = rows[stream.first[document]]
                digest = f"{row['digest'][0]:016x}{row['digest'][1]:016x}"
                facts = {"row": i, "corpus": str(stream.corpus.folder), "document": stream.corpus.name_of(row)}
                out.append({**facts, "digest": digest, "first_token": offset, "tokens": take})
        return out


@dataclass
class HeldoutRow:
    """A row of held-out text as a batch of one. names: what it is of; source: (time,) which of them each target is of;
    seen: (time,) how many tokens of its document, in this row, come before it."""

    batch: Batch
    names: list[str]
    source: np.ndarray
    seen: np.ndarray


def heldout_rows(corpora: list[Corpus], length: int, most_tokens: int, document_mask: bool) -> list[HeldoutRow]:
    """Fixed rows of the held-out documents, spread over the corpora; empty if nothing is held out."""
    out = []
    for corpus in corpora:
        stream = _Stream(corpus, "heldout", length, 0, shuffle=False)
        of_document = corpus.rows("heldout")["source"][stream.first] if len(stream.first) else np.empty(0, int)
        names = [s["name"] for s in corpus.manifest["sources"]]
        wanted = min(stream.per_epoch, max(1, most_tokens // length // len(corpora)))
        for n in range(wanted):
            row = n * stream.per_epoch // wanted
            batch = _batch([stream.row(row)], document_mask)
            pieces = stream.pieces(row)
            source = np.repeat([of_document[d] for d, _, _ in pieces], [take for _, _, take in pieces])
            seen = np.concatenate([np.arange(take) for _, _, take in pieces])
            out.append(HeldoutRow(batch, names, source[1:], seen[1:]))
    return out
