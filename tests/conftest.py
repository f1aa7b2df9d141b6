"""Shared fixtures: a real corpus (the Python library's own source, on every machine) and a tiny trained model."""

import os
import random
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from craton.corpus.build import BuildOptions, build
from craton.train.recipe import Recipe
from craton.train.start import train
from tests.forked import finish, start

STDLIB = Path(sysconfig.get_path("stdlib"))
WORDS = [
    "river",
    "stone",
    "window",
    "garden",
    "market",
    "letter",
    "winter",
    "mountain",
    "teacher",
    "engine",
    "paper",
    "silver",
    "morning",
    "village",
    "ocean",
    "music",
    "doctor",
    "bridge",
    "forest",
    "captain",
    "yellow",
    "copper",
    "simple",
    "gentle",
    "narrow",
    "quiet",
    "broken",
    "early",
    "heavy",
    "distant",
    "walked",
    "opened",
    "carried",
    "followed",
    "listened",
    "answered",
    "painted",
    "measured",
    "gathered",
    "returned",
    "because",
    "although",
    "before",
    "after",
    "under",
    "across",
]
COMMON = ["the", "of", "and", "to", "that", "with", "have", "be", "in", "a"]


def prose(seed: int, sentences: int = 20) -> str:
    """Text that the quality rules take for English prose, different for every seed."""
    r = random.Random(seed)
    made = []
    for _ in range(sentences):
        words = [
            r.choice(WORDS + COMMON * 3) + (str(r.randrange(10_000)) if r.random() < 0.05 else "")
            for _ in range(r.randint(8, 16))
        ]
        made.append(" ".join(words).capitalize() + ".")
    return "\n".join(" ".join(made[i : i + 4]) for i in range(0, sentences, 4))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    build(
        BuildOptions(
            [str(STDLIB / p) for p in ("json", "email", "logging", "argparse.py", "typing.py", "ast.py")],
            [],
            [],
            vocab_size=1024,
        ),
        out,
    )
    return out


def small(**settings: object) -> Recipe:
    """A recipe of a few seconds: one layer of 64, rows of 128."""
    recipe = Recipe()
    recipe.run.steps, recipe.run.checkpoint_every, recipe.run.evaluate_every, recipe.run.evaluate_tokens = (
        30,
        10,
        30,
        2048,
    )
    recipe.model.num_hidden_layers, recipe.model.hidden_size = 1, 64
    recipe.data.sequence_length, recipe.data.batch_tokens = 128, 512
    for key, value in settings.items():
        part, name = key.split("__")
        setattr(getattr(recipe, part), name, value)
    return recipe


@pytest.fixture(scope="session")
def model_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    train([str(corpus)], out, small())
    return out


def craton(*args: object, timeout: float = 300, **more: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return finish(start(*args, **more), timeout)
