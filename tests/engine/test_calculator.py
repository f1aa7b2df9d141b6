"""Sums within answers: what is computed, what is given back, and what is learned of it."""

import numpy as np
import pytest
import torch

from craton.adapt.rollout import Asked, Group, Rollouts
from craton.engine.calculator import write, write_with_calculator
from craton.engine.engine import Engine
from craton.engine.model import load_model
from craton.engine.request import Sampling
from craton.tasks.task import Example
from craton.text.arithmetic import shown, value_of


@pytest.mark.parametrize(
    ("asked", "value"),
    [
        ("48/2", "24"), ("(3+4)*2.5", "17.5"), ("-7 % 4", "1"), ("1/3", "0.333333"), ("7//2", "3"), ("2**9", None),
        ("1/0", None), ("x+1", None), ("__import__('os')", None), ("9" * 30, None), ("", None), ("1+", None),
        ("True+1", None), ("(" * 190, None), ("0.1+0.2", "0.3"),
    ],
)  # fmt: skip
def test_sums(asked, value):
    found = value_of(asked)
    assert (None if found is None else shown(found)) == value


class Scripted:
    """An engine that says what it is told to, as far as its request lets it."""

    def __init__(self, tokenizer, script):
        self.engine, self.tokenizer, self.script = None, tokenizer, script
        self.asked = []

    def generate(self, prompts, samplings):
        from craton.engine.request import Completion, TokenLogprob

        out = []
        for prompt, s in zip(prompts, samplings, strict=True):
            self.asked.append(self.tokenizer.decode(list(prompt)))
            several = []
            for _ in range(s.n):
                said = self.script.pop(0)
                c = Completion(1, 0)
                c.token_ids = self.tokenizer.encode_rendered(said)[: s.max_tokens]
                c.logprobs = [TokenLogprob(t, -0.5) for t in c.token_ids]
                c.text, c.finish_reason = said, "stop"
                c.stop_reason = next((x for x in s.stop if said.endswith(x)), None)
                if c.stop_reason is None:
                    c.end_token = TokenLogprob(0, -0.1)
                several.append(c)
            out.append(several)
        return out


def test_the_calculator_is_asked_and_its_answers_are_not_learned(model_folder):
    tokenizer = load_model(str(model_folder)).tokenizer
    script = ["half is <<", "plain", "48/2=", " so <<", "24+1=", " that is 25"]
    engine = Scripted(tokenizer, script)
    prompt = tokenizer.encode("how many?")
    ((one, two),) = write_with_calculator(engine, tokenizer, [prompt], [Sampling(99, 1.0, n=2, seed=3, logprobs=0)])
    assert one.text == "half is <<48/2=24>> so <<24+1=25>> that is 25" and two.text == "plain"
    given = tokenizer.decode([t for t, own in zip(one.ids, one.own, strict=True) if not own])
    assert given == "24>>25>>" and all(two.own) and one.ids[-1] == 0
    assert len(one.ids) == len(one.own) == len(one.logprobs)
    assert engine.asked[-1] == "how many?half is <<48/2=24>> so <<24+1=25>>"
    rollouts = Rollouts(
        [], None, tokenizer, Sampling(99, 1.0, n=2), prompts_a_step=1, kind="dr_grpo", seed=0, end_ids=(),
        reference=False, calculator=True,
    )  # fmt: skip
    rows = rollouts._rows([Group(Asked(prompt, Example(0, ("",))), [one, two], np.array([1.0, 0.0]))], None)
    learned = [int(t) for t, w in zip(rows.target[0], rows.weight[0], strict=True) if w]
    assert learned == [t for t, own in zip(one.ids, one.own, strict=True) if own]
    assert torch.equal(rows.sampled[0][: rows.size[0]] != 0, rows.weight[0][: rows.size[0]] > 0)


def test_a_sum_that_is_none_is_left_to_the_model(model_folder):
    tokenizer = load_model(str(model_folder)).tokenizer
    engine = Scripted(tokenizer, ["it is <<", "x=", "5>> done"])
    ((one,),) = write_with_calculator(engine, tokenizer, [[5]], [Sampling(99, 0.0, logprobs=0)])
    assert one.text == "it is <<x=5>> done" and all(one.own)


def test_without_sums_it_is_the_engine(model_folder):
    """The same tokens and probabilities, and no more than were asked for."""
    model = load_model(str(model_folder))
    engine = Engine(model.network, model.tokenizer, cache_bytes=1 << 22)
    prompts = [model.tokenizer.encode(t) for t in ("the river", "def f(x):")]
    how = [Sampling(12, 1.0, seed=5, n=2, logprobs=0)] * 2
    plain = write(engine, prompts, how)
    for a, b in zip(sum(plain, []), sum(write_with_calculator(engine, model.tokenizer, prompts, how), []), strict=True):
        assert a.ids == b.ids and a.logprobs == b.logprobs and len(a.ids) <= 13
