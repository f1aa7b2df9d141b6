"""Matrices of 2 to 8 bits a weight, in GGUF's types (formats.h).

They stay as they are in memory. Inside the engine they are multiplied by its kernels (products.h), which round
activations to 8 bits; elsewhere, where that was not wanted (modes.exact_activations), and where the kernels are missing
(another processor, no compiler at installation), they are written out in fp32 for each product.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from craton.model import kernels, modes, native, ops

GROUP = 32  # values that share a scale, in the types that craton itself writes
# Values and bytes of a block, by GGUF's number of a type.
BLOCKS = {2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 20: (32, 18), 39: (32, 17)}
BLOCKS |= {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 23: (256, 136)}
Q4_0, Q8_0 = 2, 8
OF_BITS = {4: Q4_0, 8: Q8_0}  # what craton itself writes
_PIECE = 1 << 24  # values that are written out at once


def unpacked(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """values (rows, cols * bits / 8) uint8 as they lie in folders, scales (rows, cols / 32) -> (rows, cols) fp32."""
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2)
    signed = values.float() - (8 if bits == 4 else 128)
    return (signed.unflatten(-1, (-1, GROUP)) * scales.float()[..., None]).flatten(-2)


def blocks_of(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The same as the blocks of Q4_0 or Q8_0, (rows, bytes) uint8."""
    rows, groups = scales.shape
    head = scales.half().contiguous().view(rows, groups, 1).view(torch.uint8)
    if bits == 8:
        body = (values.view(rows, groups, GROUP).to(torch.int16) - 128).to(torch.int8).view(torch.uint8)
    else:
        columns = torch.stack([values & 15, values >> 4], -1).view(rows, groups, GROUP)
        body = columns[..., :16] | (columns[..., 16:] << 4)
    return torch.cat([head, body], -1).view(rows, -1)


