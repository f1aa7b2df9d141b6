"""What a caller may ask of the operations for a while. Each holds in the thread that asked for it, and nowhere else."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

_BATCH_INVARIANT: ContextVar[bool] = ContextVar("batch_invariant", default=False)
_EXACT: ContextVar[bool] = ContextVar("exact_activations", default=False)
_BASE_ONLY: ContextVar[bool] = ContextVar("without_adapters", default=False)
_OBSERVER: ContextVar[Callable[[Tensor], None] | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def _held(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def batch_invariant() -> AbstractContextManager[None]:
    """Inside, a row's fp32 result on a CPU does not depend, to the bit, on the rows beside it. Library products are
    faster for many rows, but sum in an order that depends on how many there are."""
    return _held(_BATCH_INVARIANT, True)


def is_batch_invariant() -> bool:
    """Whether this thread is inside `batch_invariant`."""
    return _BATCH_INVARIANT.get()


def exact_activations() -> AbstractContextManager[None]:
    """Inside, what is multiplied with packed weights is not rounded to 8 bits; much slower for few rows."""
    return _held(_EXACT, True)


def rounds_activations() -> bool:
    """Whether products with packed weights round: in the engine, unless it was asked not to."""
    return _BATCH_INVARIANT.get() and not _EXACT.get()


def without_adapters() -> AbstractContextManager[None]:
    """Inside, layers compute without their low-rank adapters: the network as it was before it was tuned."""
    return _held(_BASE_ONLY, True)


def leaves_out_adapters() -> bool:
    """Whether this thread is inside `without_adapters`."""
    return _BASE_ONLY.get()


def observing(observer: Callable[[Tensor], None]) -> AbstractContextManager[None]:
    """Inside, observer is called with each attention's probabilities (batch, heads, time, keys), layer by layer."""
    return _held(_OBSERVER, observer)


def observer() -> Callable[[Tensor], None] | None:
    """This thread's observer of attention, or None."""
    return _OBSERVER.get()
