"""What is gathered over a prompt, piece by piece: log-probabilities of its tokens, or its mean hidden state."""

from torch import Tensor

from craton.engine.generation import Slice
from craton.engine.request import TokenLogprob
from craton.engine.sampler import token_logprobs


class Collector:
    """One answer's. A prompt that is computed again after a preemption is gathered again."""

    def __init__(self, top: int):
        """top: how many of the likeliest tokens come with each score."""
        self.top = top
        self.scores: list[TokenLogprob | None] = []
        self.hidden_sum: Tensor | None = None
        self.until = 0

    def add(self, part: Slice, logits: Tensor | None, hidden: Tensor) -> None:
        """part: a slice that was computed; logits and hidden: of its outputs, (outputs, ...)."""
        if part.past < self.until:
            self.scores, self.hidden_sum = [], None
        self.until = part.past + part.new
        generation = part.generation
        if generation.every_state:
            total = hidden.double().sum(0)
            self.hidden_sum = total if self.hidden_sum is None else self.hidden_sum + total
        first = self.until - hidden.shape[0]  # position of the first output
        if generation.score_from is not None and hidden.shape[0] and first < generation.prompt - 1:
            assert logits is not None
            end = min(self.until, generation.prompt - 1)
            scores = token_logprobs(logits[: end - first], generation.tokens[first + 1 : end + 1], self.top)
            self.scores = self.scores or [None] * (first + 1)
            self.scores += scores

    def embedding(self, tokens: int) -> list[float]:
        """The mean over so many tokens, scaled to length 1; [] if it was not wanted."""
        if self.hidden_sum is None:
            return []
        mean = self.hidden_sum / tokens
        return (mean / mean.norm().clamp_min(1e-12)).tolist()
