"""The compiled kernels against plain PyTorch in fp64, forward and backward, over shapes that do not divide evenly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.model import kernels, nll, ops, rope
from craton.model.attention import AttentionSpec, Spans

pytestmark = pytest.mark.skipif(kernels.training_kernels() is None, reason="no compiled kernels on this machine")


def agree(function, inputs, tolerance=4e-5):
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
    cos, sin = rope.table(torch.arange(time), d, 10_000.0)
    weights = [torch.randn(d), torch.randn(d)] if norm else [None, None]

    def split(x, wq, wk):
        turned = (cos.to(x.dtype), sin.to(x.dtype))
        return ops.split_norm_rope(x, wq, wk, turned, heads=kv * group, kv_heads=kv, eps=1e-6)

    agree(split, [torch.randn(batch, time, (kv * group + 2 * kv) * d), *weights])


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), n=st.sampled_from([16, 48, 96]))
def test_swiglu(rows, n):
    torch.manual_seed(rows)
    agree(ops.gated_activation, [torch.randn(rows, 2 * n) * 4])


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
    spec, spans = AttentionSpec(d**-0.5), Spans(start, q)
    agree(lambda q, k, v: ops.attention(q, k, v, spec, spans), [q, k, v], 1e-4 if scale == 1 else 3e-3)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 50), n=st.integers(2, 300), k=st.sampled_from([8, 32]))
def test_weighted_nll(rows, n, k):
    torch.manual_seed(rows + n)
    target = torch.randint(n, (rows,))
    weight = torch.rand(rows)
    weight[0] = 0
    agree(lambda x, w: nll.weighted_nll(x, w, target, weight.to(x.dtype))[0], [torch.randn(rows, k), torch.randn(n, k)])
    each = nll.weighted_nll(torch.randn(rows, k), torch.randn(n, k), target, weight)[1]
    assert each.shape == (rows,) and (each >= 0).all()


def test_weighted_nll_in_slices(monkeypatch):
    torch.manual_seed(0)
    x, w, target, weight = torch.randn(33, 16), torch.randn(50, 16), torch.randint(50, (33,)), torch.rand(33)
    whole = nll.weighted_nll(x, w, target, weight)
    monkeypatch.setattr(nll, "_SLICE_BYTES", {"cpu": 50 * 4 * 5})
    sliced = nll.weighted_nll(x, w, target, weight)
    torch.testing.assert_close(whole, sliced)


def test_linear_gradients():
    torch.manual_seed(0)
    for m, k, n in ((5, 7, 3), (64, 32, 96), (100, 96, 32)):
        agree(ops.linear, [torch.randn(2, m, k), torch.randn(n, k)])
        agree(ops.linear, [torch.randn(2, m, k), torch.randn(n, k), torch.randn(2 * n, k)])


def test_extreme_logits_stay_finite():
    w = torch.eye(4)
    x = torch.tensor([[1e4, -1e4, 0.0, 0.0]])
    _, each = nll.weighted_nll(x, w, torch.tensor([1]), torch.ones(1))
    assert torch.isfinite(each).all() and each.item() == pytest.approx(2e4)


def test_nan_is_not_swallowed():
    nan = float("nan")
    x = torch.zeros(2, 64)
    x[0, 3] = nan
    assert ops.gated_activation(x).isnan().any()
    _, each = nll.weighted_nll(x, torch.eye(64), torch.tensor([5, 5]), torch.ones(2))
    assert each[0].isnan() and each[1].isfinite()
    q, k, v = torch.zeros(1, 40, 2, 16), torch.zeros(1, 40, 2, 16), torch.zeros(1, 40, 2, 16)
    k[0, 3, 0, 0] = nan
    o = ops.attention(q, k, v, AttentionSpec(0.25))
    assert o[0, 4:, 0].isnan().all() and o[0, :, 1].isfinite().all()


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 50), n=st.integers(2, 300), cap=st.sampled_from([None, 3.0]), slices=st.booleans())
def test_token_nll(rows, n, cap, slices):
    """Values and gradients of fp64 cross-entropy, with any function of the values behind it, some rows left out."""
    torch.manual_seed(rows + n)
    x, w, target = torch.randn(rows, 16) * 3, torch.randn(n, 16), torch.randint(n, (rows,))
    target[torch.rand(rows) < 0.3] = nll.IGNORE
    before = dict(nll._SLICE_BYTES)
    nll._SLICE_BYTES["cpu"] = 4 * n * 7 if slices else before["cpu"]
    try:
        agree(lambda x, w: torch.tanh(nll.token_nll(x, w, target, cap)).square(), [x, w])
        each = nll.token_nll(x, w, target, cap)
    finally:
        nll._SLICE_BYTES.update(before)
    logits = (x.double() @ w.double().t()) if cap is None else cap * torch.tanh(x.double() @ w.double().t() / cap)
    wanted = torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=nll.IGNORE)
    torch.testing.assert_close(each.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_known_weights_and_unknown_ones_give_the_same_gradients(cap):
    torch.manual_seed(0)
    target, weight = torch.randint(50, (33,)), torch.rand(33)
    target[::5] = nll.IGNORE
    gradients = []
    for known in (True, False):
        x, w = torch.randn(33, 16, generator=torch.Generator().manual_seed(1)), torch.eye(50, 16)
        x.requires_grad_(), w.requires_grad_()
        if known:
            nll.weighted_nll(x, w, target, weight, cap)[0].backward()
        else:
            (nll.token_nll(x, w, target, cap) * weight).sum().backward()
        gradients.append((x.grad, w.grad))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [-1, -101, 50, 1 << 40])
def test_targets_outside_the_vocabulary_are_refused(bad):
    """A target of -100 once wrote outside of the logits."""
    x, w, target = torch.randn(4, 8), torch.randn(50, 8), torch.tensor([1, nll.IGNORE, bad, 2])
    for function in (nll.token_nll, lambda *args: nll.weighted_nll(*args, torch.ones(4))):
        with pytest.raises(ValueError, match=f"target {bad} is outside the vocabulary of 50"):
            function(x, w, target)


def test_ignored_targets_leave_no_trace():
    torch.manual_seed(0)
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target = torch.tensor([3, nll.IGNORE, 7, nll.IGNORE, nll.IGNORE, 0])
    total, each = nll.weighted_nll(x, w, target, torch.ones(6))
    total.backward()
    assert (each[[1, 3, 4]] == 0).all() and (x.grad[[1, 3, 4]] == 0).all() and (each[[0, 2, 5]] > 0).all()
    kept = nll.weighted_nll(x.detach()[[0, 2, 5]], w.detach(), target[[0, 2, 5]], torch.ones(3))[0]
    torch.testing.assert_close(total.detach(), kept)


def test_weight_gradients_of_16_bit_heads_are_added_up_in_fp32(monkeypatch):
    """Many slices must not lose what few keep."""
    torch.manual_seed(0)
    x, w, target = torch.randn(4096, 32).bfloat16(), torch.randn(64, 32).bfloat16(), torch.randint(64, (4096,))
    errors = []
    for slice_rows in (4096, 16):
        monkeypatch.setattr(nll, "_SLICE_BYTES", {"cpu": 4 * 64 * slice_rows})
        w_ = w.clone().requires_grad_()
        nll.weighted_nll(x, w_, target, torch.ones(4096))[0].backward()
        wide = w.double().requires_grad_()
        nll.weighted_nll(x.double(), wide, target, torch.ones(4096))[0].backward()
        errors.append(float((w_.grad.double() - wide.grad).norm() / wide.grad.norm()))
    assert errors[1] < 0.004, errors


def test_operations_are_traced_by_the_compiler():
    """torch.compile sees the meanings, not the kernels."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w = torch.randn(4, 64), torch.ones(64)
    graph = make_fx(lambda x, w: ops.add_rms_norm(x, None, w, 1e-6)[1], tracing_mode="fake")(x, w)
    names = [str(n.target) for n in graph.graph.nodes]
    assert any("rsqrt" in n for n in names) and not any("craton" in n for n in names)
