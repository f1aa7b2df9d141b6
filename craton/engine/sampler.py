"""From logits to a token. Every answer has its own random numbers, so that neighbours do not matter."""

import math

import torch
from torch import Tensor

from craton.engine.request import Sampling, TokenLogprob

_FEW = 1024  # candidates that are tried before all of the vocabulary is sorted


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on these three alone: splitmix64 (doi 10.1145/2660193.2660195)."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + position * 0x8CB92BA72F3D8DD7) & 0xFFFFFFFFFFFFFFFF
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27), (1, 31)):
        z = ((z ^ (z >> shift)) * multiplier + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    return (z >> 11) * 2.0**-53


def adjusted(logits: Tensor, sampling: Sampling, prompt: list[int], answer: list[int]) -> Tensor:
    """logits (vocabulary,) after bias and penalties; the same tensor where there are none."""
    s = sampling
    if not s.adjusts:
        return logits
    logits = logits.clone()
    if s.logit_bias:
        logits[torch.tensor(list(s.logit_bias))] += torch.tensor(list(s.logit_bias.values()), dtype=logits.dtype)
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *answer}))
        picked = logits[seen]
        logits[seen] = torch.where(picked > 0, picked / s.repetition_penalty, picked * s.repetition_penalty)
    if answer and (s.frequency_penalty or s.presence_penalty):
        ids, counts = torch.tensor(answer).unique(return_counts=True)
        logits[ids] -= counts * s.frequency_penalty + s.presence_penalty
    return logits


def draw(logits: Tensor, sampling: Sampling, u: float) -> int:
    """A token from logits (vocabulary,) by the number u in [0, 1): the first, in the order of the ids, at which the
    cumulative probability exceeds u. Near distributions give mostly the same token for the same u, which is what makes
    a draft model's guesses agree with the model's choice."""
    s = sampling
    if s.temperature == 0:
        return int(logits.argmax())
    logits = logits.double() / s.temperature
    if s.top_k or s.top_p < 1 or s.min_p:
        logits = _filtered(logits, s)
    p = torch.softmax(logits, -1)
    return min(int(torch.searchsorted(p.cumsum(0), u, right=True)), int(p.nonzero()[-1]))


def _filtered(logits: Tensor, s: Sampling) -> Tensor:
    """Logits with those set to -inf that top_k, top_p and min_p leave out. Ties are kept in the order of the ids."""
    size = logits.shape[0]
    keep = min(s.top_k or size, size)
    total = torch.logsumexp(logits, 0)
    for few in (min(keep, _FEW), keep):
        values, ids = logits.topk(few) if few < size else logits.sort(descending=True, stable=True)
        if few == keep:
            if s.top_k:
                total = torch.logsumexp(values, 0)
            break
        if not s.top_k and s.top_p < 1 and float((values - total).exp().sum()) >= s.top_p:
            break
        if s.top_p == 1 and s.min_p and float(values[-1] - values[0]) < math.log(s.min_p):
            break
    p = (values - total).exp()
    kept = torch.ones_like(p, dtype=torch.bool)
    if s.top_p < 1:
        kept &= (p.cumsum(0) - p) < s.top_p
    if s.min_p:
        kept &= p >= s.min_p * p[0]
    kept[0] = True
    out = torch.full_like(logits, -math.inf)
    out[ids[kept]] = values[kept]
    return out


def token_logprobs(logits: Tensor, tokens: list[int], top: int) -> list[TokenLogprob]:
    """logits (positions, vocabulary), the token chosen at each -> their log-probabilities and the `top` likeliest."""
    logp = torch.log_softmax(logits.float(), -1)
    chosen = logp.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    if not top:
        return [TokenLogprob(t, c) for t, c in zip(tokens, chosen, strict=True)]
    values, ids = logp.topk(min(top, logp.shape[-1]))
    rows = zip(tokens, chosen, ids.tolist(), values.tolist(), strict=True)
    return [TokenLogprob(t, c, tuple(zip(i, v, strict=True))) for t, c, i, v in rows]
