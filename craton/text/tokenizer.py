"""Text to tokens and back: the tokenizer of a model folder, and training one from text.

Training and the general case are the `tokenizers` library's. Byte-level BPE, which is what is trained here, is encoded
by tiktoken with the same merges: the same ids (checked when the tokenizer is opened for bulk work) several times
faster."""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from craton.base import UserError, read_json, read_text, write_json, write_text
from craton.text import formats
from craton.text.template import ChatTemplate

# Llama 3's pattern, which llama.cpp knows exactly. (Numbers in groups of two digits instead of three would take up to
# 0.3 % fewer tokens here, single digits 1 to 8 % more.)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"  # before every document, so it both starts and ends one
_CHAT = "<|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <|pad|>"
SPECIAL = [END, *_CHAT.split(), *(f"<|reserved_{i}|>" for i in range(6))]

_LONG = 4096  # characters


def _read(path: Path) -> Backend:
    """The library takes names in UTF-8 only."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return Backend.from_str(read_text(path))
    return Backend.from_file(str(path))


class Tokenizer:
    """A tokenizer folder: `tokenizer.json` with `tokenizer_config.json`."""

    def __init__(self, backend: Backend, config: dict[str, Any]):
        self.backend = backend
        self.config = config
        self.bos_id = self._special("bos_token")
        self.eos_id = self._special("eos_token")

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer":
        """Raises UserError if the folder holds no usable tokenizer."""
        path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
        config: dict[str, Any] = {}
        if path.is_file():
            try:
                backend = _read(path)
            except Exception as error:  # the library raises bare Exception
                raise UserError(f"{path}: not a tokenizer file ({str(error).splitlines()[0]})") from None
        else:
            backend, config = formats.find(folder)
        named = formats.read_object(folder / "special_tokens_map.json")
        config |= {role: token for role, token in named.items() if role.endswith("_token")}
        if config_path.exists():
            own = read_json(config_path)
            if not isinstance(own, dict):
                raise UserError(f"{config_path}: not an object")
            config |= own
        formats.add_tokens(backend, folder, config)
        if templates := _template_files(folder):
            config["chat_template"] = templates[0]["template"] if len(templates) == 1 else templates
        return cls(backend, config)

    def save(self, folder: Path) -> None:
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", self.config)

    def _special(self, name: str) -> int | None:
        token = self.config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return None if token is None else self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def document_id(self) -> int:
        """The token put before every document in training. UserError if the tokenizer names none."""
        for i in (self.bos_id, self.eos_id, self.backend.token_to_id(END)):
            if i is not None:
                return i
        raise UserError("tokenizer_config.json: no bos_token and no eos_token; name the token that ends a document")

    def encode(self, text: str) -> list[int]:
        """Ids as the published tokenizer gives them, with the special tokens it adds at the start."""
        return self._ids(text, True)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.backend.decode(ids, skip_special_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Characters of text that a token stands for, at most."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text."""
        return frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a text that templates write, special tokens by their names."""
        return self._ids(text, False)

    def _ids(self, text: str, add_special: bool) -> list[int]:
        """Long texts by the call that lets other threads run meanwhile, which is slower for short ones."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the text holds halves of characters (lone surrogates); leave them out") from None
        if len(text) < _LONG:
            return self.backend.encode(text, add_special_tokens=add_special).ids
        return self.backend.encode_batch([text], add_special_tokens=add_special)[0].ids

    @cached_property
    def drops_first_space(self) -> bool:
        """Whether `decode` leaves out a space that the first token begins with, as SentencePiece does."""
        decoder = _written(self.backend.decoder)
        return '"Strip"' in decoder or '"Metaspace"' in decoder

    @cached_property
    def chat_templates(self) -> dict[str, ChatTemplate]:
        """The model's templates by their names; {} if it has none."""
        source = self.config.get("chat_template")
        if isinstance(source, list):  # [{"name": ..., "template": ...}]
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        else:
            named = source if isinstance(source, dict) else {"default": source}
        special = {}
        for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
            token = self.config.get(name)
            if token is not None:
                special[name] = token["content"] if isinstance(token, dict) else token
        return {str(n): ChatTemplate(text, special) for n, text in named.items() if isinstance(text, str)}

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template of a conversation without tools; None if there is none."""
        templates = self.chat_templates
        return templates.get("default") or next(iter(templates.values()), None)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **more: Any,
    ) -> str:
        """Messages as the text that the model's chat template makes of them; the one for tools, where there are some.
        UserError if it has none or refuses them."""
        template = self.chat_template
        if template is None:
            raise UserError("tokenizer_config.json: no chat_template, so this model cannot chat")
        if tools:
            template = self.chat_templates.get("tool_use", template)
        return template.render(messages, tools, add_generation_prompt, **more)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **more: Any,
    ) -> list[int]:
        """The same as ids; the template writes the special tokens itself."""
        return self.encode_rendered(self.render_chat(messages, tools, add_generation_prompt, **more))

    @cached_property
    def _stand_ins(self) -> dict[str, int]:
        """The bytes that characters in the names of byte-level tokens stand for; {} where tokens are not of bytes."""
        level = "ByteLevel" in _written(self.backend.pre_tokenizer) + _written(self.backend.decoder)
        return {c: b for b, c in formats.byte_to_unicode().items()} if level else {}

    def _named(self, name: str) -> bytes:
        """What a token of this name, which is not special, adds to a text."""
        table = self._stand_ins
        if table:
            return bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        return name.replace("\u2581", " ").encode()

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text; of a special token, its name."""
        name = self.backend.id_to_token(token)
        if name is None:
            return b""
        return name.encode() if token in self.special_ids else self._named(name)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text that each id stands for; 0 for special tokens."""
        state = json.loads(self.backend.to_str())
        added = {t["id"]: 0 if t["special"] else len(t["content"].encode()) for t in state["added_tokens"]}
        out = np.zeros(self.vocab_size, np.int64)
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in added:
                out[i] = added[i]
            else:  # of byte-level tokens, one stand-in character a byte
                out[i] = len(token) if self._stand_ins else len(self._named(token))
        return out

    @cached_property
    def _fast(self) -> Any:
        """tiktoken's encoder with these merges, or None where it cannot give the same ids."""
        state = json.loads(self.backend.to_str())
        model, pre = state["model"], state["pre_tokenizer"]
        if model["type"] != "BPE" or state["normalizer"] or not pre or pre["type"] != "Sequence":
            return None
        split, level = (pre["pretokenizers"] + [{}, {}])[:2]
        if split.get("type") != "Split" or "Regex" not in split["pattern"]:
            return None
        if level.get("type") != "ByteLevel" or level["use_regex"]:
            return None
        import tiktoken

        table, special = self._stand_ins, {t["content"] for t in state["added_tokens"]}
        ranks = {bytes(table[c] for c in k): i for k, i in model["vocab"].items() if k not in special}
        fast = tiktoken.Encoding("craton", pat_str=split["pattern"]["Regex"], mergeable_ranks=ranks, special_tokens={})
        probes = [
            "def f(x):\n\treturn x ** 2  # 12345\n\n\n",
            "It's 3.14159 — naïve “quotes”, 日本語 and 🙂🙂  end ",
            PATTERN * 3,
        ]
        probes.append("".join(chr(c) for c in range(32, 3000) if unicodedata.category(chr(c))[0] not in "C"))
        same = all(fast.encode_ordinary(p) == self.backend.encode(p, add_special_tokens=False).ids for p in probes)
        return fast if same else None

    def encode_documents(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Ids of each text with no special tokens; a special token's name in a document is ordinary text."""
        encode = self._encode_as_text if self._fast is None else self._fast.encode_ordinary
        yield from map(encode, texts)

    def _encode_as_text(self, text: str) -> list[int]:
        """Ids of a text in which "<|endoftext|>", say, is not the special token."""
        before, self.backend.encode_special_tokens = self.backend.encode_special_tokens, True
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        finally:  # others use this tokenizer too
            self.backend.encode_special_tokens = before


def _written(part: Any) -> str:
    """A part of a tokenizer in JSON; the whole would be a hundred megabytes for a large vocabulary."""
    return "" if part is None else part.__getstate__().decode()


def _template_files(folder: Path) -> list[dict[str, str]]:
    """Templates in files of their own, by name, the default first."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    out = []
    for name, path in files.items():
        if path.is_file():
            out.append({"name": name, "template": read_text(path)})
    return out


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of vocab_size ids: special tokens first, then the 256 bytes, then merges. It has no chat template,
    since what is trained with it has seen no conversation yet."""
    backend = Backend(models.BPE())
    formats.byte_level_text(backend, PATTERN)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    formats.begin_with(backend, END, 0)
    config: dict[str, Any] = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=END, eos_token=END)
    config |= dict(pad_token="<|pad|>", clean_up_tokenization_spaces=False)
    return Tokenizer(backend, config)


def choose_vocab_size(text_bytes: int) -> int:
    """Vocabulary for a corpus of this many bytes: 4,096 at 10 MB, 8,192 at 100 MB, 32,768 at 10 GB, 65,536 at most.

    A power of two near 13 * bytes^0.35: vocabulary grows as about the 0.5-0.6 power of model size (arXiv 2407.13623)
    and model size as about the 0.6 power of a corpus that is used up.
    """
    size = 13 * max(text_bytes, 1) ** 0.355
    return min(65_536, max(1_024, 2 ** round(math.log2(size))))
