"""Matrices in GGUF's types, at random."""

import numpy as np
import torch

from craton.model.packed import BLOCKS

# Where a block has numbers in fp16.
HALVES = {2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 20: [0], 39: []}
HALVES |= {10: [80, 82], 11: [108], 12: [0, 2], 13: [0, 2], 14: [208], 23: [0]}


def random_blocks(kind: int, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """(rows, bytes) uint8 with scales that are like real ones."""
    r, (values, width) = np.random.default_rng(seed), BLOCKS[kind]
    raw = r.integers(0, 256, (rows, cols // values, width), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = r.uniform(-0.02, 0.02, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    if kind == 39:
        raw[..., 0] = r.integers(115, 130, raw.shape[:2])
    return torch.from_numpy(raw.reshape(rows, -1))
