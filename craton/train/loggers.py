"""Metrics for others' dashboards: TensorBoard, Weights & Biases, trackio. metrics.jsonl is written regardless."""

from pathlib import Path
from typing import Any

from craton.base import UserError


class Logger:
    """kind: 'none', 'tensorboard', 'wandb' or 'trackio'. UserError if its package is not installed."""

    def __init__(self, kind: str, out: Path):
        self.kind, self.sink = kind, None
        try:
            if kind == "tensorboard":
                from tensorboard.summary import Writer

                self.sink = Writer(str(out / "tensorboard"))
            elif kind == "wandb":
                import wandb

                self.sink = wandb.init(project="craton", name=out.name, dir=str(out))
            elif kind == "trackio":
                import trackio

                self.sink = trackio.init(project="craton", name=out.name)
        except ImportError:
            raise UserError(f"run.logger {kind}: not installed; pip install 'craton[{kind}]'") from None

    def write(self, row: dict[str, Any]) -> None:
        if self.sink is None:
            return
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        if self.kind == "tensorboard":
            for key, value in numbers.items():
                self.sink.add_scalar(key, value, row["step"])
        else:
            self.sink.log(numbers, step=row["step"])

    def close(self) -> None:
        if self.sink is not None:
            self.sink.close() if self.kind == "tensorboard" else self.sink.finish()
