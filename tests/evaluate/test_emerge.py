"""Abilities that appear with size, in a ladder small enough for a test: models trained here, and a control."""

import json
import math

import pytest

from craton.corpus.build import BuildOptions, build
from craton.evaluate.emerge import _none_of, _voted, emerge
from craton.report.emergence import write_emergence
from craton.report.page import write_report
from craton.tasks.export import write_rows
from craton.tasks.find import find_tasks
from craton.tasks.scorers import Verdict
from craton.tasks.task import Example
from craton.train.recipe import Recipe
from craton.train.start import train

STEPS = 270


def rung(corpus, out, layers, width, steps):
    recipe = Recipe()
    recipe.run.steps, recipe.run.evaluate_every, recipe.run.evaluate_tokens = steps, steps, 2048
    recipe.run.evaluate_tasks = "maps=3"
    recipe.model.num_hidden_layers, recipe.model.hidden_size = layers, width
    recipe.data.sequence_length, recipe.data.batch_tokens, recipe.data.document_mask = 64, 3072, True
    recipe.optimizer.matrix_lr = 0.05
    train([str(corpus)], out, recipe)
    return str(out)


def test_learning_in_context_appears_with_size(tmp_path, monkeypatch):
    """Shots teach a model of 2 x 64 a made-up function, one of 1 x 16 not; nor one of 2 x 64 whose shots in training
    followed no function. By the smooth measure too."""
    monkeypatch.setenv("CRATON_CACHE", str(tmp_path / "cache"))
    for name in ("maps", "maps:unrelated"):
        file = tmp_path / f"{name.replace(':', '-')}.jsonl"
        write_rows(f"{name}=3", file, "train", 16, 16_000, 0)
        build(BuildOptions([str(file)], ["near"], [], vocab_size=300), tmp_path / file.stem)
    small = rung(tmp_path / "maps", tmp_path / "small", 1, 16, STEPS)
    large = rung(tmp_path / "maps", tmp_path / "large", 2, 64, STEPS)
    control = rung(tmp_path / "maps-unrelated", tmp_path / "control", 2, 64, STEPS)
    found = emerge(
        [small, large, control], find_tasks("maps=3,maps:unrelated=3"), [0, 12], 200, [1, 4], tmp_path / "out"
    )
    gain = {row["model"]: row for f in found["findings"] if "follow" in f["what"] for row in f["rows"]}
    assert gain[large]["clear"] and gain[large]["after"] > 0.55
    assert not gain[small]["clear"] and not gain[control]["clear"]
    smooth = {(p["model"], p["shots"]): p["smooth"] for p in found["points"] if p["task"] == "maps=3"}
    assert smooth[large, 12] > smooth[control, 12] + 0.3 and smooth[large, 12] > smooth[large, 0] + 0.3
    sizes = {m["name"]: m for m in found["models"]}
    assert sizes[small]["parameters"] < sizes[large]["parameters"] and sizes[large]["tokens"] == STEPS * 3072
    assert {line["n"] for line in found["compute"]} == {1, 4}
    page = write_emergence(tmp_path / "out").read_text()
    assert "helps" in page and "no clear gain" in page
    record = json.loads((tmp_path / "large" / "record.json").read_text())
    assert record["looks"][-1]["tasks"]["maps=3"] > 0.5  # scored while it was trained
    assert "Tasks" in write_report(tmp_path / "large").read_text()


def test_votes_and_best_of():
    """The most frequent answer counts; the estimate of pass@k is the field's."""
    e = Example(0, ("p",))
    said = [Verdict(0.0, "b"), Verdict(1.0, "x ; a"), Verdict(1.0, "a")]
    assert _voted(e, said) == 1.0 and _voted(e, said[:2]) == 0.0
    assert _none_of(10, 3, 1) == pytest.approx(0.7)
    assert _none_of(10, 3, 5) == pytest.approx(math.comb(7, 5) / math.comb(10, 5))
