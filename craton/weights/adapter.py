"""LoRA adapters (arXiv 2106.09685) in PEFT's layout, merged into a network: W + scale * B A.

`adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them for linear layers.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from craton.base import UserError, read_json
from craton.model.decoder import Decoder, Linear
from craton.weights.tensorfile import read_tensors

# What changes the arithmetic and is not understood must be off.
_OFF: dict[str, Any] = dict(use_dora=False, fan_in_fan_out=False, bias="none", modules_to_save=None, lora_bias=False)
_OFF |= dict(layer_replication=None, alora_invocation_tokens=None, trainable_token_indices=None)


@torch.no_grad()
def merge(network: Decoder, folder: Path) -> int:
    """Change the network's weights by an adapter; returns how many layers it changed. UserError if the adapter is not
    one for this network, is of a kind that is not understood, or changes nothing."""
    where = folder / "adapter_config.json"
    config = read_json(where)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{where}: peft_type is {kind!r}; only LORA is understood")
    for name, off in _OFF.items():
        if config.get(name, off) not in (off, None, [], {}):
            raise UserError(f"{where}: {name} is {config[name]!r}, which is not supported")
    if re.match(r"pissa|olora|corda|loftq", how := str(config.get("init_lora_weights")).lower()):
        why = "which changed the model's own weights too; convert it to plain LoRA when it is saved"
        raise UserError(f"{where}: init_lora_weights is {how!r}, {why}")
    path = folder / "adapter_model.safetensors"
    tensors = read_tensors(path)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        own = _untouched(network, key)
        if own is not None and own.shape == tensor.shape and torch.equal(own.float(), tensor.float()):
            continue  # PEFT keeps the embedding beside an adapter of the head
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight", key)
        if not found:
            raise UserError(f"{path}: {key} is not the A or B of a linear layer, which is all that is supported")
        parts.setdefault(found[1], {})[found[2]] = tensor.float()
    modules, changed = dict(network.named_modules()), 0
    for name, pair in parts.items():
        layer = modules.get(name)
        if not isinstance(layer, Linear):
            hint = "; merge into the model before it is quantised" if layer is not None else ""
            raise UserError(f"{path}: {name} is no plain linear layer of this model{hint}")
        a, b, shape = pair.get("A"), pair.get("B"), tuple(layer.weight.shape)
        if a is None or b is None or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
            raise UserError(f"{path}: {name}: A and B do not fit a layer of {shape}")
        delta = _scale(config, name, a.shape[0], where) * (b @ a)
        if not torch.isfinite(delta).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")
        if name == "lm_head" and network.config.tie_word_embeddings:  # the embedding stays as it is
            layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
            network.config = dataclasses.replace(network.config, tie_word_embeddings=False)
        layer.weight.copy_((layer.weight.float() + delta.to(layer.weight.device)).to(layer.weight.dtype))
        changed += bool(delta.any())
    if not changed:
        raise UserError(f"{path}: the adapter changes nothing; it was never trained, or only its A was saved")
    return changed


def _untouched(network: Decoder, key: str) -> torch.Tensor | None:
    """The network's own tensor where an adapter's file holds one that is no part of the adapter."""
    name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    own: dict[str, torch.Tensor] = dict(network.named_parameters(remove_duplicate=False))
    return own.get(name) if name.endswith(("embed_tokens.weight", "lm_head.weight")) else None


def _scale(config: dict[str, Any], name: str, rank: int, where: Path) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (arXiv 2312.03732); patterns as PEFT reads them."""

    def of(pattern: str, default: str) -> Any:
        for key, value in (config.get(pattern) or {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{key})", name):
                return value
        return config.get(default)

    r, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    if r != rank or not isinstance(alpha, int | float):
        raise UserError(f"{where}: r is {r!r} and lora_alpha {alpha!r}, but {name} has rank {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