class _Arena:
    """Memory with large pages, which batch 1 reads 5 % faster than small ones; several tensors share a piece."""

    PIECE = 64 << 20

    def __init__(self) -> None:
        self.left = torch.empty(0, dtype=torch.uint8)
        self.lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """size bytes, 0."""
        with self.lock:
            if self.left.numel() < size:
                self.left = torch.empty(max(self.PIECE, size), dtype=torch.uint8)
                kernels.engine_kernels().craton_advise(self.left.data_ptr(), self.left.numel())
            room, self.left = self.left[:size], self.left[-(-size // 64) * 64 :]
        return room.zero_()


_ARENA = _Arena()


def can_pack(rows: int, cols: int, kind: int = Q8_0) -> bool:
    """Whether a matrix of this shape can be held in a type."""
    return kind in BLOCKS and rows % 16 == 0 and cols % BLOCKS[kind][0] == 0


def _packed_linear(x: Tensor, packed: Tensor, rows: int, kind: int) -> Tensor:
    matrix = native.MatrixC(packed.data_ptr(), None, rows, x.shape[-1], kind)
    return native.product(kernels.engine_kernels(), matrix, x)


_LIBRARY = torch.library.Library("craton", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor packed, int rows, int kind) -> Tensor")
_LIBRARY.impl("packed_linear", _packed_linear, "CPU")
_LIBRARY.impl("packed_linear", lambda x, packed, rows, kind: x.new_empty(*x.shape[:-1], rows), "Meta")


class PackedMatrix(nn.Module):
    """A matrix (rows, cols) in one of GGUF's types, which an embedding and a head may share."""

    def __init__(self, blocks: Tensor, kind: int):
        """blocks: (rows, bytes) uint8, as GGUF has them."""
        super().__init__()
        size, width = BLOCKS[kind]
        self.kind, self.rows, self.cols = kind, blocks.shape[0], blocks.shape[1] // width * size
        if not can_pack(self.rows, self.cols, kind):
            shape = f"{self.rows} rows and {self.cols} columns"
            raise ValueError(f"{shape} cannot be packed; rows go in 16s, columns in {size}s")
        self.native = kernels.engine_kernels() is not None
        self.written: Tensor | None = None  # the same in fp32, where it is wanted often
        self.register_buffer("data", self._panels(blocks) if self.native else blocks, persistent=False)

    def _panels(self, blocks: Tensor) -> Tensor:
        library, blocks = kernels.engine_kernels(), blocks.contiguous()
        out = _ARENA.take(library.craton_packed_bytes(self.kind, self.rows, self.cols))
        places = blocks.data_ptr(), self.rows, self.cols, out.data_ptr()
        library.craton_pack(self.kind, *places, torch.get_num_threads())
        return out

    def matrix(self, bias: int | None = None) -> native.MatrixC:
        """As the kernels take it; only where there are kernels. bias: where it lies."""
        return native.MatrixC(self.data.data_ptr(), bias, self.rows, self.cols, self.kind)  # type: ignore[operator]

    def take(self, numbers: Tensor) -> Tensor:
        """Rows by their numbers (...,) -> (..., cols) fp32: the values that the file has."""
        flat = numbers.flatten().long().contiguous()
        if self.native:
            out = torch.empty(flat.shape[0], self.cols)
            native.rows_of(kernels.engine_kernels(), self.matrix(), flat, out)
        else:
            from gguf import GGMLQuantizationType, quants  # takes half a second to import

            blocks: Tensor = self.data[flat]  # type: ignore[index]
            out = torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType(self.kind)))
        return out.view(*numbers.shape, self.cols)

    def write_out(self) -> None:
        """Hold the matrix in fp32 too."""
        self.written = self.take(torch.arange(self.rows))

    def product(self, x: Tensor) -> Tensor:
        """x (..., cols) times the matrix transposed -> (..., rows)."""
        if torch.is_grad_enabled() and x.requires_grad:
            return FrozenProduct.apply(x, self)
        if self.native and modes.rounds_activations():
            return torch.ops.craton.packed_linear(x.float(), self.data, self.rows, self.kind)
        if self.written is not None:
            return ops.linear(x, self.written.to(x.dtype))
        return torch.cat([ops.linear(x, self.take(rows).to(x.dtype)) for rows in self.pieces()], -1)

    def pieces(self) -> tuple[Tensor, ...]:
        """Numbers of rows that are written out together."""
        return torch.arange(self.rows).split(max(1, _PIECE // self.cols))


class FrozenProduct(torch.autograd.Function):
    """A product whose matrix is kept: it is written out anew for the gradient, not held until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Any) -> Tensor:
        ctx.matrix = matrix
        return matrix.product(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        matrix, at, dx = ctx.matrix, 0, None
        for rows in matrix.pieces():
            part = ops.linear(dy[..., at : at + len(rows)].contiguous(), matrix.take(rows).to(dy.dtype).t())
            dx = part if dx is None else dx + part
            at += len(rows)
        return dx, None  # type: ignore[return-value]


class PackedLinear(nn.Module):
    """A Linear with a packed weight; for inference only. On a GPU its matrix is grouped (grouped.py)."""

    def __init__(self, weight: Any, bias: Tensor | None = None):
        super().__init__()
        self.packed = weight
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def plain_weight(self) -> Tensor | None:
        """The weight in fp32, if it is written out and a product with it is all that the layer is."""
        rounds = self.packed.native and modes.rounds_activations()
        return None if rounds or self.bias is not None else self.packed.written


class PackedEmbedding(nn.Module):
    """An Embedding with a packed weight; for inference only."""

    def __init__(self, weight: Any):
        super().__init__()
        self.packed = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.packed.take(ids)


def holds_packed(network: nn.Module) -> bool:
    """Whether any layer is packed, for whatever device."""
    return any(isinstance(m, PackedMatrix | PackedLinear) for m in network.modules())


def replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the network's module of this name."""
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)
