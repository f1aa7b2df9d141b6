"""Schemas of tools without what a grammar cannot enforce: an answer then follows the rest of the schema.

Tools come from programs that write whatever JSON Schema knows; a keyword that only validates must not spoil a request.
"""

from collections.abc import Callable
from typing import Any

_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name -> schema
_OF_ONE = ("items", "additionalProperties")
_OF_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_SHAPE = ("type", "properties", "required", "items", "enum", "const", "anyOf", "allOf", "$ref", "$defs", "definitions")

Problem = Callable[[Any], str]  # what keeps a schema from becoming a grammar; "" if nothing does


def loosened(schema: dict[str, Any], problem: Problem) -> tuple[dict[str, Any], list[str]]:
    """A schema that has no problem, and the paths of what was left out of it."""
    out, dropped = dict(schema), list[str]()
    for name in ("$defs", "definitions"):  # first, since others refer to them
        if isinstance(out.get(name), dict):
            out[name] = {n: _node(s, {}, problem, f"{name}.{n}", dropped) for n, s in out[name].items()}
    named: dict[str, Any] = {k: out[k] for k in ("$defs", "definitions") if k in out}
    return _node(out, named, problem, "", dropped), dropped


def _node(node: Any, named: dict[str, Any], problem: Problem, path: str, dropped: list[str]) -> Any:
    if not isinstance(node, dict) or not problem({**named, **node}):
        return node
    node = dict(node)
    for key in [k for k in (*_OF_NAMES, *_OF_ONE, *_OF_MANY) if k in node and not (k in named and not path)]:
        node[key] = _children(key, node[key], named, problem, f"{path}.{key}".lstrip("."), dropped)
    if "oneOf" in node and problem({**named, "oneOf": node["oneOf"]}):
        node["anyOf"] = node.pop("oneOf")
        dropped.append(f"{path}.oneOf".lstrip("."))
    kind = {"type": node["type"]} if "type" in node else {}
    alone = [k for k in node if k not in named and problem({**named, **kind, k: node[k]})]
    for key in (*alone, *[k for k in node if k not in _SHAPE], *[k for k in node if k not in ("type", *named)], "type"):
        if not problem({**named, **node}):
            break
        if key in node:
            del node[key]
            dropped.append(f"{path}.{key}".lstrip("."))
    return node


def _children(key: str, value: Any, named: dict[str, Any], problem: Problem, path: str, dropped: list[str]) -> Any:
    if key in _OF_NAMES and isinstance(value, dict):
        return {n: _node(s, named, problem, f"{path}.{n}", dropped) for n, s in value.items()}
    if key in _OF_MANY and isinstance(value, list):
        return [_node(s, named, problem, f"{path}.{i}", dropped) for i, s in enumerate(value)]
    return _node(value, named, problem, path, dropped)
