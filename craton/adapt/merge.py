"""`craton merge`: an adapter and the model it belongs to as one model folder in bf16."""

from pathlib import Path
from typing import Any

import torch

from craton.base import UserError, claim, say
from craton.engine.model import load_model, weights_hash
from craton.text.tokenizer import Tokenizer
from craton.weights import adapter
from craton.weights.export import write_out
from craton.weights.folder import write_network


def merge(folder: Path, out: Path, base: str = "") -> dict[str, Any]:
    """base: instead of the one that the adapter names. UserError where that is not there, or is another one."""
    if not adapter.is_adapter(folder):
        raise UserError(f"{folder}: no adapter there ({adapter.CONFIG} is missing)")
    config = adapter.read_config(folder)
    named = config.get("craton_base") or {}
    path = base or named.get("path") or config.get("base_model_name_or_path") or ""
    if not Path(path).exists():
        raise UserError(f"{folder}: its base {path!r} is not there; name it with --base", field="base")
    if named.get("sha256") and weights_hash(Path(path)) != named["sha256"]:
        if not base:
            problem = f"{path} is not the model that the adapter was trained on (its weights differ)"
            raise UserError(f"{folder}: {problem}; name another with --base", field="base")
        say(f"WARNING  {path}: other weights than the adapter was trained on")
    with claim(out, None, hint="give another --out"):
        model = load_model(path, adapter=named.get("adapter"))
        write_out(model.network)
        changed = adapter.merge(model.network, folder)
        model.network.to(torch.bfloat16)
        write_network(out, model.network)
        tokenizer = Tokenizer.open(folder) if (folder / "tokenizer.json").exists() else model.tokenizer
        tokenizer.save(out)
    say(f"{out}: {changed} layers of {path} changed, in bf16")
    return {"out": str(out), "base": path, "changed_layers": changed}
