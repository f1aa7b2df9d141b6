"""Kernels for GPUs in Triton, each with the meaning that plain.py gives it. Under TRITON_INTERPRET=1 they run on a CPU,
slowly, which is how tests hold them against that.

One answer alone is all about reading matrices: everything around a product (residual, norm, activation) happens on the
way. Measured on one H200, what a program does before its first load, or between loads, costs more than it computes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as hopper

from craton.model.paging import BLOCK

_MOST_CHUNKS = 64  # whose results are held at once
CHUNK = 64  # keys that one program attends to; results of several are joined
_NONE, _SILU, _GELU = 0, 1, 2
ACTIVATIONS = {"": _NONE, "silu": _SILU, "gelu_pytorch_tanh": _GELU}


@lru_cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it ends (programmatic dependent launch, from Hopper on). What it
    does before `gdc_wait` must not read what that one writes."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _launch(x: Tensor) -> dict[str, bool]:
    early = _overlaps(x.device)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def _activation(x, KIND: tl.constexpr):
    if KIND == 1:
        return x / (1 + tl.exp(-x))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1 + tl.exp(-2 * inner))  # x / 2 (1 + tanh)


@triton.jit
def _one_row_kernel(
    x, delta, norm, total, w0, w1, w2, b0, b1, b2, out, k_size, n0, n1, n2, eps,
    WITH_DELTA: tl.constexpr, WITH_NORM: tl.constexpr, OFFSET: tl.constexpr, WITH_BIAS: tl.constexpr,
    GATE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out = norm(x + delta) times each weight transposed, side by side; or, gated, act(first) * second."""
    block, row, k = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, K)
    dtype = x.dtype.element_ty
    at_n = block * N
    w, bias, own, width = w0, b0, at_n, n0
    if GATE == 0:
        if at_n >= n0 + n1:
            w, bias, own, width = w2, b2, at_n - n0 - n1, n2
        elif at_n >= n0:
            w, bias, own, width = w1, b1, at_n - n0, n1
    n = own + tl.arange(0, N)
    inside = n < width
    first = tl.zeros([N, K], tl.float32)
    second = tl.zeros([N, K], tl.float32)
    squares = tl.zeros([K], tl.float32)
    place_w = n[:, None].to(tl.int64) * k_size + k[None, :]
    both = inside[:, None] & (k < k_size)[None, :]
    m = tl.load(w + place_w, both, other=0.0)  # ahead of what uses it, and of the kernel before
    m1 = tl.load(w1 + place_w, both, other=0.0) if GATE != 0 else m
    if EARLY:
        hopper.gdc_wait()
        hopper.gdc_launch_dependents()
    for at in range(0, k_size, K):
        good = at + k < k_size
        v = tl.load(x + row * k_size + at + k, good, other=0.0).to(tl.float32)
        if WITH_NORM:
            if WITH_DELTA:
                v = (
                    (v + tl.load(delta + row * k_size + at + k, good, other=0.0).to(tl.float32))
                    .to(dtype)
                    .to(tl.float32)
                )
            if block == 0:
                tl.store(total + row * k_size + at + k, v.to(dtype), good)
            squares += v * v
            g = tl.load(norm + at + k, good, other=0.0).to(tl.float32)
            if OFFSET:
                g += 1
            v = v * g  # its length is divided out at the end
        ahead = inside[:, None] & (at + K + k < k_size)[None, :]
        next_m = tl.load(w + place_w + at + K, ahead, other=0.0)
        first += m.to(tl.float32) * v[None, :]
        m = next_m
        if GATE != 0:
            next_m = tl.load(w1 + place_w + at + K, ahead, other=0.0)
            second += m1.to(tl.float32) * v[None, :]
            m1 = next_m
    scale = tl.rsqrt(tl.sum(squares, 0) / k_size + eps) if WITH_NORM else 1.0
    y = tl.sum(first, 1) * scale
    if WITH_BIAS:
        y += tl.load(bias + n, inside, other=0.0).to(tl.float32)
    place = out + row * (n0 + n1 + n2) + (at_n - own) + n
    if GATE != 0:
        z = tl.sum(second, 1) * scale
        if WITH_BIAS:
            z += tl.load(b1 + n, inside, other=0.0).to(tl.float32)
        y = _activation(y.to(dtype).to(tl.float32), GATE).to(dtype).to(tl.float32) * z.to(dtype).to(tl.float32)
        place = out + row * n0 + n
    tl.store(place, y.to(out.dtype.element_ty), inside)


