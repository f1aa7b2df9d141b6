"""The next tokens, chosen on the device, and made the next step's input."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from craton.model.paging import BLOCK

_VOCABULARY = 4096  # logits that one program looks at


@triton.jit
def _highest_kernel(logits, highest, place, size, B: tl.constexpr, BLOCKS: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * B + tl.arange(0, B)
    x = tl.load(logits + row * size + at, at < size, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    tl.store(highest + row * BLOCKS + block, top)
    tl.store(place + row * BLOCKS + block, tl.min(tl.where(x == top, at, size), 0))


@triton.jit
def _ordered(x, BITS: tl.constexpr):
    """Floats as whole numbers in the same order; of bf16, 16 bits say all."""
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # and no zero below zero
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> (32 - BITS)


@triton.jit
def _filter_kernel(logits, temperature, top_k, top_p, least, last, size, BITS: tl.constexpr, B: tl.constexpr):
    """Both filters keep the first tokens of one order: by logits, and by number where those are equal. What they keep
    ends with a logit, least as _ordered has it, and with the token of it in place last. A logit's bits are found one
    after the other, from the highest, by what is as likely or likelier; masses are sums of fp32."""
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    many, share = tl.load(top_k + row).to(tl.int32), tl.load(top_p + row)
    warmth = tl.load(temperature + row).to(tl.float32)
    place = logits + row * size
    lowest = tl.full([], -(1 << (BITS - 1)), tl.int64)
    floor = lowest
    ties = tl.full([], 0, tl.int64) + size  # of the last logit, that are kept at most
    if (many > 0) & (many < size) & (warmth > 0):
        for step in range(BITS):
            trial = floor + (tl.full([], 1, tl.int64) << (BITS - 1 - step))
            count = tl.zeros([B], tl.int32)
            for at in range(0, size, B):
                x = tl.load(place + at + j, at + j < size, other=float("-inf"))
                count += ((_ordered(x, BITS) >= trial) & (at + j < size)).to(tl.int32)
            floor = tl.where(tl.sum(count, 0) >= many, trial, floor)
        above = tl.zeros([B], tl.int32)
        for at in range(0, size, B):
            x = tl.load(place + at + j, at + j < size, other=float("-inf"))
            above += ((_ordered(x, BITS) > floor) & (at + j < size)).to(tl.int32)
        ties = (many - tl.sum(above, 0)).to(tl.int64)
    if (share < 1) & (warmth > 0):
        highest = tl.full([B], float("-inf"), tl.float32)
        values = tl.full([B], float("-inf"), tl.float32)
        for at in range(0, size, B):
            x = tl.load(place + at + j, at + j < size, other=float("-inf")).to(tl.float32)
            highest = tl.maximum(highest, x)
            values = tl.maximum(values, tl.where(_ordered(x, BITS) == floor, x, float("-inf")))
        top, value = tl.max(highest, 0), tl.max(values, 0)
        whole = tl.zeros([B], tl.float64)
        equal = tl.zeros([B], tl.int32)
        for at in range(0, size, B):
            x = tl.load(place + at + j, at + j < size, other=float("-inf")).to(tl.float32)
            p = tl.exp((x - top) / warmth).to(tl.float64)
            key = _ordered(x, BITS)
            whole += tl.where(key > floor, p, 0.0)
            equal += ((key == floor) & (at + j < size)).to(tl.int32)
        one = tl.exp((value - top) / warmth).to(tl.float64)
        equals = tl.minimum(tl.sum(equal, 0).to(tl.int64), ties).to(tl.float64)
        wanted = share * (tl.sum(whole, 0) + equals * one)
        wanted = tl.maximum(wanted, 1e-300)  # of a share of nothing, one token is kept
        found = lowest
        for step in range(BITS):
            trial = found + (tl.full([], 1, tl.int64) << (BITS - 1 - step))
            mass = tl.zeros([B], tl.float64)
            for at in range(0, size, B):
                x = tl.load(place + at + j, at + j < size, other=float("-inf")).to(tl.float32)
                p = tl.exp((x - top) / warmth).to(tl.float64)
                mass += tl.where(_ordered(x, BITS) >= trial, p, 0.0)
            found = tl.where((trial <= floor) | (tl.sum(mass, 0) >= wanted), trial, found)
        mass = tl.zeros([B], tl.float64)
        values = tl.full([B], float("-inf"), tl.float32)
        for at in range(0, size, B):
            x = tl.load(place + at + j, at + j < size, other=float("-inf")).to(tl.float32)
            p = tl.exp((x - top) / warmth).to(tl.float64)
            key = _ordered(x, BITS)
            mass += tl.where(key > found, p, 0.0)
            values = tl.maximum(values, tl.where(key == found, x, float("-inf")))
        one = tl.exp((tl.max(values, 0) - top) / warmth).to(tl.float64)
        fitting = tl.ceil((wanted - tl.sum(mass, 0)) / one)
        fitting = tl.where(fitting >= 1, tl.minimum(fitting, size), 1.0).to(tl.int64)
        ties = tl.where(found == floor, tl.minimum(ties, fitting), fitting)
        floor = found
    end = tl.full([], 0, tl.int64) + size
    seen = tl.zeros([], tl.int64)
    for at in range(0, size, B):
        x = tl.load(place + at + j, at + j < size, other=float("-inf"))
        equal = ((_ordered(x, BITS) == floor) & (at + j < size)).to(tl.int32)
        rank = seen + tl.cumsum(equal, 0)
        end = tl.minimum(end, tl.min(tl.where((equal > 0) & (rank == ties), at + j, size), 0))
        seen += tl.sum(equal, 0)
    tl.store(least + row, floor.to(tl.int32))
    tl.store(last + row, end.to(tl.int32))


@triton.jit
def _kept(x, at, least, last, BITS: tl.constexpr):
    key = _ordered(x, BITS)
    return (key > least) | ((key == least) & (at <= last))


@triton.jit
def _mass_kernel(
    logits, highest, temperature, min_p, least, last, mass, plain_mass, size, FILTERED: tl.constexpr,
    BITS: tl.constexpr, B: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = tl.arange(0, PADDED)
    top = tl.max(tl.load(highest + row * BLOCKS + b, b < BLOCKS, other=float("-inf")), 0).to(tl.float64)
    at = block * B + tl.arange(0, B)
    raw = tl.load(logits + row * size + at, at < size, other=float("-inf"))
    x = raw.to(tl.float64) - top
    warmth = tl.load(temperature + row).to(tl.float64)
    p = tl.exp(x / tl.where(warmth > 0, warmth, 1.0))
    p = tl.where(p >= tl.load(min_p + row).to(tl.float64), p, 0.0)
    if FILTERED:
        p = tl.where(_kept(raw, at, tl.load(least + row), tl.load(last + row), BITS), p, 0.0)
    tl.store(mass + row * BLOCKS + block, tl.sum(p, 0))
    tl.store(plain_mass + row * BLOCKS + block, tl.sum(tl.exp(x), 0))


@triton.jit
def _choose_kernel(
    logits, highest, place, mass, plain_mass, temperature, min_p, least, last, u, tokens, logprobs, size,
    FILTERED: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row, b = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    here = b < BLOCKS
    tops = tl.load(highest + row * BLOCKS + b, here, other=float("-inf"))
    top = tl.max(tops, 0)
    token = tl.min(tl.where(here & (tops == top), tl.load(place + row * BLOCKS + b, here, other=size), size), 0)
    warmth = tl.load(temperature + row).to(tl.float64)
    whole = tl.sum(tl.load(plain_mass + row * BLOCKS + b, here, other=0.0), 0)
    if warmth > 0:
        masses = tl.load(mass + row * BLOCKS + b, here, other=0.0)
        wanted = tl.load(u + row).to(tl.float64) * tl.sum(masses, 0)
        before = tl.cumsum(masses, 0) - masses
        filled = tl.max(tl.where(masses > 0, b, 0), 0)  # the last block with any
        block = tl.minimum(tl.min(tl.where(before + masses > wanted, b, PADDED), 0), filled)
        start = tl.sum(tl.where(b == block, before, 0.0), 0)
        at = block * B + tl.arange(0, B)
        raw = tl.load(logits + row * size + at, at < size, other=float("-inf"))
        p = tl.exp((raw.to(tl.float64) - top.to(tl.float64)) / warmth)
        p = tl.where(p >= tl.load(min_p + row).to(tl.float64), p, 0.0)
        if FILTERED:
            p = tl.where(_kept(raw, at, tl.load(least + row), tl.load(last + row), BITS), p, 0.0)
        inside = start + tl.cumsum(p, 0) > wanted
        final = tl.max(tl.where(p > 0, at, 0), 0)
        token = tl.minimum(tl.min(tl.where(inside & (p > 0), at, size), 0), final)
    token = tl.minimum(token, size - 1)  # of what is no number too
    tl.store(tokens + row, token.to(tl.int64))
    own = tl.load(logits + row * size + token).to(tl.float64)
    tl.store(logprobs + row, (own - top.to(tl.float64) - tl.log(whole)).to(tl.float32))


def choose_tokens(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    u: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    filters: tuple[Tensor, Tensor] | None = None,
) -> None:
    """A token for each row of logits (rows, vocabulary), bf16 or fp32, into tokens (rows,) int64, and its
    log-probability at temperature 1 into logprobs (rows,) fp32. As ops.choose_tokens, in fp64. filters: top_k and top_p
    (rows,), which are not asked of any row if it is None."""
    rows, size = logits.shape
    blocks = triton.cdiv(size, _VOCABULARY)
    highest = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    place = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    mass = torch.empty(2, rows, blocks, dtype=torch.float64, device=logits.device)
    ends = torch.empty(2, rows, dtype=torch.int32, device=logits.device)
    shape: dict[str, Any] = {"B": _VOCABULARY, "BLOCKS": blocks, "num_warps": 4}
    more: dict[str, Any] = {"FILTERED": filters is not None, "BITS": 16 if logits.dtype == torch.bfloat16 else 32}
    more["PADDED"] = triton.next_power_of_2(blocks)
    if filters is not None:
        _filter_kernel[(rows,)](
            logits, temperature, *filters, *ends, size, BITS=more["BITS"], B=2 * _VOCABULARY, num_warps=32
        )
    _highest_kernel[(rows, blocks)](logits, highest, place, size, **shape)
    _mass_kernel[(rows, blocks)](logits, highest, temperature, min_p, *ends, *mass, size, **shape, **more)
    _choose_kernel[(rows,)](
        logits, highest, place, *mass, temperature, min_p, *ends, u, tokens, logprobs, size, **shape, **more
    )


@triton.jit
def _advance_kernel(
    tokens, logprobs, ids, positions, slots, lengths, tables, turn, numbers, u, said, scores, rows, most_blocks,
    R: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """What was chosen is the next step's input."""
    r = tl.arange(0, R)
    here = r < rows
    now = tl.load(turn)
    token = tl.load(tokens + r, here, other=0)
    tl.store(ids + r, token.to(tl.int32), here)
    tl.store(said + now * rows + r, token.to(tl.int32), here)
    tl.store(scores + now * rows + r, tl.load(logprobs + r, here, other=0.0), here)
    position = tl.load(positions + r, here, other=0) + 1
    tl.store(positions + r, position, here)
    tl.store(lengths + r, position + 1, here)
    page = tl.load(tables + r * most_blocks + position // PAGE, here & (position // PAGE < most_blocks), other=0)
    tl.store(slots + r, page * PAGE + position % PAGE, here)
    tl.store(u + r, tl.load(numbers + (now + 1) * rows + r, here, other=0.0), here)
    tl.debug_barrier()
    tl.store(turn, now + 1)


def advance(
    chosen: tuple[Tensor, Tensor],
    ids: Tensor,
    places: list[Tensor],
    turn: Tensor,
    numbers: Tensor,
    u: Tensor,
    out: tuple[Tensor, Tensor],
) -> None:
    """chosen: tokens and log-probabilities (rows,), written to row `turn` of out, two tensors (turns, rows), and made
    the input of the next step: ids, positions, slots and lengths move on by one, u takes the next row of numbers
    (turns + 1, rows)."""
    positions, slots, _, lengths, tables = places
    rows = ids.shape[0]
    _advance_kernel[(1,)](
        *chosen, ids, positions, slots, lengths, tables, turn, numbers, u, *out, rows, tables.shape[1],
        R=triton.next_power_of_2(rows), PAGE=BLOCK, num_warps=4,
    )  # fmt: skip
