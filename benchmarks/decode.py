"""Tokens a second of the engine beside llama.cpp: the same weights in the same bits, the same threads, in turns.

    python benchmarks/decode.py [--models 44M,1.1B] [--bits 8,4] [--rounds 5] [--json FILE]
    python benchmarks/decode.py --file FILE.gguf ...                a published file
    python benchmarks/decode.py --transformers [--models 44M]      fp32, beside transformers' generate

Random weights in Llama's shape, or a file. Each program is a process of its own that waits for its turn; the figure is
the median over the rounds. Read bandwidth is measured in the same run, between the rounds. For llama.cpp: pip install
llama-cpp-python (builds from source), or make bench-env.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "44M": dict(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "1.1B": dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
    ),
}
CASES = [
    ("batch 1", 1, 0),
    ("batch 8", 8, 0),
    ("prefill 128", 1, 128),
    ("prefill 512", 1, 512),
]  # name, sequences, prompt
CONTEXT, STEPS = 64, 48  # tokens before decoding, decoding steps that are timed
PEERS = {"transformers": "transformers", "llama.cpp": "llama_cpp"}


def build(name: str, bits: int, folder: Path) -> int:
    """A folder of random weights, packed unless bits is 32, and its GGUF; bytes that one decoding step reads."""
    import torch
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from craton.model.config import ModelConfig
    from craton.model.decoder import Decoder
    from craton.text.tokenizer import Tokenizer
    from craton.weights import gguf_write, stored
    from craton.weights.folder import write_config, write_shards
    from craton.weights.quantize import packable

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig(**SHAPES[name], qk_norm="", model_type="llama", max_position_embeddings=2048)
    with torch.device("meta"):
        network = Decoder(config)
    words = [f"<0x{b:02X}>" for b in range(256)]
    vocab = {w: i for i, w in enumerate([*words, *(chr(0x4E00 + i) for i in range(config.vocab_size - 256))])}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.Metaspace(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    )
    tokenizer = Tokenizer(backend, {})
    tokenizer.save(folder)
    layers = packable(network) if bits != 32 else {}
    widths = {n: 8 if n == "lm_head" else bits for n in layers}
    packed = {}
    for n, layer in layers.items():
        rows, cols = layer.weight.shape
        values = torch.randint(0, 256, (rows, cols * widths[n] // 8), dtype=torch.uint8, generator=generator)
        packed[n] = values, torch.full((rows, cols // 32), 0.02 / (4 if widths[n] == 4 else 64)).half(), widths[n]
    plain = {
        n: torch.randn(p.shape, generator=generator) * 0.02 if p.ndim > 1 else torch.ones(p.shape)
        for n, p in network.state_dict().items()
        if n.removesuffix(".weight") not in layers
    }

    def tensors():
        yield from plain.items()
        for n, (values, scales, _) in packed.items():
            yield f"{n}.weight_packed", values.view(torch.int32)
            yield f"{n}.weight_scale", scales
            yield f"{n}.weight_shape", torch.tensor(list(layers[n].weight.shape))

    write_shards(folder, tensors(), 0)
    write_config(folder, config, "float32", stored.describe(widths, []) if packed else None)
    from craton.weights.folder import load_network

    gguf_write.write(folder / "m.gguf", load_network(folder), tokenizer, name, "f32", packed)
    embedding = plain["model.embed_tokens.weight"].nbytes
    return sum(v.nbytes + s.nbytes for v, s, _ in packed.values()) + sum(p.nbytes for p in plain.values()) - embedding


def ours(folder: str) -> None:
    import torch

    from craton.engine.engine import Engine
    from craton.engine.request import Sampling

    torch.set_num_threads(2)
    engine = Engine(network_of(Path(folder)), cache_bytes=1 << 30, share_prefixes=False)

    def prompt(n: int, salt: int) -> list[int]:
        return [(i * 7919 + salt * 104729) % 31000 + 300 for i in range(n)]

    def run(sequences: int, prefill: int) -> float:
        if prefill:
            began = time.perf_counter()
            for i in range(3):
                engine.generate([prompt(prefill, i)], Sampling(1, 0.0))
            return 3 * prefill / (time.perf_counter() - began)
        for s in range(sequences):
            engine.add(prompt(CONTEXT, s), Sampling(STEPS + 1, 0.0, ignore_eos=True))
        while any(len(s.completion.token_ids) == 0 for r in engine.requests.values() for s in r):
            engine.step()
        began, tokens = time.perf_counter(), 0
        while engine.busy:
            tokens += sum(len(e.token_ids) for e in engine.step())
        return tokens / (time.perf_counter() - began)

    serve(run)


def network_of(path: Path):
    from craton.weights import gguf
    from craton.weights.folder import load_network

    return gguf.read(path)[0] if path.suffix == ".gguf" else load_network(path)


def theirs(folder: str) -> None:
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    silent = lib.llama_log_callback(lambda *_: None)  # kept: it is called as long as the process lives
    lib.llama_log_set(silent, None)
    parameters = lib.llama_model_default_params()
    path = folder if folder.endswith(".gguf") else f"{folder}/m.gguf"
    model = lib.llama_model_load_from_file(path.encode(), parameters)
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_threads, options.n_threads_batch, options.n_seq_max = (
        8192,
        512,
        512,
        2,
        2,
        8,
    )
    context = lib.llama_init_from_model(model, options)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(512, 0, 1)

    def feed(rows: list[tuple[int, int, int, bool]]) -> None:  # token, position, sequence, logits
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, want) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, want
            batch.seq_id[i][0] = sequence
        assert lib.llama_decode(context, batch) == 0

    def run(sequences: int, prefill: int) -> float:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        if prefill:
            began = time.perf_counter()
            for s in range(3):
                feed([((i * 7919 + s * 104729) % 31000 + 300, i, s, i == prefill - 1) for i in range(prefill)])
                int(np.argmax(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, prefill - 1), (size,))))
            return 3 * prefill / (time.perf_counter() - began)
        for s in range(sequences):
            feed([((i * 7919 + s * 104729) % 31000 + 300, i, s, i == CONTEXT - 1) for i in range(CONTEXT)])
        tokens = [5] * sequences
        began = time.perf_counter()
        for step in range(STEPS):
            feed([(tokens[s], CONTEXT + step, s, True) for s in range(sequences)])
            tokens = [
                int(np.argmax(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, s), (size,))))
                for s in range(sequences)
            ]
        return sequences * STEPS / (time.perf_counter() - began)

    serve(run)


def transformers(folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def run(sequences: int, prefill: int) -> float:
        assert prefill == 0
        r = __import__("random").Random(sequences)
        lengths = (
            [(r.randrange(16, 128), r.randrange(16, 64)) for _ in range(sequences)]
            if sequences > 1
            else [(CONTEXT, STEPS)]
        )
        width = max(n for n, _ in lengths)  # prompts are padded on the left, all run as long as the longest answer
        ids, mask = torch.zeros(sequences, width, dtype=torch.long), torch.zeros(sequences, width, dtype=torch.long)
        for row, (n, _) in enumerate(lengths):
            ids[row, width - n :], mask[row, width - n :] = torch.arange(300, 300 + n), 1
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(m for _, m in lengths),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return sum(m for _, m in lengths) / (time.perf_counter() - began)

    serve(run)


def ours_whole(folder: str) -> None:
    """The same requests as `transformers`, prompts included."""
    import torch

    from craton.engine.engine import Engine
    from craton.engine.request import Sampling
    from craton.weights.folder import load_network

    torch.set_num_threads(2)
    engine = Engine(load_network(Path(folder)), cache_bytes=1 << 30, share_prefixes=False)

    def run(sequences: int, prefill: int) -> float:
        r = __import__("random").Random(sequences)
        lengths = (
            [(r.randrange(16, 128), r.randrange(16, 64)) for _ in range(sequences)]
            if sequences > 1
            else [(CONTEXT, STEPS)]
        )
        began = time.perf_counter()
        engine.generate(
            [list(range(300, 300 + n)) for n, _ in lengths], [Sampling(m, 0.0, ignore_eos=True) for _, m in lengths]
        )
        return sum(m for _, m in lengths) / (time.perf_counter() - began)

    serve(run)


def serve(run) -> None:
    """Answer cases on stdin with tokens a second on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        sequences, prefill = map(int, line.split())
        print(run(sequences, prefill), file=out, flush=True)


