"""Keys and values of past tokens, in blocks of 16 tokens that requests can share (PagedAttention, arXiv 2309.06180).

Keys lie transposed in a block, (head size, 16), so that one vector register holds the scores of 16 keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from craton.model import kernels, native, ops
from craton.model.config import ModelConfig

BLOCK = 16  # tokens in a block


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
    """Of the cache: all layers, keys and values."""
    heads, key, value = config.cache_dims
    return config.num_hidden_layers * heads * (key + value) * itemsize


@dataclass
class Step:
    """The tokens of one forward pass: some new ones of each of several sequences, one after the other, no padding.

    positions and slots: (tokens,), a token's place in its sequence and in the pools (block * 16 + offset).
    starts: (sequences + 1,), where each sequence's tokens begin. lengths: (sequences,), tokens in the cache after this
    step. tables: (sequences, most blocks), each sequence's blocks in order. All int32.
    """

    cache: PagedCache
    positions: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor
    tables: Tensor

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Store k (1, tokens, kv_heads, key size) and v, then attend to all that q (1, tokens, heads, key size) may see
        -> (1, tokens, heads, value size)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        plain = (
            q.device.type != "cpu"
            or q.dtype != torch.float32
            or v.shape[3] % 16 != 0
            or torch.is_grad_enabled()
            or ops.observer is not None
        )
        if not plain and (library := kernels.load_serving()) is not None:
            return native.paged_attention(library, q, k, v, keys, values, self, window, scale, softcap, sinks)
        block, offset = self.slots.long() // BLOCK, self.slots.long() % BLOCK
        keys[block, :, :, offset] = k[0].to(keys.dtype)
        values[block, :, offset] = v[0].to(values.dtype)
        pieces = []
        starts, lengths = self.starts.tolist(), self.lengths.tolist()
        for s, length in enumerate(lengths):
            own = slice(starts[s], starts[s + 1])
            table = self.tables[s, : -(-length // BLOCK)].long()
            past_k = keys[table].permute(0, 3, 1, 2).flatten(0, 1)[:length].to(q.dtype)  # (length, kv_heads, size)
            past_v = values[table].transpose(1, 2).flatten(0, 1)[:length].to(q.dtype)
            at = self.positions[own].long()
            key = torch.arange(length, device=q.device)
            mask = key[None, :] <= at[:, None]
            if window is not None:
                mask = mask & (key[None, :] > at[:, None] - window)
            pieces.append(
                ops.masked_attention(q[:, own], past_k[None], past_v[None], mask[None, None], scale, softcap, sinks)
            )
        return torch.cat(pieces, 1)


def single_step(cache: PagedCache, past: int, new: int) -> Step:
    """A step of one sequence that owns the whole cache: `new` tokens after `past`."""
    device = cache.keys.device
    at = torch.arange(past, past + new, dtype=torch.int32, device=device)
    return Step(
        cache,
        at,
        at,
        torch.tensor([0, new], dtype=torch.int32, device=device),
        torch.tensor([past + new], dtype=torch.int32, device=device),
        torch.arange(cache.blocks, dtype=torch.int32, device=device)[None],
    )
