"""`craton tune`: open the model and the data, plan, make or take up the run's folder, train, and say what was gained
and what was lost."""

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from craton.adapt import guards, measure, verify
from craton.adapt.data import Sample, kind_of, read_samples, task_samples
from craton.adapt.jobs import NEEDS, Made, make_job
from craton.adapt.opened import Given, Opened
from craton.adapt.rows import Renderer
from craton.adapt.store import base_file, check_whole, open_base, tuned
from craton.base import Progress, UserError, claim, count, digest, read_json, say, sha256, span, write_json
from craton.engine.model import Model, weights_hash
from craton.model import kernels
from craton.tasks.find import find_task
from craton.tasks.task import Task
from craton.text import dialogue
from craton.text.dialogue import Dialogue
from craton.text.templates import give_template
from craton.train import machine, record
from craton.train.distributed import Processes, open_processes
from craton.train.loop import Interrupted, Run
from craton.train.metrics import read_metrics
from craton.train.plan import parse_budget
from craton.train.recipe import Recipe, as_dict, from_dict
from craton.weights.folder import only_pretrained

OWN = "the model's own"  # where a chat template is from
RANK = 32  # of an adapter, where nothing is said
FORMAT = "craton-tuning-1"  # of training/recipe.json
_HELD, _MOST_HELD = 20, 200  # every 20th sample is held out, at most so many
_OPTIMIZER = dict(name="adamw", beta1=0.9, beta2=0.95, weight_decay=0.0)
# Learning rates of all weights at a width of 2,048, from the papers' and libraries' recipes; adapters take ten times as
# much (Schulman et al. 2025, LoRA Without Regret), and narrower networks more, as its root.
_RATES = {"sft": 2e-5, "distill": 2e-5, "orpo": 8e-6, "reward": 1e-5, "grpo": 2e-6}
_EPOCHS = {"sft": 3.0, "distill": 3.0}


def tune(given: Given) -> dict[str, Any]:
    """Adapt a model into the folder `given.out`, an adapter or a whole model; returns the record's summary, with the
    task's score or the held-out loss before and after, and bits per byte of general text. Raises UserError,
    Interrupted."""
    kernels.keep_freed_memory()
    kernels.obey_limits()
    if given.recipe.run.budget:
        parse_budget(given.recipe.run.budget)
    with open_processes(machine.device()) as processes, ExitStack() as held:
        _check_asked(given, processes)
        opened = open_all(given)  # before the folder is made: what is wrong with the data leaves nothing behind
        if processes.first:
            hint = "add --resume to go on with it" if (given.out / "training").exists() else "give another --out"
            held.enter_context(claim(given.out, "training", resume=given.resume, hint=hint))
        return _tune(opened, processes)


def _check_asked(given: Given, processes: Processes) -> None:
    method = given.recipe.tune.method
    if given.teacher and method != "distill":
        raise UserError(f"--teacher is for --method distill, not {method}", field="teacher")
    if method == "distill" and not given.teacher:
        raise UserError("--method distill needs --teacher, a model folder, a GGUF file or URL#NAME", field="teacher")
    if method == "grpo" and not given.task:
        raise UserError("--method grpo needs --task, whose scorer rewards the answers", field="task")
    if not given.data and not given.task:
        raise UserError("give DATA, or --task NAME", field="data")
    if processes.world > 1 and (method == "grpo" or (method == "distill" and given.recipe.tune.policy == "on")):
        raise UserError(f"--method {method} samples from the network as it is, which needs one process", field="method")
    if given.out.exists() and not given.resume and any(p.name != ".lock" for p in given.out.iterdir()):
        fix = "add --resume to go on with it" if (given.out / "training").exists() else "give another --out"
        raise UserError(f"{given.out}: folder in use (not empty); {fix}", field="out", code="in_use")


# ---- opening ----------------------------------------------------------------------------------------------------


