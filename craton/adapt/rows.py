"""Samples as batches of tokens: packed side by side for plain losses, a row an answer where answers are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from craton.adapt.data import Messages, Sample
from craton.base import UserError
from craton.corpus.batches import Batch
from craton.model.nll import IGNORE
from craton.text import spans
from craton.text.dialogue import Dialogue
from craton.text.tokenizer import Tokenizer

_OPEN = 64  # rows that are filled at the same time
_AT_ONCE = 4096  # tokens that are looked at in one forward pass
_MULTIPLE = 32  # tokens that rows are rounded up to


@dataclass(frozen=True)
class Tokens:
    """A text in tokens, and which of them are learned."""

    ids: np.ndarray  # int32
    learned: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.ids)


class Renderer:
    """Samples to tokens, along the same path as a conversation with the model takes. end: the token that ends an answer
    which goes through no template."""

    def __init__(self, tokenizer: Tokenizer, dialogue: Dialogue | None, end: int, context: int):
        self.tokenizer, self.dialogue, self.end, self.context = tokenizer, dialogue, end, context

    def answer(self, sample: Sample, said: Any, name: str) -> Tokens:
        """A sample's prompt with one of its answers. UserError names row and field where that cannot be learned."""
        try:
            made = self._chat(sample, said) if sample.chats else self._plain(str(sample.prompt), str(said))
        except UserError as error:
            raise UserError(f"{sample.where}: {name}: {error}", field=error.field or name) from None
        if not any(made.learned):
            raise UserError(f"{sample.where}: {name} has no token that is learned; it is empty", field=name)
        if len(made.ids) - 1 > self.context:
            problem = f"{len(made.ids)} tokens, the model's context is {self.context}"
            raise UserError(f"{sample.where}: {name} has {problem}; shorten the row or leave it out", field=name)
        return Tokens(np.array(made.ids, np.int32), np.array(made.learned, bool))

    def _chat(self, sample: Sample, said: Messages) -> spans.Learned:
        if self.dialogue is None:
            raise UserError("the model has no chat template")
        assert isinstance(sample.prompt, list)
        if sample.prompt:  # only what is said to it is learned
            return spans.last_answer(self.dialogue, [*sample.prompt, *said], sample.tools)
        return spans.conversation(self.dialogue, said, sample.tools)

    def _plain(self, prompt: str, said: str) -> spans.Learned:
        whole = spans.tokens(self.tokenizer, prompt + said, [(len(prompt), len(prompt) + len(said))], add_special=True)
        return spans.Learned([*whole.ids, self.end], [*whole.learned, True])

    def prompt(self, sample: Sample) -> list[int]:
        """What the model is asked with."""
        if not sample.chats:
            return self.tokenizer.encode(str(sample.prompt))
        if self.dialogue is None:
            raise UserError(f"{sample.where}: the model has no chat template")
        assert isinstance(sample.prompt, list)
        text, _ = self.dialogue.render(sample.prompt, sample.tools)
        return self.tokenizer.encode_rendered(text)


