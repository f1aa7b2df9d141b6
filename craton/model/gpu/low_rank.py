"""Low-rank adapters beside a layer's product, each row with its own: y += b (a x)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 128


@triton.jit
def _down_kernel(x, a, which, out, k_size, R: tl.constexpr, K: tl.constexpr):
    row, r, k = tl.program_id(0).to(tl.int64), tl.arange(0, R), tl.arange(0, K)
    number = tl.load(which + row).to(tl.int64)
    acc = tl.zeros([R, K], tl.float32)
    if number >= 0:
        for at in range(0, k_size, K):
            here = at + k < k_size
            v = tl.load(x + row * k_size + at + k, here, other=0.0).to(tl.float32)
            place = a + (number * R + r[:, None]) * k_size + at + k[None, :]
            acc += tl.load(place, here[None, :], other=0.0).to(tl.float32) * v[None, :]
    tl.store(out + row * R + r, tl.sum(acc, 1))


@triton.jit
def _up_kernel(low, b, which, y, size, stride, R: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n, r = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, R)
    number = tl.load(which + row).to(tl.int64)
    if number >= 0:
        here = n < size
        weight = tl.load(b + (number * size + n[:, None]) * R + r[None, :], here[:, None], other=0.0).to(tl.float32)
        added = tl.sum(weight * tl.load(low + row * R + r)[None, :], 1)
        place = y + row * stride + n
        tl.store(place, (tl.load(place, here, other=0.0).to(tl.float32) + added).to(y.dtype.element_ty), here)


def add_low_rank(x: Tensor, a: Tensor, b: Tensor, which: Tensor, y: Tensor) -> None:
    """y (rows, n), whose rows may lie apart, plus b[w] a[w] x, w which (rows,) says; below 0: nothing. x (rows, k),
    contiguous; a (adapters, rank, k), b (adapters, n, rank), contiguous, rank a power of two, with the scale."""
    rows, k = x.shape
    rank, size = a.shape[1], b.shape[1]
    low = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    _down_kernel[(rows,)](x, a, which, low, k, R=rank, K=128, num_warps=4)
    blocks = triton.cdiv(size, _COLUMNS)
    _up_kernel[(rows, blocks)](low, b, which, y, size, y.stride(0), R=rank, N=_COLUMNS, num_warps=4)
