"""A run's configuration: what a TOML recipe, `--set` and the flags may say, and how it is checked.

None means "derive it" (plan.py does, and says why). After planning nothing is None, and the resolved recipe is stored
with the run.
"""

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from craton.base import UserError, nearest


@dataclass
class RunPart:
    """How long, and what is kept."""

    seed: int = 0
    budget: str | None = None  # '10m' of wall-clock on this machine, or '1e16flop'
    steps: int | None = None
    checkpoint_every: int | None = None  # steps
    keep_checkpoints: int = 2
    evaluate_every: int | None = None  # steps
    evaluate_tokens: int = 65_536
    precision: str | None = None  # 'fp32' or 'bf16' (matrix products; weights stay fp32)
    compile: str = "auto"  # torch.compile: 'on', 'off', or 'auto': on GPUs when the run is long enough to repay it
    logger: str = "none"  # also log to 'tensorboard', 'wandb' or 'trackio'


@dataclass
class ModelPart:
    """The decoder, in the names of config.json."""

    num_hidden_layers: int | None = None  # the depth, from which the other sizes follow
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    max_position_embeddings: int | None = None


@dataclass
class DataPart:
    """Batches."""

    sequence_length: int | None = None  # tokens a row
    batch_tokens: int | None = None  # tokens a step, over all processes
    micro_tokens: int | None = None  # tokens a forward pass on one process; the rest is accumulated
    document_mask: bool | None = None  # attention stops at document boundaries


@dataclass
class OptimizerPart:
    """Muon for matrices and AdamW for the rest, or AdamW alone."""

    name: str = "muon"  # 'muon' or 'adamw'
    matrix_lr: float | None = None  # Muon: update of unit spectral norm times this
    embedding_lr: float | None = None
    head_lr: float | None = None
    norm_lr: float | None = None
    momentum: float = 0.95
    beta1: float = 0.8
    beta2: float = 0.95
    weight_decay: float | None = None
    clip: float = 1.0  # global gradient norm; 0 is no clipping


@dataclass
class SchedulePart:
    """Learning rate: linear warm-up, stable, linear decay."""

    warmup_steps: int | None = None
    decay_share: float = 0.5  # of the steps
    final_share: float = 0.0  # of the learning rate, at the last step


@dataclass
class SafetyPart:
    """What is done about a loss that is not finite or jumps."""

    spike_sigmas: float = 8.0  # over the mean of the last 64 losses; 0 is off
    most_rollbacks: int = 5


@dataclass
class Recipe:
    run: RunPart = field(default_factory=RunPart)
    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    schedule: SchedulePart = field(default_factory=SchedulePart)
    safety: SafetyPart = field(default_factory=SafetyPart)


CHOICES = {
    "run.precision": ("fp32", "bf16"),
    "run.compile": ("auto", "on", "off"),
    "run.logger": ("none", "tensorboard", "wandb", "trackio"),
    "optimizer.name": ("muon", "adamw"),
}
MAY_BE_ZERO = {
    "run.seed",
    "optimizer.momentum",
    "optimizer.beta1",
    "optimizer.weight_decay",
    "optimizer.clip",
    "optimizer.norm_lr",
    "schedule.warmup_steps",
    "schedule.decay_share",
    "schedule.final_share",
    "safety.spike_sigmas",
    "safety.most_rollbacks",
}


def _types() -> dict[str, Any]:
    """Dotted key -> type of every setting."""
    out = {}
    for part in dataclasses.fields(Recipe):
        for key, hint in typing.get_type_hints(part.type).items():
            options = (
                [a for a in typing.get_args(hint) if a is not type(None)]
                if isinstance(hint, types.UnionType)
                else [hint]
            )
            out[f"{part.name}.{key}"] = options[0]
    return out


def assign(recipe: Recipe, key: str, value: Any, where: str) -> None:
    """Set one dotted key. UserError for an unknown key (the nearest is suggested), a wrong type or a bad value."""
    known = _types()
    if key not in known:
        by_name = {k.split(".")[1]: k for k in known}
        hint = f" (did you mean '{by_name[key]}'?)" if key in by_name else nearest(key, known)
        raise UserError(f"{where}: unknown key '{key}'{hint}")
    kind = known[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {key} must be {kind.__name__}, not {value!r}")
    if key in CHOICES and value not in CHOICES[key]:
        raise UserError(f"{where}: {key} must be one of {', '.join(CHOICES[key])}, not {value!r}")
    if kind in (int, float) and not (value > 0 or (value == 0 and key in MAY_BE_ZERO)):
        raise UserError(f"{where}: {key} must be positive, not {value!r}")
    if key.startswith("schedule.") and kind is float and value > 1:
        raise UserError(f"{where}: {key} is a share and must be at most 1, not {value!r}")
    part, name = key.split(".")
    setattr(getattr(recipe, part), name, value)


def read_recipe(path: Path, recipe: Recipe) -> None:
    """Lay a TOML file over a recipe."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
    for part, values in table.items():
        if not isinstance(values, dict):
            assign(recipe, part, values, str(path))
            continue
        if part not in {f.name for f in dataclasses.fields(Recipe)}:
            raise UserError(
                f"{path}: unknown section '[{part}]'{nearest(part, [f.name for f in dataclasses.fields(Recipe)])}"
            )
        for key, value in values.items():
            assign(recipe, f"{part}.{key}", value, str(path))


def parse_setting(recipe: Recipe, text: str) -> None:
    """Apply one `--set key=value`; the value is written as in TOML, text may go without quotes."""
    key, sign, raw = text.partition("=")
    if not sign:
        raise UserError(f"--set {text}: write it as key=value, for example --set optimizer.matrix_lr=0.01")
    try:
        value = tomllib.loads(f"x = {raw}")["x"]
    except tomllib.TOMLDecodeError:
        value = raw
    assign(recipe, key.strip(), value, f"--set {text}")


def as_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def from_dict(values: dict[str, Any]) -> Recipe:
    return Recipe(**{f.name: f.type(**values[f.name]) for f in dataclasses.fields(Recipe)})  # type: ignore[operator]
