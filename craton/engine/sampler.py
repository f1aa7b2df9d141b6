"""From logits to tokens and their log-probabilities. Every answer has its own random numbers, so that neighbours do not
matter."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from craton.engine.request import Sampling, TokenLogprob
from craton.model import ops


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


def draw_each(logits: Tensor, samplings: Sequence[Sampling], u: Sequence[float]) -> list[int]:
    """A token for each row of logits (rows, vocabulary); see ops.choose_tokens. u: numbers in [0, 1)."""
    if not any(s.temperature for s in samplings):
        return ops.choose_tokens(logits, *_likeliest(len(samplings), logits.device)).tolist()
    filters = [(s.temperature, s.top_k, s.top_p, s.min_p) for s in samplings]
    return ops.choose_tokens(logits, *_columns(filters, u, logits.device)).tolist()


def _columns(filters: list[tuple[float, int, float, float]], u: Sequence[float], device: Any) -> tuple[Tensor, ...]:
    rows = torch.tensor([*zip(*filters, strict=True), u], dtype=torch.float64).to(device)
    temperature, top_k, top_p, min_p, numbers = rows
    return temperature.float(), top_k.long(), top_p, min_p, numbers


@lru_cache(64)
def _likeliest(rows: int, device: Any) -> tuple[Tensor, ...]:
    """The columns of so many rows that take the likeliest token: the same in step after step."""
    return _columns([(0.0, 0, 1.0, 0.0)] * rows, [0.0] * rows, device)


def token_logprobs(logits: Tensor, tokens: list[int], top: int) -> list[TokenLogprob]:
    """logits (positions, vocabulary), the token chosen at each -> their log-probabilities and the `top` likeliest."""
    logp = torch.log_softmax(logits.float(), -1)
    chosen = logp.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    if not top:
        return [TokenLogprob(t, c) for t, c in zip(tokens, chosen, strict=True)]
    values, ids = logp.topk(min(top, logp.shape[-1]))
    rows = zip(tokens, chosen, ids.tolist(), values.tolist(), strict=True)
    return [TokenLogprob(t, c, tuple(zip(i, v, strict=True))) for t, c, i, v in rows]
