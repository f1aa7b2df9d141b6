"""OLMo 2: norms on the outputs of a block's halves, and on all of q and k. arXiv 2501.00656."""

from craton.weights.family import Family

FAMILY = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    defaults=dict(rms_norm_eps=1e-5, max_position_embeddings=2048),
    fixed=dict(attention_bias=(False,)),
    always=dict(qk_norm="projection", norm_placement="post"),
)
