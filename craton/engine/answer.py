"""One answer in the making: what its request asked for, and what has become of it."""

from dataclasses import dataclass, field

from craton.engine.collect import Collector
from craton.engine.draft import PromptLookup
from craton.engine.generation import Generation
from craton.engine.request import Completion, Sampling
from craton.engine.structured import Matcher
from craton.engine.text import TextStream


@dataclass(eq=False)
class Answer:
    """The scheduler knows its `generation`; the rest is the engine's."""

    generation: Generation
    completion: Completion
    sampling: Sampling
    seed: int
    text: TextStream | None = None
    matcher: Matcher | None = None
    lookup: PromptLookup | None = None
    collector: Collector | None = None
    cancelled: bool = False
    thinking: bool = False  # the model is inside its thinking
    thinking_end: tuple[int, ...] = ()  # tokens that end it
    forced: list[int] = field(default_factory=list)  # tokens to come, whatever the model says

    def think(self, token: int) -> int:
        """A token of the thinking: the model's, or the end's if the budget is used up."""
        reasoning, end = self.sampling.reasoning, list(self.thinking_end)
        assert reasoning is not None
        spent = reasoning.budget is not None and self.completion.reasoning_tokens >= reasoning.budget
        if spent and not self.forced and token != end[0]:
            self.forced = list(end)
        if self.forced:
            token = self.forced.pop(0)
        written = self.completion.token_ids
        self.thinking = [*written[len(written) - len(end) + 1 :], token][-len(end) :] != end
        return token
