"""The engine's kernels (serve.cpp) from Python: packed weights, products, paged attention, a whole step in one call.

Where the kernels are missing (another processor, no compiler at installation) packed weights are written out in
fp32 for each product, which is said once.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from craton.model import kernels, ops
from craton.model.cache import Step
from craton.model.config import ModelConfig
from craton.model.decoder import MLP, Attention, Decoder, Linear
from craton.model.native import KINDS, LayerC, MatrixC, ModelC, step_of

GROUP = 32  # values that share a scale


# ---- weights of 8 and 4 bits ------------------------------------------------------------------------------------


def unpacked(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """values (rows, cols * bits / 8) uint8 as they lie in files, scales (rows, cols / 32) -> (rows, cols) fp32."""
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2)
    signed = values.float() - (8 if bits == 4 else 128)
    return (signed.unflatten(-1, (-1, GROUP)) * scales.float()[..., None]).flatten(-2)


_ARENA = 64 << 20
_arena = torch.empty(0, dtype=torch.uint8)  # what is left of it


def _room(size: int) -> Tensor:
    """size bytes from memory with large pages, which batch 1 reads 5 % faster than small ones; several tensors share
    a piece."""
    global _arena
    if _arena.numel() < size:
        _arena = torch.empty(max(_ARENA, size), dtype=torch.uint8)
        kernels.load_serving().serve_advise(_arena.data_ptr(), _arena.numel())
    room, _arena = _arena[:size], _arena[-(-size // 64) * 64 :]
    return room


def pack(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The same in the kernels' panels, (rows * cols / 32 * (16 or 32 bytes + 2),) uint8."""
    library = kernels.load_serving()
    assert library is not None
    rows, cols = values.shape[0], values.shape[1] * 8 // bits
    out = _room(rows * (cols // GROUP) * (bits * 4 + 2))
    values, scales = values.contiguous(), scales.half().contiguous()
    library.serve_pack(bits, values.data_ptr(), scales.data_ptr(), rows, cols, out.data_ptr(), torch.get_num_threads())
    return out


def can_pack(rows: int, cols: int) -> bool:
    return rows % 16 == 0 and cols % GROUP == 0


_ops = torch.library.Library("craton", "DEF")
_ops.define("packed_linear(Tensor x, Tensor packed, int rows, int bits) -> Tensor")


def _packed_linear(x: Tensor, packed: Tensor, rows: int, bits: int) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    if x.numel():
        matrix = MatrixC(packed.data_ptr(), None, rows, x.shape[-1], bits)
        kernels.load_serving().serve_linear(
            ctypes.byref(matrix), x.data_ptr(), x.numel() // x.shape[-1], out.data_ptr(), torch.get_num_threads()
        )
    return out


_ops.impl("packed_linear", _packed_linear, "CPU")
_ops.impl("packed_linear", lambda x, packed, rows, bits: x.new_empty(*x.shape[:-1], rows), "Meta")


class PackedLinear(nn.Module):
    """A Linear whose weight has 8 or 4 bits a value and a scale for every 32; for inference only."""

    def __init__(self, values: Tensor, scales: Tensor, bits: int, bias: Tensor | None = None):
        super().__init__()
        self.bits, self.rows, self.cols = bits, values.shape[0], values.shape[1] * 8 // bits
        if not can_pack(self.rows, self.cols):
            raise ValueError(
                f"{self.rows} rows and {self.cols} columns cannot be packed; rows go in 16s, columns in 32s"
            )
        self.native = values.device.type == "cpu" and kernels.load_serving() is not None
        self.register_buffer("values", pack(values, scales, bits) if self.native else values, persistent=False)
        self.register_buffer("scales", None if self.native else scales, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            y = torch.ops.craton.packed_linear(x.float(), self.values, self.rows, self.bits)
        else:
            y = x @ unpacked(self.values, self.scales, self.bits).to(x.dtype).t()  # type: ignore[arg-type]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the network's module of this name."""
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)


# ---- a whole step -----------------------------------------------------------------------------------------------


def fused(config: ModelConfig) -> bool:
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

    def __init__(self, network: Decoder, keys: Tensor, values: Tensor, context: int):
        c = network.config
        self.library, self.config, self.kept = kernels.load_serving(), c, list[Tensor]()
        backbone = network.model
        with ops.row_by_row():
            rotated = next((r for r in backbone.ropes(torch.arange(context)) if r is not None), None)
        cos, sin = (self._float(t) for t in rotated) if rotated else (None, None)
        layers = (LayerC * c.num_hidden_layers)()
        for i, block in enumerate(backbone.layers):
            attention, mlp = block.self_attn, block.mlp
            assert isinstance(attention, Attention) and isinstance(mlp, MLP)
            parts = (
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                attention.o_proj,
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
            )
            for name, layer in zip(("q", "k", "v", "o", "gate", "up", "down"), parts, strict=True):
                setattr(layers[i], name, self._matrix(layer))
            norms: Any = (block.input_layernorm, block.post_attention_layernorm, attention.q_norm, attention.k_norm)
            for name, norm in zip(("norm", "mlp_norm", "q_norm", "k_norm"), norms, strict=True):
                setattr(layers[i], name, self._float(norm.weight) if norm else None)
            layers[i].keys, layers[i].values = keys[i].data_ptr(), values[i].data_ptr()
            layers[i].window, layers[i].rope = c.window(i) or 0, int(not c.no_rope_layers or c.no_rope_layers[i])
        embedding = backbone.embed_tokens.weight.detach()
        self.kept += [embedding, keys, values]
        self.layers = layers
        self.model = ModelC(
            c.num_hidden_layers,
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.intermediate_size,
            c.vocab_size,
            KINDS[embedding.dtype],
            c.rms_norm_eps,
            c.attention_scale or c.head_dim**-0.5,
            ctypes.cast(layers, ctypes.c_void_p),
            self._matrix(network.lm_head),
            embedding.data_ptr(),
            self._float(backbone.norm.weight),
            cos,
            sin,
        )
        self.workspace = torch.empty(0, dtype=torch.uint8)

    def _float(self, tensor: Tensor) -> int:
        tensor = tensor.detach().float().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, layer: nn.Module) -> MatrixC:
        if isinstance(layer, PackedLinear):
            self.kept.append(layer.values)  # type: ignore[arg-type]
            packed_bias = None if layer.bias is None else self._float(layer.bias)  # type: ignore[arg-type]
            return MatrixC(layer.values.data_ptr(), packed_bias, layer.rows, layer.cols, layer.bits)  # type: ignore
        assert isinstance(layer, Linear)
        weight = layer.weight.detach().contiguous()
        self.kept.append(weight)
        bias = None if layer.bias is None else self._float(layer.bias)
        return MatrixC(weight.data_ptr(), bias, *weight.shape, KINDS[weight.dtype])

    def run(self, ids: Tensor, step: Step, rows: Tensor, want_logits: bool = True) -> tuple[Tensor | None, Tensor]:
        """ids (tokens,) int32 -> logits (outputs, vocabulary) and last hidden states (outputs, hidden) of the tokens in
        rows (outputs,) int32."""
        threads, c = torch.get_num_threads(), self.config
        need = self.library.serve_workspace(ctypes.byref(self.model), ids.shape[0], threads)
        if self.workspace.numel() < need:
            self.workspace = torch.empty(need, dtype=torch.uint8)
        logits = torch.empty(rows.shape[0], c.vocab_size) if want_logits else None
        hidden = torch.empty(rows.shape[0], c.hidden_size)
        self.library.serve_step(
            ctypes.byref(self.model),
            ctypes.byref(step_of(step)),
            ids.data_ptr(),
            rows.shape[0],
            rows.data_ptr(),
            None if logits is None else logits.data_ptr(),
            hidden.data_ptr(),
            self.workspace.data_ptr(),
            threads,
        )
        return logits, hidden
