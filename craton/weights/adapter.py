"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes and reads them for
linear layers and for stacks of experts."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from craton.base import UserError, read_json, write_json
from craton.model.decoder import Decoder, Experts, Linear
from craton.model.lora import LoraLinear, LoraSpec, LowRank, LowRankExperts, adapted, fold, shape_of
from craton.model.packed import PackedLinear, replace
from craton.weights.tensorfile import read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What changes the arithmetic and is not understood must be off.
_OFF: dict[str, Any] = dict(fan_in_fan_out=False, bias="none", lora_bias=False)
_OFF |= dict(layer_replication=None, alora_invocation_tokens=None, trainable_token_indices=None)
_PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds one."""
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter that is understood. UserError names what is not."""
    where = folder / CONFIG
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
    return dict(config)


@torch.no_grad()
def attach(network: Decoder, folder: Path) -> int:
    """Give a network's layers the adapter of a folder; returns how many. UserError if it is not one for this network,
    is of a kind that is not understood, or changes nothing."""
    config, path = read_config(folder), folder / WEIGHTS
    parts, saved = _read(path)
    changed = _put_saved(network, config, saved, path)
    for name, pair in parts.items():
        changed += _attach_one(network, config, name, pair, folder)
    if not changed:
        raise UserError(f"{path}: the adapter changes nothing; it was never trained, or only its A was saved")
    return len(parts)


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A and B (and magnitudes) by layers, and whole tensors that lie beside them."""
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in read_tensors(path).items():
        found = re.fullmatch(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?", key.removeprefix(_PREFIX))
        if found:
            parts.setdefault(found[1], {})[found[2]] = tensor
        else:
            saved[key.removeprefix(_PREFIX)] = tensor
    return parts, saved


def low_ranks(network: Decoder, folder: Path) -> dict[str, LowRank]:
    """An adapter's parts by the layers of a network that they go with, to be served beside others, in the type that
    they are stored in. UserError as `attach`, and for what only a network of its own can hold."""
    config, (parts, saved) = read_config(folder), _read(folder / WEIGHTS)
    modules = dict(network.named_modules())
    alone = "merge it into a model of its own (craton merge)"
    if saved or config.get("use_dora"):
        what = f"whole tensors ({next(iter(saved))})" if saved else "DoRA"
        raise UserError(f"{folder}: holds {what}, which cannot be served beside others; {alone}")
    out = {}
    for name, pair in parts.items():
        layer = modules.get(name)
        if name == "lm_head" or not isinstance(layer, Linear | PackedLinear):
            raise UserError(f"{folder / WEIGHTS}: {name} is no linear layer of this model's blocks; {alone}")
        out[name] = _low_rank(config, layer, name, pair, folder)
    if not any(bool(low.lora_B.any()) for low in out.values()):
        raise UserError(
            f"{folder / WEIGHTS}: the adapter changes nothing; it was never trained, or only its A was saved"
        )
    return out


def _put_saved(network: Decoder, config: dict[str, Any], saved: dict[str, Tensor], path: Path) -> int:
    """Whole tensors that come with an adapter: of modules_to_save, which take the place of the network's own, and of
    embedding and head, which PEFT keeps beside an adapter of them. Returns how many differ from the network's."""
    own: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    wanted, changed = config.get("modules_to_save") or [], 0
    if absent := [m for m in wanted if not any(f".{m}." in f".{key}" for key in saved)]:
        raise UserError(f"{path}: modules_to_save names {absent[0]}, but no tensor of it is there")
    for key, tensor in saved.items():
        name = re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", key)
        mine = own.get(name)
        allowed = any(f".{name}".endswith(f".{m}.weight") or f".{name}".endswith(f".{m}.bias") for m in wanted)
        beside = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        if mine is None or mine.shape != tensor.shape or not (allowed or beside):
            raise UserError(f"{path}: {key} is no part of a linear layer's adapter, which is all that is supported")
        if torch.equal(mine.float(), tensor.float()):
            continue
        if not allowed:
            raise UserError(f"{path}: {key} differs from the model's own; modules_to_save does not name it")
        if name == "lm_head.weight" and network.config.tie_word_embeddings:
            _untie(network)
        parent, _, last = name.rpartition(".")
        module = network.get_submodule(parent)
        setattr(module, last, nn.Parameter(tensor.to(mine.dtype), requires_grad=False))
        if name == "model.embed_tokens.weight" and network.config.tie_word_embeddings:
            network.tie()
        changed += 1
    return changed


def _untie(network: Decoder) -> None:
    """The head gets a matrix of its own; the embedding stays as it is."""
    network.lm_head.weight = nn.Parameter(network.lm_head.weight.clone(), requires_grad=False)
    network.config = dataclasses.replace(network.config, tie_word_embeddings=False)


def _attach_one(network: Decoder, config: dict[str, Any], name: str, pair: dict[str, Tensor], folder: Path) -> bool:
    """Whether it changes anything."""
    layer = dict(network.named_modules()).get(re.sub(r"(\.base_layer)+$", "", name))
    if isinstance(layer, Experts):
        return _attach_experts(layer, config, name, pair, folder)
    if not isinstance(layer, Linear | PackedLinear):
        raise UserError(f"{folder / WEIGHTS}: {name} is no linear layer of this model")
    low = _low_rank(config, layer, name, {k: t.float() for k, t in pair.items()}, folder)
    if name == "lm_head" and network.config.tie_word_embeddings and isinstance(layer, Linear):
        _untie(network)
    replace(network, name, LoraLinear(layer, low))
    return bool(low.lora_B.any()) or low.lora_magnitude is not None


