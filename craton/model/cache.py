"""Keys and values of past tokens, in blocks of 16 tokens that requests can share (PagedAttention, arXiv 2309.06180).

Keys lie transposed in a block, (head size, 16), so that one vector register holds the scores of 16 keys.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from craton.model import ops
from craton.model.attention import AttentionSpec
from craton.model.config import ModelConfig
from craton.model.paging import BLOCK


class PagedCache:
    """Pools of blocks, one pair a layer: keys (layers, blocks, kv_heads, key size, 16) and values (layers, blocks,
    kv_heads, 16, value size). Memory is touched as blocks are filled."""

    def __init__(
        self, config: ModelConfig, blocks: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ):
        heads, key, value = config.cache_dims
        self.blocks = blocks
        self.keys = torch.empty(config.num_hidden_layers, blocks, heads, key, BLOCK, dtype=dtype, device=device)
        self.values = torch.empty(config.num_hidden_layers, blocks, heads, BLOCK, value, dtype=dtype, device=device)


def bytes_per_token(config: ModelConfig, itemsize: int = 4) -> int:
    """Of the cache: all layers, keys and values, of itemsize bytes each."""
    heads, key, value = config.cache_dims
    return config.num_hidden_layers * heads * (key + value) * itemsize


class Past(Protocol):
    """What a network asks of the tokens that came before, whatever holds them."""

    positions: Tensor  # (tokens,) of the new tokens, each in its own sequence

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
        """Store k (1, tokens, kv_heads, key size) and v, then attend to all that q (1, tokens, heads, key size) may see
        -> (1, tokens, heads, value size)."""
        ...


@dataclass
class TokenBatch:
    """The tokens of one forward pass: some new ones of each of several sequences, one after the other, no padding.

    positions and slots: (tokens,), a token's place in its sequence and in the pools (block * 16 + offset).
    starts: (sequences + 1,), where each sequence's tokens begin. lengths: (sequences,), tokens in the cache after this
    batch. tables: (sequences, most blocks), each sequence's blocks in order. adapters: (tokens,), the number of each
    token's adapter, -1 for none; None where no token has one. All int32.
    """

    cache: PagedCache
    positions: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor
    tables: Tensor
    adapters: Tensor | None = None

    @property
    def places(self) -> list[Tensor]:
        """The five tensors, as operations take them."""
        return [self.positions, self.slots, self.starts, self.lengths, self.tables]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
        """As `Past` says."""
        pool = self.cache.keys[layer], self.cache.values[layer]
        return ops.paged_attention(q, k, v, pool, self.places, spec, None if sinks is None else sinks.float())


def one_sequence(cache: PagedCache, past: int, new: int) -> TokenBatch:
    """The batch of one sequence that owns the whole cache: `new` tokens after `past`."""
    device = cache.keys.device
    at = torch.arange(past, past + new, dtype=torch.int32, device=device)
    starts = torch.tensor([0, new], dtype=torch.int32, device=device)
    lengths = torch.tensor([past + new], dtype=torch.int32, device=device)
    table = torch.arange(cache.blocks, dtype=torch.int32, device=device)
    return TokenBatch(cache, at, at, starts, lengths, table[None])
