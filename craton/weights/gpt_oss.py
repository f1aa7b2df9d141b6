"""gpt-oss 20B and 120B: sinks in attention, alternating sliding layers, clamped experts with biases. arXiv
2508.10925."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from craton.weights.family import Family, Piece, layer_types


def derive(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer_types": layer_types(raw, lambda i: (i + 1) % 2),
        "moe_intermediate_size": raw["intermediate_size"],
        "attention_out_bias": raw["attention_bias"],
    }


def pieces(name: str, tensor: Tensor) -> Iterator[Piece]:
    """Published experts are (experts, in, out), with gate and up in turn."""
    head = name.rsplit(".", 1)[0]
    if name.endswith("experts.gate_up_proj"):
        e, two, h = tensor.shape
        yield name, tensor.view(e, 2, two // 2, h).permute(0, 3, 2, 1), (e, h, two)
    elif name.endswith("experts.gate_up_proj_bias"):
        e, two = tensor.shape
        yield name, tensor.view(e, 2, two // 2).transpose(1, 2), (e, two)
    elif name.endswith("experts.down_proj"):
        yield name, tensor.transpose(1, 2), (tensor.shape[0], tensor.shape[2], tensor.shape[1])
    elif head.endswith("mlp.gate"):
        yield name.replace(".mlp.gate.", ".mlp.router."), tensor, tuple(tensor.shape)
    else:
        yield name, tensor, tuple(tensor.shape)


FAMILY = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    same=("sliding_window", "num_experts_per_tok", "swiglu_limit", "attention_bias"),
    renamed={"num_local_experts": "num_experts", "experts_per_token": "num_experts_per_tok"},
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "attention_bias": True,
    },
    fixed={"swiglu_alpha": (1.702,)},
    inert=("initial_context_length",),
    always=dict(attention_sinks=True, router="softmax_of_top", norm_topk_prob=True),
    derive=derive,
    pieces=pieces,
    ropes=("default", "yarn"),
    theta=150_000.0,
)
