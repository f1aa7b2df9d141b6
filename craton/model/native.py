"""Calls into the engine's kernels (serve.cpp): C structures and the functions that need no module."""

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

_I, _P, _F = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class MatrixC(ctypes.Structure):
    _fields_: ClassVar[Any] = [("data", _P), ("bias", _P), ("rows", _I), ("cols", _I), ("kind", _I)]


class LayerC(ctypes.Structure):
    _fields_: ClassVar[Any] = (
        [(n, MatrixC) for n in ("q", "k", "v", "o", "gate", "up", "down")]
        + [(n, _P) for n in ("norm", "mlp_norm", "q_norm", "k_norm", "keys", "values")]
        + [("window", _I), ("rope", _I)]
    )


class ModelC(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        (n, _I)
        for n in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "embedding_kind")
    ] + [
        ("eps", _F),
        ("scale", _F),
        ("layer", _P),
        ("head", MatrixC),
        ("embedding", _P),
        ("norm", _P),
        ("cos", _P),
        ("sin", _P),
    ]


class StepC(ctypes.Structure):  # craton/model/cache.py: Step
    _fields_: ClassVar[Any] = [(n, _I) for n in ("tokens", "sequences", "most_blocks")] + [
        (n, _P) for n in ("positions", "slots", "starts", "lengths", "tables")
    ]


class HeadsC(ctypes.Structure):
    _fields_: ClassVar[Any] = [(n, _I) for n in ("heads", "kv_heads", "key", "value", "window")] + [
        ("scale", _F),
        ("softcap", _F),
        ("sinks", _P),
    ]


def step_of(step: Any) -> StepC:
    return StepC(
        step.positions.shape[0],
        step.lengths.shape[0],
        step.tables.shape[1],
        *(t.data_ptr() for t in (step.positions, step.slots, step.starts, step.lengths, step.tables)),
    )


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of MatrixC; 4 and 8 are packed


def linear(library: Any, x: Tensor, w: Tensor) -> Tensor:
    """x (..., cols) times w (rows, cols; fp32, bf16 or fp16) transposed, each row of x on its own."""
    x, w = x.contiguous(), w.contiguous()
    out = x.new_empty(*x.shape[:-1], w.shape[0])
    if x.numel():
        matrix = MatrixC(w.data_ptr(), None, w.shape[0], w.shape[1], KINDS[w.dtype])
        library.serve_linear(
            ctypes.byref(matrix), x.data_ptr(), x.numel() // x.shape[-1], out.data_ptr(), torch.get_num_threads()
        )
    return out


def paged_attention(
    library: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Any,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Step.attend on the kernels. All fp32."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = q.new_empty(*q.shape[:3], v.shape[3])
    sinks = None if sinks is None else sinks.float()
    heads = HeadsC(
        q.shape[2],
        k.shape[2],
        k.shape[3],
        v.shape[3],
        window or 0,
        scale,
        softcap or 0.0,
        None if sinks is None else sinks.data_ptr(),
    )
    library.serve_attention(
        ctypes.byref(step_of(step)),
        ctypes.byref(heads),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
