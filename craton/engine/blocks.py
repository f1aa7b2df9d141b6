"""Which cache block belongs to whom: allocation, sharing of equal prefixes, eviction.

A full block is known by its tokens and the block before it (vLLM's scheme, with exact keys instead of hashes): any
later request that begins the same way takes it over, while its first owner still runs or after. Blocks that nobody
holds keep their content until the space is needed, the longest unused first.
"""

from collections import OrderedDict

from craton.model.cache import BLOCK

Key = tuple[int, tuple[int, ...]]  # id of the known block before (0: none), this block's tokens


class BlockPool:
    def __init__(self, blocks: int):
        self.total = blocks
        self.fresh = list(range(blocks - 1, -1, -1))  # never used or forgotten, the next one last
        self.idle: OrderedDict[int, None] = OrderedDict()  # known, held by nobody, the longest unused first
        self.holders = [0] * blocks
        self.known: dict[Key, int] = {}  # -> block
        self.key: dict[int, Key] = {}  # of a known block
        self.identity: dict[int, int] = {}  # of a known block; never given twice
        self.last_identity = 0

    @property
    def free(self) -> int:
        """Blocks that can be allocated."""
        return len(self.fresh) + len(self.idle)

    def allocate(self) -> int | None:
        """A block to write to, or None."""
        if self.fresh:
            block = self.fresh.pop()
        elif self.idle:
            block = self.idle.popitem(last=False)[0]
            del self.known[self.key.pop(block)]
            del self.identity[block]
        else:
            return None
        self.holders[block] = 1
        return block

    def release(self, blocks: list[int]) -> None:
        """Give up blocks; the last ones of a sequence are forgotten first, since they are needed by the fewest."""
        for block in reversed(blocks):
            self.holders[block] -= 1
            if not self.holders[block]:
                if block in self.key:
                    self.idle[block] = None
                else:
                    self.fresh.append(block)

    def find(self, tokens: list[int], limit: int, parent: int = 0) -> tuple[list[int], int]:
        """Known blocks that hold the first of these tokens, at most `limit` of them (tokens); held from now on. Also
        the identity of the last one."""
        found = []
        for at in range(0, limit - BLOCK + 1, BLOCK):
            block = self.known.get((parent, tuple(tokens[at : at + BLOCK])))
            if block is None:
                break
            found.append(block)
            parent = self.identity[block]
        for block in found:
            if not self.holders[block]:
                del self.idle[block]
            self.holders[block] += 1
        return found, parent

    def know(self, block: int, parent: int, tokens: tuple[int, ...]) -> int:
        """A block is full: remember it. Returns the identity that stands for this prefix."""
        key = (parent, tokens)
        if (other := self.known.get(key)) is not None:
            return self.identity[other]  # computed twice at the same time; the first one is the known one
        self.last_identity += 1
        self.known[key], self.key[block], self.identity[block] = block, key, self.last_identity
        return self.last_identity

    def forget(self) -> None:
        """Nothing is known any more, so that nothing is shared with what comes."""
        self.fresh += self.idle
        self.idle.clear()
        self.known.clear()
        self.key.clear()
        self.identity.clear()
