"""Matrices of 2 to 8 bits a weight as a GPU reads them: groups of numbers of 4 or 8 bits, each with a factor and what
is added, in fp16. All of GGUF's types become such; those whose own scales are products of two are rounded to fp16's 11
bits by it, which is finer than the bf16 that everything is computed with there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from craton.base import UserError
from craton.model import ops
from craton.model.packed import BLOCKS, FrozenProduct, PackedMatrix

_PIECE = 1 << 24  # values that are turned at once

# Where numbers lie in a block, the bytes that make all of them the lowest and the highest one, and the steps between.
_NUMBERS = {
    2: (slice(2, 18), 0x00, 0xFF, 15), 3: (slice(4, 20), 0x00, 0xFF, 15), 6: (slice(2, 22), 0x00, 0xFF, 31),
    7: (slice(4, 24), 0x00, 0xFF, 31), 8: (slice(2, 34), 0x80, 0x7F, 255), 20: (slice(2, 18), 0x00, 0xFF, 240),
    39: (slice(1, 17), 0xFF, 0x77, 24), 10: (slice(16, 80), 0x00, 0xFF, 3), 11: (slice(0, 96), 0x00, 0xFF, 7),
    12: (slice(16, 144), 0x00, 0xFF, 15), 13: (slice(16, 176), 0x00, 0xFF, 31), 14: (slice(0, 192), 0x00, 0xFF, 63),
    23: (slice(8, 136), 0x00, 0xFF, 240),
}  # fmt: skip
_OF_16 = (10, 11, 14)  # types whose scales are shared by 16 values; by 32 in the others


class GroupedMatrix(nn.Module):
    """A matrix (rows, cols). words (rows, groups, bits * group / 32) int32: word i of a group holds, from its lowest
    bits, the numbers of columns i, i + words, i + 2 words, ... scales (rows, groups) int32: two fp16, the factor in the
    lower half, what is added in the upper one."""

    words: Tensor
    scales: Tensor
    native, written = False, None  # see PackedMatrix

    def __init__(self, words: Tensor, scales: Tensor, bits: int, group: int):
        super().__init__()
        self.bits, self.group = bits, group
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @property
    def rows(self) -> int:
        return self.words.shape[0]

    @property
    def cols(self) -> int:
        return self.words.shape[1] * self.group

    @classmethod
    def of_blocks(cls, blocks: Tensor, kind: int, device: str | torch.device) -> "GroupedMatrix":
        """From blocks (rows, bytes) uint8 of one of GGUF's types. ValueError where fp16 cannot hold the scales."""
        size, width = BLOCKS[kind]
        bits, group = 4 if _NUMBERS[kind][3] < 16 else 8, 16 if kind in _OF_16 else 32
        cols = blocks.shape[1] // width * size
        many = max(16, _PIECE // cols // 16 * 16)
        parts = [_turned(piece, kind, bits, group, device) for piece in blocks.split(many)]
        words, scales = (torch.cat(t) for t in zip(*parts, strict=True))
        return cls(words, scales, bits, group)

    def as_(self, bits: int, group: int) -> "GroupedMatrix":
        """The same in as many bits or more, and groups as large or smaller."""
        if (bits, group) == (self.bits, self.group):
            return self
        numbers = _numbers(self.words, self.bits).view(self.rows, -1, group)
        return GroupedMatrix(_words(numbers, bits), self.scales.repeat_interleave(self.group // group, 1), bits, group)

    def take(self, numbers: Tensor) -> Tensor:
        """Rows by their numbers (...,) -> (..., cols) fp32."""
        ids = numbers.to(self.words.device).long()
        halves = self.scales[ids].contiguous().view(torch.float16).unflatten(-1, (-1, 2)).float()
        values = _numbers(self.words[ids], self.bits) * halves[..., :1] + halves[..., 1:]
        return values.flatten(-2)

    def product(self, x: Tensor) -> Tensor:
        """x (..., cols) times the matrix transposed -> (..., rows)."""
        if torch.is_grad_enabled() and x.requires_grad:
            return FrozenProduct.apply(x, self)
        return torch.cat([ops.linear(x, self.take(rows).to(x.dtype)) for rows in self.pieces()], -1)

    def pieces(self) -> tuple[Tensor, ...]:
        """Numbers of rows that are written out together."""
        return torch.arange(self.rows, device=self.words.device).split(max(1, _PIECE // self.cols))


def hold(blocks: Tensor, kind: int, device: str, where: str) -> "PackedMatrix | GroupedMatrix":
    """A matrix of blocks (rows, bytes) uint8 in one of GGUF's types, for the engine's kernels on a device. UserError
    naming where it was, if a GPU cannot hold it."""
    if device == "cpu":
        return PackedMatrix(blocks, kind)
    try:
        return GroupedMatrix.of_blocks(blocks, kind, device)
    except ValueError as error:
        raise UserError(f"{where}: {error}; use --device cpu") from None


def _numbers(words: Tensor, bits: int) -> Tensor:
    """words (..., groups, words) -> (..., groups, group) int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None, :] >> shifts[:, None]) & (2**bits - 1)).flatten(-2)


def _words(numbers: Tensor, bits: int) -> Tensor:
    """numbers (rows, groups, group) int32 -> (rows, groups, words) int32."""
    columns = numbers.unflatten(-1, (32 // bits, -1))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=numbers.device)
    return (columns << shifts[:, None]).sum(-2, dtype=torch.int32)  # each bit is set once


def _turned(blocks: Tensor, kind: int, bits: int, group: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """words and scales of some rows, made on their device. What a scale is, is read off the lowest and the highest
    numbers' values."""
    where, lowest, highest, steps = _NUMBERS[kind]
    rows = torch.arange(blocks.shape[0])
    whole = PackedMatrix(blocks, kind).take(rows).to(device).unflatten(-1, (-1, group))
    ends = []
    for byte in (lowest, highest):
        probe = blocks.unflatten(-1, (-1, BLOCKS[kind][1])).clone()
        probe[..., where] = byte
        ends.append(PackedMatrix(probe.flatten(-2), kind).take(rows).to(device).unflatten(-1, (-1, group))[..., 0])
    low, factor = ends[0], (ends[1] - ends[0]) / steps
    inverse = torch.where(factor == 0, 0.0, 1 / factor)
    numbers = ((whole - low[..., None]) * inverse[..., None]).round().clamp(0, steps)
    pair = torch.stack([factor, low], -1).half()
    again = numbers * pair[..., :1].float() + pair[..., 1:].float()
    allowed = 2**-10 * (factor.abs() * steps + low.abs())[..., None]
    if not bool(((again - whole).abs() <= allowed).all()):
        raise ValueError("its scales are too small or too large for fp16")
    return _words(numbers.int(), bits), pair.view(torch.int32)[..., 0]


def joined(matrices: Sequence[GroupedMatrix]) -> GroupedMatrix:
    """One matrix with the rows of all, of which they become parts: nothing is held twice."""
    bits, group = max(m.bits for m in matrices), min(m.group for m in matrices)
    if (together := _together(matrices)) is not None:
        return together
    same = [m.as_(bits, group) for m in matrices]
    whole = GroupedMatrix(torch.cat([m.words for m in same]), torch.cat([m.scales for m in same]), bits, group)
    at = 0
    for matrix in matrices:
        rows = matrix.rows
        matrix.words, matrix.scales = whole.words[at : at + rows], whole.scales[at : at + rows]
        matrix.bits, matrix.group = bits, group
        at += rows
    return whole


def _together(matrices: Sequence[GroupedMatrix]) -> GroupedMatrix | None:
    """The whole that matrices were made parts of before, if they were."""
    first, rows = matrices[0], sum(m.rows for m in matrices)
    for name in ("words", "scales"):
        parts = [getattr(m, name) for m in matrices]
        end = parts[0].data_ptr()
        for part in parts:
            if part.data_ptr() != end or part.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr():
                return None
            end += part.numel() * part.element_size()
    words, scales = (t.as_strided((rows, *t.shape[1:]), t.stride()) for t in (first.words, first.scales))
    return GroupedMatrix(words, scales, first.bits, first.group)