def _low_rank(config: dict[str, Any], layer: nn.Module, name: str, pair: dict[str, Tensor], folder: Path) -> LowRank:
    """UserError where the parts do not fit the layer or each other."""
    path, shape = folder / WEIGHTS, shape_of(layer)
    a, b, magnitude = pair.get("A"), pair.get("B"), pair.get("magnitude_vector")
    if a is None or b is None or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
        raise UserError(f"{path}: {name}: A and B do not fit a layer of {shape}")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise UserError(f"{path}: {name}: use_dora is {config.get('use_dora')}, but there is {magnitude is not None}")
    if not all(torch.isfinite(t).all() for t in pair.values()):
        raise UserError(f"{path}: {name} holds numbers that are not finite")
    return LowRank(a, b, _scale(config, name, a.shape[0], folder / CONFIG), magnitude)


def _attach_experts(layer: Experts, config: dict[str, Any], name: str, pair: dict[str, Tensor], folder: Path) -> bool:
    """Of PEFT's target_parameters: the first that is named lies innermost, which its name tells."""
    named = [text.rpartition(".")[2] for text in config.get("target_parameters") or []]
    depth = len(named) - 1 - name.count(".base_layer")
    if not 0 <= depth < len(named) or named[depth] not in ("gate_up_proj", "down_proj") or len(pair) != 2:
        raise UserError(f"{folder / CONFIG}: target_parameters do not tell what {name} is an adapter of")
    own, (experts, outputs, inputs) = named[depth], layer.shape_of(named[depth])
    a, b = pair["A"].float(), pair["B"].float()
    rank = a.shape[0] // experts
    if a.shape != (experts * rank, inputs) or b.shape != (outputs, experts * rank):
        raise UserError(f"{folder / WEIGHTS}: {name}: A and B do not fit {experts} experts of {(outputs, inputs)}")
    scale = _scale(config, name, rank, folder / CONFIG)
    each = b.view(outputs, rank, experts).permute(2, 0, 1).contiguous()
    layer.adapters[own] = LowRankExperts(a.view(experts, rank, inputs), each, scale)
    return bool(b.any())


def merge(network: Decoder, folder: Path) -> int:
    """Change the network's weights by an adapter; returns how many layers it changed. UserError as `attach`, and where
    weights are packed."""
    attach(network, folder)
    try:
        changed = fold(network)
    except TypeError as error:
        fix = "merge into the model before it is quantised, or serve it with --adapter"
        raise UserError(f"{folder}: {error} has packed weights, which cannot hold an adapter; {fix}") from None
    return changed


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


# ---- writing ----------------------------------------------------------------------------------------------------


def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's adapter under PEFT's names; other tensors are left out."""
    out: dict[str, Tensor] = {}
    experts = sorted({n.rpartition(".adapters.")[0] for n in tensors if ".experts.adapters." in n})
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if not part.startswith("lora_"):
            continue
        if ".experts.adapters." in name:
            layer, _, own = layer.rpartition(".adapters.")
            inner = ".base_layer" if own == "gate_up_proj" and layer in experts else ""
            flat = tensor.flatten(0, 1) if part == "lora_A" else tensor.permute(1, 2, 0).flatten(1)
            out[f"{_PREFIX}{layer}{inner}.{part}.weight"] = flat
        elif part == "lora_magnitude":
            out[f"{_PREFIX}{layer.removesuffix('.adapter')}.lora_magnitude_vector"] = tensor
        else:
            out[f"{_PREFIX}{layer.removesuffix('.adapter')}.{part}.weight"] = tensor
    return out


def write_config(folder: Path, network: Decoder, spec: LoraSpec, base: dict[str, Any]) -> None:
    """adapter_config.json. base: where the model lies that it belongs to, and its hash."""
    layers, stacks = list[str](), list[str]()
    for name, module in adapted(network):
        if isinstance(module, Experts):
            stacks += [f"{name.rpartition('.layers.')[2].partition('.')[2]}.{own}" for own in module.adapters]
        else:
            layers.append(name.rpartition(".")[2])
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base["path"]}
    config |= {"r": spec.rank, "lora_alpha": spec.alpha, "use_rslora": spec.rank_stabilised, "use_dora": spec.dora}
    config |= {"target_modules": sorted(set(layers)), "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False}
    config |= {"inference_mode": True, "init_lora_weights": True, "modules_to_save": None, "craton_base": base}
    if stacks:
        config["target_parameters"] = sorted(set(stacks), reverse=True)  # gate_up_proj first, as it lies innermost
    write_json(folder / CONFIG, config)


def lora_tensors(network: Decoder) -> Iterator[tuple[str, Tensor]]:
    """An adapter's own tensors by the network's names."""
    return ((n, p) for n, p in network.named_parameters() if n.rpartition(".")[2].startswith("lora_"))
