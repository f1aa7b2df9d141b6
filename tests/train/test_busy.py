"""Training beside other work: time budgets are kept, limits obeyed, and what was stopped goes on."""

import dataclasses
import json
import os
import shutil
import time

import pytest

from craton.base import UserError, limits
from craton.corpus.store import Corpus
from craton.train import memory, schedule
from craton.train.metrics import read_metrics
from craton.train.plan import shape
from craton.train.pretrain import next_token, pretraining
from craton.train.recipe import Recipe
from craton.train.schedule import Pace, Schedule
from craton.train.start import train
from craton.train.trace import trace
from tests.conftest import craton, prose, small
from tests.train.test_train import losses, sha


def slower(seconds, after=0.0):
    """Pretraining on a machine that gets busy: each step takes so much longer, from `after` seconds on."""
    began = time.monotonic()

    def objective(network, batch):
        if time.monotonic() - began > after:
            time.sleep(seconds)
        return next_token(network, batch)

    return lambda *args: dataclasses.replace(pretraining(*args), objective=objective)


def budgeted(text, **settings):
    recipe = small(run__budget=text, run__keep_checkpoints=1000, run__checkpoint_every=20, **settings)
    recipe.run.steps = recipe.run.evaluate_every = None
    return recipe


@pytest.fixture(scope="module")
def slowed(corpus, tmp_path_factory):
    """A run of fourteen seconds on a machine that becomes several times slower in the middle of it."""
    out, began = tmp_path_factory.mktemp("slowed") / "m", time.monotonic()
    train([str(corpus)], out, budgeted("14s"), make_job=slower(0.06, after=5.0))
    return out, time.monotonic() - began


