"""The meaning of every operation, in plain PyTorch: what runs where no file of executions knows better.

Signatures and shapes are told in ops.py. Gradients follow from these lines, and torch.compile fuses them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from craton.model import modes
from craton.model.paging import BLOCK, blocks_for

Pair = tuple[Tensor, Tensor]
Maybe = Tensor | None


def via_double(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), inside `batch_invariant` by way of fp64: PyTorch's vector and scalar code differ in the last bit,
    and which of them an element meets depends on how many there are."""
    return function(x.double()).to(x.dtype) if modes.is_batch_invariant() else function(x)


def linear(x: Tensor, ws: list[Tensor]) -> Tensor:
    if len(ws) > 1 and x.numel() < 64 * x.shape[-1]:  # few rows: joining the weights would cost more than it saves
        return torch.cat([F.linear(x, w) for w in ws], -1)
    return F.linear(x, ws[0] if len(ws) == 1 else torch.cat(ws))


def linear_heads(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bthk,hnk->bthn", x, w)


def add_rms_norm(x: Tensor, delta: Maybe, w: Tensor, eps: float) -> Pair:
    total = x if delta is None else x + delta
    wide = total.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, y.to(x.dtype) * w.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves (x1, x2) of x (batch, time, heads, d) rotated by position. cos, sin: (time, d / 2)."""
    a, b = x.chunk(2, -1)
    c, s = cos.to(x.dtype)[None, :, None, :], sin.to(x.dtype)[None, :, None, :]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def split_norm_rope(
    x: Tensor, wq: Maybe, wk: Maybe, cos: Maybe, sin: Maybe, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[-1] // (heads + 2 * kv_heads)
    q, k, v = x.unflatten(-1, (-1, d)).split([heads, kv_heads, kv_heads], 2)
    if wq is not None:
        q = torch.ops.craton.add_rms_norm(q, None, wq, eps)[1]
    if wk is not None:
        k = torch.ops.craton.add_rms_norm(k, None, wk, eps)[1]
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def gated_activation(x: Tensor, act: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    return via_double(F.silu if act == "silu" else lambda g: F.gelu(g, approximate="tanh"), gate) * up


def attention(
    q: Tensor, k: Tensor, v: Tensor, first_key: Maybe, sinks: Maybe, scale: float, softcap: float | None, causal: bool
) -> Tensor:
    time = q.shape[1]
    if first_key is None and softcap is None and sinks is None and modes.observer() is None:
        return _library_attention(q, k, v, None, scale, causal)
    at = torch.arange(time, device=q.device)
    mask = (at[None] <= at[:, None] if causal else torch.ones_like(at, dtype=torch.bool)[None])[None, None]
    if first_key is not None:
        mask = mask & (at >= first_key[:, None, :, None])
    return masked_attention(q, k, v, mask, scale, softcap, sinks)


def _library_attention(q: Tensor, k: Tensor, v: Tensor, mask: Maybe, scale: float, causal: bool = False) -> Tensor:
    """PyTorch's, which has the heads before the time."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    groups = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=groups)
    return o.transpose(1, 2)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Maybe
) -> Tensor:
    """Attention where mask (batch or 1, 1, time, keys) is True. sinks (heads,) are logits that take their share of the
    softmax and give nothing (gpt-oss)."""
    groups, observer = q.shape[2] // k.shape[2], modes.observer()
    if softcap is None and sinks is None and observer is None:
        return _library_attention(q, k, v, mask, scale)
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        more = sinks.float()[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, more], -1)
    p = scores.softmax(-1)[..., : k.shape[1]]
    if observer is not None:
        observer(p.detach())
    return torch.einsum("bhts,bshd->bthd", p.to(v.dtype), v)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    places: list[Tensor],
    sinks: Maybe,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    positions, slots, starts, lengths, tables = places
    block, offset = slots.long() // BLOCK, slots.long() % BLOCK
    keys[block, :, :, offset] = k[0].to(keys.dtype)
    values[block, :, offset] = v[0].to(values.dtype)
    pieces, begins = [], starts.tolist()
    for s, length in enumerate(lengths.tolist()):
        own = slice(begins[s], begins[s + 1])
        table = tables[s, : blocks_for(length)].long()
        past_k = keys[table].permute(0, 3, 1, 2).flatten(0, 1)[:length].to(q.dtype)  # (length, kv_heads, size)
        past_v = values[table].transpose(1, 2).flatten(0, 1)[:length].to(q.dtype)
        at = positions[own].long()
        key = torch.arange(length, device=q.device)
        mask = key[None, :] <= at[:, None]
        if window is not None:
            mask = mask & (key[None, :] > at[:, None] - window)
        pieces.append(masked_attention(q[:, own], past_k[None], past_v[None], mask[None, None], scale, softcap, sinks))
    return torch.cat(pieces, 1)


def choose_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor
) -> Tensor:
    greedy = temperature == 0
    if bool(greedy.all()):
        return logits.argmax(-1)
    x = logits.double() / torch.where(greedy, 1.0, temperature.double())[:, None]
    values, ids = torch.sort(x, stable=True, dim=-1, descending=True)
    rank = torch.arange(x.shape[1], device=x.device)[None, :]
    kept = rank < torch.where(top_k > 0, top_k, x.shape[1])[:, None]
    p = torch.softmax(values.masked_fill(~kept, -math.inf), -1)
    share = torch.where(top_p < 1, top_p.double(), math.inf)[:, None]  # sums that round to 1 drop nothing
    kept &= (p.cumsum(-1) - p < share) & (p >= min_p.double()[:, None] * p[:, :1])
    kept[:, 0] = True
    p = torch.softmax(values.masked_fill(~kept, -math.inf), -1)
    p = torch.zeros_like(p).scatter_(-1, ids, p)  # back in the order of the ids
    cumulative = p.cumsum(-1)
    chosen = torch.searchsorted(cumulative, u.double()[:, None], right=True)[:, 0]
    last = p.shape[1] - 1 - (p > 0).flip(-1).int().argmax(-1)
    return torch.where(greedy, logits.argmax(-1), torch.minimum(chosen, last))
