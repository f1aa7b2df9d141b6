"""One forward pass of a network over a step, on whatever serves best here."""

import copy

import torch
from torch import Tensor

from craton.model import kernels, ops
from craton.model.cache import PagedCache, Step
from craton.model.decoder import Decoder
from craton.model.serving import FusedStep, fused


class Runner:
    """A network with its cache. On a CPU with the engine's kernels whole steps run in one call where the family
    allows it, else module by module; on a GPU, PyTorch. An answer's bits do not depend on its neighbours on a CPU."""

    def __init__(self, network: Decoder, blocks: int, context: int):
        self.network, self.device = network, network.model.embed_tokens.weight.device
        native = self.device.type == "cpu" and kernels.load_serving() is not None
        self.fused: FusedStep | None = None
        dtype = torch.float32 if self.device.type == "cpu" else network.model.embed_tokens.weight.dtype
        self.cache = PagedCache(network.config, blocks, dtype, self.device)
        if native and fused(network.config):
            self.fused = FusedStep(network, self.cache.keys, self.cache.values, context)
        elif self.device.type == "cpu" and dtype != network.model.embed_tokens.weight.dtype:
            self.network = copy.deepcopy(network).float()

    @torch.inference_mode()
    def forward(self, ids: Tensor, step: Step, rows: Tensor, want_logits: bool = True) -> tuple[Tensor | None, Tensor]:
        """ids (tokens,) int32 on the CPU -> logits (outputs, vocabulary) and last hidden states (outputs, hidden) of
        the tokens in rows (outputs,), fp32 on the CPU."""
        if self.fused is not None:
            return self.fused.run(ids, step, rows, want_logits)
        with ops.row_by_row():
            hidden = self.network.model(ids.to(self.device).long()[None], step=step)[0, rows.to(self.device).long()]
            logits = self.network.head(hidden).float().cpu() if want_logits else None
        return logits, hidden.float().cpu()
