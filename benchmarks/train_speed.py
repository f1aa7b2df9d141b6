"""Training speed beside transformers' Llama and litgpt's GPT, each eager and compiled, in one run on this machine.

    python benchmarks/train_speed.py --shape S --json
    python benchmarks/train_speed.py --shape M --whole 120      whole runs from process start, compiling included

Every contestant lives in a process of its own and is asked for steps in turns, so that noise falls on all. A step is
forward, backward, clipping at norm 1 and fused AdamW, fp32, on random tokens. FLOPs are 6 * (matrices + head) a token,
the same for all. Two peaks are measured between the turns, on a 1536 x 1536 fp32 product. `fraction_of_gemm_peak` is of
what `torch.mm` reaches, which is what the peers compute with; `fraction_of_best_gemm_peak` is of the fastest product at
hand, through PyTorch's BLAS or through oneDNN: the machine's ceiling. Where oneDNN is the faster, ours can pass the
first."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPES = {  # hidden, layers, heads, kv heads, ffn, vocabulary, rows, time
    "S": (256, 8, 8, 4, 704, 4096, 8, 512),
    "M": (512, 12, 8, 4, 1408, 8192, 4, 1024),
    "tiny": (64, 2, 2, 1, 192, 512, 2, 64),
}
CONTESTANTS = ["craton", "transformers", "transformers-compiled", "litgpt", "litgpt-compiled"]


def matrix_parameters(shape: str) -> int:
    hidden, layers, heads, kv, ffn, vocabulary, _, _ = SHAPES[shape]
    d = hidden // heads
    return layers * hidden * (2 * heads * d + 2 * kv * d + 3 * ffn) + vocabulary * hidden


def loss_function(name: str, shape: str) -> tuple[Any, Any]:
    """The contestant's module and a function from (ids, target) to the mean loss."""
    import torch
    import torch.nn.functional as F

    hidden, layers, heads, kv, ffn, vocabulary, rows, length = SHAPES[shape]
    if name == "craton":
        from craton.model import kernels
        from craton.model.config import ModelConfig
        from craton.model.decoder import Decoder
        from craton.model.initialise import initialise

        kernels.keep_freed_memory()
        network = Decoder(ModelConfig(vocabulary, hidden, ffn, layers, heads, kv, hidden // heads, length))
        initialise(network, 0)
        weight = torch.full((rows, length), 1 / (rows * length))
        return network, lambda ids, target: network.weighted_nll(ids, target, weight)[0]
    if name.startswith("transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            max_position_embeddings=length,
        )
        network = LlamaForCausalLM(config)
        forward = torch.compile(network) if name.endswith("compiled") else network
        return network, lambda ids, target: F.cross_entropy(
            forward(ids, use_cache=False).logits.flatten(0, 1), target.flatten()
        )
    from litgpt import GPT, Config

    network = GPT(
        Config(
            block_size=length,
            vocab_size=vocabulary,
            padded_vocab_size=vocabulary,
            n_layer=layers,
            n_head=heads,
            n_query_groups=kv,
            n_embd=hidden,
            intermediate_size=ffn,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    forward = torch.compile(network) if name.endswith("compiled") else network
    return network, lambda ids, target: F.cross_entropy(forward(ids).flatten(0, 1), target.flatten())


def worker(name: str, shape: str) -> None:
    """Reads 'steps N' or 'seconds N' lines, answers each with one JSON line; 'peak' measures the matrix product."""
    import torch

    torch.manual_seed(0)
    *_, vocabulary, rows, length = SHAPES[shape]
    network, loss = loss_function(name, shape)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        tokens = torch.randint(vocabulary, (rows, length + 1))
        loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for line in sys.stdin:
        what, amount = line.split()
        if what == "steps":
            times = []
            for _ in range(int(amount)):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            print(json.dumps(times), flush=True)
        elif what == "until":
            done = 0
            while time.time() < float(amount):
                step()
                done += 1
            print(json.dumps(done), flush=True)
        elif what == "peak":
            from craton.model.ops import matmul_t

            best = {}
            for key, product in (("torch_mm", lambda x, y: x @ y.t()), ("best", matmul_t)):
                x, y = torch.randn(1536, 1536), torch.randn(1536, 1536)
                times = []
                for _ in range(12):
                    start = time.perf_counter()
                    product(x, y)
                    times.append(time.perf_counter() - start)
                best[key] = 2 * 1536**3 / min(times)
            best["best"] = max(best.values())
            print(json.dumps(best), flush=True)


class Contestant:
    def __init__(self, name: str, shape: str):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--shape", shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} died; is the bench extra installed? pip install 'craton[bench]'")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument(
        "--whole",
        type=float,
        default=0,
        metavar="SECONDS",
        help="also whole runs of so many seconds from process start",
    )
    parser.add_argument("--only", nargs="*", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.shape)
        return

    *_, rows, length = SHAPES[args.shape]
    tokens, flops = rows * length, 6 * matrix_parameters(args.shape)
    result: dict[str, Any] = {"shape": args.shape}
    contestants = {}
    for name in args.only:
        contestants[name] = Contestant(name, args.shape)
        start = time.time()
        contestants[name].ask("steps 2")
        print(f"{name}: two warm-up steps in {time.time() - start:.1f} s", file=sys.stderr)
    times: dict[str, list[float]] = {n: [] for n in contestants}
    peaks = []
    for round_ in range(args.rounds):
        for name, c in contestants.items():
            times[name] += c.ask("steps 2")
        peaks.append(contestants["craton"].ask("peak 0"))
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
    for c in contestants.values():
        c.close()
    speed = {n: tokens / statistics.median(t) for n, t in times.items()}
    best = statistics.median(p["best"] for p in peaks)
    mm = statistics.median(p["torch_mm"] for p in peaks)
    print(f"fp32 products: torch.mm {mm / 1e9:.0f} GFLOP/s, the fastest at hand {best / 1e9:.0f} GFLOP/s")
    print(f"{'':24}{'tokens/s':>10}{'of torch.mm':>13}{'of the fastest':>16}")
    for name, rate in speed.items():
        print(f"{name:24}{rate:>10.0f}{rate * flops / mm:>13.1%}{rate * flops / best:>16.1%}")
    peers = {n: r for n, r in speed.items() if n != "craton"}
    if args.whole:
        counted = {}
        for name in args.only:
            start = time.time()
            c = Contestant(name, args.shape)
            counted[name] = c.ask(f"until {start + args.whole}") * tokens
            c.close()
            print(f"{name:24}{counted[name]:>10} tokens in {args.whole:.0f} s from process start")
        result["whole_run_tokens"] = counted
        if len(counted) > 1:
            result["whole_run_ratio"] = counted["craton"] / max(v for n, v in counted.items() if n != "craton")
    result |= {
        "tokens_per_second": speed,
        "gemm_peak_flops": mm,
        "best_gemm_peak_flops": best,
        "fraction_of_best_gemm_peak": speed["craton"] * flops / best,
        "ratio_to_fastest_peer": speed["craton"] / max(peers.values()) if peers else None,
        "fraction_of_gemm_peak": speed["craton"] * flops / mm,
    }
    print(f"craton / fastest peer: {result['ratio_to_fastest_peer']}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