def one_row(
    x: Tensor,
    weights: Sequence[Tensor],
    out: Tensor,
    *,
    biases: Sequence[Tensor] | None = None,
    delta: Tensor | None = None,
    norm: Tensor | None = None,
    total: Tensor | None = None,
    eps: float = 0.0,
    offset: bool = False,
    gate: str = "",
) -> None:
    """x (rows, k) times up to three weights (n_i, k) transposed, side by side, into out (rows, sum of n_i). With a
    norm, of RMSNorm(x + delta) * norm (offset: 1 + norm), and the sum goes into total (rows, k). With a gate's name
    there are two weights, and out (rows, n) is act(first) * second. For a row or two: each reads all weights."""
    rows, k = x.shape
    sizes = [w.shape[0] for w in weights] + [0] * (3 - len(weights))
    n_tile = 4 if gate else 8
    if not gate and any(s % n_tile for s in sizes[: len(weights) - 1]):
        raise ValueError(f"weights of {sizes} rows, must be multiples of {n_tile} but for the last one")
    w = [*weights, weights[0], weights[0]][:3]
    b = [x] * 3 if biases is None else [*biases, biases[0], biases[0]][:3]
    blocks = triton.cdiv(sizes[0] if gate else sum(sizes), n_tile)
    _one_row_kernel[(blocks, rows)](
        x, x if delta is None else delta, x if norm is None else norm, x if total is None else total, *w, *b, out,
        k, *sizes, eps, WITH_DELTA=delta is not None, WITH_NORM=norm is not None, OFFSET=offset,
        WITH_BIAS=biases is not None, GATE=ACTIVATIONS[gate], N=n_tile, K=min(512, triton.next_power_of_2(k)),
        num_warps=4, **_launch(x),
    )  # fmt: skip


