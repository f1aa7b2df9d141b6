"""Structured output: answers that follow a JSON schema, a regular expression, a choice or a grammar, by llguidance.

A model that does not mean to stop can fill every string and array until its tokens run out. So when what is left is
about what closing everything takes, the answer is closed: of the tokens that the grammar allows, the one that ends
the most.
"""

import json
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask  # its torch module imports a compiler
from torch import Tensor

from craton.base import UserError
from craton.engine.request import Sampling
from craton.text.tokenizer import Tokenizer

_MOST_SCHEMA = 256 << 10  # bytes
_CLOSERS = '} ] ) > " , : null 9 5 1 0 false a'.split()  # 9: the digit that meets a lower bound first
_OPENERS = b"([{<\"'"


class Grammars:
    """The tokenizer as llguidance knows it; made once for an engine."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: tuple[int, ...]):
        self.vocabulary = vocabulary
        self.special = frozenset(tokenizer.backend.get_added_tokens_decoder())
        self.ends = ends
        eos = ends[0] if ends else tokenizer.eos_id
        if eos is None:
            raise UserError("structured output needs a model with an end token; config.json has no eos_token_id")
        eos_token = [int(e) for e in ends] or int(eos)
        self.tokenizer = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=eos_token)
        self.order = [t[0] for c in _CLOSERS if len(t := self.tokenizer.tokenize_str(c)) == 1]
        self.in_string = [t[0] for c in ("}", "q", "Z") if len(t := self.tokenizer.tokenize_str(c)) == 1]
        self.quote = self.tokenizer.tokenize_str('"')[0]
        raw = [self.tokenizer.decode_bytes([i]) for i in range(min(vocabulary, tokenizer.vocab_size))]
        self.spelling = {text: i for i, text in enumerate(raw) if text and i not in self.special}
        self.short = sorted(range(len(raw)), key=lambda i: (any(c in _OPENERS for c in raw[i]), len(raw[i]) or 99, i))

    def matcher(self, s: Sampling) -> "Matcher | None":
        """UserError if the request's schema or grammar is wrong, too large or cannot be met; None if it has none."""
        if s.json_schema is not None:
            name, text = "json_schema", s.json_schema
        elif s.regex is not None:
            name, text = "regex", s.regex
        elif s.choice:
            name, text = "choice", "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in s.choice)
        elif s.grammar is not None:
            name, text = "grammar", s.grammar
        else:
            return None
        if len(text) > _MOST_SCHEMA:
            raise UserError(f"{name} has {len(text)} characters, at most {_MOST_SCHEMA} are accepted", field=name)
        try:
            if name == "json_schema":
                schema = json.loads(text)
                if not isinstance(schema, dict | bool):
                    raise UserError("json_schema must be an object", field=name)
                if isinstance(schema, dict) and not isinstance(schema.get("x-guidance", {}), dict):
                    raise UserError("json_schema: x-guidance must be an object", field=name)
                if isinstance(schema, dict):
                    schema = {**schema, "x-guidance": {"whitespace_flexible": False, **schema.get("x-guidance", {})}}
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            elif name == "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            else:
                grammar = LLMatcher.grammar_from_lark(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} cannot be read ({_first_line(error)})", field=name) from None
        if problem := LLMatcher.validate_grammar(grammar, self.tokenizer):
            raise UserError(f"{name} cannot be met or read ({_first_line(problem)})", field=name)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"{name} cannot be met or read ({_first_line(matcher.get_error())})", field=name)
        return Matcher(self, matcher)


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0][:300]


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, grammars: Grammars, matcher: Any):
        self.grammars, self.matcher = grammars, matcher
        self.bits = allocate_token_bitmask(1, grammars.vocabulary)
        self.closing = False
        self.check_at: int | None = None  # tokens left at which to look again how many closing takes

    def copy(self) -> "Matcher":
        return Matcher(self.grammars, self.matcher.deep_copy())

    def accepts(self, token: int) -> bool:
        """Whether the grammar really goes on with a token of the mask, which is too generous with special tokens whose
        names the answer spells out."""
        if token not in self.grammars.special or token in self.grammars.ends:
            return True
        return bool(self.matcher.validate_tokens([token]) == 1)

    def spelled(self) -> int | None:
        """The longest token that begins what must come, where the mask has nothing but the special token of that
        name."""
        must = bytes(self.matcher.compute_ff_bytes())
        tokens = (self.grammars.spelling.get(must[:n]) for n in range(min(len(must), 16), 0, -1))
        return next((t for t in tokens if t is not None and self.matcher.validate_tokens([t]) == 1), None)

    def mask(self, logits: Tensor, left: int) -> Tensor:
        """logits (vocabulary,) with -inf where the grammar does not go on; `left` tokens may still be given. UserError
        if it goes on nowhere."""
        if self.check_at is None:
            self._look(left)
        fill_next_token_bitmask(self.matcher, self.bits)
        if self.matcher.is_error():
            raise UserError(f"the grammar is too large or cannot go on ({_first_line(self.matcher.get_error())})")
        allowed = _bools(self.bits[0], logits.shape[0])
        if self.closing and (token := self._closer(allowed)) is not None:
            allowed = torch.zeros_like(allowed)
            allowed[token] = True
        if not allowed.any():
            raise UserError(f"the grammar allows no token here ({_first_line(self.matcher.get_error() or 'dead end')})")
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token: int, left: int) -> tuple[int, bool]:
        """Go on with a token that the mask allowed, after which `left` may be given. A token after which the answer
        could not be closed any more is replaced by the one that closes. Returns the token taken, and whether all is
        complete."""
        self.matcher.consume_token(token)
        due = self.check_at is not None and left <= self.check_at and not self.closing
        if due and not self.matcher.is_stopped() and self._look(left) > left:
            self.matcher.rollback(1)
            self.closing = True
            fill_next_token_bitmask(self.matcher, self.bits)
            token = self._closer(_bools(self.bits[0], self.grammars.vocabulary)) or token
            self.matcher.consume_token(token)
        return token, bool(self.matcher.is_stopped() or (left == 0 and self.matcher.is_accepting()))

    def _look(self, left: int) -> int:
        """Tokens that closing takes from here; sets when to look again."""
        need = self._closing_length(left + 1)
        self.closing = need >= left
        self.check_at = left - 1 if left <= 4 * need + 32 else left - 8
        return need

    def _closer(self, allowed: Tensor) -> int | None:
        g = self.grammars
        quoted = all(bool(allowed[t]) for t in g.in_string)  # a bracket is a letter here
        for token in (*g.ends, *([g.quote] if quoted else []), *g.order):
            if allowed[token]:
                return int(token)
        return next((t for t in g.short if allowed[t]), None)

    def _closing_length(self, most: int) -> int:
        """Tokens that closing takes from here, at most `most`."""
        trial = self.copy()
        for count in range(min(most, 2048)):
            if trial.matcher.is_stopped() or trial.matcher.is_accepting():
                return count
            fill_next_token_bitmask(trial.matcher, trial.bits)
            token = trial._closer(_bools(trial.bits[0], self.grammars.vocabulary))
            if token is None or not trial.matcher.consume_token(token):
                break
        return most


def _bools(words: Any, size: int) -> Tensor:
    """int32 words of 32 bits -> (size,) bool."""
    bits = torch.from_numpy(words)
    return ((bits[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten()[:size].bool()