def open_all(given: Given) -> Opened:
    """The model with its tokenizer and template, and the samples. UserError names what is wrong with either."""
    recipe = dataclasses.replace(given.recipe)
    for section in ("run", "data", "optimizer", "schedule", "tune"):
        setattr(recipe, section, dataclasses.replace(getattr(recipe, section)))
    model = open_base(given.model, machine.device())
    task = find_task(given.task) if given.task else None
    samples = _samples(given, recipe, task, chats=not _is_bare(given, model))
    chats = any(s.chats for s in samples[:1])
    own, end_ids, template = _template(given, model, chats)
    if recipe.tune.method == "reward":
        if recipe.tune.lora:
            raise UserError("--method reward trains all weights; leave out --lora", field="lora")
        recipe.tune.lora = 0
    elif recipe.tune.lora is None:
        recipe.tune.lora = 0 if end_ids and template != OWN else RANK
    elif recipe.tune.lora and end_ids and template != OWN:
        fix = "--full learns them"
        say(f"WARNING  the model has never seen the tokens of turns, and an adapter hardly learns new ones; {fix}")
    if not recipe.tune.lora:
        check_whole(model, given.model)
    config = model.network.config
    ends = tuple(dict.fromkeys([*config.eos_token_ids, *end_ids]))
    end = next((i for i in (model.tokenizer.eos_id, *ends, model.tokenizer.document_id) if i is not None), 0)
    renderer = Renderer(model.tokenizer, own, end, config.max_position_embeddings)
    facts: dict[str, Any] = {"base": _base_facts(given.model), "template": template}
    if not recipe.tune.lora and len(ends) > 1:  # other programs find the end of a turn there
        config = dataclasses.replace(config, eos_token_id=ends)
    return Opened(given, recipe, model, own, ends, task, *_apart(samples, task), renderer, config, facts)


def _is_bare(given: Given, model: Model) -> bool:
    """Whether the model was never tuned to converse."""
    path = base_file(given.model)
    return model.tokenizer.chat_template is None or (path.is_dir() and only_pretrained(path))


def _samples(given: Given, recipe: Recipe, task: Task | None, chats: bool) -> list[Sample]:
    progress = Progress()
    samples: list[Sample] = []
    for sample in read_samples(given.data) if given.data else task_samples(_need(task), "train", chats):
        samples.append(sample)
        progress.show(f"reading {len(samples)} rows")
    progress.clear()
    if task is not None and recipe.tune.method != "grpo" and task.rows.get("test"):
        left_out = guards.check_contamination(samples, task, fixed=bool(given.data))
        samples = [s for i, s in enumerate(samples) if i not in left_out]
    if not samples:
        raise UserError("no row is left to learn from: all of them hold items of the task's test part", field="data")
    needed, kind = NEEDS[recipe.tune.method], kind_of(samples[0])
    if kind not in needed:
        what = f"--method {recipe.tune.method} learns from {' or '.join(needed)}, but {samples[0].where} is {kind}"
        fits = [m for m, kinds in NEEDS.items() if kind in kinds]
        raise UserError(f"{what}; fitting: --method {', '.join(fits)}", field="method")
    return samples


def _need(task: Task | None) -> Task:
    assert task is not None
    return task


def _template(given: Given, model: Model, chats: bool) -> tuple[Dialogue | None, tuple[int, ...], str]:
    """The model's format of conversations, what ends its turns, and where the template is from. One that was never
    tuned is given one, where the data are conversations."""
    tokenizer, bare = model.tokenizer, _is_bare(given, model)
    if bare and not chats:
        return None, (), "none: the data go through no template"
    more: tuple[int, ...] = ()
    where = OWN
    if bare:
        more, where = (give_template(tokenizer),), "given by this run, as the model had none"
    found = dialogue.learn(tokenizer, (*model.network.config.eos_token_ids, *more))
    ends = (*more, *(() if found.turn_end is None else (found.turn_end,)))
    return found, ends, where


def _base_facts(text: str) -> dict[str, Any]:
    """Where the base lies and what it is: the hash over its weights."""
    path = base_file(text)
    own = text.partition("+")[2] if not Path(text).exists() else ""
    adapter = {"adapter": str(Path(own).absolute())} if own else {}
    return {"path": str(path.absolute()), "sha256": weights_hash(path)} | adapter


