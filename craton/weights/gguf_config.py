"""Settings of GGUF files as those of config.json, both ways: what a family's file says of itself in each."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from craton.base import UserError
from craton.model import rope
from craton.model.config import ModelConfig
from craton.weights.folder import FAMILIES

Shapes = dict[str, tuple[int, ...]]  # of a file's tensors
Get = Callable[..., Any]  # get(key, default) of the architecture's settings

# Ours -> GGUF's architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}
_EVERYWHERE = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_EXPERTS = {"num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length"}
_SOFTMAX, _SIGMOID = 1, 2  # GGUF's expert_gating_func


def read_config(path: Path, fields: dict[str, Any], shapes: Shapes, freqs: Tensor | None) -> ModelConfig:
    """A file's configuration. shapes: of its tensors. freqs: of rope_freqs.weight, if there is one. UserError for what
    is missing or cannot be honoured."""
    architecture: Any = fields.get("general.architecture")
    if architecture not in ARCHITECTURES.values():
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise UserError(f"{path}: architecture {architecture!r} is not read from GGUF; read: {known}")

    def get(key: str, default: Any = ...) -> Any:
        value = fields.get(f"{architecture}.{key}", default)
        if value is ...:
            raise UserError(f"{path}: {architecture}.{key} is missing")
        return value

    try:
        raw = _common(get, fields, shapes) | _rope(get, architecture, freqs)
        family, more = _of_family(architecture, get, shapes)
        config = FAMILIES[family].read({k: v for k, v in (raw | more).items() if v is not None})
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a setting is missing, mistyped or not supported ({error})") from None
    out_bias = "blk.0.attn_output.bias" in shapes
    return replace(config, attention_out_bias=out_bias)


def _common(get: Get, fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    heads = get("attention.head_count")
    if isinstance(heads, list) or isinstance(get("attention.head_count_kv", heads), list):
        raise ValueError("head counts that differ between layers")
    raw: dict[str, Any] = {ours: get(theirs) for ours, theirs in _EVERYWHERE.items() if not theirs.endswith("_kv")}
    raw["num_key_value_heads"] = get("attention.head_count_kv", heads)
    raw["intermediate_size"] = get("feed_forward_length", get("expert_feed_forward_length", None))
    raw["head_dim"] = get("attention.key_length", raw["hidden_size"] // heads)
    raw["vocab_size"] = int(shapes["token_embd.weight"][0])
    raw["tie_word_embeddings"] = "output.weight" not in shapes
    for name in ("bos", "eos"):
        raw[f"{name}_token_id"] = fields.get(f"tokenizer.ggml.{name}_token_id")
    return raw


def _of_family(architecture: str, get: Get, shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The family, and what config.json says there beside the rest."""
    rotated = get("rope.dimension_count", get("attention.key_length", None))
    if architecture != "deepseek2" and rotated not in (None, get("attention.key_length", rotated)):
        raise ValueError("rotary positions on a part of a head")
    bias = "blk.0.attn_q.bias" in shapes
    window, experts = get("attention.sliding_window", None), get("expert_count", 0)
    if architecture == "llama" and experts:
        return "mixtral", {
            "num_local_experts": experts,
            "num_experts_per_tok": get("expert_used_count"),
            "sliding_window": window,
        }
    if architecture == "llama" and window:
        return "mistral", {"sliding_window": window}
    if architecture == "llama":
        return "llama", {"attention_bias": bias, "mlp_bias": "blk.0.ffn_gate.bias" in shapes}
    if architecture == "qwen3moe":
        named = {ours: get(theirs) for ours, theirs in _EXPERTS.items()}
        return "qwen3_moe", {**named, "num_experts": experts, "norm_topk_prob": True}
    if architecture in ("gemma2", "gemma3"):
        return _gemma(architecture, get)
    if architecture == "deepseek2":
        return _deepseek(get, experts)
    if architecture == "gpt-oss":
        size = get("expert_feed_forward_length")
        own = {
            "intermediate_size": size,
            "num_local_experts": experts,
            "sliding_window": window,
            "attention_bias": bias,
        }
        return "gpt_oss", {**own, "num_experts_per_tok": get("expert_used_count")}
    if window:
        raise ValueError(f"{architecture} with a sliding window")
    return architecture, {}


