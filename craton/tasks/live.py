"""Tasks put to a network that is being trained, as it is now."""

from typing import Any

from craton.base import UserError
from craton.engine.engine import Engine
from craton.engine.request import Sampling
from craton.engine.score import encode_pair, loglikelihoods
from craton.tasks.scorers import SCORERS, judge_choices
from craton.tasks.task import Example, Task
from craton.text.tokenizer import Tokenizer

ITEMS = 100  # of each task


class Probe:
    """A call scores a network on the first items of each task, in its first formulation."""

    def __init__(self, tasks: list[Task], tokenizer: Tokenizer, context: int):
        """context: tokens that the network sees. UserError for items that do not fit."""
        self.tasks, self.tokenizer = tasks, tokenizer
        self.examples: list[list[Example]] = []
        for task in tasks:
            if task.scorer == "judge":
                raise UserError(f"run.evaluate_tasks: {task.name} needs a judge, which training has not")
            name = next(iter(task.formulations))
            rows = task.items(ITEMS)
            made = [task.example(row, name, task.shots_for(row, task.shots, 0)) for row in rows]
            longest = max(len(tokenizer.encode(e.prompts[0])) for e in made)
            if longest + 8 > context:
                problem = f"run.evaluate_tasks: items of {task.name} have up to {longest} tokens"
                raise UserError(f"{problem}, the rows of this run {context}; leave it out, or set data.sequence_length")
            self.examples.append(made)

    def __call__(self, network: Any) -> dict[str, float]:
        """The mean score of each task."""
        out = {}
        for task, examples in zip(self.tasks, self.examples, strict=True):
            scores = (
                self._choose(task, examples, network) if task.by_likelihood else self._write(task, examples, network)
            )
            out[task.name] = sum(scores) / len(scores)
        return out

    def _choose(self, task: Task, examples: list[Example], network: Any) -> list[float]:
        pairs = [
            encode_pair(self.tokenizer, e.prompts[i % len(e.prompts)], choice)
            for e in examples
            for i, choice in enumerate(e.choices)
        ]
        found = dict(loglikelihoods(network, pairs))
        at, scores = 0, []
        for e in examples:
            own = [found[at + i] for i in range(len(e.choices))]
            at += len(own)
            scores.append(judge_choices(task, e, own, own)[0][task.metric])
        return scores

    def _write(self, task: Task, examples: list[Example], network: Any) -> list[float]:
        engine = Engine(network, self.tokenizer, cache_bytes=64 << 20)
        prompts = [self.tokenizer.encode(e.prompts[0]) for e in examples]
        most = engine.context - max(map(len, prompts))
        found = engine.generate(prompts, Sampling(min(task.max_tokens, most), 0.0, stop=task.stop))
        return [SCORERS[task.scorer](task, e, c[0].text).score for e, c in zip(examples, found, strict=True)]
