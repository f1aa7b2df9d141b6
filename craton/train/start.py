"""`craton train`: open the corpora, plan, make or take up the run's folder, train, and leave record and report."""

import dataclasses
import fcntl
import os
import time
from pathlib import Path
from typing import Any

import torch

from craton.base import UserError, count, digest, read_json, say, sha256, span, write_json
from craton.corpus.store import Corpus
from craton.engine.model import Model, load_model
from craton.model import kernels
from craton.model.config import ModelConfig
from craton.train import machine, record
from craton.train.distributed import Processes
from craton.train.loop import Interrupted, Run, seconds_a_step, write_release
from craton.train.objective import Objective, next_token
from craton.train.plan import parse_budget, plan
from craton.train.recipe import Recipe, as_dict, from_dict


def parse_corpora(texts: list[str]) -> tuple[list[Path], list[float]]:
    """'DIR' or 'DIR=WEIGHT', weights positive, 1 when left out."""
    paths, weights = [], []
    for text in texts:
        path, sign, weight = text.rpartition("=") if "=" in text and not Path(text).exists() else (text, "", "1")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError(f"{text}: write a corpus as DIR or DIR=WEIGHT with a positive weight")
        paths.append(Path(path))
        weights.append(value)
    return paths, weights


def train(
    corpora: list[str], out: Path, recipe: Recipe, resume: bool = False, objective: Objective = next_token
) -> dict[str, Any]:
    """Train into the model folder `out` and return the record's summary. Raises UserError, Interrupted."""
    began = time.monotonic()
    kernels.keep_freed_memory()
    if recipe.run.budget:
        parse_budget(recipe.run.budget)
    device = machine.device()
    processes = Processes(device)
    try:
        return _train(corpora, out, recipe, resume, objective, device, processes, began)
    finally:
        processes.close()


