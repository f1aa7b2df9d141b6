"""Checkpoints that are whole or absent, and never trusted unread.

    training/step-00000200/weights-00000.safetensors     the first process's pieces of the parameters
                           optimizer-00000.safetensors   and of 'field/parameter' -> tensor
                           state.json                    step, data position, recent losses
                           manifest.json                 which pieces lie where; SHA-256 and size of each file

Every process writes its own pieces, boxes of the whole tensors, so that nothing is gathered; the manifest says where
each box lies, so that any number of processes, and any mesh, can read what it needs. A checkpoint is written under a
temporary name, fsynced, and renamed; resume verifies every byte, newest first.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from craton.base import UserError, as_json, fsync, sha256, write_json
from craton.train.distributed import Box, Processes, box, local
from craton.weights.tensorfile import open_tensors, stream_tensors

FORMAT = "craton-checkpoint-2"
KINDS = ("weights", "optimizer")
Tensors = dict[str, dict[str, Tensor]]  # for each of KINDS, by name, sharded or not
OLD = "of craton 0.1, which this version does not take up; its model opens as it is, start a new run with another --out"


def save(folder: Path, step: int, tensors: Tensors, state: dict[str, Any], processes: Processes, keep: int) -> Path:
    """Publish training/step-N and remove all but the newest `keep`. Collective. UserError on a full disk, older
    checkpoints untouched."""
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    if processes.first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)
    processes.barrier()
    problem: str | None = None
    facts: dict[str, Any] = {}
    pieces: dict[str, Any] = {}
    try:
        facts, pieces = _write_pieces(temporary, tensors, processes)
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    written = processes.gather((problem, facts, pieces))
    problem = next((p for p, _, _ in written if p), None)
    if processes.first and not problem:
        problem = _publish(final, temporary, state, written)
    if problem := processes.agree(problem):
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
        fix = "the last one is intact, free some space and go on with --resume"
        raise UserError(f"{final}: cannot write the checkpoint ({problem}); {fix}")
    if processes.first:
        for old in _all(folder)[keep:]:
            shutil.rmtree(old)
    return final


def _write_pieces(folder: Path, tensors: Tensors, processes: Processes) -> tuple[dict[str, Any], dict[str, Any]]:
    """This process's files: their facts, and for each kind and tensor its whole shape and where the piece lies."""
    facts: dict[str, Any] = {}
    pieces: dict[str, Any] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        own = {}
        for name, tensor in tensors[kind].items():
            offset, shape = box(tensor)
            shared = local(tensor) is tensor  # the same on every process: the first one keeps it
            if all(shape) and (processes.first or not shared):
                own[name] = local(tensor)
                pieces[kind][name] = {"shape": list(tensor.shape), "offset": list(offset), "size": list(shape)}
        path = folder / f"{kind}-{processes.rank:05d}.safetensors"
        stream_tensors(path, own, own.__getitem__)
        facts[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return facts, pieces


def _publish(final: Path, temporary: Path, state: dict[str, Any], written: list[Any]) -> str | None:
    """State and manifest, then the rename. written: (_, facts, pieces) of each process. Returns what went wrong."""
    try:
        write_json(temporary / "state.json", state)
        file = temporary / "state.json"
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}}
        tensors: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for rank, (_, own_files, own_pieces) in enumerate(written):
            files |= own_files
            for kind, named in own_pieces.items():
                for name, piece in named.items():
                    whole = tensors[kind].setdefault(name, {"shape": piece["shape"], "pieces": []})
                    where = {"file": f"{kind}-{rank:05d}.safetensors"}
                    whole["pieces"].append(where | {k: piece[k] for k in ("offset", "size")})
        manifest = {"format": FORMAT, "files": files, "tensors": tensors}
        write_json(temporary / "manifest.json", manifest | {"sha256": _hash(manifest)})
        fsync(temporary)
        if final.exists():  # a damaged one of the same step, refused before
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync(final.parent)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(as_json(manifest).encode()).hexdigest()


def _all(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest. UserError if it is not one that was written whole by this version."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: damaged checkpoint (manifest.json is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged checkpoint (manifest.json is unreadable: {error})") from None
    if isinstance(manifest, dict):
        if set(manifest) == {"model.safetensors", "optimizer.safetensors", "state.json"}:
            raise UserError(f"{path}: a checkpoint {OLD}", code="older_version")
        written = manifest.pop("sha256", None)
        if manifest.get("format") == FORMAT and written == _hash(manifest):
            return manifest
    raise UserError(f"{path}: damaged checkpoint (manifest.json is not the one that was written)")


