"""Qwen 3, dense: what craton trains by default. arXiv 2505.09388."""

from craton.weights.family import Family
from craton.weights.qwen2 import restore, window

FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "head_dim": 128,
        "max_window_layers": 28,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "num_key_value_heads": 32,
    },
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
    always={"qk_norm": "head"},
    derive=window,
    restore=restore,
)
