"""The value of a sum that a model wrote: numbers and + - * / // %, and nothing else that Python knows."""

import ast
import operator
from collections.abc import Callable
from typing import Any

_MOST = 1e15
_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def value_of(expression: str) -> float | None:
    """Of a text such as "(3+4)*2.5"; None if it is no sum, or too large a one."""
    if len(expression) > 200:
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


def shown(value: float) -> str:
    """As people write it: 12, or 0.5."""
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


def _value(node: ast.expr) -> float:
    value: float
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("no arithmetic")
    if not abs(value) < _MOST:
        raise ValueError("too large")
    return value
