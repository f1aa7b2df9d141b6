"""Compiles the GPU kernels as their callers launch them in bf16, for a card that need not be there. Prints a line for
each: its name, bytes of shared memory, registers, and bytes of stack, which registers that did not fit take.

    python -m tests.model.compile_kernels 90        compute capability 9.0
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from craton.model.gpu import attention, choose, layers, low_rank, packed, train
from craton.model.grouped import GroupedMatrix
from craton.model.paging import BLOCK

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
found: dict[str, tuple[int, int, int]] = {}


class Card:
    """As much of a driver as compiling needs."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


def only_compile(capability: int) -> None:
    """From here on a launch compiles, and notes what it needs."""
    triton.runtime.driver.set_active(Card(capability))
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found[f"{self.fn.__name__} {label}"] = (kernel.metadata.shared, *resources(kernel.asm["cubin"]))
        return kernel

    JITFunction.run = compiled
    for module in (layers, attention, packed):
        if hasattr(module, "overlaps"):
            module.overlaps = lambda device: capability >= 90
    layers.overlaps = lambda device: capability >= 90


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def products() -> None:
    global label
    x, norm, total = half(1, 2048), half(2048), half(1, 2048)
    around = {"delta": x, "norm": norm, "total": total, "eps": 1e-6}
    for gate in ("", "silu"):
        label = f"bf16 {gate}"
        weights = [half(5632, 2048)] * 2
        layers.one_row(x, weights, half(1, 5632 if gate else 11264), gate=gate, **around)
        for bits in (4, 8):
            label = f"{bits} bits {gate}"
            words = torch.zeros(11264, 64, bits, dtype=torch.int32)
            matrix = GroupedMatrix(words, torch.zeros(11264, 64, dtype=torch.int32), bits, 32)
            packed.packed_row(x, matrix, half(1, 5632 if gate else 11264), gate=gate, **around)
            for rows in (8, 32, 64):
                label = f"{bits} bits, {rows} rows"
                packed.packed_rows(half(rows, 2048), matrix, half(rows, 11264))
            packed.written_out(matrix, torch.bfloat16)
            label = f"{bits} bits, groups of 16 {gate}"
            words = torch.zeros(11264, 128, bits // 2, dtype=torch.int32)
            small = GroupedMatrix(words, torch.zeros(11264, 128, dtype=torch.int32), bits, 16)
            packed.packed_row(x, small, half(1, 5632 if gate else 11264), gate=gate, **around)
            packed.packed_rows(half(64, 2048), small, half(64, 11264))
    label = "16 ranks"
    which = torch.zeros(4, dtype=torch.int32)
    low_rank.add_low_rank(half(4, 2048), half(3, 16, 2048), half(3, 512, 16), which, half(4, 512))


def attending() -> None:
    global label
    for heads, kv, d in ((32, 4, 64), (8, 1, 256)):
        label = f"{d} wide"
        pool = half(64, kv, d, BLOCK), half(64, kv, BLOCK, d)
        lengths, tables = torch.ones(8, dtype=torch.int32), torch.zeros(8, 32, dtype=torch.int32)
        q = half(8, heads, d)
        attention.decode_attention(q, pool, lengths, tables, q, split=attention.split_of(512), scale=1.0, window=None)
        places = [lengths, lengths, torch.zeros(9, dtype=torch.int32), lengths, tables]
        tiles = torch.zeros(8, 2, dtype=torch.int32)
        attention.prompt_attention(q, pool, places, tiles, q, scale=1.0)
        turned = torch.zeros(512, d // 2), torch.zeros(512, d // 2)
        norms = half(d), half(d)
        qkv = half(8, (heads + 2 * kv) * d)
        layers.rope_store(qkv, norms, turned, lengths, lengths, pool, q, eps=1e-6)


def choosing() -> None:
    global label
    n = torch.zeros(8, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        label = f"{dtype}".removeprefix("torch.")
        logits, tokens = torch.zeros(8, 131072, dtype=dtype), torch.zeros(8, dtype=torch.int64)
        for filters in (None, (n, n)):
            choose.choose_tokens(logits, n, n, n, tokens, torch.zeros(8), filters)
    label = ""
    layers.add_rms_norm(half(8, 2048), half(8, 2048), half(2048), half(8, 2048), half(8, 2048), 1e-6)
    layers.gated_activation(half(8, 11264), "silu", half(8, 5632))
    train.cross_entropy(half(8, 32768), torch.zeros(8, dtype=torch.int64), torch.ones(8))
    many = [torch.zeros(64, 64) for _ in range(3)]
    updates = train.nesterov(many, many, 0.9, torch.bfloat16)
    train.muon_update(many, updates, 0.1, 0.1)


if __name__ == "__main__":
    label = ""
    only_compile(int(sys.argv[1]))
    products(), attending(), choosing()
    for name, numbers in found.items():
        print(name.strip(), *numbers, sep="\t")
