"""A model folder opened for use: network and tokenizer together."""

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from craton.base import UserError, digest, sha256
from craton.engine.engine import Engine
from craton.engine.request import Completion, Sampling
from craton.engine.runner import fits_device
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.fused import fits
from craton.model.packed import PackedMatrix, holds_packed
from craton.text.tokenizer import Tokenizer
from craton.weights.adapter import attach, merge
from craton.weights.folder import check_fit, load_network, read_config


class Model:
    """`network(ids)` gives logits; `generate(prompt)` gives text; `engine` serves many requests at once."""

    def __init__(self, network: Decoder, tokenizer: Tokenizer, engine_options: dict[str, Any] | None = None):
        self.network = network
        self.tokenizer = tokenizer
        self.engine_options = engine_options or {}

    @cached_property
    def engine(self) -> Engine:
        """Made at first use, from the weights as they are then."""
        return Engine(self.network, self.tokenizer, **self.engine_options)

    def complete(self, prompt: str | list[int], sampling: Sampling) -> Completion:
        """One answer. Raises UserError if the prompt does not fit the context."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self.engine.generate([ids], sampling)[0][0]

    def generate_ids(self, prompt: str, max_tokens: int = 256, temperature: float = 1.0, seed: int = 0) -> list[int]:
        """Ids that follow the prompt."""
        return self.complete(prompt, Sampling(max_tokens, temperature, seed=seed)).token_ids

    def generate(self, prompt: str, max_tokens: int = 256, temperature: float = 1.0, seed: int = 0) -> str:
        """Text that follows the prompt, until the end of the document or max_tokens. temperature 0 is greedy.

        Raises UserError if the prompt does not fit the context.
        """
        return self.complete(prompt, Sampling(max_tokens, temperature, seed=seed)).text


def load_model(path: str, device: str | None = "cpu", adapter: str | None = None, **engine_options: Any) -> Model:
    """Open a model folder or a GGUF file. Raises UserError naming what is missing or damaged. device: None takes a GPU
    where there is one and the engine has kernels for the model's steps on it; fp32 weights are computed with in bf16
    there. adapter: a folder with a LoRA adapter, merged into the weights, or beside them where they are packed.
    engine_options: see Engine."""
    folder = single_file(Path(path))
    if folder.suffix == ".gguf":
        from craton.weights import gguf  # its package takes half a second to import

        where = device or _device_for(lambda: gguf.config_of(folder)[0])
        network, tokenizer = gguf.read(folder, where)
    else:
        where = device or _device_for(lambda: read_config(folder))
        network, tokenizer = load_network(folder, where), Tokenizer.open(folder)
    packed = holds_packed(network)
    if where != "cpu" and any(isinstance(m, PackedMatrix) for m in network.modules()):
        raise UserError(
            f"{folder}: packed experts run on a CPU alone; give the unquantised folder for --device {where}"
        )
    if where != "cpu" and (device is None or packed) and network.model.norm.weight.dtype == torch.float32:
        engine_options.setdefault("dtype", torch.bfloat16)
    if adapter is not None and packed:
        attach(network, Path(adapter))  # packed weights cannot hold the sum
    elif adapter is not None:
        merge(network.cpu(), Path(adapter))
    check_fit(network.config, tokenizer, folder)
    network.to(where)
    if where == "cpu" and not fits(network.config):
        network.float()  # modules run in fp32 on a CPU; only the steps in one call read 16-bit weights
    return Model(network, tokenizer, engine_options)


def _device_for(config: Callable[[], ModelConfig]) -> str:
    """A GPU where there is one and it has kernels for the steps of such models."""
    return "cuda" if torch.cuda.is_available() and fits_device(config()) else "cpu"


def single_file(path: Path) -> Path:
    """The GGUF file of a folder that holds one instead of config.json; else the path itself."""
    files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    later = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")  # parts, for all of which the first stands
    files = [f for f in files if not later.search(f.name)]
    if len(files) > 1:
        raise UserError(f"{path}: holds {len(files)} GGUF files; name one, such as {files[0]}")
    return files[0] if files else path


def weights_hash(path: Path) -> str:
    """What tells a model's weights from others: a hash over the files of a folder, or of a GGUF file."""
    own = single_file(path)
    return digest([sha256(f) for f in ([own] if own.is_file() else sorted(own.glob("*.safetensors")))])


def greedy(network: Decoder, prompt: list[int], max_tokens: int) -> list[int]:
    """The likeliest continuation by a network that is being trained, as it is now."""
    engine = Engine(network, cache_bytes=64 << 20)
    with torch.inference_mode():
        return engine.generate([prompt], Sampling(max_tokens, 0.0))[0][0].token_ids
