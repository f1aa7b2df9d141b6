"""Which cache block belongs to whom: allocation, sharing of equal prefixes, eviction.

A full block is known by its tokens, the pictures in it and the block before it (vLLM's scheme, with exact keys instead
of hashes): any later request that begins the same way takes it over, while its first owner still runs or after. The
chain begins with what computes it, the model alone or with an adapter. Blocks that nobody holds keep their content
until the space is needed, the longest unused first.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable

from craton.model.paging import BLOCK

Pictures = Callable[[int], tuple[Hashable, ...]]  # number of a block -> the pictures that reach into it, and where
Key = tuple[int, tuple[int, ...], tuple[Hashable, ...]]  # prefix id before it, its tokens, its pictures


def no_pictures(_: int) -> tuple[Hashable, ...]:
    """Pictures of a text."""
    return ()


class BlockPool:
    """Blocks by number. A prefix id stands for everything up to and including a known block; it is never given
    twice."""

    def __init__(self, blocks: int):
        self.total = blocks
        self.unused = list(range(blocks - 1, -1, -1))  # never used or cleared, the next one last
        self.evictable: OrderedDict[int, None] = OrderedDict()  # known, held by nobody, the longest unused first
        self.holders = [0] * blocks
        self.known: dict[Key, int] = {}  # -> block
        self.key: dict[int, Key] = {}  # of a known block
        self.prefix_id: dict[int, int] = {}  # of a known block
        self.last_id = 0
        self.roots: dict[Hashable, int] = {None: 0}

    @property
    def free(self) -> int:
        """Blocks that can be allocated."""
        return len(self.unused) + len(self.evictable)

    def root(self, adapter: str | None) -> int:
        """The prefix id that answers of an adapter begin with; None is the model as it is."""
        return self.roots.setdefault(adapter, -len(self.roots))

    def allocate(self) -> int | None:
        """A block to write to, or None."""
        if self.unused:
            block = self.unused.pop()
        elif self.evictable:
            block = self.evictable.popitem(last=False)[0]
            del self.known[self.key.pop(block)]
            del self.prefix_id[block]
        else:
            return None
        self.holders[block] = 1
        return block

    def release(self, blocks: list[int]) -> None:
        """Give up blocks; the last ones of an answer are evicted first, since they are needed by the fewest."""
        for block in reversed(blocks):
            self.holders[block] -= 1
            if not self.holders[block]:
                if block in self.key:
                    self.evictable[block] = None
                else:
                    self.unused.append(block)

    def find(
        self, tokens: list[int], limit: int, parent: int = 0, pictures: Pictures = no_pictures
    ) -> tuple[list[int], int]:
        """Known blocks that hold the first of these tokens, at most `limit` of them (tokens); held from now on. Also
        the prefix id of the last one."""
        found = []
        for at in range(0, limit - BLOCK + 1, BLOCK):
            block = self.known.get((parent, tuple(tokens[at : at + BLOCK]), pictures(at // BLOCK)))
            if block is None:
                break
            found.append(block)
            parent = self.prefix_id[block]
        for block in found:
            if not self.holders[block]:
                del self.evictable[block]
            self.holders[block] += 1
        return found, parent

    def register(self, block: int, parent: int, tokens: tuple[int, ...], pictures: tuple[Hashable, ...] = ()) -> int:
        """A block is full: make it known. Returns the prefix id that it ends."""
        key = (parent, tokens, pictures)
        if (other := self.known.get(key)) is not None:
            return self.prefix_id[other]  # computed twice at the same time; the first one is the known one
        self.last_id += 1
        self.known[key], self.key[block], self.prefix_id[block] = block, key, self.last_id
        return self.last_id

    def clear(self) -> None:
        """Nothing is known any more, so that nothing is shared with what comes."""
        self.unused += self.evictable
        self.evictable.clear()
        self.known.clear()
        self.key.clear()
        self.prefix_id.clear()