def test_a_time_budget_is_kept_on_a_machine_that_gets_slower(slowed):
    out, took = slowed
    assert 10 < took < 17
    record = json.loads((out / "record.json").read_text())
    moves = [e for e in record["events"] if e["event"] == "end_moved"]
    assert moves and record["steps"] < record["planned_steps"] and record["status"] == "finished"
    shares = [r["lr_share"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]
    assert shares[-1] < 0.1 and max(shares) == 1.0  # it did decay
    assert all(abs(a - b) < 0.2 for a, b in zip(shares[10:], shares[11:], strict=False))  # without a jump


def test_a_resumed_run_moves_its_end_just_so(corpus, slowed, tmp_path):
    whole = slowed[0]
    out = tmp_path / "m"
    shutil.copytree(whole, out)
    checkpoints = sorted((out / "training").glob("step-*"))
    for path in checkpoints[len(checkpoints) // 3 :]:
        shutil.rmtree(path)
    train([str(corpus)], out, budgeted("14s"), resume=True)
    assert sha(out) == sha(whole) and losses(out) == losses(whole)


def test_a_moved_end():
    recipe = small(run__steps=100, schedule__warmup_steps=0, schedule__decay_share=0.4, schedule__final_share=0.0)
    plan = schedule.planned(recipe)
    assert plan == Schedule(100, 60)
    earlier = plan.moved(recipe, 30, 70)
    assert earlier == Schedule(70, 42) and earlier.share(recipe, 30) == 1.0
    at_once = plan.moved(recipe, 50, 60)
    assert at_once == Schedule(60, 50) and at_once.share(recipe, 50) == 1.0 and at_once.share(recipe, 55) == 0.5
    falling = plan.moved(recipe, 80, 90)
    assert falling.share(recipe, 80) == plan.share(recipe, 80) == 0.5 and falling.share(recipe, 85) == 0.25
    later = plan.moved(recipe, 30, 200)
    assert later == Schedule(200, 120)


def test_a_pace_does_not_chase_noise():
    pace, plan = Pace(time.monotonic() + 85), Schedule(80, 40)
    for _ in range(12):
        pace.stepped(1.2)
    assert pace.steps_for(12, plan, 10, 10) is None  # 68 steps left, and 69 fit
    slow = Pace(time.monotonic() + 100)
    for _ in range(12):
        slow.stepped(5.0)
    assert 12 + 17 <= slow.steps_for(12, plan, 10, 10) <= 12 + 20
    assert slow.steps_for(12, plan, 10, 10) is None  # not again within the second


def test_memory_is_estimated_before_it_is_taken(corpus, tmp_path):
    recipe = Recipe()
    c = shape(recipe, 40, Corpus(corpus))
    assert 40e9 < memory.training_bytes(c, recipe, 1) < 80e9
    assert memory.training_bytes(c, recipe, 4) < 0.5 * memory.training_bytes(c, recipe, 1)
    done = craton("train", corpus, "--depth", 60, "--out", tmp_path / "m")
    assert done.returncode == 2 and "GB of memory" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "m").exists()


def test_containers_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_CGROUP", tmp_path)
    own = tmp_path / "a" / "b"
    own.mkdir(parents=True)
    monkeypatch.setattr(limits, "_own_groups", lambda: [(own, True), (tmp_path / "a", True), (tmp_path, True)])
    (own / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("190000 100000\n")
    assert limits.processors() == 1
    (own / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text(str(1 << 30))
    (tmp_path / "a" / "memory.current").write_text(str(700 << 20))
    (tmp_path / "a" / "memory.stat").write_text(f"anon 5\ninactive_file {200 << 20}\n")
    assert limits.free_memory() == 524 << 20
    monkeypatch.setattr(limits, "_own_groups", lambda: [(own, False)])
    (own / "cpu.cfs_quota_us").write_text("-1\n")
    (own / "cpu.cfs_period_us").write_text("100000\n")
    assert limits.processors() == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def test_documents_are_made_a_corpus_first(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(prose(i, 40))
    out = tmp_path / "m"
    monkeypatch.chdir(tmp_path)
    train(["docs"], out, small(run__steps=4))
    assert "A corpus of the documents" in capsys.readouterr().out
    corpus = Corpus(tmp_path / "m-corpus")
    assert corpus.manifest["counts"]["documents"] == 30
    (folder / "more.txt").write_text(prose(77, 40))
    train(["docs"], tmp_path / "n", small(run__steps=4))
    shutil.rmtree(out)
    train(["docs"], out, small(run__steps=4))  # the documents changed: the corpus is made again
    assert Corpus(tmp_path / "m-corpus").manifest["counts"]["documents"] == 31
    train([str(tmp_path / "n-corpus"), f"{folder}/*.txt"], tmp_path / "o", small(run__steps=4))
    assert Corpus(tmp_path / "o-corpus").manifest["options"]["tokenizer"] == str(tmp_path / "n-corpus" / "tokenizer")
    monkeypatch.chdir(folder)  # relative names still lead to the documents
    assert trace(out, 3)["documents"] and "docs" in trace(out, None, 2)["documents"][0]["document"]


def test_a_refused_run_leaves_the_corpus_of_another(tmp_path):
    (tmp_path / "a.txt").write_text(prose(1, 400))
    (tmp_path / "b.txt").write_text(prose(2, 400))
    train([str(tmp_path / "a.txt")], tmp_path / "m", small(run__steps=2))
    before = Corpus(tmp_path / "m-corpus").digest
    with pytest.raises(UserError, match="folder in use"):
        train([str(tmp_path / "b.txt")], tmp_path / "m", small(run__steps=2))
    with pytest.raises(UserError, match="other documents"):
        train([str(tmp_path / "b.txt")], tmp_path / "m", small(run__steps=2), resume=True)
    assert Corpus(tmp_path / "m-corpus").digest == before


def test_a_corpus_of_ones_own_is_not_replaced(tmp_path):
    from craton.corpus.build import BuildOptions, build

    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(prose(i, 40))
    before = build(BuildOptions([f"{tmp_path}/*.txt"], [], [], vocab_size=300), tmp_path / "m-corpus")
    with pytest.raises(UserError, match="which this command did not make"):
        train([f"{tmp_path}/*.txt"], tmp_path / "m", small(run__steps=2))
    assert Corpus(tmp_path / "m-corpus").digest == before["digest"]


def test_what_gave_up_can_be_traced_and_reported(corpus, tmp_path):
    out = tmp_path / "m"
    flags = (
        "--set",
        "optimizer.matrix_lr=1e30",
        "--set",
        "data.sequence_length=128",
        "--set",
        "run.evaluate_tokens=2048",
    )
    done = craton("train", corpus, "--steps", 60, "--depth", 1, *flags, "--out", out)
    assert done.returncode == 2 and "given up" in done.stderr and "Traceback" not in done.stderr
    record = json.loads((out / "record.json").read_text())
    assert record["status"] == "given up" and "rollbacks" in record["problem"]
    traced = craton("corpus", "trace", out, "--batch", 1)
    assert traced.returncode == 0 and "tokens from" in traced.stdout
    with pytest.raises(UserError, match="batches count from 0"):
        trace(out, None, -1)


def test_a_terminal_that_cannot_show_a_sample(corpus, tmp_path):
    page = tmp_path / "greek.txt"
    page.write_text("\n\n".join("αβγ δεζ ηθι κλμ νξο πρσ τυφ χψω " * 40 + str(i) for i in range(40)))
    flags = ("--set", "data.sequence_length=64", "--set", "data.batch_tokens=512", "--set", "run.evaluate_every=5")
    code = "import io, sys; sys.stdout = io.TextIOWrapper(io.FileIO(1, 'w'), encoding='latin-1')\n"
    code += "from craton.cli import main\nmain()\n"
    import subprocess
    import sys

    arguments = ["train", str(page), "--steps", "12", "--depth", "1", *flags, "--out", str(tmp_path / "m")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m" / "report.html").exists() and b"\\u03" in done.stdout
