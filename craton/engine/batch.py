"""Slices of answers -> the tensors of one forward pass."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from craton.engine.generation import Slice
from craton.model.cache import PagedCache, TokenBatch
from craton.model.paging import BLOCK, blocks_for


@dataclass
class Assembled:
    """All on the cache's device. ids: (tokens,) int32. rows: (outputs,) int32, the tokens whose logits and hidden
    states are wanted. outputs: for each slice where its rows begin and end in the results."""

    ids: Tensor
    batch: TokenBatch
    rows: Tensor
    outputs: list[tuple[int, int]]


def assemble(
    plan: list[Slice],
    cache: PagedCache,
    first_output: Callable[[Slice], int] = Slice.first_output,
    numbers: Mapping[str, int] | None = None,
) -> Assembled:
    """The slices one after the other, without padding. numbers: of adapters."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, lengths, rows = [0], list[int](), list[int]()
    outputs: list[tuple[int, int]] = []
    for part in plan:
        at, end, blocks = len(ids), part.past + part.new, part.generation.blocks
        ids += part.token_ids
        positions += range(part.past, end)
        slots += [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(part.past, end)]
        starts.append(len(ids))
        lengths.append(end)
        first = first_output(part)
        outputs.append((len(rows), len(rows) + part.new - first))
        rows += range(at + first, at + part.new)
    most = max(map(blocks_for, lengths))
    tables: list[int] = []
    for part, length in zip(plan, lengths, strict=True):
        own = part.generation.blocks[: blocks_for(length)]
        tables += own + [0] * (most - len(own))
    columns = (ids, positions, slots, starts, lengths, tables, rows)  # made and moved as one: each tensor costs time
    together = torch.tensor([*itertools.chain(*columns)], dtype=torch.int32, device=cache.keys.device)
    parts = together.split([len(c) for c in columns])
    adapters = None
    if any(part.generation.adapter is not None for part in plan):
        own_numbers = [-1 if (a := p.generation.adapter) is None else (numbers or {})[a] for p in plan]
        many = torch.tensor([part.new for part in plan])
        adapters = torch.tensor(own_numbers, dtype=torch.int32).repeat_interleave(many)
    batch = TokenBatch(cache, parts[1], parts[2], parts[3], parts[4], parts[5].view(len(plan), most), adapters)
    return Assembled(parts[0], batch, parts[6], outputs)
