"""The compiled kernels against plain PyTorch in fp64, forward and backward, over shapes that do not divide evenly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.model import kernels, ops

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiled kernels on this machine")


def agree(function, inputs, tolerance=2e-5):
    """Outputs and gradients of function(*inputs) in fp32 kernels and in fp64 PyTorch."""
    results = []
    for dtype in (torch.float32, torch.float64):
        args = [
            x.detach().to(dtype, copy=True).requires_grad_()
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for x in inputs
        ]
        out = function(*args)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        sum((o * torch.randn(o.shape, dtype=torch.float64).to(dtype)).sum() for o in out if o.requires_grad).backward()
        results.append(
            [o.detach().double() for o in out]
            + [a.grad.double() for a in args if isinstance(a, torch.Tensor) and a.grad is not None]
        )
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        scale = b.abs().max().clamp_min(0.1)
        assert ((a - b).abs().max() / scale) < tolerance


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 40), n=st.integers(1, 300), delta=st.booleans())
def test_add_rms_norm(rows, n, delta):
    torch.manual_seed(rows * 1000 + n)
    x, d, w = torch.randn(rows, n), torch.randn(rows, n) if delta else None, torch.randn(n)
    agree(lambda x, d, w: ops.add_rms_norm(x, d, w, 1e-6), [x, d, w])


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 30),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    d=st.sampled_from([16, 32, 64, 128]),
    norm=st.booleans(),
)
def test_split_norm_rope(batch, time, kv, group, d, norm):
    torch.manual_seed(time)
    cos, sin = ops.rope_table(torch.arange(time), d, 10_000.0)
    weights = [torch.randn(d), torch.randn(d)] if norm else [None, None]

    def split(x, wq, wk):
        return ops.split_norm_rope(x, wq, wk, (cos.to(x.dtype), sin.to(x.dtype)), kv * group, kv, 1e-6)

    agree(split, [torch.randn(batch, time, (kv * group + 2 * kv) * d), *weights])


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), n=st.sampled_from([16, 48, 96]))
def test_swiglu(rows, n):
    torch.manual_seed(rows)
    agree(ops.gated, [torch.randn(rows, 2 * n) * 4])


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 600), n=st.integers(1, 300), k=st.integers(1, 300))
def test_weight_gradient(m, n, k):
    torch.manual_seed(m)
    dy, x = torch.randn(m, n), torch.randn(m, k)
    torch.testing.assert_close(ops.weight_gradient(dy, x).double(), dy.double().t() @ x.double(), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 3),
    time=st.integers(2, 200),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    d=st.sampled_from([16, 32, 48, 64]),
    documents=st.integers(0, 4),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_attention(batch, time, kv, group, d, documents, scale):
    torch.manual_seed(time * 7 + d)
    start = None
    if documents:
        begins = torch.zeros(batch, time, dtype=torch.int32)
        for b in range(batch):
            for at in torch.randint(1, time, (documents,)).sort().values:
                begins[b, at:] = at
        start = begins
    q, k, v = (
        torch.randn(batch, time, kv * group, d) * scale,
        torch.randn(batch, time, kv, d),
        torch.randn(batch, time, kv, d),
    )
    agree(lambda q, k, v: ops.attention(q, k, v, start), [q, k, v], 1e-4 if scale == 1 else 3e-3)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 50), n=st.integers(2, 300), k=st.sampled_from([8, 32]))
def test_linear_cross_entropy(rows, n, k):
    torch.manual_seed(rows + n)
    target = torch.randint(n, (rows,))
    weight = torch.rand(rows)
    weight[0] = 0
    agree(
        lambda x, w: ops.linear_cross_entropy(x, w, target, weight.to(x.dtype))[0],
        [torch.randn(rows, k), torch.randn(n, k)],
    )
    nll = ops.linear_cross_entropy(torch.randn(rows, k), torch.randn(n, k), target, weight)[1]
    assert nll.shape == (rows,) and (nll >= 0).all()


def test_linear_cross_entropy_in_slices(monkeypatch):
    torch.manual_seed(0)
    x, w, target, weight = torch.randn(33, 16), torch.randn(50, 16), torch.randint(50, (33,)), torch.rand(33)
    whole = ops.linear_cross_entropy(x, w, target, weight)
    monkeypatch.setattr(ops, "_LOGIT_BYTES", 50 * 4 * 5)
    sliced = ops.linear_cross_entropy(x, w, target, weight)
    torch.testing.assert_close(whole, sliced)


def test_linear_gradients():
    torch.manual_seed(0)
    for m, k, n in ((5, 7, 3), (64, 32, 96), (100, 96, 32)):
        agree(ops.linear, [torch.randn(2, m, k), torch.randn(n, k)])
        agree(ops.linear, [torch.randn(2, m, k), torch.randn(n, k), torch.randn(2 * n, k)])


def test_extreme_logits_stay_finite():
    w = torch.eye(4)
    x = torch.tensor([[1e4, -1e4, 0.0, 0.0]])
    _, nll = ops.linear_cross_entropy(x, w, torch.tensor([1]), torch.ones(1))
    assert torch.isfinite(nll).all() and nll.item() == pytest.approx(2e4)


def test_nan_is_not_swallowed():
    nan = float("nan")
    x = torch.zeros(2, 64)
    x[0, 3] = nan
    assert ops.gated(x).isnan().any()
    _, nll = ops.linear_cross_entropy(x, torch.eye(64), torch.tensor([5, 5]), torch.ones(2))
    assert nll[0].isnan() and nll[1].isfinite()
    q, k, v = torch.zeros(1, 40, 2, 16), torch.zeros(1, 40, 2, 16), torch.zeros(1, 40, 2, 16)
    k[0, 3, 0, 0] = nan
    o = ops.attention(q, k, v)
    assert o[0, 4:, 0].isnan().all() and o[0, :, 1].isfinite().all()
