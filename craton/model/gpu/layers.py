"""Products of a few rows, norms, activations, rotation.

One answer alone is all about reading matrices: everything around a product (residual, norm, activation) happens on the
way. Measured on one H200, what a program does before its first load, or between loads, costs more than it computes.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as hopper

from craton.model.paging import BLOCK

# Outputs and columns that a program of `one_row` has at once, and its warps; of a gated product half as many outputs of
# each matrix. Measured on one H200; (4, 256, 1) needs no shared memory, and was not tried there.
ROW = (8, 512, 4)
_NONE, _SILU, _GELU = 0, 1, 2
ACTIVATIONS = {"": _NONE, "silu": _SILU, "gelu_pytorch_tanh": _GELU}


@lru_cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it ends (programmatic dependent launch, from Hopper on). What it
    does before `gdc_wait` must not read what that one writes."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch(x: Tensor) -> dict[str, bool]:
    early = overlaps(x.device)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def activation(x, KIND: tl.constexpr):
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
        y = activation(y.to(dtype).to(tl.float32), GATE).to(dtype).to(tl.float32) * z.to(dtype).to(tl.float32)
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
    outputs, columns, warps = ROW
    n_tile = outputs // 2 if gate else outputs
    if not gate and any(s % n_tile for s in sizes[: len(weights) - 1]):
        raise ValueError(f"weights of {sizes} rows, must be multiples of {n_tile} but for the last one")
    w = [*weights, weights[0], weights[0]][:3]
    b = [x] * 3 if biases is None else [*biases, biases[0], biases[0]][:3]
    blocks = triton.cdiv(sizes[0] if gate else sum(sizes), n_tile)
    _one_row_kernel[(blocks, rows)](
        x, x if delta is None else delta, x if norm is None else norm, x if total is None else total, *w, *b, out,
        k, *sizes, eps, WITH_DELTA=delta is not None, WITH_NORM=norm is not None, OFFSET=offset,
        WITH_BIAS=biases is not None, GATE=ACTIVATIONS[gate], N=n_tile, K=min(columns, triton.next_power_of_2(k)),
        num_warps=warps, **launch(x),
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
    tl.store(out + at, (activation(gate, KIND).to(dtype).to(tl.float32) * up).to(dtype), here)


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
        PAGE=BLOCK, num_warps=1, **launch(qkv),
    )  # fmt: skip
