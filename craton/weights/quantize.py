"""Weights to 8 or 4 bits: a value is a whole number times the scale of its group of 32.

The values are those of GGUF's Q8_0 and Q4_0; the scales of 4 bits are better chosen. Q4_0 maps the largest magnitude
to -8; here the scale is the one of a few dozen that leaves the least squared error, then fitted by least squares.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from craton.base import Progress, UserError, amount, claim, count, publish, remove_inside, say
from craton.model.decoder import Decoder, Linear
from craton.model.packed import GROUP, OF_BITS, PackedLinear, PackedMatrix, blocks_of, can_pack, replace, unpacked
from craton.weights import stored
from craton.weights.folder import copy_tokenizer, load_network, published, write_config, write_shards

_STEPS = torch.cat([torch.linspace(-9.5, -5.5, 17), torch.linspace(6.0, 9.0, 9)])  # what the largest value is mapped to


def quantise(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """w (rows, cols) -> values (rows, cols * bits / 8) uint8 as they lie in files, scales (rows, cols / 32) fp16."""
    rows, cols = w.shape
    parts = [_quantise(part, bits) for part in w.detach().float().split(max(1, (1 << 22) // cols))]
    values, scales = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return values.view(rows, -1), scales.view(rows, cols // GROUP)


def _quantise(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    g = w.reshape(-1, GROUP)
    if bits == 8:
        scale = (g.abs().amax(-1) / 127).half()
        q = _rounded(g, scale.float(), -128, 127)
        return (q + 128).to(torch.uint8), scale
    largest = g.gather(-1, g.abs().argmax(-1, keepdim=True))[:, 0]
    best, least = torch.zeros_like(largest), torch.full_like(largest, float("inf"))
    for step in _STEPS.tolist():
        q = _rounded(g, largest / step, -8, 7)
        # The least squares scale for these values; error = |w|^2 - (w.q)^2 / q^2.
        wq, qq = (g * q).sum(-1), (q * q).sum(-1)
        error = torch.where(qq > 0, -wq * wq / qq, 0.0)
        better = error < least
        best, least = torch.where(better, torch.where(qq > 0, wq / qq, 0.0), best), torch.where(better, error, least)
    scale = best.half()
    q = (_rounded(g, scale.float(), -8, 7) + 8).to(torch.uint8)
    return (q[:, 0::2] | (q[:, 1::2] << 4)), scale


def _rounded(g: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (g * inverse[:, None]).round_().clamp_(low, high)


def packable(network: nn.Module) -> dict[str, Linear]:
    """The projections that can be stored in few bits, by name. Routers, experts and the up-projection of latent
    attention, which is absorbed into others, stay as they are."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, Linear) and can_pack(*layer.weight.shape) and not name.endswith("kv_b_proj")
    }


def pack_network(network: Decoder, bits: int, head_bits: int | None = None) -> Decoder:
    """Replaces the projections by packed ones, in place. head_bits: of the head, 8 where left out."""
    for name, layer in packable(network).items():
        width = (head_bits or 8) if name == "lm_head" else bits
        bias = None if layer.bias is None else layer.bias.detach()
        matrix = PackedMatrix(blocks_of(*quantise(layer.weight, width), width), OF_BITS[width])
        replace(network, name, PackedLinear(matrix, bias))
    return network


def quantise_folder(source: Path, out: Path, bits: int) -> dict[str, Any]:
    """`craton quantize`: a folder with the projections of another one in 4 or 8 bits, the head in 8, the rest in bf16
    where it was fp32. The layout is compressed-tensors' pack-quantized, which vLLM and transformers read."""
    if bits not in (4, 8):
        raise UserError(f"--bits is {bits}; 4 and 8 are supported")
    with claim(out, hint="remove it or give another --out"):
        try:
            return _quantise_into(load_network(source), source, out, bits)
        except BaseException:
            remove_inside(out, {".lock"})  # it was empty
            raise


def _quantise_into(network: Decoder, source: Path, out: Path, bits: int) -> dict[str, Any]:
    layers = packable(network)
    if any(isinstance(m, PackedLinear) for m in network.modules()) or not layers:
        why = "its projections are packed already, or none has rows in 16s and columns in 32s"
        raise UserError(f"{source}: nothing to quantise: {why}")
    widths = {name: 8 if name == "lm_head" else bits for name in layers}
    left_out = sorted({n for n, m in network.named_modules() if isinstance(m, Linear)} - set(layers))
    experts = sum(
        p.numel() for n, p in network.named_parameters() if "experts.gate_up_proj" in n or "experts.down_proj" in n
    )
    if experts:
        say(f"{count(experts)} parameters of experts stay as they are: experts are not quantised")
    tied = network.config.tie_word_embeddings and "lm_head" not in layers  # a packed head is no longer the embedding
    config = dataclasses.replace(network.config, tie_word_embeddings=tied)
    before = sum(p.nbytes for p in network.parameters())
    progress, done, total = Progress(), 0, sum(layer.weight.numel() for layer in layers.values())
    squares = [0.0, 0.0]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for name, tensor in published(network.config, network.state_dict()).items():
            if name.removesuffix(".weight") not in layers or not name.endswith(".weight"):
                yield name, tensor.bfloat16() if tensor.dtype == torch.float32 and tensor.ndim > 1 else tensor
        for name, layer in layers.items():
            values, scales = quantise(layer.weight, widths[name])
            yield f"{name}.weight_packed", values.view(torch.int32)
            yield f"{name}.weight_scale", scales
            yield f"{name}.weight_shape", torch.tensor(list(layer.weight.shape))
            for w, v, s in zip(layer.weight.detach().split(4096), values.split(4096), scales.split(4096), strict=True):
                squares[0] += float((unpacked(v, s, widths[name]) - w.float()).pow(2).sum())
                squares[1] += float(w.float().pow(2).sum())
            done += layer.weight.numel()
            progress.show(f"quantised {count(done)} of {count(total)} parameters")

    write_shards(out, tensors(), before)
    progress.clear()
    copy_tokenizer(source, out)
    write_config(out, config, "bfloat16", stored.describe(widths, left_out))
    for name in ("generation_config.json", "record.json"):  # settings of sampling; a base model stays one
        if (source / name).is_file():
            with publish(out / name) as temporary:
                temporary.write_bytes((source / name).read_bytes())
    after = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    error = (squares[0] / max(squares[1], 1e-30)) ** 0.5
    smaller = f"{amount(before, 'B')} to {amount(after, 'B')}"
    say(f"{out}: {count(total)} parameters in {bits} bits; {smaller}; relative error of the weights {error:.4f}")
    return {"out": str(out), "bits": bits, "bytes_before": before, "bytes_after": after, "weight_error": error}
