"""The network: a decoder-only transformer, the same object for training, sampling, scoring and serving.

Pre-norm blocks of grouped-query attention (with QK-norm) and SwiGLU, rotary positions, RMSNorm. Modules carry the
names of the published checkpoints, so `state_dict()` is a Hugging Face `model.safetensors` as it stands.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from craton.model import ops
from craton.model.config import ModelConfig


@dataclass
class KVCache:
    """Keys and values of past tokens: (layers, batch, capacity, kv_heads, head_dim); `length` of them are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> "KVCache":
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (batch, time, kv_heads, head_dim) after the filled part; return all up to them."""
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]


class Linear(nn.Module):
    """Weight (out, in), no bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.q_norm = RMSNorm(c.head_dim) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim) if c.qk_norm else None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], start: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        c, (batch, time, _) = self.config, x.shape
        qkv = ops.linear(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        norms = (self.q_norm.weight if self.q_norm else None, self.k_norm.weight if self.k_norm else None)
        q, k, v = ops.split_norm_rope(qkv, *norms, rope, c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        o = ops.attention(q, k, v, start)
        return self.o_proj(o.reshape(batch, time, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(ops.linear(x, self.gate_proj.weight, self.up_proj.weight)))


class Block(nn.Module):
    """x and the addition still pending on it go in and come out, so that each addition joins the next norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, delta: Tensor | None, rope: tuple[Tensor, Tensor], start: Tensor | None,
        cache: KVCache | None, layer: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, y = ops.add_rms_norm(x, delta, self.input_layernorm.weight, self.eps)
        delta = self.self_attn(y, rope, start, cache, layer)
        x, y = ops.add_rms_norm(x, delta, self.post_attention_layernorm.weight, self.eps)
        return x, self.mlp(y)


class Backbone(nn.Module):
    """Embedding, blocks and the last norm: everything below the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)

    def forward(self, ids: Tensor, start: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        c, past = self.config, cache.length if cache else 0
        rope = ops.rope_table(torch.arange(past, past + ids.shape[1], device=ids.device), c.head_dim, c.rope_theta)
        x, delta = self.embed_tokens(ids), None
        for i, layer in enumerate(self.layers):
            x, delta = layer(x, delta, rope, start, cache, i)
        if cache is not None:
            cache.length += ids.shape[1]
        return ops.add_rms_norm(x, delta, self.norm.weight, c.rms_norm_eps)[1]


class Decoder(nn.Module):
    """`network(ids)`: ids (batch, time) -> logits (batch, time, vocabulary)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Make the head the embedding."""
        self.lm_head.weight = self.model.embed_tokens.weight  # type: ignore[assignment]

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.lm_head(self.model(ids, cache=cache))

    def loss(self, ids: Tensor, target: Tensor, weight: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum over positions of weight * negative log likelihood (scalar), and the latter (batch, time), in nats.

        ids, target, weight: (batch, time); start as in ops.attention. Logits are never all held at once.
        """
        x = self.model(ids, start)
        total, nll = ops.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, target.flatten(), weight.flatten())
        return total, nll.view_as(target)


def initialise(network: Decoder, seed: int) -> None:
    """Fill the parameters from `seed`: uniform matrices of standard deviation 1/sqrt(fan-in), outputs of blocks and
    the untied head small, embedding normal.

    Blocks start near the identity (zero-initialised projections, arXiv 2203.03466 app. D and nanochat), which lets
    the matrix learning rates be the same at every depth.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    c = network.config
    for name, p in network.named_parameters():
        if p.ndim == 1:
            nn.init.ones_(p)
        elif "embed_tokens" in name:
            scale = c.hidden_size**-0.5 if c.tie_word_embeddings else 1.0
            p.data.copy_(torch.randn(p.shape, generator=generator) * scale)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(p)
        elif "lm_head" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.001)
        else:
            bound = math.sqrt(3.0 / p.shape[1])
            p.data.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)
