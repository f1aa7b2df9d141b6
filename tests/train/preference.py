"""A job in one file: preferences over pairs of answers. Shown in docs/extending.md; run by test_jobs.py.

Of each pair the first answer is preferred. The objective is the logistic loss of the difference between their
log-probabilities (arXiv 2305.18290 without a reference): it needs both rows of a pair at once, and weights that follow
from the log-probabilities themselves.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.model.config import ModelConfig
from craton.model.nll import IGNORE
from craton.train.job import Cost, Job, Looked, Losses
from craton.train.pretrain import ModelFolder, kind

CONFIG = ModelConfig(64, 32, 64, 1, 2, 1, 16, max_position_embeddings=32)
LENGTH = 8


@dataclass
class Pairs:
    """ids, target: (rows, LENGTH), two rows a pair, the preferred first."""

    ids: Tensor
    target: Tensor


class PairSource:
    """Of two numbers the larger, beside the smaller; or, as a control, either of them preferred at random."""

    rows, together = 16, 2

    def __init__(self, honest: bool = True):
        self.honest = honest

    def batch(self, number: int, share: int, shares: int, network: nn.Module) -> Pairs:
        pairs = [self.pair(number * 8 + i) for i in range(share, self.rows // 2, shares)]
        rows = torch.tensor([row for pair in pairs for row in pair])
        target = rows[:, 1:].clone()
        target[:, :3] = IGNORE  # the question
        return Pairs(rows[:, :-1].contiguous(), target)

    def pair(self, number: int) -> list[list[int]]:
        r = torch.Generator().manual_seed(number)
        a, b = torch.randperm(16, generator=r)[:2].tolist()
        answers = [max(a, b), min(a, b)]
        if not self.honest and number % 2:
            answers.reverse()
        return [[1, 16 + a, 16 + b, 2, 32 + x, 3, 3, 3, 3] for x in answers]

    def facts(self) -> dict[str, Any]:
        return {"pairs": "the larger number"}


def prefer(network: Any, batch: Pairs) -> Losses:
    """-log sigmoid of how much likelier the preferred answer is, in nats, summed over pairs."""
    logp = -network.token_nll(batch.ids, batch.target).sum(-1).view(-1, 2)
    margin = logp[:, 0] - logp[:, 1]
    pairs = torch.tensor(float(len(margin)))
    return Losses(-F.logsigmoid(margin).sum(), pairs, {"accuracy": ((margin > 0).float().sum(), pairs)})


def look(network: Any, processes: Any) -> Looked:
    """Accuracy on pairs that no batch has."""
    with torch.no_grad():
        losses = prefer(network, PairSource().batch(10_000, 0, 1, network))
    right, pairs = losses.sums["accuracy"]
    return Looked({"heldout_accuracy": float(right / pairs)})


def preference_job(seed: int = 0, honest: bool = True) -> Job:
    cost = Cost("tokens", LENGTH, 6.0 * CONFIG.matrix_parameters * LENGTH, 6.0 * CONFIG.matrix_parameters * LENGTH)
    return Job("preference", PairSource(honest), prefer, ModelFolder(CONFIG, seed), cost, kind, look)
