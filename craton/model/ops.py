"""The decoder's operations, each with one meaning and two executions.

fp32 on a CPU with the compiled kernels: one fused pass each, with a hand-written backward. Everywhere else: plain
PyTorch, which torch.compile fuses on GPUs. tests/model/test_ops.py holds the two against each other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from craton.model import kernels


def _native(x: Tensor) -> Any:
    """The kernels when they apply to x, else None."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    return kernels.load()


def _library() -> Any:
    """The kernels, which `_native` has found."""
    return kernels.load()


def _ptr(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# ---- linear -----------------------------------------------------------------------------------------------------


def matmul_t(x: Tensor, w: Tensor) -> Tensor:
    """x (m, k) times w (n, k) transposed: (m, n). The fastest product for fp32 on this CPU, no gradient."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and kernels.prefer_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return x @ w.t()


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy (m, n), x (m, k) -> (n, k). oneDNN is quicker with the longer side as its columns."""
    if dy.shape[1] > x.shape[1]:
        return matmul_t(x.t(), dy.t()).t()
    return matmul_t(dy.t(), x.t())


class _Linear(torch.autograd.Function):
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


def linear(x: Tensor, *ws: Tensor) -> Tensor:
    """x (..., k) times each w (n_i, k) transposed, side by side -> (..., sum of n_i)."""
    if len(ws) > 1 and x.numel() < 64 * x.shape[-1]:  # few rows: joining the weights would cost more than it saves
        return torch.cat([linear(x, w) for w in ws], -1)
    w = ws[0] if len(ws) == 1 else torch.cat(ws)
    if x.device.type == "cpu" and x.dtype == torch.float32 and w.dtype == torch.float32 and kernels.prefer_onednn() and not torch.compiler.is_compiling():
        return _Linear.apply(x, w)
    return F.linear(x, w)


# ---- RMSNorm, with the residual addition before it ---------------------------------------------------------------


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, n = x.contiguous(), x.shape[-1]
        delta = None if delta is None else delta.contiguous()
        rows = x.numel() // n
        y, rstd = torch.empty_like(x), x.new_empty(rows)
        total = x if delta is None else torch.empty_like(x)
        _library().add_rms_norm_forward(_ptr(x), _ptr(delta), _ptr(w), _ptr(total), _ptr(y), _ptr(rstd), rows, n, eps)
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
        _library().rms_norm_backward(
            _ptr(dy), _ptr(total), _ptr(w), _ptr(rstd), _ptr(dtotal), _ptr(dx), _ptr(dw), total.numel() // n, n
        )
        return dx, dx if ctx.has_delta else None, dw, None


def add_rms_norm(x: Tensor, delta: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, RMSNorm(x + delta) * w) over the last dimension; delta None adds nothing. arXiv 1910.07467.

    The norm is computed in fp32 and rounded before the weight, as the published Llama and Qwen code does.
    """
    if _native(x):
        return _AddRMSNorm.apply(x, delta, w, eps)
    total = x if delta is None else x + delta
    wide = total.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, y.to(x.dtype) * w.to(x.dtype)


# ---- RMSNorm of heads, then rotary position embedding ------------------------------------------------------------


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/head_dim), each (time, head_dim / 2), fp32. arXiv 2104.09864."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angle = positions.float()[:, None] * (1.0 / theta**exponent)[None, :]
    return angle.cos(), angle.sin()


class _SplitNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wq: Tensor | None, wk: Tensor | None, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        batch, time, d = x.shape[0], x.shape[1], x.shape[2] // (heads + 2 * kv_heads)
        q, k = x.new_empty(batch, time, heads, d), x.new_empty(batch, time, kv_heads, d)
        v, rstd = torch.empty_like(k), x.new_empty(batch * time * (heads + kv_heads))
        _library().split_norm_rope_forward(
            _ptr(x), _ptr(wq), _ptr(wk), _ptr(cos), _ptr(sin), _ptr(q), _ptr(k), _ptr(v), _ptr(rstd),
            batch * time, heads, kv_heads, d, time, eps,
        )  # fmt: skip
        ctx.save_for_backward(x, wq, wk, cos, sin, rstd)
        ctx.heads = heads, kv_heads, d
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, wq, wk, cos, sin, rstd = ctx.saved_tensors
        dq, dk, dv, dx = dq.contiguous(), dk.contiguous(), dv.contiguous(), torch.empty_like(x)
        dwq, dwk = None if wq is None else torch.empty_like(wq), None if wk is None else torch.empty_like(wk)
        heads, kv_heads, d = ctx.heads
        _library().split_norm_rope_backward(
            _ptr(dq), _ptr(dk), _ptr(dv), _ptr(x), _ptr(wq), _ptr(wk), _ptr(cos), _ptr(sin), _ptr(rstd), _ptr(dx),
            _ptr(dwq), _ptr(dwk), x.shape[0] * x.shape[1], heads, kv_heads, d, x.shape[1],
        )  # fmt: skip
        return dx, dwq, dwk, None, None, None, None, None


def norm_rope(x: Tensor, w: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x (batch, time, heads, d): RMSNorm over d with weight w (None: no norm, arXiv 2302.05442 for QK-norm), then the
    halves (x1, x2) rotated by position. cos, sin: (time, d / 2)."""
    if w is not None:
        x = add_rms_norm(x, None, w, eps)[1]
    a, b = x.chunk(2, -1)
    c, s = cos.to(x.dtype)[None, :, None, :], sin.to(x.dtype)[None, :, None, :]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def split_norm_rope(
    x: Tensor, wq: Tensor | None, wk: Tensor | None, rope: tuple[Tensor, Tensor], heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (batch, time, (heads + 2 kv_heads) d), each row its q, k and v heads -> q (batch, time, heads, d), k and v
    (batch, time, kv_heads, d), with norm_rope on q and k."""
    d = x.shape[-1] // (heads + 2 * kv_heads)
    if _native(x) and d % 16 == 0 and d <= 1024:
        return _SplitNormRope.apply(x, wq, wk, *rope, heads, kv_heads, eps)
    q, k, v = x.unflatten(-1, (-1, d)).split([heads, kv_heads, kv_heads], 2)
    return norm_rope(q, wq, *rope, eps), norm_rope(k, wk, *rope, eps), v


# ---- SwiGLU ------------------------------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _library().swiglu_forward(_ptr(x), _ptr(y), x.numel() // x.shape[-1], y.shape[-1])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        _library().swiglu_backward(_ptr(dy), _ptr(x), _ptr(dx), x.numel() // x.shape[-1], dy.shape[-1])
        return dx


def swiglu(x: Tensor) -> Tensor:
    """x (..., 2n), gate then up -> silu(gate) * up: (..., n). arXiv 2002.05202."""
    if _native(x) and x.shape[-1] % 32 == 0:
        return _SwiGLU.apply(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


# ---- attention ---------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (batch, time, heads, d), kv_heads = q.shape, k.shape[2]
        o, lse = torch.empty_like(q), q.new_empty(batch, heads, time)
        _library().attention_forward(
            _ptr(q), _ptr(k), _ptr(v), _ptr(start), _ptr(o), _ptr(lse), batch, time, heads, kv_heads, d, d**-0.5
        )
        ctx.save_for_backward(q, k, v, o, lse, start)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, start = ctx.saved_tensors
        (batch, time, heads, d), kv_heads, do = q.shape, k.shape[2], do.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _library().attention_backward(
            _ptr(do), _ptr(q), _ptr(k), _ptr(v), _ptr(o), _ptr(lse), _ptr(start), _ptr(dq), _ptr(dk), _ptr(dv),
            batch, time, heads, kv_heads, d, d**-0.5,
        )  # fmt: skip
        return dq, dk, dv, None


def attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention: q (batch, time, heads, d), k and v (batch, keys, kv_heads, d) -> like q.

    Queries are the last `time` of the `keys` positions (keys > time: earlier ones come from a cache). start
    (batch, time), int32, non-decreasing: the first position that each query may see, its document's (None: all).
    """
    time, keys, d = q.shape[1], k.shape[1], q.shape[3]
    if _native(q) and d % 16 == 0 and time == keys and time > 1:
        return _Attention.apply(q, k, v, start)
    mask = None
    if start is not None or 1 < time < keys:
        at = torch.arange(keys - time, keys, device=q.device)
        key = torch.arange(keys, device=q.device)
        mask = (key[None, :] <= at[:, None])[None, None]
        if start is not None:
            mask = mask & (key >= start[:, None, :, None])
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask,
        is_causal=mask is None and time > 1, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return o.transpose(1, 2)


# ---- head and loss -----------------------------------------------------------------------------------------------

_LOGIT_BYTES = 32 << 20  # logits held at once


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, _LOGIT_BYTES // (4 * w.shape[0]))
        want_x, want_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        dx = torch.empty_like(x) if want_x else None
        dw = None
        loss = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        for at in range(0, x.shape[0], rows):
            part = slice(at, at + rows)
            logits = matmul_t(x[part], w)
            if (native := _native(logits)) is not None:
                logits = logits.contiguous()
                t, k, piece = target[part].contiguous(), weight[part].contiguous(), loss[part]
                native.cross_entropy(_ptr(logits), _ptr(t), _ptr(k), _ptr(piece), logits.shape[0], logits.shape[1])
            else:
                log_p = torch.log_softmax(logits.float(), -1)
                loss[part] = F.nll_loss(log_p, target[part], reduction="none")
                grad = log_p.exp_()
                grad.scatter_add_(1, target[part, None], -torch.ones_like(grad[:, :1]))
                logits = (grad * weight[part, None]).to(x.dtype)
            if dx is not None:
                dx[part] = matmul_t(logits, w.t())
            if want_w:
                piece_w = weight_gradient(logits, x[part])
                dw = piece_w if dw is None else dw.add_(piece_w)
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(loss)
        return (loss * weight).sum(), loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return None if dx is None else dx * scale, None if dw is None else dw * scale, None, None


def linear_cross_entropy(x: Tensor, w: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the head w (vocabulary, k) on x (rows, k), logits made and turned into gradients a slice at a time.

    Returns the scalar sum of weight * nll, and nll (rows,) in nats, which carries no gradient.
    """
    return _LinearCrossEntropy.apply(x, w, target, weight)
