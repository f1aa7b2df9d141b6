"""`craton emerge`: abilities over size and training, each by a sharp and a smooth measure; and what more computing at
test time is worth.

An ability that jumps by the sharp measure (right or wrong) and creeps by the smooth one (how likely the right answer
is) is a jump of the measure (arXiv 2304.15004); one that jumps by both is the model's.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from craton.base import UserError, count, read_json, say, write_json
from craton.evaluate.models import Decoding, Prompt, open_subject
from craton.evaluate.run import Evaluation, Settings, evaluation_folder
from craton.evaluate.statistics import interval, paired
from craton.evaluate.store import Store
from craton.tasks.scorers import SCORERS
from craton.tasks.task import Example, Task

FORMAT = "craton-emergence-1"
_CLEAR = 0.01  # p below which a gain is there
_GAIN = 0.2  # and at least so large: the form of an answer is a gain too, but a small one
_BUDGETS = (0, 64, 256, 1024)  # tokens of thinking


def emerge(
    models: list[str], tasks: list[Task], shots: list[int], limit: int, samples: list[int], out: Path | None
) -> dict[str, Any]:
    """Curves of each task over models and shots; writes OUT/emergence.json. samples: answers to each item, of which the
    most frequent counts (self-consistency), or any that is right (best of n). UserError before anything is written."""
    if limit < 2 or any(s < 0 for s in shots) or any(s < 1 for s in samples):
        raise UserError("--limit, --shots and --samples: whole numbers, at least 2, 0 and 1")
    store, folder = Store(), evaluation_folder(out, "emergence.json", models, tasks, shots, limit, samples)
    results: dict[str, Any] = {"format": FORMAT, "out": str(folder), "shots": shots, "limit": limit, "models": []}
    results |= {"points": [], "compute": []}
    scores: dict[tuple[str, str, int], list[float]] = {}
    for name in models:
        subject = open_subject(name, store)
        results["models"].append({"name": name} | _size(Path(name), subject))
        for task in tasks:
            used = [s for s in shots if s == 0 or _has_shots(task, s)]
            for k in used:
                point, own = _point(Evaluation(subject, store, Settings(k, limit, chat=False)), task)
                scores[name, task.name, k] = own
                results["points"].append({"model": name, "task": task.name, "shots": k} | point)
                say(f"{name}: {task.name:<20} {k:>2} shots  {point['sharp']:.3f}  log-likelihood {point['smooth']:.3f}")
            if samples and not task.by_likelihood:
                evaluation = Evaluation(subject, store, Settings(used[-1], limit, chat=False))
                for line in _more_computing(evaluation, task, used[-1], samples):
                    results["compute"].append({"model": name, "task": task.name} | line)
    results["findings"] = _findings(results["models"], tasks, scores)
    for finding in results["findings"]:
        say(finding["text"])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "emergence.json", results)
    return results


def _has_shots(task: Task, shots: int) -> bool:
    try:
        task.shots_for(task.items(1)[0], shots, 0)
    except UserError:
        return False
    return True


def _size(path: Path, subject: Any) -> dict[str, Any]:
    """Parameters, tokens read and seed, as the record says; of a checkpoint, by its step."""
    record: dict[str, Any] = {}
    for place in (path / "record.json", path.parent.parent / "record.json"):
        if place.is_file():
            record = read_json(place)
            break
    tokens = record.get("tokens")
    if path.name.startswith("step-") and record.get("steps"):
        tokens = round(record["tokens"] * int(path.name.removeprefix("step-")) / record["steps"])
    parameters = record.get("parameters") or (subject.talker.parameters if subject.local else None)
    model = record.get("model") or {}
    shape = f"{model['num_hidden_layers']} x {model['hidden_size']}" if model else ""
    return {"parameters": parameters, "tokens": tokens, "shape": shape}


def _point(evaluation: Evaluation, task: Task) -> tuple[dict[str, Any], list[float]]:
    """Both measures of a task at one number of shots, and each item's sharp score."""
    outcome = evaluation.run(task)
    sharp = outcome.values[task.metric]
    smooth = _log_likelihoods(evaluation, task, outcome.formulation)
    low, high = interval(sharp)
    bottom, top = interval(smooth)
    point = {"sharp": sum(sharp) / len(sharp), "low": low, "high": high, "metric": task.metric}
    return point | {"smooth": sum(smooth) / len(smooth), "bottom": bottom, "top": top}, sharp


def _log_likelihoods(evaluation: Evaluation, task: Task, formulation: str) -> list[float]:
    """Nats a token of each item's right answer, behind what comes before it."""
    examples = evaluation.examples(task, formulation)
    f = task.formulations[formulation]
    requests = []
    for e in examples:
        right = task.worked(e.row, f)[1] if e.gold is None else e.choices[e.gold]
        prompt = e.prompts[e.gold or 0] if len(e.prompts) > 1 else e.prompts[0]
        requests.append((Prompt(prompt), right))
    scored = evaluation.scores(task, formulation, requests)[0]
    return [s.total / max(1, s.tokens) for s in scored]


