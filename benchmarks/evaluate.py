"""craton eval beside lm-eval's hf backend: the same items and prompts, item by item, and the time both take.

python benchmarks/evaluate.py agree MODEL [--folder FOLDER] TASK... [--limit N] [--shots K]
python benchmarks/evaluate.py speed MODEL [--folder FOLDER] TASK... [--limit N] [--shots K] [--rounds N] [--out FILE]

FOLDER: the same weights as transformers opens them in fp32; without it, it is made from MODEL. Needs lm_eval (0.4.13).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch


def dequantised(model: str, out: Path) -> Path:
    """The model with its weights written out in fp32, as a folder."""
    from craton.engine.model import load_model
    from craton.weights.export import write_out
    from craton.weights.folder import write_network

    loaded = load_model(model)
    network = loaded.network
    write_out(network)
    out.mkdir(parents=True, exist_ok=True)
    write_network(out, network)
    loaded.tokenizer.save(out)
    return out


def ours(model: str, tasks: list[str], limit: int, shots: int | None, cache: Path) -> tuple[dict, float]:
    """Results of craton eval in a process of its own, and its seconds."""
    command = [sys.executable, "-m", "craton", "eval", model, "--tasks", ",".join(tasks), "--limit", str(limit)]
    command += ["--no-chat", "--json"] + (["--shots", str(shots)] if shots is not None else [])
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CRATON_CACHE": str(cache)})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)["models"][model]["tasks"], time.monotonic() - began


def as_harness(name: str, samples: list[dict], facts: dict, folder: Path) -> dict:
    """The same items as a task of lm-eval's, in the words that craton put them."""
    rows = []
    for s in samples:
        several = isinstance(s["prompt"], list)
        row = {"prompt": "" if several else s["prompt"], "choices": s["choices"], "target": s["target"]}
        if several:
            row = {"prompt": s["target"], "choices": s["prompt"], "target": s["choices"][0]}
        row["target"] = json.dumps(row["target"]) if isinstance(row["target"], list) else row["target"]
        rows.append(row)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    task |= {"test_split": "test", "target_delimiter": ""}
    if not samples[0]["choices"]:
        until = json.loads(os.environ.get("STOP", "[]")) or ["\n"]
        how = {"until": until, "max_gen_toks": 64, "do_sample": False, "temperature": 0}
        return task | {
            "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{target}}",
            "generation_kwargs": how, "metric_list": [{"metric": "exact_match"}],
        }  # fmt: skip
    if len(samples[0]["loglikelihoods"]) == 1:
        return task | {
            "output_type": "loglikelihood", "doc_to_text": "{{prompt}}", "doc_to_target": "{{choices[0]}}",
            "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
    if isinstance(samples[0]["prompt"], list):
        return task | {
            "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{target}}", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
    return task | {
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{target}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip


def read_samples(facts: dict) -> list[dict]:
    return [json.loads(line) for line in Path(facts["samples"]).read_text().splitlines()]


def harness(folder: Path, batch: int):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch)


def theirs(lm, tasks: list[dict]) -> tuple[dict, float]:
    import lm_eval

    began = time.monotonic()
    found = lm_eval.simple_evaluate(lm, tasks=tasks, bootstrap_iters=0, log_samples=True)
    return found, time.monotonic() - began


def agree(model: str, folder: Path, tasks: list[str], limit: int, shots: int | None) -> None:
    """The largest relative difference of log-likelihoods, and how many items are judged alike."""
    with tempfile.TemporaryDirectory() as scratch:
        results, _ = ours(model, tasks, limit, shots, Path(scratch) / "cache")
        lm = harness(folder, 8)
        for name, facts in results.items():
            samples = read_samples(facts)
            task = as_harness(name.replace("=", "_").replace(":", "_"), samples, facts, Path(scratch))
            if not samples[0]["choices"]:
                from craton.tasks.find import find_task

                text = next(t for t in tasks if t.partition("=")[0] == name or t == name)
                made = find_task(text)
                task["generation_kwargs"] |= {"until": list(made.stop), "max_gen_toks": made.max_tokens}
            found, _ = theirs(lm, [task])
            rows = sorted(next(iter(found["samples"].values())), key=lambda s: s["doc_id"])
            worst, same = 0.0, 0
            for s, r in zip(samples, rows, strict=True):
                if not s["choices"]:
                    same += s["answer"].strip() == str(r["filtered_resps"][0]).strip()
                    continue
                got = (
                    [float(x[0]) for x in r["filtered_resps"]]
                    if len(s["choices"]) > 1
                    else [float(r["filtered_resps"][0][0])]
                )
                for a, b in zip(s["loglikelihoods"], got, strict=True):
                    worst = max(worst, abs(a - b) / max(abs(b), 1e-9))
                if len(s["choices"]) > 1:
                    pick = max(range(len(got)), key=got.__getitem__)
                    mine = max(range(len(got)), key=s["loglikelihoods"].__getitem__)
                    same += pick == mine
                else:
                    same += bool(s["score"]) == bool(r["filtered_resps"][0][1])
            what = f"log-likelihoods within {worst:.1e} relative, " if samples[0]["choices"] else "texts: "
            print(f"{name:<24} {facts['formulation']:<12} {what}{same} of {len(rows)} items alike", flush=True)


def speed(
    model: str, folder: Path, tasks: list[str], limit: int, shots: int | None, rounds: int, out: Path | None
) -> None:
    """Items a second of both, interleaved; whole runs, each opening its model."""
    with tempfile.TemporaryDirectory() as scratch:
        lines = []
        for text in tasks:
            times: dict[str, list[float]] = {"craton": [], "lm-eval": [], "lm-eval, evaluating": [], "again": []}
            results, _ = ours(model, [text], limit, shots, Path(scratch) / "first")
            name, facts = next(iter(results.items()))
            samples = read_samples(facts)
            task = as_harness(name, samples, facts, Path(scratch))
            best = _best_batch(folder, task, Path(scratch))
            for number in range(rounds):
                cache = Path(scratch) / f"{name}-{number}"
                times["craton"].append(ours(model, [text], limit, shots, cache)[1])
                times["again"].append(ours(model, [text], limit, shots, cache)[1])
                evaluating, whole = _timed(folder, task, best)
                times["lm-eval"].append(whole)
                times["lm-eval, evaluating"].append(evaluating)
            middle = {k: statistics.median(v) for k, v in times.items()}
            line = {"task": name, "items": len(samples), "shots": facts["shots"], "seconds": times}
            line |= {"formulations": [k for k in facts["metrics"] if "(" in k] or [facts["formulation"]]}
            line |= {"lm_eval_batch": best, "items_per_second": {k: len(samples) / v for k, v in middle.items()}}
            line["ratio"] = middle["lm-eval"] / middle["craton"]
            line["ratio, without what lm-eval needs to start"] = middle["lm-eval, evaluating"] / middle["craton"]
            lines.append(line)
            print(json.dumps(line), flush=True)
        about = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        about |= {"gemm_gflops": _gemm(), "torch": torch.__version__, "model": Path(model).name, "lines": lines}
        if out:
            out.write_text(json.dumps(about, indent=1) + "\n")


def _gemm() -> float:
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    a @ b
    began = time.monotonic()
    for _ in range(20):
        a @ b
    return 20 * 2 * 1024**3 / (time.monotonic() - began) / 1e9


def _timed(folder: Path, task: dict, batch: int) -> tuple[float, float]:
    """Seconds of lm-eval's evaluation in a process of its own, and of the whole process with imports and loading."""
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent.resolve())!r})\n"
        "from pathlib import Path\nfrom evaluate import harness, theirs\n"
        f"lm = harness(Path({str(folder)!r}), {batch})\n"
        f"print('SECONDS', theirs(lm, [json.loads({json.dumps(task)!r})])[1])"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    whole = time.monotonic() - began
    line = next((x for x in done.stdout.splitlines() if x.startswith("SECONDS")), None)
    if line is None:
        raise SystemExit(done.stderr)
    return float(line.split()[1]), whole


def _best_batch(folder: Path, task: dict, scratch: Path) -> int:
    """lm-eval's quickest batch size on the first 12 items."""
    path = Path(task["dataset_kwargs"]["data_files"]["test"])
    few = scratch / "few.jsonl"
    few.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    small = {**task, "task": "few", "dataset_kwargs": {"data_files": {"test": str(few)}}}
    return min((1, 8, 32), key=lambda b: _timed(folder, small, b)[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["agree", "speed"])
    parser.add_argument("model")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--shots", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = a.folder or dequantised(a.model, Path(scratch) / "fp32")
        if a.what == "agree":
            agree(a.model, folder, a.tasks, a.limit, a.shots)
        else:
            speed(a.model, folder, a.tasks, a.limit, a.shots, a.rounds, a.out)


if __name__ == "__main__":
    main()