def _gemma(architecture: str, get: Get) -> tuple[str, dict[str, Any]]:
    heads, width = get("attention.head_count"), get("attention.key_length")
    # The largest alone scales by the width that heads would have if they shared the hidden size.
    largest = get("block_count") == (46 if architecture == "gemma2" else 62)
    raw = {
        "query_pre_attn_scalar": get("embedding_length") // heads if largest else width,
        "sliding_window": get("attention.sliding_window"),
    }
    if architecture == "gemma2":
        caps = {n: get(n, d) for n, d in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))}
        return "gemma2", raw | caps
    local = get("rope.freq_base_swa", 10_000.0)
    return "gemma3_text", raw | {"rope_local_base_freq": local, "sliding_window_pattern": 6}


def _deepseek(get: Get, experts: int) -> tuple[str, dict[str, Any]]:
    turned, latent = get("rope.dimension_count"), get("attention.kv_lora_rank")
    raw = {
        "num_key_value_heads": get("attention.head_count"),
        "head_dim": None,
        "kv_lora_rank": latent,
        "q_lora_rank": get("attention.q_lora_rank", None),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": get("attention.key_length_mla", get("attention.key_length")) - turned,
        "v_head_dim": get("attention.value_length_mla", get("attention.value_length")),
        "n_routed_experts": experts,
        "n_shared_experts": get("expert_shared_count", 0),
        "routed_scaling_factor": get("expert_weights_scale", 1.0),
        "norm_topk_prob": get("expert_weights_norm", False),
        "first_k_dense_replace": get("leading_dense_block_count", 0),
        "n_group": get("expert_group_count", 1),
        "topk_group": get("expert_group_used_count", 1),
        **{ours: get(theirs) for ours, theirs in _EXPERTS.items()},
    }
    if get("expert_gating_func", _SOFTMAX) == _SIGMOID:
        return "deepseek_v3", raw
    method = "group_limited_greedy" if raw["n_group"] > 1 else "greedy"
    return "deepseek_v2", raw | {"topk_method": method}


