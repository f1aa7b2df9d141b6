"""Calls into the engine's kernels (decode.cpp): C structures and the functions that need no module."""

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

_I, _P, _F = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class LowC(ctypes.Structure):
    """products.h: Low."""

    _fields_: ClassVar[Any] = [("a", _P), ("b", _P), ("rank", _I), ("kind", _I), ("scale", _F)]


class MatrixC(ctypes.Structure):
    """products.h: Matrix."""

    _fields_: ClassVar[Any] = [("data", _P), ("bias", _P), ("rows", _I), ("cols", _I), ("kind", _I), ("low", _P)]


class LayerC(ctypes.Structure):
    """step.h: Layer."""

    _fields_: ClassVar[Any] = [(n, MatrixC) for n in ("q", "k", "v", "o", "gate", "up", "down")]
    _fields_ += [(n, _P) for n in ("norm", "mlp_norm", "q_norm", "k_norm", "after", "mlp_after", "keys", "values")]
    _fields_ += [("window", _I), ("rope", _I)]


class ModelC(ctypes.Structure):
    """step.h: Model."""

    _fields_: ClassVar[Any] = [(n, _I) for n in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")]
    _fields_ += [("gelu", _I), ("eps", _F), ("scale", _F), ("embedding_scale", _F), ("layer", _P)]
    _fields_ += [("embedding", MatrixC), ("head", MatrixC), ("norm", _P), ("cos", _P * 2), ("sin", _P * 2)]
    _fields_ += [("rank", _I)]


class StepC(ctypes.Structure):
    """paged_attention.h: Step."""

    _fields_: ClassVar[Any] = [(n, _I) for n in ("tokens", "sequences", "most_blocks")]
    _fields_ += [(n, _P) for n in ("positions", "slots", "starts", "lengths", "tables", "adapters")]


class HeadsC(ctypes.Structure):
    """paged_attention.h: Heads."""

    _fields_: ClassVar[Any] = [(n, _I) for n in ("heads", "kv_heads", "key", "value", "window")]
    _fields_ += [("scale", _F), ("softcap", _F), ("sinks", _P)]


KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # of MatrixC: GGUF's numbers, as of packed types


def step_of(places: list[Tensor]) -> StepC:
    """places: positions, slots, starts, lengths and tables of a TokenBatch, which must outlive the result."""
    positions, _, _, lengths, tables = places
    return StepC(positions.shape[0], lengths.shape[0], tables.shape[1], *(t.data_ptr() for t in places))


def product(library: Any, matrix: MatrixC, x: Tensor) -> Tensor:
    """x (..., cols) fp32 times the matrix (rows, cols) transposed, each row of x on its own."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], matrix.rows)
    if x.numel():
        rows = x.numel() // x.shape[-1]
        library.craton_linear(ctypes.byref(matrix), x.data_ptr(), rows, out.data_ptr(), torch.get_num_threads())
    return out


def rows_of(library: Any, matrix: MatrixC, numbers: Tensor, out: Tensor) -> None:
    """Rows of a matrix by their numbers (n,) int64 into out (n, cols) fp32."""
    places = ctypes.byref(matrix), numbers.data_ptr(), numbers.shape[0], out.data_ptr()
    library.craton_rows(*places, torch.get_num_threads())


def linear(library: Any, x: Tensor, w: Tensor) -> Tensor:
    """x (..., cols) times w (rows, cols; fp32, bf16 or fp16) transposed, each row of x on its own."""
    w = w.contiguous()
    return product(library, MatrixC(w.data_ptr(), None, w.shape[0], w.shape[1], KINDS[w.dtype]), x)


def paged_attention(
    library: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, step: StepC, heads: HeadsC
) -> Tensor:
    """craton/model/ops.py: paged_attention, all fp32."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = q.new_empty(*q.shape[:3], v.shape[3])
    places = (t.data_ptr() for t in (q, k, v, keys, values, out))
    library.craton_attention(ctypes.byref(step), ctypes.byref(heads), *places, torch.get_num_threads())
    return out


def choose_tokens(
    library: Any, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor
) -> Tensor:
    """craton/model/ops.py: choose_tokens."""
    logits, out = logits.contiguous(), torch.empty(logits.shape[0], dtype=torch.int64)
    filters = [temperature.float(), top_k.long(), top_p.double(), min_p.double(), u.double()]
    places = (t.data_ptr() for t in (*filters, out))
    library.craton_choose(logits.data_ptr(), *logits.shape, *places, torch.get_num_threads())
    return out