def verify(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. Of the files, every shares-th is read, from `share` on."""
    try:
        manifest = read_manifest(path)
        for number, (name, facts) in enumerate(sorted(manifest["files"].items())):
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
            if number % shares == share and sha256(file) != facts["sha256"]:
                return f"{name} differs from its hash"
        for kind in KINDS:
            for name, whole in manifest["tensors"][kind].items():
                if problem := _gaps(name, whole):
                    return problem
    except UserError as error:
        if error.code == "older_version":
            raise
        return str(error).partition("damaged checkpoint (")[2].removesuffix(")")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is unreadable ({error})"
    return None


def _gaps(name: str, whole: dict[str, Any]) -> str | None:
    """Whether the pieces of a tensor make it whole."""
    covered = torch.Size(whole["shape"]).numel()
    held = sum(torch.Size(p["size"]).numel() for p in whole["pieces"])
    return None if held == covered else f"the pieces of {name} hold {held} values, not {covered}"


def newest_valid(folder: Path, processes: Processes) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for every newer one that does not. Collective.

    Raises UserError if there are checkpoints and none is valid, or if they are of an older version.
    """
    refused: list[str] = []
    for name in processes.agree([p.name for p in _all(folder)]):
        path = folder / name
        try:
            own: Any = verify(path, processes.rank, processes.world)
        except UserError as error:
            own = error
        problems = [p for p in processes.gather(own) if p is not None]
        if not problems:
            return path, refused
        if isinstance(problems[0], UserError):
            raise problems[0]
        refused.append(f"{path}: damaged, not used ({problems[0]})")
    if refused:
        raise UserError(f"{refused[0]}; no valid checkpoint is left, start again with another --out")
    return None, []


class Checkpoint:
    """A verified checkpoint, opened for reading in boxes."""

    def __init__(self, path: Path):
        self.path, self.manifest = path, read_manifest(path)
        self.files: dict[str, Any] = {}
        self.stack = ExitStack()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    @property
    def state(self) -> dict[str, Any]:
        """state.json."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    def names(self, kind: str) -> dict[str, tuple[int, ...]]:
        """The tensors of a kind with their whole shapes."""
        return {name: tuple(whole["shape"]) for name, whole in self.manifest["tensors"][kind].items()}

    def read(self, kind: str, name: str, wanted: Box) -> Tensor:
        """A box of a tensor, put together from the pieces that reach into it. UserError if a piece is not there."""
        out: Tensor | None = None
        for piece in self.manifest["tensors"][kind][name]["pieces"]:
            if (common := _overlap(wanted, piece)) is None:
                continue
            here, there = common
            part = self._slice(piece["file"], name, there)
            out = torch.empty(wanted[1], dtype=part.dtype) if out is None else out
            out[here] = part
        if out is None:
            raise UserError(f"{self.path}: tensor {name} is missing; start again with another --out")
        return out

    def _slice(self, file: str, name: str, place: tuple[slice, ...]) -> Tensor:
        if file not in self.files:
            self.files[file] = self.stack.enter_context(open_tensors(self.path / file))
        opened = self.files[file]
        return opened.get_slice(name)[place] if place else opened.get_tensor(name)


def _overlap(wanted: Box, piece: dict[str, Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a box and a piece meet, as places within the first and within the second; None if they do not."""
    here, there = [], []
    for a, n, b, m in zip(*wanted, piece["offset"], piece["size"], strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        here.append(slice(low - a, high - a))
        there.append(slice(low - b, high - b))
    return tuple(here), tuple(there)


def whole_tensors(path: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a kind, one after the other, put together. UserError if the checkpoint is damaged."""
    if problem := verify(path):
        raise UserError(f"{path}: damaged checkpoint ({problem})")
    with Checkpoint(path) as opened:
        for name, shape in opened.names(kind).items():
            yield name, opened.read(kind, name, ((0,) * len(shape), shape))


def as_folder(checkpoint: Path, place: Path) -> Path:
    """A checkpoint of a run as a model folder under `place`, made once."""
    from craton.model.decoder import Decoder
    from craton.weights.folder import read_config, write_network

    run = checkpoint.parent.parent
    out = place / sha256(checkpoint / "manifest.json")[:16]
    if not out.exists():
        network = Decoder(read_config(run))
        parameters = dict(network.named_parameters())
        with torch.no_grad():
            for name, tensor in whole_tensors(checkpoint, "weights"):
                if name in parameters:  # a tied head is the embedding
                    parameters[name].copy_(tensor)
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        write_network(temporary, network, run)
        os.rename(temporary, out)
    return out
