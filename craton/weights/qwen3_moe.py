"""Qwen 3 with experts. arXiv 2505.09388."""

from typing import Any

from craton.model.config import ModelConfig
from craton.weights.family import Family, experts_apart


def derive(raw: dict[str, Any]) -> dict[str, Any]:
    every, only = raw["decoder_sparse_step"], raw["mlp_only_layers"] or []
    dense = [i for i in range(raw["num_hidden_layers"]) if i in only or (i + 1) % every]
    return {"dense_layers": dense}


def restore(config: ModelConfig) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    same=("moe_intermediate_size", "num_experts_per_tok", "num_experts", "norm_topk_prob"),
    renamed={"num_local_experts": "num_experts"},
    defaults={
        "max_position_embeddings": 32768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
    },
    fixed=dict(attention_bias=(False,), use_sliding_window=(False,)),
    inert=("sliding_window", "max_window_layers"),
    always={"qk_norm": "head", "router": "softmax"},
    derive=derive,
    restore=restore,
    pieces=experts_apart(),
)
