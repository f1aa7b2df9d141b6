"""The next token of every answer of a step, at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from craton.base import UserError
from craton.engine.answer import Answer
from craton.engine.request import TokenLogprob
from craton.engine.sampler import adjusted, draw_each, token_logprobs, uniform


def draw(scores: Tensor | Sequence[Tensor], answers: Sequence[Answer]) -> list[int]:
    """A token for each answer from its scores (vocabulary,), by its own filters and random number."""
    if not answers:
        return []
    rows = scores if isinstance(scores, Tensor) else torch.stack(list(scores))
    drawn = (
        uniform(a.seed, a.completion.index, len(a.generation.tokens)) if a.sampling.temperature else 0.0
        for a in answers
    )
    u = list(drawn)
    return draw_each(rows, [a.sampling for a in answers], u)


@dataclass
class Choice:
    """What became of one row. token None: the answer ends without one. finish: why it ends here, None: it does not."""

    token: int | None
    finish: str | None = None


def choose(answers: list[Answer], logits: Tensor, end_ids: tuple[int, ...]) -> list[Choice]:
    """The next token of each answer from its row of logits (answers, vocabulary), appended to it. End tokens, which
    end_ids and the requests name, are no part of an answer."""
    changed = {
        i: _allowed(a, logits[i], end_ids)
        for i, a in enumerate(answers)
        if a.sampling.adjusts or a.generation.answered < a.sampling.min_tokens
    }

    def scores(which: list[int]) -> Tensor | list[Tensor]:
        if not changed and len(which) == len(answers):
            return logits
        return [changed[i] if i in changed else logits[i] for i in which]

    free = [i for i, a in enumerate(answers) if a.matcher is None or a.thinking or _may_begin_thinking(a)]
    tokens = dict(zip(free, draw(scores(free), [answers[i] for i in free]), strict=True))
    for i in free:
        reasoning = answers[i].sampling.reasoning
        if reasoning is not None and _may_begin_thinking(answers[i]) and tokens[i] == reasoning.begin:
            answers[i].thinking = True
    bound = [i for i, a in enumerate(answers) if a.matcher is not None and not a.thinking]
    chosen = dict(zip(bound, _within_grammars([answers[i] for i in bound], scores(bound)), strict=True))
    out = []
    for i, answer in enumerate(answers):
        thinking, complete = answer.thinking, False
        if i in chosen:
            token, complete = chosen[i]
        else:
            token = answer.think(tokens[i]) if thinking else tokens[i]
        if token is None:
            out.append(Choice(None, "error"))
        else:
            answer.completion.reasoning_tokens += thinking
            scored = partial(_scored, logits[i : i + 1], token)
            out.append(append(answer, token, complete, scored, end_ids))
    return out


def _scored(logits: Tensor, token: int, top: int) -> TokenLogprob:
    return token_logprobs(logits, [token], top)[0]


def runs_ahead(answer: Answer) -> bool:
    """Whether nothing but its own logits decides an answer's tokens, so that a device can go on by itself."""
    s = answer.sampling
    free = answer.matcher is None and s.reasoning is None and answer.collector is None and not s.adjusts
    return free and not s.logprobs and answer.generation.answered >= s.min_tokens


def _may_begin_thinking(answer: Answer) -> bool:
    reasoning = answer.sampling.reasoning
    return reasoning is not None and reasoning.begin is not None and not answer.generation.answered


def _allowed(answer: Answer, logits: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    """logits (vocabulary,) after bias and penalties, without ends before min_tokens."""
    s, g = answer.sampling, answer.generation
    scores = adjusted(logits, s, g.tokens[: g.prompt], g.tokens[g.prompt :]) if s.adjusts else logits
    if g.answered < s.min_tokens:
        ends = [*(() if s.ignore_eos else end_ids), *s.stop_token_ids]
        scores = scores.index_fill(0, torch.tensor(ends, dtype=torch.long, device=scores.device), -torch.inf)
    return scores


def _within_grammars(answers: list[Answer], scores: Tensor | list[Tensor]) -> list[tuple[int | None, bool]]:
    """For each answer a token that its grammar goes on with, and whether the answer is complete with it. None: it goes
    on nowhere, and the answer says why."""
    out: list[tuple[int | None, bool]] = [(None, False)] * len(answers)
    masked: dict[int, Tensor] = {}
    for i, answer in enumerate(answers):
        assert answer.matcher is not None
        try:
            masked[i] = answer.matcher.mask(scores[i], answer.generation.max_new - answer.generation.answered)
        except UserError as error:  # this answer fails, not its neighbours
            answer.completion.stop_reason = str(error)
    tokens = draw(list(masked.values()), [answers[i] for i in masked])
    for (i, allowed), token in zip(masked.items(), tokens, strict=True):
        out[i] = _accepted(answers[i], allowed, token)
    return out


def _accepted(answer: Answer, scores: Tensor, token: int) -> tuple[int | None, bool]:
    """The drawn token, or another one where the grammar refuses it after all."""
    matcher = answer.matcher
    assert matcher is not None
    while not matcher.accepts(token):
        scores = scores.index_fill(0, torch.tensor([token], device=scores.device), -torch.inf)
        if bool((scores > -torch.inf).any()):
            token = draw([scores], [answer])[0]
        elif (spelled := matcher.spelled()) is not None:
            token = spelled
            break
        else:
            answer.completion.stop_reason = "the grammar allows no token here"
            return None, False
    return matcher.take(token, answer.generation.max_new - answer.generation.answered - 1)


def append(
    answer: Answer, token: int, complete: bool, scored: Callable[[int], TokenLogprob], end_ids: tuple[int, ...]
) -> Choice:
    """Put a token to its answer, unless it ends it. scored: its log-probability, with as many of the likeliest."""
    s, g, completion = answer.sampling, answer.generation, answer.completion
    ends = () if s.ignore_eos else end_ids
    if (token in ends or token in s.stop_token_ids) and g.answered >= s.min_tokens:
        completion.stop_reason = token if token in s.stop_token_ids else None
        completion.end_token = TokenLogprob(token, 0.0) if s.logprobs is None else scored(0)
        return Choice(None, "stop")
    if s.logprobs is not None:
        completion.logprobs.append(scored(s.logprobs))
    completion.token_ids.append(token)
    g.tokens.append(token)
    if complete:
        return Choice(token, "stop")
    return Choice(token, "length" if g.answered >= g.max_new else None)
