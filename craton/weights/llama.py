"""Llama 2, 3, 3.1, 3.2 and the many that share its configuration (R1-Distill-Llama, TinyLlama, SmolLM 2).

Sources: arXiv 2307.09288, 2407.21783; the published configurations.
"""

from typing import Any

from craton.model.config import ModelConfig
from craton.weights.family import Family


def derive(raw: dict[str, Any]) -> dict[str, Any]:
    return {"attention_out_bias": raw["attention_bias"]}


def restore(config: ModelConfig) -> dict[str, Any]:
    if config.attention_bias != config.attention_out_bias:
        raise ValueError("llama has biases on all attention projections or on none")
    return {}


FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    same=("attention_bias", "mlp_bias"),
    defaults=dict(attention_bias=False, mlp_bias=False, max_position_embeddings=2048),
    inert=("rope_interleaved",),
    derive=derive,
    restore=restore,
)
