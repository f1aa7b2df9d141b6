"""Many processes: the bits of one, each holding its part, checkpoints that any number can load and no fault can
enter."""

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from craton.base import UserError, as_json
from craton.model import kernels
from craton.train import checkpoint
from craton.train.metrics import read_metrics
from tests.forked import finish, start

SETTINGS: tuple[object, ...] = (
    *("--depth", 2, "--steps", 12, "--checkpoint-every", 5),
    *("--set", "model.hidden_size=64", "--set", "data.sequence_length=64", "--set", "data.batch_tokens=448"),
    *("--set", "run.evaluate_tokens=1024"),
)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *args: object) -> list[str]:
    """The command as a person gives it."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*start, "-m", "craton", "train", *map(str, args)]


def run(processes: int, *args: object) -> subprocess.CompletedProcess[str]:
    """As torchrun starts them, but forked. Returns what the first says."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(processes)}
    running = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes), **place}
        running.append(start("train", *args, env={**ONE_THREAD, **(own if processes > 1 else {})}))
    done = [finish(r, 300) for r in running]
    assert [d.returncode for d in done] == [0] * processes, "\n".join(d.stderr[-3000:] for d in done)
    return done[0]


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "m"
    run(1, corpus, "--out", out, *SETTINGS)
    return out


@pytest.fixture(scope="module")
def six(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("six") / "m"
    run(6, corpus, "--out", out, *SETTINGS)
    return out


def equal(a: Path, b: Path) -> None:
    """The same bits with compiled kernels; else nearly the same losses."""
    if kernels.training_kernels() is not None:
        assert sha(a) == sha(b) and losses(a) == losses(b)
    assert max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True)) < 1e-3


@pytest.mark.parametrize("processes", [2, 3])
def test_the_bits_of_one_process(corpus, tmp_path, alone, processes):
    """Seven rows a batch: no number of processes but one divides them."""
    run(processes, corpus, "--out", tmp_path / "m", *SETTINGS)
    equal(alone, tmp_path / "m")


def test_six_processes_and_what_loads_their_checkpoint(corpus, tmp_path, alone, six):
    equal(alone, six)
    names = {p.name for p in (six / "training" / "step-00000010").iterdir()}
    assert {f"weights-0000{i}.safetensors" for i in range(6)} < names
    for processes in (1, 4):
        out = tmp_path / f"on-{processes}"
        shutil.copytree(six, out)
        shutil.rmtree(out / "training" / "step-00000012")
        done = run(processes, corpus, "--out", out, *SETTINGS, "--resume")
        assert "resumed at step 10" in done.stdout
        if processes == 1:
            equal(alone, out)
        else:  # four do not divide the six virtual shards: another order of sums
            assert max(abs(x - y) for x, y in zip(losses(alone), losses(out), strict=True)) < 1e-3


def test_killed_in_between(corpus, tmp_path, alone):
    """Two processes, killed again and again, then three."""
    out, kills, r = tmp_path / "m", 0, random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(
            torchrun(2, corpus, "--out", out, *SETTINGS, "--resume"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ONE_THREAD,
            start_new_session=True,
        )
        enough, metrics = r.randint(3, 8) + 3 * kills, out / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < enough):
            time.sleep(0.05)
        kills += process.poll() is None
        subprocess.run(["pkill", "-9", "-f", str(out)], check=False)
        process.wait()
    run(3, corpus, "--out", out, *SETTINGS, "--resume")
    assert kills == 2
    equal(alone, out)


def test_tied_heads_on_two_processes(corpus, tmp_path):
    tied = ["--set", "model.tie_word_embeddings=true"]
    for processes in (1, 2):
        run(processes, corpus, "--out", tmp_path / str(processes), *SETTINGS, *tied)
    equal(tmp_path / "1", tmp_path / "2")


def test_every_injected_fault_is_refused(six, tmp_path):
    """Cut, removed, flipped, exchanged: of 300 faults in a sharded checkpoint none is accepted."""
    source = sorted((six / "training").glob("step-*"))[-1]
    r, path = random.Random(0), tmp_path / "step-00000001"
    shutil.copytree(source, path)
    whole = {p.name: p.read_bytes() for p in path.iterdir()}
    for _ in range(300):
        file = path / r.choice(sorted(whole))
        data, at = bytearray(whole[file.name]), r.randrange(len(whole[file.name]))
        kind = r.randrange(4)
        if kind == 0:
            file.write_bytes(data[:at])
        elif kind == 1:
            file.unlink()
        elif kind == 2:
            data[at] ^= 1 << r.randrange(8)
            file.write_bytes(data)
        else:
            other = r.choice(sorted(set(whole) - {file.name}))
            file.write_bytes(whole[other])
        with pytest.raises(UserError, match="damaged"):
            list(checkpoint.whole_tensors(path, "weights"))
        file.write_bytes(whole[file.name])
    assert list(checkpoint.whole_tensors(path, "weights"))