def pack(lengths: Sequence[int], order: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of texts, in this order, in rows of `room` tokens: each goes where the least is left over, of some rows
    that are open. Every text is in one row, whole."""
    done: list[list[int]] = []
    rows: list[list[int]] = []
    left: list[int] = []
    for number in order:
        size = lengths[number]
        fitting = [i for i, free in enumerate(left) if free >= size]
        if fitting:
            best = min(fitting, key=left.__getitem__)
            rows[best].append(number)
            left[best] -= size
            continue
        if len(rows) == _OPEN:
            fullest = min(range(len(rows)), key=left.__getitem__)
            done.append(rows.pop(fullest))
            left.pop(fullest)
        rows.append([number])
        left.append(room - size)
    return done + rows


class Packed:
    """Rows of several texts each, which do not see each other; every epoch in an order of its own."""

    together = 1

    def __init__(self, texts: Sequence[Tokens], length: int, rows: int, seed: int):
        self.texts, self.length, self.rows, self.seed = texts, length, rows, seed
        self.sizes = [len(t) - 1 for t in texts]
        self.epoch = lru_cache(4)(self._epoch)
        self.begins = [0]  # the row that an epoch begins with

    def _epoch(self, number: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, number]).permutation(len(self.texts)).tolist()
        packed = pack(self.sizes, order, self.length)
        shuffled = np.random.default_rng([self.seed, number, 1]).permutation(len(packed))
        return [packed[i] for i in shuffled]

    def row(self, number: int) -> list[int]:
        """The texts of a row, counted from the first epoch on."""
        while self.begins[-1] <= number:
            self.begins.append(self.begins[-1] + len(self.epoch(len(self.begins) - 1)))
        epoch = int(np.searchsorted(self.begins, number, "right")) - 1
        return self.epoch(epoch)[number - self.begins[epoch]]

    def batch(self, number: int, share: int, shares: int, network: Any) -> Batch:
        """As craton.train.job.Source says."""
        wanted = range(number * self.rows, (number + 1) * self.rows)[share::shares]
        return packed_batch([[self.texts[i] for i in self.row(r)] for r in wanted], self.length)

    def facts(self) -> dict[str, Any]:
        """For the record."""
        learned = sum(int(t.learned[1:].sum()) for t in self.texts)
        facts = {"texts": len(self.texts), "tokens": sum(self.sizes), "learned_tokens": learned}
        return facts | {"length": self.length, "rows_an_epoch": len(self.epoch(0))}


def packed_batch(rows: list[list[Tokens]], length: int) -> Batch:
    """Texts side by side, each its own document; what is left over counts nothing."""
    ids = np.zeros((len(rows), length), np.int64)
    target, weight = np.full((len(rows), length), IGNORE), np.zeros((len(rows), length), np.float32)
    start = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    for r, texts in enumerate(rows):
        at = 0
        for text in texts:
            end = at + len(text) - 1
            ids[r, at:end], start[r, at:end] = text.ids[:-1], at
            learned = text.learned[1:]
            target[r, at:end], weight[r, at:end] = np.where(learned, text.ids[1:], IGNORE), learned
            at = end
    return Batch(*(torch.from_numpy(x) for x in (ids, target, weight, start)))


@dataclass
class Answers:
    """A row an answer, padded behind: ids, target (rows, time) int64, weight (rows, time) fp32. reference (rows,): its
    log-probability by the reference. good (rows,): whether it is one. advantage (rows,). sampled (rows, time):
    log-probabilities by which it was chosen. size (rows,): tokens that are no padding."""

    ids: Tensor
    target: Tensor
    weight: Tensor
    size: Tensor
    reference: Tensor | None = None
    good: Tensor | None = None
    advantage: Tensor | None = None
    sampled: Tensor | None = None


def answer_rows(texts: Sequence[Tokens], **more: Tensor | None) -> Answers:
    """Texts as rows."""
    longest = max(len(t) for t in texts) - 1
    batch = packed_batch([[t] for t in texts], -(-longest // _MULTIPLE) * _MULTIPLE)
    size = torch.tensor([len(t) - 1 for t in texts])
    return Answers(batch.ids, batch.target, batch.weight, size, **more)


class Compared:
    """Groups of rows that are compared with each other: pairs, or a batch of labelled answers. groups: the texts of
    each; reference: their log-probabilities, one a text."""

    def __init__(
        self,
        groups: Sequence[Sequence[Tokens]],
        reference: np.ndarray | None,
        rows: int,
        seed: int,
        good: Sequence[Sequence[bool]] | None = None,
    ):
        self.groups, self.reference, self.rows, self.seed, self.good = groups, reference, rows, seed, good
        self.together = len(groups[0])
        self.order = lru_cache(4)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))

    def chosen(self, number: int) -> int:
        """The group that comes at a place, counted from the first epoch on."""
        epoch, place = divmod(number, len(self.groups))
        return int(self.order(epoch)[place])

    def batch(self, number: int, share: int, shares: int, network: Any) -> Answers:
        """As craton.train.job.Source says."""
        each = self.rows // self.together
        picked = [self.chosen(i) for i in range(number * each, (number + 1) * each)[share::shares]]
        more: dict[str, Tensor] = {}
        if self.reference is not None:
            more["reference"] = torch.from_numpy(self.reference[picked].reshape(-1)).float()
        if self.good is not None:
            more["good"] = torch.tensor([self.good[i] for i in picked])
        return answer_rows([t for i in picked for t in self.groups[i]], **more)

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {"groups": len(self.groups), "tokens": sum(len(t) - 1 for g in self.groups for t in g)}


def log_probabilities(
    network: Any, texts: Sequence[Tokens], show: Callable[[int, int], None] = lambda done, of: None
) -> np.ndarray:
    """(texts,) fp64: the log-probability of what is learned of each, in nats."""
    out = np.zeros(len(texts))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    at = 0
    while at < len(order):
        size = max(1, _AT_ONCE // len(texts[order[min(len(order), at + 64) - 1]]))
        picked = order[at : at + min(size, 64)]
        rows = answer_rows([texts[i] for i in picked])
        with torch.no_grad():
            nll = network.token_nll(rows.ids, rows.target)
        out[picked] = -(nll * rows.weight).double().sum(-1).numpy()
        at += len(picked)
        show(at, len(order))
    return out
