"""Vectors of texts, and scores of pairs, by an encoder's folder."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from craton.base import Progress, UserError, amount, digest
from craton.model import kernels
from craton.model.encoder import pooled
from craton.weights.encoder import encoder_hash, read_encoder

_TOKENS = 4096  # of a batch, padding counted
_AHEAD = 4096  # texts whose tokens are known at once, so that those of about one length go together


def _multiplies_bf16() -> bool:
    """Whether the processor has products of bf16, which take half the time or less."""
    flags = kernels.cpu_facts().get("flags", "").split()
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


class TextEncoder:
    """An encoder's folder opened. exact: in fp32 wherever it runs; else in bf16 where the processor multiplies those,
    which moves a vector by about 1e-4 of its length. UserError as of read_encoder."""

    def __init__(self, folder: Path, exact: bool = False):
        self.folder = folder
        self.network, self.tokenizer, self.settings = read_encoder(folder)
        self.hash = digest([encoder_hash(folder), asdict(self.settings)])  # a prefix may come from the folder's name
        self.cut_off = 0  # texts of the last call that were longer than what is taken
        if not exact and _multiplies_bf16():
            self.network.bfloat16()
        self.tokenizer.enable_truncation(self.settings.max_length)
        self.size = self.network.config.hidden_size

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, size) fp32."""
        return self._vectors([self.settings.query_prefix + t for t in texts], None)

    def passages(self, texts: Sequence[str], progress: Progress | None = None) -> np.ndarray:
        """(texts, size) fp32."""
        return self._vectors([self.settings.passage_prefix + t for t in texts], progress)

    def scores(self, query: str, texts: Sequence[str]) -> np.ndarray:
        """(texts,): how well each answers the query, by a cross-encoder. UserError if this is none."""
        if self.network.config.labels != 1:
            raise UserError(f"{self.folder}: not a reranker (a sequence classifier with one label)")
        out = np.empty(len(texts), np.float32)
        encoded = self.tokenizer.encode_batch([(query, text) for text in texts])
        for rows in _batches([len(e.ids) for e in encoded]):
            ids, lengths, types = self._padded([encoded[i] for i in rows])
            with torch.inference_mode():
                out[rows] = self.network.scores(self.network(ids, lengths, types))[:, 0].float().numpy()
        return out

    def _vectors(self, texts: list[str], progress: Progress | None) -> np.ndarray:
        if self.network.config.labels:
            raise UserError(f"{self.folder}: a classifier, which gives no vectors; give an encoder's folder")
        out = np.empty((len(texts), self.size), np.float32)
        s, self.cut_off = self.settings, 0
        for start in range(0, len(texts), _AHEAD):
            encoded = self.tokenizer.encode_batch_fast(texts[start : start + _AHEAD])
            self.cut_off += sum(bool(e.overflowing) for e in encoded)
            done = start
            for rows in _batches([len(e.ids) for e in encoded]):
                ids, lengths, _ = self._padded([encoded[i] for i in rows])
                with torch.inference_mode():
                    vectors = pooled(self.network(ids, lengths).float(), lengths, s.pooling, s.normalise)
                out[start + np.array(rows)] = vectors.numpy()
                done += len(rows)
                if progress is not None:
                    progress.show(f"vectors: {amount(done, '')} of {amount(len(texts), '')}")
        return out

    def _padded(self, encoded: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([len(e.ids) for e in encoded])
        ids = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.long)
        types = torch.zeros_like(ids)
        for i, e in enumerate(encoded):
            ids[i, : len(e.ids)] = torch.tensor(e.ids)
            types[i, : len(e.ids)] = torch.tensor(e.type_ids)
        return ids, lengths, types.clamp_(max=max(0, self.network.config.type_vocab_size - 1))


def _batches(lengths: list[int]) -> list[list[int]]:
    """Numbers of texts that go together: of nearly one length."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    out: list[list[int]] = []
    for i in order:
        if not out or (len(out[-1]) + 1) * lengths[out[-1][0]] > _TOKENS:
            out.append([])
        out[-1].append(i)
    return out
