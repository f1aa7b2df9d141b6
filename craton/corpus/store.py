"""A corpus on disk: `manifest.json`, memory-mapped token shards, one row a document, its tokenizer.

manifest.json      what is here, with hashes, counts, sources and what was dropped
train-00000.bin    token ids, uint16 or uint32 little-endian, documents one after another
heldout-00000.bin  the same, of documents kept out of training
documents.npy      DOCUMENT rows, in stream order within a split
names.bin          document names, UTF-8, addressed by documents.npy
tokenizer/         the tokenizer folder
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from craton.base import UserError, as_json, digest, read_json, sha256
from craton.text.tokenizer import Tokenizer

DOCUMENT = np.dtype(
    [
        ("split", "u1"),  # index into SPLITS
        ("continued", "u1"),  # 1: the next part of the document before it
        ("source", "u4"),
        ("start", "u8"),  # first token in the split's stream
        ("tokens", "u4"),
        ("bytes", "u4"),  # of UTF-8 text
        ("name", "u8"),  # offset into names.bin
        ("name_bytes", "u2"),
        ("digest", "u8", 2),  # BLAKE2b-128 of the text with spaces folded
        ("offset", "u8"),  # characters of the document, as it was decoded, before this text
        ("page", "u4"),  # on which it begins, from 1; 0 where there are no pages
    ]
)
SPLITS = ("train", "heldout")


class Corpus:
    """An opened corpus. `tokens(split)` is one long array over its shards."""

    def __init__(self, folder: Path, verify: bool = True):
        """Raises UserError if the folder is no corpus or, with verify, if any byte differs from the manifest."""
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such corpus; make one with 'craton corpus build SRC --out {folder}'")
        if not (folder / "manifest.json").exists():
            raise UserError(f"{folder}: not a finished corpus (no manifest.json); run its 'craton corpus build' again")
        self.manifest: dict[str, Any] = read_json(folder / "manifest.json")
        try:
            self.dtype = np.dtype(self.manifest["dtype"])
            self.files: dict[str, dict[str, Any]] = self.manifest["files"]
            self.digest: str = self.manifest["digest"]
            splits = self.manifest["splits"]
        except (KeyError, TypeError) as error:
            problem = f"missing or mistyped field ({error})"
            raise UserError(f"{folder}/manifest.json: {problem}; build the corpus again") from None
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        if self.digest != manifest_digest(self.manifest) or text != as_json(self.manifest):
            raise UserError(f"{folder}/manifest.json: altered since it was built; build the corpus again")
        for name, facts in self.files.items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path}: missing; build the corpus again")
            if path.stat().st_size != facts["bytes"] or (verify and sha256(path) != facts["sha256"]):
                raise UserError(f"{path}: damaged (differs from manifest.json); build the corpus again")
        self.documents = np.load(folder / "documents.npy", mmap_mode="r", allow_pickle=False)
        self._shards = {s: [np.memmap(folder / f, self.dtype, "r") for f in splits[s]["shards"]] for s in SPLITS}
        self._starts = {s: np.cumsum([0] + [len(x) for x in self._shards[s]]) for s in SPLITS}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the corpus was made with."""
        return Tokenizer.open(self.folder / "tokenizer")

    def length(self, split: str) -> int:
        """Tokens in a split."""
        return int(self._starts[split][-1])

    def read(self, split: str, start: int, count: int) -> np.ndarray:
        """Tokens start ... start + count of a split's stream, int64."""
        out = np.empty(count, np.int64)
        starts, done = self._starts[split], 0
        while done < count:
            shard = int(np.searchsorted(starts, start + done, "right")) - 1
            offset = start + done - int(starts[shard])
            piece = self._shards[split][shard][offset : offset + count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def rows(self, split: str) -> np.ndarray:
        """DOCUMENT rows of a split, in stream order."""
        return self.documents[self.documents["split"] == SPLITS.index(split)]

    def dropped(self) -> dict[str, dict[str, int]]:
        """Documents and bytes that each rule dropped."""
        return {why: {k: d[k] for k in ("documents", "bytes")} for why, d in self.manifest["dropped"].items()}

    def name_of(self, row: Any) -> str:
        with open(self.folder / "names.bin", "rb") as f:
            f.seek(int(row["name"]))
            return f.read(int(row["name_bytes"])).decode("utf-8", "replace")


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Hash over everything in the manifest but itself."""
    return digest({k: v for k, v in manifest.items() if k != "digest"})
