"""An evaluation's results and samples as one self-contained HTML page: scores with their intervals, and every item."""

import json
from pathlib import Path
from typing import Any

from craton.base import UserError, read_json, write_text
from craton.report.pages import filled

_MOST_ITEMS = 2000  # of a task and model, on the page
_MOST_CHARACTERS = 6000  # of a prompt, on the page


def write_evaluation(folder: Path) -> Path:
    """Write FOLDER/report.html from FOLDER/results.json and its samples; returns its path. UserError without them."""
    results = read_json(folder / "results.json")
    if not isinstance(results, dict) or results.get("format") != "craton-evaluation-1":
        raise UserError(f"{folder}/results.json: not an evaluation that this version reads")
    models = list(results["models"])
    tasks = list(results["models"][models[0]]["tasks"])
    rows = [_row(m, t, results["models"][m]["tasks"][t]) for t in tasks for m in models]
    items = {task: [_items(Path(results["models"][m]["tasks"][task]["samples"])) for m in models] for task in tasks}
    left_out = sum(max(0, results["models"][models[0]]["tasks"][t]["n"] - _MOST_ITEMS) for t in tasks)
    curves = [_curve(_labels(models)[m], t, f["calibration"]) for m, t, f in _each(results) if "calibration" in f]
    short = _labels(models)
    rows = [row | {"model": short[row["model"]]} for row in rows]
    for difference in results["differences"]:
        difference |= {key: short[difference[key]] for key in ("a", "b")}
    values: dict[str, Any] = {
        "models": list(short.values()),
        "tasks": tasks,
        "rows": rows,
        "differences": results["differences"],
    }
    values |= {"curves": curves, "settings": results["settings"], "left_out": left_out, "most": _MOST_ITEMS}
    values["data"] = json.dumps({"models": list(short.values()), "items": items}, ensure_ascii=False).replace(
        "</", "<\\/"
    )
    write_text(folder / "report.html", filled("evaluation", style="training", **values))
    return folder / "report.html"


def _labels(models: list[str]) -> dict[str, str]:
    """The last part of each model's name, where that tells them apart."""
    last = [m.rstrip("/").rpartition("/")[2].removesuffix(".gguf") for m in models]
    return dict(zip(models, last if len(set(last)) == len(last) else models, strict=True))


def _each(results: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(m, t, f) for m, model in results["models"].items() for t, f in model["tasks"].items()]


def _row(model: str, task: str, f: dict[str, Any]) -> dict[str, Any]:
    low, high = f["interval"]
    bar = {
        "low": round(100 * low, 2),
        "width": round(100 * max(0.004, high - low), 2),
        "at": round(100 * f["value"], 2),
    }
    other = {k: f"{v:.3f}" for k, v in f["metrics"].items() if k != f["metric"]}
    about = {k: f[k] for k in ("n", "shots", "formulation", "metric", "chat", "warnings", "source", "licence")}
    found = f.get("contamination")
    share = "not looked for" if found is None else f"{found['share']:.1%}"
    shown = {"value": f"{f['value']:.3f}", "interval": f"{low:.3f} to {high:.3f}", "bar": bar, "other": other}
    groups = sorted(f.get("groups", {}).items(), key=lambda x: x[1])
    return {"model": model, "task": task, "contamination": share, "groups": groups} | about | shown


def _items(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as f:
        samples = [json.loads(line) for _, line in zip(range(_MOST_ITEMS), f, strict=False)]
    return [_short(s) for s in samples]


def _short(sample: dict[str, Any]) -> dict[str, Any]:
    prompt = sample["prompt"]
    if isinstance(prompt, list):
        prompt = "\n\n".join(f"[{p['role']}] {p['content']}" if isinstance(p, dict) else str(p) for p in prompt)
    if len(prompt) > _MOST_CHARACTERS:
        prompt = "\u2026" + prompt[-_MOST_CHARACTERS:]
    kept: dict[str, Any] = {k: sample[k] for k in ("id", "choices", "target", "answer", "score") if k in sample}
    kept |= {k: sample[k] for k in ("finish", "note", "parsed", "group") if sample.get(k)}
    return kept | {"prompt": prompt, "ll": [round(x, 3) for x in sample.get("loglikelihoods", [])]}


def _curve(model: str, task: str, found: dict[str, Any]) -> dict[str, str]:
    """The points of a reliability curve: mean confidence, share that is right, items."""
    return {"title": f"{task}, {model}: calibration error {found['ece']:.3f}", "points": json.dumps(found["curve"])}
