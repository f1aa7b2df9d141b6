"""Emergence as one self-contained HTML page: each task over size and tokens, by a sharp and a smooth measure."""

from pathlib import Path
from typing import Any

from craton.base import UserError, count, read_json, write_text
from craton.report.pages import filled
from craton.report.plots import ACCENT, INK, SECOND, svg

_COLOURS = ["#94a3b8", "#22c55e", ACCENT, "#a855f7", SECOND, "#ef4444"]


def write_emergence(folder: Path) -> Path:
    """Write FOLDER/report.html from FOLDER/emergence.json; returns its path. UserError without it."""
    found = read_json(folder / "emergence.json")
    if not isinstance(found, dict) or found.get("format") != "craton-emergence-1":
        raise UserError(f"{folder}/emergence.json: not one that this version reads")
    models = {m["name"]: m for m in found["models"]}
    tasks = list(dict.fromkeys(p["task"] for p in found["points"]))
    by_size = len({m["parameters"] for m in models.values()}) > 1
    axis = "parameters" if by_size else "tokens"
    charts = [_chart(found, models, task, axis) for task in tasks]
    compute = [_compute(found["compute"], task) for task in dict.fromkeys(c["task"] for c in found["compute"])]
    short = {name: name.rstrip("/").rpartition("/")[2] for name in models}
    rows = [p | {"about": models[p["model"]], "model": short[p["model"]]} for p in found["points"]]
    for finding in found["findings"]:
        finding["rows"] = [row | {"model": short[row["model"]]} for row in finding["rows"]]
    values: dict[str, Any] = {"models": list(models.values()), "charts": charts, "compute": compute, "rows": rows}
    values |= {"findings": found["findings"], "limit": found["limit"], "axis": axis}
    write_text(folder / "report.html", filled("emergence", style="training", **values))
    return folder / "report.html"


def _curves(found: dict[str, Any], models: dict[str, Any], task: str, axis: str) -> dict[int, list[tuple[float, Any]]]:
    """Points of a task by shots, each with its place on the axis; of models in one place the first."""
    out: dict[int, list[tuple[float, Any]]] = {}
    for p in found["points"]:
        x = float(models[p["model"]][axis] or 0)
        if p["task"] == task and x not in [seen for seen, _ in out.get(p["shots"], [])]:
            out.setdefault(p["shots"], []).append((x, p))
    return {k: sorted(points, key=lambda x: x[0]) for k, points in out.items()}


def _chart(found: dict[str, Any], models: dict[str, Any], task: str, axis: str) -> dict[str, Any]:
    curves = _curves(found, models, task, axis)

    def shown(points: list[tuple[float, Any]]) -> list[Any]:
        return [p for _, p in points]

    def draw(value: str, low: str, high: str, label: str) -> Any:
        def on(axes: Any) -> None:
            for number, (shots, points) in enumerate(curves.items()):
                colour = _COLOURS[number % len(_COLOURS)]
                xs, ys = [x for x, _ in points], [p[value] for _, p in points]
                axes.fill_between(
                    xs, [p[low] for _, p in points], [p[high] for _, p in points], color=colour, alpha=0.15
                )
                axes.plot(xs, ys, "o-", color=colour, markersize=4, linewidth=1.4, label=f"{shots} shots")
                apart = [
                    p for p in found["points"] if (p["task"], p["shots"]) == (task, shots) and p not in shown(points)
                ]
                axes.plot([models[p["model"]][axis] or 0 for p in apart], [p[value] for p in apart], "x", color=colour)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda v, _: count(v))
            axes.xaxis.set_minor_formatter(lambda v, _: "")
            axes.set_xlabel(axis)
            axes.set_ylabel(label)
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)

        return svg(on, 5.2, 3.0)

    metric = next(p["metric"] for p in found["points"] if p["task"] == task)
    sharp, smooth = draw("sharp", "low", "high", metric), draw("smooth", "bottom", "top", "nats a token")
    return {"task": task, "sharp": sharp, "smooth": smooth}


def _compute(lines: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """Quality against tokens spent, a line a model."""
    own = [line for line in lines if line["task"] == task]

    def on(axes: Any) -> None:
        for number, model in enumerate(dict.fromkeys(line["model"] for line in own)):
            points = [line for line in own if line["model"] == model]
            colour, xs = _COLOURS[number % len(_COLOURS)], [p["tokens"] for p in points]
            name = Path(model).name
            axes.plot(xs, [p["majority"] for p in points], "o-", color=colour, markersize=4, label=name)
            axes.plot(xs, [p["best"] for p in points], "o:", color=colour, markersize=3, alpha=0.8)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(lambda v, _: count(v))
        axes.set_xlabel("tokens spent an item")
        axes.set_ylabel("share that is right")
        axes.legend(frameon=False, labelcolor=INK, fontsize=7, ncols=2)
        axes.set_xmargin(0.1)

    return {"task": task, "svg": svg(on, 6.0, 3.4)}
