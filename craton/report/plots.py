"""The plots of a training report, as inline SVG that reads on light and dark."""

import io
from typing import Any

from craton.base import count

INK, FAINT, ACCENT, SECOND = "#8a8f98", "#8a8f9855", "#3b82f6", "#f97316"


def svg(draw: Any, width: float = 6.4, height: float = 3.0) -> str:
    """One matplotlib axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    _quiet(axes)
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.5)
    draw(axes)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _quiet(axes: Any) -> None:
    """Lines and letters in a grey that reads on both."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.get_offset_text().set_color(INK)


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a thirtieth of the run, without the start's bias."""
    keep, mean, weight, out = 1 - 1 / max(1, len(values) / 30), 0.0, 0.0, []
    for v in values:
        mean, weight = keep * mean + (1 - keep) * v, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _loss(rows: list[dict[str, Any]], x: str, scale: float, label: str) -> Any:
    held = [r for r in rows if "heldout_bits_per_byte" in r]
    held_bits = [r["heldout_bits_per_byte"] for r in held]
    bits = [r["bits_per_byte"] for r in rows]

    def draw(axes: Any) -> None:
        xs = [r[x] / scale for r in rows]
        axes.plot(xs, bits, color=ACCENT, alpha=0.25, linewidth=0.8)
        axes.plot(xs, _smooth(bits), color=ACCENT, linewidth=1.6, label="training")
        if held:
            axes.plot([r[x] / scale for r in held], held_bits, "o-", color=SECOND, markersize=4, label="held out")
        top = sorted(bits)[int(0.97 * (len(bits) - 1))]
        axes.set_ylim(min(bits + held_bits) * 0.97, max([top, _smooth(bits)[-1], *held_bits]) * 1.05)
        axes.set_xlabel(label)
        axes.set_ylabel("bits per byte")
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)

    return draw


def _position(found: list[list[float]]) -> Any:
    def draw(axes: Any) -> None:
        axes.plot([p for p, _ in found], [v for _, v in found], "o-", color=ACCENT, markersize=4, linewidth=1.4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0f}")
        axes.set_xlabel("tokens of the document that came before")
        axes.set_ylabel("loss, nats a token")

    return draw


def _tasks(looks: list[dict[str, Any]]) -> Any:
    def draw(axes: Any) -> None:
        for number, name in enumerate(looks[0]["tasks"]):
            colour = (ACCENT, SECOND, "#22c55e", "#a855f7", "#94a3b8")[number % 5]
            values = [look["tasks"].get(name) for look in looks]
            axes.plot([look["step"] for look in looks], values, "o-", color=colour, markersize=4, label=name)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("step")
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)

    return draw


def plots(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(title, what it shows, SVG) of each."""
    rows = record["curve"]

    def rate(axes: Any) -> None:
        axes.plot([r["seconds"] for r in rows], [r["tokens_per_second"] for r in rows], color=ACCENT, linewidth=1.4)
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter(lambda v, _: count(v))
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
        other.tick_params(which="both", colors=SECOND, labelsize=8)
        for spine in other.spines.values():
            spine.set_visible(False)
        other.set_ylabel("gradient norm", color=SECOND)
        axes.set_ylabel("learning rate, share of its peak", color=ACCENT)

    tokens = max(r["tokens"] for r in rows)
    unit, name = (1e9, "billion") if tokens >= 1e9 else (1e6, "million") if tokens >= 1e6 else (1e3, "thousand")
    out = [
        (
            "Loss against tokens",
            "How well it predicts, as it reads more. Lower is better.",
            _loss(rows, "tokens", unit, f"{name} tokens"),
        ),
        ("Loss against time", "The same by the clock.", _loss(rows, "seconds", 60.0, "minutes")),
    ]
    if record.get("by_position"):
        out.append(
            (
                "Loss by context",
                "To the right it has read more of the document, and should guess better. The first are of few tokens.",
                _position(record["by_position"]),
            )
        )
    if any(look.get("tasks") for look in record.get("looks", [])):
        words = "How well the first items of each task were done meanwhile."
        out.append(("Tasks", words, _tasks([look for look in record["looks"] if look.get("tasks")])))
    out += [
        ("Throughput", "Even, unless the machine had other work.", rate),
        (
            "Learning rate and gradient",
            "The rate rises, stays, and falls to settle; the gradient should not jump.",
            steering,
        ),
    ]
    return [(title, what, svg(draw)) for title, what, draw in out]


def curves(points: list[tuple[float, float]], label: str) -> str:
    """One line over steps, and where there are many points a smooth one over it, as SVG."""

    def draw(axes: Any) -> None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        if len(points) > 40:
            axes.plot(xs, ys, color=ACCENT, alpha=0.25, linewidth=0.8)
            axes.plot(xs, _smooth(ys), color=ACCENT, linewidth=1.6)
        else:
            axes.plot(xs, ys, "o-", color=ACCENT, markersize=4, linewidth=1.4)
        axes.set_xlabel(label)

    return svg(draw)
