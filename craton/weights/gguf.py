"""GGUF, llama.cpp's file format, from what `gguf_file.py` opens; names and types are the `gguf` package's.

What has 2 to 8 bits stays packed, value for value. gguf_config.py says what a file's settings are, gguf_names.py where
its tensors are; Gemma's norms have their 1 added there. gguf_write.py is the other direction.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from craton.base import Progress, UserError, amount, say
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder, Experts, Linear
from craton.model.grouped import hold
from craton.model.packed import PackedEmbedding, PackedLinear, PackedMatrix, can_pack, replace
from craton.text.tokenizer import Tokenizer
from craton.weights.gguf_config import read_config
from craton.weights.gguf_file import Stored, open_gguf
from craton.weights.gguf_names import joined, paired, paired_heads, places
from craton.weights.gguf_tokenizer import read_tokenizer

_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}


def read(path: Path, device: str = "cpu") -> tuple[Decoder, Tokenizer]:
    """Network and tokenizer of a GGUF file, packed weights on a device, the others on the CPU. UserError if it is
    damaged, or of a kind that is not read here."""
    config, fields, tensors = _opened(path)
    tokenizer = read_tokenizer(path, fields)
    with torch.device("meta"):
        network = Decoder(config)
    _Filling(path, network, fields["general.architecture"], tensors, device).run()
    return network.eval(), tokenizer


def config_of(path: Path) -> tuple[ModelConfig, int]:
    """What a file says of its model, and the bytes of its weights. UserError as `read`."""
    config, _, tensors = _opened(path)
    return config, sum(t.n_bytes for t in tensors.values())


def _opened(path: Path) -> tuple[ModelConfig, dict[str, Any], dict[str, Stored]]:
    fields, tensors = open_gguf(path)
    freqs = None
    if (held := tensors.get("rope_freqs.weight")) is not None:
        freqs = _plain(held.data, held.tensor_type, held.shape, path).float()
    config = read_config(path, fields, {name: t.shape for name, t in tensors.items()}, freqs)
    return config, fields, tensors


class _Filling:
    """The file's tensors on their way into a network on the meta device."""

    def __init__(self, path: Path, network: Decoder, architecture: str, tensors: dict[str, Stored], device: str):
        self.device = device
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
            stored = self._stored(name)
            used.update(t.name for t in stored)
            self._take(name, parameter, stored)
            seen += sum(t.n_bytes for t in stored)
            progress.show(f"reading {self.path}: {amount(seen, 'B')}")
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

    def _stored(self, ours: str) -> list[Stored]:
        """The tensors in the file that make one of ours. UserError if one is missing."""
        names = places(self.config, ours)
        whole = names[0].replace("attn_k_b.", "attn_kv_b.")  # older files of DeepSeek's keep it in one
        if whole != names[0] and whole in self.tensors:
            names = (whole,)
        if missing := [n for n in names if n not in self.tensors]:
            raise UserError(f"{self.path}: tensor {missing[0]} is missing")
        return [self.tensors[n] for n in names]

    def _tied_head(self) -> None:
        """The head is the embedding's matrix, packed or not."""
        embedding = self.network.model.embed_tokens
        if isinstance(embedding, PackedEmbedding):
            replace(self.network, "lm_head", PackedLinear(embedding.packed))

    def _take(self, name: str, parameter: Tensor, stored: list[Stored]) -> None:
        """One tensor to its place, packed where it can be."""
        module = name.rpartition(".")[0]
        layer, heads = self.network.get_submodule(module), paired_heads(self.architecture, name, self.config)
        if isinstance(layer, Experts) and self._packed_experts(layer, name, parameter, stored):
            return
        first, shape = stored[0], stored[0].shape
        if (
            len(stored) == 1
            and shape == tuple(parameter.shape)
            and len(shape) == 2
            and can_pack(*shape, first.tensor_type)
            and isinstance(layer, Linear | nn.Embedding)
            and not name.endswith("kv_b_proj.weight")  # of which parts are multiplied
        ):
            blocks = torch.from_numpy(np.array(paired(first.data, heads, True)))
            matrix = hold(blocks, first.tensor_type, self.device, f"{self.path}: tensor {first.name}")
            if isinstance(layer, nn.Embedding):
                replace(self.network, module, PackedEmbedding(matrix))
            else:
                bias = self._bias(f"{module}.bias", heads) if layer.bias is not None else None
                self.made.pop(f"{module}.bias", None)
                replace(self.network, module, PackedLinear(matrix, bias))
        elif not (name.endswith(".bias") and isinstance(layer, PackedLinear)):
            parts = [_plain(t.data, t.tensor_type, t.shape, self.path) for t in stored]
            made = joined(self.config, name, parts)
            if tuple(made.shape) != tuple(parameter.shape):
                wanted = f"{tuple(made.shape)}, the file's own settings say {tuple(parameter.shape)}"
                raise UserError(f"{self.path}: tensor {first.name} has shape {wanted}")
            self.wide.update(t.tensor_type.name for t in stored if t.tensor_type not in _PLAIN)
            self.made[name] = paired(made, heads, True)
            if self.config.norm_unit_offset and name.endswith("norm.weight"):
                self.made[name] -= 1

    def _packed_experts(self, layer: Experts, name: str, parameter: Tensor, stored: list[Stored]) -> bool:
        """Each expert's matrix packed; False where the file's type does not allow it."""
        kind, (experts, rows, cols) = stored[0].tensor_type, (*parameter.shape, 0)[:3]
        same = {t.tensor_type for t in stored} == {kind} and sum(t.shape[1] for t in stored) == rows
        if parameter.ndim != 3 or not same or not can_pack(rows, cols, kind):
            return False
        if any(t.shape[0] != experts or t.shape[2] != cols for t in stored):
            return False
        matrices = []
        for e in range(experts):
            blocks = np.concatenate([t.data[e] for t in stored])
            matrices.append(PackedMatrix(torch.from_numpy(blocks), kind))
        layer.pack(name.rpartition(".")[2], matrices)
        return True

    def _bias(self, name: str, heads: int) -> Tensor | None:
        held = self.tensors.get(places(self.config, name)[0])
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
