"""The last stage of a build: tokens into shards, a row a document, and the facts of the manifest."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from craton.base import fsync, sha256
from craton.corpus.clean import read_batch
from craton.corpus.store import DOCUMENT, SPLITS
from craton.text.tokenizer import Tokenizer

FORMAT = "craton-corpus-1"
NOT_STATED = "not stated"  # a licence
SHARD_TOKENS = 128 << 20


class Shards:
    """The files of a corpus, in the making."""

    def __init__(self, out: Path, dtype: str):
        self.out, self.dtype = out, dtype
        for stale in [*out.glob("*.bin"), *out.glob("documents.npy")]:
            stale.unlink()
        self.shards: dict[str, list[str]] = {s: [] for s in SPLITS}
        self.length = dict.fromkeys(SPLITS, 0)
        self.rows: list[tuple[Any, ...]] = []
        self.licenses: dict[int, set[str]] = {}
        self.open_shards: dict[str, Any] = {}

    def write(
        self, batches: list[Path], offsets: ndarray, index: ndarray, keep: ndarray, held: ndarray, follows: ndarray
    ) -> None:
        """Tokens of kept parts to their splits, in order."""
        with open(self.out / "names.bin", "wb") as names:
            for n, path in enumerate(batches):
                with open(path.with_name(f"tokens-{n:06d}.npy"), "rb") as f:
                    lengths, ids = np.load(f, allow_pickle=False), np.load(f, allow_pickle=False)
                pieces = iter(np.split(ids, np.cumsum(lengths)[:-1]))
                for i, document in enumerate(read_batch(path)):
                    g = int(offsets[n]) + i
                    if keep[g]:
                        split = SPLITS[int(held[g])]
                        self._part(split, bool(follows[g]), index[g], next(pieces), document, names)
        for shard in self.open_shards.values():
            shard.close()
        self.table = np.array(self.rows, DOCUMENT)
        with open(self.out / "documents.npy", "wb") as rows_file:
            np.save(rows_file, self.table)

    def _part(self, split: str, follows: bool, facts: Any, ids: ndarray, document: dict[str, str], names: Any) -> None:
        self._shard(split).write(ids.tobytes())
        label = document["name"].encode("utf-8", "replace")[:65_535]
        place = (SPLITS.index(split), follows, facts["source"], self.length[split], len(ids), facts["bytes"])
        self.rows.append((*place, names.tell(), len(label), facts["exact"], facts["start"], facts["page"]))
        names.write(label)
        self.length[split] += len(ids)
        self.licenses.setdefault(int(facts["source"]), set()).add(document["license"] or NOT_STATED)

    def _shard(self, split: str) -> Any:
        """The open shard of a split, a new one where the last is full."""
        names = self.shards[split]
        if split not in self.open_shards or self.length[split] // SHARD_TOKENS >= len(names):
            if split in self.open_shards:
                self.open_shards[split].close()
            names.append(f"{split}-{len(names):05d}.bin")
            self.open_shards[split] = open(self.out / names[-1], "wb")  # noqa: SIM115
        return self.open_shards[split]

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The tokenizer is written too; then the part of the manifest that describes the files, all fsynced."""
        (self.out / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(self.out / "tokenizer")
        shards = [self.out / name for names in self.shards.values() for name in names]
        own = [self.out / "documents.npy", self.out / "names.bin"]
        paths = [*own, *shards, *sorted((self.out / "tokenizer").iterdir())]
        for path in paths:
            fsync(path)
        splits = {}
        for i, split in enumerate(SPLITS):
            rows = self.table[self.table["split"] == i]
            facts = {
                "tokens": self.length[split],
                "documents": int((rows["continued"] == 0).sum()),
                "bytes": int(rows["bytes"].sum()),
            }
            splits[split] = {**facts, "shards": self.shards[split]}
        files = {str(p.relative_to(self.out)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths}
        ids = {"vocab_size": tokenizer.vocab_size, "document_id": tokenizer.document_id}
        return {"format": FORMAT, "dtype": self.dtype, **ids, "splits": splits, "files": files}
