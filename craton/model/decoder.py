"""The network: a decoder-only transformer, the same object for training, sampling, scoring and serving.

Blocks of attention (grouped-query or multi-head latent) and a gated MLP or experts; which of the published families
it is, is a matter of ModelConfig. Modules carry the names of the published checkpoints, so `state_dict()` is nearly a
Hugging Face `model.safetensors` as it stands; craton/weights/ knows the rest.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from craton.model import modes, nll, ops, plain, rope
from craton.model.attention import AttentionSpec, Spans
from craton.model.cache import Past
from craton.model.config import ModelConfig
from craton.model.plain import Pair

Rope = Pair | None  # cos, sin: (time, rotated dimensions / 2)


class Linear(nn.Module):
    """Weight (out, in), bias (out,) or none."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = ops.linear(x, self.weight)
        return y if self.bias is None else y + self.bias

    def plain_weight(self) -> Tensor | None:
        """The weight, if a product with it is all that the layer is."""
        return self.weight if self.bias is None else None


class Head(Linear):
    """Hidden states (..., hidden) -> logits (..., vocabulary), or at once what targets cost (nll.py).

    softcap bounds the logits by a tanh (arXiv 2408.00118).
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.vocab_size)
        self.softcap = config.final_logit_softcapping

    def token_nll(self, x: Tensor, target: Tensor) -> Tensor:
        """Negative log likelihoods of targets (batch, time), in nats, with a gradient."""
        return nll.token_nll(x.flatten(0, 1), self.weight, target.flatten(), self.softcap).view_as(target)

    def weighted_nll(self, x: Tensor, target: Tensor, weight: Tensor) -> Pair:
        """Their sum by weights (batch, time), and they themselves without a gradient."""
        total, each = nll.weighted_nll(x.flatten(0, 1), self.weight, target.flatten(), weight.flatten(), self.softcap)
        return total, each.view_as(target)


def project_together(x: Tensor, *layers: nn.Module) -> Tensor:
    """The layers' outputs side by side: one product where their weights are plain."""
    weights = []
    for layer in layers:
        weight = layer.plain_weight() if isinstance(layer, Linear) else None
        if weight is None:
            return torch.cat([layer(x) for layer in layers], -1)
        weights.append(weight)
    return ops.linear(x, *weights)


