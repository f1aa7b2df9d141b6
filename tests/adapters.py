"""Adapters made up for tests: of every linear layer, strong enough to change answers."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from craton.model.lora import LoraSpec, put_adapters
from craton.weights import adapter
from craton.weights.folder import load_network


def made_up(model_folder: Path, folder: Path, spec: LoraSpec, seed: int, strength: float) -> Any:
    """Write an adapter of a model to a new folder; returns the network with it."""
    network = load_network(model_folder).float()
    put_adapters(network, spec, seed)
    r = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if name.endswith("lora_B"):
            p.data = strength * torch.randn(p.shape, generator=r)
        elif name.endswith("magnitude"):
            p.data = p.data * (1 + 0.1 * torch.rand(p.shape, generator=r))
    folder.mkdir()
    tensors = {n: t.detach().contiguous() for n, t in adapter.published(dict(network.named_parameters())).items()}
    save_file(tensors, folder / adapter.WEIGHTS)
    adapter.write_config(folder, network, spec, {"path": str(model_folder), "sha256": ""})
    return network
