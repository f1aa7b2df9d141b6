"""`craton train`: open the corpora, plan, make or take up the run's folder, train, and leave record and release."""

import dataclasses
import glob
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from craton.base import UserError, amount, claim, count, digest, read_json, say, sha256, span, write_json
from craton.corpus.build import BuildOptions, build, remove_corpus
from craton.corpus.store import Corpus
from craton.engine.model import Model, load_model, single_file, weights_hash
from craton.model import kernels
from craton.model.config import ModelConfig
from craton.model.packed import holds_packed
from craton.train import explain, machine, memory, record
from craton.train.checkpoint import OLD
from craton.train.distributed import Processes, open_processes
from craton.train.job import Job
from craton.train.loop import Interrupted, Run
from craton.train.measure import together
from craton.train.metrics import read_metrics
from craton.train.plan import MOST_EPOCHS, parse_budget, plan
from craton.train.pretrain import Continued, check_shares, pretraining
from craton.train.recipe import Recipe, as_dict, from_dict
from craton.weights.folder import only_pretrained

FORMAT = "craton-run-2"  # of training/recipe.json
MakeJob = Callable[[list[Corpus], list[float], Recipe, ModelConfig, str], Job]


def parse_corpora(texts: list[str]) -> tuple[list[Path], list[float]]:
    """'DIR' or 'DIR=WEIGHT', weights positive, 1 when left out. UserError for a weight that is none."""
    paths, weights = [], []
    for text in texts:
        path, _, weight = text.rpartition("=") if "=" in text and not Path(text).exists() else (text, "", "1")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError(f"{text}: write a corpus as DIR or DIR=WEIGHT with a positive weight")
        paths.append(Path(path))
        weights.append(value)
    return paths, weights


@dataclass
class _Asked:
    """What `craton train` was asked for, on this process."""

    corpora: list[Corpus]
    weights: list[float]
    out: Path
    recipe: Recipe
    resume: bool
    processes: Processes
    began: float  # time.monotonic() at the command's start
    free: int  # bytes of memory, before anything was measured
    command: str  # as it was typed, '' where it was not
    base: str  # the model that is trained further, '' for none

    @property
    def stored(self) -> Path:
        """Where the resolved recipe lies."""
        return self.out / "training" / "recipe.json"

    def facts(self) -> dict[str, Any]:
        """What a resumed run must be asked for again."""
        digests = [c.digest for c in self.corpora]
        base = {"base": weights_hash(Path(self.base))} if self.base else {}
        return {"recipe": as_dict(self.recipe), "corpora": digests, "weights": self.weights} | base


def train(
    corpora: list[str],
    out: Path,
    recipe: Recipe,
    resume: bool = False,
    make_job: MakeJob = pretraining,
    began: float | None = None,
    command: str = "",
    base: str = "",
) -> dict[str, Any]:
    """Train into the model folder `out` and return the record's summary, empty on all but the first process.

    corpora: folders that `craton corpus build` made, each with '=WEIGHT' or not; anything else is documents, of which
    a corpus is made first. make_job: from corpora, weights, the resolved recipe, the model's configuration and the
    device. began: when the command started, as time.monotonic() counts; a time budget covers all of it but the making
    of a corpus. command: as it was typed, for the report. base: a model whose weights and tokenizer the run begins
    with. Raises UserError, Interrupted.
    """
    began = time.monotonic() if began is None else began
    kernels.keep_freed_memory()
    kernels.obey_limits()
    if recipe.run.budget:
        parse_budget(recipe.run.budget)
    if base and not Path(base).exists():
        raise UserError(f"--from {base}: no such model folder or GGUF file", field="from")
    corpora, spent = _with_documents(corpora, out, resume, base)
    with open_processes(machine.device()) as processes:
        paths, weights = parse_corpora(corpora)
        opened = _agreed(processes, lambda: [Corpus(p, verify=processes.first) for p in paths])
        asked = _Asked(
            opened, weights, out, recipe, resume, processes, began + spent, memory.free(processes.device), command, base
        )
        with ExitStack() as held:
            _agreed(processes, lambda: _claim(asked, held) if processes.first else None)
            return _train(asked, make_job)