class RMSNorm(nn.Module):
    """arXiv 1910.07467. offset: multiply by 1 + weight."""

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.eps, self.offset = config.rms_norm_eps, config.norm_unit_offset
        self.weight = nn.Parameter(torch.ones(size))

    def scale(self) -> Tensor:
        return 1 + self.weight if self.offset else self.weight

    def add_then_norm(self, x: Tensor, delta: Tensor | None) -> Pair:
        """x + delta, and its norm."""
        return ops.add_rms_norm(x, delta, self.scale(), self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.add_then_norm(x, None)[1]


class Attention(nn.Module):
    """Grouped-query attention, arXiv 2305.13245."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        scale = config.attention_scale or config.head_dim**-0.5
        self.spec = AttentionSpec(scale, config.window(layer), config.attn_logit_softcapping)
        c, q, kv = config, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(c.hidden_size, q, c.attention_bias)
        self.k_proj = Linear(c.hidden_size, kv, c.attention_bias)
        self.v_proj = Linear(c.hidden_size, kv, c.attention_bias)
        self.o_proj = Linear(q, c.hidden_size, c.attention_out_bias)
        whole = c.qk_norm == "projection"
        self.q_norm = RMSNorm(q if whole else c.head_dim, c) if c.qk_norm else None
        self.k_norm = RMSNorm(kv if whole else c.head_dim, c) if c.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(c.num_attention_heads)) if c.attention_sinks else None

    def forward(self, x: Tensor, rope: Rope, spans: Spans | None, past: Past | None) -> Tensor:
        c, (batch, time, _) = self.config, x.shape
        qkv = project_together(x, self.q_proj, self.k_proj, self.v_proj)
        q_norm: Tensor | None = None
        k_norm: Tensor | None = None
        if self.q_norm and self.k_norm:
            if c.qk_norm == "head":
                q_norm, k_norm = self.q_norm.scale(), self.k_norm.scale()
            else:
                q, k, v = qkv.split([self.q_norm.weight.shape[0], *2 * [self.k_norm.weight.shape[0]]], -1)
                qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], -1)
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        q, k, v = ops.split_norm_rope(qkv, q_norm, k_norm, rope, heads=heads, kv_heads=kv_heads, eps=c.rms_norm_eps)
        if past is not None:
            o = past.attend(self.layer, q, k, v, self.spec, self.sinks)
        else:
            o = ops.attention(q, k, v, self.spec, spans, self.sinks)
        return self.o_proj(o.reshape(batch, time, -1))


class LatentAttention(nn.Module):
    """Multi-head latent attention, arXiv 2405.04434 section 2.1: the cache holds one compressed vector a token.

    With a cache the up-projections are absorbed into query and output, so that the compressed vectors are attended to
    as they lie; without, keys and values are written out. Same function.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        c, heads = config, config.num_attention_heads
        self.spec = AttentionSpec(c.attention_scale or (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5)
        q_out = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, c)
            self.q_b_proj = Linear(c.q_lora_rank, q_out)
        else:
            self.q_proj = Linear(c.hidden_size, q_out)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size)

    def forward(self, x: Tensor, rope: Rope, spans: Spans | None, past: Past | None) -> Tensor:
        c, (batch, time, _) = self.config, x.shape
        assert rope is not None
        nope, heads = c.qk_nope_head_dim, c.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank else self.q_proj(x)
        q_nope, q_rope = q.view(batch, time, heads, -1).split([nope, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_layernorm(latent), k_rope[:, :, None]
        if c.rope_interleave:
            q_rope, k_rope = ops.deinterleave(q_rope), ops.deinterleave(k_rope)
        q_rope, k_rope = ops.rotate(q_rope, *rope), ops.rotate(k_rope, *rope)
        up = self.kv_b_proj.weight.view(heads, nope + c.v_head_dim, c.kv_lora_rank)
        if past is not None:
            q = torch.cat([ops.linear_heads(q_nope, up[:, :nope].transpose(1, 2)), q_rope], -1)
            k = torch.cat([latent[:, :, None], k_rope], -1)
            o = past.attend(self.layer, q, k, latent[:, :, None], self.spec, None)
            o = ops.linear_heads(o, up[:, nope:])
        else:
            k_nope, v = self.kv_b_proj(latent).view(batch, time, heads, -1).split([nope, c.v_head_dim], -1)
            k = torch.cat([k_nope, k_rope.expand(-1, -1, heads, -1)], -1)
            o = ops.attention(torch.cat([q_nope, q_rope], -1), k, v, self.spec, spans)
        return self.o_proj(o.reshape(batch, time, -1))


class MLP(nn.Module):
    """Gated, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig, size: int, bias: bool):
        super().__init__()
        self.act = config.hidden_act
        self.gate_proj = Linear(config.hidden_size, size, bias)
        self.up_proj = Linear(config.hidden_size, size, bias)
        self.down_proj = Linear(size, config.hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.gated_activation(project_together(x, self.gate_proj, self.up_proj), self.act))


class Router(nn.Module):
    """Which experts a token goes to, and with what weights."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router == "softmax_of_top" else None
        if config.router == "sigmoid":  # moves the choice, not the weights: balance without a loss (arXiv 2408.15664)
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> Pair:
        """x (tokens, hidden) -> weights and indices, each (tokens, num_experts_per_tok)."""
        c, k = self.config, self.config.num_experts_per_tok
        logits = ops.linear(x.float(), self.weight.float())
        if self.bias is not None:
            top, chosen = (logits + self.bias).topk(k, -1)
            return top.softmax(-1), chosen
        scores = plain.via_double(torch.sigmoid, logits) if c.router == "sigmoid" else logits.softmax(-1)
        choice = scores + self.e_score_correction_bias if c.router == "sigmoid" else scores
        if c.n_group > 1:
            groups = choice.unflatten(-1, (c.n_group, -1))
            rank = groups.topk(2, -1)[0].sum(-1) if c.router == "sigmoid" else groups.amax(-1)
            kept = torch.zeros_like(rank).scatter_(-1, rank.topk(c.topk_group, -1)[1], 1.0)
            lost = -math.inf if c.router == "sigmoid" else 0.0
            choice = groups.masked_fill(kept[..., None] == 0, lost).flatten(-2)
        chosen = choice.topk(k, -1)[1]
        weights = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if c.router == "sigmoid" else 0.0))
        return weights * c.routed_scaling_factor, chosen


