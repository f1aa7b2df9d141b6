"""Text encoders of BERT's kind to and from their published folders (sentence-transformers' layout, and plain
transformers')."""

import dataclasses
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from craton.base import UserError, digest, read_json, say, sha256
from craton.model.encoder import Encoder, EncoderConfig, layout
from craton.weights.folder import Stored
from craton.weights.tensorfile import write_tensors

_FAMILIES = {"bert": 0, "roberta": 1, "xlm-roberta": 1}  # whether positions begin behind the padding's number
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
# What published encoders want before a question and before a passage, where their folders do not say it.
_PREFIXES = {"e5": ("query: ", "passage: "), "bge": ("Represent this sentence for searching relevant passages: ", "")}


_NAMED = {"e5": r"\be5-(small|base|large)", "bge": r"\bbge-(small|base|large)-en"}


@dataclass(frozen=True)
class EncoderSettings:
    """What is done around the network."""

    pooling: str = "mean"  # mean, cls, max or last
    normalise: bool = True
    max_length: int = 512  # tokens of a text; the rest is left out
    query_prefix: str = ""
    passage_prefix: str = ""


def read_encoder(folder: Path) -> tuple[Encoder, tokenizers.Tokenizer, EncoderSettings]:
    """UserError naming what is missing, damaged or of another kind."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no encoder there (config.json is missing); give a published encoder's folder")
    raw = read_json(path)
    config = _config(raw, path)
    stored = Stored(folder)
    network = Encoder(config).eval().requires_grad_(False)
    _fill(network, stored, folder)
    return network, _tokenizer(folder), _settings(folder, raw, config)


def _config(raw: Any, path: Path) -> EncoderConfig:
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in _FAMILIES:
        raise UserError(
            f"{path}: model_type {kind!r} is no encoder that is read here; those are {', '.join(_FAMILIES)}"
        )
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{path}: position_embedding_type {raw['position_embedding_type']!r} is not supported")
    act = raw.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        raise UserError(f"{path}: hidden_act {act!r} is not supported; {', '.join(_ACTIVATIONS)} are")
    names = {f.name for f in dataclasses.fields(EncoderConfig)} & raw.keys()
    given = {name: raw[name] for name in names}
    if _FAMILIES[kind]:
        given["first_position"] = raw.get("pad_token_id", 1) + 1
    scores = any("SequenceClassification" in str(a) for a in raw.get("architectures") or [])
    given["labels"] = len(raw.get("id2label") or {0: 0}) if scores else 0
    try:
        return EncoderConfig(**given)
    except TypeError as error:
        raise UserError(f"{path}: {error}".replace("EncoderConfig.__init__() ", "")) from None


def _fill(network: Encoder, stored: Stored, folder: Path) -> None:
    """Every parameter from the folder; a prefix such as `bert.` before the names is passed over."""
    prefix = _prefix(stored)
    for name, parameter in network.state_dict().items():
        for published, part in layout(name, parameter):
            wanted = published if published.startswith("classifier") else prefix + published
            if stored.shapes.get(wanted) != tuple(part.shape):
                found = stored.shapes.get(wanted, "missing")
                raise UserError(f"{folder}: tensor {wanted} is {found}, config.json asks for {tuple(part.shape)}")
            tensor = stored.get(wanted).float()
            if not tensor.isfinite().all():
                raise UserError(f"{folder}: tensor {wanted} holds NaN or infinity; the file is damaged")
            part.copy_(tensor)
    stored.progress.clear()


def _prefix(stored: Stored) -> str:
    """What stands before the names of a folder's tensors, such as `bert.`."""
    mark = "embeddings.word_embeddings"
    return min((name.partition(mark)[0] for name in stored.files if mark in name), default="")


def _tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: tokenizer.json is missing; encoders need it")
    try:
        made = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise UserError(f"{path}: not a tokenizer ({error})") from None
    made.no_padding()
    made.no_truncation()
    return made


def _settings(folder: Path, raw: dict[str, Any], config: EncoderConfig) -> EncoderSettings:
    """As modules.json and its parts say; a plain folder takes the mean."""
    given: dict[str, Any] = {"max_length": config.max_length}
    modules = folder / "modules.json"
    if modules.is_file():
        kinds = {str(m.get("type", "")).rpartition(".")[2]: folder / str(m.get("path", "")) for m in read_json(modules)}
        if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
            raise UserError(f"{modules}: modules of type {min(unknown)} are not supported")
        given["normalise"] = "Normalize" in kinds
        if "Pooling" in kinds:
            given["pooling"] = _pooling(kinds["Pooling"] / "config.json")
    elif not config.labels:
        say(f"{folder}: no modules.json; the mean of all tokens, normalised, is taken for a text's vector")
    length = folder / "sentence_bert_config.json"
    if length.is_file() and isinstance(limit := read_json(length).get("max_seq_length"), int):
        given["max_length"] = min(limit, config.max_length)
    prompts: dict[str, str] = {}
    if (path := folder / "config_sentence_transformers.json").is_file():
        prompts = read_json(path).get("prompts") or {}
    given["query_prefix"] = prompts.get("query", "")
    given["passage_prefix"] = next((prompts[k] for k in ("passage", "document", "corpus") if k in prompts), "")
    name = f"{raw.get('_name_or_path', '')} {folder.resolve().name}".lower().replace("_", "-")
    for family, (query, passage) in _PREFIXES.items():
        if not any(prompts.values()) and re.search(_NAMED[family], name) and not config.labels:
            given |= {"query_prefix": query, "passage_prefix": passage}
            before = f"{query!r} goes before questions, {passage!r} before passages"
            say(f"{folder}: an {family} encoder by its name: {before}")
    return EncoderSettings(**given)


def _pooling(path: Path) -> str:
    said = read_json(path)
    if isinstance(mode := said.get("pooling_mode"), str):
        on = [mode]
    else:
        flags = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}
        on = [how for how, flag in flags.items() if said.get(f"pooling_mode_{flag}")]
        on += [k for k, v in said.items() if v is True and k in ("pooling_mode_mean_sqrt_len_tokens",)]
    if len(on) != 1 or on[0] not in ("cls", "mean", "max", "last"):
        raise UserError(f"{path}: pooling {', '.join(on) or 'of no kind'} is not supported; cls, mean, max or last are")
    return on[0]


def write_encoder(network: Encoder, source: Path, out: Path) -> None:
    """A folder like the one that the network came from, with its weights as they are now."""
    kept = [p for p in source.rglob("*") if p.is_file() and p.suffix in (".json", ".txt", ".model")]
    for path in kept:
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    own = _prefix(Stored(source))
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in network.state_dict().items():
            for published, part in layout(name, parameter):
                tensors[published if published.startswith("classifier") else own + published] = part.clone()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    write_tensors(out / "model.safetensors", tensors)


def encoder_hash(folder: Path) -> str:
    """What tells an encoder from others: its weights, tokenizer and settings."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors"))
    return digest([[str(p.relative_to(folder)), sha256(p)] for p in files])
