"""Qwen 3, dense: `config.json` to ModelConfig and back. Tensor names are the network's own.

Source: the published Qwen3 configurations and transformers' Qwen3Config.
"""

from typing import Any

from craton.model.config import ModelConfig

# Keys that must have this value, because the network computes nothing else.
FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
SAME = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "bos_token_id", "eos_token_id",
]  # fmt: skip


def read(raw: dict[str, Any]) -> ModelConfig:
    """Raises KeyError for a missing key, ValueError for one that the network cannot honour."""
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{key} is {raw[key]!r}; only {value!r} is supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    return ModelConfig(**{key: raw[key] for key in SAME if key in raw}, rope_theta=float(theta), qk_norm=True)


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{key: getattr(config, key) for key in SAME},
        "rope_theta": config.rope_theta,
        **FIXED,
        "initializer_range": 0.02,
        "use_cache": True,
    }
