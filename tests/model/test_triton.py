"""GPU kernels against the plain meaning, under Triton's interpreter where there is no GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.model import nll, plain
from craton.model.paging import BLOCK, blocks_for

pytest.importorskip("triton")
from craton.model.gpu import attention, choose, layers, low_rank, train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = settings(max_examples=8, deadline=None)


def normal(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=g) * scale).to(DEVICE)


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


@FEW
@given(
    rows=st.integers(1, 2),
    k=st.sampled_from([32, 96, 300]),
    sizes=st.sampled_from([[48], [32, 16, 16], [32, 40]]),
    norm=st.booleans(),
    delta=st.booleans(),
    bias=st.booleans(),
    offset=st.booleans(),
)
def test_products_of_a_row(rows, k, sizes, norm, delta, bias, offset):
    x, d, g = normal(rows, k), normal(rows, k, seed=1), normal(k, seed=2)
    weights = [normal(n, k, seed=3, scale=k**-0.5) for n in sizes]
    biases = [normal(n, seed=4) for n in sizes] if bias else None
    out, total = torch.full((rows, sum(sizes)), torch.nan, device=DEVICE), torch.full_like(x, torch.nan)
    more = {"norm": g, "total": total, "delta": d if delta else None, "eps": 1e-6, "offset": offset} if norm else {}
    layers.one_row(x, weights, out, biases=biases, **more)
    y = x
    if norm:
        added, y = plain.add_rms_norm(x, d if delta else None, 1 + g if offset else g, 1e-6)
        close(total, added)
    wanted = plain.linear(y, weights)
    close(out, wanted if biases is None else wanted + torch.cat(biases))


@FEW
@given(rows=st.integers(1, 2), n=st.sampled_from([16, 40]), act=st.sampled_from(["silu", "gelu_pytorch_tanh"]))
def test_gated(rows, n, act):
    x, gate, up = normal(rows, 64), normal(n, 64, seed=1, scale=0.1), normal(n, 64, seed=2, scale=0.1)
    out = torch.full((rows, n), torch.nan, device=DEVICE)
    layers.one_row(x, [gate, up], out, gate=act)
    both = plain.linear(x, [gate, up])
    close(out, plain.gated_activation(both, act))
    again = torch.full_like(out, torch.nan)
    layers.gated_activation(both.contiguous(), act, again)
    close(again, plain.gated_activation(both, act))


@FEW
@given(rows=st.integers(1, 5), size=st.sampled_from([64, 300]), delta=st.booleans(), offset=st.booleans())
def test_norm(rows, size, delta, offset):
    x, d, g = normal(rows, size), normal(rows, size, seed=1), normal(size, seed=2)
    total, out = torch.empty_like(x), torch.empty_like(x)
    layers.add_rms_norm(x, d if delta else None, g, total, out, 1e-6, offset)
    wanted = plain.add_rms_norm(x, d if delta else None, 1 + g if offset else g, 1e-6)
    close(total, wanted[0])
    close(out, wanted[1])


def a_cache(lengths, heads, d, e):
    """A pool with blocks in a random order, and the tables of sequences of these lengths in it."""
    each = [blocks_for(n) for n in lengths]
    order = torch.randperm(sum(each) + 2, generator=torch.Generator().manual_seed(1)).int()
    tables = torch.zeros(len(lengths), max(each) + 1, dtype=torch.int32)
    at = 0
    for i, n in enumerate(each):
        tables[i, :n] = order[at : at + n]
        at += n
    keys, values = normal(len(order), heads, d, BLOCK), normal(len(order), heads, BLOCK, e, seed=1)
    return (keys, values), tables.to(DEVICE)


def places_of(lengths, new, tables):
    """As of a TokenBatch: the last `new` tokens of each sequence are the new ones."""
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(lengths, new, strict=True)]).int()
    own = torch.cat([torch.full((m,), i) for i, m in enumerate(new)])
    slots = tables.cpu()[own, positions.long() // BLOCK] * BLOCK + positions % BLOCK
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()]).int()
    return [t.to(DEVICE) for t in (positions, slots.int(), starts, torch.tensor(lengths).int(), tables)]


@FEW
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=2),
    heads=st.sampled_from([(4, 2), (3, 3), (8, 1)]),
    sizes=st.sampled_from([(16, 16), (24, 16), (64, 64)]),
    window=st.sampled_from([None, 7, 90]),
    softcap=st.sampled_from([None, 5.0]),
    sinks=st.booleans(),
    data=st.data(),
)
def test_attention(lengths, heads, sizes, window, softcap, sinks, data):
    """One new token each, and several, against the plain meaning."""
    (heads, kv), (d, e) = heads, sizes
    sink = normal(heads, seed=5) if sinks else None
    for new in ([1] * len(lengths), [data.draw(st.integers(1, n)) for n in lengths]):
        pool, tables = a_cache(lengths, kv, d, e)
        places = places_of(lengths, new, tables)
        tokens = sum(new)
        q, k, v = normal(tokens, heads, d, seed=6), normal(tokens, kv, d, seed=7), normal(tokens, kv, e, seed=8)
        own = [t.clone() for t in pool]
        wanted = plain.paged_attention(q[None], k[None], v[None], *own, places, sink, d**-0.5, window, softcap)[0]
        out = torch.full((tokens, heads, e), torch.nan, device=DEVICE)
        how = {"scale": d**-0.5, "window": window, "softcap": softcap, "sinks": sink}
        if max(new) == 1:
            attention.decode_attention(q, own, places[3], tables, out, split=attention.split_of(max(lengths)), **how)
            close(out, wanted, 1e-4)
        tiles = torch.tensor(attention.tiles_of(places[2].tolist(), attention.TILE), dtype=torch.int32, device=DEVICE)
        attention.prompt_attention(q, own, places, tiles, out, **how)
        close(out, wanted, 1e-4)


@FEW
@given(
    heads=st.sampled_from([(4, 2), (3, 1)]),
    d=st.sampled_from([16, 24]),
    norm=st.booleans(),
    offset=st.booleans(),
    turned=st.booleans(),
)
def test_rope_and_store(heads, d, norm, offset, turned):
    (heads, kv), tokens = heads, 7
    pool, tables = a_cache([4, 20], kv, d, d)
    places = places_of([4, 20], [3, 4], tables)
    qkv = normal(tokens, (heads + 2 * kv) * d)
    wq, wk = normal(d, seed=1), normal(d, seed=2)
    angle = torch.arange(32.0, device=DEVICE)[:, None] * normal(1, d // 2).abs()
    cos, sin = angle.cos(), angle.sin()
    at = places[0].long()
    scaled = [1 + w if offset else w for w in (wq, wk)] if norm else [None, None]
    q, k, v = plain.split_norm_rope(
        qkv[None], *scaled, cos[at] if turned else None, sin[at] if turned else None, heads, kv, 1e-6
    )
    q_out = torch.empty(tokens, heads, d, device=DEVICE)
    rope = (cos, sin) if turned else None
    norms = (wq, wk) if norm else None
    layers.rope_store(qkv, norms, rope, *places[:2], pool, q_out, eps=1e-6, offset=offset)
    close(q_out, q[0])
    block, offset_ = places[1].long() // BLOCK, places[1].long() % BLOCK
    close(pool[0][block, :, :, offset_], k[0])
    close(pool[1][block, :, offset_], v[0])


@settings(max_examples=24, deadline=None)
@given(
    vocabulary=st.sampled_from([50, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.3, 2.0]),  # bf16 has many equal logits, at 0.3 most of all
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    top_k=st.sampled_from([None, 0, 1, 40, 70]),
    top_p=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_choosing(vocabulary, dtype, scale, temperature, min_p, top_k, top_p, seed):
    """The same tokens for the same numbers as on a CPU."""
    rows = 6
    logits = normal(rows, vocabulary, seed=seed, scale=scale).to(dtype)
    u = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)
    t = torch.full((rows,), temperature, device=DEVICE)
    t[0] = 0
    m = torch.full((rows,), min_p, dtype=torch.float64, device=DEVICE)
    k = torch.full((rows,), top_k or 0, dtype=torch.int64, device=DEVICE)
    p = torch.full((rows,), 1.0 if top_k is None else top_p, dtype=torch.float64, device=DEVICE)
    p[1] = k[2] = 1
    if top_k is None:
        k[:] = 0
    tokens = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    logprobs = torch.empty(rows, device=DEVICE)
    choose.choose_tokens(logits, t, m, u, tokens, logprobs, None if top_k is None else (k.double(), p))
    assert torch.equal(tokens, plain.choose_tokens(logits, t, k, p, m, u))
    close(logprobs, torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0])


@FEW
@given(rows=st.integers(1, 5), k=st.sampled_from([32, 300]), n=st.sampled_from([24, 200]), seed=st.integers(0, 9))
def test_adapters_of_rows(rows, k, n, seed):
    x, a, b = normal(rows, k), normal(3, 16, k, seed=1, scale=0.1), normal(3, n, 16, seed=2)
    which = torch.randint(-1, 3, (rows,), generator=torch.Generator().manual_seed(seed)).int()
    whole = normal(rows, n + 8, seed=3)
    wanted = whole.clone()
    for i, w in enumerate(which.tolist()):
        if w >= 0:
            wanted[i, 3 : n + 3] += b[w] @ (a[w] @ x[i])
    low_rank.add_low_rank(x, a, b, which.to(DEVICE), whole[:, 3 : n + 3])
    close(whole, wanted, 1e-4)


def test_steps_follow_each_other_without_the_host():
    lengths = [3, 16, 31]
    _, tables = a_cache([n + 4 for n in lengths], 1, 16, 16)
    places = places_of(lengths, [1, 1, 1], tables)
    wanted = places_of([n + 1 for n in lengths], [1, 1, 1], tables)
    tokens, logprobs = torch.tensor([7, 8, 9]).to(DEVICE), normal(3)
    ids, u = torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.zeros(3, dtype=torch.float64, device=DEVICE)
    numbers = torch.arange(9, dtype=torch.float64, device=DEVICE).view(3, 3)
    turn = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    choose.advance((tokens, logprobs), ids, places, turn, numbers, u, out)
    assert ids.tolist() == [7, 8, 9] and out[0][0].tolist() == [7, 8, 9] and turn.item() == 1
    assert torch.equal(out[1][0], logprobs) and u.tolist() == [3, 4, 5]
    for i in (0, 1, 3):
        assert torch.equal(places[i], wanted[i])


@FEW
@given(rows=st.integers(1, 9), vocabulary=st.sampled_from([40, 9000]), softcap=st.sampled_from([None, 3.0]))
def test_cross_entropy(rows, vocabulary, softcap):
    x, w = normal(rows, 8), normal(vocabulary, 8, seed=1)
    target = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    target[0] = nll.IGNORE
    weight = normal(rows, seed=3)
    logits = (x @ w.t()).requires_grad_()
    capped = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    each = torch.nn.functional.cross_entropy(capped, target, reduction="none", ignore_index=nll.IGNORE)
    (each * weight).sum().backward()
    place = logits.detach().clone()
    close(train.cross_entropy(place, target, weight, softcap), each.detach())
    close(place, logits.grad)


def test_a_row_of_no_numbers_gives_a_token():
    logits = torch.full((2, 50), torch.nan, device=DEVICE)
    tokens, scores = torch.empty(2, dtype=torch.int64, device=DEVICE), torch.empty(2, device=DEVICE)
    zeros = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    choose.choose_tokens(logits, torch.zeros(2, device=DEVICE), zeros, zeros, tokens, scores)
    assert bool((tokens < 50).all())


def test_long_keys_are_cut_into_larger_chunks():
    assert attention.split_of(1) == (1, 64) and attention.split_of(300) == (8, 64)
    assert attention.split_of(4096) == (64, 64) and attention.split_of(100_000) == (64, 2048)


def test_the_loss_of_a_sum_whose_gradient_is_one_number():
    logits, target = normal(5, 40), torch.arange(5, device=DEVICE)
    spread = logits.clone()
    train.cross_entropy(spread, target, torch.ones((), device=DEVICE).expand(5))
    train.cross_entropy(logits, target, torch.ones(5, device=DEVICE))
    close(spread, logits)


@FEW
@given(shape=st.sampled_from([(8, 8), (40, 30)]), count=st.integers(1, 3), decay=st.sampled_from([0.0, 0.1]))
def test_the_optimizers_updates(shape, count, decay):
    from craton.train.optim import orthogonalise

    weights = [normal(*shape, seed=i) for i in range(count)]
    momenta = [normal(*shape, seed=10 + i) for i in range(count)]
    gradients = [normal(*shape, seed=20 + i) for i in range(count)]
    wanted_m = [m * 0.9 + g * 0.1 for m, g in zip(momenta, gradients, strict=True)]
    wanted = [g * 0.1 + m * 0.9 for m, g in zip(wanted_m, gradients, strict=True)]
    stack = train.nesterov(momenta, gradients, 0.9, torch.float32)
    close(torch.stack(momenta), torch.stack(wanted_m))
    close(stack, torch.stack(wanted))
    u = orthogonalise(stack)
    after = [w * (1 - decay * (x * w >= 0)) - x * 0.02 for w, x in zip(weights, u, strict=True)]
    train.muon_update(weights, u, decay, 0.02)
    close(torch.stack(weights), torch.stack(after))
