"""Structured output: answers that follow a JSON schema, a regular expression, a choice or a grammar, by llguidance.

When the tokens that are left are about what closing everything takes, the answer is closed (craton/engine/closing.py).
"""

import json
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask  # its torch module imports a compiler
from torch import Tensor

from craton.base import UserError
from craton.engine.closing import Closer, Move
from craton.engine.loosen import loosened
from craton.engine.request import Sampling
from craton.text.tokenizer import Tokenizer

_MOST_SCHEMA = 256 << 10  # bytes
_NO_MATTER = ("$schema", "$id", "$comment")  # say where a schema is from
_TOOLS_KEPT = 1000  # schemas
_SPARE = 64  # a way out that is this much longer than what is left is still told from an unknown one


class Grammars:
    """The tokenizer as llguidance knows it; made once for an engine."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: tuple[int, ...]):
        self.vocabulary = vocabulary
        self.tool_schemas: dict[str, tuple[dict[str, Any], list[str]]] = {}  # with what was left out, by their JSON
        self.special = frozenset(tokenizer.backend.get_added_tokens_decoder())
        self.ends = ends
        eos = ends[0] if ends else tokenizer.eos_id
        if eos is None:
            raise UserError("structured output needs a model with an end token; config.json has no eos_token_id")
        eos_token = [int(e) for e in ends] or int(eos)
        self.tokenizer = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=eos_token)
        raw = [self.tokenizer.decode_bytes([i]) for i in range(min(vocabulary, tokenizer.vocab_size))]
        self.spelling = {text: i for i, text in enumerate(raw) if text and i not in self.special}
        self.closer = Closer(self.tokenizer, raw, ends)

    def tool_schema(self, name: str, schema: dict[str, Any], strict: bool) -> dict[str, Any]:
        """The schema that a tool's arguments are held to: an object's, without what cannot be enforced. UserError for
        arguments that are no object and, where strict, for what cannot be enforced."""
        kind = schema.get("type") or "object"
        kind = kind.lower() if isinstance(kind, str) else kind  # as Gemini's clients write it
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            problem = f"tools: the arguments of {name!r} are of type {kind!r}; a tool takes an object"
            raise UserError(problem, field="tools")
        schema = {k: v for k, v in {**schema, "type": "object"}.items() if k not in _NO_MATTER}
        key = json.dumps(schema)
        known = self.tool_schemas.get(key)
        if known is None:
            if len(self.tool_schemas) >= _TOOLS_KEPT:
                self.tool_schemas.clear()
            known = self.tool_schemas[key] = loosened(schema, self._problem)
        found, dropped = known
        if strict and dropped:
            problem = f"tools: {dropped[0]} of {name!r} cannot be enforced; leave it out, or strict"
            raise UserError(problem, field="tools")
        return found

    def _problem(self, schema: Any) -> str:
        """What keeps a JSON schema from being a grammar; "" if nothing does."""
        try:
            return str(
                LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)), self.tokenizer)
            )
        except (ValueError, RecursionError) as error:
            return _first_line(error) or "it cannot be read"

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
                    schema = {k: v for k, v in schema.items() if k not in _NO_MATTER}
                    schema = {**schema, "x-guidance": {"whitespace_flexible": False, **schema.get("x-guidance", {})}}
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            elif name == "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            else:
                grammar = LLMatcher.grammar_from_lark(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} cannot be read ({_first_line(error)})", field=name) from None
        if problem := LLMatcher.validate_grammar(grammar, self.tokenizer):
            at = loosened(schema, self._problem)[1][:1] if name == "json_schema" and isinstance(schema, dict) else []
            where = "".join(f" at {path}" for path in at)
            raise UserError(f"{name} cannot be met or read{where} ({_first_line(problem)})", field=name)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"{name} cannot be met or read ({_first_line(matcher.get_error())})", field=name)
        return Matcher(self, matcher, self.closer.literals(text))


def _first_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    cause = [line for line in lines[1:] if line.startswith("error:")][:1]  # of a regular expression
    return " ".join([lines[0], *cause])[:300]


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, grammars: Grammars, matcher: Any, literals: list[Move]):
        """literals: of the grammar, for closing."""
        self.grammars, self.matcher, self.literals = grammars, matcher, literals
        self.bits = allocate_token_bitmask(1, grammars.vocabulary)
        self.closing: list[int] | None = None  # the tokens of the way to the end, once it is taken
        self.check_at: int | None = None  # tokens left at which to look again how many closing takes
        self.longest = 0  # way that was seen; one token may open as much again

    def copy(self) -> "Matcher":
        return Matcher(self.grammars, self.matcher.deep_copy(), self.literals)

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
        if self.closing is not None and (token := self._next_closing(allowed)) is not None:
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
        if self.closing is not None:
            self.closing = self.closing[1:] if self.closing[:1] == [token] else self._way_out(left)
        elif self.check_at is not None and left <= self.check_at and not self.matcher.is_stopped():
            way = self._look(left)
            if way is not None and len(way) > left:
                token = self._close_instead(token, left)
        closed = self.closing is not None and not self.closing and self.matcher.is_accepting()
        return token, bool(self.matcher.is_stopped() or (left == 0 and closed))

    def _look(self, left: int) -> list[int] | None:
        """The way out from here, which is taken if it is as long as what is left; sets when to look again."""
        way = self._way_out(left + _SPARE)
        need = len(way) if way is not None else 0
        if way and need == left:
            self.closing = way
        self.longest = max(self.longest, need)
        self.check_at = left - 1 if way is not None and left <= 2 * self.longest + 32 else left - 8
        return way

    def _close_instead(self, token: int, left: int) -> int:
        """The last token made the way out longer than what is left: from before it the shorter one is taken, if it is
        known. Returns the token taken."""
        self.matcher.rollback(1)
        way = self._way_out(left + 1)
        if way is not None and (rest := way or list(self.grammars.ends[:1])):
            token, self.closing = rest[0], rest[1:]
        self.matcher.consume_token(token)
        return token

    def _way_out(self, most: int) -> list[int] | None:
        return self.grammars.closer.way_out(self.matcher, self.literals, most)

    def _next_closing(self, allowed: Tensor) -> int | None:
        for token in (*(self.closing or ())[:1], *self.grammars.ends):
            if allowed[token]:
                return int(token)
        return None


def _bools(words: Any, size: int) -> Tensor:
    """int32 words of 32 bits -> (size,) bool."""
    bits = torch.from_numpy(words)
    return ((bits[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten()[:size].bool()
