"""One forward pass of a network over a batch, on whatever serves best here."""

import contextlib
import copy
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from craton.base import UserError, free_memory
from craton.model import kernels, modes
from craton.model.cache import PagedCache, TokenBatch
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.fused import MOST_ADAPTERS, FusedStep, fits, fits_gpu
from craton.model.gpu import train_kernels
from craton.model.grouped import GroupedMatrix
from craton.model.lora import LoraLinear, LowRank, adapted
from craton.model.packed import PackedMatrix

OWN = 0  # the number of the adapter that is part of a network


def fits_device(config: ModelConfig) -> bool:
    """Whether a GPU's kernels can make such a network's steps."""
    return train_kernels is not None and fits_gpu(config)


def cache_dtype(network: Decoder) -> torch.dtype:
    """Of keys and values: fp32 on a CPU, the weights' elsewhere."""
    weight = network.model.norm.weight
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


def _give_back() -> None:
    """What loading needed for a moment goes back to the system; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Runner:
    """A network with its cache. On a CPU with the engine's kernels whole steps run in one call where the family
    allows it, and on a GPU as few kernels (gpu/step.py); else module by module. An answer's bits do not depend on
    its neighbours on a CPU."""

    def __init__(
        self, network: Decoder, blocks: int, context: int, exact: bool = False, dtype: torch.dtype | None = None
    ):
        """context: the longest sequence that will come. exact: activations are not rounded for packed weights. dtype:
        of what is computed on a GPU; the weights' if nothing is said."""
        self.packed = any(isinstance(m, PackedMatrix) for m in network.modules())
        self.exact = exact and self.packed
        self.source, self.device, self.context = network, network.model.norm.weight.device, context
        dtype = dtype if dtype is not None and self.device.type != "cpu" else cache_dtype(network)
        self.cache = PagedCache(network.config, blocks, dtype, self.device)
        self.device_step: Any = None  # a DeviceStep, whose module needs Triton
        if self.device.type == "cuda" and fits_device(network.config):
            from craton.model.gpu import step

            if step.fits(network):
                self.device_step = step.DeviceStep(network, self.cache, context, blocks - 1, dtype)
        self.adapters: dict[str, tuple[int, dict[str, LowRank]]] = {}
        self.numbers: dict[str, int] = {}
        self.weights_changed()
        if self.exact:
            self._write_out()
        _give_back()

    def weights_changed(self) -> None:
        """Take the network's weights as they are now. Matrices are read in place, but vectors and weights of another
        type than the cache's are held as copies."""
        network = self.source
        self.fused: FusedStep | None = None
        live = {n: m for n, m in adapted(network) if isinstance(m, LoraLinear)}
        plain = all(m.adapter.lora_magnitude is None and n.endswith("_proj") for n, m in live.items())
        plain = plain and not any(isinstance(m, GroupedMatrix) for m in network.modules())
        if self.device.type == "cpu" and kernels.engine_kernels() is not None and fits(network.config) and plain:
            self.fused = FusedStep(network, self.cache, self.context)
            if live:  # the network's own adapter, of every token
                self.fused.put_adapter(OWN, {n: m.adapter for n, m in live.items()})
            for number, parts in self.adapters.values():
                self.fused.put_adapter(number, parts)
        if self.device_step is not None and live:
            self.device_step.put_adapter(OWN, {n: m.adapter for n, m in live.items()})
        self.own_adapter = bool(live)
        self.wide: Decoder | None = None

    def load_adapter(self, name: str, parts: dict[str, LowRank]) -> None:
        """Make an adapter known, beside the network as it is. UserError where steps do not run in one call, or too many
        are known."""
        step = self.device_step or self.fused
        if step is None or self.exact or self.own_adapter:
            raise UserError(f"adapter {name}: this model's steps do not take adapters here; merge it (craton merge)")
        used = {number for number, _ in self.adapters.values()}
        number = next((i for i in range(1, MOST_ADAPTERS) if i not in used), None)
        if number is None:
            raise UserError(f"adapter {name}: {len(used)} are loaded, which is the most; drop one first")
        step.put_adapter(number, parts)
        self.adapters[name] = number, parts
        self.numbers[name] = number

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter that nothing uses any more."""
        number, _ = self.adapters.pop(name)
        del self.numbers[name]
        step = self.device_step or self.fused
        if step is not None:
            step.remove_adapter(number)

    def adapter_number(self, name: str | None) -> int:
        """Of an adapter beside the network, or the network's own; -1: none."""
        if name is not None:
            return self.numbers[name]
        return OWN if self.own_adapter else -1

    def modules(self) -> Decoder:
        """The network as it runs module by module: on a CPU in fp32, packed matrices shared."""
        if self.wide is None:
            self.wide = network = self.source
            if self.device.type == "cpu" and any(p.dtype != torch.float32 for p in network.parameters()):
                shared: dict[int, object] = {id(m): m for m in network.modules() if isinstance(m, PackedMatrix)}
                self.wide = copy.deepcopy(network, shared).float()
        return self.wide

    def _write_out(self) -> list[PackedMatrix]:
        """Packed weights in fp32 too, if memory allows; returns those that were."""
        matrices = [m for m in self.source.modules() if isinstance(m, PackedMatrix) and m.written is None]
        if 4 * sum(m.rows * m.cols for m in matrices) > free_memory() // 2:
            return []
        for matrix in matrices:
            matrix.write_out()
        return matrices

    @contextlib.contextmanager
    def exactly(self) -> Iterator[None]:
        """Inside, activations are not rounded. Packed weights are written out for as long, if memory allows."""
        before, self.exact = self.exact, self.packed
        written = list[PackedMatrix]()
        try:
            written = self._write_out()
            yield
        finally:
            self.exact = before
            for matrix in written:
                matrix.written = None

    @torch.inference_mode()
    def forward(
        self, ids: Tensor, batch: TokenBatch, rows: Tensor, want_logits: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """ids (tokens,) int32 on the device -> logits (outputs, vocabulary) and last hidden states (outputs, hidden) of
        the tokens in rows (outputs,), fp32 on the CPU."""
        if self.own_adapter:
            batch.adapters = torch.full_like(ids, OWN)
        if self.device_step is not None:
            logits, hidden = self.device_step.run(ids, batch, rows, want_logits)
            return None if logits is None else logits.float().cpu(), hidden.float().cpu()
        if self.fused is not None and not self.exact:
            return self.fused.run(ids, batch, rows, want_logits)
        with modes.batch_invariant(), modes.exact_activations() if self.exact else contextlib.nullcontext():
            network = self.modules()
            hidden = network.model(ids.long()[None], past=batch)
            hidden = hidden[0, rows.long()]
            logits = network.head(hidden).float().cpu() if want_logits else None
        return logits, hidden.float().cpu()
