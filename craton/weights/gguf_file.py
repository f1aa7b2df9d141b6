"""The container of GGUF, read without copies: settings and tensors by name. The `gguf` package's own reader takes ten
seconds for a vocabulary of 262,000.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from craton.base import UserError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 1 << 28  # items of an array, dimensions and lengths: more is damage


@dataclass
class Stored:
    """A tensor in a file. shape: rows first, as everywhere here."""

    file: mmap.mmap
    name: str
    shape: tuple[int, ...]
    tensor_type: Type
    begin: int

    @cached_property
    def n_bytes(self) -> int:
        """In the file."""
        values, width = gguf.GGML_QUANT_SIZES[self.tensor_type]
        return prod(self.shape) // values * width

    @property
    def data(self) -> np.ndarray:
        """(..., rows, bytes of a row) uint8, of a vector (numbers, bytes of a number); a view of the file."""
        raw = np.frombuffer(self.file, np.uint8, self.n_bytes, self.begin)
        return raw.reshape(*(self.shape[:-1] or self.shape), -1)


class _Header:
    """What is read one after the other. struct.error, ValueError or UnicodeDecodeError where it makes no sense."""

    def __init__(self, file: mmap.mmap):
        self.file, self.at = file, 4

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.file, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size = self.number("Q")
        if size > len(self.file) - self.at:
            raise ValueError("a text ends after the file does")
        self.at += size
        return self.file[self.at - size : self.at].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if count > _MOST or count > len(self.file) - self.at:
            raise ValueError(f"a list of {count} items")
        if kind not in _NUMBERS:
            return [self.value(kind) for _ in range(count)]
        values = struct.unpack_from(f"<{count}{_NUMBERS[kind]}", self.file, self.at)
        self.at += struct.calcsize(f"<{count}{_NUMBERS[kind]}")
        return list(values)


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Settings and tensors of a file by name; of all its parts, if it is the first of several. UserError if it is
    damaged, or a part is missing."""
    fields, tensors = _open_one(path)
    parts = fields.get("split.count", 1)
    if parts <= 1:
        return fields, tensors
    named = re.fullmatch(rf"(.+)-(\d{{5}})-of-{parts:05d}\.gguf", path.name)
    if named is None:
        problem = f"it is one of {parts} parts, and their names must end in -00001-of-{parts:05d}.gguf and so on"
        raise UserError(f"{path}: {problem}")
    if int(named[2]) != 1:
        raise UserError(f"{path}: give the first of the {parts} parts, {named[1]}-00001-of-{parts:05d}.gguf")
    for number in range(2, parts + 1):
        _, more = _open_one(path.with_name(f"{named[1]}-{number:05d}-of-{parts:05d}.gguf"))
        tensors |= more
    if (wanted := fields.get("split.tensors.count", len(tensors))) != len(tensors):
        raise UserError(f"{path}: its parts hold {len(tensors)} tensors, and should {wanted}")
    return fields, tensors


def _open_one(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    try:
        with open(path, "rb") as f:
            if f.read(4) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file")
            file = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        return _read(path, _Header(file))
    except (struct.error, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: damaged GGUF file ({error})") from None


def _read(path: Path, header: _Header) -> tuple[dict[str, Any], dict[str, Stored]]:
    version = header.number("I")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version} is not read; versions 2 and 3 are")
    tensors, count = header.number("Q"), header.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = header.text()
        fields[key] = header.value(header.number("I"))
    out: dict[str, Stored] = {}
    for _ in range(tensors):
        name, dimensions = header.text(), header.number("I")
        if dimensions > 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
        kind, offset = header.number("I"), header.number("Q")
        if max(shape, default=0) > _MOST:
            raise ValueError(f"{name} has shape {shape}")
        out[name] = Stored(header.file, name, shape, Type(kind), offset)
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-header.at // alignment) * alignment
    for t in out.values():
        t.begin += start
        if t.begin + t.n_bytes > len(header.file):
            raise UserError(f"{path}: truncated: tensor {t.name} ends after the file does")
    return fields, out
