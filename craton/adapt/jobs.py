"""Each method as a job for the one loop: its rows, its objective, what is stored, and what to look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from craton.adapt import guards
from craton.adapt.data import Sample
from craton.adapt.measure import Measure, asked_of, in_words, sampling_of
from craton.adapt.methods import Distillation, Labelled, PolicyGradient, Preference, fine_tuning, reward_model
from craton.adapt.opened import Opened
from craton.adapt.rollout import Asked, Rollouts, check_ratio
from craton.adapt.rows import Compared, Packed, Renderer, Tokens, answer_rows, log_probabilities
from craton.adapt.store import Adapter, WholeReward, open_base
from craton.adapt.teach import teacher_answers
from craton.base import Progress, UserError, publish
from craton.engine.request import Sampling
from craton.model.lora import LoraSpec
from craton.tasks.scorers import SCORERS
from craton.tasks.task import Example, Task
from craton.train.distributed import Processes
from craton.train.job import Cost, Job, Looked, Objective
from craton.train.pretrain import Continued as Whole
from craton.train.pretrain import kind as decoder_kind

# What each method learns from.
NEEDS: dict[str, tuple[str, ...]] = {
    "sft": ("answers",), "dpo": ("pairs",), "ipo": ("pairs",), "orpo": ("pairs",), "simpo": ("pairs",),
    "reward": ("pairs",), "kto": ("labelled answers", "pairs"), "grpo": ("answers", "prompts"),
    "distill": ("answers", "prompts"),
}  # fmt: skip
_WITH_REFERENCE = ("dpo", "ipo", "kto")
_TOGETHER = 8  # labelled answers whose distance from the reference is judged together
_STEPS = 150  # that the data should give at least, by smaller batches
_RL_STEPS = 100
_MICRO = 4096  # tokens of a forward pass


@dataclass
class Made:
    """A job with what the plan and the record say of it. after: measures the trained network."""

    job: Job
    steps: int
    steps_why: str
    trained: int
    parameters: int
    after: Callable[[Any], dict[str, Any]]
    why: list[str] = field(default_factory=list)


def make_job(opened: Opened, looker: Measure) -> Made:
    """The job of a resolved recipe. UserError for data that cannot be learned from."""
    tune = opened.recipe.tune
    store = _store(opened)
    if tune.method == "sft" or (tune.method == "distill" and tune.policy == "off"):
        return _texts(opened, store, looker)
    if tune.method in ("grpo", "distill"):
        return _rollouts(opened, store, looker)
    return _compared(opened, store, looker)


def _store(opened: Opened) -> Adapter | Whole:
    tune, given, model = opened.recipe.tune, opened.given, opened.model
    if tune.lora:
        targets = tuple(t.strip() for t in tune.targets.split(",") if t.strip())
        spec = LoraSpec(tune.lora, tune.alpha, tune.rank_stabilised, tune.dora, targets)
        seed, base = opened.recipe.run.seed, opened.facts["base"]
        return Adapter(model.network, spec, model.tokenizer, seed=seed, base=base)
    config = opened.config
    kind = WholeReward if tune.method == "reward" else Whole
    return kind(lambda: open_base(given.model).network, config, model.tokenizer)


def _kind(name: str, p: nn.Parameter) -> str:
    """What a trained parameter is to the optimizers."""
    return "matrix" if "lora_" in name and p.ndim > 1 else decoder_kind(name, p)


def _size(opened: Opened, store: Adapter | Whole) -> tuple[int, int]:
    """(parameters that are trained, parameters)."""
    parameters = opened.config.parameters
    if isinstance(store, Whole):
        return parameters, parameters
    network = store.build()
    return sum(p.numel() for p in network.parameters() if p.requires_grad), parameters


def _cost(opened: Opened, store: Adapter | Whole, length: int) -> Cost:
    """Of a row; where weights are kept their gradients are not computed."""
    share = 4 if isinstance(store, Adapter) else 6
    matrices = opened.config.matrix_parameters
    return Cost("tokens", length, share * matrices * length, share * matrices * length)


def _job(
    opened: Opened, store: Any, source: Any, objective: Objective, length: int, look: Callable[[Any, Processes], Looked]
) -> Job:
    recipe = opened.recipe
    recipe.data.sequence_length, recipe.data.batch_tokens = length, source.rows * length
    recipe.data.micro_tokens = recipe.data.micro_tokens or max(_MICRO, length * source.together)
    return Job(recipe.tune.method, source, objective, store, _cost(opened, store, length), _kind, look)


def _look(opened: Opened, looker: Measure) -> Callable[[Any, Processes], Looked]:
    """What is measured on the way; nothing of a reward model, or of a network in pieces."""

    def look(network: Any, processes: Processes) -> Looked:
        if opened.recipe.tune.method == "reward" or processes.mesh is not None:
            return Looked({})
        found = looker(network, opened.recipe.tune.max_tokens)
        return Looked(found, in_words(found))

    return look


# ---- texts ------------------------------------------------------------------------------------------------------


def rendered(samples: Sequence[Sample], renderer: Renderer, which: str) -> list[Tokens]:
    """An answer of each sample in tokens: "answer" or "worse"."""
    progress, out = Progress(), []
    for i, sample in enumerate(samples):
        out.append(renderer.answer(sample, getattr(sample, which), sample.form))
        progress.show(f"rendering {i} of {len(samples)} rows")
    progress.clear()
    return out


def _texts(opened: Opened, store: Any, looker: Measure) -> Made:
    recipe, samples = opened.recipe, opened.samples
    objective: Objective = fine_tuning
    if recipe.tune.method == "distill":
        samples, objective = _taught(opened)
    texts = rendered(samples, opened.renderer, "answer")
    guards.check_masks(samples, texts, opened.end_ids, any(s.chats for s in samples))
    longest, total = max(len(t) for t in texts) - 1, sum(len(t) - 1 for t in texts)
    length = recipe.data.sequence_length or min(opened.renderer.context, max(256, -(-longest // 64) * 64))
    if longest > length:
        raise UserError(
            f"data.sequence_length is {length}, but a row has {longest} tokens", field="data.sequence_length"
        )
    epochs = recipe.tune.epochs or 1.0
    rows = recipe.tune.rows or max(1, min(64, round(total * epochs / _STEPS / length)))
    source = Packed(texts, length, rows, recipe.run.seed)
    steps = round(epochs * len(source.epoch(0)) / rows)
    why = [f"{len(texts)} texts of {total} tokens in rows of {length}, {rows} rows a step"]
    job = _job(opened, store, source, objective, length, _look(opened, looker))
    trained, parameters = _size(opened, store)
    return Made(job, steps, f"{epochs:g} passes over the data", trained, parameters, _after(opened, looker), why)


def _after(opened: Opened, looker: Measure) -> Callable[[Any], dict[str, Any]]:
    return lambda network: looker(network, opened.recipe.tune.max_tokens)


# ---- pairs and labels -------------------------------------------------------------------------------------------


def _compared(opened: Opened, store: Any, looker: Measure) -> Made:
    recipe, tune, seed = opened.recipe, opened.recipe.tune, opened.recipe.run.seed
    good: list[list[bool]] | None = None
    if tune.method == "kto":
        groups, good = _labelled_groups(opened)
    else:
        better = rendered(opened.samples, opened.renderer, "answer")
        worse = rendered(opened.samples, opened.renderer, "worse")
        guards.check_masks(opened.samples, better, opened.end_ids, any(s.chats for s in opened.samples))
        groups = [list(pair) for pair in zip(better, worse, strict=True)]
        if tune.method == "reward":
            groups = [[_to_the_end(t) for t in pair] for pair in groups]
    together = len(groups[0])
    reference = _reference(opened, groups) if tune.method in _WITH_REFERENCE else None
    epochs = tune.epochs or 1.0
    each = max(1, min(16, round(len(groups) * epochs / _STEPS)))
    rows = tune.rows or each * together
    if rows % together:
        raise UserError(f"tune.rows is {rows}, must be a multiple of {together}", field="tune.rows")
    source = Compared(groups, reference, rows, seed, good)
    steps = max(1, round(epochs * len(groups) * together / rows))
    beta = tune.beta or 0.0
    objectives: dict[str, Objective] = {"reward": reward_model, "kto": Labelled(beta, together)}
    objective = objectives.get(tune.method) or Preference(tune.method, beta, tune.gamma)
    length = max(len(t) for g in groups for t in g)
    recipe.data.micro_tokens = recipe.data.micro_tokens or max(_MICRO, length * together)
    job = _job(opened, store, source, objective, length, _look(opened, looker))
    why = [f"{len(groups)} groups of {together} answers, up to {length} tokens each, {rows} answers a step"]
    trained, parameters = _size(opened, store)
    after = (lambda network: _reward_after(network, opened)) if tune.method == "reward" else _after(opened, looker)
    return Made(job, steps, f"{epochs:g} passes over the data", trained, parameters, after, why)


def _to_the_end(text: Tokens) -> Tokens:
    """With a token more that is only a target, so that the last one is an input too."""
    return Tokens(np.append(text.ids, text.ids[-1]), np.append(text.learned, True))


def _labelled_groups(opened: Opened) -> tuple[list[list[Tokens]], list[list[bool]]]:
    """Answers in groups, each followed by the answers of others behind their prompts; and which are good."""
    labelled = []
    for s in opened.samples:
        if s.worse is None:
            labelled.append((s, s.answer, bool(s.good)))
        else:
            labelled += [(s, s.answer, True), (s, s.worse, False)]
    if len({g for _, _, g in labelled}) < 2:
        raise UserError(f"{labelled[0][0].where}: all answers have the same label, so nothing tells them apart")
    order = np.random.default_rng(opened.recipe.run.seed).permutation(len(labelled)).tolist()
    order += order[: -len(order) % _TOGETHER]  # the last group is filled up
    groups, good = list[list[Tokens]](), list[list[bool]]()
    for at in range(0, len(order), _TOGETHER):
        own = [labelled[i] for i in order[at : at + _TOGETHER]]
        texts = [opened.renderer.answer(s, said, s.form) for s, said, _ in own]
        others = [
            opened.renderer.answer(s, own[(i + 1) % len(own)][1], s.form)
            if s.chats == own[(i + 1) % len(own)][0].chats
            else texts[i]
            for i, (s, _, _) in enumerate(own)
        ]
        groups.append(texts + others)
        good.append([g for _, _, g in own])
    return groups, good


def _reference(opened: Opened, groups: list[list[Tokens]]) -> np.ndarray:
    """(groups, texts): log-probabilities by the model as it was; computed once and kept beside the checkpoints."""
    path = opened.given.out / "training" / "reference.npy"
    if path.exists() and path.with_name("recipe.json").exists():  # else another run's, that never began
        kept: np.ndarray = np.load(path, allow_pickle=False)
        if kept.shape == (len(groups), len(groups[0])):
            return kept
    progress = Progress()
    texts = [t for g in groups for t in g]
    show = partial(progress.show_part, "reference: texts")
    found = log_probabilities(opened.model.network, texts, show).reshape(len(groups), -1)
    progress.clear()
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish(path) as temporary, open(temporary, "wb") as f:
        np.save(f, found)
    return found


def _reward_after(network: Any, opened: Opened) -> dict[str, Any]:
    """How often held-out pairs are ranked as they are."""
    right = []
    for s in opened.held:
        pair = [_to_the_end(opened.renderer.answer(s, said, s.form)) for said in (s.answer, s.worse)]
        rows = answer_rows(pair)
        with torch.no_grad():
            better, worse = network(rows.ids, rows.size).tolist()
        right.append(better > worse)
    return {"heldout_preferred": float(np.mean(right))} if right else {}


# ---- the network's own answers ----------------------------------------------------------------------------------


def _rollouts(opened: Opened, store: Any, looker: Measure) -> Made:
    recipe, tune, task = opened.recipe, opened.recipe.tune, opened.task
    chats = opened.dialogue is not None
    kind = "distill" if tune.method == "distill" else tune.variant
    answers = 1 if kind == "distill" else tune.answers
    if task is not None:
        prompts = asked_of(task, "train", opened.renderer)
        sampling = sampling_of(task, chats, tune.max_tokens, temperature=tune.temperature, n=answers)
    else:
        prompts = [Asked(opened.renderer.prompt(s), Example(s.where, ("",))) for s in opened.samples]
        sampling = Sampling(tune.max_tokens or 256, tune.temperature, n=answers)
    longest = max(len(a.ids) for a in prompts)
    room = opened.renderer.context - longest
    if room < 1:
        raise UserError(f"a prompt has {longest} tokens, the model's context is {opened.renderer.context}")
    most = min(sampling.max_tokens, room)
    a_step = max(1, (tune.rows or 16 * answers) // answers)
    reward = None if kind == "distill" else _reward(task)
    wanted = bool(tune.beta) and isinstance(store, Adapter)
    if tune.beta and not isinstance(store, Adapter):
        raise UserError("tune.beta: the reference is the model without its adapter; use --lora", field="tune.beta")
    source = Rollouts(
        prompts, reward, opened.model.tokenizer, replace(sampling, max_tokens=most), prompts_a_step=a_step, kind=kind,
        seed=recipe.run.seed, end_ids=opened.end_ids, reference=wanted, calculator=tune.calculator,
    )  # fmt: skip
    objective: Objective = PolicyGradient(kind, tune.clip_low, tune.clip_high, tune.beta or 0.0, most)
    if kind == "distill":
        objective = Distillation("reverse", _teacher(opened))
    length = longest + most
    ours = [0]

    def look(network: Any, processes: Processes) -> Looked:
        found = {**looker(network, most, answers=min(8, max(2, tune.answers))), **source.last}
        return Looked(found, in_words(found))

    def checked(network: Any, batch: Any) -> Any:
        losses = objective(network, batch)
        ours[0] += 1
        if ours[0] == 1 and "ratio" in losses.sums and tune.temperature == 1.0:
            total, rows = losses.sums["ratio"]
            check_ratio(float(total / rows))
        return losses

    job = _job(opened, store, source, checked, length, look)
    trained, parameters = _size(opened, store)
    why = [f"{a_step} prompts a step, {answers} answers to each, of up to {most} tokens; {kind}"]

    def after(network: Any) -> dict[str, Any]:
        return looker(network, most, answers=min(8, max(2, tune.answers)))

    return Made(job, _RL_STEPS, "the default of methods that sample", trained, parameters, after, why)


def _reward(task: Task | None) -> Callable[[Example, str], float]:
    assert task is not None
    if task.by_likelihood or task.scorer == "judge":
        raise UserError(
            f"task {task.name}: its scorer ({task.scorer}) judges no written answer by itself", field="task"
        )
    score = SCORERS[task.scorer]
    return lambda example, text: score(task, example, text).score


def _teacher(opened: Opened) -> Any:
    """The network of a local teacher with the same vocabulary."""
    teacher = open_base(opened.given.teacher)
    own, other = opened.model.tokenizer.backend.get_vocab(), teacher.tokenizer.backend.get_vocab()
    if own != other:
        fix = "--set tune.policy=off learns from its answers as text"
        raise UserError(f"{opened.given.teacher}: has other tokens than {opened.given.model}; {fix}", field="teacher")
    return teacher.network.requires_grad_(False)


def _taught(opened: Opened) -> tuple[list[Sample], Objective]:
    """The teacher's answers to the samples' prompts, kept beside the checkpoints; and what is learned of them: its
    thoughts where it has the same tokens, else the words."""
    samples = teacher_answers(opened)
    if Path(opened.given.teacher.partition("+")[0]).exists():
        try:
            return samples, Distillation("forward", _teacher(opened))
        except UserError:
            pass
    return samples, fine_tuning
