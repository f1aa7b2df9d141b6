"""A small model that guesses ahead of the large one."""

import torch

from craton.engine.answer import Answer
from craton.engine.batch import assemble
from craton.engine.generation import Generation, Slice
from craton.engine.runner import Runner
from craton.engine.sampler import adjusted, draw_each, uniform
from craton.engine.scheduler import Scheduler
from craton.model.decoder import Decoder


class DraftModel:
    """Its keys and values lie in blocks of the same numbers as the large model's."""

    def __init__(self, network: Decoder, blocks: int, context: int, guesses: int):
        """guesses: tokens that are guessed at a time."""
        self.context = min(context, network.config.max_position_embeddings)
        self.runner, self.guesses = Runner(network, blocks, self.context), guesses
        self.computed: dict[Generation, int] = {}  # tokens that the draft model has seen

    @torch.inference_mode()
    def guess(self, answers: list[Answer], scheduler: Scheduler) -> None:
        """Guesses for every answer that is past its prompt, each with the random number its position will have."""
        self.computed = {g: n for g, n in self.computed.items() if g in scheduler.running}
        active = [a for a in answers if self._fits(a, scheduler)]
        for answer in active:
            self._catch_up(answer.generation, scheduler.step_tokens)
        for _ in range(self.guesses if active else 0):
            plan = []
            for g in (a.generation for a in active):
                past = self.computed[g]
                plan.append(Slice(g, past, len(g.tokens) + len(g.guesses) - past))
            made = assemble(plan, self.runner.cache, lambda part: part.new - 1)
            logits, _ = self.runner.forward(made.ids, made.batch, made.rows)
            assert logits is not None
            rows, u = [], []
            for answer, row in zip(active, logits, strict=True):
                g = answer.generation
                rows.append(adjusted(row, answer.sampling, g.tokens[: g.prompt], g.tokens[g.prompt :]))
                u.append(uniform(answer.seed, answer.completion.index, len(g.tokens) + len(g.guesses)))
            tokens = draw_each(torch.stack(rows), [a.sampling for a in active], u)
            for part, token in zip(plan, tokens, strict=True):
                self.computed[part.generation] += part.new
                part.generation.guesses.append(token)
        for g in (a.generation for a in active):  # what comes after the tokens that are known may be wrong
            self.computed[g] = min(self.computed[g], len(g.tokens))

    def _fits(self, answer: Answer, scheduler: Scheduler) -> bool:
        g = answer.generation
        if g.prefilling or answer.matcher is not None or not g.answered:
            return False
        wanted = len(g.tokens) + self.guesses
        return wanted <= self.context and scheduler.reserve(g, wanted)

    def _catch_up(self, g: Generation, step_tokens: int) -> None:
        """A long prompt, in pieces."""
        g.guesses = []
        past = self.computed.setdefault(g, 0)
        while len(g.tokens) - past > step_tokens:
            made = assemble([Slice(g, past, step_tokens)], self.runner.cache, lambda part: part.new - 1)
            self.runner.forward(made.ids, made.batch, made.rows)
            past = self.computed[g] = past + step_tokens
