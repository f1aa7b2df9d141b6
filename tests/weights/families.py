"""A small random checkpoint of every family, as transformers writes it."""

import torch
import transformers as t

BASE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=24,
    num_key_value_heads=4,
    n_routed_experts=8,
    n_shared_experts=2,
    first_k_dense_replace=1,
    **EXPERTS,
)
YARN = dict(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
    rope_theta=10000.0,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=500000.0,
)

FAMILIES = {
    "llama2": lambda: t.LlamaForCausalLM(t.LlamaConfig(**BASE)),
    "llama3.1": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**BASE | dict(rope_parameters=LLAMA3, num_key_value_heads=1, eos_token_id=[2, 3]))
    ),
    "llama3.2": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**BASE, tie_word_embeddings=True, head_dim=32, rope_parameters=LLAMA3)
    ),
    "llama-biased": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(
            **BASE,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4),
        )
    ),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**BASE, sliding_window=None, head_dim=32)),
    "mistral-sliding": lambda: t.MistralForCausalLM(t.MistralConfig(**BASE, sliding_window=13)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**BASE, num_local_experts=4)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**BASE, tie_word_embeddings=True)),
    "qwen2-sliding": lambda: t.Qwen2ForCausalLM(
        t.Qwen2Config(**BASE, use_sliding_window=True, sliding_window=11, max_window_layers=2)
    ),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**BASE, head_dim=32)),
    "qwen3-yarn": lambda: t.Qwen3ForCausalLM(
        t.Qwen3Config(
            **BASE,
            head_dim=32,
            rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e6),
        )
    ),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**BASE, **EXPERTS, head_dim=32, num_experts=8, norm_topk_prob=True, mlp_only_layers=[1])
    ),
    "deepseek_v2": lambda: t.DeepseekV2ForCausalLM(
        t.DeepseekV2Config(**BASE | LATENT, q_lora_rank=None, topk_method="greedy", rope_parameters=YARN)
    ),
    "deepseek_v2-groups": lambda: t.DeepseekV2ForCausalLM(
        t.DeepseekV2Config(
            **BASE | LATENT,
            q_lora_rank=24,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=16.0,
        )
    ),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(
            **BASE | LATENT | dict(n_shared_experts=1), q_lora_rank=24, n_group=4, topk_group=2, rope_parameters=YARN
        )
    ),
    "gemma2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**BASE, head_dim=32, sliding_window=9, query_pre_attn_scalar=24)
    ),
    "gemma3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**BASE | dict(num_hidden_layers=7), head_dim=32, sliding_window=9, query_pre_attn_scalar=32)
    ),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**BASE)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**BASE)),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(
            **BASE,
            num_experts_per_tok=2,
            num_local_experts=4,
            head_dim=32,
            sliding_window=9,
            rope_parameters=dict(
                rope_type="yarn",
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=64,
                rope_theta=150000.0,
            ),
        )
    ),
}


def make(name, folder, seed=0, **save):
    """Write a family's checkpoint; returns transformers' model. Every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = FAMILIES[name]().float().eval()
    model.set_attn_implementation("eager")
    for key, p in model.state_dict().items():
        if p.ndim == 1 and p.is_floating_point():
            p.add_(torch.randn_like(p) * (0.02 if "correction" in key else 0.2))
    model.save_pretrained(folder, **save)
    return model