def test_a_manifest_that_leaves_a_piece_out_is_refused(six, tmp_path):
    path = tmp_path / "step-00000001"
    shutil.copytree(sorted((six / "training").glob("step-*"))[-1], path)
    manifest = json.loads((path / "manifest.json").read_text())
    name, whole = next((n, w) for n, w in manifest["tensors"]["weights"].items() if len(w["pieces"]) > 1)
    whole["pieces"].pop()
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(as_json(manifest).encode()).hexdigest()
    (path / "manifest.json").write_text(as_json(manifest))
    assert f"the pieces of {name} hold" in (checkpoint.verify(path) or "")


MEASURE = """
import sys
from pathlib import Path
import torch
from torch.distributed.fsdp import FSDPModule
from craton.model.config import ModelConfig
from craton.train import checkpoint
from craton.train.distributed import local, open_processes
from craton.train.job import Cost, Job
from craton.train.loop import Run
from craton.train.pretrain import ModelFolder, kind, next_token
from craton.corpus.batches import Batch
from craton.train.recipe import Recipe

config = ModelConfig(2048, 128, 352, 6, 4, 2, 32, 64)
recipe = Recipe()
recipe.run.steps, recipe.data.micro_tokens, recipe.optimizer.name = 3, 64, sys.argv[2]
o = recipe.optimizer
o.matrix_lr, o.embedding_lr, o.head_lr, o.norm_lr, o.weight_decay = 0.01, 0.01, 0.01, 0.01, 0.0
recipe.schedule.warmup_steps = 1

class Source:
    rows, together = 6, 1
    def batch(self, number, share, shares, network):
        g = torch.Generator().manual_seed(number * 100 + share)
        ids = torch.randint(2048, (len(range(share, 6, shares)), 65), generator=g)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(len(ids), 64), None)

with open_processes("cpu") as processes:
    store = ModelFolder(config, 0)
    whole, largest, peak = 0, 0, 0

    def resident():
        "Bytes of weights and optimizer in this process: its own parts, and units that are gathered now."
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in [*(local(p) for p in run.network.parameters()), *map(local, run.optimizers.state().values())]}
        gathered = 0
        for module in run.network.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for p in group.fsdp_params:
                        if p.sharded_state.name == "UNSHARDED":
                            gathered += p._unsharded_param.numel() * 4
        return sum(held.values()) + gathered

    run = Run(Path(sys.argv[1]), Job("toy", Source(), next_token, store, Cost("tokens", 64, 1.0, 1.0), kind),
              recipe, processes, 1e9)
    figures = {"start": resident()}
    def sample(*_):
        global peak
        peak = max(peak, resident())
    for module in run.network.modules():
        module.register_forward_pre_hook(sample)
        module.register_forward_hook(sample)
    run.network.lm_head.weight.register_hook(sample) if False else None
    (Path(sys.argv[1]) / "training").mkdir(parents=True, exist_ok=True)
    run.train()
    figures["step"], figures["after"] = peak, resident()
    saved = checkpoint.save
    run.save()
    figures["save"] = resident()
    run.restore()
    figures["resume"] = resident()
    parameters = sum(p.numel() * 4 for p in run.network.parameters())
    states = sum(t.numel() * 4 for t in run.optimizers.state().values())
    units = [sum(p.numel() * 4 for m in unit for p in m.parameters()) for unit in store.units(run.network)]
    if processes.first:
        print("FIGURES", dict(figures), parameters + states, parameters, max(units), flush=True)
    processes.barrier()
"""


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_process_holds_its_part(tmp_path, optimizer):
    """At most 55 % of weights and optimizer on each of two, and a unit more while one is gathered."""
    (tmp_path / "measure.py").write_text(MEASURE)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, str(tmp_path / "measure.py"), str(tmp_path / "m"), optimizer],
        capture_output=True,
        text=True,
        timeout=300,
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FIGURES"))
    figures = eval(line.removeprefix("FIGURES ").partition("}")[0] + "}")  # noqa: S307 (our own output)
    whole, parameters, largest = map(int, line.partition("}")[2].split())
    assert figures["start"] <= 0.55 * parameters
    assert max(figures["after"], figures["save"], figures["resume"]) <= 0.55 * whole
    assert 0.55 * parameters < figures["step"] <= 0.55 * whole + largest


def test_initial_weights_do_not_depend_on_how_they_are_cut():
    from craton.model.config import ModelConfig
    from craton.model.initialise import initial_rows

    config = ModelConfig(5000, 96, 128, 1, 4, 2, 32)
    for name, shape in (("model.embed_tokens.weight", (5000, 96)), ("x.q_proj.weight", (8192, 96)), ("n", (77,))):
        whole = initial_rows(config, 3, name, shape, 0, shape[0])
        r = random.Random(0)
        for _ in range(20):
            first = r.randrange(shape[0])
            count = r.randrange(1, shape[0] - first + 1)
            assert torch.equal(initial_rows(config, 3, name, shape, first, count), whole[first : first + count])
        assert not torch.equal(initial_rows(config, 4, name, shape, 0, 10), whole[:10]) or len(shape) == 1
