"""Packed matrices as a GPU reads them, and their products, under Triton's interpreter where there is no GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.model import plain
from craton.model.grouped import GroupedMatrix, joined
from craton.model.packed import BLOCKS, PackedMatrix
from tests.model.blocks import random_blocks

pytest.importorskip("triton")
from craton.model.gpu import packed as gpu_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = st.sampled_from(list(BLOCKS))
FEW = settings(max_examples=10, deadline=None)


def grouped(kind, rows, cols):
    """A matrix, and its values."""
    torch.manual_seed(kind)
    made = GroupedMatrix.of_blocks(random_blocks(kind, rows, cols), kind, DEVICE)
    return made, made.take(torch.arange(rows))


def near(found, wanted, tolerance=2e-5):
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found.float(), wanted.float(), atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_are_the_files(kind):
    blocks = random_blocks(kind, 48, 512)
    wanted = PackedMatrix(blocks, kind).take(torch.arange(48))
    matrix = GroupedMatrix.of_blocks(blocks, kind, DEVICE)
    near(matrix.take(torch.arange(48)).cpu(), wanted, 1e-3)
    if kind in (2, 3, 6, 7, 8, 39):  # with scales that are fp16 themselves
        assert torch.equal(matrix.take(torch.arange(48)).cpu(), wanted)
    near(gpu_packed.written_out(matrix, torch.float32).cpu(), wanted, 1e-3)


def test_scales_that_fp16_cannot_hold_are_refused():
    blocks = random_blocks(12, 16, 256)
    blocks[:, :2] = torch.tensor([0xFF, 0x7B], dtype=torch.uint8)  # 65504, times what 6 bits say
    with pytest.raises(ValueError, match="fp16"):
        GroupedMatrix.of_blocks(blocks, 12, DEVICE)


def test_matrices_of_several_types_become_one():
    parts = [grouped(kind, 16, 256) for kind in (12, 14, 2)]
    wanted = torch.cat([values for _, values in parts])
    whole = joined([matrix for matrix, _ in parts])
    assert torch.equal(whole.take(torch.arange(48)), wanted)
    again = joined([matrix for matrix, _ in parts])
    assert again.words.data_ptr() == whole.words.data_ptr() and torch.equal(again.words, whole.words)
    for matrix, values in parts:
        assert torch.equal(matrix.take(torch.arange(16)), values)
        assert matrix.words.untyped_storage().data_ptr() == whole.words.untyped_storage().data_ptr()


@FEW
@given(
    kind=KINDS,
    rows=st.integers(1, 2),
    shape=st.sampled_from([(48, 256), (32, 768)]),
    norm=st.booleans(),
    delta=st.booleans(),
    bias=st.booleans(),
    offset=st.booleans(),
    gate=st.sampled_from(["", "silu", "gelu_pytorch_tanh"]),
)
def test_a_row(kind, rows, shape, norm, delta, bias, offset, gate):
    matrix, values = grouped(kind, *shape)
    n, k = shape
    x, d, g = (torch.randn(s, device=DEVICE) for s in ((rows, k), (rows, k), (k,)))
    b = torch.randn(n, device=DEVICE) if bias else None
    out = torch.full((rows, n // 2 if gate else n), torch.nan, device=DEVICE)
    total = torch.full_like(x, torch.nan)
    more = {"norm": g, "total": total, "delta": d if delta else None, "eps": 1e-6, "offset": offset} if norm else {}
    gpu_packed.packed_row(x, matrix, out, bias=b, gate=gate, **more)
    y = x
    if norm:
        added, y = plain.add_rms_norm(x, d if delta else None, 1 + g if offset else g, 1e-6)
        near(total, added)
    wanted = y @ values.t() + (0 if b is None else b)
    near(out, plain.gated_activation(wanted, gate) if gate else wanted)


@FEW
@given(kind=KINDS, rows=st.sampled_from([1, 3, 17, 65, 130]), k=st.sampled_from([256, 768]), bias=st.booleans())
def test_several_rows(kind, rows, k, bias):
    matrix, values = grouped(kind, 80, k)
    x = torch.randn(rows, k, device=DEVICE)
    b = torch.randn(80, device=DEVICE) if bias else None
    whole = torch.full((rows, 100), torch.nan, device=DEVICE)
    gpu_packed.packed_rows(x, matrix, whole[:, 10:90], b)
    near(whole[:, 10:90], x @ values.t() + (0 if b is None else b))
    assert bool(whole[:, :10].isnan().all() and whole[:, 90:].isnan().all())
