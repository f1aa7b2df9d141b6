"""How the operations run on CPUs: fp32 by the compiled kernels, one fused pass each with a hand-written backward.

What the kernels do not cover (other types, tensors that only stand for others while something is traced) is left to
plain.py. Inside `batch_invariant` products go through the engine's kernels, row by row.
"""

from typing import Any

import torch
from torch import Tensor, nn

from craton.model import kernels, modes, native, plain
from craton.model.plain import Maybe, Pair


def register(library: torch.library.Library) -> None:
    """Make these the executions of their operations on CPUs, with and without gradients."""
    differentiable: Any = (matmul_t, linear, linear_heads, add_rms_norm, split_norm_rope, gated_activation, attention)
    for function in (*differentiable, paged_attention, choose_tokens):
        library.impl(function.__name__, function, "CPU")
    for function in differentiable:
        library.impl(function.__name__, function, "AutogradCPU")


def _real(x: Tensor) -> bool:
    """Whether x is fp32 in memory, not a tensor of a tracing compiler."""
    return x.dtype == torch.float32 and type(x) in (Tensor, nn.Parameter)


def _training(x: Tensor) -> Any:
    """The training kernels where they apply to x, else None."""
    return kernels.training_kernels() if _real(x) else None


def _engine(x: Tensor) -> Any:
    """The engine's kernels where rows of x must not depend on each other, else None."""
    wanted = modes.is_batch_invariant() and not torch.is_grad_enabled() and _real(x)
    return kernels.engine_kernels() if wanted else None


