"""Training: it learns (and a control does not), resumes to the bit, survives kills, faults, spikes and full disks."""

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
from craton.base import UserError
from craton.corpus.build import BuildOptions, build
from craton.corpus.store import Corpus
from craton.model import kernels
from craton.train import checkpoint
from craton.train.objective import next_token
from craton.train.record import read_metrics
from craton.train.start import train
from tests.conftest import craton, prose, small


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


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
            train([str(corpus)], out, small(run__steps=120 if optimizer == "muon" else 400, optimizer__name=optimizer))
            scores[shuffled] = accuracy(out, corpus)
        assert scores[False] > 0.95, optimizer
        assert scores[True] < 0.6, optimizer  # words are several tokens, so their ends can be known


def test_resume_is_exact(corpus, tmp_path, model_folder):
    out = tmp_path / "m"

    def stop_in_step_17(network, batch, calls=[0]):  # noqa: B006 (counts calls)
        calls[0] += 1
        if calls[0] == 33:  # two slices a step
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token(network, batch)

    from craton.train.loop import Interrupted

    with pytest.raises(Interrupted):
        train([str(corpus)], out, small(), objective=stop_in_step_17)
    assert json.loads((out / "record.json").read_text())["status"] == "interrupted"
    assert len(losses(out)) == 17
    train([str(corpus)], out, small(), resume=True)
    assert sha(out) == sha(model_folder) and losses(out) == losses(model_folder)
    with pytest.raises(UserError, match=r"run.seed = 0, not 1"):
        train([str(corpus)], out, small(run__seed=1), resume=True)


def test_killed_runs_end_with_the_same_weights(corpus, tmp_path):
    base = [sys.executable, "-m", "craton", "train", str(corpus), *map(str, SETTINGS)]
    subprocess.run([*base, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    out, r, kills = tmp_path / "killed", random.Random(1), 0
    for _ in range(3):
        process = subprocess.Popen(
            [*base, "--out", str(out), "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(r.uniform(2.0, 4.0))
        kills += process.poll() is None
        process.kill()
        process.wait()
    done = subprocess.run([*base, "--out", str(out), "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kills and sha(out) == sha(tmp_path / "whole") and losses(out) == losses(tmp_path / "whole")


def test_two_processes_give_the_losses_of_one(corpus, tmp_path):
    one = craton("train", corpus, "--out", tmp_path / "one", *SETTINGS)
    assert one.returncode == 0, one.stderr
    two = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "craton",
            "train",
            str(corpus),
            "--out",
            str(tmp_path / "two"),
            *map(str, SETTINGS),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(a) == len(b) == 60 and max(abs(x - y) for x, y in zip(a[:50], b[:50], strict=True)) < 1e-5
    if kernels.training_kernels() is not None:
        assert sha(tmp_path / "one") == sha(tmp_path / "two")
    # What two processes saved goes on with one.
    shutil.rmtree(tmp_path / "two" / "training" / "step-00000060")
    again = craton("train", corpus, "--out", tmp_path / "two", *SETTINGS, "--resume")
    assert again.returncode == 0 and "resumed at step 56" in again.stdout
    assert max(abs(x - y) for x, y in zip(a, losses(tmp_path / "two"), strict=True)) < 1e-4


def test_a_bad_loss_is_rolled_back_and_skipped(corpus, tmp_path, capsys):
    poisoned = []

    def objective(network, batch):
        loss, nll = next_token(network, batch)
        if not poisoned:
            poisoned.append(batch.ids.clone()) if objective.calls == 31 else None
        objective.calls += 1
        if poisoned and torch.equal(poisoned[0], batch.ids):
            return loss * float("nan"), nll
        return loss, nll

    objective.calls = 0
    train([str(corpus)], tmp_path / "m", small(), objective=objective)
    record = json.loads((tmp_path / "m" / "record.json").read_text())
    assert record["rollbacks"] == 1 and record["skipped_batches"] == [14, 15] and record["steps"] == 30
    assert "rolled back to step 10" in capsys.readouterr().out
    used = [r["batch"] for r in read_metrics(tmp_path / "m" / "metrics.jsonl") if "loss" in r]
    assert used == [i for i in range(32) if i not in (14, 15)]
    assert record["events"][0]["at_step"] == 15


def test_it_gives_up_after_the_stated_number(corpus, tmp_path):
    def objective(network, batch):
        loss, nll = next_token(network, batch)
        return loss * float("inf"), nll

    with pytest.raises(UserError, match="given up after 2 rollbacks"):
        train([str(corpus)], tmp_path / "m", small(safety__most_rollbacks=2), objective=objective)


def test_every_injected_fault_is_refused(model_folder, tmp_path):
    source = sorted((model_folder / "training").glob("step-*"))[-1]
    r = random.Random(0)
    for _ in range(300):
        path = tmp_path / "step-00000001"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        file = r.choice(sorted(path.iterdir()))
        data, kind = bytearray(file.read_bytes()), r.randrange(3)
        at = r.randrange(len(data))
        if kind == 0:
            file.write_bytes(data[:at])
        elif kind == 1:
            file.unlink()
        else:
            data[at] ^= 1 << r.randrange(8)
            file.write_bytes(data)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)


def test_resume_takes_the_newest_valid_checkpoint(corpus, tmp_path, model_folder):
    out = tmp_path / "m"
    shutil.copytree(model_folder, out)
    newest = sorted((out / "training").glob("step-*"))[-1]
    file = newest / "optimizer.safetensors"
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
from craton.train import checkpoint
from craton.base import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model, optimizer, state = checkpoint.load(sorted(Path({str(model_folder)!r}, "training").glob("step-*"))[-1])
folder = Path({str(tmp_path)!r})
checkpoint.save(folder, 1, model, optimizer, state, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    checkpoint.save(folder, 2, model, optimizer, state, 2)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot write the checkpoint" in done.stdout and "last one is intact" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and checkpoint.verify(
        tmp_path / "step-00000001"
    ) is None


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
    "no source": (["{tmp}", "--out", "{tmp}/m", "--steps", "5"], "not a finished corpus"),
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
