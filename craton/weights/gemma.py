"""Gemma 2 and the text part of Gemma 3: norms on both sides, 1 + weight, scaled embeddings, sliding layers between.
arXiv 2408.00118, 2503.19786."""

from dataclasses import replace
from functools import partial
from typing import Any

from craton.model.config import ModelConfig
from craton.weights.family import Family, layer_types


def derive(pattern: int, raw: dict[str, Any]) -> dict[str, Any]:
    """Every `pattern`th layer sees all positions."""
    every = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or pattern
    return {
        "layer_types": layer_types(raw, lambda i: (i + 1) % every),
        "attention_scale": raw["query_pre_attn_scalar"] ** -0.5,
        "embedding_scale": raw["hidden_size"] ** 0.5,
    }


def restore(config: ModelConfig) -> dict[str, Any]:
    assert config.attention_scale
    exact = config.attention_scale**-2
    return {"query_pre_attn_scalar": round(exact) if abs(exact - round(exact)) < 1e-6 * exact else exact}


DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    same=("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"),
    renamed={"hidden_activation": "hidden_act"},
    defaults=dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, max_position_embeddings=8192, **DEFAULTS),
    fixed=dict(hidden_act=("gelu_pytorch_tanh",), attention_bias=(False,), use_bidirectional_attention=(False, None)),
    always=dict(norm_placement="both", norm_unit_offset=True),
    inert=("sliding_window_size",),
    derive=partial(derive, 2),
    restore=restore,
    ropes=("default",),
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={
        **DEFAULTS,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "max_position_embeddings": 131072,
        "rope_local_base_freq": 10_000.0,
        "vocab_size": 262208,
        "num_attention_heads": 8,
    },
    always=GEMMA2.always | {"qk_norm": "head"},
    derive=partial(derive, 6),
    ropes=("default", "linear"),
    theta=1e6,
)
