"""Weights as they lie in a folder: plain, or in one of the published compressed forms.

FP8 (DeepSeek V3's blocks, compressed-tensors by tensors or rows) and gpt-oss's MXFP4 are turned into bf16 on loading.
The integer form that `craton quantize` writes is the pack-quantized layout of compressed-tensors, which vLLM and
transformers read too; it stays packed, whatever columns share a scale.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craton.base import UserError
from craton.model.decoder import Decoder, Linear
from craton.model.grouped import hold
from craton.model.packed import GROUP, OF_BITS, PackedLinear, blocks_of, can_pack, replace


@dataclass(frozen=True)
class Scheme:
    kind: str  # "plain", "fp8", "mxfp4" or "packed"
    block: tuple[int, int] | None = (128, 128)  # rows and columns that share a scale (fp8); None: all, or all of a row
    scale: str = "_scale_inv"  # what a scale's name ends with (fp8)


def scheme(raw: Any, path: Path) -> Scheme:
    """What config.json's quantization_config says. UserError if it is not one of those read here."""
    if raw is None:
        return Scheme("plain")
    where = f"{path}: quantization_config"
    if not isinstance(raw, dict):
        raise UserError(f"{where} is not an object")
    method = raw.get("quant_method")
    if method == "fp8":
        block = raw.get("weight_block_size")
        if block is None:
            return Scheme("fp8", None)
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
            raise UserError(f"{where}.weight_block_size is {block!r}; only blocks of two sizes are supported")
        return Scheme("fp8", (block[0], block[1]))
    if method == "mxfp4":
        return Scheme("mxfp4")
    if method == "compressed-tensors":
        groups: Any = raw.get("config_groups")
        own = list(groups.values()) if isinstance(groups, dict) else []
        if own and raw.get("format") == "pack-quantized" and all(_packs(group) for group in own):
            return Scheme("packed")
        if own and raw.get("format") == "float-quantized" and all(_is_fp8(group) for group in own):
            return Scheme("fp8", None, "_scale")
        raise UserError(
            f"{where}: of compressed-tensors only symmetric pack-quantized weights of 4 or 8 bits, in groups of 32 or "
            "a multiple or by rows, and float-quantized ones of 8 bits, by tensors or rows, are supported"
        )
    raise UserError(
        f"{where}.quant_method {method!r} is not supported; supported: 'fp8', 'mxfp4' and 'compressed-tensors'"
    )


