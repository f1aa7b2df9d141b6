"""How the cache of keys and values is cut into pages. Apart from the tensors, so that who plans with it needs no
torch."""

BLOCK = 16  # tokens in a block
AHEAD = 8  # steps that a GPU makes by itself before the host looks at what it chose


def blocks_for(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK)
