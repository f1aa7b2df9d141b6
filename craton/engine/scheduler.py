"""Who runs in a step, with how many tokens. Knows token ids and block numbers only; tested without a network.

Each step takes the next token of every running answer, and pieces of prompts in what room is left (continuous batching,
arXiv 2309.06180; chunked prefill, arXiv 2403.02310). When the cache is full, the answer that came last gives its blocks
up and is computed again later.
"""

from collections import deque
from collections.abc import Callable

from craton.engine.blocks import BlockPool
from craton.engine.generation import Generation, Slice
from craton.engine.request import Counters
from craton.model.paging import BLOCK, blocks_for


class Scheduler:
    """blocks: of the cache. step_tokens: at most, in one step. scored_tokens: at most, of a prompt that is scored,
    since each has logits. guess: tokens that may follow an answer, asked for when it could take some."""

    def __init__(
        self,
        blocks: int,
        *,
        step_tokens: int = 512,
        scored_tokens: int = 512,
        max_running: int = 256,
        share_prefixes: bool = True,
        counters: Counters | None = None,
        guess: Callable[[Generation], list[int] | None] = lambda generation: None,
    ):
        self.pool = BlockPool(blocks)
        self.step_tokens, self.scored_tokens = step_tokens, scored_tokens
        self.max_running, self.share_prefixes = max_running, share_prefixes
        self.counters, self.guess = counters or Counters(), guess
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, generation: Generation) -> None:
        """Put it at the end of those that wait."""
        generation.prefix_id = self.pool.root(generation.adapter)
        self.waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """It is finished or no longer wanted: its blocks are free."""
        generation.done = True
        self.pool.release(generation.blocks)
        generation.blocks = []
        if generation in self.running:
            self.running.remove(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)

    def clear(self) -> None:
        """Everybody is removed, and nothing of what was computed is used again."""
        for generation in (*self.running, *self.waiting):
            self.remove(generation)
        self.pool.clear()

    def restart(self) -> None:
        """What is in the cache is no longer true: all that runs is computed again."""
        for generation in list(reversed(self.running)):
            self._preempt(generation)
        self.pool.clear()

    def schedule(self) -> list[Slice]:
        """This step's slices. The blocks they need are theirs."""
        plan: list[Slice] = []
        room = self.step_tokens
        for generation in sorted(self.running, key=lambda g: g.prefilling):
            if generation not in self.running:  # preempted meanwhile
                continue
            if not generation.prefilling and (guesses := self.guess(generation)) is not None:
                generation.guesses = guesses
            new, victims = self._make_room(generation, room)
            plan = [s for s in plan if s.generation not in victims]
            if new:
                plan.append(Slice(generation, generation.computed, new))
                room -= new
        while self.waiting and room > 0 and len(self.running) < self.max_running:
            generation = self.waiting[0]
            leader = generation.leader
            if (leader is not None and leader.prefilling and not leader.done) or not self._admit(generation, room):
                break
            new = self._wanted(generation, room)
            plan.append(Slice(generation, generation.computed, new))
            room -= new
        return plan

    def computed(self, part: Slice) -> None:
        """A slice went through the network; what of it is certain counts. Called again when guesses came true."""
        generation = part.generation
        generation.computed = min(part.past + part.new, len(generation.tokens))
        self._register(generation)

    def _make_room(self, generation: Generation, room: int) -> tuple[int, list[Generation]]:
        """New tokens of a running answer that have blocks now, and who was preempted for them, perhaps itself."""
        victims: list[Generation] = []
        new = self._wanted(generation, room)
        while new and not self.reserve(generation, generation.computed + new):
            if generation.guesses:  # rather no guessing than a preemption
                generation.guesses = []
                new = self._wanted(generation, room)
                continue
            victims.append(self.running[-1])
            self._preempt(victims[-1])
            if victims[-1] is generation:
                new = 0
        return new, victims

    def _wanted(self, generation: Generation, room: int) -> int:
        """New tokens of an answer in this step, its guesses included."""
        left = len(generation.tokens) - generation.computed
        if left > 1 or not generation.answered:
            most = room if generation.score_from is None else min(room, self.scored_tokens)
            return min(left, most)
        spare = generation.max_new - generation.answered - 1
        generation.guesses = generation.guesses[: max(0, min(spare, room - 1))]
        return min(room, 1 + len(generation.guesses))

    def reserve(self, generation: Generation, tokens: int) -> bool:
        """Blocks for this many tokens of an answer, or False and none."""
        missing = blocks_for(tokens) - len(generation.blocks)
        if missing > self.pool.free:
            return False
        for _ in range(missing):
            block = self.pool.allocate()
            assert block is not None
            generation.blocks.append(block)
        return True

    def _admit(self, generation: Generation, room: int) -> bool:
        """Let one that waits run, with what the cache knows of its beginning."""
        limit = len(generation.tokens) - 1
        if generation.score_from is not None:
            limit = min(limit, generation.score_from - 1)
        if generation.every_state or not self.share_prefixes:
            limit = 0
        root = self.pool.root(generation.adapter)
        generation.blocks, generation.prefix_id = self.pool.find(generation.tokens, limit, root, generation.pictures_in)
        generation.known_blocks = len(generation.blocks)
        generation.computed = generation.known_blocks * BLOCK
        end = generation.computed + min(room, len(generation.tokens) - generation.computed)
        # Leave a block for each answer that runs, or the newcomer would soon be preempted again.
        crowded = blocks_for(end) - len(generation.blocks) + len(self.running) > self.pool.free
        if (crowded and self.running) or not self.reserve(generation, end):
            self.pool.release(generation.blocks)
            generation.blocks, generation.computed = [], 0
            return False
        if generation.cached is None:
            generation.cached = min(generation.computed, generation.prompt)
            self.counters.cached_prompt_tokens += generation.cached
        self.waiting.popleft()
        self.running.append(generation)
        return True

    def _preempt(self, generation: Generation) -> None:
        """Back to those that wait, at their head; its blocks are free."""
        self.pool.release(generation.blocks)
        generation.blocks, generation.guesses = [], []
        generation.computed = generation.known_blocks = 0
        generation.prefix_id = self.pool.root(generation.adapter)
        self.running.remove(generation)
        self.waiting.appendleft(generation)
        self.counters.preemptions += 1

    def _register(self, g: Generation) -> None:
        """Full blocks become known."""
        if not self.share_prefixes:
            return
        while (g.known_blocks + 1) * BLOCK <= g.computed:
            number = g.known_blocks
            tokens = tuple(g.tokens[number * BLOCK : (number + 1) * BLOCK])
            g.prefix_id = self.pool.register(g.blocks[number], g.prefix_id, tokens, g.pictures_in(number))
            g.known_blocks += 1
