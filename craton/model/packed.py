"""Projections whose weights have 8 or 4 bits, a scale for every 32 values.

They are multiplied by the engine's kernels (products.h). Where those are missing (another processor, no compiler at
installation) packed weights are written out in fp32 for each product, which is said once.
"""

import threading

import torch
from torch import Tensor, nn

from craton.model import kernels, native

GROUP = 32  # values that share a scale


def unpacked(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """values (rows, cols * bits / 8) uint8 as they lie in files, scales (rows, cols / 32) -> (rows, cols) fp32."""
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2)
    signed = values.float() - (8 if bits == 4 else 128)
    return (signed.unflatten(-1, (-1, GROUP)) * scales.float()[..., None]).flatten(-2)


class _Arena:
    """Memory with large pages, which batch 1 reads 5 % faster than small ones; several tensors share a piece."""

    PIECE = 64 << 20

    def __init__(self) -> None:
        self.left = torch.empty(0, dtype=torch.uint8)
        self.lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """size bytes."""
        with self.lock:
            if self.left.numel() < size:
                self.left = torch.empty(max(self.PIECE, size), dtype=torch.uint8)
                kernels.engine_kernels().craton_advise(self.left.data_ptr(), self.left.numel())
            room, self.left = self.left[:size], self.left[-(-size // 64) * 64 :]
        return room


_ARENA = _Arena()


def pack(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The same in the kernels' panels, (rows * cols / 32 * (16 or 32 bytes + 2),) uint8."""
    library = kernels.engine_kernels()
    assert library is not None
    rows, cols = values.shape[0], values.shape[1] * 8 // bits
    out = _ARENA.take(rows * (cols // GROUP) * (bits * 4 + 2))
    values, scales = values.contiguous(), scales.half().contiguous()
    library.craton_pack(bits, values.data_ptr(), scales.data_ptr(), rows, cols, out.data_ptr(), torch.get_num_threads())
    return out


def can_pack(rows: int, cols: int) -> bool:
    """Whether a matrix of this shape can be stored in 8 or 4 bits."""
    return rows % 16 == 0 and cols % GROUP == 0


def _packed_linear(x: Tensor, packed: Tensor, rows: int, bits: int) -> Tensor:
    matrix = native.MatrixC(packed.data_ptr(), None, rows, x.shape[-1], bits)
    return native.product(kernels.engine_kernels(), matrix, x)


_LIBRARY = torch.library.Library("craton", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor packed, int rows, int bits) -> Tensor")
_LIBRARY.impl("packed_linear", _packed_linear, "CPU")
_LIBRARY.impl("packed_linear", lambda x, packed, rows, bits: x.new_empty(*x.shape[:-1], rows), "Meta")


class PackedLinear(nn.Module):
    """A Linear whose weight has 8 or 4 bits a value and a scale for every 32; for inference only."""

    def __init__(self, values: Tensor, scales: Tensor, bits: int, bias: Tensor | None = None):
        super().__init__()
        self.bits, self.rows, self.cols = bits, values.shape[0], values.shape[1] * 8 // bits
        if not can_pack(self.rows, self.cols):
            raise ValueError(
                f"{self.rows} rows and {self.cols} columns cannot be packed; rows go in 16s, columns in 32s"
            )
        self.native = values.device.type == "cpu" and kernels.engine_kernels() is not None
        self.register_buffer("values", pack(values, scales, bits) if self.native else values, persistent=False)
        self.register_buffer("scales", None if self.native else scales, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            y = torch.ops.craton.packed_linear(x.float(), self.values, self.rows, self.bits)
        else:
            y = x @ unpacked(self.values, self.scales, self.bits).to(x.dtype).t()  # type: ignore[arg-type]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the network's module of this name."""
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)
