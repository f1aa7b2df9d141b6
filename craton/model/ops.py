"""The decoder's operations, each with one meaning and two executions.

fp32 on a CPU with the compiled kernels: one fused pass each, with a hand-written backward. Everywhere else: plain
PyTorch, which torch.compile fuses on GPUs. tests/model/test_ops.py holds the two against each other.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from craton.model import kernels, native


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


_row_by_row = False


@contextlib.contextmanager
def row_by_row() -> Iterator[None]:
    """Products of fp32 rows on a CPU go through the engine's kernels, where a row's result does not depend on the
    other rows. Library products are faster for many rows but sum in an order that depends on how many there are."""
    global _row_by_row
    before, _row_by_row = _row_by_row, True
    try:
        yield
    finally:
        _row_by_row = before


def _serving(x: Tensor) -> Any:
    """The engine's kernels inside row_by_row, where they apply to x, else None."""
    if not _row_by_row or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return None
    return kernels.load_serving()


def exactly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), inside row_by_row by way of fp64: PyTorch's vector and scalar code differ in the last bit, and which
    of them an element meets depends on how many there are."""
    return function(x.double()).to(x.dtype) if _row_by_row else function(x)


def linear(x: Tensor, *ws: Tensor) -> Tensor:
    """x (..., k) times each w (n_i, k) transposed, side by side -> (..., sum of n_i)."""
    if (library := _serving(x)) is not None:
        return (
            torch.cat([native.linear(library, x, w) for w in ws], -1)
            if len(ws) > 1
            else native.linear(library, x, ws[0])
        )
    if len(ws) > 1 and x.numel() < 64 * x.shape[-1]:  # few rows: joining the weights would cost more than it saves
        return torch.cat([linear(x, w) for w in ws], -1)
    w = ws[0] if len(ws) == 1 else torch.cat(ws)
    if (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and w.dtype == torch.float32
        and kernels.prefer_onednn()
        and not torch.compiler.is_compiling()
    ):
        return _Linear.apply(x, w)
    return F.linear(x, w)


def linear_heads(x: Tensor, w: Tensor) -> Tensor:
    """Each head its own matrix: x (batch, time, heads, k), w (heads, n, k) -> (batch, time, heads, n)."""
    if _serving(x) is not None:
        return torch.stack([linear(x[:, :, h], w[h]) for h in range(w.shape[0])], 2)
    return torch.einsum("bthk,hnk->bthn", x, w)


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


def rope_frequencies(dim: int, theta: float, scaling: dict[str, Any] | None, context: int) -> tuple[Tensor, float]:
    """Radians a position of each pair, (dim / 2,) fp32, and the factor on cos and sin. arXiv 2104.09864.

    scaling stretches the context: "linear" (arXiv 2306.15595), "llama3" (arXiv 2407.21783, published code) or "yarn"
    (arXiv 2309.00071), with the published keys.
    """
    base = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if scaling is None:
        return base, 1.0
    kind, factor = scaling["rope_type"], float(scaling["factor"])
    if kind == "linear":
        return base / factor, 1.0
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / base
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        mixed = (1 - smooth) * base / factor + smooth * base
        slow, quick = wavelength > original / low, wavelength < original / high
        return torch.where(slow, base / factor, torch.where(quick, base, mixed)), 1.0
    assert kind == "yarn"

    def turns(rotations: float) -> float:  # the dimension that turns this often over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = turns(scaling.get("beta_fast") or 32), turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = (
            yarn_mscale(factor, mscale) / yarn_mscale(factor, everywhere)
            if mscale and everywhere
            else yarn_mscale(factor, 1.0)
        )
    return base / factor * ramp + base * (1 - ramp), float(attention)


def yarn_mscale(factor: float, weight: float) -> float:
    """How much sharper attention must be over a context stretched by factor. arXiv 2309.00071 section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_table(
    positions: Tensor, dim: int, theta: float, scaling: dict[str, Any] | None = None, context: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, each (time, dim / 2), fp32."""
    frequencies, factor = rope_frequencies(dim, theta, scaling, context)
    angle = positions.float()[:, None] * frequencies.to(positions.device)[None, :]
    return exactly(torch.cos, angle) * factor, exactly(torch.sin, angle) * factor


class _SplitNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wq: Tensor | None,
        wk: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        kv_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        batch, time, d = x.shape[0], x.shape[1], x.shape[2] // (heads + 2 * kv_heads)
        q, k = x.new_empty(batch, time, heads, d), x.new_empty(batch, time, kv_heads, d)
        v, rstd = torch.empty_like(k), x.new_empty(batch * time * (heads + kv_heads))
        _library().split_norm_rope_forward(
            _ptr(x),
            _ptr(wq),
            _ptr(wk),
            _ptr(cos),
            _ptr(sin),
            _ptr(q),
            _ptr(k),
            _ptr(v),
            _ptr(rstd),
            batch * time,
            heads,
            kv_heads,
            d,
            time,
            eps,
        )
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
            _ptr(dq),
            _ptr(dk),
            _ptr(dv),
            _ptr(x),
            _ptr(wq),
            _ptr(wk),
            _ptr(cos),
            _ptr(sin),
            _ptr(rstd),
            _ptr(dx),
            _ptr(dwq),
            _ptr(dwk),
            x.shape[0] * x.shape[1],
            heads,
            kv_heads,
            d,
            x.shape[1],
        )
        return dx, dwq, dwk, None, None, None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves (x1, x2) of x (batch, time, heads, d) rotated by position. cos, sin: (time, d / 2)."""
    a, b = x.chunk(2, -1)
    c, s = cos.to(x.dtype)[None, :, None, :], sin.to(x.dtype)[None, :, None, :]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def deinterleave(x: Tensor) -> Tensor:
    """Pairs (0, 1), (2, 3)... of the last dimension to the two halves that `rotate` turns."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def norm_rope(x: Tensor, w: Tensor | None, rope: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """x (batch, time, heads, d): RMSNorm over d with weight w (None: no norm, arXiv 2302.05442 for QK-norm), then
    rotation (None: no positions)."""
    if w is not None:
        x = add_rms_norm(x, None, w, eps)[1]
    return x if rope is None else rotate(x, *rope)


def split_norm_rope(
    x: Tensor,
    wq: Tensor | None,
    wk: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (batch, time, (heads + 2 kv_heads) d), each row its q, k and v heads -> q (batch, time, heads, d), k and v
    (batch, time, kv_heads, d), with norm_rope on q and k."""
    d = x.shape[-1] // (heads + 2 * kv_heads)
    if _native(x) and rope is not None and d % 16 == 0 and d <= 1024:
        return _SplitNormRope.apply(x, wq, wk, *rope, heads, kv_heads, eps)
    q, k, v = x.unflatten(-1, (-1, d)).split([heads, kv_heads, kv_heads], 2)
    return norm_rope(q, wq, rope, eps), norm_rope(k, wk, rope, eps), v


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


def gated(x: Tensor, act: str = "silu") -> Tensor:
    """x (..., 2n), gate then up -> act(gate) * up: (..., n). arXiv 2002.05202."""
    if act == "silu" and _native(x) and x.shape[-1] % 32 == 0 and x.numel():
        return _SwiGLU.apply(x)
    gate, up = x.chunk(2, -1)
    return exactly(F.silu if act == "silu" else lambda g: F.gelu(g, approximate="tanh"), gate) * up


def gated_clamped(x: Tensor, limit: float) -> Tensor:
    """gpt-oss's variant: x (..., 2n), gate then up -> gate sigmoid(1.702 gate) (up + 1), both clamped first."""
    gate, up = x.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * exactly(torch.sigmoid, 1.702 * gate)


# ---- attention ---------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (batch, time, heads, d), kv_heads = q.shape, k.shape[2]
        o, lse = torch.empty_like(q), q.new_empty(batch, heads, time)
        _library().attention_forward(
            _ptr(q), _ptr(k), _ptr(v), _ptr(start), _ptr(o), _ptr(lse), batch, time, heads, kv_heads, d, scale
        )
        ctx.save_for_backward(q, k, v, o, lse, start)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, start = ctx.saved_tensors
        (batch, time, heads, d), kv_heads, do = q.shape, k.shape[2], do.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _library().attention_backward(
            _ptr(do),
            _ptr(q),
            _ptr(k),
            _ptr(v),
            _ptr(o),
            _ptr(lse),
            _ptr(start),
            _ptr(dq),
            _ptr(dk),
            _ptr(dv),
            batch,
            time,
            heads,
            kv_heads,
            d,
            ctx.scale,
        )
        return dq, dk, dv, None, None


def window_start(start: Tensor | None, x: Tensor, window: int | None) -> Tensor | None:
    """start as `attention` takes it, moved up to a sliding window. x: (batch, time, ...)."""
    if window is None or window >= x.shape[1]:
        return start
    at = (torch.arange(x.shape[1], dtype=torch.int32, device=x.device) - (window - 1)).clamp_(min=0)
    return (at.expand(x.shape[:2]) if start is None else torch.maximum(start, at)).contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention: q (batch, time, heads, d), k (batch, time, kv_heads, d), v (batch, time,
    kv_heads, e) -> (batch, time, heads, e).

    start (batch, time), int32, non-decreasing: the first position that each query may see, its document's (None: all).
    scale: of the scores, None is d^-0.5. softcap and sinks as in `masked_attention`.
    """
    time, d = q.shape[1], q.shape[3]
    scale = d**-0.5 if scale is None else scale
    if (
        _native(q)
        and d % 16 == 0
        and v.shape[3] == d
        and time > 1
        and softcap is None
        and sinks is None
        and observer is None
    ):
        return _Attention.apply(q, k, v, start, scale)
    mask = None
    if start is not None or softcap is not None or sinks is not None or observer is not None:
        at = torch.arange(time, device=q.device)
        mask = (at[None, :] <= at[:, None])[None, None]
        if start is not None:
            mask = mask & (at >= start[:, None, :, None])
        return masked_attention(q, k, v, mask, scale, softcap, sinks)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        None,
        is_causal=time > 1,
        enable_gqa=q.shape[2] != k.shape[2],
        scale=scale,
    )
    return o.transpose(1, 2)


observer: Callable[[Tensor], None] | None = None  # sees each layer's attention probabilities (batch, heads, time, keys)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention where mask (batch or 1, 1, time, keys) is True. softcap bounds the scores by a tanh (arXiv 2408.00118);
    sinks (heads,) are logits that take their share of the softmax and give nothing (gpt-oss)."""
    groups = q.shape[2] // k.shape[2]
    if softcap is None and sinks is None and observer is None:
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale, enable_gqa=groups > 1
        )
        return o.transpose(1, 2)
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.float()[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)], -1
        )
    p = scores.softmax(-1)[..., : k.shape[1]]
    if observer is not None:
        observer(p.detach())
    return torch.einsum("bhts,bshd->bthd", p.to(v.dtype), v)


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
            if (library := _native(logits)) is not None:
                logits = logits.contiguous()
                t, k, piece = target[part].contiguous(), weight[part].contiguous(), loss[part]
                library.cross_entropy(_ptr(logits), _ptr(t), _ptr(k), _ptr(piece), logits.shape[0], logits.shape[1])
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
