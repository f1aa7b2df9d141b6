"""What a training run is, whatever it trains: the loop (loop.py) knows only these.

Pretraining is one such job (pretrain.py); docs/extending.md makes another in a few lines.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from craton.train.distributed import Processes


@dataclass(frozen=True)
class Losses:
    """What an objective says of some rows. All scalars; the loop adds them up over the pieces of a batch and over
    processes, in an order that does not depend on how many there are, and then divides."""

    total: Tensor  # the sum of losses, with a gradient
    count: Tensor  # what the whole batch's sum is divided by, the sum of weights, say
    sums: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # further figures: name -> (sum, count)


Objective = Callable[[Any, Any], Losses]  # (network, batch) -> Losses
Kind = Callable[[str, nn.Parameter], str]  # (name, parameter) -> 'matrix', 'embedding', 'head' or 'norm'


class Source(Protocol):
    """Batches. Any dataclass of tensors whose first dimension is rows can be one; None stands for a missing tensor."""

    rows: int  # of a batch
    together: int  # rows that belong together and are never separated: 2 for pairs

    def batch(self, number: int, share: int, shares: int, network: nn.Module) -> Any:
        """The rows of batch `number` that fall to a share: every shares-th group of `together`, from `share` on.

        A pure function of its arguments. network is for sources whose rows depend on the weights (rollouts); it has the
        weights of the step that the batch is for.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """For the record."""
        ...


class Store(Protocol):
    """A network and the folder that it becomes. weights_file: the name of the released weights; model.safetensors where
    a store has none."""

    def build(self) -> nn.Module:
        """The network, on the meta device or with its weights; requires_grad says which parameters are trained."""
        ...

    def rows(self, name: str, shape: tuple[int, ...], first: int, count: int) -> Tensor:
        """Rows first ... first + count of a parameter or of a buffer that is stored, as the run begins: drawn, or read
        from a folder."""
        ...

    def units(self, network: nn.Module) -> list[list[nn.Module]]:
        """Modules whose parameters are gathered together where they are sharded, in the order of the forward pass.
        What is in none of them is gathered with the network itself."""
        ...

    def forwards(self, network: nn.Module) -> Iterable[tuple[nn.Module, str]]:
        """Methods that use a module's parameters besides `forward`."""
        ...

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The run's tensors, or stand-ins of their shapes, under the names and in the shapes of the released folder,
        each a view."""
        ...

    def write_rest(self, out: Path) -> None:
        """Everything of the released folder but the weights."""
        ...


@dataclass(frozen=True)
class Cost:
    """What a row costs, for figures of speed."""

    unit: str  # 'tokens'
    units: int  # in a row
    flops: float  # forward and backward
    matrix_flops: float  # of those, in products with weights: what is compared with the machine's peak


@dataclass(frozen=True)
class Looked:
    """figures: for the metrics and the record. line: for the reader."""

    figures: dict[str, Any]
    line: str = ""


@dataclass(frozen=True)
class Job:
    """See each field's type. look: held-out numbers and samples, called by all processes together. kind: of a trained
    parameter, which decides its learning rate. further: more figures from a step's means ('loss' and the names of
    sums)."""

    name: str
    source: Source
    objective: Objective
    store: Store
    cost: Cost
    kind: Kind
    look: Callable[[Any, Processes], Looked] = lambda network, processes: Looked({})
    further: Callable[[dict[str, float]], dict[str, float]] = lambda means: {}


def on(batch: Any, device: str) -> Any:
    """The same batch on a device."""
    if device == "cpu":
        return batch
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return type(batch)(**{k: _moved(v, device) if isinstance(v, Tensor) else v for k, v in values.items()})


def _moved(values: Tensor, device: str) -> Tensor:
    """From memory that does not move, so that the host need not wait."""
    return values if values.device.type != "cpu" else values.pin_memory().to(device, non_blocking=True)
