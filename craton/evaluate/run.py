"""`craton eval`: models on tasks, item by item, with what a reader needs to trust the number."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from craton.base import Progress, UserError, publish, say, write_json
from craton.engine.score import Likelihood
from craton.evaluate.contamination import check_corpus, contaminated, corpora_of
from craton.evaluate.models import Decoding, LocalModel, Prompt, Subject, Written, open_subject
from craton.evaluate.statistics import calibration, interval, paired, standard_error
from craton.evaluate.store import Store, cache_folder, key_of
from craton.tasks.scorers import SCORERS, Verdict, judge_choices, judge_prompt, judged
from craton.tasks.task import CHOICE, Example, Task

FORMAT = "craton-evaluation-1"
_MANY = 0.1  # the share of answers from which on a warning is due
Sample = dict[str, Any]
Progressing = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """shots: None for each task's own. chat: None for what suits the task. corpora: to look for items in, besides those
    that the models say they were trained on."""

    shots: int | None = None
    limit: int | None = None
    seed: int = 0
    chat: bool | None = None
    corpora: tuple[Path, ...] = ()


@dataclass
class Outcome:
    """One formulation of a task, by one model. values: the item's score by every metric, in the items' order."""

    formulation: str
    shots: int
    chat: bool
    samples: list[Sample] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    curve: dict[str, Any] | None = None
    more: dict[str, float] = field(default_factory=dict)  # metrics that are no means over items

    def add(self, e: Example, prompt: Any, values: dict[str, float], about: Sample) -> None:
        """An item's scores and sample."""
        for metric, value in values.items():
            self.values.setdefault(metric, []).append(value)
        self.samples.append({"id": e.id, "prompt": prompt} | about | ({"group": e.group} if e.group else {}))


# ---- one task, one model -----------------------------------------------------------------------------------------


