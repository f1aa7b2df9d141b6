"""GGUF, llama.cpp's file format, from what `gguf_file.py` opens; names and types are the `gguf` package's.

What has 2 to 8 bits stays packed, value for value. Llama's q and k rows lie in another order there (pairs instead of
halves rotate); Gemma's norms have their 1 added. gguf_write.py is the other direction.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from craton.base import Progress, UserError, count, say
from craton.model import rope
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder, Linear
from craton.model.packed import PackedEmbedding, PackedLinear, PackedMatrix, can_pack, replace
from craton.text.tokenizer import Tokenizer
from craton.weights.folder import FAMILIES
from craton.weights.gguf_file import Stored, open_gguf
from craton.weights.gguf_tokenizer import read_tokenizer

# our family -> GGUF's
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
READ = {*ARCHITECTURES.values(), "gemma3"}
_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}


@lru_cache(8)
def _names(architecture: str, layers: int) -> Any:
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    return gguf.get_tensor_name_map(arch, layers)


def gguf_name(architecture: str, layers: int, ours: str) -> str:
    """GGUF's name of one of the network's tensors."""
    base, _, kind = ours.rpartition(".")
    found = _names(architecture, layers).get_name(base)
    if found is None:
        raise UserError(f"GGUF has no name for {ours} in {architecture}")
    return f"{found}.{kind}"


def paired(t: Any, heads: int, back: bool) -> Any:
    """Rows of q or k from halves to pairs, or back. t: array or tensor with the rows first; heads 0: as they are."""
    if not heads:
        return t
    shape, half = t.shape, t.shape[0] // heads // 2
    t = t.reshape(heads, half, 2, *shape[1:]) if back else t.reshape(heads, 2, half, *shape[1:])
    return t.swapaxes(1, 2).reshape(shape)


def paired_heads(architecture: str, name: str, config: ModelConfig) -> int:
    """Heads whose rows lie in pairs there; 0 for none."""
    if architecture != "llama":
        return 0
    return config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads if ".k_proj." in name else 0


def read(path: Path) -> tuple[Decoder, Tokenizer]:
    """Network and tokenizer of a GGUF file. UserError if it is damaged, or of a kind that is not read here."""
    fields, tensors = open_gguf(path)
    architecture: Any = fields.get("general.architecture")
    if architecture not in READ:
        known = ", ".join(sorted(READ))
        raise UserError(f"{path}: architecture {architecture!r} is not read from GGUF; read: {known}")
    make = _gemma3 if architecture == "gemma3" else _config
    try:
        config, tokenizer = make(path, architecture, fields, tensors), read_tokenizer(path, fields)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a setting is missing or mistyped ({error})") from None
    with torch.device("meta"):
        network = Decoder(config)
    _Filling(path, network, architecture, tensors).run()
    return network.eval(), tokenizer


class _Filling:
    """The file's tensors on their way into a network on the meta device."""

    def __init__(self, path: Path, network: Decoder, architecture: str, tensors: dict[str, Stored]):
        self.path, self.network, self.architecture, self.tensors = path, network, architecture, tensors
        self.config, self.tied = network.config, network.config.tie_word_embeddings
        self.parameters = dict(network.state_dict(keep_vars=True))
        self.made: dict[str, Tensor] = {}
        self.wide: set[str] = set()  # types that were written out

    def run(self) -> None:
        """All of them. UserError for one that is missing, misshapen or unknown."""
        progress, seen = Progress(), 0
        used = {"rope_freqs.weight"}
        for name, parameter in self.parameters.items():
            if name == "lm_head.weight" and self.tied:
                self._tied_head()
                continue
            used.add(self._stored_name(name))
            seen += self._take(name, parameter)
            progress.show(f"reading {self.path}: {count(seen)}B")
        progress.clear()
        if surplus := set(self.tensors) - used:
            unknown = f"tensor {min(surplus)} is not known for {self.architecture}"
            raise UserError(f"{self.path}: {unknown}; it could change every answer")
        if self.wide:
            say(f"{self.path}: tensors of type {', '.join(sorted(self.wide))} are written out in fp32")
        missing, _ = self.network.load_state_dict(self.made, assign=True, strict=False)
        if self.tied and isinstance(self.network.lm_head, Linear):
            self.network.tie()
        assert not [m for m in missing if m != "lm_head.weight"], missing

    def _stored_name(self, ours: str) -> str:
        return gguf_name(self.architecture, self.config.num_hidden_layers, ours)

    def _tied_head(self) -> None:
        """The head is the embedding's matrix, packed or not."""
        embedding = self.network.model.embed_tokens
        if isinstance(embedding, PackedEmbedding):
            replace(self.network, "lm_head", PackedLinear(embedding.packed))

    def _take(self, name: str, parameter: Tensor) -> int:
        """One tensor to its place; returns its bytes."""
        stored = self._stored_name(name)
        if stored not in self.tensors:
            raise UserError(f"{self.path}: tensor {stored} is missing")
        t = self.tensors[stored]
        shape = t.shape
        if shape != tuple(parameter.shape):
            wanted = tuple(parameter.shape)
            raise UserError(f"{self.path}: tensor {stored} has shape {shape}, the file's own settings say {wanted}")
        heads, module = paired_heads(self.architecture, name, self.config), name.rpartition(".")[0]
        data, layer = paired(t.data, heads, True), self.network.get_submodule(module)
        if len(shape) == 2 and can_pack(*shape, t.tensor_type) and isinstance(layer, Linear | nn.Embedding):
            matrix = PackedMatrix(torch.from_numpy(np.array(data)), t.tensor_type)
            if isinstance(layer, nn.Embedding):
                replace(self.network, module, PackedEmbedding(matrix))
            else:
                bias = self._bias(f"{module}.bias", heads) if layer.bias is not None else None
                self.made.pop(f"{module}.bias", None)
                replace(self.network, module, PackedLinear(matrix, bias))
        elif not (name.endswith(".bias") and isinstance(layer, PackedLinear)):
            if t.tensor_type not in _PLAIN:
                self.wide.add(t.tensor_type.name)
            self.made[name] = _plain(data, t.tensor_type, shape, self.path)
            if self.config.norm_unit_offset and name.endswith("norm.weight"):
                self.made[name] -= 1
        return t.n_bytes

    def _bias(self, name: str, heads: int) -> Tensor | None:
        held = self.tensors.get(self._stored_name(name))
        if held is None:
            return None
        return _plain(paired(held.data, heads, True), held.tensor_type, held.shape, self.path).float()


