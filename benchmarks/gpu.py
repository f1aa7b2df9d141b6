"""Everything on one GPU: correct first, then how fast, beside its peers and the limits of the same machine, in one run.

    python benchmarks/gpu.py --out FOLDER                      at most 8 minutes, from a source tree, no network
    python benchmarks/gpu.py --out FOLDER --only decode,train  some parts
    python benchmarks/gpu.py --gpt-fast FOLDER --nanochat FOLDER   beside their code too
    python benchmarks/gpu.py --wheels                          packages that a bare machine lacks, to be carried there

A part that fails says so and the others go on; the exit code is 1 then. What would
not be over after 8 minutes is left out, and said. Limits are measured in the run: a product of
8192 x 8192 bf16 matrices of random numbers, and a copy of 4 GB, counting what is read and written.
"""

import argparse
import gc
import http.client
import importlib.util
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import gpu_peers  # noqa: E402

NEEDED = {
    "rensa": "rensa", "ftfy": "ftfy", "chardet": "chardet", "pypdf": "pypdf", "py3langid": "py3langid",
    "zstandard": "zstandard", "llguidance": "llguidance", "gguf": "gguf", "fastapi": "fastapi",
    "starlette": "starlette", "pydantic": "pydantic", "pydantic_core": "pydantic-core", "uvicorn": "uvicorn",
    "httptools": "httptools", "prompt_toolkit": "prompt-toolkit", "wcwidth": "wcwidth",
    "annotated_types": "annotated-types", "typing_inspection": "typing-inspection", "trafilatura": "trafilatura",
    "lxml_html_clean": "lxml-html-clean", "courlan": "courlan", "htmldate": "htmldate", "justext": "justext",
    "tld": "tld", "babel": "babel", "dateparser": "dateparser", "pytz": "pytz", "tzlocal": "tzlocal",
    "tiktoken": "tiktoken",
}  # fmt: skip
# hidden, layers, heads, kv heads, intermediate, vocabulary, tokens a row, tokens a step
TRAINED = {
    "105M": (768, 12, 12, 6, 2112, 32768, 1024, 524_288),
    "443M": (1280, 20, 20, 10, 3520, 32768, 2048, 524_288),
    "1.1B": (2048, 22, 32, 4, 5632, 32000, 2048, 262_144),
}
DECODED = (2048, 22, 32, 4, 5632, 32000, 4096)
SHARES = {"105M": 0.38, "443M": 0.52, "1.1B": 0.55}
MOST_SECONDS = 480
# What parts may take, of seconds; those that are not here, 30.
EXPECTED = {"tests": 90, "decode": 60, "packed": 60, "served": 60, "train": 150, "train_peers": 75, "memory": 40}
results: dict[str, Any] = {}
asked = argparse.Namespace(out=".", only="", gpt_fast="", nanochat="")


def torch_() -> Any:
    import torch

    return torch


def sync_seconds(work: Callable[[], Any]) -> float:
    torch = torch_()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], Any], times: int = 5, warm: int = 1) -> float:
    for _ in range(warm):
        work()
    return statistics.median(sync_seconds(work) for _ in range(times))


def free() -> None:
    torch = torch_()
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def limits() -> dict[str, float]:
    """FLOP/s and bytes/s."""
    torch = torch_()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / median_seconds(lambda: a @ b, 20, 5)
    x = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.numel() / median_seconds(lambda: y.copy_(x), 10, 2)
    return {"bf16_flops": product, "copy_bytes": copy}


# ---- correctness --------------------------------------------------------------------------------------------------


