"""A calculator within answers, in the marks that GSM8K has: the model writes <<48/2= and gets 24>> (arXiv 2110.14168).

What it is given is part of the answer and is not learned. Nothing but arithmetic on numbers can be asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from craton.engine.engine import Engine
from craton.engine.request import Completion, Sampling, TokenLogprob
from craton.text.arithmetic import shown, value_of
from craton.text.tokenizer import Tokenizer

OPEN, ASK, CLOSE = "<<", "=", ">>"
_TURNS = 8  # sums in an answer
_EXPRESSION = 40  # tokens of one


@dataclass
class Written:
    """An answer: its tokens, by which log-probabilities they were chosen, and which the model chose itself. The end is
    its own choice too."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    text: str = ""
    finish: str = ""

    def add(self, completion: Completion) -> None:
        """What the model went on with."""
        self.ids += completion.token_ids
        self.logprobs += [x.logprob for x in completion.logprobs]
        self.own += [True] * len(completion.token_ids)
        self.finish = completion.finish_reason or ""

    def end(self, token: TokenLogprob | None) -> None:
        """The token that ends it, which is no part of its text."""
        if token is not None:
            self.ids.append(token.token)
            self.logprobs.append(token.logprob)
            self.own.append(True)

    def give(self, ids: list[int]) -> None:
        """What the calculator says."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.own += [False] * len(ids)


def write(engine: Engine, prompts: Sequence[list[int]], samplings: Sequence[Sampling]) -> list[list[Written]]:
    """Answers to each prompt, as many as its sampling says."""
    out = []
    for completions in engine.generate(prompts, samplings):
        answers = []
        for completion in completions:
            answer = Written(text=completion.text)
            answer.add(completion)
            answer.end(completion.end_token)
            answers.append(answer)
        out.append(answers)
    return out


def write_with_calculator(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[list[int]], samplings: Sequence[Sampling]
) -> list[list[Written]]:
    """The same, where sums that are asked for are answered."""
    answers = [[Written() for _ in range(s.n)] for s in samplings]
    first = [replace(s, stop=(*s.stop, OPEN)) for s in samplings]
    begun = engine.generate(prompts, first)
    open_: list[tuple[int, Written, Completion, bool]] = []  # prompt, answer, how it went on, and whether inside a sum
    for i, completions in enumerate(begun):
        open_ += [(i, a, c, False) for a, c in zip(answers[i], completions, strict=True)]
    for turn in range(2 * _TURNS):
        further: list[tuple[int, Written, bool]] = []
        for i, answer, completion, was in open_:
            inside = _goes_on(answer, completion, was, tokenizer)
            if inside is not None and len(answer.ids) < samplings[i].max_tokens:
                further.append((i, answer, inside))
        if not further:
            break
        asked = [[*prompts[i], *answer.ids] for i, answer, _ in further]
        how = [_further(samplings[i], answer, inside, turn, k) for k, (i, answer, inside) in enumerate(further)]
        found = engine.generate(asked, how)
        open_ = [(i, answer, c, inside) for (i, answer, inside), (c,) in zip(further, found, strict=True)]
    for i, s in enumerate(samplings):
        for answer in answers[i]:
            answer.text = _cut(tokenizer.decode(answer.ids), s.stop)
    return answers


def _goes_on(answer: Written, completion: Completion, inside: bool, tokenizer: Tokenizer) -> bool | None:
    """Take up what was written; whether it goes on inside a sum, or None if it is whole."""
    answer.add(completion)
    if not inside and completion.stop_reason == OPEN:
        return True
    if inside and completion.stop_reason == ASK:
        said = tokenizer.decode(answer.ids)
        value = value_of(said[said.rfind(OPEN) + len(OPEN) : -len(ASK)]) if said.endswith(ASK) else None
        if value is not None:
            answer.give(tokenizer.encode_rendered(shown(value) + CLOSE))
        return False
    if inside and completion.finish_reason == "stop" and completion.end_token is None:
        return False  # the sum was left, as by a line's end
    answer.end(completion.end_token)
    return None


def _further(s: Sampling, answer: Written, inside: bool, turn: int, number: int) -> Sampling:
    left = s.max_tokens - len(answer.ids)
    seed = None if s.seed is None else s.seed * 1_000_003 + turn * 10_007 + number + 1
    if inside:
        return replace(s, n=1, seed=seed, stop=(ASK, CLOSE, "\n"), max_tokens=min(left, _EXPRESSION))
    return replace(s, n=1, seed=seed, stop=(*s.stop, OPEN), max_tokens=left)


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """Up to the first stop text."""
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
