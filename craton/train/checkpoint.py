"""Checkpoints that are whole or absent, and never trusted unread.

    training/step-00000200/model.safetensors       all parameters, fp32
                           optimizer.safetensors   'field/parameter' -> tensor
                           state.json              step, data position, recent losses
                           manifest.json           SHA-256 and size of each file; written last

A checkpoint is written under a temporary name, fsynced, and renamed. Resume verifies every byte, newest first. The
same files come from any number of processes and load on any other.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from craton.base import UserError, as_json, fsync, sha256, write_json
from craton.weights.folder import read_tensors, write_tensors

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def save(
    folder: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Publish training/step-N and remove all but the newest `keep`. UserError on a full disk, older ones untouched."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_tensors(temporary / "model.safetensors", model)
        write_tensors(temporary / "optimizer.safetensors", optimizer)
        write_json(temporary / "state.json", state)
        write_json(
            temporary / "manifest.json",
            {name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in FILES},
        )
        fsync(temporary)
        if final.exists():  # a damaged one of the same step, refused before
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        what = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{final}: cannot write the checkpoint ({what}); the last one is intact, free some space and go on with "
            "--resume"
        ) from None
    for old in _all(folder)[keep:]:
        shutil.rmtree(old)
    return final


def _all(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        text = (path / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or set(manifest) != set(FILES) or text != as_json(manifest):
            return "manifest.json is not the one that was written"
        for name, facts in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
            if sha256(file) != facts["sha256"]:
                return f"{name} differs from its hash"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json is unreadable ({error})"
    return None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Model, optimizer and state of a verified checkpoint. UserError if it is damaged."""
    if problem := verify(path):
        raise UserError(f"{path}: damaged checkpoint ({problem})")
    state = json.loads((path / "state.json").read_text())
    return read_tensors(path / "model.safetensors"), read_tensors(path / "optimizer.safetensors"), state


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for every newer one that does not.

    Raises UserError if there are checkpoints and none is valid.
    """
    refused: list[str] = []
    for path in _all(folder):
        problem = verify(path)
        if problem is None:
            return path, refused
        refused.append(f"{path}: damaged, not used ({problem})")
    if refused:
        raise UserError(f"{refused[0]}; no valid checkpoint is left, start again with another --out")
    return None, []
