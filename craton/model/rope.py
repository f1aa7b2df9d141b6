"""Rotary position embedding (arXiv 2104.09864): angles, and the published ways to stretch them over a longer
context."""

import math
from typing import Any

import torch
from torch import Tensor

from craton.model.plain import via_double


def frequencies(dim: int, theta: float, scaling: dict[str, Any] | None = None) -> tuple[Tensor, float]:
    """Radians a position of each pair, (dim / 2,) fp32, and the factor on cos and sin.

    scaling, with the published keys: "linear" (arXiv 2306.15595), "llama3" (arXiv 2407.21783, published code) or "yarn"
    (arXiv 2309.00071).
    """
    base = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if scaling is None:
        return base, 1.0
    if scaling["rope_type"] == "linear":
        return base / float(scaling["factor"]), 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(base, scaling), 1.0
    assert scaling["rope_type"] == "yarn"
    return _yarn(base, dim, theta, scaling)


def _llama3(base: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Slow pairs are stretched, quick ones kept, those between mixed."""
    factor, original = float(scaling["factor"]), scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / base
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    mixed = (1 - smooth) * base / factor + smooth * base
    slow, quick = wavelength > original / low, wavelength < original / high
    return torch.where(slow, base / factor, torch.where(quick, base, mixed))


def _yarn(base: Tensor, dim: int, theta: float, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    factor, original = float(scaling["factor"]), scaling["original_max_position_embeddings"]

    def turning(rotations: float) -> float:  # the dimension that turns this often over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = turning(scaling.get("beta_fast") or 32), turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = yarn_mscale(factor, 1.0)
        if mscale and everywhere:
            attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, everywhere)
    return base / factor * ramp + base * (1 - ramp), float(attention)


def yarn_mscale(factor: float, weight: float) -> float:
    """How much sharper attention must be over a context stretched by factor. arXiv 2309.00071 section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def table(positions: Tensor, dim: int, theta: float, scaling: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, each (time, dim / 2), fp32."""
    radians, factor = frequencies(dim, theta, scaling)
    angle = positions.float()[:, None] * radians.to(positions.device)[None, :]
    return via_double(torch.cos, angle) * factor, via_double(torch.sin, angle) * factor
