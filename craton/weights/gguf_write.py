"""GGUF, llama.cpp's file format, written by the `gguf` package. gguf.py is the other direction, and says more."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from torch import Tensor

from craton.base import UserError, publish
from craton.model.decoder import Decoder
from craton.model.packed import OF_BITS, blocks_of
from craton.text.tokenizer import Tokenizer
from craton.weights.gguf_config import ARCHITECTURES, write_config
from craton.weights.gguf_names import apart, paired, paired_heads, places
from craton.weights.gguf_tokenizer import write_tokenizer

Packed = dict[str, tuple[Tensor, Tensor, int]]  # values, scales and bits of projections, as they lie in a folder


def write(
    path: Path, network: Decoder, tokenizer: Tokenizer, name: str, kind: str = "f16", packed: Packed | None = None
) -> dict[str, Any]:
    """A GGUF file of a network. kind: "f32", "f16" or "bf16", of the matrices; vectors are fp32. packed: for each
    projection that is stored in 4 or 8 bits, its values, scales and bits as they lie in the folder; it keeps them.

    UserError if GGUF cannot say what the model is, or fp16 cannot hold a value.
    """
    c = network.config
    architecture = ARCHITECTURES.get(c.model_type)
    if architecture is None:
        raise UserError(f"models of type {c.model_type} are not written as GGUF; written: {', '.join(ARCHITECTURES)}")
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    packed = packed or {}
    with publish(path) as temporary:
        writer = GGUFWriter(temporary, architecture)
        writer.add_name(name)
        write_config(writer, c, kind)
        write_tokenizer(writer, tokenizer, c)
        _write_plain(writer, architecture, network, set(packed), dtype)
        _write_packed(writer, architecture, network, packed)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
    return {"file": str(path), "bytes": path.stat().st_size, "architecture": architecture}


def _write_plain(writer: Any, architecture: str, network: Decoder, packed: set[str], dtype: torch.dtype) -> None:
    """Every tensor that is not packed."""
    c = network.config
    for ours, tensor in network.state_dict().items():
        module = ours.rpartition(".")[0]
        if (ours == "lm_head.weight" and c.tie_word_embeddings) or (module in packed and ours.endswith(".weight")):
            continue
        tensor = paired(tensor, paired_heads(architecture, ours, c), False)
        if c.norm_unit_offset and ours.endswith("norm.weight"):
            tensor = tensor + 1
        for stored, part in zip(places(c, ours), apart(c, ours, tensor), strict=True):
            _add(writer, stored, part, dtype)


def _add(writer: Any, stored: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.ndim == 1 or ".ffn_gate_inp." in stored or stored.endswith(".bias"):  # llama.cpp wants these whole
        writer.add_tensor(stored, tensor.float().contiguous().numpy())
        return
    out, bf16 = tensor.to(dtype).contiguous(), dtype == torch.bfloat16  # which numpy does not know
    if not out.isfinite().all():
        raise UserError(f"tensor {stored} has values that fp16 cannot hold; use --type bf16")
    raw = out.view(torch.int16).numpy().view(np.uint8) if bf16 else out.numpy()
    writer.add_tensor(stored, raw, raw_dtype=Type.BF16 if bf16 else None)


def _write_packed(writer: Any, architecture: str, network: Decoder, packed: Packed) -> None:
    c = network.config
    for module, (values, scales, bits) in packed.items():
        heads = paired_heads(architecture, f"{module}.weight", c)
        bias = getattr(network.get_submodule(module), "bias", None)
        if bias is not None:
            writer.add_tensor(places(c, f"{module}.bias")[0], paired(bias, heads, False).float().numpy())
        blocks = blocks_of(paired(values, heads, False), paired(scales, heads, False), bits).numpy()
        writer.add_tensor(places(c, f"{module}.weight")[0], blocks, raw_dtype=Type(OF_BITS[bits]))
