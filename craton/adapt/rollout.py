"""Answers of the network that is being trained, by our own engine on its weights as they are: what reinforcement and
on-policy distillation learn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from craton.adapt import objectives
from craton.adapt.rows import Answers, Tokens, answer_rows
from craton.base import UserError
from craton.engine.calculator import Written, write, write_with_calculator
from craton.engine.engine import Engine
from craton.engine.request import Sampling
from craton.model import modes
from craton.tasks.task import Example
from craton.text.tokenizer import Tokenizer

_CACHE = 256 << 20  # bytes of keys and values
_TRIES = 4  # draws of prompts for a group whose answers differ
_RATIO = 1e-2  # what the first step's ratios may differ from 1

Reward = Callable[[Example, str], float]


@dataclass(frozen=True)
class Asked:
    """A prompt in tokens, and the item that its answers are judged by."""

    ids: list[int]
    example: Example


@dataclass
class Group:
    """Answers to one prompt, and how good each is."""

    asked: Asked
    answers: list[Written]
    rewards: np.ndarray

    @property
    def varies(self) -> bool:
        """Whether anything can be learned from their differences."""
        return bool(self.rewards.max() - self.rewards.min() > 1e-9)


@dataclass
class Sampled:
    """One batch of groups, with what was seen of it."""

    groups: list[Group]
    facts: dict[str, float] = field(default_factory=dict)


class Rollouts:
    """Batches of answers, a pure function of the batch's number and of the weights. kind: as of PolicyGradient, or
    "distill" where every answer counts alike."""

    def __init__(
        self,
        prompts: Sequence[Asked],
        reward: Reward | None,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        prompts_a_step: int,
        kind: str,
        seed: int,
        end_ids: tuple[int, ...],
        reference: bool,
        calculator: bool = False,
    ):
        """sampling: of one answer; n of them make a group. reference: log-probabilities without adapters are wanted.
        calculator: answers may ask it."""
        self.prompts, self.reward, self.tokenizer, self.sampling = prompts, reward, tokenizer, sampling
        self.rows, self.together = prompts_a_step * sampling.n, sampling.n
        self.kind, self.seed, self.end_ids, self.reference = kind, seed, end_ids, reference
        self.calculator = calculator
        self.engine: Engine | None = None
        self.drawn: tuple[int, int, Sampled] | None = None  # number, weights' version, and what was made
        self.flat = 0  # batches without any difference, one after the other
        self.last: dict[str, float] = {}

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {"prompts": len(self.prompts), "answers": self.sampling.n}

    def batch(self, number: int, share: int, shares: int, network: Any) -> Answers:
        """As craton.train.job.Source says."""
        made = self.sampled(number, network)
        groups = made.groups[share::shares]
        return self._rows(groups, network)

    def sampled(self, number: int, network: Any) -> Sampled:
        """All groups of a batch, made once."""
        version = next(p for p in network.parameters() if p.requires_grad)._version
        if self.drawn is None or self.drawn[:2] != (number, version):
            self.drawn = (number, version, self._sample(number, network))
        return self.drawn[2]

    def _sample(self, number: int, network: Any) -> Sampled:
        if self.engine is None:
            self.engine = Engine(network, self.tokenizer, cache_bytes=_CACHE, end_ids=self.end_ids)
        self.engine.weights_changed()
        wanted = self.rows // self.together
        groups: list[Group] = []
        seen = flat = 0
        all_rewards: list[float] = []
        for attempt in range(_TRIES):
            missing = wanted - len(groups)
            random = np.random.default_rng([self.seed, number, attempt])
            few = len(self.prompts) < missing
            picked = random.choice(len(self.prompts), missing, replace=few).tolist()
            found = self._groups([self.prompts[i] for i in picked], number * _TRIES + attempt)
            seen += len(found)
            all_rewards += [float(r) for g in found for r in g.rewards]
            differ = [g for g in found if g.varies or self.reward is None]
            flat += len(found) - len(differ)
            groups += differ
            if len(groups) == wanted:
                break
            rest = [g for g in found if not g.varies]
        if len(groups) < wanted:  # they count nothing, but the batch keeps its size
            groups += rest[: wanted - len(groups)]
        self._check(groups)
        lengths = [len(a.ids) for g in groups for a in g.answers]
        facts = {"length": float(np.mean(lengths))}
        if self.reward is not None:
            facts |= {"reward": float(np.mean(all_rewards)), "flat_groups": flat / seen}
        facts["cut"] = float(np.mean([a.finish == "length" for g in groups for a in g.answers]))
        self.last = facts
        return Sampled(groups, facts)

    def _check(self, groups: list[Group]) -> None:
        """UserError where rewards tell nothing apart, batch after batch."""
        if self.reward is None or any(g.varies for g in groups):
            self.flat = 0
            return
        self.flat += 1
        value = groups[0].rewards[0]
        if self.flat >= 3:
            problem = f"in {self.flat} batches all answers to a prompt got the same reward ({value:g} to the last ones)"
            fix = "the task is too hard or too easy for the model, or its scorer cannot tell; tune it by SFT first"
            raise UserError(f"nothing to learn from: {problem}; {fix}", field="task", code="flat_rewards")

    def _groups(self, asked: list[Asked], seed: int) -> list[Group]:
        assert self.engine is not None
        many = [self._seeded(seed * 100_003 + i) for i in range(len(asked))]
        with torch.inference_mode():
            prompts = [a.ids for a in asked]
            if self.calculator:
                found = write_with_calculator(self.engine, self.tokenizer, prompts, many)
            else:
                found = write(self.engine, prompts, many)
        out = []
        for a, answers in zip(asked, found, strict=True):
            scores = [0.0 if self.reward is None else self.reward(a.example, x.text) for x in answers]
            out.append(Group(a, answers, np.array(scores)))
        return out

    def _seeded(self, seed: int) -> Sampling:
        return replace(self.sampling, seed=self.seed * 1_000_003 + seed, logprobs=0)

    def _rows(self, groups: list[Group], network: Any) -> Answers:
        texts, sampled, advantage = list[Tokens](), list[list[float]](), list[float]()
        for g in groups:
            gains = self._advantages(g)
            for answer, gain in zip(g.answers, gains, strict=True):
                ids = np.array([*g.asked.ids, *answer.ids], np.int32)
                texts.append(Tokens(ids, np.array([False] * len(g.asked.ids) + answer.own)))
                sampled.append([0.0] * (len(g.asked.ids) - 1) + answer.logprobs)
                advantage.append(gain)
        rows = answer_rows(texts, advantage=torch.tensor(advantage, dtype=torch.float32))
        rows.sampled = torch.zeros(rows.ids.shape)
        for i, values in enumerate(sampled):
            rows.sampled[i, : len(values)] = torch.tensor(values)
        if self.reference:
            with torch.no_grad(), modes.without_adapters():
                rows.reference = -network.token_nll(rows.ids, rows.target)
        return rows

    def _advantages(self, g: Group) -> list[float]:
        rewards = torch.from_numpy(g.rewards)
        if self.kind == "distill":
            return [1.0] * len(rewards)
        if self.kind == "expert":
            return (rewards >= 1.0).double().tolist()
        return objectives.advantages(rewards, scaled=self.kind in ("grpo", "dapo", "gspo")).tolist()


def check_ratio(ratio: float) -> None:
    """UserError unless sampler and trainer agree on how likely the answers were, before anything was learned."""
    if abs(ratio - 1.0) > _RATIO:
        raise UserError(f"the sampler's and the trainer's probabilities differ by a factor of {ratio:.4f}")
