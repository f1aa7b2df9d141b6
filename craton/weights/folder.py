"""Model folders in the Hugging Face layout: networks to disk and back. Weights are safetensors only."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craton.base import Progress, UserError, amount, publish, read_json, say, write_json
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.text.tokenizer import Tokenizer
from craton.weights import deepseek, gemma, gpt_oss, llama, mistral, olmo2, qwen2, qwen3, qwen3_moe, smollm3, stored
from craton.weights.family import Family
from craton.weights.tensorfile import open_tensors, read_tensors, write_tensors

_KNOWN = (
    *(llama.FAMILY, mistral.MISTRAL, mistral.MIXTRAL, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY),
    *(deepseek.V2, deepseek.V3, gemma.GEMMA2, gemma.GEMMA3, olmo2.FAMILY, smollm3.FAMILY, gpt_oss.FAMILY),
)
FAMILIES: dict[str, Family] = {f.model_type: f for f in _KNOWN}
WITH_PICTURES = {"gemma3": "gemma3_text", "mistral3": "mistral"}  # their text parts are read
SHARD_BYTES = 5 << 30


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder. Raises UserError naming the key that is missing, wrong or unsupported."""
    return _read_config(folder)[0]


def _read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    path = folder / "config.json"
    if folder.suffix == ".gguf" or (not path.is_file() and any(folder.glob("*.gguf"))):
        problem = "a GGUF file, which inspect, generate, chat and serve take; this needs the folder it was made from"
        raise UserError(f"{folder}: {problem}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if path.is_file() and path.stat().st_size > 10 << 20:
        raise UserError(f"{path}: {amount(path.stat().st_size, 'B')} is no model configuration")
    raw = read_json(path)
    if isinstance(raw, dict) and raw.get("model_type") in WITH_PICTURES and isinstance(raw.get("text_config"), dict):
        outer = ("quantization_config", "eos_token_id", "bos_token_id", "tie_word_embeddings")
        shared = {k: raw[k] for k in outer if k in raw}
        raw = {**shared, **raw["text_config"], "model_type": WITH_PICTURES[raw["model_type"]], "_text_part": True}
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        return _with_ends(FAMILIES[kind].read(raw), folder), raw
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: a key is mistyped ({error})") from None
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}") from None


def _with_ends(config: ModelConfig, folder: Path) -> ModelConfig:
    """With the end tokens that generation_config.json adds: chat models often name the end of a turn only there."""
    path = folder / "generation_config.json"
    more = read_json(path).get("eos_token_id") if path.is_file() else None
    more = [more] if isinstance(more, int) else more or []
    if not isinstance(more, list) or not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in more):
        raise UserError(f"{path}: eos_token_id is {more!r}, which are not ids of this vocabulary")
    ends = tuple(dict.fromkeys([*config.eos_token_ids, *more]))
    if set(ends) == set(config.eos_token_ids):
        return config
    return dataclasses.replace(config, eos_token_id=ends if len(ends) > 1 else ends[0])


def config_json(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The published form of a configuration. UserError if its family cannot say it."""
    try:
        return {**FAMILIES[config.model_type].write(config), "torch_dtype": dtype}
    except ValueError as error:
        raise UserError(str(error)) from None


def write_config(
    folder: Path, config: ModelConfig, dtype: str = "float32", quantization: dict[str, Any] | None = None
) -> None:
    extra = {"quantization_config": quantization} if quantization else {}
    write_json(folder / "config.json", {**config_json(config, dtype), **extra})
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})


# ---- networks ---------------------------------------------------------------------------------------------------


def only_pretrained(folder: Path) -> bool:
    """Whether the folder's record says that the model has seen no conversation."""
    record = folder / "record.json"
    found = read_json(record) if record.is_file() else None
    return isinstance(found, dict) and found.get("objective") == "pretraining"


def published(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A decoder's tensors as a folder stores them, under their published names: a tied head once, as the embedding."""
    pieces = FAMILIES[config.model_type].pieces
    kept = {n: t for n, t in tensors.items() if not (config.tie_word_embeddings and n == "lm_head.weight")}
    return {ext: view.reshape(shape) for name, t in kept.items() for ext, view, shape in pieces(name, t)}


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], total: int) -> None:
    """Tensors as one safetensors file, or as several of at most 5 GiB with an index; in the order they come."""
    shards: list[list[str]] = []
    buffer: dict[str, Tensor] = {}
    size = written = 0
    progress = Progress()

    def flush() -> None:
        nonlocal buffer, size
        if buffer:
            write_tensors(folder / f"model-{len(shards) + 1:05}.safetensors", buffer)
            shards.append(list(buffer))
            buffer, size = {}, 0

    for name, tensor in tensors:
        if size and size + tensor.nbytes > SHARD_BYTES:
            flush()
        buffer[name] = tensor
        size, written = size + tensor.nbytes, written + tensor.nbytes
        progress.show(f"writing {amount(written, 'B')} of about {amount(total, 'B')}")
    flush()
    progress.clear()
    if len(shards) == 1:
        (folder / "model-00001.safetensors").replace(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"model-{i + 1:05}.safetensors").replace(folder / final)
        weight_map |= dict.fromkeys(names, final)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": written}, "weight_map": weight_map})


