"""Training: it learns (and a control does not), resumes to the bit, survives kills, faults, spikes and full disks."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import craton as package
from craton.base import UserError, digest, write_json
from craton.corpus.build import BuildOptions, build
from craton.corpus.store import Corpus
from craton.text.tokenizer import Tokenizer
from craton.train import checkpoint
from craton.train.distributed import Processes
from craton.train.job import Losses
from craton.train.metrics import read_metrics
from craton.train.plan import plan
from craton.train.pretrain import next_token, pretraining
from craton.train.start import train
from tests.conftest import craton, prose, small
from tests.forked import finish, start


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def with_objective(objective):
    """Pretraining, but for what a batch teaches."""
    return lambda *args: dataclasses.replace(pretraining(*args), objective=objective)


SETTINGS = (
    "--depth",
    1,
    "--set",
    "model.hidden_size=64",
    "--set",
    "data.sequence_length=128",
    "--set",
    "data.batch_tokens=512",
    "--set",
    "run.evaluate_tokens=2048",
    "--steps",
    60,
    "--checkpoint-every",
    7,
)


def test_the_folder_is_a_model_everywhere(model_folder):
    names = {p.name for p in model_folder.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "record.json",
        "metrics.jsonl",
        "training",
    }
    ours = package.load(str(model_folder))
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    text = "def parse(self, text):\n    "
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == ours.tokenizer.encode(text)
    with torch.no_grad():
        torch.testing.assert_close(ours.network(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    made = theirs.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
    stop = ours.network.config.eos_token_id
    assert ours.generate_ids(text, 64, 0.0) == [i for i in made if i != stop]
    assert ours.generate(text, max_tokens=20, temperature=0) == tokenizer.decode(made[:20], skip_special_tokens=True)


def test_record_and_metrics(model_folder):
    record = json.loads((model_folder / "record.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 30 and record["tokens"] == 30 * 512
    assert record["weights_sha256"] == sha(model_folder) and len(record["curve"]) == 30
    assert record["heldout_bits_per_byte"] > 0 and record["corpora"][0]["digest"] and record["environment"]["torch"]
    assert all(r["lr_share"] >= 0 and r["gradient_norm"] > 0 for r in record["curve"])


def patterned(tmp_path: Path, shuffled: bool) -> Path:
    """Documents in which each word fixes the next; shuffled: the same words in any order."""
    r, table = random.Random(0), {}
    vocabulary = sorted(set(" ".join(prose(i) for i in range(40)).lower().replace(".", "").split()))[:64]
    for w in vocabulary:
        table[w] = r.choice(vocabulary)
    cycle = r.sample(vocabulary, len(vocabulary))
    follow = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    lines = []
    for _ in range(600):
        w, words = r.choice(vocabulary), []
        for _ in range(120):
            words.append(w)
            w = follow[w]
        if shuffled:
            r.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words)}))
    source = tmp_path / f"{shuffled}.jsonl"
    source.write_text("\n".join(lines))
    build(
        BuildOptions([str(source)], ["quality", "near", "exact"], [], vocab_size=420), tmp_path / f"corpus-{shuffled}"
    )
    return tmp_path / f"corpus-{shuffled}"


def accuracy(model_folder: Path, corpus: Path) -> float:
    """Share of held-out tokens that the model ranks first."""
    network, opened = package.load(str(model_folder)).network, Corpus(corpus)
    ids = torch.from_numpy(opened.read("heldout", 0, min(1000, opened.length("heldout")))).unfold(0, 100, 100)
    with torch.no_grad():
        return (network(ids)[:, 10:-1].argmax(-1) == ids[:, 11:]).float().mean().item()


def test_it_learns_and_the_control_does_not(tmp_path):
    for optimizer in ("muon", "adamw"):
        scores = {}
        for shuffled in (False, True):
            corpus = tmp_path / f"corpus-{shuffled}"
            corpus = corpus if corpus.exists() else patterned(tmp_path, shuffled)
            out = tmp_path / f"model-{optimizer}-{shuffled}"
            train([str(corpus)], out, small(run__steps=160 if optimizer == "muon" else 500, optimizer__name=optimizer))
            scores[shuffled] = accuracy(out, corpus)
        assert scores[False] > 0.95, optimizer
        assert scores[True] < 0.6, optimizer  # words are several tokens, so their ends can be known


def test_resume_is_exact(corpus, tmp_path, model_folder):
    out = tmp_path / "m"

    def stop_in_step_17(network, batch, calls=[0]):  # noqa: B006 (counts calls)
        calls[0] += 1
        if calls[0] == 65:  # four pieces a step
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token(network, batch)

    from craton.train.loop import Interrupted

    with pytest.raises(Interrupted):
        train([str(corpus)], out, small(), make_job=with_objective(stop_in_step_17))
    assert json.loads((out / "record.json").read_text())["status"] == "interrupted"
    assert len(losses(out)) == 17
    train([str(corpus)], out, small(), resume=True)
    assert sha(out) == sha(model_folder) and losses(out) == losses(model_folder)
    with pytest.raises(UserError, match=r"run.seed = 0, not 1"):
        train([str(corpus)], out, small(run__seed=1), resume=True)


def test_killed_runs_end_with_the_same_weights(corpus, tmp_path):
    base = ("train", corpus, *SETTINGS, "--out")
    assert craton(*base, tmp_path / "whole").returncode == 0
    out, r, kills = tmp_path / "killed", random.Random(1), 0
    for _ in range(3):
        running = start(*base, out, "--resume")
        time.sleep(r.uniform(0.4, 1.5))
        os.kill(running[0].pid, signal.SIGKILL)
        kills += finish(running, 60).returncode == -signal.SIGKILL
    done = craton(*base, out, "--resume")
    assert done.returncode == 0, done.stderr
    assert kills and sha(out) == sha(tmp_path / "whole") and losses(out) == losses(tmp_path / "whole")


def test_a_bad_loss_is_rolled_back_and_skipped(corpus, tmp_path, capsys):
    poisoned = []

    def objective(network, batch):
        losses = next_token(network, batch)
        if not poisoned:
            poisoned.append(batch.ids.clone()) if objective.calls == 63 else None
        objective.calls += 1
        if poisoned and torch.equal(poisoned[0], batch.ids):
            return Losses(losses.total * float("nan"), losses.count)
        return losses

    objective.calls = 0
    train([str(corpus)], tmp_path / "m", small(), make_job=with_objective(objective))
    record = json.loads((tmp_path / "m" / "record.json").read_text())
    assert record["rollbacks"] == 1 and record["skipped_batches"] == [14, 15] and record["steps"] == 30
    assert "rolled back to step 10" in capsys.readouterr().out
    used = [r["batch"] for r in read_metrics(tmp_path / "m" / "metrics.jsonl") if "loss" in r]
    assert used == [i for i in range(32) if i not in (14, 15)]
    assert record["events"][0]["at_step"] == 15


def test_it_gives_up_after_the_stated_number(corpus, tmp_path):
    def objective(network, batch):
        losses = next_token(network, batch)
        return Losses(losses.total * float("inf"), losses.count)

    with pytest.raises(UserError, match="given up after 2 rollbacks"):
        train([str(corpus)], tmp_path / "m", small(safety__most_rollbacks=2), make_job=with_objective(objective))


def test_resume_takes_the_newest_valid_checkpoint(corpus, tmp_path, model_folder):
    out = tmp_path / "m"
    shutil.copytree(model_folder, out)
    newest = sorted((out / "training").glob("step-*"))[-1]
    file = newest / "optimizer-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = craton("train", corpus, "--out", out, "--resume")
    assert (
        done.returncode == 0
        and f"{newest.name}: damaged, not used" in done.stdout
        and "resumed at step 20" in done.stdout
    )
    assert sha(out) == sha(model_folder)
    for path in (out / "training").glob("step-*"):
        (path / "state.json").unlink()
    done = craton("train", corpus, "--out", out, "--resume")
    assert done.returncode == 2 and "no valid checkpoint is left" in done.stderr


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, model_folder):
    """RLIMIT_FSIZE stands in for a full disk: writes past it fail."""
    code = f"""