class Evaluation:
    """One model under one store."""

    def __init__(self, subject: Subject, store: Store, settings: Settings):
        self.subject, self.store, self.settings = subject, store, settings

    def run(self, task: Task) -> Outcome:
        """All formulations of a task; the best one. UserError for what cannot be put to this model."""
        found = [self._formulation(task, name) for name in task.formulations]
        best = max(found, key=lambda o: _mean(o.values[task.metric]))
        for o in found if len(found) > 1 else []:
            best.more[f"{task.metric} ({o.formulation})"] = _mean(o.values[task.metric])
        return best

    def _formulation(self, task: Task, name: str) -> Outcome:
        chat = self.settings.chat
        if chat is None:
            chat = not task.by_likelihood and self.is_so("chats")
        elif chat and not self.is_so("chats"):
            raise UserError(f"{self.subject.name}: has no chat template; leave out --chat", field="chat")
        examples = self.examples(task, name)
        if chat and any(not e.messages for e in examples):
            raise UserError(f"task {task.name}: {name} has no chat form; leave out --chat", field="chat")
        outcome = Outcome(name, self.shots(task), chat)
        put = self._by_likelihood if task.by_likelihood else self._by_answer
        put(task, examples, outcome)
        return outcome

    def shots(self, task: Task) -> int:
        """Worked examples before each item."""
        return task.shots if self.settings.shots is None else self.settings.shots

    def examples(self, task: Task, formulation: str) -> list[Example]:
        """The items with their shots."""
        k, seed = self.shots(task), self.settings.seed
        return [task.example(r, formulation, task.shots_for(r, k, seed)) for r in task.items(self.settings.limit)]

    def is_so(self, what: str) -> bool:
        """Whether the model "chats" or "thinks"; known from the store, it need not be opened."""
        known = key_of(f"{what}-1", self.subject.identity)
        if (found := self.store.get(known)) is None:
            found = bool(getattr(self.subject, what))
            self.store.put(known, found)
        return bool(found)

    def _check_room(self, task: Task, formulation: str, prompts: list[Prompt], answer: int) -> int:
        """How many prompts are too long and will be cut at their left. UserError where shots are the reason."""
        if not isinstance(self.subject, LocalModel):  # the server refuses them
            return 0
        context, shots = self.subject.context, self.shots(task)
        sizes = [self.subject.count(p) for i, p in enumerate(prompts) if i == 0 or p != prompts[i - 1]]
        if max(sizes) + answer <= context or not shots:
            return sum(size + answer > context for size in sizes)
        longest = max(self.examples(task, formulation), key=lambda e: len(e.prompts[0]))
        fits = shots - 1
        while fits:
            fewer = task.shots_for(longest.row, fits, self.settings.seed)
            e = task.example(longest.row, formulation, fewer)
            if self.subject.count(Prompt(e.prompts[0], e.messages if prompts[0].messages else ())) + answer <= context:
                break
            fits -= 1
        problem = f"{shots} shots and item {longest.id} are {max(sizes)} tokens, {answer} more for the answer"
        fix = f"{fits or 'none'} would fit"
        raise UserError(f"task {task.name}: {problem}, the context is {context}; {fix}", field="shots")

    def _label(self, task: Task, formulation: str) -> str:
        return f"{_short(self.subject.name)}: {task.name} ({formulation})"

    # ---- by likelihood ----

    def _by_likelihood(self, task: Task, examples: list[Example], outcome: Outcome) -> None:
        chat = outcome.chat
        requests: list[tuple[Prompt, str]] = []
        for e in examples:
            prompts = e.prompts if len(e.prompts) > 1 else e.prompts * len(e.choices)
            continuations = e.texts if chat else e.choices
            for text, continuation in zip(prompts, continuations, strict=True):
                requests.append((Prompt(text, e.messages if chat else ()), continuation))
        asked = len(requests)
        if task.metric == "acc_mutual_info":
            requests += [(Prompt(task.neutral), c) for e in examples for c in e.choices]
        scored, cut = self.scores(task, outcome.formulation, requests)
        at = 0
        for e in examples:
            found = scored[at : at + len(e.choices)]
            alone = scored[asked + at : asked + at + len(e.choices)]
            at += len(e.choices)
            values, judged_so = judge_choices(task, e, found, alone)
            prompt: Any = e.prompts[0] if len(e.prompts) == 1 else list(e.prompts)
            shown = {"choices": list(e.texts if chat else e.choices)}
            outcome.add(
                e, list(e.messages) if chat else prompt, values, shown | judged_so | {"score": values[task.metric]}
            )
        likelihoods = [s["loglikelihoods"] for s in outcome.samples]
        if task.scorer == CHOICE:
            outcome.curve = calibration(likelihoods, [s["target"] for s in outcome.samples])
            outcome.more["ece"] = outcome.curve["ece"]
        else:
            outcome.more["perplexity"] = math.exp(min(700.0, -_mean([values[0] for values in likelihoods])))
        if cut:
            outcome.warnings.append(f"{cut} items are longer than the context: their beginnings were cut off")

    def scores(self, task: Task, formulation: str, requests: list[tuple[Prompt, str]]) -> tuple[list[Likelihood], int]:
        """Of each (context, continuation), from the store where it is there; and how many were too long."""
        keys = [key_of("likelihood-2", self.subject.identity, p.text, p.messages, c) for p, c in requests]
        cut = key_of("cut-2", self.subject.identity, keys)

        def score(missing: list[int], progress: Progressing) -> Iterator[tuple[int, Any]]:
            self.store.put(cut, self._check_room(task, formulation, [p for p, _ in requests], 1))
            for i, found in self.subject.score([requests[i] for i in missing], progress):
                yield i, [found.total, found.greedy, found.tokens]

        known = self._kept(keys, score, self._label(task, formulation))
        return [Likelihood(*value) for value in known], self.store.get(cut) or 0

    def _kept(self, keys: list[str], compute: Callable[[list[int], Progressing], Any], label: str) -> list[Any]:
        """The values under some keys; those that the store lacks are computed and kept one by one, so that a run that
        is killed goes on where it stopped. compute: from the numbers of the missing ones, (place in them, value)."""
        known = [self.store.get(key) for key in keys]
        missing = [i for i, value in enumerate(known) if value is None]
        if missing:
            progress = Progress()
            for i, value in compute(missing, partial(progress.show_part, label)):
                known[missing[i]] = value
                self.store.put(keys[missing[i]], value)
            progress.clear()
        return known

    # ---- by what was written ----

    def _by_answer(self, task: Task, examples: list[Example], outcome: Outcome) -> None:
        prompts = [Prompt(e.prompts[0], e.messages if outcome.chat else ()) for e in examples]
        stop = () if outcome.chat and task.scorer == "code" else task.stop  # code ends with its block
        how = Decoding(task.max_tokens, stop, seed=self.settings.seed)
        written = [w[0] for w in self.answers(task, outcome.formulation, prompts, how)]
        verdicts = self._verdicts(task, examples, written)
        for e, p, w, v in zip(examples, prompts, written, verdicts, strict=True):
            about: Sample = {"choices": [], "target": e.targets[0] if len(e.targets) == 1 else list(e.targets)}
            about |= {
                "answer": w.text,
                "parsed": v.parsed,
                "score": v.score,
                "metrics": v.metrics,
                "loglikelihoods": [],
            }
            about |= {"finish": w.finish, "tokens": w.tokens, "prompt_tokens": w.prompt_tokens}
            about |= {"note": v.note} if v.note else {}
            outcome.add(e, list(p.messages) if outcome.chat else p.text, {task.metric: v.score} | v.metrics, about)
        n = len(written)
        cut = sum(w.finish == "length" for w in written)
        empty = sum(not w.text.strip() for w in written)
        unread = sum(v.parsed is None for v in verdicts)
        outcome.more |= {"tokens": _mean([float(w.tokens) for w in written]), "cut": cut / n, "empty": empty / n}
        found = (
            (cut, f"{cut} of {n} answers were cut at {task.max_tokens} tokens: they never end"),
            (empty, f"{empty} of {n} answers are empty"),
            (unread, f"in {unread} of {n} answers no answer was found"),
        )
        outcome.warnings += [text for count, text in found if count > _MANY * n]

    def answers(self, task: Task, formulation: str, prompts: list[Prompt], how: Decoding) -> list[list[Written]]:
        """how.n answers to each prompt, from the store where they are there."""
        settings = [how.max_tokens, how.stop, how.temperature, how.n, how.thinking]
        keys = []
        for i, p in enumerate(prompts):
            seed = how.seed + i if how.temperature else 0
            keys.append(key_of("answer-2", self.subject.identity, p.text, p.messages, settings, seed))

        def write(missing: list[int], progress: Progressing) -> Iterator[tuple[int, Any]]:
            self._check_room(task, formulation, prompts, min(32, how.max_tokens))
            for i, found in self.subject.write([prompts[i] for i in missing], how, progress):
                yield i, [astuple(w) for w in found]

        return [[Written(*w) for w in value] for value in self._kept(keys, write, self._label(task, formulation))]

    def _verdicts(self, task: Task, examples: list[Example], written: list[Written]) -> list[Verdict]:
        if task.scorer != "judge":
            return [SCORERS[task.scorer](task, e, w.text) for e, w in zip(examples, written, strict=True)]
        judge = task.options.get("judge")
        subject = open_subject(judge, self.store) if judge else self.subject
        by = Evaluation(subject, self.store, replace(self.settings, shots=0))
        asked = [judge_prompt(task, e, w.text) for e, w in zip(examples, written, strict=True)]
        prompts = [Prompt(a, ({"role": "user", "content": a},) if by.is_so("chats") else ()) for a in asked]
        return [judged(reply[0].text) for reply in by.answers(task, "judging", prompts, Decoding(512))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ---- all of them -------------------------------------------------------------------------------------------------


def evaluate(models: list[str], tasks: list[Task], settings: Settings, out: Path | None = None) -> dict[str, Any]:
    """Scores of each model on each task; writes OUT/results.json and OUT/samples/, and says what they are. UserError
    before anything is written."""
    for corpus in settings.corpora:
        check_corpus(corpus)
    if settings.limit is not None and settings.limit < 1:
        raise UserError(f"--limit is {settings.limit}, must be at least 1", field="limit")
    if settings.shots is not None and settings.shots < 0:
        raise UserError(f"--shots is {settings.shots}, must not be negative", field="shots")
    if len(set(models)) < len(models):
        raise UserError("a model is named twice")
    for task in tasks:
        task.items()
    store = Store()
    folder = evaluation_folder(out, "results.json", models, [(t.name, t.source) for t in tasks], settings)
    results: dict[str, Any] = {"format": FORMAT, "models": {}, "out": str(folder)}
    results["settings"] = vars(settings) | {"corpora": [str(c) for c in settings.corpora]}
    outcomes: dict[str, dict[str, Outcome]] = {}
    for name in models:
        subject = open_subject(name, store)
        evaluation = Evaluation(subject, store, settings)
        outcomes[name] = {}
        for task in tasks:
            outcome = outcomes[name][task.name] = evaluation.run(task)
            corpora = [*dict.fromkeys([*settings.corpora, *(corpora_of(Path(name)) if subject.local else [])])]
            rows = task.items(settings.limit)
            found = contaminated(task, rows, corpora, store) if corpora else None
            samples = folder / "samples" / _file_name(name) / f"{_file_name(task.name)}.jsonl"
            facts = _facts(task, outcome, found, samples)
            results["models"].setdefault(name, {"tasks": {}})["tasks"][task.name] = facts
            _say_result(name, task, facts)
    results["differences"] = [
        {"task": task.name, "a": models[0], "b": other}
        | paired(*(outcomes[m][task.name].values[task.metric] for m in (models[0], other)))
        for task in tasks
        for other in models[1:]
    ]
    _write(folder, results, outcomes)
    for line in results["differences"]:  # each model against the first, on the same items
        what = f"{line['difference']:+.3f} ({line['low']:+.3f} to {line['high']:+.3f}), p = {line['p']:.3g}"
        say(f"{line['task']:<24} {_short(line['b'])} against {_short(line['a'])}: {what}")
    return results


def evaluation_folder(out: Path | None, own: str, *what: Any) -> Path:
    """Where results go: OUT, or a place in the cache that is the same for the same command. own: the file by which a
    folder is known to be one of these. UserError where OUT holds anything else."""
    if out is None:
        return (cache_folder() / "evaluations" / key_of([str(w) for w in what])[:16]).resolve()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / own).exists())):
        raise UserError(f"{out}: in use, and not by an evaluation; give another --out", field="out")
    return out.resolve()


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", text).strip("_.")[-80:] or "x"


