"""A decoder's whole step in one call of the engine's kernels (step.h)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from craton.model import kernels, modes
from craton.model.cache import PagedCache, TokenBatch
from craton.model.config import ModelConfig
from craton.model.decoder import MLP, Attention, Decoder, Linear
from craton.model.native import KINDS, LayerC, MatrixC, ModelC, step_of
from craton.model.packed import PackedLinear


def fits(config: ModelConfig) -> bool:
    """Whether a decoder's steps can run in one call: the pre-norm blocks that Llama, Mistral, Qwen, SmolLM and what
    craton trains are made of. The others run module by module on the same kernels."""
    c = config
    return (
        c.norm_placement == "pre"
        and not c.norm_unit_offset
        and c.qk_norm in ("", "head")
        and not c.kv_lora_rank
        and not c.num_experts
        and c.hidden_act == "silu"
        and c.embedding_scale == 1.0
        and c.attn_logit_softcapping is None
        and c.final_logit_softcapping is None
        and not c.attention_sinks
        and c.rope_local_theta is None
        and c.head_dim % 16 == 0
        and c.hidden_size % 32 == 0
        and c.intermediate_size % 32 == 0
    )


class FusedStep:
    """A decoder's weights as the kernels take them. Holds what they point to; no copies of matrices."""

    def __init__(self, network: Decoder, cache: PagedCache, context: int):
        """context: positions whose rotations are made beforehand."""
        c = network.config
        self.library, self.config, self.kept = kernels.engine_kernels(), c, list[Tensor]()
        backbone = network.model
        with modes.batch_invariant():
            rotated = next((r for r in backbone.ropes(torch.arange(context)) if r is not None), None)
        cos, sin = (self._float(t) for t in rotated) if rotated else (None, None)
        self.layers = (LayerC * c.num_hidden_layers)()
        for i, block in enumerate(backbone.layers):
            self._fill(self.layers[i], block, i, cache)
        embedding = backbone.embed_tokens.weight.detach()
        self.kept += [embedding, cache.keys, cache.values]
        sizes = [c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim]
        sizes += [c.intermediate_size, c.vocab_size, KINDS[embedding.dtype]]
        scale = c.attention_scale or c.head_dim**-0.5
        layers, head = ctypes.cast(self.layers, ctypes.c_void_p), self._matrix(network.lm_head)
        places = embedding.data_ptr(), self._float(backbone.norm.weight), cos, sin
        self.model = ModelC(*sizes, c.rms_norm_eps, scale, layers, head, *places)
        self.workspace = torch.empty(0, dtype=torch.uint8)

    def _fill(self, layer: LayerC, block: Any, number: int, cache: PagedCache) -> None:
        c, attention, mlp = self.config, block.self_attn, block.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, MLP)
        for name in ("q", "k", "v", "o"):
            setattr(layer, name, self._matrix(getattr(attention, f"{name}_proj")))
        for name in ("gate", "up", "down"):
            setattr(layer, name, self._matrix(getattr(mlp, f"{name}_proj")))
        norms: Any = (block.input_layernorm, block.post_attention_layernorm, attention.q_norm, attention.k_norm)
        for name, norm in zip(("norm", "mlp_norm", "q_norm", "k_norm"), norms, strict=True):
            setattr(layer, name, self._float(norm.weight) if norm else None)
        layer.keys, layer.values = cache.keys[number].data_ptr(), cache.values[number].data_ptr()
        layer.window = c.window(number) or 0
        layer.rope = int(not c.no_rope_layers or c.no_rope_layers[number])

    def _float(self, tensor: Tensor) -> int:
        tensor = tensor.detach().float().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, layer: Any) -> MatrixC:
        bias = None if layer.bias is None else self._float(layer.bias)
        if isinstance(layer, PackedLinear):
            values: Any = layer.values
            self.kept.append(values)
            return MatrixC(values.data_ptr(), bias, layer.rows, layer.cols, layer.bits)
        assert isinstance(layer, Linear)
        weight = layer.weight.detach().contiguous()
        self.kept.append(weight)
        return MatrixC(weight.data_ptr(), bias, *weight.shape, KINDS[weight.dtype])

    def run(self, ids: Tensor, batch: TokenBatch, rows: Tensor, want_logits: bool) -> tuple[Tensor | None, Tensor]:
        """ids (tokens,) int32 -> logits (outputs, vocabulary) and last hidden states (outputs, hidden) of the tokens in
        rows (outputs,) int32."""
        threads, c, model = torch.get_num_threads(), self.config, ctypes.byref(self.model)
        need = self.library.craton_workspace(model, ids.shape[0], threads)
        if self.workspace.numel() < need:
            self.workspace = torch.empty(need, dtype=torch.uint8)
        logits = torch.empty(rows.shape[0], c.vocab_size) if want_logits else None
        hidden = torch.empty(rows.shape[0], c.hidden_size)
        step, scores = step_of(batch.places), None if logits is None else logits.data_ptr()
        inputs = ids.data_ptr(), rows.shape[0], rows.data_ptr()
        places = scores, hidden.data_ptr(), self.workspace.data_ptr()
        self.library.craton_step(model, ctypes.byref(step), *inputs, *places, threads)
        return logits, hidden