def _documents(text: str) -> str | None:
    """The files, folder, pattern or dataset that a text names where it names no corpus."""
    path = parse_corpora([text])[0][0]
    name = f"hf://{str(path).partition('hf:/')[2].lstrip('/')}" if text.startswith("hf://") else str(path)
    if name.startswith("hf://") or (glob.has_magic(name) and not path.exists()):
        return name
    made_by_us = (path / "manifest.json").exists() or (path / ".work").is_dir()
    return name if path.exists() and not made_by_us else None


def _open_base(asked: _Asked) -> Model:
    """The model that is trained further. UserError if its weights are packed, or the corpora have other tokens."""
    model = load_model(asked.base)
    if holds_packed(model.network):
        raise UserError(f"--from {asked.base}: its weights are packed into few bits; give the unquantised folder")
    own = model.tokenizer.backend.get_vocab(with_added_tokens=True)
    if other := next((c for c in asked.corpora if c.tokenizer.backend.get_vocab(with_added_tokens=True) != own), None):
        fix = f"build it with --tokenizer {asked.base}"
        raise UserError(f"{other.folder}: built with another tokenizer than {asked.base} has; {fix}", field="from")
    return model


def _with_documents(texts: list[str], out: Path, resume: bool, base: str) -> tuple[list[str], float]:
    """Corpora to train on: what is documents among the given becomes one, beside the run, and the seconds it took."""
    weights = parse_corpora(texts)[1]
    found = [(_documents(text), text, weight) for text, weight in zip(texts, weights, strict=True)]
    documents = [(name, w) for name, _, w in found if name is not None]
    corpora = [text for name, text, _ in found if name is None]
    if not documents:
        return texts, 0.0
    if len({w for _, w in documents}) > 1:
        raise UserError("documents with different weights: make a corpus of each with 'craton corpus build'")
    if machine.world()[0] == 0:  # a folder that is in use is refused before anything is made
        with claim(out, "training", resume=resume, hint=_hint(out)):
            pass
    start, folder = time.monotonic(), out.with_name(f"{out.name}-corpus")
    there = resume and (folder / "manifest.json").exists()
    if there and read_json(folder / "manifest.json")["options"]["sources"] != [name for name, _ in documents]:
        raise UserError(f"{out}: the run was started on other documents; give the same ones to --resume")
    if machine.world()[0] == 0 and not there:
        tokenizer = str(parse_corpora(corpora)[0][0] / "tokenizer") if corpora else base or None
        say(f"1. A corpus of the documents, in {folder}\n")
        options = BuildOptions([name for name, _ in documents], [], [], tokenizer=tokenizer, for_run=True)
        remove_corpus(folder, options)
        try:
            build(options, folder)
        except UserError as error:
            fix = f"'craton corpus build ... --out {folder}' has these options; then 'craton train {folder}'"
            raise UserError(f"{error} ({fix})" if "--" in str(error) else str(error), field=error.field) from None
        say("\n2. A model of it\n")
    while not (folder / "manifest.json").exists():  # on other processes than the first
        time.sleep(0.5)
    return [*corpora, f"{folder}={documents[0][1]}"], time.monotonic() - start


def _agreed(processes: Processes, call: Callable[[], Any]) -> Any:
    """call() here; where it fails on any process, the same UserError on all."""
    result, problem = None, None
    try:
        result = call()
    except UserError as error:
        problem = error
    found = next((p for p in processes.gather(problem) if p is not None), None)
    if found is not None:
        raise problem or found
    return result


def _claim(asked: _Asked, held: ExitStack) -> None:
    """The folder is this run's, until `held` is closed."""
    held.enter_context(claim(asked.out, "training", resume=asked.resume, hint=_hint(asked.out)))


