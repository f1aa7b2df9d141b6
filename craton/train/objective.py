"""What a batch teaches: pure functions (network, batch) -> (loss, sums) for the one loop."""

from collections.abc import Callable

from torch import Tensor

from craton.corpus.batches import Batch
from craton.model.decoder import Decoder

Objective = Callable[[Decoder, Batch], tuple[Tensor, Tensor]]


def next_token(network: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token. Returns the weighted sum, to differentiate, and nll (rows, time) in nats."""
    return network.weighted_nll(batch.ids, batch.target, batch.weight, batch.start)
