"""What a model can do before, during and after it is adapted: the loss of samples that are held out, a task's score,
and bits per byte of general text."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from craton.adapt.data import Sample
from craton.adapt.rollout import Asked
from craton.adapt.rows import Renderer, Tokens, log_probabilities
from craton.base import UserError, read_text
from craton.engine.calculator import Written, write, write_with_calculator
from craton.engine.engine import Engine
from craton.engine.request import Sampling
from craton.tasks.live import Probe
from craton.tasks.scorers import SCORERS
from craton.tasks.task import Task
from craton.text.tokenizer import Tokenizer
from craton.train.recipe import TunePart

ITEMS = 200  # of a task
_GENERAL = Path(__file__).with_name("general.txt")
_BY_TOKEN = ("ipo", "simpo", "orpo")  # methods that compare means over tokens
_CACHE = 256 << 20


def asked_of(task: Task, part: str, renderer: Renderer, limit: int | None = None) -> list[Asked]:
    """A part's rows as prompts in tokens: through the chat template where the model has one, and the task is one of
    writing."""
    name = next(iter(task.formulations))
    out = []
    for row in task.part(part)[:limit]:
        e = task.example(row, name, task.shots_for(row, task.shots, 0))
        chats = renderer.dialogue is not None
        sample = Sample(row["where"], task.name, list(e.messages) if chats else e.prompts[0])
        out.append(Asked(renderer.prompt(sample), e))
    return out


def sampling_of(task: Task, chats: bool, max_tokens: int | None, **more: Any) -> Sampling:
    """How answers to a task are written."""
    return Sampling(max_tokens or task.max_tokens, stop=() if chats else task.stop, **more)


class Measure:
    """A call measures a network as it is. held: samples that are not learned."""

    def __init__(self, tokenizer: Tokenizer, renderer: Renderer, held: list[Sample], task: Task | None, tune: TunePart):
        self.by_token, self.calculator, general = tune.method in _BY_TOKEN, tune.calculator, tune.general
        self.tokenizer, self.renderer, self.task = tokenizer, renderer, task
        text = read_text(Path(general) if general else _GENERAL)
        self.general = [np.array(tokenizer.encode(p), np.int32) for p in text.split("\n\n") if p.strip()]
        self.bytes = sum(len(p.encode()) for p in text.split("\n\n") if p.strip())
        if not self.general:
            raise UserError(f"{general}: holds no text", field="tune.general")
        self.held = [renderer.answer(s, s.answer, s.form) for s in held if s.answer is not None]
        self.worse = [renderer.answer(s, s.worse, s.form) for s in held if s.worse is not None]
        self.moved_from: np.ndarray | None = None  # held-out pairs' margins by the model as it was
        self.last: tuple[Any, dict[str, Any]] | None = None
        self.probe: Probe | None = None
        self.asked: list[Asked] = []
        if task is not None and task.rows.get("test"):
            if task.by_likelihood:
                self.probe = Probe([task], tokenizer, renderer.context)
            else:
                self.asked = asked_of(task, "test", renderer, ITEMS)

    def remember(self, network: Any) -> None:
        """How the model as it was ranks pairs, which is what later rankings are measured from."""
        if self.worse:
            self.moved_from = self._margin(network)

    def _margin(self, network: Any) -> np.ndarray:
        """(pairs,) by how much the better answers are likelier, by tokens where the method compares means."""
        sides = []
        for texts in (self.held, self.worse):
            size = np.array([int(t.learned[1:].sum()) for t in texts]) if self.by_token else 1
            sides.append(log_probabilities(network, texts) / size)
        return sides[0] - sides[1]

    def __call__(self, network: Any, max_tokens: int | None = None, answers: int = 0) -> dict[str, Any]:
        """answers: at temperature 1 to each item, for pass@1 and pass@k beside the likeliest answer. The same weights
        are not measured twice, as at the last step and after it."""
        weights = sum(p._version for p in network.parameters())
        asked = id(network), weights, max_tokens, answers, self.moved_from is None
        if self.last is None or self.last[0] != asked:
            self.last = asked, self._measured(network, max_tokens, answers)
        return dict(self.last[1])

    def _measured(self, network: Any, max_tokens: int | None, answers: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        texts = [Tokens(t, np.arange(len(t)) > 0) for t in self.general]
        out["general_bits_per_byte"] = -float(log_probabilities(network, texts).sum()) / math.log(2) / self.bytes
        if self.held:
            logp = log_probabilities(network, self.held)
            out["heldout_loss"] = -float(logp.sum()) / sum(int(t.learned[1:].sum()) for t in self.held)
            if self.worse and self.moved_from is not None:
                margin = self._margin(network) - self.moved_from
                out["heldout_preferred"] = float((margin > 0).mean())
                out["heldout_margin"] = float(margin.mean())
        if self.probe is not None:
            out["score"] = next(iter(self.probe(network).values()))
        if self.asked:
            out |= self._write(network, max_tokens, answers)
        return out

    def _write(self, network: Any, max_tokens: int | None, answers: int) -> dict[str, Any]:
        assert self.task is not None
        task, chats = self.task, self.renderer.dialogue is not None
        ends = () if self.renderer.dialogue is None or self.renderer.dialogue.turn_end is None else (
            self.renderer.dialogue.turn_end,
        )  # fmt: skip
        engine = Engine(network, self.tokenizer, cache_bytes=_CACHE, end_ids=ends)
        how = sampling_of(task, chats, max_tokens, temperature=0.0)
        score, prompts = SCORERS[task.scorer], [a.ids for a in self.asked]

        def answer(how: Sampling) -> list[list[Written]]:
            each = [how] * len(prompts)
            if self.calculator:
                return write_with_calculator(engine, self.tokenizer, prompts, each)
            return write(engine, prompts, each)

        with torch.inference_mode():
            found = [a[0] for a in answer(how)]
            scores = [score(task, a.example, x.text).score for a, x in zip(self.asked, found, strict=True)]
            out: dict[str, Any] = {"score": float(np.mean(scores))}
            out |= {"answer_tokens": float(np.mean([len(x.ids) for x in found])), "sample": found[0].text[:300]}
            if answers > 1:
                how = sampling_of(task, chats, max_tokens, temperature=1.0, n=answers, seed=1)
                right = np.array([
                    [score(task, a.example, x.text).score >= 1 for x in several]
                    for a, several in zip(self.asked, answer(how), strict=True)
                ])  # fmt: skip
                out |= {"pass@1": float(right.mean()), f"pass@{answers}": float(right.any(1).mean())}
        return out


def in_words(found: dict[str, Any]) -> str:
    """A line of what was measured."""
    names = {
        "score": "score",
        "heldout_loss": "held-out loss",
        "heldout_preferred": "held-out pairs moved the right way",
    }
    names |= {"heldout_margin": "their margin, nats"}
    names |= {"general_bits_per_byte": "general text, bits/byte"}
    parts = [f"{words} {found[key]:.4g}" for key, words in names.items() if key in found]
    return ", ".join(parts + [f"{k} {v:.3f}" for k, v in found.items() if k.startswith("pass@")])
