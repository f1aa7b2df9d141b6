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
from typing import Any, Literal

from craton.base import UserError, nearest


def _from_zero(default: Any) -> Any:
    """A setting that may be 0; the others must be above it."""
    return field(default=default, metadata={"zero": True})


def _share(default: float) -> Any:
    """A setting from 0 to 1."""
    return field(default=default, metadata={"zero": True, "most": 1})


@dataclass
class RunPart:
    """How long, and what is kept."""

    seed: int = _from_zero(0)
    budget: str | None = None  # '10m' of wall-clock on this machine, or '1e16flop'
    steps: int | None = None
    checkpoint_every: int | None = None  # steps
    keep_checkpoints: int = 2
    evaluate_every: int | None = None  # steps
    evaluate_tokens: int | None = None  # held out, that are looked at each time
    evaluate_tasks: str = ""  # TASK,TASK,... scored at each look (docs/eval.md)
    precision: Literal["fp32", "bf16"] | None = None  # of matrix products; weights stay fp32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on GPUs when the run is long enough
    recompute: Literal["auto", "on", "off"] = "auto"  # blocks' insides in the backward pass; auto: on GPUs that need it
    logger: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # besides metrics.jsonl


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

    name: Literal["muon", "adamw"] = "muon"
    matrix_lr: float | None = None  # Muon: update of unit spectral norm times this
    embedding_lr: float | None = None
    head_lr: float | None = None
    norm_lr: float | None = _from_zero(None)
    momentum: float = _from_zero(0.95)
    beta1: float = _from_zero(0.8)
    beta2: float = 0.95
    weight_decay: float | None = _from_zero(None)
    clip: float = _from_zero(1.0)  # global gradient norm; 0 is no clipping


@dataclass
class SchedulePart:
    """Learning rate: linear warm-up, stable, linear decay."""

    warmup_steps: int | None = _from_zero(None)
    decay_share: float = _share(0.5)  # of the steps
    final_share: float = _share(0.0)  # of the learning rate, at the last step


@dataclass
class TunePart:
    """How a model is adapted (docs/tune.md)."""

    method: Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo", "distill", "contrastive"] = "sft"
    lora: int | None = _from_zero(None)  # rank of the adapter; 0 trains all weights
    alpha: float = 32.0  # of the adapter: its scale is alpha / rank
    rank_stabilised: bool = False  # alpha / sqrt(rank)
    dora: bool = False  # outputs' lengths are trained apart
    targets: str = ""  # last parts of layers' names, with commas between; '' is all linear ones
    lr: float | None = None  # of everything that is trained
    epochs: float | None = None  # passes over the data
    rows: int | None = None  # of a batch: packed rows, answers in pairs, or prompts times answers
    beta: float | None = _from_zero(None)  # how strongly the reference holds
    gamma: float = _from_zero(1.0)  # SimPO's margin
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "expert"] = "dr_grpo"  # of grpo
    answers: int = 8  # to each prompt
    max_tokens: int | None = None  # of an answer
    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    calculator: bool = False  # answers may ask for sums, as <<48/2= (engine/calculator.py)
    policy: Literal["on", "off"] = "on"  # distillation: of the student's answers, or of the teacher's
    general: str = ""  # a text that the model must not get worse at; '' is one of ours


@dataclass
class SafetyPart:
    """What is done about a loss that is not finite or jumps."""

    spike_sigmas: float = _from_zero(8.0)  # over the mean of the last 64 losses; 0 is off
    most_rollbacks: int = _from_zero(5)


@dataclass
class Recipe:
    """All settings, in sections."""

    run: RunPart = field(default_factory=RunPart)
    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    schedule: SchedulePart = field(default_factory=SchedulePart)
    tune: TunePart = field(default_factory=TunePart)
    safety: SafetyPart = field(default_factory=SafetyPart)
    given: set[str] = field(default_factory=set)  # dotted keys that were asked for, be it for what they were anyway


SECTIONS = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name != "given"}


@dataclass(frozen=True)
class _Rule:
    """What a setting may be."""

    kind: type
    choices: tuple[Any, ...]
    zero: bool
    most: float | None


def _rules() -> dict[str, _Rule]:
    """Dotted key -> rule of every setting."""
    out = {}
    for section, kind in SECTIONS.items():
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):  # type: ignore[arg-type]
            hint = hints[f.name]
            if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
                hint = next(a for a in typing.get_args(hint) if a is not type(None))
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            zero, most = f.metadata.get("zero", False), f.metadata.get("most")
            out[f"{section}.{f.name}"] = _Rule(str if choices else hint, choices, zero, most)
    return out


def assign(recipe: Recipe, key: str, value: Any, where: str) -> None:
    """Set one dotted key. UserError for an unknown key (the nearest is suggested), a wrong type or a bad value."""
    rules = _rules()
    if key not in rules:
        by_name = {k.split(".")[1]: k for k in rules}
        hint = f" (did you mean '{by_name[key]}'?)" if key in by_name else nearest(key, rules)
        raise UserError(f"{where}: unknown key '{key}'{hint}", field=key)
    rule = rules[key]
    if rule.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    problem, number = None, value if isinstance(value, int | float) else 1
    if type(value) is not rule.kind:  # True is no whole number
        problem = f"must be {rule.kind.__name__}"
    elif rule.choices and value not in rule.choices:
        problem = f"must be one of {', '.join(rule.choices)}"
    elif rule.kind in (int, float) and not (number > 0 or (number == 0 and rule.zero)):
        problem = "must be positive"
    elif rule.most is not None and number > rule.most:
        problem = f"is a share and must be at most {rule.most}"
    if problem:
        raise UserError(f"{where}: {key} {problem}, not {value!r}", field=key)
    section, name = key.split(".")
    setattr(getattr(recipe, section), name, value)
    recipe.given.add(key)


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
        if part not in SECTIONS:
            raise UserError(f"{path}: unknown section '[{part}]'{nearest(part, SECTIONS)}", field=part)
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
    """The settings as JSON can hold them; those of tuning only where there are any."""
    used = [section for section in SECTIONS if section != "tune" or recipe.tune != TunePart()]
    return {section: dataclasses.asdict(getattr(recipe, section)) for section in used}


def from_dict(values: dict[str, Any]) -> Recipe:
    """What as_dict gave, as a recipe again."""
    known = {section: kind for section, kind in SECTIONS.items() if section in values}  # older runs have fewer
    return Recipe(**{section: kind(**values[section]) for section, kind in known.items()})  # type: ignore[operator]
