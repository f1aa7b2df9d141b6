"""`craton export`: a model folder in another program's format."""

from pathlib import Path
from typing import Any

import torch

from craton.base import UserError, amount, say
from craton.model.decoder import Decoder, Experts, Head, Linear
from craton.model.packed import PackedEmbedding, PackedLinear, replace
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


@torch.no_grad()
def write_out(network: Decoder) -> None:
    """Packed weights as plain ones in fp32, where they are not only read."""
    for name, module in list(network.named_modules()):
        if not isinstance(module, PackedLinear | PackedEmbedding):
            continue
        weight = module.packed.take(torch.arange(module.packed.rows))
        if isinstance(module, PackedEmbedding):
            rows, size = weight.shape
            replace(network, name, torch.nn.Embedding(rows, size, _weight=weight))
            continue
        layer = Head(network.config) if name == "lm_head" else Linear(weight.shape[1], weight.shape[0])
        layer.weight = torch.nn.Parameter(weight)
        if module.bias is not None:
            layer.bias = torch.nn.Parameter(module.bias)  # type: ignore[arg-type]
        replace(network, name, layer)
    for module in network.modules():
        if isinstance(module, Experts):
            packed: Any = module.packed
            for own, matrices in packed.items():
                each = [m.take(torch.arange(m.rows)) for m in matrices]
                setattr(module, own, torch.nn.Parameter(torch.stack(each)))
            module.packed = torch.nn.ModuleDict()
    if network.config.tie_word_embeddings:
        network.tie()
