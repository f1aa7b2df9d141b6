"""A run's record as one self-contained HTML page: no scripts from elsewhere, no network, light and dark."""

import io
from pathlib import Path
from typing import Any

from craton.base import UserError, count, read_json, span, write_text
from craton.report.pages import filled

INK, FAINT, ACCENT, SECOND = "#8a8f98", "#8a8f9855", "#3b82f6", "#f97316"


def _svg(draw: Any, width: float = 6.4, height: float = 3.0) -> str:
    """One matplotlib axes as inline SVG, colours chosen to read on light and dark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.5)
    draw(axes)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a thirtieth of the run, without the start's bias."""
    keep, mean, weight, out = 1 - 1 / max(1, len(values) / 30), 0.0, 0.0, []
    for v in values:
        mean, weight = keep * mean + (1 - keep) * v, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _plots(record: dict[str, Any]) -> list[tuple[str, str]]:
    from matplotlib.ticker import FuncFormatter

    rows = record["curve"]
    held = [r for r in rows if "heldout_bits_per_byte" in r]
    held_bits = [r["heldout_bits_per_byte"] for r in held]
    bits = [r["bits_per_byte"] for r in rows]

    def loss(x: str, scale: float, label: str) -> Any:
        def draw(axes: Any) -> None:
            xs = [r[x] / scale for r in rows]
            axes.plot(xs, bits, color=ACCENT, alpha=0.25, linewidth=0.8)
            axes.plot(xs, _smooth(bits), color=ACCENT, linewidth=1.6, label="training")
            if held:
                at = [r[x] / scale for r in held]
                axes.plot(at, held_bits, "o-", color=SECOND, markersize=4, linewidth=1, label="held out")
            top = sorted(bits)[int(0.97 * (len(bits) - 1))]
            axes.set_ylim(min(bits + held_bits) * 0.97, max(top, _smooth(bits)[-1]) * 1.05)
            axes.set_xlabel(label)
            axes.set_ylabel("bits per byte")
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)

        return draw

    def rate(axes: Any) -> None:
        axes.plot([r["seconds"] for r in rows], [r["tokens_per_second"] for r in rows], color=ACCENT, linewidth=1.4)
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: count(v)))
        axes.set_xlabel("seconds")
        axes.set_ylabel("tokens per second")

    def steering(axes: Any) -> None:
        steps = [r["step"] for r in rows]
        axes.plot(steps, [r["lr_share"] for r in rows], color=ACCENT, linewidth=1.4)
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.08)
        other = axes.twinx()
        other.plot(steps, [r["gradient_norm"] for r in rows], color=SECOND, linewidth=0.7, alpha=0.7)
        other.set_yscale("log")
        other.tick_params(colors=SECOND, labelsize=8)
        for spine in other.spines.values():
            spine.set_visible(False)
        other.set_ylabel("gradient norm", color=SECOND)
        axes.set_ylabel("learning rate, share of peak", color=ACCENT)

    tokens = max(r["tokens"] for r in rows)
    unit, name = (1e9, "billion") if tokens >= 1e9 else (1e6, "million") if tokens >= 1e6 else (1e3, "thousand")
    return [
        ("Loss against tokens", _svg(loss("tokens", unit, f"{name} tokens"))),
        ("Loss against time", _svg(loss("seconds", 60.0, "minutes"))),
        ("Throughput", _svg(rate)),
        ("Steering", _svg(steering)),
    ]


def write_report(out: Path) -> Path:
    """Write out/report.html from out/record.json and return its path. UserError if there is no record."""
    if not out.is_dir():
        raise UserError(f"{out}: no such folder")
    if not (out / "record.json").exists():
        raise UserError(f"{out}/record.json: missing; written when training stops, so train or --resume there first")
    record = read_json(out / "record.json")
    if not isinstance(record, dict) or record.get("format") != "craton-record-1":
        raise UserError(f"{out}/record.json: not a training record that this version reads")
    if not record["curve"]:
        raise UserError(f"{out}/record.json: the run made no step yet, there is nothing to show")
    for corpus in record["corpora"]:
        whole = max(1, sum(s["bytes"] for s in corpus["sources"]))
        corpus["sources"] = [s | {"share": max(1, round(100 * s["bytes"] / whole))} for s in corpus["sources"]]
        corpus["dropped"] = dict(sorted(corpus["dropped"].items(), key=lambda x: -x[1]["bytes"]))
    m = record["model"]
    held = record.get("heldout_bits_per_byte")
    tiles = [
        ("bits per byte, held out", f"{held:.3f}" if held else "none held out"),
        ("parameters", count(record["parameters"])),
        ("tokens", count(record["tokens"])),
        ("training time", span(record["seconds"])),
        ("tokens per second", count(record["tokens_per_second"])),
        ("of the machine's measured peak", f"{100 * record['peak_share']:.0f}%"),
        ("training FLOP", f"{record['flops']:.2g}"),
    ]
    if record["energy_joules"]:
        tiles.append(("energy, processors", f"{record['energy_joules'] / 3.6e6:.3g} kWh"))
    warnings = []
    if record["status"] != "finished":
        where = f"step {record['steps']} of {record['recipe']['run']['steps']}"
        warnings.append(f"The run was interrupted at {where}; --resume goes on.")
    if not held:
        warnings.append("Nothing was held out, so nothing here says how the model does on text that it has not seen.")
    provenance = [(f"corpus {c['folder']}", c["digest"]) for c in record["corpora"]]
    provenance += [(f"tokenizer of {c['folder']}", c["tokenizer_sha256"]) for c in record["corpora"]]
    provenance += [("weights (model.safetensors)", record["weights_sha256"])]
    provenance += [(k, v) for k, v in record["environment"].items() if v is not None]
    configuration = [("model", m)]
    for part, settings in record["recipe"].items():
        if part != "model":
            configuration.append((part, {k: v for k, v in settings.items() if v is not None}))
    size = f"A {count(record['parameters'])}-parameter decoder, {m['num_hidden_layers']} layers of {m['hidden_size']}"
    values = {k: record[k] for k in ("samples", "corpora", "plan", "events")}
    values |= {"name": out.name, "headline": f"{size}, trained for {record['steps']} steps.", "plots": _plots(record)}
    values |= {"warnings": warnings, "tiles": tiles, "provenance": provenance, "configuration": configuration}
    write_text(out / "report.html", filled("training", **values))
    return out / "report.html"
