"""Peers of gpu.py: transformers, and gpt-fast's and nanochat's own code from folders that are given. Their own
configurations, as near to ours as they allow, with random weights."""

import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Shape = tuple[int, ...]


def matrices(shape: Shape) -> int:
    """Parameters that a token is multiplied with, of a Llama of this shape, with its head."""
    hidden, layers, heads, kv, ffn, vocabulary = shape[:6]
    return layers * hidden * (2 * hidden + 2 * kv * hidden // heads + 3 * ffn) + vocabulary * hidden


def transformers_step(shape: Shape, micro: int, compiled: bool, checkpointing: bool) -> Callable[[], None]:
    """A whole step of transformers' Llama in bf16 autocast with fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv, ffn, vocabulary, length, tokens = shape
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=length, attn_implementation="sdpa",
        use_cache=False,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    run = torch.compile(model) if compiled else model
    pieces = tokens // micro

    def step() -> None:
        for _ in range(pieces):
            ids = torch.randint(vocabulary, (micro // length, length), device="cuda")
            with torch.autocast("cuda", torch.bfloat16):
                loss = run(input_ids=ids, labels=ids).loss
            (loss / pieces).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _from(folder: Path, name: str) -> Any:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def gpt_fast(folder: Path, shape: Shape, tokens: int = 200, device: str = "cuda") -> dict[str, float]:
    """Tokens a second of one answer, by its compiled decode_one_token."""
    sys.modules["tokenizer"] = types.ModuleType("tokenizer")  # needs packages, and is not used here
    sys.modules["tokenizer"].get_tokenizer = None  # type: ignore[attr-defined]
    generate, model_file = _from(folder, "generate"), _from(folder, "model")
    hidden, layers, heads, kv, ffn, vocabulary, context = shape[:7]
    with torch.device(device):
        args = model_file.ModelArgs(context, vocabulary, layers, heads, hidden, ffn, kv)
        model = model_file.Transformer(args).to(torch.bfloat16).eval()
        model.setup_caches(1, 512)
    generate.decode_one_token = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
    cur, seconds = torch.ones(1, 1, dtype=torch.int, device=device), 0.0
    with torch.inference_mode():
        for _ in range(3):  # the first compiles, the second captures
            at = torch.full((1,), 32, device=device, dtype=torch.int)
            _wait(device)
            start = time.perf_counter()
            generate.decode_n_tokens(model, cur.clone(), at, tokens, temperature=0.8, top_k=200)
            _wait(device)
            seconds = time.perf_counter() - start
    return {"tokens_per_second": tokens / seconds}


def nanochat(folder: Path, depth: int, micro: int, tokens: int, device: str = "cuda") -> dict[str, float]:
    """Tokens a second of whole training steps with its optimizer, and 6 FLOPs a token and matrix parameter a second."""
    gpt = _from(folder, "nanochat.gpt")
    length = 1024
    config = gpt.GPTConfig(length, 32768, depth, depth * 64 // 128, depth * 64 // 128, depth * 64, "L")
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    count = sum(p.numel() for p in model.transformer.h.parameters()) + model.lm_head.weight.numel()
    optimizer, run, pieces = model.setup_optimizer(), torch.compile(model, dynamic=False), max(1, tokens // micro)
    seconds = 0.0
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        for _ in range(pieces):
            ids = torch.randint(config.vocab_size, (micro // length, length + 1), device=device)
            (run(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) / pieces).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        _wait(device)
        seconds = time.perf_counter() - start
    rate = pieces * micro / seconds
    return {"tokens_per_second": rate, "flops": 6 * count * rate, "matrices": count}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
