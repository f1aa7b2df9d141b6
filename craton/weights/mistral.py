"""Mistral 7B, Nemo, Small and Large: Llama with a sliding window in some. arXiv 2310.06825."""

from craton.weights.family import Family

FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    same=("sliding_window",),
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    },
    fixed={"hidden_act": ("silu",)},
    always={"qk_norm": ""},
)
