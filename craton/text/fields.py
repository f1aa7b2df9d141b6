"""Calls whose arguments are written one by one instead of as JSON: in tags, as Qwen 3 Coder does, or as a call in
Python, as Llama does.
"""

import ast
import json
import os.path
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_PIECES = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^"'()\[\]{},\n]+|.|\n""", re.DOTALL)
Lark = Callable[[str], str]  # a literal text in Lark


@dataclass(frozen=True)
class Fields:
    """NAME first KEY key_end VALUE [separator KEY key_end VALUE]... last; without arguments NAME empty."""

    first: str
    key_end: str
    separator: str
    last: str
    empty: str
    quoted: bool  # texts are quoted, as in Python; else they end where separator or last begins

    @property
    def begin(self) -> str:
        """What follows the name, with arguments and without."""
        return os.path.commonprefix([self.first, self.empty])

    @property
    def term(self) -> str:
        """What ends every text that is not quoted."""
        return "" if self.quoted else os.path.commonprefix([self.separator, self.last])


def find_first(text: str, options: tuple[str, ...], last: bool, start: int = 0) -> tuple[int, str] | None:
    """The first place from start on where one of the options is, the longest one there; None if there is none yet.
    last: no more comes."""
    at = min((i for o in options if (i := text.find(o, start)) >= 0), default=None)
    begun = [len(text) - may_begin(text[start:], o) for o in options if may_begin(text[start:], o)]
    if at is None or (not last and any(b <= at for b in begun)):
        return None
    return at, max((o for o in options if text.startswith(o, at)), key=len)


def may_begin(text: str, marker: str) -> int:
    """Characters at the end of text that may be the beginning of the marker."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)


def literal_end(text: str) -> int | None:
    """Where the Python or JSON literal that a text begins with ends; None if it may go on."""
    depth, end = 0, 0
    for piece in _PIECES.finditer(text):
        end, c = piece.end(), piece[0]
        if c in "([{":
            depth += 1
        elif c in ")]}" and depth:
            depth -= 1
        elif not depth and c in ",)]}\n":
            return piece.start()
        elif c in "\"'":  # not closed yet
            return None
    return None if depth else end


def json_of(value: str, quoted: bool, schema: Any) -> str:
    """A value as a model wrote it, in JSON. schema: the property's, where it is known."""
    kinds = kinds_of(schema)
    if not quoted and kinds == {"string"}:
        return json.dumps(value, ensure_ascii=False)
    for read in (_strict_json, ast.literal_eval):
        try:
            found = read(value.strip())
            if quoted or "string" not in kinds or isinstance(found, tuple(_PYTHON[k] for k in kinds - {"string"})):
                return json.dumps(found, ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return json.dumps(value, ensure_ascii=False)


def _strict_json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


_NUMBER = (int, float)
_PYTHON: dict[str, Any] = {"null": type(None), "boolean": bool, "integer": int, "number": _NUMBER}
_PYTHON |= {"array": list, "object": dict, "string": str}


def kinds_of(schema: Any) -> set[str]:
    """The types that a schema without references may allow; all of them where it does not say."""
    if not isinstance(schema, dict):
        return set(_PYTHON)
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list):
        return {next(k for k, t in _PYTHON.items() if isinstance(c, t)) for c in choices}
    kind = schema.get("type")
    if kind is not None:
        return {k for k in ([kind] if isinstance(kind, str) else kind) if k in _PYTHON}
    parts = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(parts, list) and parts:
        return set().union(*(kinds_of(p) for p in parts))
    return set(_PYTHON)


def resolved(schema: Any, named: dict[str, Any], depth: int = 8) -> Any:
    """A schema with its references to `named` definitions followed and its `allOf` joined."""
    if not isinstance(schema, dict) or not depth:
        return schema
    where, _, name = str(schema.get("$ref", "")).rpartition("/")
    if where in ("#/$defs", "#/definitions") and isinstance(named.get(name), dict):
        rest = {k: v for k, v in schema.items() if k != "$ref"}
        return resolved({**named[name], **rest}, named, depth - 1)
    out = dict(schema)
    for part in out.pop("allOf", ()):
        more = resolved(part, named, depth - 1)
        if isinstance(more, dict):
            joined = {key: _both(out.get(key), more[key]) for key in ("properties", "required") if key in more}
            out |= {**more, **joined}
    for key in ("anyOf", "oneOf"):
        if isinstance(out.get(key), list):
            out[key] = [resolved(part, named, depth - 1) for part in out[key]]
    return out