@triton.jit
def _norm_kernel(
    x, delta, norm, total, out, size, eps, WITH_DELTA: tl.constexpr, OFFSET: tl.constexpr, K: tl.constexpr
):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    here = k < size
    dtype = x.dtype.element_ty
    v = tl.load(x + row * size + k, here, other=0.0).to(tl.float32)
    if WITH_DELTA:
        v = (v + tl.load(delta + row * size + k, here, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(total + row * size + k, v.to(dtype), here)
    scale = tl.rsqrt(tl.sum(v * v, 0) / size + eps)
    g = tl.load(norm + k, here, other=0.0).to(tl.float32)
    if OFFSET:
        g += 1
    tl.store(out + row * size + k, ((v * scale).to(dtype) * g.to(dtype)).to(dtype), here)


def add_rms_norm(
    x: Tensor, delta: Tensor | None, norm: Tensor, total: Tensor, out: Tensor, eps: float, offset: bool = False
) -> None:
    """total = x + delta, and out its RMSNorm times norm (offset: 1 + norm); all (rows, size). total may be x."""
    size = x.shape[1]
    _norm_kernel[(x.shape[0],)](
        x, x if delta is None else delta, norm, total, out, size, eps, WITH_DELTA=delta is not None, OFFSET=offset,
        K=triton.next_power_of_2(size), num_warps=4 if size <= 4096 else 8,
    )  # fmt: skip


@triton.jit
def _gated_kernel(x, out, size, count, KIND: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    here = at < count
    dtype = x.dtype.element_ty
    row, column = at // size, at % size
    gate = tl.load(x + row * 2 * size + column, here, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + column, here, other=0.0).to(tl.float32)
    tl.store(out + at, (_activation(gate, KIND).to(dtype).to(tl.float32) * up).to(dtype), here)


def gated_activation(x: Tensor, act: str, out: Tensor) -> None:
    """x (rows, 2n), gate then up -> act(gate) * up into out (rows, n)."""
    block = 1024
    grid = (triton.cdiv(out.numel(), block),)
    _gated_kernel[grid](x, out, out.shape[1], out.numel(), KIND=ACTIVATIONS[act], B=block)


@triton.jit
def _rope_store_kernel(
    qkv, q_norm, k_norm, cos, sin, positions, slots, q_out, keys, values, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WITH_NORM: tl.constexpr,
    OFFSET: tl.constexpr, WITH_ROPE: tl.constexpr, PAGE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        hopper.gdc_wait()
        hopper.gdc_launch_dependents()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    here = i < D // 2
    place = qkv + token * (HEADS + 2 * KV) * D + head * D
    dtype = qkv.dtype.element_ty
    a = tl.load(place + i, here, other=0.0).to(tl.float32)
    b = tl.load(place + D // 2 + i, here, other=0.0).to(tl.float32)
    slot = tl.load(slots + token).to(tl.int64)
    page, offset = slot // PAGE, slot % PAGE
    if head >= HEADS + KV:
        target = values + ((page * KV + head - HEADS - KV) * PAGE + offset) * D
        tl.store(target + i, a.to(values.dtype.element_ty), here)
        tl.store(target + D // 2 + i, b.to(values.dtype.element_ty), here)
    else:
        if WITH_NORM:
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
            weight = q_norm if head < HEADS else k_norm
            ga = tl.load(weight + i, here, other=0.0).to(tl.float32)
            gb = tl.load(weight + D // 2 + i, here, other=0.0).to(tl.float32)
            if OFFSET:
                ga += 1
                gb += 1
            a = ((a * scale).to(dtype) * ga.to(dtype)).to(tl.float32)
            b = ((b * scale).to(dtype) * gb.to(dtype)).to(tl.float32)
        if WITH_ROPE:
            position = tl.load(positions + token).to(tl.int64)
            c = tl.load(cos + position * (D // 2) + i, here, other=0.0)
            s = tl.load(sin + position * (D // 2) + i, here, other=0.0)
            a, b = a * c - b * s, b * c + a * s
        if head < HEADS:
            target = q_out + token * HEADS * D + head * D
            tl.store(target + i, a.to(dtype), here)
            tl.store(target + D // 2 + i, b.to(dtype), here)
        else:
            target = keys + (page * KV + head - HEADS) * D * PAGE + offset
            tl.store(target + i * PAGE, a.to(keys.dtype.element_ty), here)
            tl.store(target + (D // 2 + i) * PAGE, b.to(keys.dtype.element_ty), here)


def rope_store(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    rope: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    slots: Tensor,
    pool: tuple[Tensor, Tensor],
    q_out: Tensor,
    *,
    eps: float,
    offset: bool = False,
) -> None:
    """Rows of projections qkv (tokens, (heads + 2 kv_heads) d): q, normed and rotated, into q_out (tokens, heads, d); k
    and v into the pool at the tokens' slots. rope: cos and sin of all positions, (context, d / 2) fp32."""
    tokens, heads, d = q_out.shape
    kv = pool[0].shape[1]
    q_norm, k_norm = norms if norms is not None else (qkv, qkv)
    cos, sin = rope if rope is not None else (qkv, qkv)
    _rope_store_kernel[(tokens, heads + 2 * kv)](
        qkv, q_norm, k_norm, cos, sin, positions, slots, q_out, *pool, eps, HEADS=heads, KV=kv, D=d,
        HALF=triton.next_power_of_2(d // 2), WITH_NORM=norms is not None, OFFSET=offset, WITH_ROPE=rope is not None,
        PAGE=BLOCK, num_warps=1, **_launch(qkv),
    )  # fmt: skip


# ---- attention over the paged cache -------------------------------------------------------------------------------


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
        CAPPED=softcap is not None, PAGE=BLOCK, num_warps=4, num_stages=1, **_launch(q),
    )  # fmt: skip
    _join_kernel[(sequences, heads)](
        part, lse, lse if sinks is None else sinks, out, chunks, HEADS=heads, E=e, EP=padded["EP"],
        C=min(16, chunks), WITH_SINKS=sinks is not None, num_warps=1 if chunks <= 4 else 4, **_launch(out),
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
        N=64 if small else 32, CAPPED=softcap is not None, WITH_SINKS=sinks is not None, PAGE=BLOCK, num_warps=4,
        num_stages=3 if small else 1,
    )  # fmt: skip


# ---- choosing tokens ----------------------------------------------------------------------------------------------

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
def _mass_kernel(
    logits, highest, temperature, min_p, mass, plain_mass, size, B: tl.constexpr, BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = tl.arange(0, PADDED)
    top = tl.max(tl.load(highest + row * BLOCKS + b, b < BLOCKS, other=float("-inf")), 0).to(tl.float64)
    at = block * B + tl.arange(0, B)
    x = tl.load(logits + row * size + at, at < size, other=float("-inf")).to(tl.float64) - top
    warmth = tl.load(temperature + row).to(tl.float64)
    p = tl.exp(x / tl.where(warmth > 0, warmth, 1.0))
    p = tl.where(p >= tl.load(min_p + row).to(tl.float64), p, 0.0)
    tl.store(mass + row * BLOCKS + block, tl.sum(p, 0))
    tl.store(plain_mass + row * BLOCKS + block, tl.sum(tl.exp(x), 0))


@triton.jit
def _choose_kernel(
    logits, highest, place, mass, plain_mass, temperature, min_p, u, tokens, logprobs, size, B: tl.constexpr,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr,
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
        last = tl.max(tl.where(masses > 0, b, 0), 0)  # block
        block = tl.minimum(tl.min(tl.where(before + masses > wanted, b, PADDED), 0), last)
        start = tl.sum(tl.where(b == block, before, 0.0), 0)
        at = block * B + tl.arange(0, B)
        x = tl.load(logits + row * size + at, at < size, other=float("-inf")).to(tl.float64) - top.to(tl.float64)
        p = tl.exp(x / warmth)
        p = tl.where(p >= tl.load(min_p + row).to(tl.float64), p, 0.0)
        inside = start + tl.cumsum(p, 0) > wanted
        final = tl.max(tl.where(p > 0, at, 0), 0)
        token = tl.minimum(tl.min(tl.where(inside & (p > 0), at, size), 0), final)
    token = tl.minimum(token, size - 1)  # of what is no number too
    tl.store(tokens + row, token.to(tl.int64))
    own = tl.load(logits + row * size + token).to(tl.float64)
    tl.store(logprobs + row, (own - top.to(tl.float64) - tl.log(whole)).to(tl.float32))


def choose_tokens(
    logits: Tensor, temperature: Tensor, min_p: Tensor, u: Tensor, tokens: Tensor, logprobs: Tensor
) -> None:
    """A token for each row of logits (rows, vocabulary) into tokens (rows,) int64, and its log-probability at
    temperature 1 into logprobs (rows,) fp32. As ops.choose_tokens without top_k and top_p, in fp64."""
    rows, size = logits.shape
    blocks = triton.cdiv(size, _VOCABULARY)
    highest = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    place = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    mass = torch.empty(2, rows, blocks, dtype=torch.float64, device=logits.device)
    shape: dict[str, Any] = {"B": _VOCABULARY, "BLOCKS": blocks, "num_warps": 4}
    padded = triton.next_power_of_2(blocks)
    _highest_kernel[(rows, blocks)](logits, highest, place, size, **shape)
    _mass_kernel[(rows, blocks)](logits, highest, temperature, min_p, mass[0], mass[1], size, **shape, PADDED=padded)
    _choose_kernel[(rows,)](
        logits, highest, place, mass[0], mass[1], temperature, min_p, u, tokens, logprobs, size, **shape, PADDED=padded
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


# ---- the loss -----------------------------------------------------------------------------------------------------


@triton.jit
def _cross_entropy_kernel(logits, target, weight, nll, size, softcap, CAPPED: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = logits + row * size
    aim = tl.load(target + row)
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for at in range(0, size, B):
        k = at + tl.arange(0, B)
        x = tl.load(place + k, k < size, other=float("-inf")).to(tl.float32)
        if CAPPED:
            x = tl.where(k < size, softcap * (1 - 2 / (tl.exp(2 * x / softcap) + 1)), float("-inf"))
        new = tl.maximum(most, tl.max(x, 0))
        total = total * tl.exp(most - new) + tl.sum(tl.exp(x - new), 0)
        most = new
    counted = aim >= 0
    own = tl.load(place + tl.where(counted, aim, 0)).to(tl.float32)
    if CAPPED:
        own = softcap * (1 - 2 / (tl.exp(2 * own / softcap) + 1))
    tl.debug_barrier()  # the target's logit is read before it is overwritten
    tl.store(nll + row, tl.where(counted, most + tl.log(total) - own, 0.0))
    factor = tl.where(counted, tl.load(weight + row).to(tl.float32), 0.0)
    for at in range(0, size, B):
        k = at + tl.arange(0, B)
        x = tl.load(place + k, k < size, other=float("-inf")).to(tl.float32)
        slope = tl.full([B], 1.0, tl.float32)
        if CAPPED:
            bounded = 1 - 2 / (tl.exp(2 * x / softcap) + 1)
            slope = 1 - bounded * bounded
            x = softcap * bounded
        p = tl.exp(x - most) / total - tl.where(k == aim, 1.0, 0.0)
        tl.store(place + k, (p * slope * factor).to(logits.dtype.element_ty), k < size)


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """Products (rows, vocabulary) become, in their place, the gradient of weight times the negative log likelihood of
    target (rows,), which is returned (rows,) fp32; negative targets count nothing. softcap bounds the logits by a
    tanh."""
    rows, size = logits.shape
    target, weight = target.contiguous(), weight.contiguous()  # a sum's gradient is one number, seen many times
    nll = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(rows,)](
        logits, target, weight, nll, size, softcap or 1.0, CAPPED=softcap is not None,
        B=min(8192, triton.next_power_of_2(size)), num_warps=8,
    )  # fmt: skip
    return nll


# ---- the optimizer ------------------------------------------------------------------------------------------------


@triton.jit
def _nesterov_kernel(momenta, gradients, out, size, mu, B: tl.constexpr):
    which, at = tl.program_id(1), tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    here = at < size
    m = tl.load(momenta + which).to(tl.pointer_type(tl.float32)) + at
    g = tl.load(tl.load(gradients + which).to(tl.pointer_type(tl.float32)) + at, here, other=0.0)
    moved = tl.load(m, here, other=0.0) * mu + g * (1 - mu)
    tl.store(m, moved, here)
    tl.store(out + which.to(tl.int64) * size + at, (g * (1 - mu) + moved * mu).to(out.dtype.element_ty), here)


@triton.jit
def _muon_update_kernel(weights, updates, size, decay, rate, B: tl.constexpr):
    which, at = tl.program_id(1), tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    here = at < size
    place = tl.load(weights + which).to(tl.pointer_type(tl.float32)) + at
    w = tl.load(place, here, other=0.0)
    u = tl.load(updates + which.to(tl.int64) * size + at, here, other=0.0).to(tl.float32)
    tl.store(place, w * tl.where(u * w >= 0, 1 - decay, 1.0) - u * rate, here)


def _addresses(tensors: list[Tensor]) -> Tensor:
    """Where contiguous fp32 tensors lie, for kernels that take many."""
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in tensors):
        raise ValueError("takes contiguous fp32 tensors")
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64).to(tensors[0].device, non_blocking=True)


def nesterov(momenta: list[Tensor], gradients: list[Tensor], mu: float, dtype: torch.dtype) -> Tensor:
    """Momenta move on by their gradients, all of one shape; the Nesterov updates as a stack in dtype."""
    out = torch.empty(len(momenta), *momenta[0].shape, dtype=dtype, device=momenta[0].device)
    size = momenta[0].numel()
    grid = (triton.cdiv(size, 1024), len(momenta))
    _nesterov_kernel[grid](_addresses(momenta), _addresses(gradients), out, size, mu, B=1024)
    return out


def muon_update(weights: list[Tensor], updates: Tensor, decay: float, rate: float) -> None:
    """weights, all of one shape, less rate times updates (a stack), and less decay of themselves where both have one
    sign."""
    if not updates.is_contiguous():
        raise ValueError("takes contiguous updates")
    size = weights[0].numel()
    grid = (triton.cdiv(size, 1024), len(weights))
    _muon_update_kernel[grid](_addresses(weights), updates, size, decay, rate, B=1024)