def check_tests() -> dict[str, Any]:
    """The tests that a GPU decides."""
    files = ["tests/test_cuda.py", "tests/model/test_triton.py", "tests/model/test_grouped.py"]
    files.append("tests/engine/test_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print("\n".join(lines[-60:]))
        raise RuntimeError("tests failed")
    return {"tests": lines[-1]}


def check_training() -> dict[str, Any]:
    """Twenty steps of a small model on the CPU in fp32, and on the GPU in bf16 as training does it."""
    torch = torch_()
    from craton.train.recipe import Recipe

    curves = {}
    for device in ("cpu", "cuda"):
        recipe = Recipe()
        recipe.run.precision = "fp32" if device == "cpu" else "bf16"
        network, step = trained((128, 3, 4, 2, 352, 512, 128, 2048), device, recipe, compiled=False, learn=True)
        curves[device] = [step() for _ in range(20)]
        del network
    apart = max(abs(a - b) for a, b in zip(curves["cpu"], curves["cuda"], strict=True))
    assert curves["cpu"][-1] < curves["cpu"][0] - 0.2 and apart < 0.05, curves
    return {"loss_apart": apart, "first": curves["cuda"][0], "last": curves["cuda"][-1], "torch": torch.__version__}


def check_logits() -> dict[str, Any]:
    """A bf16 decoder's logits by the kernels, against the same weights in fp32 on the CPU, and greedy text."""
    torch = torch_()
    from craton.engine.engine import Engine
    from craton.engine.request import Sampling

    n = decoder((256, 4, 8, 2, 704, 4096, 1024)).to(torch.bfloat16)
    ids = torch.randint(4096, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = decoder((256, 4, 8, 2, 704, 4096, 1024))
    exact.load_state_dict({k: v.float() for k, v in n.state_dict().items()})
    wanted = torch.log_softmax(exact(torch.tensor([ids]))[0].double(), -1)
    engine = Engine(n.cuda(), cache_bytes=1 << 28)
    (scored,) = engine.generate([ids], [Sampling(1, 0.0, prompt_logprobs=0)])[0]
    own = [s.logprob for s in scored.prompt_logprobs[1:]]
    apart = max(abs(a - float(wanted[i, ids[i + 1]])) for i, a in enumerate(own))
    assert apart < 0.1, apart
    (text,) = engine.generate([ids[:50]], [Sampling(100, 0.0, ignore_eos=True)])[0]
    line = torch.tensor([ids[:50] + text.token_ids])
    best = exact(line)[0, 49:-1]
    chosen = best.gather(1, torch.tensor(text.token_ids)[:, None])[:, 0]
    lost = float((best.max(-1)[0] - chosen).max())
    assert lost < 0.1, lost
    return {"logprob_apart": apart, "greedy_logit_lost": lost}


# ---- what is timed ------------------------------------------------------------------------------------------------


def decoder(shape: tuple[int, ...], device: str = "cpu") -> Any:
    torch = torch_()
    from craton.model.config import ModelConfig
    from craton.model.decoder import Decoder
    from craton.model.initialise import initialise

    hidden, layers, heads, kv, ffn, vocabulary, context = shape[:7]
    config = ModelConfig(vocabulary, hidden, ffn, layers, heads, kv, hidden // heads, context, eos_token_id=0)
    with torch.device(device):
        network = Decoder(config)
    initialise(network, 0)
    return network


def trained(shape: tuple[int, ...], device: str, recipe: Any, compiled: bool = True, learn: bool = False) -> Any:
    """A network in the training loop's own hands, and a function that makes a step on random tokens (learn: on the same
    ones) and returns the loss."""
    torch = torch_()
    import dataclasses

    from craton.corpus.batches import Batch
    from craton.train.distributed import Processes
    from craton.train.job import Cost, Job
    from craton.train.loop import Run
    from craton.train.pretrain import ModelFolder, kind, next_token

    hidden, layers, heads, kv, ffn, vocabulary, length, tokens = shape
    from craton.model.config import ModelConfig

    config = ModelConfig(vocabulary, hidden, ffn, layers, heads, kv, hidden // heads, length, eos_token_id=0)
    recipe = dataclasses.replace(recipe)
    recipe.run = dataclasses.replace(recipe.run, steps=1000, compile="on" if compiled else "off")
    recipe.data = dataclasses.replace(recipe.data, sequence_length=length, batch_tokens=tokens)
    for name, value in {"matrix_lr": 0.02, "embedding_lr": 0.01, "head_lr": 0.003, "norm_lr": 0.003}.items():
        setattr(recipe.optimizer, name, value)
    recipe.optimizer.weight_decay, recipe.schedule.warmup_steps = 0.1, 1
    if recipe.data.micro_tokens is None:
        from craton.train import memory

        bytes_free = memory.free("cuda") if device == "cuda" else 8 << 30
        recipe.data.micro_tokens = memory.micro_tokens(config, recipe, 1, bytes_free)

    class Random:
        rows, together = tokens // length, 1

        def batch(self, number: int, share: int, shares: int, network: Any) -> Batch:
            g = torch.Generator().manual_seed(0 if learn else number)
            ids = torch.randint(7 if learn else vocabulary, (self.rows, length + 1), generator=g)[share::shares]
            some = len(ids)
            return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(some, length), None)

        def facts(self) -> dict[str, Any]:
            return {}

    cost = Cost("tokens", length, config.flops_per_token(length) * length, 6 * config.matrix_parameters * length)
    job = Job("random", Random(), next_token, ModelFolder(config, 0), cost, kind)
    run = Run(Path("/nonexistent"), job, recipe, Processes(device), 1.0)

    def step() -> float:
        from craton.base import Progress

        return float(run._step(Progress(), None)["loss"])

    return run, step


def train() -> dict[str, Any]:
    torch = torch_()
    from craton.train.recipe import Recipe

    out = {}
    peak = results["limits"]["bf16_flops"]
    for name, shape in TRAINED.items():
        free()
        recipe = Recipe()
        recipe.run.precision = "bf16"
        start = time.perf_counter()
        run, step = trained(shape, "cuda", recipe)
        step()
        compiled = time.perf_counter() - start
        seconds = median_seconds(step, 4, 1)
        rate, per_token = shape[7] / seconds, 6 * run.network.config.matrix_parameters
        gb = torch.cuda.max_memory_allocated() / 1e9
        out[name] = {"tokens_per_second": rate, "peak_share": rate * per_token / peak, "gb": gb, "first": compiled}
        out[name] |= {"micro_tokens": run.recipe.data.micro_tokens, "recompute": run.network.model.recompute}
        said = f"{rate / 1e3:.0f}k tok/s, {rate * per_token / peak:.1%} of peak, {gb:.1f} GB"
        print(f"  train {name}: {said}, first step {compiled:.0f} s", flush=True)
        del run, step
    return out


def train_peers() -> dict[str, Any]:
    """transformers' Llama, compiled, with fused AdamW in bf16 autocast; nanochat where its folder is given."""
    free()
    shape = TRAINED["105M"]
    step = gpu_peers.transformers_step(shape, 32768, compiled=True, checkpointing=False)
    rate = shape[7] / median_seconds(step, 3, 2)
    peak = results["limits"]["bf16_flops"]
    out = {"transformers": {"tokens_per_second": rate, "peak_share": rate * 6 * gpu_peers.matrices(shape) / peak}}
    del step
    free()
    if asked.nanochat:
        own = gpu_peers.nanochat(Path(asked.nanochat), 12, 32768, shape[7])
        out["nanochat"] = own | {"peak_share": own["flops"] / peak}
    return out


def memory() -> dict[str, Any]:
    """Peak memory of a step of the 1.1B model, 8,192 tokens in rows of 2,048, what can be computed again not kept."""
    torch = torch_()
    from craton.train.recipe import Recipe

    out, shape = {}, (*TRAINED["1.1B"][:7], 8192)
    free()
    recipe = Recipe()
    recipe.run.precision, recipe.data.micro_tokens, recipe.run.recompute = "bf16", 8192, "on"
    run, step = trained(shape, "cuda", recipe, compiled=False)
    step(), step()
    out["craton"] = torch.cuda.max_memory_allocated() / 1e9
    del run, step
    free()
    step = gpu_peers.transformers_step(shape, 8192, compiled=False, checkpointing=True)
    step(), step()
    out["transformers"] = torch.cuda.max_memory_allocated() / 1e9
    del step
    free()
    return out


def generating(
    network: Any, batch: int, tokens: int, adapters: Any = (), sampling: dict[str, Any] | None = None, **more: Any
) -> float:
    """Tokens a second of a whole engine, prompts not counted. adapters: an answer's each."""
    torch = torch_()
    from craton.engine.engine import Engine
    from craton.engine.request import Sampling

    engine = Engine(network, step_tokens=8192, cache_bytes=8 << 30, **more)
    prompts = torch.randint(3, 30000, (batch, 32), generator=torch.Generator().manual_seed(0)).tolist()
    gc.collect()  # of an engine before, whose cache would stay
    names = [str(i) for i in range(len(adapters))] or [None] * batch
    for name, parts in zip(names, adapters, strict=False):
        engine.put_adapter(name, parts)
    seconds = {}
    for n in (2, tokens, 2, tokens):  # the first two capture graphs
        how = Sampling(n, **({"temperature": 0.0} | (sampling or {})), ignore_eos=True)
        asks = lambda h=how: [engine.add(p, h, adapter=a) for p, a in zip(prompts, names, strict=True)]  # noqa: E731
        seconds[n] = sync_seconds(lambda a=asks: engine._run(a()))
    return batch * (tokens - 2) / (seconds[tokens] - seconds[2])


def decode() -> dict[str, Any]:
    torch = torch_()
    from craton.model.gpu import layers

    free()
    network = decoder(DECODED, "cuda").to(torch.bfloat16).requires_grad_(False)
    weights = sum(p.numel() for p in network.parameters()) - network.model.embed_tokens.weight.numel()
    out: dict[str, Any] = {"weights": weights}
    for batch, tokens in ((1, 256), (8, 256), (64, 256), (256, 160)):
        rate = generating(network, batch, tokens)
        share = rate / batch * weights * 2 / results["limits"]["copy_bytes"]
        out[str(batch)] = {"tokens_per_second": rate, "memory_share": share}
        print(f"  decode, batch {batch}: {rate:.0f} tok/s, weights read at {share:.1%} of the copy's speed", flush=True)
    out["filtered"] = generating(network, 64, 128, sampling={"temperature": 1.0, "top_k": 50, "top_p": 0.9})
    for tile in ((4, 256, 1), (8, 256, 1), (4, 512, 2)):  # how else the products of a row could be cut
        layers.ROW, kept = tile, layers.ROW
        out[f"row {tile}"] = generating(network, 1, 128)
        layers.ROW = kept
        print(f"  batch 1 by tiles {tile}: {out[f'row {tile}']:.0f} tok/s", flush=True)
    print(f"  batch 64 with top_k and top_p: {out['filtered']:.0f} tok/s", flush=True)
    if asked.gpt_fast:
        del network
        free()
        out["gpt_fast"] = gpu_peers.gpt_fast(Path(asked.gpt_fast), DECODED)
        print(f"  gpt-fast, batch 1: {out['gpt_fast']['tokens_per_second']:.0f} tok/s", flush=True)
    return out


def packed_network(shape: tuple[int, ...], bits: int, device: str = "cuda") -> Any:
    """A decoder of random packed projections, in groups of 32; embedding and norms in bf16."""
    torch = torch_()
    from craton.model.decoder import Linear
    from craton.model.grouped import GroupedMatrix
    from craton.model.packed import PackedLinear, replace

    network = decoder(shape, device).to(torch.bfloat16).requires_grad_(False)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Linear):
            rows, cols = layer.weight.shape
            words = torch.randint(-(2**31), 2**31, (rows, cols // 32, bits), dtype=torch.int32, device=device)
            factor = 4.0 * cols**-0.5 / 2**bits  # spread evenly over about a width of 1 / sqrt(cols)
            pair = torch.tensor([factor, -factor * 2 ** (bits - 1)], device=device).half().view(torch.int32)
            matrix = GroupedMatrix(words, pair.expand(rows, cols // 32).contiguous(), bits, 32)
            replace(network, name, PackedLinear(matrix))
    return network


def packed() -> dict[str, Any]:
    """Decoding with weights of 4 and of 8 bits."""
    out: dict[str, Any] = {}
    for bits in (4, 8):
        free()
        network = packed_network(DECODED, bits)
        for batch in (1, 8, 64):
            rate = generating(network, batch, 160)
            out[f"{bits} bits, {batch}"] = rate
            print(f"  {bits} bits, batch {batch}: {rate:.0f} tok/s", flush=True)
        del network
    return out


def adapters() -> dict[str, Any]:
    """40 adapters of rank 8 beside a model, an answer of each at a time, against as many answers of the base."""
    torch = torch_()
    from craton.model.lora import LowRank, shape_of, targets_of

    free()
    network = decoder(DECODED, "cuda").to(torch.bfloat16).requires_grad_(False)
    parts = []
    for i in range(40):
        g = torch.Generator().manual_seed(i)
        parts.append({})
        for name in targets_of(network, ()):
            rows, cols = shape_of(network.get_submodule(name))
            low = torch.randn(8, cols, generator=g) * cols**-0.5, 0.02 * torch.randn(rows, 8, generator=g)
            parts[-1][name] = LowRank(*low, 2.0)
    base, own = generating(network, 40, 96), generating(network, 40, 96, adapters=parts)
    return {"base": base, "adapters": own, "ratio": own / base}


def served() -> dict[str, Any]:
    """A folder behind `craton serve`: the first token of a request alone, and an answer in a schema."""
    torch = torch_()
    from craton.text.tokenizer import train_tokenizer
    from craton.weights.folder import write_network

    free()
    texts = [p.read_text(errors="ignore") for p in sorted((ROOT / "craton").rglob("*.py"))]
    tokenizer = train_tokenizer(texts, 8192)
    shape = (*DECODED[:5], -(-tokenizer.vocab_size // 16) * 16, DECODED[6])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "m"
        write_network(folder, decoder(shape, "cuda").to(torch.bfloat16).cpu())
        tokenizer.save(folder)
        free()
        port = random.randrange(20_000, 60_000)
        command = [sys.executable, "-m", "craton", "serve", f"m={folder}", "--port", str(port)]
        with open(Path(asked.out) / "serve.log", "wb") as log:
            began = time.perf_counter()
            server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while _request(port, "GET", "/ready")[0] != 200:
                if server.poll() is not None or time.perf_counter() - began > 90:
                    raise RuntimeError("the server did not start; see serve.log")
                time.sleep(0.1)
            started = time.perf_counter() - began
            firsts = []
            for i in range(24):
                prompt = f"{i} " + "def run(self, value): return value\n" * 20
                ask = {"model": "m", "prompt": prompt, "max_tokens": 16, "stream": True, "ignore_eos": True}
                status, first, _ = _request(port, "POST", "/v1/completions", ask)
                assert status == 200, status
                firsts.append(first)
            schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
            form = {"json": schema}
            ask = {"model": "m", "prompt": "x", "max_tokens": 100, "temperature": 0, "structured_outputs": form}
            text = json.loads(_request(port, "POST", "/v1/completions", ask)[2])["choices"][0]["text"]
            assert isinstance(json.loads(text)["a"], int), text
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
    return {"first_token_ms": 1e3 * statistics.median(firsts[4:]), "started_seconds": started, "structured": text}


def _request(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, float, bytes]:
    """Status, seconds until the first line of the answer's body, and all of it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    began = time.perf_counter()
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        first = answer.readline()
        return answer.status, time.perf_counter() - began, first + answer.read()
    except OSError:
        return 0, 0.0, b""
    finally:
        connection.close()


def prefill() -> dict[str, Any]:
    torch = torch_()
    from craton.engine.engine import Engine
    from craton.engine.request import Sampling

    free()
    network = decoder(DECODED, "cuda").to(torch.bfloat16).requires_grad_(False)
    engine = Engine(network, step_tokens=8192, cache_bytes=8 << 30, share_prefixes=False)
    out = {}
    for batch in (1, 8):
        prompts = torch.randint(3, 30000, (batch, 1500)).tolist()
        seconds = median_seconds(lambda p=prompts: engine.generate(p, Sampling(1, 0.0)), 5, 2)
        out[f"{batch}x1500"] = batch * 1500 / seconds
        print(f"  prefill {batch} x 1500: {batch * 1500 / seconds / 1e3:.0f}k tok/s", flush=True)
    return out


def sampling() -> dict[str, Any]:
    """Of 64 rows of 128k logits: by temperature, and by top_k and top_p too."""
    torch = torch_()
    from craton.model.gpu.choose import choose_tokens

    logits = torch.randn(64, 131_072, device="cuda").bfloat16()
    one = torch.ones(64, device="cuda")
    u = torch.rand(64, device="cuda", dtype=torch.float64)
    tokens, scores = torch.empty(64, dtype=torch.int64, device="cuda"), torch.empty(64, device="cuda")
    none = torch.zeros(64, device="cuda", dtype=torch.float64)
    out = {}
    for name, filters in (("microseconds", None), ("filtered_microseconds", (none + 40, none + 0.95))):
        work = lambda f=filters: choose_tokens(logits, one, none, u, tokens, scores, f)  # noqa: E731
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        out[name] = 1e6 * median_seconds(lambda g=graph: [g.replay() for _ in range(20)], 5, 2) / 20
    return out


def rollouts() -> dict[str, Any]:
    """Answers of a network that is trained, in fp32, as reinforcement asks for them."""
    torch = torch_()
    free()
    hidden, layers, heads, kv, ffn, vocabulary = TRAINED["105M"][:6]
    network = decoder((hidden, layers, heads, kv, ffn, vocabulary, 1024), "cuda")
    rate = generating(network, 256, 128, dtype=torch.bfloat16)
    return {"tokens_per_second": rate}


def kernels() -> dict[str, Any]:
    """Where the time of one decoding step goes, and of a prompt of 1,500 tokens."""
    torch = torch_()
    from craton.engine.engine import Engine
    from craton.engine.request import Sampling

    free()
    network = decoder(DECODED, "cuda").to(torch.bfloat16).requires_grad_(False)
    engine = Engine(network, step_tokens=8192, cache_bytes=8 << 30, share_prefixes=False)
    out: dict[str, Any] = {}
    for name, prompts, tokens in (("decode", [[5] * 32], 17), ("prefill", [list(range(5, 1505))], 1)):
        ask = lambda p=prompts, n=tokens: engine.generate(p, Sampling(n, 0.0, ignore_eos=True))  # noqa: E731
        ask(), ask()
        with torch.profiler.profile() as profile:
            ask()
        events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
        out[name] = {e.key[:60]: [e.count, round(e.self_device_time_total)] for e in events[:12]}
        print(name, *(f"{v[1]:>7} us {v[0]:>5} x {k}" for k, v in out[name].items()), sep="\n  ", flush=True)
    return out


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "logits": check_logits, "loss": check_training, "tests": check_tests, "decode": decode, "packed": packed,
    "prefill": prefill, "sampling": sampling, "rollouts": rollouts, "served": served, "train": train,
    "train_peers": train_peers, "memory": memory, "adapters": adapters, "kernels": kernels,
}  # fmt: skip


def table() -> str:
    """What was asked of each, and what it is."""
    r = results

    def number(*keys: str) -> float:
        found: Any = r
        for key in keys:
            found = found.get(key, {}) if isinstance(found, dict) else {}
        return found if isinstance(found, int | float) else math.nan

    one, sampled = number("decode", "1", "tokens_per_second"), number("sampling", "microseconds")
    step = 1e6 * 64 / number("decode", "64", "tokens_per_second")
    peer = number("train_peers", "transformers", "tokens_per_second")
    rows = [(f"train {n}, share of the peak", number("train", n, "peak_share"), f">= {w}") for n, w in SHARES.items()]
    rows += [
        ("train 105M / transformers compiled", number("train", "105M", "tokens_per_second") / peer, ">= 1.3"),
        ("memory 1.1B / transformers'", number("memory", "craton") / number("memory", "transformers"), "<= 1"),
        ("decode, batch 1, tok/s", one, ">= 1000"),
        ("decode, batch 64, tok/s", number("decode", "64", "tokens_per_second"), ">= 20000"),
        ("decode, batch 256, tok/s", number("decode", "256", "tokens_per_second"), ">= 50000"),
        ("4 bits / bf16, batch 1", number("packed", "4 bits, 1") / one, ">= 1.6"),
        ("prefill 8 x 1500, tok/s", number("prefill", "8x1500"), ">= 150000"),
        ("first token of a served request, ms", number("served", "first_token_ms"), "< 50"),
        ("sampling 64 x 131072, share of a step", sampled / (step + sampled), "< 0.05"),
        ("rollouts of a 105M network, tok/s", number("rollouts", "tokens_per_second"), ">= 20000"),
    ]
    lines = []
    for name, value, wanted in rows:
        relation, bound = wanted.split()
        holds = value >= float(bound) if ">" in relation else value <= float(bound)
        said = "not measured" if math.isnan(value) else f"{value:.4g} {'' if holds else '  <-- NOT'}"
        lines.append(f"{name:<40} {wanted:>9}   {said}")
    return "\n".join(lines)


def main() -> int:
    global asked
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".")
    parser.add_argument("--only", default="")
    parser.add_argument("--gpt-fast", default="")
    parser.add_argument("--nanochat", default="")
    parser.add_argument("--wheels", action="store_true")
    asked = parser.parse_args()
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if asked.wheels or missing:
        print("missing here:", " ".join(missing) or "nothing", flush=True)
        if asked.wheels:
            return 0
    torch = torch_()
    began, failed = time.perf_counter(), []
    Path(asked.out).mkdir(parents=True, exist_ok=True)
    results["machine"] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results["limits"] = limits()
    print(json.dumps(results), flush=True)
    for name in [n for n in PARTS if not asked.only or n in asked.only.split(",")]:
        start = time.perf_counter()
        if start - began + EXPECTED.get(name, 30) > MOST_SECONDS:
            print(f"{name}: left out, {start - began:.0f} s are over", flush=True)
            continue
        try:
            results[name] = PARTS[name]()
        except Exception:
            traceback.print_exc(limit=-6)
            failed.append(name)
            results[name] = {"failed": traceback.format_exc(limit=-3)}
        results[name]["seconds"] = time.perf_counter() - start
        print(name, json.dumps(results[name])[:1500], flush=True)
        Path(asked.out, "gpu.json").write_text(json.dumps(results, indent=1))
    print(table(), f"{time.perf_counter() - began:.0f} s; failed: {', '.join(failed) or 'none'}", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
