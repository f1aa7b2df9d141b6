"""Initial weights: a function of a seed, a parameter's name and its place in the parameter, so that any part of the
network has the same bits wherever it is made."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from craton.model.config import ModelConfig
from craton.model.decoder import Decoder

_BLOCK_VALUES = 1 << 18  # rows are drawn in blocks of about so many values, each from a generator of its own


def initial_rows(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...], first: int, count: int) -> Tensor:
    """Rows first ... first + count of the parameter `name` of this shape: (count, *shape[1:]) fp32 on the CPU.

    Uniform matrices of standard deviation 1/sqrt(fan-in), outputs of blocks and the untied head small, embedding
    normal. Blocks start near the identity (zero-initialised projections, arXiv 2203.03466 app. D and nanochat), which
    lets the matrix learning rates be the same at every depth.
    """
    part = (count, *shape[1:])
    if len(shape) == 1:
        zero = name.endswith("bias") or (config.norm_unit_offset and "norm" in name)
        return torch.zeros(part) if zero else torch.ones(part)
    if name.endswith("_bias") or name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
        return torch.zeros(part)
    if "embed_tokens" in name:
        scale = config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0
        return _drawn(seed, name, shape, first, count, torch.randn) * scale
    if "lm_head" in name:
        return _drawn(seed, name, shape, first, count, torch.randn) * 0.001
    bound = math.sqrt(3.0 / shape[-1])
    return (_drawn(seed, name, shape, first, count, torch.rand) * 2 - 1) * bound


def _drawn(seed: int, name: str, shape: tuple[int, ...], first: int, count: int, draw: Callable[..., Tensor]) -> Tensor:
    """Rows of random numbers: whole blocks of rows are drawn, and the wanted ones cut out."""
    block = max(1, _BLOCK_VALUES // math.prod(shape[1:]))
    pieces = []
    for number in range(first // block, -(-(first + count) // block)):
        start = number * block
        rows = min(block, shape[0] - start)
        word = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(word, "little") >> 1)
        drawn = draw((rows, *shape[1:]), generator=generator)
        pieces.append(drawn[max(first - start, 0) : first + count - start])
    return torch.cat(pieces) if pieces else torch.empty(0, *shape[1:])


@torch.no_grad()
def initialise(network: Decoder, seed: int) -> None:
    """Fill a whole network in memory."""
    for name, p in network.named_parameters():
        p.copy_(initial_rows(network.config, seed, name, tuple(p.shape), 0, p.shape[0]))
    clear_buffers(network)


def clear_buffers(network: nn.Module) -> None:
    """Buffers start at zero."""
    for buffer in network.buffers():
        buffer.zero_()