def _both(first: Any, second: Any) -> Any:
    return {**(first or {}), **second} if isinstance(second, dict) else [*(first or ()), *second]


def properties_of(schema: dict[str, Any]) -> tuple[dict[str, Any], set[str], bool]:
    """The properties of an object's schema, those that are required, and whether it may have others."""
    named = {**schema.get("definitions", {}), **schema.get("$defs", {})}
    whole = resolved(schema, named)
    found, required = dict(whole.get("properties") or {}), set(whole.get("required") or ())
    for branch in whole.get("anyOf") or whole.get("oneOf") or ():  # what one of them has may be there
        if isinstance(branch, dict):
            found = {**(branch.get("properties") or {}), **found}
    declared = "properties" in whole or bool(found)
    found |= {key: {} for key in sorted(required - set(found))}
    others = whole.get("additionalProperties", not declared)
    return {k: resolved(v, named) for k, v in found.items()}, required, others is not False


def rules(number: int, schema: dict[str, Any], f: Fields, lark: Lark) -> tuple[str, list[str]]:
    """Lark rules for the arguments of a tool: the name of the first, and all. Properties come in the schema's order,
    those that are not required may be missing; others follow, where the schema speaks of them or of none."""
    properties, required, others = properties_of(schema)
    named: dict[str, Any] = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
    own, lines, nothing = f"t{number}", list[str](), '""'
    term = f.term
    begin, go_on, end = lark(f.first), lark(f.separator[len(term) :]), lark(f.last[len(term) :])
    for i, (key, own_schema) in enumerate(properties.items()):
        one = f"{lark(key + f.key_end)} {own}v{i}"
        lines += _value_rule(f"{own}v{i}", own_schema, named, f, lark)
        skip_first, skip = (f" | {own}s{i + 1}", f" | {own}r{i + 1}") if key not in required else ("", "")
        lines.append(f"{own}s{i}: {begin} {one} {own}r{i + 1}{skip_first}")
        lines.append(f"{own}r{i}: {go_on} {one} {own}r{i + 1}{skip}")
    last, first_more, more = len(properties), "", ""
    if others:
        extra = schema.get("additionalProperties")
        lines += _value_rule(f"{own}w", extra if isinstance(extra, dict) else {}, named, f, lark)
        lines.append(f"{own}k: /[A-Za-z_][A-Za-z0-9_]{{0,63}}/ {lark(f.key_end)} {own}w")
        first_more, more = f" | {begin} {own}k {own}r{last}", f" | {go_on} {own}k {own}r{last}"
    lines.append(f"{own}r{last}: {end or nothing}{more}")
    lines.append(f"{own}s{last}: {lark(f.empty) or nothing}{first_more}")
    return f"{own}s0", lines


def _value_rule(name: str, schema: Any, named: dict[str, Any], f: Fields, lark: Lark) -> list[str]:
    """One value with what ends a text."""
    in_json = f"%json {json.dumps({**named, **schema} if isinstance(schema, dict) else schema)}"
    kinds, own = kinds_of(schema), schema if isinstance(schema, dict) else {}
    if f.quoted:
        said = not own or any(k in own for k in ("type", "anyOf", "oneOf"))
        words = ['"True"', '"False"'] if said and "boolean" in kinds else []
        words += ['"None"'] if said and "null" in kinds else []
        return [f"{name}: {' | '.join((in_json, *words))}"]
    choices = [own["const"]] if "const" in own else own.get("enum")
    if choices:
        written = [lark(c if isinstance(c, str) else json.dumps(c)) for c in choices]
        return [f"{name}: ({' | '.join(w for w in written if w)}) {lark(f.term)}"]
    if "string" not in kinds:
        return [f"{name}: {in_json} {lark(f.term)}"]
    escaped = re.sub(r"[^A-Za-z0-9]", lambda m: f"\\x{ord(m[0]):02X}" if ord(m[0]) < 128 else m[0], f.term)
    return [f"{name}[lazy]: /(?s:.*){escaped}/"]


def unenforced(schema: dict[str, Any]) -> str | None:
    """The path of what a text without quotes is not held to; None if there is nothing."""
    for key, own in properties_of(schema)[0].items():
        if isinstance(own, dict) and "string" in kinds_of(own):
            for word in ("pattern", "format", "minLength", "maxLength"):
                if word in own:
                    return f"properties.{key}.{word}"
    return None
