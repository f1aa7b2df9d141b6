"""A model card, made of the record: what the model is, what it read, how well it does, what it is not for."""

import re
from typing import Any

from craton.base import amount, count, span
from craton.model.config import ModelConfig

# Names of licences as they are written, to the hub's identifiers.
_LICENCES = {
    r"\bapache\b": "apache-2.0", r"\bmit\b": "mit", r"\bcc0\b": "cc0-1.0", r"\bcc[- ]by[- ]sa[- ]4": "cc-by-sa-4.0",
    r"\bcc[- ]by[- ]4": "cc-by-4.0", r"\bcc[- ]by[- ]nc[- ]sa[- ]4": "cc-by-nc-sa-4.0", r"\bgpl[- ]?v?3": "gpl-3.0",
    r"\bcc[- ]by[- ]nc[- ]4": "cc-by-nc-4.0", r"\bcc[- ]by[- ]sa[- ]3": "cc-by-sa-3.0", r"\bbsd[- ]3": "bsd-3-clause",
}  # fmt: skip


def card(name: str, config: ModelConfig, record: dict[str, Any] | None, gguf: str | None) -> str:
    """README.md of a released folder, with the hub's front matter. record: None where the folder has none."""
    parts = [_front(record), f"# {name}\n", _what(name, config, record), _use(name, record, gguf)]
    if record is None:
        parts.append(
            "## Data, scores, limits\n\nThis folder came without a record of its training, so nothing is known here of "
            "its data, their licences or its scores. Say so to whoever gets it, or ask where it came from.\n"
        )
    else:
        parts += [_data(record), _scores(record), _limits(record), _cost(record), _provenance(record)]
    return "\n".join(parts)


def _licences(record: dict[str, Any]) -> list[str]:
    """Of all sources, as they are stated; 'not stated' where one is not."""
    sources = [s for c in record["corpora"] for s in c["sources"] if s["documents"]]
    return sorted({x for s in sources for x in (s["license"] or ["not stated"])})


def _front(record: dict[str, Any] | None) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- craton"]
    stated = _licences(record) if record else []
    known = {next((v for k, v in _LICENCES.items() if re.search(k, s, re.I)), None) for s in stated}
    lines.insert(0, f"license: {known.pop()}" if len(known) == 1 and None not in known else "license: other")
    if record and (bits := record.get("heldout_bits_per_byte")):
        lines += [
            "model-index:", "- name: model", "  results:", "  - task:", "      type: text-generation", "    dataset:",
            "      name: held-out documents of its own corpus", "      type: own", "    metrics:",
            "    - type: bits-per-byte", f"      value: {bits:.4f}",
        ]  # fmt: skip
    return "---\n" + "\n".join(lines) + "\n---\n"


def _what(name: str, config: ModelConfig, record: dict[str, Any] | None) -> str:
    layers = f"{config.num_hidden_layers} layer{'s' if config.num_hidden_layers > 1 else ''} of {config.hidden_size}"
    out = f"A {config.model_type} decoder with {count(config.parameters)} parameters: {layers}, vocabulary "
    out += f"{config.vocab_size}, context {config.max_position_embeddings} tokens."
    if record and record.get("objective") == "pretraining":
        out += (
            "\n\nIt is a **base model**: trained to go on with a text, not to answer. It has no chat template, has "
            "seen no conversations, and was not taught to refuse or to be safe."
        )
    return out + "\n"


def _use(name: str, record: dict[str, Any] | None, gguf: str | None) -> str:
    out = f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

```
craton generate {name} "Once upon a time"
"""
    if gguf:
        out += f'llama-completion -m {gguf} -p "Once upon a time"\n'
    return out + "```\n"


