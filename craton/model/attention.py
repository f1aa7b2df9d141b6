"""What an attention is, and which keys a batch's queries may see."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention, apart from its weights."""

    scale: float  # of the scores
    window: int | None = None  # positions that a query sees, its own included; None: all
    softcap: float | None = None  # bounds the scores by a tanh (arXiv 2408.00118)
    causal: bool = True  # False: every query sees every key of its document


class Spans:
    """The documents of one batch, looked at once for all layers.

    document_start: (batch, time) int32, non-decreasing: the position at which each token's document begins; None where
    documents are not kept apart.
    """

    def __init__(self, document_start: Tensor | None, like: Tensor):
        """like: (batch, time, ...), of the batch's shape and device."""
        self.document_start, self.shape, self.device = document_start, like.shape[:2], like.device
        self._first_key: dict[int | None, Tensor | None] = {None: document_start}

    def first_key(self, window: int | None) -> Tensor | None:
        """(batch, time) int32: the first position that each query may see; None: the first of all."""
        time = self.shape[1]
        window = None if window is None or window >= time else window
        if window not in self._first_key:
            assert window is not None
            first = (torch.arange(time, dtype=torch.int32, device=self.device) - (window - 1)).clamp_(min=0)
            start = self.document_start
            moved = first.expand(self.shape) if start is None else torch.maximum(start, first)
            self._first_key[window] = moved.contiguous()
        return self._first_key[window]
