"""The engine's kernels: against plain PyTorch, and a row's bits against whatever is computed beside it."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.model import kernels, modes, native, ops, plain
from craton.model.cache import PagedCache, one_sequence
from craton.model.fused import FusedStep, fits
from craton.model.packed import BLOCKS, OF_BITS, PackedLinear, PackedMatrix, blocks_of, unpacked
from craton.weights.folder import load_network
from tests.model.blocks import random_blocks
from tests.weights.families import FAMILIES, make

library = kernels.engine_kernels()
pytestmark = pytest.mark.skipif(library is None, reason="kernels not built")


def weights(rows, cols, bits):
    values = torch.randint(0, 256, (rows, cols * bits // 8), dtype=torch.uint8)
    scales = (torch.rand(rows, cols // 32) * 0.1 - 0.05).half()
    return values, scales


def packed_linear(values, scales, bits):
    return PackedLinear(PackedMatrix(blocks_of(values, scales, bits), OF_BITS[bits]))


def rounding(layer, x):
    """As inside the engine: activations in 8 bits."""
    with torch.inference_mode(), modes.batch_invariant():
        return layer(x)


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 9), cols=st.integers(1, 9), tokens=st.integers(1, 40))
def test_packed_linear(bits, rows, cols, tokens):
    torch.manual_seed(rows * 100 + cols)
    values, scales = weights(rows * 16, cols * 32, bits)
    layer, x = packed_linear(values, scales, bits), torch.randn(tokens, cols * 32)
    x[0, :32] = 0
    y = rounding(layer, x)
    scale = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    rounded = (torch.where(scale > 0, (x.unflatten(-1, (-1, 32)) / scale).round(), 0) * scale).flatten(-2)
    torch.testing.assert_close(y, rounded @ unpacked(values, scales, bits).t(), atol=2e-3, rtol=1e-3)
    for t in range(tokens):
        assert torch.equal(rounding(layer, x[t : t + 1])[0], y[t])
    exact = layer(x)
    torch.testing.assert_close(exact, x @ unpacked(values, scales, bits).t(), atol=5e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 50),
    cols=st.integers(1, 90),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_linear_row_by_row(rows, cols, tokens, dtype):
    torch.manual_seed(rows * 100 + cols)
    x, w = torch.randn(tokens, cols), torch.randn(rows, cols)
    w = w.to(dtype)
    y = native.linear(library, x, w)
    torch.testing.assert_close(y, x @ w.float().t(), atol=1e-4, rtol=1e-4)
    for t in range(tokens):
        assert torch.equal(native.linear(library, x[t : t + 1], w)[0], y[t])


@pytest.mark.parametrize("name", FAMILIES)
def test_row_by_row_logits(name, tmp_path):
    """Each family through the kernels: the same logits, and the same bits however the tokens are cut into steps."""
    make(name, tmp_path)
    network = load_network(tmp_path)
    ids = torch.randint(3, 128, (1, 60))
    with torch.inference_mode():
        plain = network(ids)
        with modes.batch_invariant():
            outputs = []
            for cuts in ((0, 60), (0, 20, 21, 22, 37, 60), tuple(range(61))):
                cache = PagedCache(network.config, 4)
                outputs.append(
                    torch.cat(
                        [
                            network(ids[:, a:b], one_sequence(cache, a, b - a))
                            for a, b in zip(cuts, cuts[1:], strict=False)
                        ],
                        1,
                    )
                )
    torch.testing.assert_close(outputs[0], plain, atol=1e-4, rtol=0)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in FAMILIES
        if n.split("-")[0] in ("llama2", "llama3.1", "llama3.2", "llama", "mistral", "qwen2", "qwen3", "smollm3")
        and n != "llama-biased"
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_step(name, dtype, tmp_path):
    make(name, tmp_path)
    network = load_network(tmp_path, dtype=dtype)
    assert fits(network.config)
    ids = torch.randint(3, 128, (1, 60))
    with torch.inference_mode():
        plain = load_network(tmp_path, dtype=dtype).float()(ids)
        outputs = []
        for cuts in ((0, 60), (0, 20, 21, 23, 37, 60), tuple(range(61))):
            cache = PagedCache(network.config, 4)
            run = FusedStep(network, cache, 64)
            parts = []
            for a, b in zip(cuts, cuts[1:], strict=False):
                logits, hidden = run.run(
                    ids[0, a:b].int(), one_sequence(cache, a, b - a), torch.arange(b - a, dtype=torch.int32), True
                )
                parts.append(logits)
            outputs.append(torch.cat(parts))
    torch.testing.assert_close(outputs[0][None], plain, atol=2e-4, rtol=0)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", BLOCKS)
def test_instruction_sets_agree(kind):
    """Every compiled variant that this processor runs gives the same bits for packed weights, and the same fp32
    products but for rounding."""
    import ctypes
    from pathlib import Path

    flags = set(kernels.cpu_facts()["flags"].split())
    needs = {"v3": "avx2", "v3vnni": "avx_vnni", "v4": "avx512bw", "v4vnni": "avx512_vnni"}
    torch.manual_seed(0)
    cols = BLOCKS[kind][0] * 3
    blocks = random_blocks(kind, 48, cols)
    x, w = torch.randn(21, cols) * 3, torch.randn(21, 100)
    w2 = torch.randn(37, 100)
    packed, plain = [], []
    for level, flag in needs.items():
        found = sorted(Path(kernels.__file__).parent.glob(f"_decode_{level}.*so"))
        if flag not in flags or not found:
            continue
        other = ctypes.CDLL(str(found[0]))
        for name, arguments in kernels._ENGINE.items():
            getattr(other, name).argtypes = arguments
        panels, out = torch.zeros(library.craton_packed_bytes(kind, 48, cols), dtype=torch.uint8), torch.empty(21, 48)
        other.craton_pack(kind, blocks.data_ptr(), 48, cols, panels.data_ptr(), 2)
        matrix = native.MatrixC(panels.data_ptr(), None, 48, cols, kind)
        other.craton_linear(ctypes.byref(matrix), x.data_ptr(), 21, out.data_ptr(), 2)
        packed.append(out)
        plain.append(native.linear(other, w, w2))
    assert len(packed) >= 2
    assert all(torch.equal(p, packed[0]) for p in packed)
    for p in plain:
        torch.testing.assert_close(p, plain[0], atol=1e-4, rtol=1e-4)


def test_without_kernels(monkeypatch, tmp_path, capsys):
    """A processor without compiled kernels: the same answers, by plain PyTorch, announced once."""
    from craton.engine.engine import Engine
    from craton.engine.request import Sampling
    from craton.weights.quantize import pack_network

    make("llama2", tmp_path)
    prompts = [[5, 6, 7], list(range(20, 50))]
    want = Engine(load_network(tmp_path)).generate(prompts, Sampling(20, 0.0, ignore_eos=True))
    kernels.training_kernels()  # these stay
    kernels.engine_kernels.cache_clear()
    monkeypatch.setattr(kernels, "cpu_facts", lambda: {"flags": ""})
    try:
        got = Engine(load_network(tmp_path)).generate(prompts, Sampling(20, 0.0, ignore_eos=True))
        small = Engine(pack_network(load_network(tmp_path), 8)).generate(prompts, Sampling(4, 0.0, ignore_eos=True))
        assert capsys.readouterr().err.count("install a C++ compiler") == 1
    finally:
        kernels.engine_kernels.cache_clear()
    assert [a[0].token_ids for a in got] == [a[0].token_ids for a in want] and len(small[0][0].token_ids) == 4


def test_nan_stays_nan_in_products_of_8_bits():
    """A group of activations that holds NaN or infinity has no value in 8 bits."""
    layer = packed_linear(*weights(32, 64, 8), 8)
    x = torch.randn(5, 64)
    x[1, 3], x[3, 40] = float("nan"), float("inf")
    y = rounding(layer, x)
    assert y[1].isnan().all() and y[3].isnan().all() and y[[0, 2, 4]].isfinite().all()
    assert torch.equal(rounding(layer, x[2:3])[0], y[2])


FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 17, 10_000]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "u": st.floats(0, 1, exclude_max=True),
    }
)


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(1, 400),
    filters=st.lists(FILTERS, min_size=1, max_size=6),
    ties=st.booleans(),
    width=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 10_000),
)
def test_choice_of_tokens_has_one_meaning(size, filters, ties, width, seed):
    """The kernel against plain PyTorch in fp64: the same token, or one whose neighbour's border u lies on."""
    torch.manual_seed(seed)
    logits = torch.randn(len(filters), size) * width
    if ties:
        logits = logits.round()
    logits[0, torch.rand(size) < 0.3] = -torch.inf
    logits[0, 0] = 0.0
    columns = {k: torch.tensor([f[k] for f in filters], dtype=torch.float64) for k in filters[0]}
    columns["temperature"], columns["top_k"] = columns["temperature"].float(), columns["top_k"].long()
    ours, theirs = ops.choose_tokens(logits, **columns), plain.choose_tokens(logits, **columns)
    for i in (ours != theirs).nonzero()[:, 0].tolist():
        near = set()
        row = {k: v[i : i + 1] for k, v in columns.items()}
        for name in ("u", "top_p", "min_p"):
            for shift in (-3e-6, 3e-6):
                moved = {**row, name: (row[name] + shift).clamp(0, 1 - 1e-12 if name == "u" else 1)}
                near.add(int(plain.choose_tokens(logits[i : i + 1], **moved)))
        assert min(near) <= int(ours[i]) <= max(near)  # tokens lie in their order on the way to u


def test_chosen_tokens_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 50).expand(20_000, -1)
    ones = torch.ones(20_000, dtype=torch.float64)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens = ops.choose_tokens(logits, ones.float() * 0.7, torch.zeros(20_000).long(), ones, ones * 0, u)
    wanted = torch.softmax(logits[0] / 0.7, -1)
    assert ((tokens.bincount(minlength=50) / 20_000) - wanted).abs().max() < 1e-4


def test_modes_hold_in_their_own_thread():
    seen = []
    with modes.batch_invariant():
        thread = threading.Thread(target=lambda: seen.append(modes.is_batch_invariant()))
        thread.start()
        thread.join()
        assert modes.is_batch_invariant()
    assert seen == [False] and not modes.is_batch_invariant()
