"""Qwen 2 and 2.5, and R1-Distill-Qwen: Llama with biases on q, k and v. arXiv 2407.10671."""

from typing import Any

from craton.model.config import ModelConfig
from craton.weights.family import Family


def window(raw: dict[str, Any]) -> dict[str, Any]:
    """Layers from max_window_layers on slide, if any do."""
    if not raw.get("use_sliding_window"):
        return {"sliding_window": None, "layer_types": None}
    types = raw.get("layer_types") or [
        "sliding_attention" if i >= raw["max_window_layers"] else "full_attention"
        for i in range(raw["num_hidden_layers"])
    ]
    return {"sliding_window": raw["sliding_window"], "layer_types": types}


def restore(config: ModelConfig) -> dict[str, Any]:
    return {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    fixed={"hidden_act": ("silu",)},
    inert=("use_mrope",),
    always={"qk_norm": "", "attention_bias": True},
    derive=window,
    restore=restore,
)
