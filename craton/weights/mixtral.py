"""Mixtral 8x7B and 8x22B: Mistral with experts instead of MLPs. arXiv 2401.04088."""

from typing import Any

from craton.weights.family import Family, experts_apart


def derive(raw: dict[str, Any]) -> dict[str, Any]:
    return {"moe_intermediate_size": raw["intermediate_size"]}


FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    same=("sliding_window", "num_experts_per_tok"),
    renamed={"num_local_experts": "num_experts"},
    defaults={
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "num_key_value_heads": 8,
    },
    fixed={"hidden_act": ("silu",)},
    always={"qk_norm": "", "norm_topk_prob": True},
    derive=derive,
    pieces=experts_apart(("block_sparse_moe", "w1", "w3", "w2")),
    theta=1e6,
)
