"""Qwen 2 and 2.5, and R1-Distill-Qwen: Llama with biases on q, k and v. arXiv 2407.10671."""

from typing import Any

from craton.model.config import ModelConfig
from craton.weights.family import Family, layer_types

WINDOW: dict[str, Any] = dict(max_window_layers=28, sliding_window=4096, use_sliding_window=False)  # defaults


def window(raw: dict[str, Any]) -> dict[str, Any]:
    """Layers from max_window_layers on slide, if any do."""
    if not raw.get("use_sliding_window"):
        return {"sliding_window": None, "layer_types": None}
    types = layer_types(raw, lambda i: i >= raw["max_window_layers"])
    return {"sliding_window": raw["sliding_window"], "layer_types": types}


def restore(config: ModelConfig) -> dict[str, Any]:
    return {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    defaults=dict(max_position_embeddings=32768, **WINDOW),
    inert=("use_mrope",),
    always={"attention_bias": True},
    derive=window,
    restore=restore,
)
