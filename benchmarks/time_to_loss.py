"""Wall-clock to a held-out loss: ours beside transformers' Llama of the same size with AdamW and cosine decay.

    python benchmarks/time_to_loss.py --train novels/*.txt --heldout other/*.txt --json

The peer trains for a fixed time with a warmed-up, cosine-decayed AdamW at each of a few learning rates; the best of
its final held-out bits per byte is the target. Ours is planned for ever larger fractions of that time, as the peer is
planned for its own, and the first plan that reaches the target gives the ratio: the moment of its first evaluation at
or under the target, over the peer's time. Same documents, tokenizer, rows of tokens, held-out positions, threads.
Each contestant runs in its own process; time starts with its first step and includes compiling and its planning.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, ROWS = 512, 8
SHAPE: dict[str, Any] = {"hidden": 256, "layers": 4, "heads": 8, "kv": 4, "ffn": 704}


def corpora(folder: Path) -> tuple[Any, Any]:
    from craton.corpus.store import Corpus

    return Corpus(folder / "train"), Corpus(folder / "heldout")


def heldout(folder: Path, tokens: int) -> list[Any]:
    """Rows of the held-out documents, spread evenly."""
    from craton.corpus.batches import Batches

    corpus = corpora(folder)[1]
    batches = Batches([corpus], [1.0], LENGTH, 1, 0, False)
    n = min(batches.streams[0].per_epoch, tokens // LENGTH)
    return [batches.batch(i) for i in range(n)]


def bits_per_byte(nll: Any, rows: list[Any], folder: Path) -> float:
    """nll: function from (ids, target) to the summed loss in nats."""
    import torch

    size = torch.from_numpy(corpora(folder)[0].tokenizer.token_bytes())
    with torch.no_grad():
        nats = sum(float(nll(r.ids, r.target)) for r in rows)
    return nats / math.log(2) / float(sum(size[r.target].sum() for r in rows))


def peer(folder: Path, seconds: float, lr: float, compiled: bool, tokens: int) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from craton.corpus.batches import Batches

    torch.manual_seed(0)
    corpus = corpora(folder)[0]
    config = LlamaConfig(
        vocab_size=corpus.manifest["vocab_size"],
        hidden_size=SHAPE["hidden"],
        intermediate_size=SHAPE["ffn"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv"],
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    network = LlamaForCausalLM(config)
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = Batches([corpus], [1.0], LENGTH, ROWS, 0, False)
    rows = heldout(folder, tokens)

    def loss(ids: Any, target: Any) -> Any:
        return F.cross_entropy(forward(ids, use_cache=False).logits.flatten(0, 1), target.flatten())

    began, step = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        # The schedule runs on the clock, so that the end of the time is the end of the decay.
        share = min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * spent / seconds)))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        batch = batches.batch(step)
        loss(batch.ids, batch.target).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    spent = time.perf_counter() - began
    final = bits_per_byte(
        lambda i, t: F.cross_entropy(network(i, use_cache=False).logits.flatten(0, 1), t.flatten(), reduction="sum"),
        rows,
        folder,
    )
    return {
        "lr": lr,
        "compiled": compiled,
        "seconds": spent,
        "steps": step,
        "tokens": step * ROWS * LENGTH,
        "bits_per_byte": final,
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def ours(folder: Path, seconds: float, target: float, tokens: int) -> dict[str, Any]:
    """Train with the loop's own optimizers and schedule for `seconds`, looking at the held-out loss as the decay
    ends."""
    import torch

    from craton.model import kernels
    from craton.train.distributed import Processes, clip_gradients
    from craton.train.loop import accumulate, build, lr_share
    from craton.train.plan import plan
    from craton.train.pretrain import pretraining
    from craton.train.recipe import Recipe

    kernels.keep_freed_memory()
    corpus = corpora(folder)[0]
    recipe = Recipe()
    recipe.model.num_hidden_layers, recipe.model.hidden_size, recipe.model.intermediate_size = (
        SHAPE["layers"],
        SHAPE["hidden"],
        SHAPE["ffn"],
    )
    recipe.model.num_attention_heads, recipe.model.num_key_value_heads, recipe.model.head_dim = (
        SHAPE["heads"],
        SHAPE["kv"],
        SHAPE["hidden"] // SHAPE["heads"],
    )
    recipe.data.sequence_length, recipe.data.batch_tokens, recipe.run.steps, recipe.data.document_mask = (
        LENGTH,
        ROWS * LENGTH,
        1000,
        False,
    )
    recipe, config, _ = plan(recipe, [corpus], 1e12, lambda c, r: 1.0, time.monotonic(), "cpu")
    rows = heldout(folder, tokens)
    job, alone = pretraining([corpus], [1.0], recipe, config, "cpu"), Processes("cpu")
    began = time.perf_counter()
    network, optimizers = build(job.store, job.kind, recipe, alone)
    looks, looking, step, reached, next_look = [], 0.0, 0, None, 0.9
    # Four steps tell the speed, and with it how many steps the time holds; they are part of the run.
    while True:
        spent = time.perf_counter() - began - looking
        if step >= 4:
            recipe.run.steps = max(step + 1, round(step * seconds / spent))
        sums = accumulate(network, optimizers.parameters, job, recipe, alone, step)
        clip_gradients(optimizers.parameters, recipe.optimizer.clip, 1 / sums["loss"][1])
        optimizers.step(lr_share(recipe, step))
        step += 1
        spent = time.perf_counter() - began - looking
        if spent >= next_look * seconds or spent >= seconds:
            next_look += 0.02
            start = time.perf_counter()
            value = bits_per_byte(
                lambda i, t: network.weighted_nll(i, t, torch.ones_like(i, dtype=torch.float32))[0], rows, folder
            )
            looking += time.perf_counter() - start
            looks.append({"seconds": spent, "bits_per_byte": value})
            if value <= target and reached is None:
                reached = spent
            if spent >= seconds:
                break
    return {
        "seconds": spent,
        "steps": step,
        "tokens": step * ROWS * LENGTH,
        "bits_per_byte": value,
        "reached": reached,
        "looks": looks,
        "parameters": config.parameters,
    }


def ask(*args: Any) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--worker", json.dumps(args)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", help="documents to train on")
    parser.add_argument("--heldout", nargs="+", help="documents to measure on")
    parser.add_argument("--seconds", type=float, default=180, help="the peer's time")
    parser.add_argument(
        "--lr", nargs="+", type=float, default=[2e-3, 4e-3], help="the peer's learning rates; the best counts"
    )
    parser.add_argument("--heldout-tokens", type=int, default=131_072)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        what, folder, *rest = json.loads(args.worker)
        print(json.dumps({"peer": peer, "ours": ours}[what](Path(folder), *rest)))
        return
    if not args.train or not args.heldout:
        parser.error("--train and --heldout take files, folders or globs")
    from craton.corpus.build import BuildOptions, build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(BuildOptions(args.train, ["quality"], [], vocab_size=4096), folder / "train")
        everything = ["quality", "exact", "near"]
        build(
            BuildOptions(args.heldout, everything, [], tokenizer=str(folder / "train" / "tokenizer")),
            folder / "heldout",
        )
        peers = []
        for lr in args.lr:
            for compiled in (False, True):
                if compiled and peers and lr != min(peers, key=lambda p: p["bits_per_byte"])["lr"]:
                    continue
                peers.append(ask("peer", name, args.seconds, lr, compiled, args.heldout_tokens))
                print(
                    f"transformers{' compiled' if compiled else ''}, AdamW {lr:g}: {peers[-1]['bits_per_byte']:.4f} "
                    f"bits/byte after {peers[-1]['steps']} steps, {peers[-1]['seconds']:.0f} s"
                )
        best = min(peers, key=lambda p: p["bits_per_byte"])
        tries = []
        for share in (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0):
            tries.append(ask("ours", name, share * best["seconds"], best["bits_per_byte"], args.heldout_tokens))
            t = tries[-1]
            print(
                f"craton, planned for {share:.0%} of that time: {t['bits_per_byte']:.4f} bits/byte after "
                f"{t['steps']} steps, {t['seconds']:.0f} s"
            )
            if t["reached"]:
                break
        result = {
            "target_bits_per_byte": best["bits_per_byte"],
            "peer": best,
            "peers": peers,
            "craton": tries[-1],
            "tries": tries,
            "time_ratio": tries[-1]["reached"] / best["seconds"] if tries[-1]["reached"] else None,
        }
    print(f"time to {best['bits_per_byte']:.4f} bits/byte, craton / transformers: {result['time_ratio']}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
