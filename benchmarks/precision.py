"""What rounding activations costs: bits per byte of a GGUF file, by the network, by the engine, and by llama.cpp.

    python benchmarks/precision.py FILE.gguf [--text FILE] [--characters 50000] [--json FILE]

The same windows for all: up to 512 tokens, of which the second half counts. "exact" is fp32 activations times the
file's weight values; the others' costs are given beside it.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch


def windows(ids: list[int], begin: list[int], size: int = 512) -> list[tuple[list[int], int]]:
    """(tokens, how many of them are only context)."""
    out = []
    for start in range(0, max(1, len(ids) - size // 2), size // 2):
        known = 1 if start == 0 else size // 2
        out.append((begin + ids[start : start + size], known + len(begin)))
    return out


def theirs(path: str, pieces: list[tuple[list[int], int]]) -> float:
    """Nats of what counts."""
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=1024, n_batch=1024, n_threads=2, verbose=False, logits_all=True)
    nats = 0.0
    for tokens, known in pieces:
        model.reset()
        model.eval(tokens)
        scores = torch.from_numpy(np.array(model.scores[known - 1 : len(tokens) - 1], dtype=np.float32)).double()
        target = torch.tensor(tokens[known:])
        nats -= float(scores.log_softmax(-1).gather(1, target[:, None]).sum())
    return nats


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="+")
    parser.add_argument("--text")
    parser.add_argument("--characters", type=int, default=50_000)
    parser.add_argument("--json")
    a = parser.parse_args()
    from craton.engine.measure import text_to_measure
    from craton.engine.model import load_model

    results = []
    for path in a.file:
        text = text_to_measure(Path(a.text) if a.text else None, a.characters)
        model = load_model(path)
        ids = model.tokenizer.encode_rendered(text)
        begin = model.tokenizer.encode("")[:1]
        pieces = windows(ids, begin)
        counted = b"".join(model.tokenizer.bytes_of(i) for tokens, known in pieces for i in tokens[known:])
        row: dict = {"file": Path(path).name, "characters": len(text), "bytes": len(counted)}
        for name in ("exact", "engine", "llama.cpp"):
            if name == "llama.cpp":
                nats = theirs(path, pieces)
            else:
                pairs = [(t[:known], t[known:]) for t, known in pieces]
                nats = -sum(score for score, _ in model.engine.loglikelihood(pairs, exact=name == "exact"))
            row[name] = nats / math.log(2) / len(counted)
            print(
                f"{row['file']}  {name:<10} {row[name]:.5f} bits per byte  {row[name] - row['exact']:+.5f}", flush=True
            )
        results.append(row)
    if a.json:
        from craton.train import machine

        Path(a.json).write_text(json.dumps({"environment": machine.facts("cpu"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
