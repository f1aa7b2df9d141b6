"""What is trained and the folder that it becomes: all weights of a model, or an adapter beside weights that stay."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from craton.base import UserError, read_json, write_json
from craton.engine.model import Model, load_model, single_file
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.lora import LoraSpec, adapted, put_adapters, write_head_out
from craton.model.packed import holds_packed
from craton.text.tokenizer import Tokenizer
from craton.train.distributed import local
from craton.train.pretrain import Continued as Whole
from craton.train.pretrain import decoder_forwards, decoder_units
from craton.weights import adapter
from craton.weights.folder import published


class Adapter:
    """Low-rank additions to a decoder's layers. network: with its weights, which are kept as they are."""

    weights_file = adapter.WEIGHTS

    def __init__(self, network: Decoder, spec: LoraSpec, tokenizer: Tokenizer, *, seed: int, base: dict[str, Any]):
        self.network, self.spec, self.tokenizer, self.seed, self.base = network, spec, tokenizer, seed, base
        self.first: dict[str, Tensor] = {}

    def build(self) -> Decoder:
        """The network with fresh adapters."""
        if not any(True for _ in adapted(self.network)):
            try:
                put_adapters(self.network, self.spec, self.seed)
            except ValueError as error:
                raise UserError(f"tune.targets: {error}", field="tune.targets") from None
        self.first = {n: p.detach().clone() for n, p in adapter.lora_tensors(self.network)}
        return self.network

    def rows(self, name: str, shape: tuple[int, ...], first: int, count: int) -> Tensor:
        """As drawn, or as it is."""
        if name in self.first:
            return self.first[name][first : first + count]
        kept = local(self.network.get_parameter(name).detach())
        return kept if len(kept) == count else kept[first : first + count]

    def units(self, network: Any) -> list[list[nn.Module]]:
        """As in pretraining."""
        return decoder_units(network)

    def forwards(self, network: Any) -> Iterable[tuple[nn.Module, str]]:
        """As in pretraining."""
        return decoder_forwards(network)

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Under PEFT's names."""
        return adapter.published(tensors)

    def write_rest(self, out: Path) -> None:
        """Configuration of the adapter; tokenizer, with the chat template that was tuned for."""
        adapter.write_config(out, self.network, self.spec, self.base)
        self.tokenizer.save(out)


class Rewarding(nn.Module):
    """A decoder whose head gives one number, read where a text ends; as transformers' sequence classification."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config).model
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, ids: Tensor, size: Tensor) -> Tensor:
        """ids (rows, time), size (rows,) tokens that are no padding -> (rows,) rewards."""
        hidden = self.model(ids)
        return self.score(hidden[torch.arange(len(ids), device=ids.device), size - 1])[:, 0]


class WholeReward(Whole):
    """A reward model: a decoder's weights and a new head of zeros."""

    def build(self) -> Any:
        """The network on the meta device."""
        with torch.device("meta"):
            return Rewarding(self.config)

    def rows(self, name: str, shape: tuple[int, ...], first: int, count: int) -> Tensor:
        """As they were before; the new head is zero, so that no answer is preferred at first."""
        return torch.zeros(count, *shape[1:]) if name == "score.weight" else super().rows(name, shape, first, count)

    def units(self, network: Any) -> list[list[nn.Module]]:
        """Each block."""
        return [[block] for block in network.model.layers]

    def forwards(self, network: Any) -> Iterable[tuple[nn.Module, str]]:
        """None but forward."""
        return ()

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As transformers' *ForSequenceClassification names them."""
        own = {n: t for n, t in tensors.items() if not n.startswith("score.")}
        made = published(dataclasses.replace(self.config, tie_word_embeddings=True), own)
        return made | {n: t for n, t in tensors.items() if n.startswith("score.")}

    def write_rest(self, out: Path) -> None:
        """Configuration of a classifier with one label."""
        super().write_rest(out)
        config = read_json(out / "config.json")
        names = [str(n).replace("ForCausalLM", "ForSequenceClassification") for n in config.get("architectures", [])]
        write_json(out / "config.json", config | {"architectures": names, "num_labels": 1, "problem_type": None})


def open_base(path: str, device: str = "cpu") -> Model:
    """A model to be tuned: a folder, a GGUF file, or MODEL+ADAPTER, whose adapter is merged first. device: where packed
    weights are to be; the others are read on the CPU."""
    name, _, own = (path, "", "") if Path(path).exists() else path.partition("+")
    if not Path(name).exists():
        raise UserError(f"{path}: no such model; MODEL is a folder or a GGUF file")
    model = load_model(name, adapter=own or None)
    if device != "cpu" and holds_packed(model.network):
        model = load_model(name, device, own or None)
    model.network.float()
    write_head_out(model.network)
    return model


def tuned(model: str, out: Path) -> Decoder:
    """The network of a folder that was made of a model: an adapter with its base, or a model."""
    if not adapter.is_adapter(out):
        return open_base(str(out)).network
    network = open_base(model).network
    adapter.attach(network, out)
    return network


def check_whole(model: Model, path: str) -> None:
    """UserError where all weights cannot be trained."""
    if holds_packed(model.network):
        fix = "use --lora, which keeps them, or give the unquantised folder"
        raise UserError(f"{path}: its weights are packed into few bits and cannot all be trained; {fix}")


def base_file(path: str) -> Path:
    """The folder or file that a model lies in."""
    return single_file(Path(path.partition("+")[0] if not Path(path).exists() else path))