import resource, signal, torch, sys
from pathlib import Path
from craton.model import kernels
from craton.text.tokenizer import Tokenizer
from craton.train import checkpoint
from craton.train.distributed import Processes
from craton.train.distributed import Processes
from craton.base import UserError, digest, write_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source = sorted(Path({str(model_folder)!r}, "training").glob("step-*"))[-1]
tensors = {{kind: dict(checkpoint.whole_tensors(source, kind)) for kind in checkpoint.KINDS}}
folder, alone = Path({str(tmp_path)!r}), Processes("cpu")
checkpoint.save(folder, 1, tensors, {{}}, alone, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    checkpoint.save(folder, 2, tensors, {{}}, alone, 2)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot write the checkpoint" in done.stdout and "last one is intact" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.verify(tmp_path / "step-00000001") is None


def test_only_the_last_checkpoints_are_kept(model_folder):
    assert [p.name for p in sorted((model_folder / "training").glob("step-*"))] == ["step-00000020", "step-00000030"]


def test_tied_heads_and_bf16_train_and_open(corpus, tmp_path):
    train([str(corpus)], tmp_path / "t", small(model__tie_word_embeddings=True))
    train([str(corpus)], tmp_path / "b", small(run__precision="bf16"))
    for name in "tb":
        assert losses(tmp_path / name)[-1] < losses(tmp_path / name)[0] - 0.5
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    reference = small()
    train([str(corpus)], tmp_path / "f", reference)
    assert abs(losses(tmp_path / "b")[-1] - losses(tmp_path / "f")[-1]) < 0.05


def test_accumulation_changes_nothing(corpus, tmp_path, model_folder):
    train([str(corpus)], tmp_path / "a", small(data__micro_tokens=128))
    assert max(abs(x - y) for x, y in zip(losses(tmp_path / "a"), losses(model_folder), strict=True)) < 1e-3


BAD = {
    "no corpus": (["{tmp}/absent", "--out", "{tmp}/m", "--steps", "5"], "no such corpus"),
    "no source": (["{tmp}", "--out", "{tmp}/m", "--steps", "5"], "the folder is empty"),
    "weight": (["{corpus}=-1", "--out", "{tmp}/m", "--steps", "5"], "positive weight"),
    "unknown key": (["{corpus}", "--out", "{tmp}/m", "--set", "run.stepz=5"], "did you mean 'run.steps'"),
    "small budget": (["{corpus}", "--out", "{tmp}/m", "--budget", "1s"], "too small for any model"),
    "bad budget": (["{corpus}", "--out", "{tmp}/m", "--budget", "soon"], "--budget soon"),
    "in use": (["{corpus}", "--out", "{corpus}", "--steps", "5"], "folder in use"),
    "misfit": (
        ["{corpus}", "--out", "{tmp}/m", "--steps", "5", "--set", "data.batch_tokens=100"],
        "multiple of data.sequence_length",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(corpus, tmp_path, case):
    args, message = BAD[case]
    before = sorted(corpus.rglob("*"))
    done = craton("train", *(a.format(tmp=tmp_path, corpus=corpus) for a in args))
    assert done.returncode == 2 and "Traceback" not in done.stderr and message in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("craton: error:")]) == 1
    assert not (tmp_path / "m").exists() and sorted(corpus.rglob("*")) == before


def test_a_flag_that_equals_the_default_counts_on_resume(corpus, tmp_path):
    """--seed 0 once went on with a run of seed 5."""
    base = ["train", corpus, "--out", tmp_path / "m", *SETTINGS[:-4], "--steps", "20"]
    assert craton(*base, "--seed", 5).returncode == 0
    refused = craton(*base, "--seed", 0, "--resume")
    assert refused.returncode == 2 and "run.seed = 5, not 0" in refused.stderr
    assert craton(*base, "--resume").returncode == 0


def test_runs_of_the_version_before_are_refused_by_name(corpus, tmp_path, model_folder):
    """They once ended in a traceback. The folder itself opens."""
    out = tmp_path / "m"
    shutil.copytree(model_folder, out)
    settled = json.loads((out / "training" / "recipe.json").read_text())
    del settled["format"]
    settled["digest"] = digest({k: v for k, v in settled.items() if k != "digest"})
    write_json(out / "training" / "recipe.json", settled)
    done = craton("train", corpus, "--out", out, "--resume")
    assert done.returncode == 2 and "craton 0.1" in done.stderr and "Traceback" not in done.stderr
    assert package.load(str(out)).generate("def", max_tokens=3)
    shutil.copytree(model_folder / "training", tmp_path / "training")
    for path in (tmp_path / "training").glob("step-*"):
        files = ("model.safetensors", "optimizer.safetensors", "state.json")
        write_json(path / "manifest.json", {name: {"bytes": 1, "sha256": "0"} for name in files})
    with pytest.raises(UserError, match=r"craton 0\.1") as error:
        checkpoint.newest_valid(tmp_path / "training", Processes("cpu"))
    assert error.value.code == "older_version"


def test_back_to_the_start_is_the_same_network(corpus, tmp_path):
    """A rollback before the first checkpoint once made a second network beside the first, not compiled."""
    seen = []

    def objective(network, batch):
        seen.append(id(network))
        losses = next_token(network, batch)
        return Losses(losses.total * float("nan"), losses.count) if len(seen) == 9 else losses

    train([str(corpus)], tmp_path / "m", small(run__steps=20), make_job=with_objective(objective))
    record = json.loads((tmp_path / "m" / "record.json").read_text())
    assert len(set(seen)) == 1 and record["rollbacks"] == 1 and record["events"][0]["to_step"] == 0


def test_a_corpus_that_would_never_be_read_is_refused(corpus, tmp_path):
    done = craton("train", f"{corpus}=1", f"{corpus}=0.000001", "--out", tmp_path / "m", "--steps", 5)
    assert done.returncode == 2 and "nothing of it would ever be read" in done.stderr
    assert not (tmp_path / "m").exists()


def test_the_tokenizer_is_opened_once(corpus, monkeypatch):
    """Planning once opened it for every depth that it tried."""
    opened = Corpus(corpus)
    calls = []
    real = Tokenizer.open
    monkeypatch.setattr(Tokenizer, "open", lambda folder: calls.append(folder) or real(folder))
    recipe = small(model__num_hidden_layers=None, model__hidden_size=None, run__steps=None, run__budget="1e13flop")
    plan(recipe, [opened], 1e11, lambda config, recipe: 1.0, time.monotonic(), "cpu")
    assert len(calls) <= 1
