"""Model folders in the Hugging Face layout: networks to disk and back. Weights are safetensors only."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from craton.base import UserError, publish, read_json, write_json
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.text.tokenizer import Tokenizer
from craton.weights import qwen3

FAMILIES = {"qwen3": qwen3}


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder. Raises UserError naming the key that is missing, wrong or unsupported."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    path = folder / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind].read(raw)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: missing or mistyped key ({error})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def write_config(folder: Path, config: ModelConfig, dtype: str = "float32") -> None:
    write_json(folder / "config.json", {**qwen3.write(config), "torch_dtype": dtype})
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. UserError if it is missing, truncated or not safetensors."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
    if len(head) < 8 or struct.unpack("<Q", head)[0] > min(size, 100 << 20):
        raise UserError(f"{path}: not a safetensors file, or truncated")
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with publish(path) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata or {"format": "pt"})


def released(network: Decoder, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors that a release stores: a tied head is stored once, as the embedding."""
    tensors = dict(network.state_dict() if tensors is None else tensors)
    if network.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def load_into(network: Decoder, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy tensors into the network's parameters. UserError names a missing, surplus or misshapen tensor."""
    tensors = dict(tensors)
    if network.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    own = network.state_dict()
    for name in own:
        if name not in tensors:
            raise UserError(f"{where}: tensor {name} is missing")
        if tensors[name].shape != own[name].shape:
            raise UserError(f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, config.json says {tuple(own[name].shape)}")
    if surplus := sorted(set(tensors) - set(own)):
        raise UserError(f"{where}: unknown tensor {surplus[0]}; is this the model that config.json describes?")
    network.load_state_dict(tensors, assign=True)
    if network.config.tie_word_embeddings:
        network.tie()


def load_network(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """The network of a folder with its weights, in evaluation mode. dtype None keeps the stored one."""
    config = read_config(folder)
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    tensors: dict[str, Any] = {}
    for name in names:
        tensors.update(read_tensors(folder / name))
    with torch.device("meta"):
        network = Decoder(config)
    load_into(network, tensors, folder)
    return network.to(device=device, dtype=dtype).eval()


def check_fit(config: ModelConfig, tokenizer: Tokenizer, where: Path) -> None:
    """UserError if the tokenizer gives ids that the network has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids but config.json's vocab_size is {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
