"""The engine's kernels: against plain PyTorch, and a row's bits against whatever is computed beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.model import kernels, native, ops
from craton.model.cache import PagedCache, single_step
from craton.model.serving import FusedStep, PackedLinear, fused, unpacked
from craton.weights.folder import load_network
from tests.weights.families import FAMILIES, make

library = kernels.load_serving()
pytestmark = pytest.mark.skipif(library is None, reason="kernels not built")


def weights(rows, cols, bits):
    values = torch.randint(0, 256, (rows, cols * bits // 8), dtype=torch.uint8)
    scales = (torch.rand(rows, cols // 32) * 0.1 - 0.05).half()
    return values, scales


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 9), cols=st.integers(1, 9), tokens=st.integers(1, 40))
def test_packed_linear(bits, rows, cols, tokens):
    torch.manual_seed(rows * 100 + cols)
    values, scales = weights(rows * 16, cols * 32, bits)
    layer, x = PackedLinear(values, scales, bits), torch.randn(tokens, cols * 32)
    x[0, :32] = 0
    y = layer(x)
    scale = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    rounded = (torch.where(scale > 0, (x.unflatten(-1, (-1, 32)) / scale).round(), 0) * scale).flatten(-2)
    torch.testing.assert_close(y, rounded @ unpacked(values, scales, bits).t(), atol=2e-3, rtol=1e-3)
    for t in range(tokens):
        assert torch.equal(layer(x[t : t + 1])[0], y[t])


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
        with ops.row_by_row():
            outputs = []
            for cuts in ((0, 60), (0, 20, 21, 22, 37, 60), tuple(range(61))):
                cache = PagedCache(network.config, 4)
                outputs.append(
                    torch.cat(
                        [
                            network(ids[:, a:b], single_step(cache, a, b - a))
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
    assert fused(network.config)
    ids = torch.randint(3, 128, (1, 60))
    with torch.inference_mode():
        plain = load_network(tmp_path, dtype=dtype).float()(ids)
        outputs = []
        for cuts in ((0, 60), (0, 20, 21, 23, 37, 60), tuple(range(61))):
            cache = PagedCache(network.config, 4)
            run = FusedStep(network, cache.keys, cache.values, 64)
            parts = []
            for a, b in zip(cuts, cuts[1:], strict=False):
                logits, hidden = run.run(
                    ids[0, a:b].int(), single_step(cache, a, b - a), torch.arange(b - a, dtype=torch.int32)
                )
                parts.append(logits)
            outputs.append(torch.cat(parts))
    torch.testing.assert_close(outputs[0][None], plain, atol=2e-4, rtol=0)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("bits", [4, 8])
def test_instruction_sets_agree(bits):
    """Every compiled variant that this processor runs gives the same bits for packed weights, and the same fp32
    products but for rounding."""
    import ctypes
    from pathlib import Path

    flags = set(kernels.cpu_facts()["flags"].split())
    needs = {"v3": "avx2", "v3vnni": "avx_vnni", "v4": "avx512bw", "v4vnni": "avx512_vnni"}
    torch.manual_seed(0)
    values, scales = weights(48, 96, bits)
    x, w = torch.randn(21, 96) * 3, torch.randn(21, 100)
    w2 = torch.randn(37, 100)
    packed, plain = [], []
    for level, flag in needs.items():
        found = sorted(Path(kernels.__file__).parent.glob(f"_serve_{level}.*so"))
        if flag not in flags or not found:
            continue
        other = ctypes.CDLL(str(found[0]))
        for name, arguments in kernels._SERVING.items():
            getattr(other, name).argtypes = arguments
        panels, out = torch.empty(48 * 3 * (bits * 4 + 2), dtype=torch.uint8), torch.empty(21, 48)
        other.serve_pack(bits, values.data_ptr(), scales.data_ptr(), 48, 96, panels.data_ptr(), 2)
        matrix = native.MatrixC(panels.data_ptr(), None, 48, 96, bits)
        other.serve_linear(ctypes.byref(matrix), x.data_ptr(), 21, out.data_ptr(), 2)
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
    kernels.load_serving.cache_clear()
    monkeypatch.setattr(kernels, "cpu_facts", lambda: {"flags": ""})
    try:
        got = Engine(load_network(tmp_path)).generate(prompts, Sampling(20, 0.0, ignore_eos=True))
        small = Engine(pack_network(load_network(tmp_path), 8)).generate(prompts, Sampling(4, 0.0, ignore_eos=True))
        assert capsys.readouterr().err.count("install a C++ compiler") == 1
    finally:
        kernels.load_serving.cache_clear()
    assert [a[0].token_ids for a in got] == [a[0].token_ids for a in want] and len(small[0][0].token_ids) == 4
