"""SmolLM 3: Llama with every fourth layer left without positions (arXiv 2501.18795)."""

from typing import Any

from craton.model.config import ModelConfig
from craton.weights.family import Family


def derive(raw: dict[str, Any]) -> dict[str, Any]:
    layers = raw["num_hidden_layers"]
    rope = raw.get("no_rope_layers") or [int((i + 1) % raw["no_rope_layer_interval"] != 0) for i in range(layers)]
    return {"no_rope_layers": rope[:layers]}


def restore(config: ModelConfig) -> dict[str, Any]:
    return {"no_rope_layers": list(config.no_rope_layers or ())}


FAMILY = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    defaults={
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "num_key_value_heads": 4,
    },
    fixed=dict(attention_bias=(False,), mlp_bias=(False,), use_sliding_window=(False,)),
    inert=("sliding_window", "max_window_layers"),
    derive=derive,
    restore=restore,
    theta=2e6,
)
