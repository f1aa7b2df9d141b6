"""DeepSeek V2, V3 and R1: multi-head latent attention, shared and routed experts. arXiv 2405.04434, 2412.19437.

V3's checkpoints end in modules for predicting several tokens (num_nextn_predict_layers); they are no part of the
network and are passed over on loading, as transformers does.
"""

from dataclasses import replace
from typing import Any

from craton.model.config import ModelConfig
from craton.model.rope import yarn_mscale
from craton.weights.family import Family, experts_apart


def derive(raw: dict[str, Any]) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    width = raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    scale = None
    if rope.get("mscale_all_dim") and rope.get("rope_type", rope.get("type", "default")) != "default":
        scale = width**-0.5 * yarn_mscale(float(rope["factor"]), float(rope["mscale_all_dim"])) ** 2
    return {
        "head_dim": width,
        "num_key_value_heads": raw["num_attention_heads"],
        "attention_scale": scale,
        "shared_intermediate_size": (raw["n_shared_experts"] or 0) * raw["moe_intermediate_size"],
        "dense_layers": list(range(min(raw["first_k_dense_replace"], raw["num_hidden_layers"]))),
        "n_group": raw["n_group"] or 1 if raw.get("topk_method") != "greedy" else 1,
        "topk_group": raw["topk_group"] or 1 if raw.get("topk_method") != "greedy" else 1,
    }


def restore(config: ModelConfig) -> dict[str, Any]:
    return {
        "head_dim": config.qk_rope_head_dim,  # as transformers understands it
        "n_shared_experts": config.shared_intermediate_size // config.moe_intermediate_size,
        "first_k_dense_replace": len(config.dense_layers),
        "num_nextn_predict_layers": 0,
    }


def restore_v2(config: ModelConfig) -> dict[str, Any]:
    return {**restore(config), "topk_method": "group_limited_greedy" if config.n_group > 1 else "greedy"}


SAME = (
    "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim moe_intermediate_size "
    "num_experts_per_tok routed_scaling_factor norm_topk_prob n_group topk_group"
).split()
INERT = "n_shared_experts first_k_dense_replace num_nextn_predict_layers qk_head_dim aux_loss_alpha seq_aux".split()
DEFAULTS = dict(q_lora_rank=None, n_group=None, topk_group=None, n_shared_experts=None, first_k_dense_replace=0)
FIXED: dict[str, tuple[Any, ...]] = dict(attention_bias=(False,), moe_layer_freq=(1,))

V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    same=SAME,
    renamed={"n_routed_experts": "num_experts"},
    defaults=DEFAULTS | dict(routed_scaling_factor=1.0, norm_topk_prob=False, max_position_embeddings=2048),
    fixed={
        **FIXED,
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "mlp_bias": (False,),
    },
    always=dict(router="softmax", rope_interleave=True),
    inert=INERT,
    derive=derive,
    restore=restore_v2,
    pieces=experts_apart(),
    ropes=("default", "yarn"),
)
V3 = replace(
    V2,
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    renamed={"n_routed_experts": "num_experts", "rope_interleave": "rope_interleave"},
    defaults={
        **DEFAULTS,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "rope_interleave": True,
    },
    fixed=dict(**FIXED, scoring_func=("sigmoid",), topk_method=("noaux_tc",)),
    always={"router": "sigmoid"},
    restore=restore,
)