def _plain(data: np.ndarray, kind: Type, shape: tuple[int, ...], path: Path) -> Tensor:
    if kind in _PLAIN:
        return torch.from_numpy(np.array(data)).flatten().view(_PLAIN[kind]).view(shape)
    try:
        return torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32, copy=False)).view(shape)
    except NotImplementedError:
        raise UserError(f"{path}: tensors of type {kind.name} cannot be read") from None


def _getter(path: Path, architecture: str, fields: dict[str, Any]) -> Callable[..., Any]:
    """get(key, default) of the architecture's settings; UserError for one that is missing and has no default."""

    def get(key: str, default: Any = ...) -> Any:
        value = fields.get(f"{architecture}.{key}", default)
        if value is ...:
            raise UserError(f"{path}: {architecture}.{key} is missing")
        return value

    return get


def _gemma3(path: Path, architecture: str, fields: dict[str, Any], tensors: dict[str, Stored]) -> ModelConfig:
    """From the settings as config.json would have them."""
    get = _getter(path, architecture, fields)
    heads, width = get("attention.head_count"), get("attention.key_length")
    # The largest alone scales by the width that heads would have if they shared the hidden size.
    scale = get("embedding_length") // heads if get("block_count") == 62 else width
    raw = dict(
        vocab_size=int(tensors["token_embd.weight"].shape[0]),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv"),
        head_dim=width,
        query_pre_attn_scalar=scale,
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_theta=get("rope.freq_base", 1e6),
        rope_local_base_freq=get("rope.freq_base_swa", 10_000.0),
        sliding_window=get("attention.sliding_window"),
        sliding_window_pattern=6,
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
    )
    if get("rope.scaling.type", "none") != "none":
        raw["rope_scaling"] = {"rope_type": get("rope.scaling.type"), "factor": get("rope.scaling.factor")}
    return FAMILIES["gemma3_text"].read(raw)


def _config(path: Path, architecture: str, fields: dict[str, Any], tensors: dict[str, Stored]) -> ModelConfig:
    get = _getter(path, architecture, fields)
    if get("expert_count", 0):
        raise UserError(f"{path}: models with experts are not read from GGUF; use the safetensors folder")
    if get("attention.sliding_window", 0) and architecture == "llama":
        raise UserError(f"{path}: sliding windows are not read from GGUF; use the safetensors folder")
    heads, theta = get("attention.head_count"), get("rope.freq_base", 10_000.0)
    if isinstance(heads, list) or isinstance(get("attention.head_count_kv", 1), list):
        raise UserError(f"{path}: head counts that differ between layers are not supported")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path}: rotary positions on a part of a head are not supported")
    scaling = _scaling(path, architecture, get, head_dim, theta, tensors)
    try:
        return ModelConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[0]),
            hidden_size=get("embedding_length"),
            intermediate_size=get("feed_forward_length"),
            num_hidden_layers=get("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=get("context_length"),
            rope_theta=theta,
            rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            qk_norm="head" if architecture == "qwen3" else "",
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
            model_type=architecture,
            rope_scaling=scaling,
            attention_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
            attention_out_bias="blk.0.attn_output.bias" in tensors,
        )
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}") from None


def _scaling(
    path: Path, architecture: str, get: Any, head_dim: int, theta: float, tensors: dict[str, Stored]
) -> dict[str, Any] | None:
    """How the context was stretched. get: a setting by its key."""
    if (kind := get("rope.scaling.type", "none")) not in ("none", "linear", "yarn"):
        raise UserError(
            f"{path}: {architecture}.rope.scaling.type {kind!r} is not supported; supported: 'none', 'linear', 'yarn'"
        )
    if kind != "none":
        scaling: dict[str, Any] = {"rope_type": kind, "factor": get("rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
            for beta in ("beta_fast", "beta_slow"):
                if value := get(f"rope.scaling.yarn_{beta}", None):
                    scaling[beta] = value
        return scaling
    if "rope_freqs.weight" not in tensors:
        return None
    held = tensors["rope_freqs.weight"]
    given = _plain(held.data, held.tensor_type, held.shape, path).float()
    base = rope.frequencies(head_dim, theta)[0]
    for original in (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16384):
        scaling = dict(rope_type="llama3", factor=float(given.max()), low_freq_factor=1.0, high_freq_factor=4.0)
        scaling["original_max_position_embeddings"] = original
        if torch.allclose(base / rope.frequencies(head_dim, theta, scaling)[0], given, rtol=1e-3):
            return scaling
    raise UserError(f"{path}: rope_freqs.weight is not the scaling of Llama 3.1; use the safetensors folder")
