"""A tuning's record as one self-contained HTML page."""

from pathlib import Path
from typing import Any

from craton.base import UserError, count, read_json, span, write_text
from craton.report.pages import filled
from craton.report.plots import curves

_NAMES = {"score": "task score", "heldout_loss": "loss of held-out rows, nats a token"}
_NAMES |= {
    "heldout_preferred": "held-out pairs that moved the right way",
    "general_bits_per_byte": "general text, bits a byte",
}
_NAMES |= {"answer_tokens": "tokens of an answer", "reward": "reward of sampled answers"}
_NAMES |= {"entropy": "entropy of sampled tokens, nats", "kl": "divergence from the base, nats a token"}
_NAMES |= {"pass@1": "share of sampled answers that are right"}


def write_tuning(folder: Path) -> Path:
    """Write FOLDER/report.html from FOLDER/record.json; returns its path. UserError without one."""
    record = read_json(folder / "record.json")
    if not isinstance(record, dict) or "summary" not in record:
        raise UserError(f"{folder}/record.json: not the record of a tuning")
    s = record["summary"]
    before, after = s["before"], s["after"]
    shown = [k for k in before if isinstance(before[k], float)]
    shown += [k for k in after if isinstance(after[k], float) and k not in shown]
    rows = [(_NAMES.get(k, k), _three(before.get(k)), _three(after.get(k))) for k in shown]
    tiles = [
        ("parameters trained", count(s["trained_parameters"])), ("of", count(s["parameters"])),
        ("tokens", count(s["tokens"])), ("training time", span(s["seconds"])), ("steps", str(s["steps"])),
    ]  # fmt: skip
    looks = record["looks"]
    values: dict[str, Any] = {"name": folder.name, "method": s["method"], "tiles": tiles, "rows": rows}
    values |= {"warnings": s["warnings"], "plan": record["plan"], "command": record["command"]}
    values |= {
        "plots": _plots(record["curve"], [{"step": 0} | before, *looks]),
        "samples": [r for r in looks if r.get("sample")][-6:],
    }
    values |= {"base": record["base"], "template": record["template"]}
    write_text(folder / "report.html", filled("tuning", style="training", **values))
    return folder / "report.html"


def _three(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–"


def _plots(curve: list[dict[str, Any]], looks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, SVG) of the loss, and of what was measured on the way."""
    out = [("Loss of each step", curves([(r["step"], r["loss"]) for r in curve], "step"))]
    for key, title in _NAMES.items():
        points = [(r["step"], r[key]) for r in looks if isinstance(r.get(key), float)]
        if len(points) > 1:
            out.append((title[0].upper() + title[1:], curves(points, "step")))
    return out
