"""Weights as they lie in a folder: plain, or in one of the published compressed forms.

DeepSeek V3's FP8 blocks and gpt-oss's MXFP4 are turned into bf16 on loading. The integer form that `craton quantize`
writes is the pack-quantized layout of compressed-tensors, which vLLM and transformers read too; it stays packed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craton.base import UserError
from craton.model.decoder import Decoder, Linear
from craton.model.packed import GROUP, OF_BITS, PackedLinear, PackedMatrix, blocks_of, can_pack, replace


@dataclass(frozen=True)
class Scheme:
    kind: str  # "plain", "fp8", "mxfp4" or "packed"
    block: tuple[int, int] = (128, 128)  # rows and columns that share a scale (fp8)


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
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
            raise UserError(f"{where}.weight_block_size is {block!r}; only blocks of two sizes are supported")
        return Scheme("fp8", (block[0], block[1]))
    if method == "mxfp4":
        return Scheme("mxfp4")
    if method == "compressed-tensors":
        groups: Any = raw.get("config_groups")
        wrong = raw.get("format") != "pack-quantized" or not isinstance(groups, dict) or not groups
        if wrong or not all(_understood(group) for group in groups.values()):
            raise UserError(
                f"{where}: of compressed-tensors only symmetric pack-quantized weights of 4 or 8 bits in groups of 32 "
                "are supported"
            )
        return Scheme("packed")
    raise UserError(
        f"{where}.quant_method {method!r} is not supported; supported: 'fp8' in blocks, 'mxfp4', "
        "'compressed-tensors' with 4 or 8 bits in groups of 32"
    )


_WEIGHTS = {"type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
_METHOD = dict(quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed")
_PARTS = ("weight_packed", "weight_scale", "weight_shape")  # of a packed projection


def _understood(group: Any) -> bool:
    """Whether a group of compressed-tensors is symmetric weights of 4 or 8 bits in the order of their columns."""
    weights = group.get("weights") if isinstance(group, dict) else None
    return (
        isinstance(weights, dict)
        and all(weights.get(k) == v for k, v in _WEIGHTS.items())
        and weights.get("num_bits") in (4, 8)
        and weights.get("actorder") not in ("group", "dynamic")
        and not group.get("input_activations")
    )


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
    bits = words.shape[1] // max(1, scales.shape[1]) if words.ndim == scales.ndim == 2 else 0
    if (
        words.dtype != torch.int32
        or bits not in (4, 8)
        or shape != [words.shape[0], scales.shape[1] * GROUP]
        or tuple(words.shape) != (scales.shape[0], bits * scales.shape[1])
    ):
        raise UserError(
            f"{tensors.folder}: {name} is not packed in 4 or 8 bits in groups of {GROUP}: {tuple(words.shape)} "
            f"values, {tuple(scales.shape)} scales"
        )
    if not scales.half().isfinite().all():
        scale = f"{name}.weight_scale"
        raise UserError(f"{tensors.folder}: {scale} holds NaN or values that fp16 cannot hold; the file is damaged")
    return words.view(torch.uint8), scales.half(), bits


def put_packed(network: Decoder, tensors: Any) -> None:
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
        matrix = PackedMatrix(blocks_of(values, scales, bits), OF_BITS[bits])
        replace(network, name, PackedLinear(matrix, bias))


def prepare(scheme: Scheme, network: Decoder, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `get` gives."""
    if scheme.kind == "packed":
        biased = {name for name, m in network.named_modules() if isinstance(m, PackedLinear) and m.bias is not None}
        read = {f"{name}.bias" for name in biased}
        read |= {f"{name}.{part}" for name in packed_names(shapes) for part in _PARTS}
        return {n: s for n, s in shapes.items() if n not in read}
    if scheme.kind == "fp8":
        return {n: s for n, s in shapes.items() if not n.endswith("_scale_inv")}
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
        if name + "_scale_inv" not in tensors.files:
            raise UserError(f"{tensors.folder}: tensor {name} is FP8 but {name}_scale_inv is missing")
        return from_fp8(tensor, tensors.get(name + "_scale_inv"), scheme.block)
    return tensor


def from_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight (rows, columns) in e4m3, scale (rows / block, columns / block) -> bf16. arXiv 2412.19437 section 3.3."""
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
