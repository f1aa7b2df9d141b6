"""GGUF, llama.cpp's file format, written by the `gguf` package. gguf.py is the other direction, and says more."""

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from torch import Tensor

from craton.base import UserError, publish
from craton.model import rope
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.packed import OF_BITS, blocks_of
from craton.text.tokenizer import Tokenizer
from craton.weights.gguf import ARCHITECTURES, gguf_name, paired, paired_heads
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
    if c.sliding_window is not None or c.mlp_bias or c.attention_out_bias:
        raise UserError("GGUF's Llama has no sliding window and no such biases")
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    packed = packed or {}
    with publish(path) as temporary:
        writer = GGUFWriter(temporary, architecture)
        writer.add_name(name)
        _write_settings(writer, c, kind)
        _write_scaling(writer, c)
        write_tokenizer(writer, tokenizer, c)
        _write_plain(writer, architecture, network, set(packed), dtype)
        _write_packed(writer, architecture, network, packed)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
    return {"file": str(path), "bytes": path.stat().st_size, "architecture": architecture}


def _write_settings(writer: Any, c: ModelConfig, kind: str) -> None:
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    types = gguf.LlamaFileType
    writer.add_file_type({"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16}[kind])


def _write_scaling(writer: Any, c: ModelConfig) -> None:
    """How the context was stretched."""
    scaling = c.rope_scaling
    if scaling and scaling["rope_type"] == "llama3":
        factors = rope.frequencies(c.head_dim, c.rope_theta)[0] / rope.frequencies(c.head_dim, c.rope_theta, scaling)[0]
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    elif scaling:
        if "attention_factor" in scaling or scaling.get("mscale") or not scaling.get("truncate", True):
            raise UserError("rope_scaling: GGUF cannot say these factors")
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if scaling["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
            for beta in ("beta_fast", "beta_slow"):
                if scaling.get(beta):
                    getattr(writer, f"add_rope_scaling_yarn_{beta}")(float(scaling[beta]))


def _write_plain(writer: Any, architecture: str, network: Decoder, packed: set[str], dtype: torch.dtype) -> None:
    """Every tensor that is not packed."""
    c = network.config
    for ours, tensor in network.state_dict().items():
        module = ours.rpartition(".")[0]
        if (ours == "lm_head.weight" and c.tie_word_embeddings) or (module in packed and ours.endswith(".weight")):
            continue
        tensor = paired(tensor, paired_heads(architecture, ours, c), False)
        stored = gguf_name(architecture, c.num_hidden_layers, ours)
        if tensor.ndim == 1:
            writer.add_tensor(stored, tensor.float().numpy())
        else:
            out, bf16 = tensor.to(dtype).contiguous(), dtype == torch.bfloat16  # which numpy does not know
            if not out.isfinite().all():
                raise UserError(f"tensor {ours} has values that fp16 cannot hold; use --type bf16")
            raw = out.view(torch.int16).numpy().view(np.uint8) if bf16 else out.numpy()
            writer.add_tensor(stored, raw, raw_dtype=Type.BF16 if bf16 else None)


def _write_packed(writer: Any, architecture: str, network: Decoder, packed: Packed) -> None:
    c = network.config
    name = partial(gguf_name, architecture, c.num_hidden_layers)
    for module, (values, scales, bits) in packed.items():
        heads = paired_heads(architecture, f"{module}.weight", c)
        bias = getattr(network.get_submodule(module), "bias", None)
        if bias is not None:
            writer.add_tensor(name(f"{module}.bias"), paired(bias, heads, False).float().numpy())
        blocks = blocks_of(paired(values, heads, False), paired(scales, heads, False), bits).numpy()
        writer.add_tensor(name(f"{module}.weight"), blocks, raw_dtype=Type(OF_BITS[bits]))
