"""The folder that was written, held against the network that was trained: what is saved must be what was learned."""

import math
from pathlib import Path
from typing import Any

import torch

from craton.adapt.opened import Opened
from craton.adapt.store import open_base
from craton.base import UserError
from craton.engine.model import load_model
from craton.model import modes
from craton.model.decoder import Decoder
from craton.model.packed import holds_packed
from craton.weights import adapter
from craton.weights.tensorfile import read_tensors

TOLERANCE = 2e-3  # of logits, relative to their spread
_TOKENS = 64


@torch.no_grad()
def check(out: Path, opened: Opened, network: Any) -> dict[str, Any]:
    """changed: whether the network differs from what it was. UserError where the folder gives other logits than the
    network, or where an adapter that is merged does."""
    if not isinstance(network, Decoder):
        return {}
    text, device = "The quick brown fox; def f(x): return 12 * x", network.model.norm.weight.device
    ids = torch.tensor([opened.renderer.tokenizer.encode(text)[:_TOKENS]], device=device)
    wanted = network(ids)
    spread = float(wanted.std())
    gaps: dict[str, float] = {}
    if opened.recipe.tune.lora:
        with modes.without_adapters():
            changed = not torch.equal(network(ids), wanted)
        if not changed:
            return {"changed": False}
        stored, live = read_tensors(out / adapter.WEIGHTS), adapter.published(dict(adapter.lora_tensors(network)))
        same = stored.keys() == live.keys() and all(torch.equal(stored[n], t.cpu()) for n, t in live.items())
        gaps["stored"] = 0.0 if same else math.inf
        if not holds_packed(network):  # those cannot hold the sum
            reloaded = open_base(opened.given.model).network
            adapter.merge(reloaded, out)
            gaps["merged"] = _gap(reloaded.to(device)(ids), wanted, spread)
    else:
        changed = not torch.equal(open_base(opened.given.model).network.to(device)(ids), wanted)
        gaps["reloaded"] = _gap(load_model(str(out)).network.float().to(device)(ids), wanted, spread)
    for what, gap in gaps.items():
        if gap > TOLERANCE:
            raise UserError(
                f"{out}: its logits, {what}, differ from those that were trained by {gap:.2g} of their spread"
            )
    return {"changed": changed, "logit_gap": gaps}


def _gap(a: torch.Tensor, b: torch.Tensor, spread: float) -> float:
    return float((a - b).abs().max()) / max(spread, 1e-9)