def write_network(folder: Path, network: Decoder, tokenizer: Path | None = None) -> None:
    """A folder that holds the network, under its family's published names, and the tokenizer files of another
    folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published(network.config, network.state_dict())
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_shards(folder, iter(tensors.items()), sum(t.nbytes for t in tensors.values()))
    write_config(folder, network.config, dtype)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)


TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json tokenizer.model tekken.json special_tokens_map.json "
    "chat_template.jinja vocab.json merges.txt added_tokens.json spiece.model encoder.json vocab.bpe"
).split()


def copy_tokenizer(source: Path, target: Path) -> None:
    """A folder's tokenizer and templates."""
    templates = (source / "additional_chat_templates").glob("*.jinja")
    for name in (*TOKENIZER_FILES, *(f"{path.parent.name}/{path.name}" for path in templates)):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            with publish(target / name) as temporary:
                temporary.write_bytes((source / name).read_bytes())


class Stored:
    """The tensors of a folder by name, opened file by file as they are asked for."""

    def __init__(self, folder: Path, text_part: bool = False):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise UserError(f"{index}: weight_map is not an object of file names")
            for name in set(weight_map.values()):
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise UserError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
            self.files: dict[str, str] = weight_map
        elif (folder / "model.safetensors").exists():
            with open_tensors(folder / "model.safetensors") as f:
                self.files = dict.fromkeys(f.keys(), "model.safetensors")
        elif found := next((p for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)), None):
            raise UserError(f"{found}: weights in a pickle file; opening one can run code, so only safetensors is read")
        else:
            raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json there")
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(set(self.files.values())):
            with open_tensors(folder / name) as f:
                for key in f.keys():  # noqa: SIM118 (not a dict)
                    if self.files.get(key) == name:
                        self.shapes[key] = tuple(f.get_slice(key).get_shape())
        for key, name in self.files.items():
            if key not in self.shapes:
                raise UserError(f"{folder / name}: tensor {key} is missing, which the index says is there")
        self.stored_name = dict(zip(self.files, self.files, strict=True))
        if text_part:  # of a model that also sees
            text = [n for n in self.files if "vision_tower." not in n and "multi_modal_projector." not in n]
            self.stored_name = {_text_name(n): n for n in text}
            passed = len(self.files) - len(self.stored_name)
            self.files = {ours: self.files[n] for ours, n in self.stored_name.items()}
            self.shapes = {ours: self.shapes[n] for ours, n in self.stored_name.items()}
            say(f"{folder}: the text part alone; {passed} tensors for pictures are passed over")
        self.loaded: dict[str, dict[str, Tensor]] = {}
        self.progress, self.seen = Progress(), 0

    def get(self, name: str) -> Tensor:
        """Each tensor is given once; a file's memory goes with its last tensor."""
        file = self.files[name]
        if file not in self.loaded:
            self.loaded[file] = read_tensors(self.folder / file)
        tensor = self.loaded[file].pop(self.stored_name[name])
        self.seen += tensor.nbytes
        self.progress.show(f"reading {self.folder}: {amount(self.seen, 'B')}")
        return tensor


def _text_name(name: str) -> str:
    """A text tensor's name without what wraps the text part; its layout differs between versions of transformers."""
    name = name.removeprefix("language_model.")
    return "model." + name.removeprefix("model.language_model.") if name.startswith("model.language_model.") else name