class Experts(nn.Module):
    """Gated MLPs side by side: gate_up_proj (experts, 2 size, hidden), gates first; down_proj (experts, hidden,
    size)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, self.config, bias = config, config, config.router == "softmax_of_top"
        self.gate_up_proj = nn.Parameter(torch.empty(c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, c.moe_intermediate_size))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(c.num_experts, 2 * c.moe_intermediate_size)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(c.num_experts, c.hidden_size)) if bias else None

        self.packed = nn.ModuleDict()  # matrices of few bits by the names of the parameters that they replace
        self.adapters = nn.ModuleDict()  # low-rank additions (lora.py) by the names of the parameters that they go with

    def pack(self, name: str, matrices: Sequence[nn.Module]) -> None:
        """Hold a parameter as a PackedMatrix for each expert; for inference only."""
        setattr(self, name, None)
        self.packed[name] = nn.ModuleList(matrices)

    def shape_of(self, name: str) -> tuple[int, int, int]:
        """(experts, outputs, inputs) of a parameter."""
        c = self.config
        hidden, size = c.hidden_size, c.moe_intermediate_size
        return (c.num_experts, 2 * size, hidden) if name == "gate_up_proj" else (c.num_experts, hidden, size)

    def _product(self, x: Tensor, name: str, expert: int) -> Tensor:
        packed = self.packed[name][expert] if name in self.packed else None  # type: ignore[index]
        y = ops.linear(x, getattr(self, name)[expert]) if packed is None else packed.product(x)
        if name in self.adapters and not modes.leaves_out_adapters():
            y = y + self.adapters[name].of_expert(x, expert)  # type: ignore[operator]
        bias = getattr(self, f"{name}_bias")
        return y if bias is None else y + bias[expert]

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Each token's weighted sum over its experts, added in the order of the experts. x: (tokens, hidden)."""
        c, out = self.config, torch.zeros_like(x)
        flat, order = chosen.flatten().sort(stable=True)
        at = 0
        for expert, count in enumerate(torch.bincount(flat, minlength=c.num_experts).tolist()):
            if count:
                picks = order[at : at + count]
                token = picks // chosen.shape[1]
                hidden = self._product(x[token], "gate_up_proj", expert)
                if c.swiglu_limit is None:
                    hidden = ops.gated_activation(hidden, c.hidden_act)
                else:
                    hidden = ops.clamped_swiglu(hidden, c.swiglu_limit)
                y = self._product(hidden, "down_proj", expert) * weights.flatten()[picks, None]
                out = out.index_add(0, token, y.to(out.dtype))
                at += count
        return out


class MoE(nn.Module):
    """Mixture of experts, with an MLP beside it that every token passes where the configuration has one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.shared_intermediate_size
        self.shared_experts = MLP(config, shared, False) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        y = self.experts(rows, *self.gate(rows)).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y


class Block(nn.Module):
    """x and the addition still pending on it go in and come out, so that each addition joins the next norm."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, self.placement = config, config.norm_placement
        self.self_attn = LatentAttention(c, layer) if c.kv_lora_rank else Attention(c, layer)
        self.mlp: nn.Module = MoE(c) if c.has_experts(layer) else MLP(c, c.intermediate_size, c.mlp_bias)
        if self.placement != "post":
            self.input_layernorm = RMSNorm(c.hidden_size, c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c)
        if self.placement == "both":
            self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c)
        if self.placement != "pre":
            self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c)

    def forward(self, x: Tensor, delta: Tensor | None, rope: Rope, spans: Spans | None, past: Past | None) -> Pair:
        if self.placement == "post":
            x = x if delta is None else x + delta
            x = x + self.post_attention_layernorm(self.self_attn(x, rope, spans, past))
            return x, self.post_feedforward_layernorm(self.mlp(x))
        x, y = self.input_layernorm.add_then_norm(x, delta)
        delta = self.self_attn(y, rope, spans, past)
        if self.placement == "both":
            x, y = self.pre_feedforward_layernorm.add_then_norm(x, self.post_attention_layernorm(delta))
            return x, self.post_feedforward_layernorm(self.mlp(y))
        x, y = self.post_attention_layernorm.add_then_norm(x, delta)
        return x, self.mlp(y)