def _rope(get: Get, architecture: str, freqs: Tensor | None) -> dict[str, Any]:
    """Rotary positions, and how the context was stretched."""
    raw: dict[str, Any] = {"rope_theta": get("rope.freq_base", 10_000.0)}
    kind = get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type {kind!r}; supported: 'none', 'linear', 'yarn'")
    if kind == "none":
        scaling = _llama3(get, freqs) if freqs is not None else None
        return raw | ({"rope_scaling": scaling} if scaling else {})
    scaling = {"rope_type": kind, "factor": get("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
        for beta in ("beta_fast", "beta_slow"):
            if value := get(f"rope.scaling.yarn_{beta}", None):
                scaling[beta] = value
        if logarithm := get("rope.scaling.yarn_log_multiplier", None):
            scaling["mscale"] = scaling["mscale_all_dim"] = logarithm / 0.1  # as the converter writes it
        if architecture == "gpt-oss":
            scaling["truncate"] = False  # as published; files do not say it
    return raw | {"rope_scaling": scaling}


def _llama3(get: Get, freqs: Tensor) -> dict[str, Any]:
    """Llama 3.1's settings, of which files hold only what follows from them."""
    theta = get("rope.freq_base", 10_000.0)
    width = get("attention.key_length", get("embedding_length") // get("attention.head_count"))
    base = rope.frequencies(width, theta)[0]
    for original in (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16384):
        scaling = dict(rope_type="llama3", factor=float(freqs.max()), low_freq_factor=1.0, high_freq_factor=4.0)
        scaling["original_max_position_embeddings"] = original
        if torch.allclose(base / rope.frequencies(width, theta, scaling)[0], freqs, rtol=1e-3):
            return scaling
    raise ValueError("rope_freqs.weight is not the scaling of Llama 3.1; use the safetensors folder")


# ---- writing ----------------------------------------------------------------------------------------------------


def write_config(writer: Any, c: ModelConfig, kind: str) -> None:
    """Into a GGUFWriter. UserError for what GGUF has no words for."""
    architecture = ARCHITECTURES[c.model_type]
    # Some programs, llama.cpp too, know these only by the family, or not at all.
    if (
        c.mlp_bias
        or (c.attention_out_bias and architecture != "gpt-oss")
        or (c.sliding_window and architecture == "llama")
    ):
        raise UserError("GGUF's Llama has no sliding window and no such biases")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(1 if c.kv_lora_rank else c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_dimension_count(c.rope_dim)
    types = gguf.LlamaFileType
    writer.add_file_type({"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16}[kind])
    if c.kv_lora_rank:
        _write_latent(writer, c)
    else:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if c.sliding_window and c.layer_types is not None:
        writer.add_sliding_window(c.sliding_window)
    if c.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
    if c.final_logit_softcapping:
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if c.rope_local_theta is not None:
        writer.add_float32(f"{architecture}.rope.freq_base_swa", c.rope_local_theta)
    if c.num_experts:
        writer.add_expert_count(c.num_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        if c.model_type != "mixtral":
            writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    _check_unsaid(c, architecture)
    _write_scaling(writer, c)


def _write_latent(writer: Any, c: ModelConfig) -> None:
    writer.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_nope_head_dim + c.qk_rope_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    if c.q_lora_rank:
        writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_leading_dense_block_count(len(c.dense_layers))
    writer.add_expert_shared_count(c.shared_intermediate_size // c.moe_intermediate_size)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(_SIGMOID if c.router == "sigmoid" else _SOFTMAX))
    if c.n_group > 1:
        writer.add_expert_group_count(c.n_group)
        writer.add_expert_group_used_count(c.topk_group)


def _check_unsaid(c: ModelConfig, architecture: str) -> None:
    """What a file cannot say must be what readers take for granted. UserError otherwise."""
    types = c.layer_types or ()
    every = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}.get(architecture)
    usual = tuple("sliding_attention" if (i + 1) % (every or 1) else "full_attention" for i in range(len(types)))
    if types and types != usual:
        raise UserError(f"layer_types: GGUF's {architecture} has another order of sliding layers; it is not written")
    fourths = tuple(int((i + 1) % 4 != 0) for i in range(c.num_hidden_layers))
    if architecture == "smollm3" and c.no_rope_layers not in (None, fourths):
        raise UserError("no_rope_layers: GGUF's smollm3 leaves out every fourth alone; it is not written")
    if architecture == "qwen3moe" and (not c.norm_topk_prob or c.dense_layers):
        raise UserError("GGUF's qwen3moe has experts in every layer, with weights that sum to 1; it is not written")
    if architecture in ("gemma2", "gemma3"):
        largest = c.num_hidden_layers == (46 if architecture == "gemma2" else 62)
        width = c.hidden_size // c.num_attention_heads if largest else c.head_dim
        if c.attention_scale != width**-0.5:
            raise UserError(
                f"query_pre_attn_scalar: GGUF's {architecture} takes {width} for granted; it is not written"
            )
    if c.kv_lora_rank and not c.rope_interleave:
        raise UserError("rope_interleave: GGUF's deepseek2 turns neighbours; it is not written")


def _write_scaling(writer: Any, c: ModelConfig) -> None:
    """How the context was stretched."""
    scaling = c.rope_scaling
    if not scaling:
        return
    if scaling["rope_type"] == "llama3":
        factors = rope.frequencies(c.head_dim, c.rope_theta)[0] / rope.frequencies(c.head_dim, c.rope_theta, scaling)[0]
        writer.add_tensor("rope_freqs.weight", factors.numpy())
        return
    same = scaling.get("mscale") == scaling.get("mscale_all_dim")
    truncated = scaling.get("truncate", True) or c.model_type == "gpt_oss"
    if "attention_factor" in scaling or not same or not truncated:
        raise UserError("rope_scaling: GGUF cannot say these factors")
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
    writer.add_rope_scaling_factor(scaling["factor"])
    if scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        for beta in ("beta_fast", "beta_slow"):
            if scaling.get(beta):
                getattr(writer, f"add_rope_scaling_yarn_{beta}")(float(scaling[beta]))
        if scaling.get("mscale"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale"])
