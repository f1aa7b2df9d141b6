"""Attention over the paged cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as hopper

from craton.model.gpu.layers import launch
from craton.model.paging import BLOCK

_MOST_CHUNKS = 64  # whose results are held at once
CHUNK = 64  # keys that one program attends to; results of several are joined


@triton.jit
def _decode_attention_kernel(
    q, keys, values, lengths, tables, part, lse, most_blocks, chunks, scale, window, softcap,
    HEADS: tl.constexpr, KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, CAPPED: tl.constexpr, PAGE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One new token a sequence; a program attends with one group of heads to one chunk of keys."""
    if EARLY:
        hopper.gdc_wait()
        hopper.gdc_launch_dependents()
    sequence, kv_head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    begin = chunk * SPAN
    first = tl.maximum(length - window, 0)
    g, d, e, j = tl.arange(0, 16), tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, N)
    head = kv_head * G + g
    real = g < G
    dtype = q.dtype.element_ty
    most = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, EP], tl.float32)
    end = tl.minimum(begin + SPAN, length)
    if (end > begin) & (end > first):
        rows = sequence * HEADS * D + head[:, None] * D + d[None, :]
        qs = tl.load(q + rows, real[:, None] & (d < D)[None, :], other=0.0)
        for at in range(begin, end, N):
            key = at + j
            seen = (key < end) & (key >= first)
            page = tl.load(tables + sequence * most_blocks + key // PAGE, key < end, other=0).to(tl.int64)
            base = (page * KV + kv_head) * PAGE
            k_places = base[None, :] * D + d[:, None] * PAGE + (key % PAGE)[None, :]
            ks = tl.load(keys + k_places, seen[None, :] & (d < D)[:, None], other=0.0).to(dtype)
            score = tl.dot(qs, ks, input_precision="ieee") * scale
            if CAPPED:
                score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))
            score = tl.where(seen[None, :], score, float("-inf"))
            new = tl.maximum(most, tl.max(score, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            keep = tl.exp(most - safe)
            p = tl.exp(score - safe[:, None])
            v_places = (base + key % PAGE)[:, None] * E + e[None, :]
            vs = tl.load(values + v_places, seen[:, None] & (e < E)[None, :], other=0.0).to(dtype)
            acc = acc * keep[:, None] + tl.dot(p.to(dtype), vs, input_precision="ieee")
            total = total * keep + tl.sum(p, 1)
            most = new
    where = (sequence * chunks + chunk) * HEADS + head
    tl.store(lse + where, tl.where(total > 0, most + tl.log(total), float("-inf")), real)
    good = real[:, None] & (e < E)[None, :]
    tl.store(part + where[:, None] * E + e[None, :], acc / tl.where(total > 0, total, 1.0)[:, None], good)


@triton.jit
def _join_kernel(
    part, lse, sinks, out, chunks, HEADS: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr,
    WITH_SINKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The chunks' results as one, C at a time."""
    if EARLY:
        hopper.gdc_wait()
        hopper.gdc_launch_dependents()
    sequence, head, e = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, EP)
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([EP], tl.float32)
    for at in range(0, chunks, C):
        c = at + tl.arange(0, C)
        where = (sequence * chunks + c) * HEADS + head
        own = tl.load(lse + where, c < chunks, other=float("-inf"))
        new = tl.maximum(most, tl.max(own, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        keep, weight = tl.exp(most - safe), tl.exp(own - safe)
        used = (weight > 0)[:, None] & (e < E)[None, :]
        values = tl.load(part + where[:, None] * E + e[None, :], used, other=0.0)
        acc = acc * keep + tl.sum(weight[:, None] * values, 0)
        total = total * keep + tl.sum(weight, 0)
        most = new
    if WITH_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        new = tl.maximum(most, sink)
        keep = tl.exp(most - new)
        acc, total = acc * keep, total * keep + tl.exp(sink - new)
    tl.store(out + (sequence * HEADS + head) * E + e, (acc / total).to(out.dtype.element_ty), e < E)


def split_of(length: int) -> tuple[int, int]:
    """Into how many chunks keys of so many positions are cut, a power of two, and how large each is."""
    chunks = triton.next_power_of_2(triton.cdiv(length, CHUNK))
    return min(chunks, _MOST_CHUNKS), CHUNK * max(1, chunks // _MOST_CHUNKS)


def decode_attention(
    q: Tensor,
    pool: tuple[Tensor, Tensor],
    lengths: Tensor,
    tables: Tensor,
    out: Tensor,
    *,
    split: tuple[int, int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """q (sequences, heads, d), one new token each, whose key is in the pool already -> out (sequences, heads, e).
    split: as of split_of, of the longest sequence."""
    (sequences, heads, d), (chunks, span) = q.shape, split
    keys, values = pool
    kv, e = keys.shape[1], values.shape[3]
    if heads // kv > 16:
        raise ValueError(f"{heads} heads for {kv} of keys; at most 16 to 1")
    part = torch.empty(sequences, chunks, heads, e, dtype=torch.float32, device=q.device)
    lse = torch.empty(sequences, chunks, heads, dtype=torch.float32, device=q.device)
    padded = {"DP": max(16, triton.next_power_of_2(d)), "EP": max(16, triton.next_power_of_2(e))}
    _decode_attention_kernel[(sequences, kv, chunks)](
        q, keys, values, lengths, tables, part, lse, tables.shape[1], chunks, scale, window or 1 << 30, softcap or 1.0,
        HEADS=heads, KV=kv, G=heads // kv, D=d, E=e, **padded, N=CHUNK, SPAN=span,
        CAPPED=softcap is not None, PAGE=BLOCK, num_warps=4, num_stages=1, **launch(q),
    )  # fmt: skip
    _join_kernel[(sequences, heads)](
        part, lse, lse if sinks is None else sinks, out, chunks, HEADS=heads, E=e, EP=padded["EP"],
        C=min(16, chunks), WITH_SINKS=sinks is not None, num_warps=1 if chunks <= 4 else 4, **launch(out),
    )  # fmt: skip


@triton.jit
def _prompt_attention_kernel(
    q, keys, values, positions, starts, lengths, tables, tiles, sinks, out, most_blocks, scale, window, softcap,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAPPED: tl.constexpr, WITH_SINKS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Several new tokens a sequence; a program attends with one head of M of them."""
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile).to(tl.int64)
    token = tl.load(tiles + 2 * tile + 1) + tl.arange(0, M)
    valid = token < tl.load(starts + sequence + 1)
    at = tl.load(positions + token, valid, other=-1)
    length = tl.load(lengths + sequence)
    kv_head = head // (HEADS // KV)
    d, e, j = tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, N)
    dtype = q.dtype.element_ty
    rows = token[:, None].to(tl.int64) * HEADS + head
    qs = tl.load(q + rows * D + d[None, :], valid[:, None] & (d < D)[None, :], other=0.0)
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, EP], tl.float32)
    last = tl.max(at, 0)
    lowest = tl.min(tl.where(valid, at, length), 0)
    begin = tl.maximum(lowest - window + 1, 0) // N * N
    for start in range(begin, tl.minimum(last + 1, length), N):
        key = start + j
        inside = key < length
        page = tl.load(tables + sequence * most_blocks + key // PAGE, inside, other=0).to(tl.int64)
        base = (page * KV + kv_head) * PAGE
        k_places = base[None, :] * D + d[:, None] * PAGE + (key % PAGE)[None, :]
        ks = tl.load(keys + k_places, inside[None, :] & (d < D)[:, None], other=0.0).to(dtype)
        score = tl.dot(qs, ks, input_precision="ieee") * scale
        if CAPPED:
            score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))
        seen = (key[None, :] <= at[:, None]) & (key[None, :] > at[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(most, tl.max(score, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp(most - safe)
        p = tl.exp(score - safe[:, None])
        v_places = (base + key % PAGE)[:, None] * E + e[None, :]
        vs = tl.load(values + v_places, inside[:, None] & (e < E)[None, :], other=0.0).to(dtype)
        acc = acc * keep[:, None] + tl.dot(p.to(dtype), vs, input_precision="ieee")
        total = total * keep + tl.sum(p, 1)
        most = new
    if WITH_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        new = tl.maximum(most, sink)
        keep = tl.exp(most - new)
        acc, total = acc * keep[:, None], total * keep + tl.exp(sink - new)
    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + rows * E + e[None, :], o.to(out.dtype.element_ty), valid[:, None] & (e < E)[None, :])


def tiles_of(starts: list[int], size: int) -> list[tuple[int, int]]:
    """(sequence, first token) of each tile of at most `size` new tokens."""
    return [(s, t) for s in range(len(starts) - 1) for t in range(starts[s], starts[s + 1], size)]


TILE = 64  # new tokens that one program attends with


def prompt_attention(
    q: Tensor,
    pool: tuple[Tensor, Tensor],
    places: list[Tensor],
    tiles: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """q (tokens, heads, d), new tokens whose keys are in the pool already -> out (tokens, heads, e). places: as of a
    TokenBatch. tiles: (tiles, 2) int32 of `tiles_of` with TILE."""
    tokens, heads, d = q.shape
    keys, values = pool
    kv, e = keys.shape[1], values.shape[3]
    positions, _, starts, lengths, tables = places
    padded = {"DP": max(16, triton.next_power_of_2(d)), "EP": max(16, triton.next_power_of_2(e))}
    small = q.element_size() == 2 and padded["DP"] <= 128  # what is ahead has room in every card's shared memory
    _prompt_attention_kernel[(tiles.shape[0], heads)](
        q, keys, values, positions, starts, lengths, tables, tiles, q if sinks is None else sinks, out,
        tables.shape[1], scale, window or 1 << 30, softcap or 1.0, HEADS=heads, KV=kv, D=d, E=e, **padded, M=TILE,
        N=64 if small else 32, CAPPED=softcap is not None, WITH_SINKS=sinks is not None, PAGE=BLOCK,
        num_warps=4 if small else 8, num_stages=3 if small else 1,
    )  # fmt: skip