def _data(record: dict[str, Any]) -> str:
    rows = ["## Data\n", "| source | licence | documents | bytes |", "|---|---|---|---|"]
    for corpus in record["corpora"]:
        for s in corpus["sources"]:
            licence = ", ".join(s["license"]) or "not stated"
            rows.append(f"| {_cell(s['name'])} | {_cell(licence)} | {s['documents']} | {amount(s['bytes'], 'B')} |")
    rows.append("")
    for corpus in record["corpora"]:
        dropped = sum(d["bytes"] for d in corpus["dropped"].values())
        what = f"{count(corpus['tokens'])} training tokens, {count(corpus['heldout_tokens'])} held out"
        rows.append(f"{what}; {amount(dropped, 'B')} were dropped as copies or by rules.")
        if looked := corpus.get("evaluation"):
            against = ", ".join(looked.get("files") or []) or "evaluation files"
            short = f"; {looked['too_short']} were too short to look for" if looked["too_short"] else ""
            found = corpus["dropped"].get("contaminated", {}).get("documents", 0)  # parts of long documents count
            rows.append(
                f"Contamination: {looked['items']} items of {against} were looked for (13 words in a row){short}; "
                f"{found} documents, or parts of long ones, that had one were dropped."
            )
        else:
            rows.append("Contamination: **nothing was looked for**, so scores on public benchmarks may be too good.")
    unknown = "not stated" in _licences(record)
    if unknown:
        rows.append("\n**Licences of some sources are not stated.** Whoever publishes this model has to know them.")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _scores(record: dict[str, Any]) -> str:
    bits = record.get("heldout_bits_per_byte")
    if not bits:
        return "## Scores\n\nNothing was held out, so there are none.\n"
    rows = ["## Scores\n", "Bits per byte of held-out text (lower is better):\n", "| | bits per byte |", "|---|---|"]
    rows.append(f"| **this model** | **{bits:.4f}** |")
    names = {"unigram": "token frequencies alone", "gzip": "gzip -9", "xz": "xz"}
    found = record.get("references") or {}
    rows += [f"| {label} | {found[key]:.4f} |" for key, label in names.items() if key in found]
    by_source = record.get("by_source") or {}
    if len(by_source) > 1:
        rows += [f"| this model, on {_cell(name)} | {value:.4f} |" for name, value in sorted(by_source.items())]
    if (recited := record.get("recitation") or {}).get("train"):
        train = recited["train"]
        rows.append(
            f"\nRecitation: {train['recited']} of {train['passages']} training passages were continued word for word "
            f"for {recited['tokens']} tokens."
        )
    return "\n".join(rows) + "\n"


def _limits(record: dict[str, Any]) -> str:
    small = record["parameters"] < 1e9
    first = (
        "At its size it writes text in the style of what it read, but knows few facts, follows no instructions and "
        "does not reason."
        if small
        else "It may state what is not so, in good style."
    )
    return f"""## Intended use and limits

For research, teaching, and as a start for fine-tuning on text like its own. {first} It repeats what its sources say,
with their errors and views, and knows only their languages. It is not to decide anything about people, and what it
writes is to be read before it is used.
"""


def _cost(record: dict[str, Any]) -> str:
    joules = record.get("energy_joules")
    energy = f"{joules / 3.6e6:.3g} kWh of the processors" if joules else "not measured on this machine"
    device = record["environment"].get("device")
    where = record["environment"].get("cpu") if device == "cpu" else device
    return (
        f"## Cost\n\n{span(record['seconds'])} on {where}, {amount(record['flops'], 'FLOP')} for "
        f"{count(record['tokens'])} tokens. Energy: {energy}.\n"
    )


def _provenance(record: dict[str, Any]) -> str:
    rows = ["## Provenance\n", "| | |", "|---|---|"]
    rows += [f"| corpus {i + 1} | `{c['digest']}` |" for i, c in enumerate(record["corpora"])]
    rows.append(f"| weights | `{record['weights_sha256']}` |")
    for key in ("craton", "commit", "torch", "python"):
        if value := record["environment"].get(key):
            rows.append(f"| {key} | `{value}` |")
    return "\n".join(rows) + "\n\nMade with craton; `record.json` has the whole recipe.\n"
