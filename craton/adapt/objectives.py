"""What is made small when a model is adapted: pure functions of log-probabilities.

Log-probabilities are in nats: of tokens (rows, time), or summed over an answer's tokens (rows,). Each returns a loss a
pair, a row or a token, which the caller adds up. Rewards that a preference implies are beta times log-ratios.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- preferences: better, worse (pairs,), and the same by the reference --------------------------------------------


def dpo(better: Tensor, worse: Tensor, reference_better: Tensor, reference_worse: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290, equation 7)."""
    return -F.logsigmoid(beta * ((better - reference_better) - (worse - reference_worse)))


def ipo(better: Tensor, worse: Tensor, reference_better: Tensor, reference_worse: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation (arXiv 2310.12036, equation 17). All are means over an answer's tokens, as its
    authors run it."""
    return ((better - reference_better) - (worse - reference_worse) - 1 / (2 * beta)).square()


def simpo(better: Tensor, worse: Tensor, beta: float, gamma: float) -> Tensor:
    """Without a reference (arXiv 2405.14734, equation 6): means over an answer's tokens, a margin of gamma."""
    return -F.logsigmoid(beta * (better - worse) - gamma)


def odds_ratio(better: Tensor, worse: Tensor) -> Tensor:
    """ORPO's second part (arXiv 2403.07691, equation 7), of means over an answer's tokens. The first is the loss of the
    better answer itself."""

    def log_odds(mean: Tensor) -> Tensor:
        return mean - _log1mexp(mean)

    return -F.logsigmoid(log_odds(better) - log_odds(worse))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x below 0, without loss of digits at either end (Machler 2012)."""
    x = x.clamp(max=-1e-7)
    near = x > -math.log(2)
    safe_near, safe_far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(safe_near)), torch.log1p(-torch.exp(safe_far)))


def kto(ratio: Tensor, good: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Kahneman-Tversky optimisation (arXiv 2402.01306, equation 8). ratio: log-ratio of an answer; good: whether it is
    one; kl: how far the model is from the reference by now, a scalar without a gradient."""
    return 1 - torch.sigmoid(beta * torch.where(good, ratio - kl, kl - ratio))


def bradley_terry(better: Tensor, worse: Tensor) -> Tensor:
    """A reward model's loss (Bradley and Terry 1952) of the two answers' rewards."""
    return -F.logsigmoid(better - worse)


# ---- policy gradients: token log-probabilities (rows, time) --------------------------------------------------------


def clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's loss of each token (arXiv 1707.06347, equation 7), with bounds that may differ (DAPO, arXiv 2503.14476)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def sequence_log_ratio(log_ratio: Tensor, weight: Tensor) -> Tensor:
    """GSPO (arXiv 2507.18071, equation 7): the mean over an answer's tokens, for all of them: (rows, 1)."""
    return (log_ratio * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1.0)


def kl_estimate(logp: Tensor, reference: Tensor) -> Tensor:
    """Of the divergence from the reference, at each token: never negative, unbiased (Schulman 2020, k3)."""
    difference = reference - logp
    return difference.exp() - difference - 1


# How tokens' losses are weighted within an answer, by name; the sum is divided by what `counted` gives.
def per_answer(weight: Tensor) -> Tensor:
    """Each answer counts alike, its tokens by its length (GRPO, arXiv 2402.03300, equation 3)."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=1.0)


def advantages(rewards: Tensor, scaled: bool) -> Tensor:
    """Of a group's answers (groups, answers): reward less the group's mean. scaled: over its standard deviation too, as
    GRPO has it; without, hard and easy groups count as they should (Dr. GRPO, arXiv 2503.20783)."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-4) if scaled else centred


# ---- distillation: log-probabilities of all tokens (rows, vocabulary) ----------------------------------------------


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """(rows,): the student covers what the teacher would say (arXiv 1503.02531)."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """(rows,): the student says nothing that the teacher would not (arXiv 2306.08543)."""
    return (student.exp() * (student - teacher)).sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward": forward_kl, "reverse": reverse_kl}
