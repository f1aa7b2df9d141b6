"""The decoder's operations. Each has one meaning (plain.py) and, a file a device, executions that are faster.

They are `torch.library` operations, so that which execution runs is decided by the tensors' device alone, and
torch.compile sees through them. ops_cpu.py: the compiled kernels, for fp32. A new device is a new file like it.
tests/model/test_ops.py holds executions against meanings.
"""

import torch
from torch import Tensor

from craton.model import ops_cpu, plain
from craton.model.attention import AttentionSpec, Spans
from craton.model.plain import Pair

_LIBRARY = torch.library.Library("craton", "DEF")
_DIFFERENTIABLE = {
    "matmul_t(Tensor x, Tensor w) -> Tensor": lambda x, w: x @ w.t(),
    "linear(Tensor x, Tensor[] ws) -> Tensor": plain.linear,
    "linear_heads(Tensor x, Tensor w) -> Tensor": plain.linear_heads,
    "add_rms_norm(Tensor x, Tensor? delta, Tensor w, float eps) -> (Tensor, Tensor)": plain.add_rms_norm,
    "split_norm_rope(Tensor x, Tensor? wq, Tensor? wk, Tensor? cos, Tensor? sin, int heads, int kv_heads, float eps)"
    " -> (Tensor, Tensor, Tensor)": plain.split_norm_rope,
    "gated_activation(Tensor x, str act) -> Tensor": plain.gated_activation,
    "attention(Tensor q, Tensor k, Tensor v, Tensor? first_key, Tensor? sinks, float scale, float? softcap,"
    " bool causal) -> Tensor": plain.attention,
}
_WITHOUT_GRADIENT = {
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor[] places, Tensor? sinks,"
    " float scale, int? window, float? softcap) -> Tensor": plain.paged_attention,
    "choose_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor u)"
    " -> Tensor": plain.choose_tokens,
}
for _schema, _meaning in (_DIFFERENTIABLE | _WITHOUT_GRADIENT).items():
    _LIBRARY.define(_schema)
    _kind = "CompositeImplicitAutograd" if _schema in _DIFFERENTIABLE else "CompositeExplicitAutograd"
    _LIBRARY.impl(_schema.partition("(")[0], _meaning, _kind)
ops_cpu.register(_LIBRARY)
_OPS = torch.ops.craton


def matmul_t(x: Tensor, w: Tensor) -> Tensor:
    """x (m, k) times w (n, k) transposed: (m, n), by the library that is the fastest here."""
    return _OPS.matmul_t(x, w)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy (m, n), x (m, k) -> dy transposed times x: (n, k), on a CPU."""
    return ops_cpu.weight_gradient(dy, x)


def linear(x: Tensor, *ws: Tensor) -> Tensor:
    """x (..., k) times each w (n_i, k) transposed, side by side -> (..., sum of n_i)."""
    return _OPS.linear(x, list(ws))


def linear_heads(x: Tensor, w: Tensor) -> Tensor:
    """Each head its own matrix: x (batch, time, heads, k), w (heads, n, k) -> (batch, time, heads, n)."""
    return _OPS.linear_heads(x, w)


def add_rms_norm(x: Tensor, delta: Tensor | None, w: Tensor, eps: float) -> Pair:
    """(x + delta, RMSNorm(x + delta) * w) over the last dimension; delta None adds nothing. arXiv 1910.07467.

    The norm is computed in fp32 and rounded before the weight, as the published Llama and Qwen code does.
    """
    return _OPS.add_rms_norm(x, delta, w, eps)


def split_norm_rope(
    x: Tensor, wq: Tensor | None, wk: Tensor | None, rope: Pair | None, *, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of projections to heads that can attend.

    x (batch, time, (heads + 2 kv_heads) d), each row its q, k and v heads -> q (batch, time, heads, d), k and v (batch,
    time, kv_heads, d). q and k get an RMSNorm over d with weights wq and wk (None: no norm; QK-norm, arXiv 2302.05442),
    then rotation by rope, the cos and sin (time, d / 2) of each position (None: no positions).
    """
    cos, sin = rope if rope is not None else (None, None)
    return _OPS.split_norm_rope(x, wq, wk, cos, sin, heads, kv_heads, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of x (batch, time, heads, d) rotated by position. cos, sin: (time, d / 2)."""
    return plain.rotate(x, cos, sin)


def deinterleave(x: Tensor) -> Tensor:
    """Pairs (0, 1), (2, 3)... of the last dimension to the two halves that `rotate` turns."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def gated_activation(x: Tensor, act: str = "silu") -> Tensor:
    """x (..., 2n), gate then up -> act(gate) * up: (..., n). arXiv 2002.05202. act: "silu" or "gelu_pytorch_tanh"."""
    return _OPS.gated_activation(x, act)


def clamped_swiglu(x: Tensor, limit: float) -> Tensor:
    """gpt-oss's variant: x (..., 2n), gate then up -> gate sigmoid(1.702 gate) (up + 1), both clamped first."""
    gate, up = x.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * plain.via_double(torch.sigmoid, 1.702 * gate)


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, spans: Spans | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Grouped-query attention within a batch: q (batch, time, heads, d), k (batch, time, kv_heads, d), v (batch, time,
    kv_heads, e) -> (batch, time, heads, e).

    spans: the batch's documents (None: one a row). sinks (heads,): logits that take their share of the softmax and give
    nothing (gpt-oss).
    """
    if spans is None and spec.window is not None:
        spans = Spans(None, q)
    first_key = None if spans is None else spans.first_key(spec.window)
    return _OPS.attention(q, k, v, first_key, sinks, spec.scale, spec.softcap, spec.causal)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, pool: Pair, places: list[Tensor], spec: AttentionSpec, sinks: Tensor | None = None
) -> Tensor:
    """Attention over a paged cache: k (1, tokens, kv_heads, key size) and v are stored in the pool first, then q (1,
    tokens, heads, key size) attends to all that it may see -> (1, tokens, heads, value size).

    pool: one layer's keys and values as craton/model/cache.py lays them. places: positions, slots, starts, lengths and
    tables of a TokenBatch.
    """
    return _OPS.paged_attention(q, k, v, *pool, places, sinks, spec.scale, spec.window, spec.softcap)


def choose_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor
) -> Tensor:
    """A token for each row of logits (rows, vocabulary) fp32 -> (rows,) int64, on the logits' device.

    The rest has shape (rows,): temperature fp32 (0: the likeliest token), top_k int64 (0: all), top_p, min_p and u
    fp64. The filters come in this order after the temperature, ties are kept in the order of the ids; then the first
    token, in that order, at which the cumulative probability exceeds u, in [0, 1). Near distributions give mostly the
    same token for the same u, which makes a draft model's guesses agree with the model's choice."""
    return _OPS.choose_tokens(logits, temperature, top_k, top_p, min_p, u)
