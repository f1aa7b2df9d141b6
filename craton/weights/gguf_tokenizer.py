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

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = _TEKKEN.replace(r"+|[^", rf"+{_CONTRACTIONS}?|[^", 1).replace(
    r"*|\p{N}|", rf"*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|", 1
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CJK_AND_MORE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters as DeepSeek's first models list them.
_CASED = (
    "A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-"
    "\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57"
    "\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-"
    "\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-"
    "\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-"
    "\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-"
    "\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK = (r"[\r\n]", rf"\s?[{_CASED}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+")
_WORDS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_PUNCTUATION_FIRST = (r"[\p{P}$+<=>^~|`]+", formats.GPT2_PATTERN)


def _all_as(patterns: tuple[str, ...], names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names.split(), patterns)


# GGUF's names of pre-tokenizers: what text is cut by, one after the other.
_PATTERNS: dict[str, tuple[str, ...]] = {
    **_all_as((_LLAMA3,), "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe"),
    **_all_as((_LLAMA3,), "chatglm-bpe glm4 glm5"),
    **_all_as((_QWEN2,), "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2"),
    "qwen35": (_QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}"),),
    **_all_as(
        (formats.GPT2_PATTERN,), "gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion exaone4"
    ),
    **_all_as((formats.GPT2_PATTERN,), "granite-docling jina-es jina-de jina-v2-es jina-v2-de"),
    **_all_as(
        (r"\p{N}", formats.GPT2_PATTERN), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"
    ),
    "tekken": (_TEKKEN,),
    **_all_as((_GPT4O,), "gpt-4o llama4 kanana2 minimax-m2"),
    **_all_as((r"\p{N}{1,3}", _CJK, _DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    "deepseek-llm": (*_DEEPSEEK, r"\s+$", _CJK_AND_MORE, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_AND_MORE, r"\p{N}"),
    "falcon": (*_PUNCTUATION_FIRST, r"[0-9][0-9][0-9]"),
    **_all_as((_WORDS,), "bloom poro-chat gpt3-finnish"),
    "viking": (_WORDS, r"\p{N}"),
    "bailingmoe": (_QWEN2.replace(r"[\r\n]+|\s+(", r"[\r\n]|\s+("),),
    "seed-coder": (_QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),),
    "default": (r"[\p{P}$+<=>^~|]+", formats.GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# Words that are tokens are taken whole, whatever merges would make of them.
_WHOLE_WORDS = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 glm4 glm5 tekken".split()
_BEGIN = [name for name in _WHOLE_WORDS if not name.startswith("glm")]  # with BOS, if files are silent


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
    begins = kind == "llama" or fields.get("tokenizer.ggml.pre") in _BEGIN
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
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS))
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
    alike = [name for name, known in _PATTERNS.items() if known == tuple(patterns)]
    whole = bool(state["model"].get("ignore_merges"))
    pre = next((name for name in alike if (name in _WHOLE_WORDS) == whole), next(iter(alike), None))
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