def load_network(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """The network of a folder with its weights, in evaluation mode. dtype None keeps the stored one."""
    config, raw = _read_config(folder)
    tensors = Stored(folder, bool(raw.get("_text_part")))
    if config.tie_word_embeddings and _has_own_head(tensors):
        say(f"{folder}: tie_word_embeddings is true, but a head of other values is stored, and used")
        config = dataclasses.replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        network = Decoder(config)
    scheme = stored.scheme(raw.get("quantization_config"), folder / "config.json")
    if scheme.kind == "packed":
        stored.put_packed(network, tensors, device)
    names = stored.prepare(scheme, network, tensors.shapes)
    _check(network, names, folder)
    load_into(network, lambda name: stored.get(scheme, tensors, name), folder)
    tensors.progress.clear()
    return network.to(device=device, dtype=dtype).eval()


def _expected(network: Decoder) -> Iterator[tuple[str, Tensor, list[tuple[str, Tensor, tuple[int, ...]]]]]:
    """Each of the network's stored tensors with the pieces of the folder that make it."""
    pieces = FAMILIES[network.config.model_type].pieces
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not (network.config.tie_word_embeddings and name == "lm_head.weight"):
            yield name, tensor, list(pieces(name, tensor.detach()))


def _has_own_head(tensors: Stored) -> bool:
    """Whether a head is stored beside an embedding of other values."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if tensors.shapes.get(head) is None or tensors.shapes.get(head) != tensors.shapes.get(embedding):
        return False
    read = []
    for name in (head, embedding):
        with open_tensors(tensors.folder / tensors.files[name]) as f:
            read.append(f.get_tensor(tensors.stored_name[name]))
    return not torch.equal(*read)


def _check(network: Decoder, shapes: dict[str, tuple[int, ...]], where: Path) -> None:
    """UserError names a missing, surplus or misshapen tensor, before any weight is read."""
    config, surplus = network.config, set(shapes)
    for _, _, parts in _expected(network):
        for ext, _, shape in parts:
            if ext not in shapes:
                raise UserError(f"{where}: tensor {ext} is missing")
            if shapes[ext] != shape:
                raise UserError(f"{where}: tensor {ext} has shape {shapes[ext]}, config.json says {shape}")
            surplus.discard(ext)
    tail = tuple(f"model.layers.{i}." for i in range(config.num_hidden_layers, config.num_hidden_layers + 4))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    passed = {n for n in surplus if n.endswith("rotary_emb.inv_freq") or n in tied}
    extra = {n for n in surplus if config.model_type == "deepseek_v3" and n.startswith(tail)}
    if extra:
        say(f"{where}: {len(extra)} tensors of the modules that predict several tokens are passed over")
    if surplus := surplus - passed - extra:
        raise UserError(f"{where}: unknown tensor {min(surplus)}; is this the model that config.json describes?")


def load_into(network: Decoder, get: Callable[[str], Tensor], where: Path) -> None:
    """Put tensors into a network on the meta device; get(name) gives a published tensor. UserError for NaN or
    infinity."""
    made: dict[str, Tensor] = {}
    for name, tensor, parts in list(_expected(network)):
        first = get(parts[0][0])
        if len(parts) == 1 and parts[0][2] == tuple(tensor.shape) and parts[0][1].is_contiguous():
            whole = first
        else:
            whole = torch.empty(tensor.shape, dtype=first.dtype)
            views = FAMILIES[network.config.model_type].pieces(name, whole)
            for i, (ext, view, _) in enumerate(views):
                view.copy_((first if i == 0 else get(ext)).view(view.shape))
        if whole.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            kind = str(whole.dtype).removeprefix("torch.")
            raise UserError(f"{where}: tensor {name} is stored as {kind}; float32, bfloat16 and float16 are read")
        # One sum is finite only if all values are: half the cost of looking at each.
        if not whole.float().sum().isfinite() and not whole.isfinite().all():
            raise UserError(f"{where}: tensor {name} holds NaN or infinity; the file is damaged")
        made[name] = whole
    if network.config.tie_word_embeddings:
        made["lm_head.weight"] = made["model.embed_tokens.weight"]
    network.load_state_dict(made, assign=True)
    if network.config.tie_word_embeddings:
        network.tie()


def check_fit(config: ModelConfig, tokenizer: Tokenizer, where: Path) -> None:
    """UserError if the tokenizer gives ids that the network has no row for. Tokens that were added behind the
    vocabulary (a picture's place, a pad) may be such: a request that uses one is refused."""
    ordinary = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    if tokenizer.vocab_size > config.vocab_size >= ordinary:
        say(f"{where}: {tokenizer.vocab_size - config.vocab_size} added tokens have no row in the model")
    elif tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids but config.json's vocab_size is "
            f"{config.vocab_size}; use the tokenizer that the model was trained with"
        )
