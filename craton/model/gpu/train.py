"""The loss in the logits' place, and the optimizer's updates of many matrices at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor


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
