"""`craton corpus trace`: from a training step back to its documents."""

from pathlib import Path
from typing import Any

from craton.base import UserError, read_json, say
from craton.corpus.batches import Batches
from craton.corpus.store import Corpus
from craton.train.record import read_metrics


def trace(run: Path, step: int) -> dict[str, Any]:
    """The documents of one step, from the run's recipe, its metrics (which batch the step took) and its corpora."""
    if not (run / "training" / "recipe.json").exists():
        raise UserError(f"{run}: not a training run (no training/recipe.json)")
    settled, record = read_json(run / "training" / "recipe.json"), read_json(run / "record.json")
    row = next((r for r in read_metrics(run / "metrics.jsonl") if r.get("step") == step and "batch" in r), None)
    if row is None:
        raise UserError(f"{run}/metrics.jsonl: no step {step}; the run made steps 1 to {record['steps']}")
    corpora = [Corpus(Path(c["folder"])) for c in record["corpora"]]
    for corpus, digest in zip(corpora, settled["asked"]["corpora"], strict=True):
        if corpus.digest != digest:
            raise UserError(f"{corpus.folder}: not the corpus that the run was trained on")
    data, seed = settled["recipe"]["data"], settled["recipe"]["run"]["seed"]
    length, mask = data["sequence_length"], data["document_mask"]
    batches = Batches(corpora, settled["asked"]["weights"], length, data["batch_tokens"] // length, seed, mask)
    documents = batches.documents(row["batch"])
    for item in documents:
        where = f"{item['tokens']:>6} tokens from {item['first_token']:>8}"
        say(f"row {item['row']:>4}  {where}  {item['document']}  {item['digest'][:16]}")
    return {"step": step, "batch": row["batch"], "documents": documents}
