"""Objectives for the one loop: from a network and a batch of rows to losses, by the pure functions of objectives.py."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from craton.adapt import objectives
from craton.adapt.rows import Answers
from craton.corpus.batches import Batch
from craton.train.job import Losses

_SLICE = 256  # positions whose logits exist at once


def fine_tuning(network: Any, batch: Batch) -> Losses:
    """Cross-entropy of what is learned, in nats."""
    total, _ = network.weighted_nll(batch.ids, batch.target, batch.weight, batch.document_start)
    return Losses(total, batch.weight.sum())


def answer_log_probabilities(network: Any, b: Answers) -> Tensor:
    """(rows,): of all that is learned of an answer."""
    return -(network.token_nll(b.ids, b.target) * b.weight).sum(-1)


@dataclass(frozen=True)
class Preference:
    """Pairs, a better row before a worse one. kind: dpo, ipo, orpo or simpo."""

    kind: str
    beta: float
    gamma: float = 0.0

    def __call__(self, network: Any, b: Answers) -> Losses:
        logp, size = answer_log_probabilities(network, b), b.weight.sum(-1)
        mean, pairs = logp / size, torch.tensor(len(logp) // 2)
        own, counted = logp, pairs
        if self.kind == "dpo":
            assert b.reference is not None
            loss = objectives.dpo(*_split(logp), *_split(b.reference), self.beta).sum()
            own = logp - b.reference
        elif self.kind == "ipo":
            assert b.reference is not None
            loss = objectives.ipo(*_split(mean), *_split(b.reference / size), self.beta).sum()
            own = logp - b.reference
        elif self.kind == "simpo":
            loss, own = objectives.simpo(*_split(mean), self.beta, self.gamma).sum(), mean
        else:  # orpo: the better answers' loss is over their tokens, the odds over pairs
            better, _ = _split(logp)
            ratio = objectives.odds_ratio(*_split(mean))
            loss = (-better * pairs / _split(size)[0].sum()).sum() + self.beta * ratio.sum()
            own = mean
        better, worse = _split(self.beta * own.detach())
        sums = {
            "preferred": ((better > worse).float().sum(), pairs),  # pairs that the model now ranks as they are
            "margin": ((better - worse).sum(), pairs),
            "better_logp": (_split(logp.detach())[0].sum(), pairs),
        }
        return Losses(loss, counted, sums)


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[0::2], rows[1::2]


@dataclass(frozen=True)
class Labelled:
    """Groups of answers, followed by as many that belong to other prompts, which tell how far the model has moved."""

    beta: float
    together: int

    def __call__(self, network: Any, b: Answers) -> Losses:
        assert b.reference is not None and b.good is not None
        half = self.together // 2
        ratio = (answer_log_probabilities(network, b) - b.reference).view(-1, 2, half)
        own, others = ratio[:, 0], ratio[:, 1].detach()
        kl = others.mean(-1, keepdim=True).clamp(min=0)
        good = b.good.view(-1, half)
        loss, count = objectives.kto(own, good, kl, self.beta), torch.tensor(float(good.numel()))
        told = ((own.detach() > kl) == good).float().sum()
        return Losses(loss.sum(), count, {"preferred": (told, count), "kl": (kl.sum() * half, count)})


def reward_model(network: Any, b: Answers) -> Losses:
    """Pairs, a better row before a worse one; rewards are read at the end of each."""
    better, worse = _split(network(b.ids, b.size))
    pairs = torch.tensor(len(better))
    sums = {"preferred": ((better > worse).float().sum(), pairs), "margin": ((better - worse).detach().sum(), pairs)}
    return Losses(objectives.bradley_terry(better, worse).sum(), pairs, sums)


@dataclass(frozen=True)
class PolicyGradient:
    """Answers that the network itself gave, weighed by how good they were. kind: grpo, dr_grpo, dapo, gspo, or expert,
    which learns the good ones like any other text. most: tokens of an answer."""

    kind: str
    low: float
    high: float
    beta: float
    most: int

    def __call__(self, network: Any, b: Answers) -> Losses:
        assert b.advantage is not None and b.sampled is not None
        logp = -network.token_nll(b.ids, b.target)
        rows, advantage = torch.tensor(float(len(logp))), b.advantage[:, None]
        log_ratio = (logp - b.sampled) * b.weight
        if self.kind == "expert":
            each, weight = -logp * advantage, b.weight
            count = (b.weight * advantage).sum()
        else:
            used = objectives.sequence_log_ratio(log_ratio, b.weight) if self.kind == "gspo" else log_ratio
            each = objectives.clipped(used, advantage, self.low, self.high).expand_as(logp)
            weight, count = self._weights(b, rows)
        if self.beta and b.reference is not None:
            each = each + self.beta * objectives.kl_estimate(logp, b.reference)
        tokens = b.weight.sum()
        gone = log_ratio.detach().abs().amax()
        sums = {
            "entropy": (-(b.sampled * b.weight).sum(), tokens),  # an estimate: of the tokens that were chosen
            "ratio": (gone.exp() * rows, rows),
            "answer_tokens": (tokens, rows),
        }
        if b.reference is not None:
            kl = objectives.kl_estimate(logp.detach(), b.reference)
            sums["kl"] = ((kl * b.weight).sum(), tokens)
        return Losses((each * weight).sum(), count, sums)

    def _weights(self, b: Answers, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind in ("grpo", "gspo"):
            return objectives.per_answer(b.weight), rows
        if self.kind == "dr_grpo":  # a constant, so that long answers are not made light of
            return b.weight, rows * self.most
        return b.weight, b.weight.sum()


@dataclass(frozen=True)
class Distillation:
    """What the teacher thinks of each token that is learned. kind: "forward", of given texts, or "reverse", of the
    student's own."""

    kind: str
    teacher: Any

    def __call__(self, network: Any, b: Answers | Batch) -> Losses:
        start = getattr(b, "document_start", None)
        places = b.weight.flatten() > 0
        with torch.no_grad():
            taught = self.teacher.model(b.ids, start).flatten(0, 1)[places]
        hidden = network.model(b.ids, start).flatten(0, 1)[places]
        total = hidden.sum() * 0.0
        for part in torch.arange(len(hidden)).split(_SLICE):
            total = total + checkpoint(self._divergence, hidden[part], taught[part], network, use_reentrant=False)
        return Losses(total, torch.tensor(float(len(hidden))))

    def _divergence(self, hidden: Tensor, taught: Tensor, network: Any) -> Tensor:
        student = torch.log_softmax(network.head(hidden).float(), -1)
        with torch.no_grad():
            teacher = torch.log_softmax(self.teacher.head(taught).float(), -1)
        return objectives.DIVERGENCES[self.kind](student, teacher).sum()
