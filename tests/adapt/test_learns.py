"""Reinforcement finds what the next token alone does not (recipes/parity, small): six bits, unseen strings."""

import pytest

from craton.adapt.opened import Given
from craton.adapt.tune import tune
from craton.corpus.build import BuildOptions, build
from craton.tasks import generated
from craton.tasks.export import write_rows
from craton.train.recipe import Recipe, parse_setting
from craton.train.start import train


def recipe(*settings):
    r = Recipe()
    for text in settings:
        parse_setting(r, text)
    return r


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model that has read parities, three in seven with their steps written."""
    monkeypatch.setattr(generated, "TEST_ROWS", 40)
    write_rows("parity=6", tmp_path / "direct.jsonl", "train", 0, 4000, 0)
    write_rows("parity:scratchpad=6", tmp_path / "steps.jsonl", "train", 0, 3000, 1000)
    files = [str(tmp_path / "direct.jsonl"), str(tmp_path / "steps.jsonl")]
    build(BuildOptions(files, ["near"], [], vocab_size=300), tmp_path / "corpus")
    how = recipe(
        "run.steps=250", "run.evaluate_every=1000", "run.evaluate_tokens=1024", "model.num_hidden_layers=2",
        "model.hidden_size=64", "data.sequence_length=128", "data.batch_tokens=2048", "data.document_mask=true",
        "optimizer.matrix_lr=0.04", "safety.spike_sigmas=0",
    )  # fmt: skip
    train([str(tmp_path / "corpus")], tmp_path / "base", how)
    return str(tmp_path / "base")


def test_reinforcement_finds_that_steps_help(base, tmp_path):
    """Right answers alone are rewarded. Before, which is the control, the model is right about as often as chance has
    it; after, mostly, and its answers are longer."""
    how = recipe(
        "run.steps=40", "run.evaluate_every=40", "tune.method=grpo", "tune.lora=0", "tune.lr=6e-4", "tune.answers=16",
        "tune.rows=256", "tune.max_tokens=16",
    )  # fmt: skip
    summary = tune(Given(base, [], tmp_path / "reasoner", how, "parity:scratchpad=6"))
    before, after = summary["before"], summary["after"]
    assert before["score"] <= 0.65 and after["score"] >= 0.8, (before, after)
    assert after["pass@1"] >= 0.78 and after["answer_tokens"] > before["answer_tokens"] + 1
