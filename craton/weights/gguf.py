"""GGUF, llama.cpp's file format, read by the `gguf` package.

Q8_0 and Q4_0 have the values of our own packed weights and stay as they are, value for value; the other compressed
types are written out in fp32. Llama's q and k rows lie in another order there (pairs instead of halves rotate).
gguf_write.py is the other direction.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from torch import Tensor

from craton.base import Progress, UserError, count, say
from craton.model import rope
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder, Linear
from craton.model.packed import PackedLinear, can_pack, replace
from craton.text.tokenizer import Tokenizer
from craton.weights.gguf_tokenizer import read_tokenizer

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # our family -> GGUF's
_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_PACKED = {Type.Q8_0: 8, Type.Q4_0: 4}


def gguf_name(architecture: str, layers: int, ours: str) -> str:
    """GGUF's name of one of the network's tensors."""
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    base, _, kind = ours.rpartition(".")
    found = gguf.get_tensor_name_map(arch, layers).get_name(base)
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
    fields, tensors = _opened(path)
    architecture: Any = fields.get("general.architecture")
    if architecture not in ARCHITECTURES.values():
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise UserError(f"{path}: architecture {architecture!r} is not read from GGUF; read: {known}")
    try:
        config, tokenizer = _config(path, architecture, fields, tensors), read_tokenizer(path, fields)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a setting is missing or mistyped ({error})") from None
    with torch.device("meta"):
        network = Decoder(config)
    _Filling(path, network, architecture, tensors).run()
    return network.eval(), tokenizer


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and tensors, by name."""
    try:
        with open(path, "rb") as f:
            if f.read(4) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file")
        reader = GGUFReader(path)
        fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # the library asserts and indexes
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged GGUF file ({what})") from None
    size = path.stat().st_size
    for t in reader.tensors:
        if t.data_offset + t.n_bytes > size:
            raise UserError(f"{path}: truncated: tensor {t.name} ends after the file does")
    return fields, {t.name: t for t in reader.tensors}


class _Filling:
    """The file's tensors on their way into a network on the meta device."""

    def __init__(self, path: Path, network: Decoder, architecture: str, tensors: dict[str, Any]):
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
                self._tied_head(parameter)
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

    def _tied_head(self, parameter: Tensor) -> None:
        """The head stays packed where the embedding, which does not, was."""
        t = self.tensors["token_embd.weight"]
        if t.tensor_type in _PACKED and can_pack(*parameter.shape):
            replace(self.network, "lm_head", PackedLinear(*_values(t.data, t.tensor_type), _PACKED[t.tensor_type]))

    def _take(self, name: str, parameter: Tensor) -> int:
        """One tensor to its place; returns its bytes."""
        stored = self._stored_name(name)
        if stored not in self.tensors:
            raise UserError(f"{self.path}: tensor {stored} is missing")
        t = self.tensors[stored]
        shape = tuple(int(n) for n in reversed(t.shape))
        if shape != tuple(parameter.shape):
            wanted = tuple(parameter.shape)
            raise UserError(f"{self.path}: tensor {stored} has shape {shape}, the file's own settings say {wanted}")
        heads, module = paired_heads(self.architecture, name, self.config), name.rpartition(".")[0]
        data, layer = paired(t.data, heads, True), self.network.get_submodule(module)
        if t.tensor_type in _PACKED and isinstance(layer, Linear) and can_pack(*shape):
            bias = self._bias(f"{module}.bias", heads) if layer.bias is not None else None
            self.made.pop(f"{module}.bias", None)
            bits = _PACKED[t.tensor_type]
            replace(self.network, module, PackedLinear(*_values(data, t.tensor_type), bits, bias))
        elif not (name.endswith(".bias") and isinstance(layer, PackedLinear)):
            if t.tensor_type not in _PLAIN:
                self.wide.add(t.tensor_type.name)
            self.made[name] = _plain(data, t.tensor_type, shape, self.path)
        return int(t.n_bytes)

    def _bias(self, name: str, heads: int) -> Tensor | None:
        held = self.tensors.get(self._stored_name(name))
        if held is None:
            return None
        return torch.from_numpy(np.array(paired(held.data, heads, True))).float()


def _values(data: np.ndarray, kind: Type) -> tuple[Tensor, Tensor]:
    """Rows of blocks (rows, bytes) -> values and scales as PackedLinear takes them."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = torch.from_numpy(np.array(data)).view(data.shape[0], -1, size)
    scales, body = blocks[..., :2].contiguous().view(torch.float16)[..., 0], blocks[..., 2:]
    if kind == Type.Q8_0:
        return (body.contiguous().view(torch.int8).to(torch.int16) + 128).to(torch.uint8).flatten(1), scales
    low, high = body & 15, body >> 4  # columns 0-15 and 16-31
    columns = torch.cat([low, high], -1)
    return (columns[..., 0::2] | (columns[..., 1::2] << 4)).flatten(1), scales


def _plain(data: np.ndarray, kind: Type, shape: tuple[int, ...], path: Path) -> Tensor:
    if kind in _PLAIN:
        return torch.from_numpy(np.array(data)).view(_PLAIN[kind]).view(shape)
    try:
        return torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32, copy=False)).view(shape)
    except NotImplementedError:
        raise UserError(f"{path}: tensors of type {kind.name} cannot be read") from None


def _config(path: Path, architecture: str, fields: dict[str, Any], tensors: dict[str, Any]) -> ModelConfig:
    def get(key: str, default: Any = ...) -> Any:
        value = fields.get(f"{architecture}.{key}", default)
        if value is ...:
            raise UserError(f"{path}: {architecture}.{key} is missing")
        return value

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
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
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
    path: Path, architecture: str, get: Any, head_dim: int, theta: float, tensors: dict[str, Any]
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
    given = torch.from_numpy(np.array(tensors["rope_freqs.weight"].data)).float()
    base = rope.frequencies(head_dim, theta)[0]
    for original in (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16384):
        scaling = dict(rope_type="llama3", factor=float(given.max()), low_freq_factor=1.0, high_freq_factor=4.0)
        scaling["original_max_position_embeddings"] = original
        if torch.allclose(base / rope.frequencies(head_dim, theta, scaling)[0], given, rtol=1e-3):
            return scaling
    raise UserError(f"{path}: rope_freqs.weight is not the scaling of Llama 3.1; use the safetensors folder")
