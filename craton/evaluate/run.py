"""`craton eval`: models on tasks, item by item, with what a reader needs to trust the number."""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from craton.base import Progress, UserError, publish, say, span, write_json
from craton.engine.score import Likelihood
from craton.evaluate.contamination import check_corpus, contaminated, corpora_of
from craton.evaluate.models import Decoding, Prompt, Subject, Written, open_subject
from craton.evaluate.statistics import calibration, interval, paired, standard_error
from craton.evaluate.store import Store, cache_folder, key_of
from craton.tasks.scorers import SCORERS, Verdict, judge_choices, judge_prompt, judged
from craton.tasks.task import CHOICE, Example, Task

FORMAT = "craton-evaluation-1"
_MANY = 0.1  # the share of answers from which on a warning is due
Sample = dict[str, Any]


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
    samples: list[Sample]
    values: dict[str, list[float]]
    warnings: list[str] = field(default_factory=list)
    curve: dict[str, Any] | None = None
    more: dict[str, float] = field(default_factory=dict)  # metrics that are no means over items


# ---- one task, one model -----------------------------------------------------------------------------------------


class Evaluation:
    """One model under one store."""

    def __init__(self, subject: Subject, store: Store, settings: Settings):
        self.subject, self.store, self.settings = subject, store, settings

    def run(self, task: Task) -> Outcome:
        """All formulations of a task; the best one. UserError for what cannot be put to this model."""
        found = [self._formulation(task, name) for name in task.formulations]
        metric = task.metric
        best = max(found, key=lambda o: _mean(o.values[metric]))
        if len(found) > 1:
            for o in found:
                best.more[f"{metric} ({o.formulation})"] = _mean(o.values[metric])
        return best

    def _formulation(self, task: Task, name: str) -> Outcome:
        shots = task.shots if self.settings.shots is None else self.settings.shots
        chat = self.settings.chat
        if chat is None:
            chat = not task.by_likelihood and self._chats()
        elif chat and not self._chats():
            raise UserError(f"{self.subject.name}: has no chat template; leave out --chat", field="chat")
        examples = self.examples(task, name)
        if chat and any(not e.messages for e in examples):
            raise UserError(f"task {task.name}: {name} has no chat form; leave out --chat", field="chat")
        label = f"{_short(self.subject.name)}: {task.name} ({name})"
        if task.by_likelihood:
            outcome = self._by_likelihood(task, name, examples, chat, label)
        else:
            outcome = self._by_answer(task, name, examples, chat, label)
        outcome.shots = shots
        return outcome

    def examples(self, task: Task, formulation: str) -> list[Example]:
        """The items with their shots."""
        shots = task.shots if self.settings.shots is None else self.settings.shots
        rows = task.items(self.settings.limit)
        return [task.example(r, formulation, task.shots_for(r, shots, self.settings.seed)) for r in rows]

    def _chats(self) -> bool:
        known = key_of("chats-1", self.subject.identity)
        if (found := self.store.get(known)) is None:
            found = self.subject.chats
            self.store.put(known, found)
        return bool(found)

    def _check_room(self, task: Task, prompts: list[Prompt], examples: list[Example], name: str, answer: int) -> int:
        """Prompts that are too long and will be cut at their left. UserError where shots are the reason."""
        context = self.subject.longest()
        if context is None:
            return 0
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].text))
        cut = 0
        for i in order:
            if len(prompts[i].text) < context - answer:  # a token is a character at least
                break
            count = self.subject.count(prompts[i])
            if count is None or count + answer <= context:
                if cut == 0 and count is not None and count + answer < context // 2:
                    break
                continue
            shots = task.shots if self.settings.shots is None else self.settings.shots
            if shots:
                fits = self._fitting(task, examples[i], name, shots, context - answer, bool(prompts[i].messages))
                problem = f"{shots} shots and item {examples[i].id} are {count} tokens, {answer} more for the answer"
                fix = f"{fits} would fit" if fits else "none would fit"
                raise UserError(f"task {task.name}: {problem}, the context is {context}; {fix}", field="shots")
            cut += 1
        return cut

    def _fitting(self, task: Task, e: Example, name: str, shots: int, room: int, chat: bool) -> int:
        for fewer in range(shots - 1, 0, -1):
            made = task.example(e.row, name, task.shots_for(e.row, fewer, self.settings.seed))
            count = self.subject.count(Prompt(made.prompts[0], made.messages if chat else ()))
            if count is not None and count <= room:
                return fewer
        return 0

    # ---- by likelihood ----

    def _by_likelihood(self, task: Task, name: str, examples: list[Example], chat: bool, label: str) -> Outcome:
        requests: list[tuple[Prompt, str]] = []
        for e in examples:
            prompts = e.prompts if len(e.prompts) > 1 else e.prompts * len(e.choices)
            joined = e.texts if chat else e.choices
            requests += [(Prompt(p, e.messages if chat else ()), c) for p, c in zip(prompts, joined, strict=True)]
        asked = len(requests)
        if task.metric == "acc_mutual_info":
            requests += [(Prompt(task.neutral), c) for e in examples for c in e.choices]
        scored, cut = self.scores(task, name, examples, requests, label)
        outcome = Outcome(name, 0, chat, [], {})
        at = 0
        for e in examples:
            found = scored[at : at + len(e.choices)]
            alone = scored[asked + at : asked + at + len(e.choices)]
            at += len(e.choices)
            values, sample = judge_choices(task, e, found, alone)
            for metric, value in values.items():
                outcome.values.setdefault(metric, []).append(value)
            prompt: Any = e.prompts[0] if len(e.prompts) == 1 else list(e.prompts)
            about = {"id": e.id, "prompt": list(e.messages) if chat else prompt}
            shown = list(e.texts if chat else e.choices)
            outcome.samples.append(about | {"choices": shown} | sample | {"score": values[task.metric]})
            if e.group:
                outcome.samples[-1]["group"] = e.group
        if task.scorer == CHOICE:
            kept = [s for s in outcome.samples if len(s["loglikelihoods"]) > 1]
            outcome.curve = calibration([s["loglikelihoods"] for s in kept], [s["target"] for s in kept])
            outcome.more["ece"] = outcome.curve["ece"]
        else:
            mean = _mean([s["loglikelihoods"][0] for s in outcome.samples])
            outcome.more["perplexity"] = math.exp(min(700.0, -mean))
        if cut:
            outcome.warnings.append(f"{cut} items are longer than the context: their beginnings were cut off")
        return outcome

    def scores(
        self, task: Task, name: str, examples: list[Example], requests: list[tuple[Prompt, str]], label: str
    ) -> tuple[list[Likelihood], int]:
        keys = [key_of("likelihood-2", self.subject.identity, p.text, p.messages, c) for p, c in requests]
        known = [self.store.get(key) for key in keys]
        missing = [i for i, value in enumerate(known) if value is None]
        room_key = key_of("cut-1", self.subject.identity, keys)
        if missing:
            prompts = [Prompt(e.prompts[0], ()) for e in examples]
            longest = max(len(c.split()) for _, c in requests)
            self.store.put(room_key, self._check_room(task, prompts, examples, name, min(longest, 8)))
            with _shown(label) as progress:
                for i, found in self.subject.score([requests[i] for i in missing], progress):
                    known[missing[i]] = [found.total, found.greedy, found.tokens]
                    self.store.put(keys[missing[i]], known[missing[i]])
        return [Likelihood(*value) for value in known], self.store.get(room_key) or 0

    # ---- by what was written ----

    def _by_answer(self, task: Task, name: str, examples: list[Example], chat: bool, label: str) -> Outcome:
        prompts = [Prompt(e.prompts[0], e.messages if chat else ()) for e in examples]
        stop = () if chat and task.scorer == "code" else task.stop  # code ends with its block
        how = Decoding(task.max_tokens, stop, seed=self.settings.seed)
        written = [w[0] for w in self.answers(task, name, examples, prompts, how, label)]
        verdicts = self._verdicts(task, examples, written)
        outcome = Outcome(name, 0, chat, [], {})
        for e, p, w, v in zip(examples, prompts, written, verdicts, strict=True):
            for metric, value in ({task.metric: v.score} | v.metrics).items():
                outcome.values.setdefault(metric, []).append(value)
            target: Any = e.targets[0] if len(e.targets) == 1 else list(e.targets)
            about = {"id": e.id, "prompt": list(p.messages) if chat else p.text, "choices": [], "target": target}
            about |= {"answer": w.text, "parsed": v.parsed, "score": v.score, "metrics": v.metrics}
            about |= {"finish": w.finish, "tokens": w.tokens, "prompt_tokens": w.prompt_tokens}
            about |= {"note": v.note} if v.note else {}
            outcome.samples.append(about | {"loglikelihoods": []} | ({"group": e.group} if e.group else {}))
        n = max(1, len(written))
        cut = sum(w.finish == "length" for w in written)
        empty = sum(not w.text.strip() for w in written)
        unread = sum(v.parsed is None for v in verdicts)
        outcome.more |= {"tokens": _mean([float(w.tokens) for w in written]), "cut": cut / n, "empty": empty / n}
        if cut > _MANY * n:
            outcome.warnings.append(f"{cut} of {n} answers were cut at {task.max_tokens} tokens: they never end")
        if empty > _MANY * n:
            outcome.warnings.append(f"{empty} of {n} answers are empty")
        if unread > _MANY * n:
            outcome.warnings.append(f"in {unread} of {n} answers no answer was found")
        return outcome

    def answers(
        self, task: Task, name: str, examples: list[Example], prompts: list[Prompt], how: Decoding, label: str
    ) -> list[list[Written]]:
        """how.n answers to each prompt, from the store where they are there."""
        settings = [how.max_tokens, how.stop, how.temperature, how.n, how.thinking]
        keys = []
        for i, p in enumerate(prompts):
            seed = how.seed + i if how.temperature else 0
            keys.append(key_of("answer-2", self.subject.identity, p.text, p.messages, settings, seed))
        known = [self.store.get(key) for key in keys]
        missing = [i for i, value in enumerate(known) if value is None]
        if missing:
            self._check_room(task, prompts, examples, name, min(32, how.max_tokens))
            with _shown(label) as progress:
                for i, found in self.subject.write([prompts[i] for i in missing], how, progress):
                    known[missing[i]] = [[w.text, w.finish, w.prompt_tokens, w.tokens] for w in found]
                    self.store.put(keys[missing[i]], known[missing[i]])
        return [[Written(*w) for w in value] for value in known]

    def _verdicts(self, task: Task, examples: list[Example], written: list[Written]) -> list[Verdict]:
        if task.scorer != "judge":
            return [SCORERS[task.scorer](task, e, w.text) for e, w in zip(examples, written, strict=True)]
        judge = task.options.get("judge")
        by = Evaluation(open_subject(judge, self.store), self.store, self.settings) if judge else self
        chat = by._chats()
        asked = [judge_prompt(task, e, w.text) for e, w in zip(examples, written, strict=True)]
        prompts = [Prompt(a, ({"role": "user", "content": a},) if chat else ()) for a in asked]
        label = f"{by.subject.name}: judges {task.name}"
        replies = by.answers(task, next(iter(task.formulations)), examples, prompts, Decoding(512), label)
        return [judged(reply[0].text) for reply in replies]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class _shown:
    """Progress of a task with the time that is left, as a context."""

    def __init__(self, label: str):
        self.label, self.progress, self.began = label, Progress(), time.monotonic()

    def __enter__(self) -> Callable[[int, int], None]:
        return self._show

    def _show(self, done: int, of: int) -> None:
        left = (time.monotonic() - self.began) * (of - done) / max(1, done)
        self.progress.show(f"{self.label}: {done} of {of}, {span(left)} left")

    def __exit__(self, *_: Any) -> None:
        self.progress.clear()


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
    results: dict[str, Any] = {"format": FORMAT, "models": {}, "settings": _written(settings), "out": str(folder)}
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
            facts = _facts(
                task, outcome, found, folder / "samples" / _file_name(name) / f"{_file_name(task.name)}.jsonl"
            )
            results["models"].setdefault(name, {"tasks": {}})["tasks"][task.name] = facts
            _say_result(name, task, facts)
    results["differences"] = _differences(models, tasks, outcomes)
    _write(folder, results, outcomes)
    for line in results["differences"]:
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


def _written(settings: Settings) -> dict[str, Any]:
    return vars(settings) | {"corpora": [str(c) for c in settings.corpora]}


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


def _differences(models: list[str], tasks: list[Task], outcomes: dict[str, dict[str, Outcome]]) -> list[dict[str, Any]]:
    """Each model against the first, on the same items."""
    out = []
    for task in tasks:
        for other in models[1:]:
            a, b = (outcomes[m][task.name].values[task.metric] for m in (models[0], other))
            out.append({"task": task.name, "a": models[0], "b": other} | paired(a, b))
    return out


def _write(folder: Path, results: dict[str, Any], outcomes: dict[str, dict[str, Outcome]]) -> None:
    """Samples first, the results that name them last."""
    for name, tasks in outcomes.items():
        for task_name, outcome in tasks.items():
            path = Path(results["models"][name]["tasks"][task_name]["samples"])
            path.parent.mkdir(parents=True, exist_ok=True)
            with publish(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as f:
                f.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in outcome.samples)
    write_json(folder / "results.json", results)