def _more_computing(evaluation: Evaluation, task: Task, shots: int, samples: list[int]) -> list[dict[str, Any]]:
    """Several answers to each item at temperature 1: the most frequent one, and whether any is right, against the
    tokens that they take."""
    name = next(iter(task.formulations))
    examples = evaluation.examples(task, name)
    prompts = [Prompt(e.prompts[0]) for e in examples]
    most = max(samples)
    how = Decoding(task.max_tokens, task.stop, temperature=1.0, n=most)
    written = evaluation.answers(task, name, prompts, how)
    out = _thinking(evaluation, task, shots, name, examples) if evaluation.is_so("thinks") else []
    judged = [[SCORERS[task.scorer](task, e, w.text) for w in a] for e, a in zip(examples, written, strict=True)]
    for n in sorted(samples):
        votes, best, spent = [], [], 0.0
        for e, answers, verdicts in zip(examples, written, judged, strict=True):
            right = sum(v.score >= 1.0 for v in verdicts)
            best.append(1.0 if len(answers) - right < n else 1.0 - _none_of(len(answers), right, n))
            votes.append(_voted(e, verdicts[:n]))
            spent += sum(w.tokens for w in answers) / len(answers) * n
        low, high = interval(votes)
        line = {"n": n, "shots": shots, "tokens": spent / len(examples), "majority": sum(votes) / len(votes)}
        out.append(line | {"low": low, "high": high, "best": sum(best) / len(best)})
    return out


def _thinking(
    evaluation: Evaluation, task: Task, shots: int, name: str, examples: list[Example]
) -> list[dict[str, Any]]:
    """One answer to each item, after thinking for as long as each budget allows."""
    out: list[dict[str, Any]] = []
    prompts = [Prompt(e.prompts[0], e.messages) for e in examples]
    for budget in _BUDGETS:
        how = Decoding(task.max_tokens, thinking=budget)
        written = [w[0] for w in evaluation.answers(task, name, prompts, how)]
        scores = [SCORERS[task.scorer](task, e, w.text).score for e, w in zip(examples, written, strict=True)]
        low, high = interval(scores)
        line = {"n": 1, "shots": shots, "thinking": budget, "tokens": sum(w.tokens for w in written) / len(written)}
        out.append(line | {"majority": sum(scores) / len(scores), "low": low, "high": high})
        out[-1]["best"] = out[-1]["majority"]
    return out


def _none_of(n: int, right: int, k: int) -> float:
    """The chance that k of n answers are all wrong (arXiv 2107.03374, equation 1)."""
    return math.comb(n - right, k) / math.comb(n, k)


def _voted(example: Example, verdicts: list[Any]) -> float:
    """The score of the most frequent answer; of equals, the first. The last word of a worked answer is its vote."""
    said = [(v.parsed or "").split()[-1:] for v in verdicts]
    winner = Counter(map(tuple, said)).most_common(1)[0][0]
    return float(next(v.score for v, s in zip(verdicts, said, strict=True) if tuple(s) == winner))


def _findings(models: list[dict[str, Any]], tasks: list[Task], scores: dict[Any, list[float]]) -> list[dict[str, Any]]:
    """In words: from which model on shots help, and a written chain of thought."""
    order = sorted(models, key=lambda m: (m["parameters"] or 0, m["tokens"] or 0))
    out = []
    for task in tasks:
        name, used = task.name, sorted({k for (_, t, k) in scores if t == task.name})
        few, many = used[0], used[-1]
        base, equals, dial = name.partition("=")
        unrelated, written = (f"{base}:{style}{equals}{dial}" for style in ("unrelated", "scratchpad"))
        pairs = {
            f"{many} shots instead of {few}": ((name, few), (name, many)),
            f"{many} shots that follow its function instead of none": ((unrelated, many), (name, many)),
            "steps written before the answer": ((name, few), (written, few)),
        }
        for what, (a, b) in pairs.items():
            if a != b and all((order[0]["name"], *one) in scores for one in (a, b)):
                gains = [_gain(scores[m["name"], *a], scores[m["name"], *b]) for m in order]
                out.append(_finding(f"{name}: {what}", order, gains))
    return out


def _gain(before: list[float], after: list[float]) -> dict[str, Any]:
    return paired(before, after) | {"before": sum(before) / len(before), "after": sum(after) / len(after)}


def _finding(what: str, models: list[dict[str, Any]], gains: list[dict[str, Any]]) -> dict[str, Any]:
    there = [g["p"] < _CLEAR and g["difference"] >= _GAIN for g in gains]
    words = []
    for model, g, clear in zip(models, gains, there, strict=True):
        size = f" ({count(model['parameters'])})" if model["parameters"] else ""
        change = f"{g['before']:.2f} to {g['after']:.2f}"
        words.append(f"{Path(model['name']).name}{size} {change}{'' if clear else ', no clear gain'}")
    rows = [{"model": m["name"], "clear": c} | g for m, g, c in zip(models, gains, there, strict=True)]
    return {"what": what, "text": f"{what}: {'; '.join(words)}", "rows": rows}
