"""Where GGUF keeps each tensor of a network, and in what order of rows."""

import re
from typing import Any

from craton.base import UserError
from craton.model.config import ModelConfig

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_NORMS = {
    "pre": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "post": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
    "both": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_IN_A_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_WHOLE = {  # names with nothing after the module's
    "self_attn.sinks": ("attn_sinks.weight",),
    "self_attn.kv_b_proj.weight": ("attn_k_b.weight", "attn_v_b.weight"),
    "mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
}


def places(config: ModelConfig, ours: str) -> tuple[str, ...]:
    """GGUF's names of one of the network's tensors: two where it is kept in two parts."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", ours)
    if layer is None:
        module, _, kind = ours.rpartition(".")
        return (f"{_OUTSIDE[module]}.{kind}",)
    number, own = layer.groups()
    if own in _WHOLE:
        return tuple(f"blk.{number}.{name}" for name in _WHOLE[own])
    module, _, kind = own.rpartition(".")
    norms = _NORMS[config.norm_placement]
    if config.model_type == "gpt_oss":
        norms = {**norms, "post_attention_layernorm": "post_attention_norm"}
    found = norms.get(module) or _IN_A_LAYER.get(module)
    if found is None:
        raise UserError(f"GGUF has no name for {ours} of {config.model_type}")
    return (f"blk.{number}.{found}.{kind}",)


def paired(t: Any, heads: int, back: bool) -> Any:
    """Rows of q or k from halves to pairs, or back. t: array or tensor with the rows first; heads 0: as they are."""
    if not heads:
        return t
    shape, half = t.shape, t.shape[0] // heads // 2
    t = t.reshape(heads, half, 2, *shape[1:]) if back else t.reshape(heads, 2, half, *shape[1:])
    return t.swapaxes(1, 2).reshape(shape)


def paired_heads(architecture: str, name: str, config: ModelConfig) -> int:
    """Heads whose rows lie in pairs there; 0 for none."""
    if architecture not in ("llama", "smollm3"):
        return 0
    return config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads if ".k_proj." in name else 0


def joined(config: ModelConfig, ours: str, parts: list[Any]) -> Any:
    """Our tensor from GGUF's parts of it."""
    if len(parts) == 1:
        return parts[0]
    import torch

    if ours.endswith("kv_b_proj.weight"):  # (heads, latent, key), (heads, value, latent)
        k, v = parts[0].transpose(1, 2), parts[1]
        return torch.cat([k, v], 1).reshape(-1, config.kv_lora_rank)
    return torch.cat(parts, 1)


def apart(config: ModelConfig, ours: str, tensor: Any) -> list[Any]:
    """And back."""
    if ours.endswith("kv_b_proj.weight"):
        heads = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
        k, v = heads.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        return [k.transpose(1, 2), v]
    if "gate_up_proj" in ours:
        return list(tensor.chunk(2, 1))
    return [tensor]