def _ptr(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# ---- products ---------------------------------------------------------------------------------------------------


def matmul_t(x: Tensor, w: Tensor) -> Tensor:
    wanted = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    if _real(x) and kernels.prefer_onednn() and not wanted:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return x @ w.t()


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy (m, n), x (m, k) -> (n, k). oneDNN is quicker with the longer side as its columns."""
    if dy.shape[1] > x.shape[1]:
        return matmul_t(x.t(), dy.t()).t()
    return matmul_t(dy.t(), x.t())


class _Linear(torch.autograd.Function):
    """A product by oneDNN, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return matmul_t(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = matmul_t(rows, w.t()).view_as(x) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(rows, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return dx, dw


def linear(x: Tensor, ws: list[Tensor]) -> Tensor:
    if (library := _engine(x)) is not None:
        parts = [native.linear(library, x, w) for w in ws]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if not (_real(x) and _real(ws[0]) and kernels.prefer_onednn()):
        return plain.linear(x, ws)
    if len(ws) > 1 and x.numel() < 64 * x.shape[-1]:  # few rows: joining the weights would cost more than it saves
        return torch.cat([_Linear.apply(x, w) for w in ws], -1)
    return _Linear.apply(x, ws[0] if len(ws) == 1 else torch.cat(ws))


def linear_heads(x: Tensor, w: Tensor) -> Tensor:
    if (library := _engine(x)) is not None:
        return torch.stack([native.linear(library, x[:, :, h], w[h]) for h in range(w.shape[0])], 2)
    return plain.linear_heads(x, w)


# ---- RMSNorm, with the residual addition before it ----------------------------------------------------------------


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Maybe, w: Tensor, eps: float) -> Pair:
        x, n = x.contiguous(), x.shape[-1]
        delta = None if delta is None else delta.contiguous()
        rows = x.numel() // n
        y, rstd = torch.empty_like(x), x.new_empty(rows)
        total = x if delta is None else torch.empty_like(x)
        places = map(_ptr, (x, delta, w, total, y, rstd))
        kernels.training_kernels().add_rms_norm_forward(*places, rows, n, eps)
        ctx.save_for_backward(total, w, rstd)
        ctx.has_delta = delta is not None
        ctx.set_materialize_grads(False)
        return (total.view_as(x) if delta is None else total), y

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        total, w, rstd = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal if ctx.has_delta else None, None, None
        dy, n = dy.contiguous(), total.shape[-1]
        dtotal = None if dtotal is None else dtotal.contiguous()
        dx, dw = torch.empty_like(total), torch.empty_like(w)
        places = map(_ptr, (dy, total, w, rstd, dtotal, dx, dw))
        kernels.training_kernels().rms_norm_backward(*places, total.numel() // n, n)
        return dx, dx if ctx.has_delta else None, dw, None


def add_rms_norm(x: Tensor, delta: Maybe, w: Tensor, eps: float) -> Pair:
    if _training(x) is None:
        return plain.add_rms_norm(x, delta, w, eps)
    return _AddRMSNorm.apply(x, delta, w, eps)


# ---- RMSNorm of heads, then rotary position embedding -------------------------------------------------------------


class _SplitNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wq: Tensor | None, wk: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin, heads, kv_heads, eps = rest
        x = x.contiguous()
        batch, time, d = x.shape[0], x.shape[1], x.shape[2] // (heads + 2 * kv_heads)
        q, k = x.new_empty(batch, time, heads, d), x.new_empty(batch, time, kv_heads, d)
        v, rstd = torch.empty_like(k), x.new_empty(batch * time * (heads + kv_heads))
        places = map(_ptr, (x, wq, wk, cos, sin, q, k, v, rstd))
        kernels.training_kernels().split_norm_rope_forward(*places, batch * time, heads, kv_heads, d, time, eps)
        ctx.save_for_backward(x, wq, wk, cos, sin, rstd)
        ctx.heads = heads, kv_heads, d
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, wq, wk, cos, sin, rstd = ctx.saved_tensors
        dq, dk, dv, dx = dq.contiguous(), dk.contiguous(), dv.contiguous(), torch.empty_like(x)
        dwq, dwk = None if wq is None else torch.empty_like(wq), None if wk is None else torch.empty_like(wk)
        places = map(_ptr, (dq, dk, dv, x, wq, wk, cos, sin, rstd, dx, dwq, dwk))
        kernels.training_kernels().split_norm_rope_backward(*places, x.shape[0] * x.shape[1], *ctx.heads, x.shape[1])
        return dx, dwq, dwk, None, None, None, None, None


def split_norm_rope(
    x: Tensor, wq: Maybe, wk: Maybe, cos: Maybe, sin: Maybe, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[-1] // (heads + 2 * kv_heads)
    if _training(x) is None or cos is None or d % 16 or d > 1024:
        return plain.split_norm_rope(x, wq, wk, cos, sin, heads, kv_heads, eps)
    return _SplitNormRope.apply(x, wq, wk, cos, sin, heads, kv_heads, eps)


# ---- SwiGLU -------------------------------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        kernels.training_kernels().swiglu_forward(_ptr(x), _ptr(y), x.numel() // x.shape[-1], y.shape[-1])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        rows = x.numel() // x.shape[-1]
        kernels.training_kernels().swiglu_backward(_ptr(dy), _ptr(x), _ptr(dx), rows, dy.shape[-1])
        return dx


def gated_activation(x: Tensor, act: str) -> Tensor:
    if act == "silu" and x.shape[-1] % 32 == 0 and x.numel() and _training(x) is not None:
        return _SwiGLU.apply(x)
    return plain.gated_activation(x, act)


# ---- attention ----------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (batch, time, heads, d), kv_heads = q.shape, k.shape[2]
        o, lse = torch.empty_like(q), q.new_empty(batch, heads, time)
        places = map(_ptr, (q, k, v, first_key, o, lse))
        kernels.training_kernels().attention_forward(*places, batch, time, heads, kv_heads, d, scale)
        ctx.save_for_backward(q, k, v, o, lse, first_key)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, first_key = ctx.saved_tensors
        (batch, time, heads, d), kv_heads, do = q.shape, k.shape[2], do.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        places = map(_ptr, (do, q, k, v, o, lse, first_key, dq, dk, dv))
        kernels.training_kernels().attention_backward(*places, batch, time, heads, kv_heads, d, ctx.scale)
        return dq, dk, dv, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, first_key: Maybe, sinks: Maybe, scale: float, softcap: float | None, causal: bool
) -> Tensor:
    time, d = q.shape[1], q.shape[3]
    fits = d % 16 == 0 and v.shape[3] == d and time > 1 and causal and softcap is None and sinks is None
    if not fits or modes.observer() is not None or _training(q) is None:
        return plain.attention(q, k, v, first_key, sinks, scale, softcap, causal)
    return _Attention.apply(q, k, v, first_key, scale)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    """rest: as plain.paged_attention takes it."""
    library = kernels.engine_kernels() if _real(q) and v.shape[3] % 16 == 0 and modes.observer() is None else None
    if library is None:
        return plain.paged_attention(q, k, v, keys, values, *rest)
    places, sinks, scale, window, softcap = rest
    assert sinks is None or sinks.dtype == torch.float32
    heads = native.HeadsC(q.shape[2], *k.shape[2:], v.shape[3], window or 0, scale, softcap or 0.0, _ptr(sinks))
    return native.paged_attention(library, q, k, v, keys, values, native.step_of(places), heads)


# ---- choice of tokens ---------------------------------------------------------------------------------------------


def choose_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor
) -> Tensor:
    library = kernels.engine_kernels() if _real(logits) else None
    if library is None:
        return plain.choose_tokens(logits, temperature, top_k, top_p, min_p, u)
    return native.choose_tokens(library, logits, temperature, top_k, top_p, min_p, u)
