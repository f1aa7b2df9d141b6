"""One answer in the making, as far as the scheduler cares: its tokens, and the blocks that hold their keys and
values."""

from dataclasses import dataclass, field

from craton.model.paging import BLOCK


@dataclass(frozen=True)
class PictureSpan:
    """Tokens that stand for a picture."""

    start: int
    end: int
    digest: str  # of the picture, since its tokens are always the same


@dataclass(eq=False)
class Generation:
    """tokens: ids of the prompt, then of the answer so far."""

    tokens: list[int]
    prompt: int  # tokens of the prompt
    max_new: int  # tokens that the answer may have
    adapter: str | None = None
    pictures: tuple[PictureSpan, ...] = ()
    leader: "Generation | None" = None  # an answer to the same prompt, whose cache it waits for
    score_from: int | None = None  # first prompt position whose log-probability is wanted
    every_state: bool = False  # the hidden state of every token is wanted
    guesses: list[int] = field(default_factory=list)  # tokens that may follow, to be checked
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the cache
    prefix_id: int = 0  # of the last known block
    known_blocks: int = 0
    cached: int | None = None  # prompt tokens found in the cache when it first ran; None: it has not yet
    done: bool = False  # finished or cancelled

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt

    @property
    def prefilling(self) -> bool:
        """Whether more than its last token is still to be computed."""
        return self.computed < len(self.tokens) - 1

    def pictures_in(self, block: int) -> tuple[PictureSpan, ...]:
        """Those that reach into a block."""
        start, end = block * BLOCK, (block + 1) * BLOCK
        return tuple(p for p in self.pictures if p.start < end and p.end > start)


@dataclass(frozen=True)
class Slice:
    """New tokens of an answer in one step: its tokens from `past` on, then its guesses, `new` in all."""

    generation: Generation
    past: int
    new: int

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        own = self.generation.tokens[self.past : self.past + self.new]
        return own + self.generation.guesses[: self.new - len(own)]

    def first_output(self) -> int:
        """The first of the new tokens whose logits or hidden state are wanted; `new` for none."""
        g = self.generation
        if g.every_state:
            return 0
        first = len(g.tokens) - 1 - self.past
        if g.score_from is not None and self.past < g.prompt:
            first = min(first, max(0, g.score_from - 1 - self.past))
        return min(first, self.new)
