"""`record.json`: one account of a run, from data hashes to energy; what the report and later comparisons read."""

from pathlib import Path
from typing import Any

from craton.base import read_json
from craton.corpus import account
from craton.corpus.store import Corpus

CURVE = """step tokens seconds loss bits_per_byte tokens_per_second peak_share lr_share gradient_norm
    heldout_loss heldout_bits_per_byte""".split()
SUMMARY = """status objective steps tokens flops seconds parameters loss bits_per_byte heldout_loss
    heldout_bits_per_byte tokens_per_second peak_share rollbacks weights_sha256""".split()


def corpus_facts(corpora: list[Corpus], weights: list[float]) -> list[dict[str, Any]]:
    out = []
    for c, weight in zip(corpora, weights, strict=True):
        m, train = c.manifest, c.manifest["splits"]["train"]
        facts: dict[str, Any] = {"folder": str(c.folder), "weight": weight, "digest": c.digest}
        facts |= {"tokens": c.length("train"), "heldout_tokens": c.length("heldout"), "documents": train["documents"]}
        facts |= {"sources": m["sources"], "counts": m["counts"], "dropped": c.dropped()}
        facts["notes"] = account.warnings(m)
        if m.get("evaluation"):
            files = [Path(f).name for f in m["options"]["decontaminate"]]
            facts["evaluation"] = {**m["evaluation"], "files": files}
        sha256 = m["files"]["tokenizer/tokenizer.json"]["sha256"]
        out.append({**facts, "tokenizer_sha256": sha256, "vocab_size": m["vocab_size"]})
    return out


def curve(rows: list[dict[str, Any]], points: int = 400) -> list[dict[str, float]]:
    """Steps evenly thinned to at most `points`, evaluations always kept."""
    steps = [r for r in rows if "loss" in r]
    stride = max(1, len(steps) // points)
    return [
        {k: r[k] for k in CURVE if k in r}
        for i, r in enumerate(steps)
        if i % stride == 0 or "heldout_loss" in r or i == len(steps) - 1
    ]


def summary(out: Path) -> dict[str, Any]:
    """The numbers of a record that a script wants in its one JSON line."""
    record = read_json(out / "record.json")
    return {"out": str(out), **{k: record[k] for k in SUMMARY if k in record}}
