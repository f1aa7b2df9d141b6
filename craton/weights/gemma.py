"""Gemma 2 and the text part of Gemma 3: norms on both sides, 1 + weight, scaled embeddings, sliding layers between.
arXiv 2408.00118, 2503.19786."""

from typing import Any

from craton.model.config import ModelConfig
from craton.weights.family import Family


def _derive(pattern: int) -> Any:
    def derive(raw: dict[str, Any]) -> dict[str, Any]:
        every = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or pattern
        types = raw.get("layer_types") or [
            "sliding_attention" if (i + 1) % every else "full_attention" for i in range(raw["num_hidden_layers"])
        ]
        return {
            "layer_types": types,
            "attention_scale": raw["query_pre_attn_scalar"] ** -0.5,
            "embedding_scale": raw["hidden_size"] ** 0.5,
        }

    return derive


def restore(config: ModelConfig) -> dict[str, Any]:
    assert config.attention_scale
    exact = config.attention_scale**-2
    return {"query_pre_attn_scalar": round(exact) if abs(exact - round(exact)) < 1e-6 * exact else exact}


ALWAYS = {"norm_placement": "both", "norm_unit_offset": True}
SAME = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
}

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    SAME,
    {"hidden_activation": "hidden_act"},
    {
        **DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
    },
    FIXED,
    {**ALWAYS, "qk_norm": ""},
    (),
    _derive(2),
    restore,
    ropes=("default",),
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    SAME,
    {"hidden_activation": "hidden_act"},
    {
        **DEFAULTS,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "max_position_embeddings": 131072,
        "rope_local_base_freq": 10_000.0,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    FIXED,
    {**ALWAYS, "qk_norm": "head"},
    (),
    _derive(6),
    restore,
    ropes=("default", "linear"),
    theta=1e6,
)
