"""Mistral 7B, Nemo, Small and Large: Llama with a sliding window in some (arXiv 2310.06825); Mixtral 8x7B and 8x22B:
the same with experts instead of MLPs (arXiv 2401.04088)."""

from typing import Any

from craton.weights.family import Family, experts_apart


def derive(raw: dict[str, Any]) -> dict[str, Any]:
    return {"moe_intermediate_size": raw["intermediate_size"]}


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    same=("sliding_window",),
    defaults=dict(max_position_embeddings=131072, num_key_value_heads=8),
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    same=("sliding_window", "num_experts_per_tok"),
    renamed={"num_local_experts": "num_experts"},
    defaults=MISTRAL.defaults | dict(rms_norm_eps=1e-5, num_experts_per_tok=2, num_local_experts=8),
    always={"norm_topk_prob": True},
    derive=derive,
    pieces=experts_apart(("block_sparse_moe", "w1", "w3", "w2")),
    theta=1e6,
)
