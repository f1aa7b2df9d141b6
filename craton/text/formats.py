"""Tokenizers that are published in other forms than tokenizer.json, as the same object: SentencePiece models, Mistral's
tekken, GPT-2's two files. The conversions are exact: tests compare thousands of lines with the original libraries.
"""

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from craton.base import UserError, read_json

_TEKKEN = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX]"
).split()
_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_to_unicode() -> dict[int, str]:
    """The printable stand-ins that byte-level BPE uses for bytes (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(c) for b, c in zip(plain + rest, plain + [256 + i for i in range(len(rest))], strict=True)}


def byte_level_text(backend: Backend, *patterns: str) -> None:
    """Text is cut by one pattern after the other, then taken byte by byte; as GPT-2 and most since."""
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, level])
    backend.decoder = decoders.ByteLevel()


def sentencepiece_text(backend: Backend, space_first: bool, steps: list[Any], once: bool = False) -> None:
    """Spaces are letters; a space comes before the text where that is wanted. steps: that come before. once: not again
    after every added token (transformers' `legacy: false`)."""
    first = [normalizers.Prepend(" ")] if space_first and not once else []
    backend.normalizer = normalizers.Sequence([*steps, *first, normalizers.Replace(" ", "\u2581")])
    if space_first and once:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tail: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(tail + ([decoders.Strip(" ", 1, 0)] if space_first else []))


def begin_with(backend: Backend, token: str, i: int) -> None:
    """A special token before every text."""
    one, two = f"{token} $A", f"{token} $A {token} $B:1"
    backend.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=[(token, i)])


def sentencepiece_bpe(vocab: dict[str, int], scores: dict[str, float], unk: str | None, fallback: bool) -> Any:
    """SentencePiece's BPE from the scores of its ordinary pieces: two pieces merge if they make a third."""
    merges = [
        (-score, whole[:i], whole[i:])
        for whole, score in scores.items()
        for i in range(1, len(whole))
        if whole[:i] in scores and whole[i:] in scores
    ]
    merges.sort(key=lambda m: (m[0], -len(m[1]), -len(m[2])))  # equal scores: the leftmost grows first
    return models.BPE(vocab, [(a, b) for _, a, b in merges], unk_token=unk, fuse_unk=True, byte_fallback=fallback)


def from_sentencepiece(path: Path) -> tuple[Backend, dict[str, Any]]:
    """A `.model` file, BPE or unigram -> backend and tokenizer_config. UserError if it is damaged."""
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2
    proto = schema.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        kind = proto.trainer_spec.model_type
        if not proto.pieces or kind not in (1, 2):
            raise ValueError("neither BPE nor unigram")
    except Exception as error:  # protobuf's own exceptions
        raise UserError(f"{path}: not a SentencePiece model ({str(error).splitlines()[0]})") from None
    spec, pieces = proto.normalizer_spec, proto.pieces
    normal, unknown, control, user, _, byte = 1, 2, 3, 4, 5, 6
    unk = next((i for i, p in enumerate(pieces) if p.type == unknown), 0)
    fallback = any(p.type == byte for p in pieces)
    if kind == 1:
        model: Any = models.Unigram([(p.piece, p.score) for p in pieces], unk, fallback)
    else:
        vocab = {p.piece: i for i, p in enumerate(pieces)}
        scores = {p.piece: p.score for p in pieces if p.type == normal}
        model = sentencepiece_bpe(vocab, scores, pieces[unk].piece, fallback)
    backend = Backend(model)
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    once = read_object(path.with_name("tokenizer_config.json")).get("legacy") is False
    sentencepiece_text(backend, spec.add_dummy_prefix, steps, once)
    special = [p.piece for p in pieces if p.type in (control, unknown)]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == user])
    bos, eos = (i if 0 <= i < len(pieces) else None for i in (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id))
    config: dict[str, Any] = {**_CONFIG}
    if bos is not None:
        name = pieces[bos].piece
        config["bos_token"] = name
        begin_with(backend, name, bos)
    if eos is not None:
        config["eos_token"] = pieces[eos].piece
    return backend, config


