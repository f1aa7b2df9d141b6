"""`craton inspect`: what a model is made of and what it needs, and one page on what it computes for a prompt."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import torch

from craton.base import UserError, amount, count, say, write_text
from craton.engine.model import Model, single_file
from craton.model import modes
from craton.model.cache import bytes_per_token
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.report.pages import filled
from craton.weights.folder import read_config

MOST_TOKENS = 64  # on the page
PARTS = {  # what a parameter's name says of it, the first that fits
    "embed_tokens": "embedding",
    "lm_head": "head",
    ".self_attn.": "attention",
    ".mlp.gate.": "routers",
    ".experts.": "experts",
    "shared_experts": "shared experts",
    ".mlp.": "mlp",
}


def parts(config: ModelConfig) -> dict[str, int]:
    """Parameters by what they do."""
    with torch.device("meta"):
        network = Decoder(config)
    out: dict[str, int] = {}
    for name, p in network.named_parameters():
        key = next((part for piece, part in PARTS.items() if piece in name), "norms")
        out[key] = out.get(key, 0) + p.numel()
    return out


def meaning(config: ModelConfig) -> list[str]:
    """The configuration in words."""
    c, out = config, []
    n, heads, kv = c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads
    out.append(f"{n} layers of {c.hidden_size}, vocabulary {c.vocab_size}, context {c.max_position_embeddings} tokens")
    if c.kv_lora_rank:
        out.append(
            f"multi-head latent attention: {heads} heads read one compressed vector of {c.cache_dims[1]} a token"
        )
    elif kv < heads:
        out.append(f"grouped-query attention: {heads} query heads share {kv} key-value heads of {c.head_dim}")
    else:
        out.append(f"attention with {heads} heads of {c.head_dim}")
    windows = [c.window(i) for i in range(n)]
    if any(windows):
        seen = sum(w is not None for w in windows)
        out.append(f"{seen} of {n} layers see only the last {c.sliding_window} tokens")
    positions = f"rotary positions, theta {c.rope_theta:g}"
    if c.rope_scaling:
        positions += f", stretched {c.rope_scaling['factor']:g} times ({c.rope_scaling['rope_type']})"
    if c.no_rope_layers:
        positions += f", none in {c.no_rope_layers.count(0)} layers"
    out.append(positions)
    if c.num_experts:
        shared = f" and a shared MLP of {c.shared_intermediate_size}" if c.shared_intermediate_size else ""
        chosen = f"{c.num_experts_per_tok} of {c.num_experts} of size {c.moe_intermediate_size}"
        out.append(f"experts: each token goes to {chosen}{shared}; dense in {len(c.dense_layers)} layers")
    else:
        out.append(f"gated MLP of {c.intermediate_size} ({c.hidden_act})")
    half = "each half of a block"
    norms = {"pre": f"before {half}", "post": "on each half's output", "both": f"before and after {half}"}
    out.append(f"RMSNorm {norms[c.norm_placement]}" + (f", and on q and k ({c.qk_norm})" if c.qk_norm else ""))
    out.append("the head is the embedding" if c.tie_word_embeddings else "the head has its own matrix")
    return out


def _described(folder: Path) -> tuple[ModelConfig, int]:
    """The configuration of a folder or a GGUF file, and the bytes of its weights."""
    path = single_file(folder)
    if path.suffix == ".gguf":
        from craton.weights import gguf  # its package takes half a second to import

        return gguf.config_of(path)
    return read_config(folder), sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def inspect(folder: Path, context: int | None, batch: int) -> dict[str, Any]:
    """Prints and returns the facts; needs a GGUF file or config.json alone. UserError for a context or batch that makes
    no sense."""
    config, stored = _described(folder)
    most = config.max_position_embeddings
    context = min(most, 4096) if context is None else context
    if not 1 <= context <= most or batch < 1:
        raise UserError(f"--context is {context} and --batch {batch}; the model's context is {most}")
    by_part, each = parts(config), bytes_per_token(config)
    total = sum(by_part.values())
    weights = {"fp32": 4 * total, "bf16": 2 * total, "8 bits": total * 17 // 16, "4 bits": total * 9 // 16}
    cache = each * context * batch
    active = config.matrix_parameters
    some = f", {count(active)} active a token" if config.num_experts else ""
    say(f"{folder}: {config.model_type}, {total:,} parameters ({count(total)}){some}\n")
    for line in meaning(config):
        say(f"  {line}")
    say("\n  parameters")
    for name, n in sorted(by_part.items(), key=lambda kv: -kv[1]):
        say(f"    {name:<16}{n:>20,}  {n / total:6.1%}")
    say(f"\n  cache           {amount(each, 'B')} a token in fp32, {amount(each / 2, 'B')} in 16 bits")
    say(f"  memory for {batch} x {context} tokens (weights + fp32 cache of {amount(cache, 'B')}):")
    say("    " + ", ".join(f"{k} {amount(v + cache, 'B')}" for k, v in weights.items()))
    say(f"  arithmetic      {amount(config.flops_per_token(context) / 3, 'FLOP')} a token at a context of {context}")
    if stored:
        say(f"  on disk         {amount(stored, 'B')} of weights")
    facts: dict[str, Any] = {"model_type": config.model_type, "parameters": total, "active_parameters": active}
    facts |= {"parts": by_part, "cache_bytes_per_token": each, "context": context, "batch": batch, "cache_bytes": cache}
    return facts | {"weight_bytes": weights, "stored_bytes": stored, "meaning": meaning(config)}


@torch.no_grad()
def observe(model: Model, prompt: str) -> dict[str, Any]:
    """What the network computes for a prompt: probabilities, attention, and what each layer would answer if it were the
    last (logit lens, nostalgebraist 2020). UserError if the prompt is empty or too long for one page."""
    network, ids = model.network.float(), model.tokenizer.encode(prompt)
    if not 2 <= len(ids) <= MOST_TOKENS:
        raise UserError(f"--prompt has {len(ids)} tokens; a page shows from 2 to {MOST_TOKENS}")
    layers: list[torch.Tensor] = []
    maps: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, out: layers.append(out[0] + out[1])) for b in network.model.layers]
    try:
        with modes.observing(lambda p: maps.append(p[0])):
            logits = network(torch.tensor([ids]))[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    logp = logits.log_softmax(-1)
    p = logp.exp()
    word = [model.tokenizer.backend.decode([i], skip_special_tokens=False) for i in range(model.tokenizer.vocab_size)]
    word += [f"[{i}]" for i in range(len(word), network.config.vocab_size)]
    top = p.topk(min(8, p.shape[-1]), -1)
    lens = []
    for x in layers:
        best = network.head(network.model.norm(x))[0].softmax(-1).max(-1)
        lens.append([[word[i], round(v, 4)] for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)])
    return {
        "tokens": [word[i] for i in ids],
        "probability": [None] + [round(float(p[t, ids[t + 1]]), 5) for t in range(len(ids) - 1)],
        "entropy": [round(float(-(p[t] * logp[t].clamp_min(-1e4)).sum()) / math.log(2), 3) for t in range(len(ids))],
        "top": [
            [[word[i], round(v, 4)] for i, v in zip(row_i, row_v, strict=True)]
            for row_i, row_v in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
        "lens": lens,
        "heads": maps[0].shape[0] if maps else 0,
        "attention": [base64.b64encode((m * 255).round().to(torch.uint8).numpy().tobytes()).decode() for m in maps],
    }


def write_page(path: Path, title: str, seen: dict[str, Any]) -> None:
    data = json.dumps(seen, ensure_ascii=False).replace("</", "<\\/").replace("<!--", "\\u003c!--")
    write_text(path, filled("inspect", title=title, data=data))