_WEIGHTS = {"type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
_METHOD = dict(quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed")
_PARTS = ("weight_packed", "weight_scale", "weight_shape")  # of a packed projection


def _packs(group: Any) -> bool:
    """Whether a group of compressed-tensors is symmetric weights of 4 or 8 bits in the order of their columns."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("num_bits") not in (4, 8) or weights.get("type") != "int":
        return False
    size = weights.get("group_size")
    grouped = weights.get("strategy") == "group" and isinstance(size, int) and size > 0 and size % GROUP == 0
    ordered = weights.get("actorder") not in ("group", "dynamic")
    whole = grouped or weights.get("strategy") == "channel"
    return bool(whole and weights.get("symmetric") and ordered and not group.get("input_activations"))


def _is_fp8(group: Any) -> bool:
    """Whether a group of compressed-tensors is weights of 8-bit floats; what it rounds activations to is left out."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("num_bits") != 8 or weights.get("type") != "float":
        return False
    return bool(weights.get("symmetric")) and weights.get("strategy") in ("tensor", "channel")


def describe(bits: dict[str, int], ignored: list[str]) -> dict[str, Any]:
    """quantization_config of a folder whose projections (by name) have these bits."""
    groups: dict[str, Any] = {}
    for i, width in enumerate(sorted(set(bits.values()))):
        head = bits.get("lm_head") == width
        others = any(b == width for name, b in bits.items() if name != "lm_head")
        targets = (["Linear"] if others else []) + (["re:.*lm_head"] if head else [])
        weights: dict[str, Any] = {"num_bits": width, **_WEIGHTS}
        groups[f"group_{i}"] = dict(targets=targets, weights=weights, input_activations=None, output_activations=None)
    return {**_METHOD, "config_groups": groups, "ignore": ignored}


def packed_names(names: Iterable[str]) -> list[str]:
    """The projections that are packed, from the names of a folder's tensors."""
    return [name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")]


def read_packed(tensors: Any, name: str) -> tuple[Tensor, Tensor, int]:
    """Values (rows, bytes), scales (rows, groups) and bits of a packed projection. UserError if its parts do not
    fit."""
    for part in _PARTS:
        if f"{name}.{part}" not in tensors.files:
            raise UserError(f"{tensors.folder}: tensor {name}.{part} is missing")
    words, scales = tensors.get(f"{name}.weight_packed"), tensors.get(f"{name}.weight_scale")
    shape = tensors.get(f"{name}.weight_shape").tolist()
    fits = words.dtype == torch.int32 and words.ndim == scales.ndim == 2 and len(shape) == 2 and shape[1] > 0
    bits = words.shape[1] * 32 // shape[1] if fits else 0
    each = shape[1] // max(1, scales.shape[1]) if fits else 0  # columns that share a scale
    if (
        not fits
        or bits not in (4, 8)
        or each % GROUP
        or tuple(words.shape) != (shape[0], bits * shape[1] // 32)
        or tuple(scales.shape) != (shape[0], shape[1] // max(1, each))
    ):
        raise UserError(
            f"{tensors.folder}: {name} is not packed in 4 or 8 bits in groups of {GROUP} or a multiple: "
            f"{tuple(words.shape)} values, {tuple(scales.shape)} scales"
        )
    scales = scales.repeat_interleave(each // GROUP, 1)
    if not scales.half().isfinite().all():
        scale = f"{name}.weight_scale"
        raise UserError(f"{tensors.folder}: {scale} holds NaN or values that fp16 cannot hold; the file is damaged")
    return words.view(torch.uint8), scales.half(), bits


def put_packed(network: Decoder, tensors: Any, device: str = "cpu") -> None:
    """Replace the network's projections that the folder holds packed."""
    for name in packed_names(tensors.files):
        where = f"{tensors.folder}: tensor {name}"
        layer = dict(network.named_modules()).get(name)
        if not isinstance(layer, Linear):
            raise UserError(f"{where} is packed but unknown; is this the model that config.json describes?")
        rows, cols = layer.weight.shape
        values, scales, bits = read_packed(tensors, name)
        if values.shape != (rows, cols * bits // 8):
            shape = (values.shape[0], scales.shape[1] * GROUP)
            raise UserError(f"{where} has shape {shape}, config.json says {(rows, cols)}")
        if not can_pack(rows, cols):
            need = "packed weights need rows in 16s and columns in 32s"
            raise UserError(f"{where} has {rows} rows and {cols} columns; {need}")
        bias = None
        if layer.bias is not None:
            if tensors.shapes.get(f"{name}.bias") != (rows,):
                raise UserError(f"{where}.bias is missing or not of shape ({rows},)")
            bias = tensors.get(f"{name}.bias")
            if not bias.is_floating_point() or not bias.isfinite().all():
                raise UserError(f"{where}.bias holds NaN, infinity or no numbers at all; the file is damaged")
        matrix = hold(blocks_of(values, scales, bits), OF_BITS[bits], device, where)
        replace(network, name, PackedLinear(matrix, bias))


def prepare(scheme: Scheme, network: Decoder, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `get` gives."""
    if scheme.kind == "packed":
        biased = {name for name, m in network.named_modules() if isinstance(m, PackedLinear) and m.bias is not None}
        read = {f"{name}.bias" for name in biased}
        read |= {f"{name}.{part}" for name in packed_names(shapes) for part in _PARTS}
        return {n: s for n, s in shapes.items() if n not in read}
    if scheme.kind == "fp8":
        return {n: s for n, s in shapes.items() if not n.endswith((scheme.scale, "input_scale"))}
    out = dict(shapes)
    if scheme.kind == "mxfp4":
        for name, shape in shapes.items():
            if name.endswith("_blocks"):
                scales = name.removesuffix("_blocks") + "_scales"
                if len(shape) != 4 or shape[3] != 16 or shapes.get(scales) != shape[:3]:
                    raise UserError(
                        f"{name} has shape {shape} and {scales} {shapes.get(scales)}; MXFP4 has (experts, rows, "
                        "groups, 16) and the same without the 16"
                    )
                e, rows, groups, half = shape
                out[name.removesuffix("_blocks")] = (e, groups * half * 2, rows)
                del out[name]
            elif name.endswith("_scales"):
                del out[name]
    return out


def get(scheme: Scheme, tensors: Any, name: str) -> Tensor:
    """A tensor of the folder as the network wants it."""
    if scheme.kind == "mxfp4" and name + "_blocks" in tensors.files:
        return from_mxfp4(tensors.get(name + "_blocks"), tensors.get(name + "_scales"))
    tensor: Tensor = tensors.get(name)
    if tensor.dtype == torch.float8_e4m3fn:
        if name + scheme.scale not in tensors.files:
            raise UserError(f"{tensors.folder}: tensor {name} is FP8 but {name}{scheme.scale} is missing")
        return from_fp8(tensor, tensors.get(name + scheme.scale), scheme.block)
    return tensor


def from_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """weight (rows, columns) in e4m3, scale (rows / block, columns / block) -> bf16. arXiv 2412.19437 section 3.3.
    block None: scale () or (1,), or (rows, 1)."""
    if block is None:
        if scale.numel() not in (1, weight.shape[0]):
            raise UserError(f"an FP8 weight of shape {tuple(weight.shape)} has scales of shape {tuple(scale.shape)}")
        return (weight.float() * scale.float().reshape(-1, 1)).bfloat16()
    wide = scale.float().repeat_interleave(block[0], 0)[: weight.shape[0]]
    wide = wide.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    if wide.shape != weight.shape:
        given = f"scales of shape {tuple(scale.shape)}, too few for blocks of {block}"
        raise UserError(f"an FP8 weight of shape {tuple(weight.shape)} has {given}")
    return (weight.float() * wide).bfloat16()


_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (experts, rows, groups, 16) of two e2m1 values a byte, low half first; scales (experts, rows, groups),
    powers of two with a bias of 127 -> (experts, groups * 32, rows), bf16. OCP Microscaling Formats 1.0."""
    values = torch.stack([_FP4[(blocks & 15).long()], _FP4[(blocks >> 4).long()]], -1).flatten(-2)
    values = torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2)
    return values.bfloat16().transpose(1, 2).contiguous()
