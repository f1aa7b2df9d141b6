"""`craton corpus trace`: from a training step back to its documents."""

from pathlib import Path
from typing import Any

from craton.base import UserError, read_json, say
from craton.corpus.batches import Batches
from craton.corpus.store import Corpus
from craton.train.metrics import read_metrics


def trace(run: Path, step: int | None, batch: int | None = None) -> dict[str, Any]:
    """The documents of a step or of a batch, from the run's recipe, its metrics (which batch the step took) and its
    corpora. A run that crashed has all of them. UserError."""
    if not (run / "training" / "recipe.json").exists():
        raise UserError(f"{run}: not a training run (no training/recipe.json)")
    settled = read_json(run / "training" / "recipe.json")
    if batch is None:
        steps = {r["step"]: r["batch"] for r in read_metrics(run / "metrics.jsonl") if "batch" in r}
        batch = steps.get(step)
        if batch is None:
            made = f"the run made steps {min(steps)} to {max(steps)}" if steps else "the run made none; give --batch"
            raise UserError(f"{run}/metrics.jsonl: no step {step}; {made}")
    if batch < 0:
        raise UserError(f"--batch {batch}: batches count from 0")
    corpora = [_opened(f, d) for f, d in zip(_folders(run, settled), settled["asked"]["corpora"], strict=True)]
    data, seed = settled["recipe"]["data"], settled["recipe"]["run"]["seed"]
    length, mask = data["sequence_length"], data["document_mask"]
    batches = Batches(corpora, settled["asked"]["weights"], length, data["batch_tokens"] // length, seed, mask)
    documents = batches.documents(batch)
    for item in documents:
        where = f"{item['tokens']:>6} tokens from {item['first_token']:>8}"
        say(f"row {item['row']:>4}  {where}  {item['document']}  {item['digest'][:16]}")
    return {"step": step, "batch": batch, "documents": documents}


def _folders(run: Path, settled: dict[str, Any]) -> list[Path]:
    """Where the corpora were when the run began."""
    if "folders" in settled:
        return [Path(f) for f in settled["folders"]]
    return [Path(c["folder"]) for c in read_json(run / "record.json")["corpora"]]  # of a version before


def _opened(folder: Path, digest: str) -> Corpus:
    corpus = Corpus(folder)
    if corpus.digest != digest:
        raise UserError(f"{folder}: not the corpus that the run was trained on")
    return corpus
