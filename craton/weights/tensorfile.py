"""safetensors files: read whole or in rows, written whole or tensor by tensor. Nothing else is opened, least of all a
pickle."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from craton.base import UserError, publish

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def open_tensors(path: Path) -> Any:
    """A safetensors file opened for reading. UserError if it is missing, truncated, of another format or of a size
    that its header does not say."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
        if len(head) < 8 or struct.unpack("<Q", head)[0] > min(size, 100 << 20):
            if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"):
                raise UserError(f"{path}: a pickle file; opening one can run code, so only safetensors are read")
            raise UserError(f"{path}: not a safetensors file, or truncated")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, json.JSONDecodeError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. UserError if it is damaged, or altered since craton wrote it."""
    with open_tensors(path) as f:
        try:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}: damaged safetensors file ({error})") from None
        written = (f.metadata() or {}).get("sha256")
    if written is not None and written != _digest(tensors.items()):
        raise UserError(f"{path}: damaged: its values are not those that were written; get the file again")
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, with a hash of the values in its header."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with publish(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", "sha256": _digest(tensors.items())})
        _sort_metadata(temporary)


def stream_tensors(path: Path, shapes: dict[str, Tensor], get: Callable[[str], Tensor]) -> None:
    """The same file as anybody would write who has the tensors, one in memory at a time.

    shapes: a tensor of each name's shape and type, on the meta device, say. get is called once a name, in their order.
    The file is fsynced, under its own name: publish it, or write into a folder that is.
    """
    header: dict[str, Any] = {}
    at = 0
    for name in sorted(shapes):
        like = shapes[name]
        header[name] = {"dtype": _NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [at, at + like.nbytes]}
        at += like.nbytes
    with open(path, "wb") as f:
        _write_header(f, header, "0" * 64)
        h = hashlib.sha256()
        for name in sorted(shapes):
            tensor = get(name).detach().cpu().contiguous()
            assert tensor.shape == shapes[name].shape and tensor.dtype == shapes[name].dtype, name
            data = tensor.flatten().view(torch.uint8).numpy().data
            h.update(data)
            f.write(data)
        f.seek(0)
        _write_header(f, header, h.hexdigest())
        f.flush()
        os.fsync(f.fileno())


def _write_header(f: Any, header: dict[str, Any], digest: str) -> None:
    whole = {"__metadata__": {"format": "pt", "sha256": digest}, **header}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    f.write(struct.pack("<Q", len(text)) + text)


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the bytes of tensors in the order of their names."""
    h = hashlib.sha256()
    for _, tensor in sorted(tensors, key=lambda item: item[0]):
        h.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return h.hexdigest()


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in a random order; in one order, equal contents are equal files."""
    with open(path, "r+b") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        f.seek(8)
        f.write(text)
