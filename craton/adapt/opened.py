"""What a run of `craton tune` was asked for, and what it was opened as."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from craton.adapt.data import Sample
from craton.adapt.rows import Renderer
from craton.engine.model import Model
from craton.model.config import ModelConfig
from craton.tasks.task import Task
from craton.text.dialogue import Dialogue
from craton.train.recipe import Recipe


@dataclass
class Given:
    """What `craton tune` was asked for. data: files; task: whose rows are learned, and whose score is told."""

    model: str
    data: list[str]
    out: Path
    recipe: Recipe
    task: str = ""
    teacher: str = ""
    resume: bool = False
    command: str = ""
    began: float = field(default_factory=time.monotonic)


@dataclass
class Opened:
    """Model and data, ready to be learned from."""

    given: Given
    recipe: Recipe
    model: Model
    dialogue: Dialogue | None
    end_ids: tuple[int, ...]
    task: Task | None
    samples: list[Sample]
    held: list[Sample]
    renderer: Renderer
    config: ModelConfig
    facts: dict[str, Any]