def _apart(samples: list[Sample], task: Task | None) -> tuple[list[Sample], list[Sample]]:
    """Those that are learned, and some that are held out, the same ones every time."""
    if len(samples) < 2 * _HELD or (task is not None and task.rows.get("test")):
        return samples, []
    held = set(range(0, len(samples), max(_HELD, len(samples) // _MOST_HELD)))
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in sorted(held)]


# ---- the run ----------------------------------------------------------------------------------------------------


def _tune(opened: Opened, processes: Processes) -> dict[str, Any]:
    given, recipe = opened.given, opened.recipe
    stored = given.out / "training" / "recipe.json"
    again = processes.agree(stored.exists())
    looker = measure.Measure(opened.model.tokenizer, opened.renderer, opened.held, opened.task, recipe.tune)
    asked = _asked(opened)
    settled: dict[str, Any] = _stored(stored, asked, given.out) if again else {}
    if again:
        opened.recipe = recipe = from_dict(settled["recipe"])
    else:
        _defaults(opened, recipe)
    before = settled["before"] if again else looker(opened.model.network)
    looker.remember(opened.model.network)
    made = make_job(opened, looker)
    if not again:
        settled = _settle(opened, made, processes, asked, before)
        if processes.first:
            write_json(stored, settled)
    opened.recipe = recipe = from_dict(settled["recipe"])
    kind, amount = parse_budget(recipe.run.budget) if recipe.run.budget else ("", 0.0)
    deadline = given.began + amount if kind == "seconds" and not asked["recipe"]["run"]["steps"] else None
    if processes.first:
        for line in settled["why"]:
            say(f"plan     {line}")
        say(f"before   {measure.in_words(before)}")
    run = Run(given.out, made.job, recipe, processes, settled["peak"], deadline)
    if processes.agree(any((given.out / "training").glob("step-*"))):
        run.restore()
        say(f"resumed at step {run.state.step} of {run.schedule.steps}")
    interrupted = None
    try:
        if run.state.step < run.schedule.steps and processes.first:
            made.job.store.write_rest(given.out)
        run.train()
    except Interrupted as signal_:
        interrupted = signal_
    if processes.first:
        _finish(opened, made, run, settled, before, interrupted)
    processes.barrier()
    if interrupted:
        raise interrupted
    return read_json(given.out / "record.json")["summary"] if processes.first else {}


def _asked(opened: Opened) -> dict[str, Any]:
    """What a resumed run must be asked for again."""
    given = opened.given
    files = {path: "" if path == "-" else sha256(Path(path)) for path in given.data}
    asked: dict[str, Any] = {"recipe": as_dict(given.recipe), "base": opened.facts["base"]["sha256"], "data": files}
    named = Path(given.task.rpartition("=")[2])
    if given.task and named.is_file():
        asked["task_file"] = sha256(named)
    return asked | {"task": given.task, "teacher": given.teacher}


def _stored(path: Path, asked: dict[str, Any], out: Path) -> dict[str, Any]:
    settled: dict[str, Any] = read_json(path)
    if settled.get("digest") != digest({k: v for k, v in settled.items() if k != "digest"}):
        raise UserError(f"{path}: altered or damaged; start again with another --out")
    for key, value in asked.items():
        if key != "recipe" and value != settled["asked"].get(key, value):
            raise UserError(f"{out}: the run was started with another {key}; --resume goes on with the same", field=key)
    for part, values in asked["recipe"].items():
        defaults = dataclasses.asdict(getattr(Recipe(), part))
        for key, value in values.items():
            was = {**defaults, **settled["asked"]["recipe"].get(part, {})}[key]
            if value != was and value != defaults[key]:
                name = f"{part}.{key}"
                raise UserError(f"{out}: the run was started with {name} = {was!r}, not {value!r}", field=name)
    return settled


def _defaults(opened: Opened, recipe: Recipe) -> None:
    """What was not asked for, but for what depends on the rows."""
    tune, config = recipe.tune, opened.model.network.config
    for key, value in _OPTIMIZER.items():
        if f"optimizer.{key}" not in recipe.given:
            setattr(recipe.optimizer, key, value)
    width = (2048 / config.hidden_size) ** 0.5
    tune.lr = tune.lr or _RATES.get(tune.method, 1e-6) * width * (10 if tune.lora else 1)
    for name in ("matrix_lr", "embedding_lr", "head_lr", "norm_lr"):
        if getattr(recipe.optimizer, name) is None:
            setattr(recipe.optimizer, name, tune.lr)
    tune.epochs = tune.epochs or _EPOCHS.get(tune.method, 1.0)
    if tune.beta is None:
        tune.beta = {"simpo": 2.0, "grpo": 0.0, "distill": 0.0, "orpo": 0.1}.get(tune.method, 0.1)
    recipe.run.precision = recipe.run.precision or ("fp32" if machine.device() == "cpu" else "bf16")
    if "schedule.decay_share" not in recipe.given:
        recipe.schedule.decay_share = 0.0 if tune.method == "grpo" else 0.9


def _settle(
    opened: Opened, made: Made, processes: Processes, asked: dict[str, Any], before: dict[str, Any]
) -> dict[str, Any]:
    """The resolved recipe, with a reason for each choice."""
    recipe, why = opened.recipe, list(made.why)
    run, tune = recipe.run, recipe.tune
    peak = machine.gemm_peak(processes.device, torch.bfloat16 if run.precision == "bf16" else torch.float32)
    what = f"an adapter of rank {tune.lora} on {tune.targets or 'every linear layer'}" if tune.lora else "all weights"
    if not tune.lora and opened.given.recipe.tune.lora is None and tune.method != "reward":
        what += ", since tokens of turns are new to the model"
    why.insert(0, f"{tune.method}, {what}: {count(made.trained)} parameters of {count(made.parameters)} are trained")
    if run.steps is None and run.budget:
        kind, amount = parse_budget(run.budget)
        left = amount - (time.monotonic() - opened.given.began) if kind == "seconds" else 0.0
        step = made.job.source.rows * made.job.cost.flops
        run.steps = max(10, int((0.3 * peak * left if kind == "seconds" else amount) / step))
        why.append(f"{run.steps} steps: what {run.budget} is thought to allow; a time budget moves the end")
    elif run.steps is None:
        run.steps = max(1, made.steps)
        why.append(f"{run.steps} steps: {made.steps_why}")
    why.append(f"learning rate {tune.lr:.2g}{' (ten times that of all weights)' if tune.lora else ''}")
    steps = run.steps
    if recipe.schedule.warmup_steps is None:
        recipe.schedule.warmup_steps = min(20, max(1, steps // 20))
    run.checkpoint_every = run.checkpoint_every or max(10, steps // 4)
    run.evaluate_every = run.evaluate_every or max(10, steps // 8)
    settled: dict[str, Any] = {"format": FORMAT, "asked": asked, "recipe": as_dict(recipe), "peak": peak, "why": why}
    settled |= {"before": before, "base": opened.facts["base"]}
    return settled | {"digest": digest(settled)}


# ---- the end ----------------------------------------------------------------------------------------------------


def _finish(
    opened: Opened,
    made: Made,
    run: Run,
    settled: dict[str, Any],
    before: dict[str, Any],
    interrupted: Interrupted | None,
) -> None:
    """record.json, and the last lines."""
    out, given = opened.given.out, opened.given
    rows = read_metrics(out / "metrics.jsonl")
    steps = [r for r in rows if "loss" in r]
    after, checks = dict[str, Any](), dict[str, Any]()
    if interrupted is None and run.processes.mesh is None:
        after, checks = made.after(run.network), verify.check(out, opened, run.network)
    elif interrupted is None:  # the network is in pieces
        after = made.after(tuned(given.model, out))
    warnings = guards.check_learned(checks)
    if "general_bits_per_byte" in after:
        warnings += guards.check_general(before["general_bits_per_byte"], after["general_bits_per_byte"])
    status = "interrupted" if interrupted else "finished"
    seconds, cost = run.state.seconds or 1e-9, made.job.cost
    tokens = run.units
    summary: dict[str, Any] = {"out": str(out), "status": status, "method": opened.recipe.tune.method}
    summary |= {"before": before, "after": after, "steps": run.state.step, "seconds": round(seconds, 2)}
    summary |= {"tokens": tokens, "tokens_per_second": tokens / seconds, "loss": steps[-1]["loss"] if steps else None}
    summary |= {"trained_parameters": made.trained, "parameters": made.parameters, "warnings": warnings} | checks
    facts: dict[str, Any] = {"format": "craton-record-1", "objective": made.job.name, "summary": summary}
    facts |= {k: summary[k] for k in ("status", "steps", "tokens", "seconds", "parameters", "tokens_per_second")}
    facts |= {
        "recipe": settled["recipe"],
        "plan": settled["why"],
        "base": settled["base"],
        "template": opened.facts["template"],
    }
    facts |= {"data": settled["asked"]["data"], "task": given.task, "teacher": given.teacher, "command": given.command}
    facts |= {"source": made.job.source.facts(), "curve": record.curve(rows), "flops": tokens * cost.flops / cost.units}
    facts |= {"looks": [r for r in steps if "general_bits_per_byte" in r]}
    facts |= {"environment": machine.facts(run.processes.device) | {"processes": run.processes.world}}
    write_json(out / "record.json", facts)
    if status == "interrupted":
        say(f"{out}: stopped at step {run.state.step}, state saved; go on with --resume")
        return
    say(f"after    {measure.in_words(after)}")
    for warning in warnings:
        say(f"WARNING  {warning}")
    took = span(time.monotonic() - given.began)
    use = (
        "chat, serve and eval take it as MODEL+ADAPTER" if opened.recipe.tune.lora else "a model folder like any other"
    )
    hint = "" if not opened.recipe.tune.lora else f"; 'craton merge {out} --out DIR' makes a model of it"
    say(f"{out}: {count(tokens)} tokens in {took}; {use}{hint}")
