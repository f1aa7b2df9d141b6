"""Tokenizers inside GGUF files, both ways."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from craton.base import UserError, say
from craton.model.config import ModelConfig
from craton.text import formats
from craton.text.tokenizer import Tokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT_BY_DIGIT = (r"\p{N}", formats.GPT2_PATTERN)
_PATTERNS: dict[str, tuple[str, ...]] = {  # GGUF's names of pre-tokenizers: what text is cut by, one after the other
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
    "gpt-2": (formats.GPT2_PATTERN,),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGIT_BY_DIGIT
    ),
}


def read_tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    """From a file's settings. UserError for a kind that is not known."""
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{path}: it holds no tokenizer")
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocab = {t: i for i, t in enumerate(tokens)}
    typed = list(zip(tokens, types, strict=True))
    if kind == "gpt2":
        backend = _byte_level(path, fields, vocab)
    elif kind == "llama":
        scores = fields["tokenizer.ggml.scores"]
        known = {t: s for (t, k), s in zip(typed, scores, strict=True) if k == 1}
        unk = next((t for t, k in typed if k == 2), None)
        backend = Backend(formats.sentencepiece_bpe(vocab, known, unk, True))
        formats.sentencepiece_text(backend, fields.get("tokenizer.ggml.add_space_prefix", True), [])
    else:
        raise UserError(f"{path}: tokenizer model {kind!r} is not supported; supported: 'gpt2', 'llama'")
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in typed if k in (2, 3)])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in typed if k == 4])
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name in ("bos", "eos"):
        if (i := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None and i < len(tokens):
            config[f"{name}_token"] = tokens[i]
    begins = kind == "llama" or fields.get("tokenizer.ggml.pre") in ("llama-bpe", "tekken")
    if fields.get("tokenizer.ggml.add_bos_token", begins) and "bos_token" in config:
        formats.begin_with(backend, config["bos_token"], vocab[config["bos_token"]])
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return Tokenizer(backend, config)


def _byte_level(path: Path, fields: dict[str, Any], vocab: dict[str, int]) -> Backend:
    pre = str(fields.get("tokenizer.ggml.pre"))
    own = fields.get("craton.tokenizer.pattern")
    patterns = (own,) if own else _PATTERNS.get(pre)
    if patterns is None:
        raise UserError(f"{path}: pre-tokenizer {pre!r} is not known; known: {', '.join(_PATTERNS)}")
    merges = [tuple(m.split(" ", 1)) for m in fields.get("tokenizer.ggml.merges") or []]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre in ("llama-bpe", "tekken")))
    formats.byte_level_text(backend, *patterns)
    return backend


def write_tokenizer(writer: Any, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Into a GGUFWriter. UserError for a kind that GGUF has no words for."""
    state = json.loads(tokenizer.backend.to_str())
    model, added = state["model"], {t["id"]: t for t in state["added_tokens"]}
    if (kind := model["type"]) != "BPE":
        raise UserError(f"tokenizers of type {kind} are not written as GGUF; byte-level BPE and SentencePiece BPE are")
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [5] * config.vocab_size  # unused
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    for token, i in vocab.items():
        tokens[i], types[i] = token, 1
    for i, token in added.items():
        types[i] = 3 if token["special"] else 4
    if "ByteLevel" in json.dumps(state["pre_tokenizer"]):
        _write_byte_level(writer, state, tokens, types)
    else:
        if model.get("unk_token") is not None:
            types[vocab[model["unk_token"]]] = 2
        _write_sentencepiece(writer, state, tokens, types)
    bos = config.bos_token_id if config.bos_token_id is not None else tokenizer.bos_id
    eos = next(iter(config.eos_token_ids), tokenizer.eos_id)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    first = tokenizer.encode("x")
    writer.add_add_bos_token(tokenizer.bos_id is not None and first[:1] == [tokenizer.bos_id])
    if isinstance(template := tokenizer.config.get("chat_template"), str):
        writer.add_chat_template(template)


def _merges(state: dict[str, Any]) -> list[str]:
    return [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]


def _write_byte_level(writer: Any, state: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    steps = state["pre_tokenizer"].get("pretokenizers") or []
    patterns = [p["pattern"]["Regex"] for p in steps if p["type"] == "Split"]
    own = patterns[0] if len(patterns) == 1 else None
    pre = next((name for name, known in _PATTERNS.items() if known == tuple(patterns)), None)
    if pre is None:
        change = "there, numbers of several digits are cut into other tokens"
        say(f"llama.cpp knows no pre-tokenizer like this model's: written as 'qwen2'; {change}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or "qwen2")
    if pre is None and own:
        writer.add_string("craton.tokenizer.pattern", own)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(_merges(state))


def _write_sentencepiece(writer: Any, state: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    rank = {"".join(m.split(" ", 1)): i for i, m in reversed(list(enumerate(_merges(state))))}
    scores = []
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and types[i] == 1:
            types[i] = 6
        alone = types[i] == 1 and len(token) == 1
        scores.append(-float(rank[token]) if token in rank else -1e6 if alone else 0.0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix("Prepend" in json.dumps(state["normalizer"]))
