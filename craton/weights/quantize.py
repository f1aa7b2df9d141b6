"""Weights to 8 or 4 bits: a value is a whole number times the scale of its group of 32.

The values are those of GGUF's Q8_0 and Q4_0; the scales of 4 bits are better chosen. Q4_0 maps the largest magnitude
to -8; here the scale is the one of a few dozen that leaves the least squared error, then fitted by least squares.
"""

import torch
from torch import Tensor, nn

from craton.model.decoder import Decoder, Linear
from craton.model.serving import GROUP, PackedLinear, can_pack

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
        name: layer for name, layer in network.named_modules()
        if type(layer) is Linear and can_pack(*layer.weight.shape) and not name.endswith("kv_b_proj")
    }  # fmt: skip


def pack_network(network: Decoder, bits: int, head_bits: int | None = None) -> Decoder:
    """Replaces the projections by packed ones, in place. head_bits: of the head, 8 where left out."""
    for name, layer in packable(network).items():
        width = (head_bits or 8) if name == "lm_head" else bits
        bias = None if layer.bias is None else layer.bias.detach()
        replace(network, name, PackedLinear(*quantise(layer.weight, width), width, bias))
    return network


def replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)
