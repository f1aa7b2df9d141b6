"""`craton export`: a model folder in another program's format."""

from pathlib import Path
from typing import Any

from craton.base import UserError, amount, say
from craton.text.tokenizer import Tokenizer
from craton.weights import gguf_write, stored
from craton.weights.folder import Stored, check_fit, load_network, only_pretrained


def export_gguf(folder: Path, path: Path, kind: str) -> dict[str, Any]:
    """UserError if the model is of a kind that GGUF, or this writer, has no words for."""
    if kind not in ("f16", "bf16", "f32"):
        raise UserError(f"--type is {kind!r}; known: f16, bf16, f32")
    if path.suffix != ".gguf":
        raise UserError(f"{path}: give a file name that ends in .gguf")
    if path.exists():
        raise UserError(f"{path}: is there already; give another name, or remove it")
    network, tokenizer = load_network(folder), Tokenizer.open(folder)
    check_fit(network.config, tokenizer, folder)
    if only_pretrained(folder):  # older versions gave every model a template, which this one never learned
        tokenizer.config.pop("chat_template", None)
    tensors = Stored(folder)
    packed = {name: stored.read_packed(tensors, name) for name in stored.packed_names(tensors.files)}
    made = gguf_write.write(path, network, tokenizer, folder.resolve().name, kind, packed)
    say(f"{path}: {made['architecture']}, {amount(made['bytes'], 'B')}")
    return made
