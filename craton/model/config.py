"""What a decoder is: the configuration of one, in the field names of the published `config.json` files.

One dataclass covers every family in craton/weights/: a family is a choice of these fields, not a class of its own.
"""

import math
import types
import typing
from dataclasses import dataclass, fields
from typing import Any

# Larger than any published model; what lies beyond is a damaged or hostile file, refused before memory is touched.
_MOST = {"num_hidden_layers": 1024, "num_experts": 4096, "max_position_embeddings": 1 << 30}
_MOST_DEFAULT = 1 << 24


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Counts are of units; the names are Hugging Face's where those have one.

    Raises ValueError for values that are mistyped, out of range or do not fit together, naming the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096  # longest context, tokens
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    qk_norm: str = "head"  # RMSNorm of q and k: "head" each head's (Qwen 3), "projection" all heads' (OLMo 2), "" none
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = "qwen3"  # the family whose names a folder carries

    # positions
    rope_scaling: dict[str, Any] | None = None  # as published: rope_type llama3, yarn or linear, and its factors
    rope_local_theta: float | None = None  # theta of sliding layers, where it differs; they are not scaled (Gemma 3)
    rope_interleave: bool = False  # pairs are (0, 1), (2, 3)... instead of the two halves (DeepSeek)
    no_rope_layers: tuple[int, ...] | None = None  # 0 for each layer without rotary positions (SmolLM 3)
    # attention
    attention_bias: bool = False  # on q, k and v
    attention_out_bias: bool = False
    attention_scale: float | None = None  # None: head_dim^-0.5
    attn_logit_softcapping: float | None = None
    attention_sinks: bool = False  # a learnt logit a head that takes part in the softmax (gpt-oss)
    sliding_window: int | None = None  # positions that a sliding layer sees, its own included
    # "sliding_attention" or "full_attention"; None: sliding if there is a window
    layer_types: tuple[str, ...] | None = None
    # multi-head latent attention (arXiv 2405.04434); kv_lora_rank 0 is ordinary attention
    kv_lora_rank: int = 0
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # block
    norm_placement: str = "pre"  # "pre", "post" (on the outputs, OLMo 2) or "both" (Gemma)
    norm_unit_offset: bool = False  # RMSNorm multiplies by 1 + weight (Gemma)
    hidden_act: str = "silu"  # or "gelu_pytorch_tanh"
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    final_logit_softcapping: float | None = None
    # experts; num_experts 0 is a dense model
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_intermediate_size: int = 0  # of the experts that every token passes, together
    dense_layers: tuple[int, ...] = ()  # layers with an ordinary MLP
    # "softmax", "sigmoid" (DeepSeek V3, with a correction bias) or "softmax_of_top" (gpt-oss, with biases)
    router: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1  # experts are chosen from the best topk_group of n_group groups
    topk_group: int = 1
    swiglu_limit: float | None = None  # gpt-oss's clamped SwiGLU in experts; None: hidden_act

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list):  # from JSON
                value = tuple(value)
                object.__setattr__(self, f.name, value)
            if not _fits(value, f.type):
                raise ValueError(f"{f.name} is {value!r}, which is not {_name(f.type)}")
            if isinstance(value, int) and not isinstance(value, bool) and value > _MOST.get(f.name, _MOST_DEFAULT):
                raise ValueError(f"{f.name} is {value}, larger than any model's")
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings n_group topk_group"
        ).split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in (
            "rope_theta rms_norm_eps embedding_scale attention_scale sliding_window rope_local_theta "
            "attn_logit_softcapping final_logit_softcapping swiglu_limit"
        ).split():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, must be above 0")
        for name, known in (
            ("qk_norm", ("", "head", "projection")),
            ("norm_placement", ("pre", "post", "both")),
            ("hidden_act", ("silu", "gelu_pytorch_tanh")),
            ("router", ("softmax", "sigmoid", "softmax_of_top")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(map(repr, known))}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
        if self.rope_dim % 2:
            name = "qk_rope_head_dim" if self.kv_lora_rank else "head_dim"
            raise ValueError(f"{name} is {self.rope_dim}, must be even for rotary embedding")
        for name in ("layer_types", "no_rope_layers"):
            value = getattr(self, name)
            if value is not None and len(value) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(value)} entries for {self.num_hidden_layers} layers")
        if unknown := set(self.layer_types or ()) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types holds {sorted(unknown)[0]!r}; known: 'sliding_attention', 'full_attention'")
        if "sliding_attention" in (self.layer_types or ()) and self.sliding_window is None:
            raise ValueError("layer_types holds 'sliding_attention' but sliding_window is not set")
        dims = (self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.q_lora_rank or 1)
        if self.kv_lora_rank and min(dims) < 1:
            raise ValueError(
                "kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim must all be at least 1"
            )
        if self.num_experts:
            self._check_experts(self.num_experts, self.num_experts_per_tok)

    def _check_experts(self, experts: int, chosen: int) -> None:
        groups, kept = self.n_group, self.topk_group
        if not 1 <= chosen <= experts:
            raise ValueError(f"num_experts_per_tok is {chosen}, must be from 1 to the {experts} experts")
        if self.moe_intermediate_size < 1 or self.shared_intermediate_size < 0:
            raise ValueError(f"moe_intermediate_size is {self.moe_intermediate_size}, must be at least 1")
        if experts % groups or kept > groups:
            raise ValueError(f"n_group ({groups}) must divide {experts} experts and topk_group ({kept}) not exceed it")
        if chosen > experts // groups * kept:
            raise ValueError(f"num_experts_per_tok ({chosen}) exceeds the experts in topk_group ({kept}) groups")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        given = self.eos_token_id
        ends: tuple[int | None, ...] = given if isinstance(given, tuple) else (given,)
        return tuple(i for i in ends if i is not None and 0 <= i < self.vocab_size)

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

    def window(self, layer: int) -> int | None:
        """Positions that a layer sees, None for all."""
        return None if self.layer_types and self.layer_types[layer] == "full_attention" else self.sliding_window

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """What the cache holds a token and layer: kv heads, key size, value size (values; latent attention keeps one
        compressed vector, which is key and value in one)."""
        if self.kv_lora_rank:
            return 1, self.kv_lora_rank + self.qk_rope_head_dim, self.kv_lora_rank
        return self.num_key_value_heads, self.head_dim, self.head_dim

    def _layer_matrices(self, layer: int, active: bool) -> int:
        """Values in the matrices of a layer; `active`: only those that one token is multiplied with."""
        h, heads = self.hidden_size, self.num_attention_heads
        if self.kv_lora_rank:
            q_out, v_out = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim), heads * self.v_head_dim
            q = h * self.q_lora_rank + self.q_lora_rank * q_out if self.q_lora_rank else h * q_out
            kv = h * (self.kv_lora_rank + self.qk_rope_head_dim)
            kv += self.kv_lora_rank * (heads * self.qk_nope_head_dim + v_out)
            attention = q + kv + v_out * h
        else:
            attention = h * self.head_dim * (2 * heads + 2 * self.num_key_value_heads)
        if not self.has_experts(layer):
            return attention + 3 * h * self.intermediate_size
        experts = self.num_experts_per_tok if active else self.num_experts
        size = experts * self.moe_intermediate_size + self.shared_intermediate_size
        return attention + h * self.num_experts + 3 * h * size

    def _layer_vectors(self, layer: int) -> int:
        """Values in norms, biases and sinks of a layer."""
        h, q, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        total = h * (4 if self.norm_placement == "both" else 2)
        total += {"": 0, "head": 2 * self.head_dim, "projection": q + kv}[self.qk_norm]
        if self.kv_lora_rank:
            total += self.kv_lora_rank + (self.q_lora_rank or 0)
        total += (q + 2 * kv) * self.attention_bias + h * self.attention_out_bias
        total += self.num_attention_heads * self.attention_sinks
        if not self.has_experts(layer):
            return total + (2 * self.intermediate_size + h) * self.mlp_bias
        if self.router == "softmax_of_top":
            return total + self.num_experts * (1 + 2 * self.moe_intermediate_size + h)
        return total

    @property
    def matrix_parameters(self) -> int:
        """Parameters that a token is multiplied with: matrices (of experts, the chosen ones) and the head, not the
        embedding look-up.

        This is the N of 6·N FLOPs a token and of the tokens-per-parameter rules here.
        """
        layers = sum(self._layer_matrices(i, True) for i in range(self.num_hidden_layers))
        return layers + self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, as stored. The correction biases of a sigmoid router are no parameters but state."""
        embedding = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        layers = sum(self._layer_matrices(i, False) + self._layer_vectors(i) for i in range(self.num_hidden_layers))
        return layers + embedding + self.hidden_size

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs a token, forward and backward: 6·N, plus causal attention at `context` tokens."""
        width = self.qk_nope_head_dim + self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim
        seen = sum(min(context, 2 * (self.window(i) or context)) for i in range(self.num_hidden_layers))
        return 6 * self.matrix_parameters + 6 * self.num_attention_heads * width * seen


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has a field's type; whole numbers are floats too, booleans are no numbers."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, k) for k in typing.get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, typing.get_args(kind)[0]) for v in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else origin or kind)


def _name(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_name(k) for k in typing.get_args(kind))
    return words.get(kind, "a list" if typing.get_origin(kind) is tuple else "an object")
