"""A decoder's whole step in one call of the engine's kernels (step.h)."""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from craton.model import kernels, modes
from craton.model.cache import PagedCache, TokenBatch
from craton.model.config import ModelConfig
from craton.model.decoder import MLP, Attention, Decoder, Linear
from craton.model.lora import LoraLinear, LowRank
from craton.model.native import KINDS, LayerC, LowC, MatrixC, ModelC, step_of
from craton.model.packed import PackedEmbedding, PackedLinear

MOST_ADAPTERS = 256  # that are known at the same time


def fits(config: ModelConfig) -> bool:
    """Whether a decoder's steps can run in one call: the blocks that Llama, Mistral, Qwen, SmolLM, Gemma 3 and what
    craton trains are made of. The others run module by module on the same kernels."""
    c = config
    return (
        c.norm_placement != "post"
        and c.qk_norm in ("", "head")
        and not c.kv_lora_rank
        and not c.num_experts
        and c.attn_logit_softcapping is None
        and c.final_logit_softcapping is None
        and not c.attention_sinks
        and c.head_dim % 16 == 0
        and c.hidden_size % 32 == 0
        and c.intermediate_size % 32 == 0
    )


def fits_gpu(config: ModelConfig) -> bool:
    """Whether a GPU's kernels (gpu/step.py) can make a step: the same blocks, and at most 16 heads a key."""
    return fits(config) and config.num_attention_heads <= 16 * config.num_key_value_heads


class FusedStep:
    """A decoder's weights as the kernels take them. Holds what they point to; no copies of matrices."""

    def __init__(self, network: Decoder, cache: PagedCache, context: int):
        """context: positions whose rotations are made beforehand."""
        c = network.config
        self.library, self.config, self.kept = kernels.engine_kernels(), c, list[Tensor]()
        self.places: dict[str, tuple[LayerC, str]] = {}  # of the matrices that adapters can change
        self.lows: dict[str, Any] = {}  # their parts of each, by number
        self.held: dict[int, list[Tensor]] = {}  # what those point to
        self.rank = 0
        backbone = network.model
        with modes.batch_invariant():
            turned = backbone.ropes(torch.arange(context))
        self.layers = (LayerC * c.num_hidden_layers)()
        tables: list[Any] = [None, None]  # everywhere, and in layers of their own
        for i, block in enumerate(backbone.layers):
            own = turned[i]
            which = 1 if c.rope_local_theta is not None and c.window(i) else 0
            if own is not None and tables[which] is None:
                tables[which] = [self._float(t) for t in own]
            self._fill(self.layers[i], block, i, cache, 0 if own is None else which + 1)
        self.kept += [cache.keys, cache.values]
        sizes = [c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim]
        sizes += [c.intermediate_size, int(c.hidden_act != "silu")]
        scales = c.rms_norm_eps, c.attention_scale or c.head_dim**-0.5, c.embedding_scale
        layers, embedding = ctypes.cast(self.layers, ctypes.c_void_p), self._matrix(backbone.embed_tokens)
        cos, sin = ((ctypes.c_void_p * 2)(*(t and t[k] for t in tables)) for k in (0, 1))
        norm = self._norm(backbone.norm)
        self.model = ModelC(*sizes, *scales, layers, embedding, self._matrix(network.lm_head), norm, cos, sin)
        self.workspace = torch.empty(0, dtype=torch.uint8)

    def _fill(self, layer: LayerC, block: Any, number: int, cache: PagedCache, rope: int) -> None:
        c, attention, mlp = self.config, block.self_attn, block.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, MLP)
        parents = {"self_attn": (attention, "q k v o"), "mlp": (mlp, "gate up down")}
        for parent, (module, names) in parents.items():
            for name in names.split():
                setattr(layer, name, self._matrix(getattr(module, f"{name}_proj")))
                self.places[f"model.layers.{number}.{parent}.{name}_proj"] = layer, name
        norms = {"norm": block.input_layernorm, "q_norm": attention.q_norm, "k_norm": attention.k_norm}
        if c.norm_placement == "both":
            norms |= {"after": block.post_attention_layernorm, "mlp_norm": block.pre_feedforward_layernorm}
            norms["mlp_after"] = block.post_feedforward_layernorm
        else:
            norms["mlp_norm"] = block.post_attention_layernorm
        for name, norm in norms.items():
            setattr(layer, name, self._norm(norm) if norm else None)
        layer.keys, layer.values = cache.keys[number].data_ptr(), cache.values[number].data_ptr()
        layer.window, layer.rope = c.window(number) or 0, rope

    def _norm(self, norm: Any) -> int:
        return self._float(norm.scale())

    def _float(self, tensor: Tensor) -> int:
        tensor = tensor.detach().float().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def put_adapter(self, number: int, parts: Mapping[str, LowRank]) -> None:
        """Make an adapter known by a number; parts by the names of layers. KeyError for a layer that steps do not
        have."""
        held: list[Tensor] = []
        for name, low in parts.items():
            layer, own = self.places[name]
            if name not in self.lows:
                self.lows[name] = (LowC * MOST_ADAPTERS)()
                getattr(layer, own).low = ctypes.addressof(self.lows[name])
            kind = low.lora_A.dtype if low.lora_A.dtype == low.lora_B.dtype == torch.bfloat16 else torch.float32
            a, rank = low.lora_A.detach().to(kind).contiguous(), low.lora_A.shape[0]
            padded = torch.nn.functional.pad(low.lora_B.detach().to(kind), (0, 0, 0, -low.lora_B.shape[0] % 16))
            b = padded.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()  # panels of 16 rows
            held += [a, b]
            self.lows[name][number] = LowC(a.data_ptr(), b.data_ptr(), rank, KINDS[kind], low.scale)
            self.rank = self.model.rank = max(self.rank, rank)
        self.held[number] = held

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter; nothing may use it any more."""
        for lows in self.lows.values():
            lows[number] = LowC()
        self.held.pop(number, None)

    def _matrix(self, layer: Any) -> MatrixC:
        if isinstance(layer, LoraLinear):
            layer = layer.base
        bias = None if getattr(layer, "bias", None) is None else self._float(layer.bias)
        if isinstance(layer, PackedLinear | PackedEmbedding):
            self.kept.append(layer.packed.data)
            return layer.packed.matrix(bias)
        assert isinstance(layer, Linear | torch.nn.Embedding)
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
        adapters = batch.adapters
        hidden = torch.empty(rows.shape[0], c.hidden_size)
        step, scores = step_of(batch.places), None if logits is None else logits.data_ptr()
        step.adapters = None if adapters is None else adapters.data_ptr()
        inputs = ids.data_ptr(), rows.shape[0], rows.data_ptr()
        places = scores, hidden.data_ptr(), self.workspace.data_ptr()
        self.library.craton_step(model, ctypes.byref(step), *inputs, *places, threads)
        return logits, hidden