def byte_level(ranks: Iterable[tuple[bytes, int]], pattern: str, special: dict[str, int]) -> Backend:
    """Byte-level BPE from the bytes of each id: two tokens merge if they make a third, the lower id first."""
    table = byte_to_unicode()
    words = dict(ranks)
    merges = [
        (i, words[b[:k]], words[b[k:]], b[:k], b[k:])
        for b, i in words.items()
        if len(b) > 1
        for k in range(1, len(b))
        if b[:k] in words and b[k:] in words
    ]
    merges.sort()
    text = {b: "".join(table[c] for c in b) for b in words}
    vocab = {text[b]: i for b, i in words.items()} | special
    backend = Backend(models.BPE(vocab, [(text[a], text[b]) for *_, a, b in merges], ignore_merges=True))
    byte_level_text(backend, pattern)
    names = sorted(special, key=special.__getitem__)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in names])
    return backend


def from_tekken(path: Path) -> tuple[Backend, dict[str, Any]]:
    """Mistral's `tekken.json`: the ranks come after the special tokens."""
    raw = read_json(path)
    try:
        config = raw["config"]
        first, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        named = {t["token_str"]: int(t["rank"]) for t in raw.get("special_tokens") or []}
        if not named:  # the first published version leaves them out
            named = {t: i for i, t in enumerate(_TEKKEN)}
        named |= {f"<SPECIAL_{i}>": i for i in range(first) if i not in named.values()}
        ranks = [(base64.b64decode(t["token_bytes"]), first + int(t["rank"])) for t in raw["vocab"][: size - first]]
        backend = byte_level(ranks, config["pattern"], named)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a tekken tokenizer ({error})") from None
    begin_with(backend, "<s>", named["<s>"])
    return backend, {**_CONFIG, "bos_token": "<s>", "eos_token": "</s>"}


def from_gpt2(vocab: Path, merges: Path) -> tuple[Backend, dict[str, Any]]:
    """`vocab.json` and `merges.txt` (first published as encoder.json and vocab.bpe)."""
    words = read_json(vocab)
    try:
        pairs = [
            tuple(line.split(" "))
            for line in merges.read_text(encoding="utf-8").split("\n")
            if line and not line.startswith("#version")
        ]
        backend = Backend(models.BPE(words, [(a, b) for a, b in pairs]))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{merges}: not the merges of {vocab.name} ({str(error).splitlines()[0]})") from None
    byte_level_text(backend, GPT2_PATTERN)
    end = "<|endoftext|>"
    backend.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    return backend, {"tokenizer_class": "GPT2TokenizerFast", **ends, "clean_up_tokenization_spaces": False}


def find(folder: Path) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer of a folder that has no tokenizer.json. UserError if there is none of a known form."""
    for name in ("tekken.json", "tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            return (from_tekken if name == "tekken.json" else from_sentencepiece)(folder / name)
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return from_gpt2(folder / vocab, folder / merges)
    raise UserError(f"{folder}: no tokenizer.json, tokenizer.model, tekken.json or vocab.json; give a folder with one")


def add_tokens(backend: Backend, folder: Path, config: dict[str, Any]) -> None:
    """The tokens that a folder adds beside its tokenizer file: `added_tokens.json`, and `added_tokens_decoder` of
    config, tokenizer_config.json's. UserError for an id that cannot be."""
    tokens = {int(i): AddedToken(t, normalized=False) for t, i in read_object(folder / "added_tokens.json").items()}
    for i, given in (config.get("added_tokens_decoder") or {}).items():
        flags = {k: v for k, v in given.items() if k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokens[int(i)] = AddedToken(given["content"], **flags)
    named_ones = [
        *(config.get("additional_special_tokens") or ()),
        *(v for k, v in config.items() if k.endswith("_token")),
    ]
    special = {t.get("content") if isinstance(t, dict) else t for t in named_ones}
    known = backend.get_added_tokens_decoder()
    for i, token in sorted(tokens.items()):
        if i in known:
            continue
        own = backend.token_to_id(token.content)
        size = backend.get_vocab_size(with_added_tokens=True)
        if own not in (None, i) or (own is None and i < size):
            problem = f"added token {token.content!r} has the id {i}, which the tokenizer has for another"
            raise UserError(f"{folder}: {problem}; correct added_tokens.json")
        while own is None and size < i:  # ids in between that nobody uses
            backend.add_special_tokens([AddedToken(f"<|unused_{size}|>", normalized=False, special=True)])
            size += 1
        add = backend.add_special_tokens if token.special or token.content in special else backend.add_tokens
        add([token])


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} if there is no file or something else in it."""
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