class Backbone(nn.Module):
    """Embedding, blocks and the last norm: everything below the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        shape = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.recompute = False  # blocks' insides again in the backward pass, rather than keeping them
        self._ropes: dict[tuple[int, torch.device, bool], list[Rope]] = {}

    def _ropes_of(self, time: int, device: torch.device) -> list[Rope]:
        """Of the first positions; kept, since training asks for the same ones each time."""
        key = time, device, modes.is_batch_invariant()
        found = self._ropes.get(key)
        if found is None:
            with torch.inference_mode(False):  # training may come after looking
                found = self.ropes(torch.arange(time, device=device))
            self._ropes = {key: found}
        return found

    def ropes(self, positions: Tensor) -> list[Rope]:
        """Each layer's rotation of these positions (time,)."""
        c = self.config
        everywhere = rope.table(positions, c.rope_dim, c.rope_theta, c.rope_scaling)
        local = everywhere if c.rope_local_theta is None else rope.table(positions, c.rope_dim, c.rope_local_theta)
        kept = c.no_rope_layers or (1,) * c.num_hidden_layers
        return [(local if c.window(i) else everywhere) if kept[i] else None for i in range(c.num_hidden_layers)]

    def embed(self, ids: Tensor) -> Tensor:
        """ids (batch, time) -> (batch, time, hidden)."""
        x, scale = self.embed_tokens(ids), self.config.embedding_scale
        if x.is_cuda and torch.is_autocast_enabled("cuda"):  # what goes from block to block is of that type too
            x = x.to(torch.get_autocast_dtype("cuda"))
        # Rounded to the type, as Gemma was trained.
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype)

    def forward(self, ids: Tensor, document_start: Tensor | None = None, past: Past | None = None) -> Tensor:
        """Hidden states after the last norm. document_start: as in Spans; past: the tokens that came before."""
        turned = self._ropes_of(ids.shape[1], ids.device) if past is None else self.ropes(past.positions)
        spans = Spans(document_start, ids) if past is None else None
        x, delta = self.embed(ids), None
        for layer, rope_ in zip(self.layers, turned, strict=True):
            if self.recompute and torch.is_grad_enabled():
                x, delta = checkpoint(layer, x, delta, rope_, spans, past, use_reentrant=False)
            else:
                x, delta = layer(x, delta, rope_, spans, past)
        return self.norm.add_then_norm(x, delta)[1]


class Decoder(nn.Module):
    """`network(ids)`: ids (batch, time) -> logits (batch, time, vocabulary). With a step: ids (1, tokens) of it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Head(config)
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Make the head the embedding."""
        self.lm_head.weight = self.model.embed_tokens.weight  # type: ignore[assignment]

    def head(self, x: Tensor) -> Tensor:
        """Hidden states of the last norm -> logits."""
        logits, cap = self.lm_head(x), self.config.final_logit_softcapping
        return logits if cap is None else plain.via_double(torch.tanh, logits / cap) * cap

    def forward(self, ids: Tensor, past: Past | None = None) -> Tensor:
        """ids (batch, time) -> logits (batch, time, vocabulary); with a past, ids (1, tokens) of it."""
        return self.head(self.model(ids, past=past))

    def weighted_nll(self, ids: Tensor, target: Tensor, weight: Tensor, document_start: Tensor | None = None) -> Pair:
        """The sum over positions of weight * negative log likelihood, and the latter (batch, time) without a gradient,
        in nats.

        ids, target, weight: (batch, time); targets of nll.IGNORE are left out. The cheapest way where weights are known
        before the forward pass. Logits are never all held at once.
        """
        return self.lm_head.weighted_nll(self.model(ids, document_start), target, weight)

    def token_nll(self, ids: Tensor, target: Tensor, document_start: Tensor | None = None) -> Tensor:
        """Negative log likelihood of each target (batch, time) in nats, with a gradient; 0 where it is nll.IGNORE."""
        return self.lm_head.token_nll(self.model(ids, document_start), target)
