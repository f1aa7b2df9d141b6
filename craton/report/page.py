"""A run's record as one self-contained HTML page: no scripts from elsewhere, no network, light and dark."""

import shlex
from pathlib import Path
from typing import Any

from craton.base import UserError, amount, count, read_json, span, write_text
from craton.model.config import ModelConfig
from craton.report.inspect import parts
from craton.report.pages import filled
from craton.report.plots import plots
from craton.train.plan import parse_budget
from craton.train.recipe import Recipe, as_dict

SHOWN = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size
    max_position_embeddings rope_theta tie_word_embeddings num_experts""".split()

MOST_ROWS = 10  # of a table


def _four(value: Any) -> Any:
    """Numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else value


def _few(rows: list[Any]) -> tuple[list[Any], int]:
    """The first rows, and how many more there are."""
    return (rows, 0) if len(rows) <= MOST_ROWS + 2 else (rows[:MOST_ROWS], len(rows) - MOST_ROWS)


def _changed(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Settings that differ from their defaults, by section; the model's sizes have a table of their own."""
    defaults = as_dict(Recipe())
    out = []
    for part, settings in record["recipe"].items():
        known = defaults.get(part, {})
        changed = {k: _four(v) for k, v in settings.items() if v is not None and v != known.get(k)}
        if part != "model" and changed:
            out.append((part, changed))
    return out


def _comparison(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte beside simpler means on the same text, as bars."""
    rows = [("this model", record["heldout_bits_per_byte"], True)]
    names = {"xz": "xz", "gzip": "gzip -9", "unigram": "token frequencies alone"}
    found = record.get("references") or {}
    rows += [(label, found[key], False) for key, label in names.items() if key in found]
    most = max(8.0, *(bits for _, bits, _ in rows))
    rows.append(("no idea at all (a byte is 8 bits)", 8.0, False))
    return [dict(name=n, bits=f"{b:.3f}", width=round(100 * b / most, 1), own=own) for n, b, own in rows]


def _verdict(record: dict[str, Any]) -> str:
    """In words, what the comparison says."""
    found, bits = record.get("references") or {}, record["heldout_bits_per_byte"]
    if "unigram" not in found:
        return ""
    if bits >= found["unigram"]:
        return "It has learned nothing yet that token frequencies do not say: train it for longer, or on more text."
    packers = [(found["gzip"], "gzip"), (found["xz"], "xz")]
    beaten = [name for value, name in packers if bits < value]
    if len(beaten) == 2:
        return "It guesses better than both compressors, which know nothing but what they have just read."
    worse = " and ".join(name for value, name in packers if bits >= value)
    return f"It still guesses worse than {worse}: what it needs is more training, and more text if this was read often."


def _tiles(record: dict[str, Any]) -> list[tuple[str, str]]:
    held = record.get("heldout_bits_per_byte")
    tiles = [
        ("bits per byte of held-out text", f"{held:.3f}" if held else "none held out"),
        ("parameters", count(record["parameters"])),
        ("tokens read", count(record["tokens"])),
        ("training time", span(record["seconds"])),
        ("tokens a second", count(record["tokens_per_second"])),
        ("of the arithmetic this machine can do", f"{100 * record['peak_share']:.0f} %"),
        ("arithmetic in all", amount(record["flops"], "FLOP")),
    ]
    if record["energy_joules"]:
        tiles.append(("energy, processors", f"{record['energy_joules'] / 3.6e6:.3g} kWh"))
    return tiles


def _warnings(record: dict[str, Any]) -> list[str]:
    out = []
    if record["status"] == "interrupted":
        out.append(f"The run was interrupted at step {record['steps']}; --resume goes on.")
    elif record["status"] != "finished":
        out.append(f"The run was given up: {record.get('problem')}")
    if not record.get("heldout_bits_per_byte"):
        out.append("Nothing was held out, so nothing here says how the model does on text that it has not seen.")
    recited = (record.get("recitation") or {}).get("train")
    if recited and recited["recited"] * 10 > recited["passages"]:
        many = f"{recited['recited']} of {recited['passages']} passages"
        out.append(f"The model recites: it continued {many} of its training text word for word.")
    return out


def _events(record: dict[str, Any]) -> list[str]:
    """What happened, in words."""
    out = []
    moves = [e for e in record["events"] if e.get("event") == "end_moved"]
    if moves:
        planned = record.get("planned_steps")
        made = f"{record['steps']} steps were made where {planned} were planned"
        out.append(f"To keep the time budget the end was moved {len(moves)} times: {made}.")
    for e in record["events"]:
        if e.get("event") == "rollback":
            what = f"Rolled back to step {e['to_step']}, batches {', '.join(map(str, e['skipped']))} skipped."
            out.append(f"Step {e['at_step']}: {e['problem']}. {what}")
    return out


def _next(out: Path, record: dict[str, Any]) -> list[tuple[str, str]]:
    """Commands to go on with."""
    folder = shlex.quote(str(out))
    budget = record["recipe"]["run"].get("budget")
    kind, amount_of_it = parse_budget(budget) if budget else ("", 0.0)
    rows = [
        (f"craton generate {folder} 'Once upon a time'", "let it write"),
        (f"craton serve {folder}", "a page and an API over it"),
        (f"craton inspect {folder} --prompt 'Once upon a time'", "what each layer computes"),
        (f"craton quantize {folder} --bits 4 --out {folder}-4", "smaller, in 4 bits a weight"),
        (f"craton export {folder} --gguf {folder}.gguf", "for llama.cpp"),
    ]
    if kind == "seconds":
        corpora = " ".join(shlex.quote(f"{c['folder']}={c['weight']:g}") for c in record["corpora"])
        corpora = corpora if len(record["corpora"]) > 1 else shlex.quote(record["corpora"][0]["folder"])
        more = f"{10 * amount_of_it / 60:.0f}m" if amount_of_it >= 6 else f"{10 * amount_of_it:g}s"
        rows.insert(0, (f"craton train {corpora} --budget {more} --out {folder}-{more}", "ten times the budget"))
    return rows


def _looks(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Continuations over the run, a line each."""
    out = []
    for look in record.get("looks", []):
        text = look["sample"].partition("|")[2].replace("\n", "\u21b5")
        if text:
            out.append(look | {"text": text[:140] + ("\u2026" if len(text) > 140 else "")})
    return out


def _corpora(record: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for corpus in record["corpora"]:
        whole = max(1, sum(s["bytes"] for s in corpus["sources"]))
        by_source = record.get("by_source") or {}
        rows = [
            s | {"share": max(1, round(100 * s["bytes"] / whole)), "bits": by_source.get(s["name"])}
            for s in sorted(corpus["sources"], key=lambda s: -s["bytes"])
        ]
        sources, more = _few(rows)
        dropped, _ = _few(sorted(corpus["dropped"].items(), key=lambda x: -x[1]["bytes"]))
        out.append(corpus | {"sources": sources, "more": more, "dropped": dropped})
    return out


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
    m = record["model"]
    layers = f"{m['num_hidden_layers']} layer{'s' if m['num_hidden_layers'] > 1 else ''} of width {m['hidden_size']}"
    by_part = parts(ModelConfig(**m))
    whole = sum(by_part.values())
    provenance = [(f"corpus {c['folder']}", c["digest"]) for c in record["corpora"]]
    provenance += [(f"tokenizer of {c['folder']}", c["tokenizer_sha256"]) for c in record["corpora"]]
    provenance += [("weights (model.safetensors)", record["weights_sha256"])]
    provenance += [(k, v) for k, v in record["environment"].items() if v is not None]
    decoder = {k: _four(v) for k, v in m.items() if v not in (None, False, [], ()) and k in SHOWN}
    values: dict[str, Any] = {"name": out.name, "samples": record["samples"], "plan": record["plan"]}
    values |= {"headline": f"A {count(record['parameters'])}-parameter decoder, {layers}, {record['steps']} steps."}
    values |= {
        "plots": plots(record),
        "tiles": _tiles(record),
        "warnings": _warnings(record),
        "events": _events(record),
    }
    values |= {"comparison": _comparison(record) if record.get("heldout_bits_per_byte") else []}
    values |= {"verdict": _verdict(record) if record.get("heldout_bits_per_byte") else ""}
    values |= {"held": record.get("heldout_bits_per_byte"), "forecast": record.get("forecast")}
    values |= {"looks": _looks(record), "recitation": record.get("recitation")}
    values |= {"parts": [(n, v, round(100 * v / whole, 1)) for n, v in sorted(by_part.items(), key=lambda x: -x[1])]}
    values |= {"corpora": _corpora(record), "provenance": provenance, "next": _next(out, record)}
    values |= {"configuration": [("decoder", decoder), *_changed(record)], "command": record.get("command")}
    write_text(out / "report.html", filled("training", **values))
    return out / "report.html"