def _facts(task: Task, outcome: Outcome, found: dict[str, Any] | None, samples: Path) -> dict[str, Any]:
    scores = outcome.values[task.metric]
    low, high = interval(scores)
    metrics = {metric: _mean(values) for metric, values in outcome.values.items()} | outcome.more
    facts = {
        "n": len(scores), "shots": outcome.shots, "formulation": outcome.formulation, "metric": task.metric,
        "value": _mean(scores), "stderr": standard_error(scores), "interval": [low, high], "metrics": metrics,
        "samples": str(samples), "chat": outcome.chat, "warnings": _warned(task, outcome, found),
        "source": task.source, "licence": task.licence,
    }  # fmt: skip
    if outcome.curve:
        facts["calibration"] = outcome.curve
    if found:
        facts["contamination"] = found
    groups = sorted({s["group"] for s in outcome.samples if s.get("group")})
    if len(groups) > 1:
        facts["groups"] = {g: _mean([s["score"] for s in outcome.samples if s.get("group") == g]) for g in groups}
    return facts


def _warned(task: Task, outcome: Outcome, found: dict[str, Any] | None) -> list[str]:
    out = list(outcome.warnings)
    if found and found["share"] > 0:
        out.append(f"{len(found['items'])} items stand in the training corpus ({found['share']:.1%})")
    groups = {r.get("group") for r in task.items()} - {None, ""}
    seen = {s.get("group") for s in outcome.samples} - {None, ""}
    if seen and len(seen) < len(groups):
        out.append(f"the first {len(outcome.samples)} items are of {len(seen)} of {len(groups)} groups")
    return out


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _say_result(name: str, task: Task, f: dict[str, Any]) -> None:
    low, high = f["interval"]
    how = f"{f['formulation']}, {f['shots']} shots, {'chat template' if f['chat'] else 'no chat template'}"
    found = f", contamination {f['contamination']['share']:.1%}" if "contamination" in f else ""
    value = f"{f['metric']} {f['value']:.3f} ({low:.3f} to {high:.3f})"
    say(f"{_short(name)}: {task.name:<20} {value}, n {f['n']}, {how}{found}")
    other = {k: v for k, v in f["metrics"].items() if k != f["metric"]}
    say("    " + ", ".join(f"{k} {v:.3f}" for k, v in other.items()))
    for warning in f["warnings"]:
        say(f"    warning: {warning}")


def _write(folder: Path, results: dict[str, Any], outcomes: dict[str, dict[str, Outcome]]) -> None:
    """Samples first, the results that name them last."""
    for name, tasks in outcomes.items():
        for task_name, outcome in tasks.items():
            path = Path(results["models"][name]["tasks"][task_name]["samples"])
            path.parent.mkdir(parents=True, exist_ok=True)
            with publish(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as f:
                f.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in outcome.samples)
    write_json(folder / "results.json", results)