class Worker:
    def __init__(self, role: str, folder: Path, python: str):
        self.process = subprocess.Popen(
            [python, __file__, "--role", role, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, sequences: int, prefill: int) -> float:
        assert self.process.stdin and self.process.stdout
        print(sequences, prefill, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def bandwidth(buffer) -> float:
    """GB/s of reading 1 GiB on two threads, the best of three."""
    import torch

    words = buffer.view(torch.int64)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        words.sum()
        best = max(best, buffer.numel() / (time.perf_counter() - began) / 1e9)
    return best


def first_token(folder: Path) -> float:
    """Seconds from starting a process to its first token."""
    code = (
        "import sys, craton; m = craton.load(sys.argv[1]); "
        "next(m.engine.stream([300, 301, 302])); print('x', flush=True)"
    )
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    process.stdout.read(1)
    took = time.perf_counter() - began
    process.wait()
    return took


def compare(a: argparse.Namespace, name: str, bits: int | str, folder: Path, size: int, buffer) -> list[dict]:
    """The cases of one model, ours and the peer's in turns. size: bytes that one decoding step reads."""
    results = []
    start = first_token(folder) if not a.transformers else None
    roles = ("ours_whole", "transformers") if a.transformers else ("ours", "theirs")
    us, peer = Worker(roles[0], folder, sys.executable), Worker(roles[1], folder, a.peer_python)
    print(
        f"{name}, {bits} bits, {size / 1e9:.3f} GB a step" + (f", first token after {start:.1f} s" if start else ""),
        flush=True,
    )
    for case, sequences, prefill in (
        [("batch 1", 1, 0), ("32 requests of mixed lengths", 32, 0)] if a.transformers else CASES
    ):
        rows, reads = {"ours": [], "peer": []}, []
        for i in range(a.rounds + 1):
            pair = [us(sequences, prefill), peer(sequences, prefill)]
            reads.append(bandwidth(buffer))
            if i:  # the first warms up
                rows["ours"].append(pair[0])
                rows["peer"].append(pair[1])
        mine, other, read = (statistics.median(v) for v in (rows["ours"], rows["peer"], reads))
        steps = mine / sequences if not prefill else None
        row = {
            "model": name,
            "bits": bits,
            "case": case,
            "ours_tokens_per_second": mine,
            "peer_tokens_per_second": other,
            "ratio": mine / other,
            "read_gb_per_second": read,
            "bytes_per_step": size,
            "peer": "transformers" if a.transformers else "llama.cpp",
            "first_token_seconds": start,
            "rounds": rows,
        }
        if steps and not a.transformers:
            row |= {"gb_per_second": steps * size / 1e9, "share_of_read_bandwidth": steps * size / 1e9 / read}
        results.append(row)
        tail = (
            f"   {row['gb_per_second']:5.1f} GB/s = {row['share_of_read_bandwidth']:.0%} of {read:.1f}"
            if "gb_per_second" in row
            else ""
        )
        print(
            f"  {case:<30}{mine:9.1f} tok/s   {row['peer']} {other:9.1f}   ratio {mine / other:5.2f}{tail}", flush=True
        )
    us.close()
    peer.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="44M,1.1B")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--file", nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable, help="of the environment that has the peer")
    parser.add_argument("--json")
    parser.add_argument("--role")
    parser.add_argument("--folder")
    a = parser.parse_args()
    if a.role:
        {"ours": ours, "theirs": theirs, "transformers": transformers, "ours_whole": ours_whole}[a.role](a.folder)
        return
    import torch

    buffer = torch.zeros(1 << 30, dtype=torch.uint8)
    results = []
    for path in a.file:
        results += compare(a, Path(path).name, "file", Path(path), os.path.getsize(path), buffer)
    for name in a.models.split(",") if not a.file else ():
        for bits in [32] if a.transformers else map(int, a.bits.split(",")):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "m"
                size = build(name, bits, folder)
                results += compare(a, name, bits, folder, size, buffer)
    if a.json:
        from craton.train import machine

        Path(a.json).write_text(json.dumps({"environment": machine.facts("cpu"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
