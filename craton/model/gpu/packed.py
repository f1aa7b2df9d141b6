"""Products with grouped matrices (grouped.py) on a GPU: 4 and 8 bits are read, and become floats in registers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as hopper

from craton.model.gpu.layers import ACTIVATIONS, activation, launch, overlaps
from craton.model.grouped import GroupedMatrix

MOST_ROWS = 128  # from which on a matrix is written out in 16 bits for the library's product


@triton.jit
def _floats(words, J: tl.constexpr, BITS: tl.constexpr):
    """The J-th number of each word: as the last bits of 2^23 + number, which is quicker than a conversion."""
    number = (words >> (J * BITS)) & ((1 << BITS) - 1)
    return (number | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _halves(pair):
    """The factor, and what is added."""
    low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _row_kernel(
    x, delta, norm, total, words, scales, bias, out, groups, size, eps,
    WITH_DELTA: tl.constexpr, WITH_NORM: tl.constexpr, OFFSET: tl.constexpr, WITH_BIAS: tl.constexpr,
    GATE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out = norm(x + delta) times the matrix transposed; or, gated, act(its first half) * its second. A thread has
    whole groups: numbers times x are added up before their factor is multiplied with. One warp a program: x reaches its
    threads without shared memory."""
    W: tl.constexpr = GROUP * BITS // 32
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k_size = groups * GROUP
    dtype = x.dtype.element_ty
    n, g, i = block * N + tl.arange(0, N), tl.arange(0, G), tl.arange(0, W)
    inside = n < size
    place = n[None, :].to(tl.int64) * groups + g[:, None]
    second_half = size.to(tl.int64) * groups
    first = tl.zeros([G, N, W], tl.float32)
    second = tl.zeros([G, N, W], tl.float32)
    squares = tl.zeros([G, W], tl.float32)
    good = inside[None, :] & (g < groups)[:, None]
    wide = place[:, :, None] * W + i[None, None, :]
    m = tl.load(words + wide, good[:, :, None], other=0)  # ahead of what uses it, and of the kernel before
    m1 = tl.load(words + second_half * W + wide, good[:, :, None], other=0) if GATE != 0 else m
    if EARLY:
        hopper.gdc_wait()
        hopper.gdc_launch_dependents()
    for at in range(0, groups, G):
        here = (at + g) < groups
        good = inside[None, :] & here[:, None]
        factor, low = _halves(tl.load(scales + place + at, good, other=0))
        dot = tl.zeros([G, N, W], tl.float32)
        dot1 = tl.zeros([G, N, W], tl.float32)
        sums = tl.zeros([G, W], tl.float32)
        for j in tl.static_range(32 // BITS):
            k = ((at + g) * GROUP)[:, None] + j * W + i[None, :]
            v = tl.load(x + row * k_size + k, here[:, None], other=0.0).to(tl.float32)
            if WITH_NORM:
                if WITH_DELTA:
                    added = tl.load(delta + row * k_size + k, here[:, None], other=0.0).to(tl.float32)
                    v = (v + added).to(dtype).to(tl.float32)
                if block == 0:
                    tl.store(total + row * k_size + k, v.to(dtype), here[:, None])
                squares += v * v
                weight = tl.load(norm + k, here[:, None], other=0.0).to(tl.float32)
                if OFFSET:
                    weight += 1
                v = v * weight  # its length is divided out at the end
            sums += v
            dot += _floats(m, j, BITS) * v[:, None, :]
            if GATE != 0:
                dot1 += _floats(m1, j, BITS) * v[:, None, :]
        first += factor[:, :, None] * dot + low[:, :, None] * sums[:, None, :]
        if GATE != 0:
            factor, low = _halves(tl.load(scales + second_half + place + at, good, other=0))
            second += factor[:, :, None] * dot1 + low[:, :, None] * sums[:, None, :]
        ahead = (inside[None, :] & (at + G + g < groups)[:, None])[:, :, None]
        m = tl.load(words + wide + (at + G) * W, ahead, other=0)
        if GATE != 0:
            m1 = tl.load(words + second_half * W + wide + (at + G) * W, ahead, other=0)
    scale = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / k_size + eps) if WITH_NORM else 1.0
    y = tl.sum(tl.sum(first, 2), 0) * scale
    if WITH_BIAS:
        y += tl.load(bias + n, inside, other=0.0).to(tl.float32)
    if GATE != 0:
        z = tl.sum(tl.sum(second, 2), 0) * scale
        if WITH_BIAS:
            z += tl.load(bias + size + n, inside, other=0.0).to(tl.float32)
        y = activation(y.to(dtype).to(tl.float32), GATE).to(dtype).to(tl.float32) * z.to(dtype).to(tl.float32)
    tl.store(out + row * size + n, y.to(out.dtype.element_ty), inside)