def _claim(out: Path, resume: bool) -> tuple[Any, bool]:
    """The lock on `out`, and whether this call made the folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder for --out")
    if out.exists() and any(out.iterdir()) and not resume:
        hint = (
            "add --resume to go on with it, or give another --out"
            if (out / "training").exists()
            else "give another --out"
        )
        raise UserError(f"{out}: folder in use (not empty); {hint}")
    made = not out.exists()
    (out / "training").mkdir(parents=True, exist_ok=True)
    lock = open(out / "training" / "lock", "w")  # noqa: SIM115 (held until the process ends)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{out}: folder in use: another process is training there") from None
    return lock, made


def _train(
    names: list[str],
    out: Path,
    recipe: Recipe,
    resume: bool,
    objective: Objective,
    device: str,
    processes: Processes,
    began: float,
) -> dict[str, Any]:
    paths, weights = parse_corpora(names)
    opened = [Corpus(p) for p in paths]
    lock, made, problem = None, False, None
    if processes.first:
        try:
            lock, made = _claim(out, resume)
        except UserError as error:
            problem = str(error)
    if problem := processes.agree(problem):
        raise UserError(problem)
    try:
        return _go(opened, weights, out, recipe, resume, objective, device, processes, began, made)
    finally:
        if lock is not None:
            lock.close()


def _go(
    opened: list[Corpus],
    weights: list[float],
    out: Path,
    recipe: Recipe,
    resume: bool,
    objective: Objective,
    device: str,
    processes: Processes,
    began: float,
    made: bool,
) -> dict[str, Any]:
    asked = {"recipe": as_dict(recipe), "corpora": [c.digest for c in opened], "weights": weights}
    stored = out / "training" / "recipe.json"
    plan_path = stored if stored.exists() else None
    try:
        if processes.first:
            settled: Any
            try:
                settled = _settle(plan_path, asked, recipe, opened, weights, out, device, began, processes)
            except UserError as error:
                settled = str(error)
        else:
            settled = None
        settled = processes.agree(settled)
        if isinstance(settled, str):
            raise UserError(settled)
        resolved, config, why, peak = (
            from_dict(settled["recipe"]),
            ModelConfig(**settled["model"]),
            settled["why"],
            settled["peak"],
        )
        run = Run(out, resolved, config, opened, weights, processes, peak, objective)
    except UserError:
        if made and processes.first and not any(p.name not in ("lock",) for p in (out / "training").iterdir()):
            _remove(out)
        raise
    if processes.first:
        say(
            f"model    {count(config.parameters)} parameters: {config.num_hidden_layers} layers of "
            f"{config.hidden_size}, {config.num_attention_heads}/{config.num_key_value_heads} heads, vocabulary "
            f"{config.vocab_size}"
        )
        for line in why:
            say(f"plan     {line}")
        say(
            f"machine  {machine.facts(device)['cpu']}, {torch.get_num_threads()} threads, {count(peak)}FLOP/s in a "
            "large product"
        )
    if (out / "training").exists() and any((out / "training").glob("step-*")):
        run.restore()
        if processes.first:
            say(f"resumed at step {run.progress.step} of {resolved.run.steps}")
    elif resume and processes.first:
        say("no checkpoint yet: starting from the first step")
    done_before = run.progress.step >= (resolved.run.steps or 0)
    if processes.first and not done_before:
        write_release(out, config, run.tokenizer)
    energy, status, interrupted = machine.energy_joules(), "finished", None
    try:
        run.train()
    except Interrupted as signal_:
        status, interrupted = "interrupted", signal_
    if processes.first:
        used = machine.energy_joules()
        joules = used - energy if used is not None and energy is not None and used > energy else None
        _finish(run, settled, opened, weights, status, joules, began)
    processes.barrier()
    if interrupted:
        raise interrupted
    return record.summary(out) if processes.first else {}


def _settle(
    stored: Path | None,
    asked: dict[str, Any],
    recipe: Recipe,
    corpora: list[Corpus],
    weights: list[float],
    out: Path,
    device: str,
    began: float,
    processes: Processes,
) -> dict[str, Any]:
    """The resolved recipe: planned now and stored, or the stored one on resume."""
    if stored is not None:
        settled: dict[str, Any] = read_json(stored)
        if settled.get("digest") != digest({k: v for k, v in settled.items() if k != "digest"}):
            raise UserError(f"{stored}: altered or damaged; start again with another --out")
        for part, values in asked["recipe"].items():
            for key, value in values.items():
                if value != (before := settled["asked"]["recipe"][part][key]) and value != getattr(
                    getattr(Recipe(), part), key
                ):
                    raise UserError(
                        f"{out}: the run was started with {part}.{key} = {before!r}, not {value!r}; --resume goes on "
                        "with the same recipe"
                    )
        if settled["asked"]["corpora"] != asked["corpora"] or settled["asked"]["weights"] != weights:
            raise UserError(f"{out}: the run was started on another corpus; give the same one to --resume")
        return settled
    bf16 = recipe.run.precision == "bf16" or (recipe.run.precision is None and device == "cuda")
    peak = machine.gemm_peak(device, torch.bfloat16 if bf16 else torch.float32)
    resolved, config, why = plan(
        recipe, corpora, peak * processes.world, lambda c, r: seconds_a_step(c, r, device), began, device
    )
    settled = {
        "asked": asked,
        "recipe": as_dict(resolved),
        "model": dataclasses.asdict(config),
        "why": why,
        "peak": peak,
    }
    settled["digest"] = digest(settled)
    write_json(out / "training" / "recipe.json", settled)
    return settled


def _remove(out: Path) -> None:
    (out / "training" / "lock").unlink(missing_ok=True)
    os.rmdir(out / "training")
    os.rmdir(out)


def _samples(out: Path, run: Run) -> list[dict[str, str]]:
    """Continuations by the finished model: of the openings of held-out documents."""
    model: Model = load_model(str(out))
    prompts = []
    for corpus in run.corpora:
        for row in corpus.rows("heldout")[:40:10]:
            ids = corpus.read("heldout", int(row["start"]), min(24, int(row["tokens"])))
            prompts.append(model.tokenizer.decode(ids.tolist()))
    room = run.config.max_position_embeddings
    return [
        {"prompt": p, "text": model.generate(p, min(160, room // 2), t, seed=i)}
        for i, p in enumerate(prompts[:4] or ["The"])
        for t in (0.7,)
    ]


def _finish(
    run: Run,
    settled: dict[str, Any],
    corpora: list[Corpus],
    weights: list[float],
    status: str,
    joules: float | None,
    began: float,
) -> None:
    out, config = run.out, run.config
    rows = record.read_metrics(out / "metrics.jsonl")
    steps = [r for r in rows if "loss" in r]
    last = steps[-1] if steps else {}
    evaluated = [r for r in steps if "heldout_loss" in r]
    tokens = run.progress.step * run.rows * run.length
    training_seconds = run.progress.seconds or 1e-9
    settled_recipe = settled["recipe"]
    write_json(
        out / "record.json",
        {
            "format": "craton-record-1",
            "status": status,
            "objective": "pretraining",
            "steps": run.progress.step,
            "tokens": tokens,
            "flops": tokens * config.flops_per_token(run.length),
            "seconds": round(training_seconds, 2),
            "command_seconds": round(time.monotonic() - began, 2),
            "tokens_per_second": tokens / training_seconds,
            "peak_share": tokens
            / training_seconds
            * 6
            * config.matrix_parameters
            / settled["peak"]
            / run.processes.world,
            "gemm_peak_flops": settled["peak"],
            "energy_joules": joules,
            "cost": None,
            "parameters": config.parameters,
            "matrix_parameters": config.matrix_parameters,
            **{k: last[k] for k in ("loss", "bits_per_byte") if k in last},
            **({k: evaluated[-1][k] for k in ("heldout_loss", "heldout_bits_per_byte")} if evaluated else {}),
            "rollbacks": run.progress.rollbacks,
            "skipped_batches": list(run.progress.skipped),
            "weights_sha256": sha256(out / "model.safetensors") if (out / "model.safetensors").exists() else None,
            "recipe": settled_recipe,
            "plan": settled["why"],
            "model": settled["model"],
            "corpora": record.corpus_facts(corpora, weights),
            "environment": machine.facts(run.device) | {"processes": run.processes.world},
            "events": [r for r in rows if "event" in r],
            "curve": record.curve(rows),
            "samples": _samples(out, run) if status == "finished" else [],
        },
    )
    if status == "finished":
        bpb = f", held-out {evaluated[-1]['heldout_bits_per_byte']:.4f} bits/byte" if evaluated else ""
        say(f"{out}: {count(tokens)} tokens in {span(training_seconds)}{bpb}")
    else:
        say(f"{out}: stopped at step {run.progress.step}, state saved; go on with --resume")
