"""Matrices of 2 to 8 bits, each of GGUF's types beside the `gguf` package's own arithmetic."""

import gguf
import pytest
import torch

from craton.model import kernels, modes
from craton.model.packed import BLOCKS, PackedEmbedding, PackedLinear, PackedMatrix
from tests.model.blocks import random_blocks


def there(kind: int, blocks: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind)))


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_and_products(kind):
    torch.manual_seed(0)
    assert BLOCKS[kind] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    blocks = random_blocks(kind, 48, 512)
    matrix, want = PackedMatrix(blocks, kind), there(kind, blocks)
    numbers = torch.tensor([[3, 47], [0, 3]])
    torch.testing.assert_close(PackedEmbedding(matrix)(numbers), want[numbers], atol=1e-7, rtol=1e-6)
    layer = PackedLinear(matrix, torch.randn(48))
    for tokens in (1, 2, 4, 8, 13):
        x = torch.randn(tokens, 512)
        exact = x @ want.t() + layer.bias
        torch.testing.assert_close(layer(x), exact, atol=1e-4 * float(exact.std()), rtol=1e-5)
        with torch.inference_mode(), modes.batch_invariant():
            rounded = layer(x)
        assert float((rounded - exact).norm() / exact.norm()) < 0.012  # what 8 bits cost
        if kernels.engine_kernels() is not None:
            groups = x.unflatten(-1, (-1, 32))
            most = groups.abs().amax(-1, keepdim=True)
            x = ((groups * (127 / most)).round() * (most / 127)).flatten(-2)
            expected = x @ want.t() + layer.bias
            # A value half-way between two may be rounded to either.
            assert float((rounded - expected).norm() / expected.norm()) < 1e-3


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "engine_kernels", lambda: None)
    blocks = random_blocks(12, 32, 256)
    matrix = PackedMatrix(blocks, 12)
    torch.testing.assert_close(matrix.take(torch.arange(32)), there(12, blocks))
    x = torch.randn(3, 256)
    torch.testing.assert_close(matrix.product(x), x @ there(12, blocks).t(), atol=1e-4, rtol=1e-4)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="rows go in 16s, columns in 256s"):
        PackedMatrix(random_blocks(12, 40, 256), 12)
