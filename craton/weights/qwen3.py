"""Qwen 3, dense: what craton trains by default. arXiv 2505.09388."""

from craton.weights.family import Family
from craton.weights.qwen2 import WINDOW, restore, window

FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    defaults=dict(max_position_embeddings=32768, head_dim=128, num_key_value_heads=32, **WINDOW),
    fixed=dict(attention_bias=(False,)),
    always={"qk_norm": "head"},
    derive=window,
    restore=restore,
)
