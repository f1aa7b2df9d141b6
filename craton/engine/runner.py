"""One forward pass of a network over a batch, on whatever serves best here."""

import copy

import torch
from torch import Tensor

from craton.model import kernels, modes
from craton.model.cache import PagedCache, TokenBatch
from craton.model.decoder import Decoder
from craton.model.fused import FusedStep, fits


def cache_dtype(network: Decoder) -> torch.dtype:
    """Of keys and values: fp32 on a CPU, the weights' elsewhere."""
    weight = network.model.norm.weight
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


class Runner:
    """A network with its cache. On a CPU with the engine's kernels whole steps run in one call where the family
    allows it, else module by module; on a GPU, PyTorch. An answer's bits do not depend on its neighbours on a CPU."""

    def __init__(self, network: Decoder, blocks: int, context: int):
        """context: the longest sequence that will come."""
        self.source, self.device, self.context = network, network.model.norm.weight.device, context
        self.cache = PagedCache(network.config, blocks, cache_dtype(network), self.device)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Take the network's weights as they are now. Matrices are read in place, but vectors and weights of another
        type than the cache's are held as copies."""
        network = self.source
        self.fused: FusedStep | None = None
        self.network = network
        on_cpu = self.device.type == "cpu"
        if on_cpu and kernels.engine_kernels() is not None and fits(network.config):
            self.fused = FusedStep(network, self.cache, self.context)
        elif on_cpu and any(p.dtype != torch.float32 for p in network.parameters()):
            self.network = copy.deepcopy(network).float()

    @torch.inference_mode()
    def forward(
        self, ids: Tensor, batch: TokenBatch, rows: Tensor, want_logits: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """ids (tokens,) int32 on the device -> logits (outputs, vocabulary) and last hidden states (outputs, hidden) of
        the tokens in rows (outputs,), fp32 on the CPU."""
        if self.fused is not None:
            return self.fused.run(ids, batch, rows, want_logits)
        with modes.batch_invariant():
            hidden = self.network.model(ids.long()[None], past=batch)
            hidden = hidden[0, rows.long()]
            logits = self.network.head(hidden).float().cpu() if want_logits else None
        return logits, hidden.float().cpu()