def packed_row(
    x: Tensor,
    matrix: GroupedMatrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    delta: Tensor | None = None,
    norm: Tensor | None = None,
    total: Tensor | None = None,
    eps: float = 0.0,
    offset: bool = False,
    gate: str = "",
) -> None:
    """As layers.one_row, of one matrix (n, k): x (rows, k) into out (rows, n). With a gate's name the matrix is
    two, one after the other, and out (rows, n / 2)."""
    size = out.shape[1]
    tile = 2 if gate else 4  # more would not fit in registers
    groups = matrix.words.shape[1]
    _row_kernel[(triton.cdiv(size, tile), x.shape[0])](
        x, x if delta is None else delta, x if norm is None else norm, x if total is None else total,
        matrix.words, matrix.scales, x if bias is None else bias, out, groups, size, eps,
        WITH_DELTA=delta is not None, WITH_NORM=norm is not None, OFFSET=offset, WITH_BIAS=bias is not None,
        GATE=ACTIVATIONS[gate], BITS=matrix.bits, GROUP=matrix.group, N=tile,
        G=32, num_warps=1, **launch(x),
    )  # fmt: skip


@triton.jit
def _rows_kernel(
    x, words, scales, bias, out, rows, groups, size, stride, WITH_BIAS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """N outputs of M rows; the numbers at one place of their words, over G groups, are multiplied at once."""
    W: tl.constexpr = GROUP * BITS // 32
    n, r = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * M + tl.arange(0, M)
    g, i, k = tl.arange(0, G), tl.arange(0, W), tl.arange(0, G * W)
    inside, real = n < size, r < rows
    dtype = x.dtype.element_ty
    place = n[:, None].to(tl.int64) * groups + g[None, :]
    acc = tl.zeros([N, M], tl.float32)
    for at in range(0, groups, G):
        good = inside[:, None] & (at + g < groups)[None, :]
        m = tl.load(words + (place + at)[:, :, None] * W + i[None, None, :], good[:, :, None], other=0)
        factor, low = _halves(tl.load(scales + place + at, good, other=0))
        here = at + k // W < groups
        for j in tl.static_range(32 // BITS):
            a = (_floats(m, j, BITS) * factor[:, :, None] + low[:, :, None]).to(dtype)
            column = (at + k // W) * GROUP + j * W + k % W
            source = r[None, :].to(tl.int64) * (groups * GROUP) + column[:, None]
            b = tl.load(x + source, here[:, None] & real[None, :], other=0.0)
            acc += tl.dot(tl.reshape(a, [N, G * W]), b, input_precision="ieee")
    if WITH_BIAS:
        acc += tl.load(bias + n, inside, other=0.0).to(tl.float32)[:, None]
    target = out + r[None, :].to(tl.int64) * stride + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), inside[:, None] & real[None, :])


@triton.jit
def _write_out_kernel(words, scales, out, count, BITS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr):
    W: tl.constexpr = GROUP * BITS // 32
    g, i = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G), tl.arange(0, W)
    here = g < count
    m = tl.load(words + g[:, None] * W + i[None, :], here[:, None], other=0)
    factor, low = _halves(tl.load(scales + g, here, other=0))
    for j in tl.static_range(32 // BITS):
        value = _floats(m, j, BITS) * factor[:, None] + low[:, None]
        tl.store(out + g[:, None] * GROUP + j * W + i[None, :], value.to(out.dtype.element_ty), here[:, None])


def written_out(matrix: GroupedMatrix, dtype: torch.dtype) -> Tensor:
    """The whole matrix (rows, cols)."""
    out = torch.empty(matrix.rows, matrix.cols, dtype=dtype, device=matrix.words.device)
    count = matrix.words.shape[0] * matrix.words.shape[1]
    shape: dict[str, Any] = {"BITS": matrix.bits, "GROUP": matrix.group, "G": 64}
    _write_out_kernel[(triton.cdiv(count, 64),)](matrix.words, matrix.scales, out, count, **shape)
    return out


def packed_rows(x: Tensor, matrix: GroupedMatrix, out: Tensor, bias: Tensor | None = None) -> None:
    """x (rows, k), contiguous, times a matrix (n, k) transposed into out (rows, n), whose rows may lie apart."""
    rows, size = out.shape
    if rows >= MOST_ROWS:
        torch.mm(x, written_out(matrix, x.dtype).t(), out=out)
        if bias is not None:
            out += bias.to(out.dtype)
        return
    tile = min(64, max(16, triton.next_power_of_2(rows)))
    words = matrix.group * matrix.bits // 32
    _rows_kernel[(triton.cdiv(size, 64), triton.cdiv(rows, tile))](
        x, matrix.words, matrix.scales, x if bias is None else bias, out, rows, matrix.words.shape[1], size,
        out.stride(0), WITH_BIAS=bias is not None, BITS=matrix.bits, GROUP=matrix.group, M=tile, N=64, G=64 // words,
        num_warps=4, num_stages=2 if overlaps(x.device) else 1,  # two need 150 KB of shared memory
    )  # fmt: skip