def _hint(out: Path) -> str:
    started = (out / "training").exists()
    return "add --resume to go on with it, or give another --out" if started else "give another --out"


def _train(asked: _Asked, make_job: MakeJob) -> dict[str, Any]:
    processes, out = asked.processes, asked.out
    settled = _settle(asked)
    recipe, peak = from_dict(settled["recipe"]), settled["peak"]
    base = load_model(asked.base) if asked.base else None
    config = ModelConfig(**settled["model"]) if base is None else base.network.config
    tokenizer = None if base is None else base.tokenizer
    del base  # its weights are read again where they are wanted
    length = recipe.data.sequence_length or 1
    check_shares((recipe.data.batch_tokens or 0) // length, processes.world, length)
    job = _agreed(processes, lambda: make_job(asked.corpora, asked.weights, recipe, config, processes.device))
    if tokenizer is not None:
        store = Continued(lambda: load_model(asked.base).network, config, tokenizer)
        own = single_file(Path(asked.base))
        chats = not (own.is_dir() and only_pretrained(own))
        job = dataclasses.replace(job, store=store, name="continued pretraining" if chats else job.name)
    _agreed(processes, lambda: memory.check(config, recipe, processes.world, asked.free))
    if processes.first and not asked.stored.exists():
        write_json(asked.stored, settled)
    budget = None if settled["asked"]["recipe"]["run"]["steps"] else settled["asked"]["recipe"]["run"]["budget"]
    kind, budgeted = parse_budget(budget) if budget else ("", 0.0)
    run = Run(out, job, recipe, processes, peak, asked.began + budgeted if kind == "seconds" else None)
    if processes.first:
        _say_plan(config, settled, processes.device)
        _say_passes(asked, recipe)
    _take_up(run, asked)
    if processes.first and run.state.step < run.schedule.steps:
        job.store.write_rest(out)
    references = explain.references(asked.corpora) if processes.first else {}
    resumed = run.state.step > 0
    energy, interrupted = machine.energy_joules(), None
    try:
        run.train()
    except Interrupted as signal_:
        interrupted = signal_
    except UserError as error:
        if processes.first:
            _finish(run, settled, asked, references, "given up", None, str(error))
        raise
    if processes.first:
        used = machine.energy_joules()
        known = used is not None and energy is not None and used > energy and not resumed  # else of a part of it
        joules = used - energy if known and used is not None and energy is not None else None
        _finish(run, settled, asked, references, "interrupted" if interrupted else "finished", joules, resumed=resumed)
    processes.barrier()
    if interrupted:
        raise interrupted
    return record.summary(out) if processes.first else {}


def _say_plan(c: ModelConfig, settled: dict[str, Any], device: str) -> None:
    shape = f"{c.num_hidden_layers} layers of {c.hidden_size}, {c.num_attention_heads}/{c.num_key_value_heads} heads"
    say(f"model    {count(c.parameters)} parameters: {shape}, vocabulary {c.vocab_size}")
    for line in settled["why"]:
        say(f"plan     {line}")
    cpu, peak = machine.facts(device)["cpu"], amount(settled["peak"], "FLOP/s")
    say(f"machine  {cpu}, {torch.get_num_threads()} threads, {peak} in a large product")


def _say_passes(asked: _Asked, recipe: Recipe) -> None:
    """How often each corpus is read, where several are mixed; loud where that is too often."""
    tokens = (recipe.run.steps or 0) * (recipe.data.batch_tokens or 0)
    for corpus, weight in zip(asked.corpora, asked.weights, strict=True):
        passes = tokens * weight / sum(asked.weights) / max(1, corpus.length("train"))
        if len(asked.corpora) > 1:
            say(f"plan     {corpus.folder}: {passes:.1f} passes")
        if passes > MOST_EPOCHS:
            fix = "from about 4 on repeats teach less and less (arXiv 2305.16264); give more text or a smaller weight"
            say(f"WARNING  {corpus.folder} is read {passes:.0f} times: {fix}")


def _take_up(run: Run, asked: _Asked) -> None:
    """Go on from the newest checkpoint, if there is one."""
    first = asked.processes.first
    if asked.processes.agree(any((asked.out / "training").glob("step-*"))):
        run.restore()
        if run.pace:
            run.pace.deadline -= run.state.seconds
        if first:
            say(f"resumed at step {run.state.step} of {run.schedule.steps}")
    elif asked.resume and first:
        say("no checkpoint yet: starting from the first step")


def _settle(asked: _Asked) -> dict[str, Any]:
    """The resolved recipe, on all processes: planned now, or the stored one on resume. UserError if another one is
    asked for."""
    if asked.processes.agree(asked.stored.exists()):
        settled = _agreed(asked.processes, lambda: _stored(asked) if asked.processes.first else None)
        return asked.processes.agree(settled)
    device, recipe, world = asked.processes.device, asked.recipe, asked.processes.world
    bf16 = recipe.run.precision == "bf16" or (recipe.run.precision is None and device == "cuda")
    peak = machine.gemm_peak(device, torch.bfloat16 if bf16 else torch.float32)

    def planned(measure: Callable[[ModelConfig, Recipe], float]) -> Any:
        try:
            base = _open_base(asked).network.config if asked.base else None
            return plan(recipe, asked.corpora, peak * world, measure, asked.began, device, world, base)
        except UserError as error:
            return error

    result = together(asked.processes, planned)
    if isinstance(result, UserError):
        raise result
    resolved, config, why = result
    settled = {"format": FORMAT, "asked": asked.facts(), "recipe": as_dict(resolved)}
    settled |= {"model": dataclasses.asdict(config), "why": why, "peak": asked.processes.agree(peak)}
    settled["folders"] = [str(c.folder.absolute()) for c in asked.corpora]
    settled["digest"] = digest(settled)
    return settled


def _stored(asked: _Asked) -> dict[str, Any]:
    """The recipe of a run that was begun before."""
    settled: Any = read_json(asked.stored)
    if not isinstance(settled, dict):
        settled = {}
    if "asked" in settled and settled.get("format") != FORMAT:
        raise UserError(f"{asked.stored}: a run {OLD}", code="older_version")
    if settled.get("digest") != digest({k: v for k, v in settled.items() if k != "digest"}):
        raise UserError(f"{asked.stored}: altered or damaged; start again with another --out")
    facts = asked.facts()
    defaults = {part: dataclasses.asdict(getattr(Recipe(), part)) for part in facts["recipe"]}
    for part, values in facts["recipe"].items():
        for key, value in values.items():
            name = f"{part}.{key}"
            wanted = name in asked.recipe.given or value != defaults[part][key]
            asked_before = {**defaults[part], **settled["asked"]["recipe"].get(part, {})}
            if wanted and value != (before := asked_before[key]):
                what = f"the run was started with {name} = {before!r}, not {value!r}"
                raise UserError(f"{asked.out}: {what}; --resume goes on with the same recipe", field=name)
    if settled["asked"].get("base") != facts.get("base"):
        raise UserError(f"{asked.out}: the run was started from another model; give the same --from to --resume")
    if settled["asked"]["corpora"] != facts["corpora"] or settled["asked"]["weights"] != facts["weights"]:
        raise UserError(f"{asked.out}: the run was started on another corpus; give the same one to --resume")
    return settled


def _samples(model: Model, corpora: list[Corpus]) -> list[dict[str, str]]:
    """Continuations by the finished model: of the openings of held-out documents."""
    prompts = []
    for corpus in corpora:
        for row in corpus.rows("heldout")[:40:10]:
            ids = corpus.read("heldout", int(row["start"]), min(24, int(row["tokens"])))
            prompts.append(model.tokenizer.decode(ids.tolist()))
    length = min(160, model.network.config.max_position_embeddings // 2)
    some = prompts[:4] or ["The"]
    return [{"prompt": p, "text": model.generate(p, length, 0.7, seed=i)} for i, p in enumerate(some)]


def _finish(
    run: Run,
    settled: dict[str, Any],
    asked: _Asked,
    references: dict[str, Any],
    status: str,
    joules: float | None,
    problem: str = "",
    resumed: bool = False,
) -> None:
    """record.json, and a last line. problem: why it was given up."""
    out, job, state = run.out, run.job, run.state
    rows = read_metrics(out / "metrics.jsonl")
    steps = [r for r in rows if "loss" in r]
    last = steps[-1] if steps else {}
    evaluated = [r for r in steps if "heldout_loss" in r]
    tokens, seconds, world = run.units, state.seconds or 1e-9, run.processes.world
    config = run.network.config
    per_unit = job.cost.flops / job.cost.units
    matrices = job.cost.matrix_flops / job.cost.units
    unit, rate, peak, weights = job.cost.unit, tokens / seconds, settled["peak"], out / "model.safetensors"
    facts: dict[str, Any] = {"format": "craton-record-1", "status": status, "objective": job.name, "steps": state.step}
    facts |= {"planned_steps": run.recipe.run.steps, "problem": problem or None}
    facts |= {unit: tokens, "flops": tokens * per_unit, "seconds": round(seconds, 2)}
    facts |= {"command_seconds": round(time.monotonic() - asked.began, 2), f"{unit}_per_second": rate}
    facts |= {"peak_share": rate * matrices / peak / world, "gemm_peak_flops": peak}
    facts |= {"energy_joules": joules, "cost": None}
    facts |= {"parameters": config.parameters, "matrix_parameters": config.matrix_parameters}
    facts |= {k: last[k] for k in ("loss", "bits_per_byte") if k in last}
    if evaluated:
        facts |= {k: evaluated[-1][k] for k in ("heldout_loss", "heldout_bits_per_byte")}
    facts |= {"rollbacks": state.rollbacks, "skipped_batches": list(state.skipped)}
    facts |= {"weights_sha256": sha256(weights) if weights.exists() else None}
    facts |= {"recipe": settled["recipe"], "plan": settled["why"], "model": settled["model"]}
    facts |= {"corpora": record.corpus_facts(asked.corpora, asked.weights)}
    facts |= {"environment": machine.facts(run.processes.device) | {"processes": world}}
    facts |= {"events": [r for r in rows if "event" in r], "curve": record.curve(rows)}
    kept = ("step", "seconds", "heldout_bits_per_byte", "sample", "tasks")
    looks = [{k: r.get(k) for k in kept} for r in evaluated]
    facts |= {"looks": looks, "references": references, "command": asked.command}
    if evaluated:
        facts |= {k: evaluated[-1].get(k) for k in ("by_source", "by_position")}
        bits_per_byte = evaluated[-1]["heldout_bits_per_byte"]
        facts |= {"forecast": {"times": 10, "bits_per_byte": explain.forecast(bits_per_byte, 10)}}
    facts |= {"samples": [], "recitation": {}}
    if status == "finished":
        model = load_model(str(out))
        facts |= {"samples": _samples(model, asked.corpora), "recitation": explain.recitation(model, asked.corpora)}
    write_json(out / "record.json", facts)
    if status == "finished":
        bits = f", held-out {evaluated[-1]['heldout_bits_per_byte']:.4f} bits/byte" if evaluated else ""
        say(f"{out}: {count(tokens)} {unit} in {span(seconds)}{bits}")
        if run.pace and not resumed:
            took = time.monotonic() - asked.began
            say(f"planned {settled['recipe']['run']['budget']}, took {span(took)} so far; the report is next")
    elif status == "interrupted":
        say(f"{out}: stopped at step {state.step}, state saved; go on with --resume")
