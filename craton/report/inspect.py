"""`craton inspect`: what a model is made of and what it needs, and one page on what it computes for a prompt."""

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

import torch

from craton.base import UserError, count, say, write_text
from craton.engine.model import Model
from craton.model import ops
from craton.model.cache import bytes_per_token
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.weights.folder import read_config

MOST_TOKENS = 64  # on the page


def parts(config: ModelConfig) -> dict[str, int]:
    """Parameters by what they do."""
    with torch.device("meta"):
        network = Decoder(config)
    out: dict[str, int] = {}
    for name, p in network.named_parameters():
        key = ("embedding" if "embed_tokens" in name else "head" if "lm_head" in name else "attention" if ".self_attn." in name
               else "routers" if ".mlp.gate." in name else "experts" if ".experts." in name else "shared experts" if "shared_experts" in name
               else "mlp" if ".mlp." in name else "norms")  # fmt: skip
        out[key] = out.get(key, 0) + p.numel()
    return out


def meaning(config: ModelConfig) -> list[str]:
    """The configuration in words."""
    c, out = config, []
    out.append(f"{c.num_hidden_layers} layers of {c.hidden_size}, vocabulary {c.vocab_size}, context {c.max_position_embeddings} tokens")
    if c.kv_lora_rank:
        out.append(f"multi-head latent attention: {c.num_attention_heads} heads read one compressed vector of {c.cache_dims[1]} a token")
    elif c.num_key_value_heads < c.num_attention_heads:
        out.append(f"grouped-query attention: {c.num_attention_heads} query heads share {c.num_key_value_heads} key-value heads of {c.head_dim}")
    else:
        out.append(f"attention with {c.num_attention_heads} heads of {c.head_dim}")
    windows = [c.window(i) for i in range(c.num_hidden_layers)]
    if any(windows):
        out.append(f"{sum(w is not None for w in windows)} of {c.num_hidden_layers} layers see only the last {c.sliding_window} tokens")
    positions = f"rotary positions, theta {c.rope_theta:g}"
    if c.rope_scaling:
        positions += f", stretched {c.rope_scaling['factor']:g} times ({c.rope_scaling['rope_type']})"
    if c.no_rope_layers:
        positions += f", none in {c.no_rope_layers.count(0)} layers"
    out.append(positions)
    if c.num_experts:
        shared = f" and a shared MLP of {c.shared_intermediate_size}" if c.shared_intermediate_size else ""
        out.append(f"experts: each token goes to {c.num_experts_per_tok} of {c.num_experts} of size {c.moe_intermediate_size}{shared}; dense in {len(c.dense_layers)} layers")
    else:
        out.append(f"gated MLP of {c.intermediate_size} ({c.hidden_act})")
    norms = {"pre": "before each half of a block", "post": "on each half's output", "both": "before and after each half of a block"}[c.norm_placement]
    out.append(f"RMSNorm {norms}" + (f", and on q and k ({c.qk_norm})" if c.qk_norm else ""))
    out.append("the head is the embedding" if c.tie_word_embeddings else "the head has its own matrix")
    return out


def inspect(folder: Path, context: int | None, batch: int) -> dict[str, Any]:
    """Prints and returns the facts; needs config.json alone. UserError for a context or batch that makes no sense."""
    config = read_config(folder)
    context = min(config.max_position_embeddings, 4096) if context is None else context
    if not 1 <= context <= config.max_position_embeddings or batch < 1:
        raise UserError(f"--context is {context} and --batch {batch}; the model's context is {config.max_position_embeddings}")
    by_part, each = parts(config), bytes_per_token(config)
    total = sum(by_part.values())
    stored = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    weights = {"fp32": 4 * total, "bf16": 2 * total, "8 bits": total * 17 // 16, "4 bits": total * 9 // 16}
    cache = each * context * batch
    say(f"{folder}: {config.model_type}, {total:,} parameters ({count(total)}), {count(config.matrix_parameters)} active a token\n")
    for line in meaning(config):
        say(f"  {line}")
    say("\n  parameters")
    for name, n in sorted(by_part.items(), key=lambda kv: -kv[1]):
        say(f"    {name:<16}{n:>20,}  {n / total:6.1%}")
    say(f"\n  cache           {count(each)}B a token in fp32, {count(each / 2)}B in 16 bits")
    say(f"  memory for {batch} x {context} tokens (weights + fp32 cache of {count(cache)}B):")
    say("    " + ", ".join(f"{k} {count(v + cache)}B" for k, v in weights.items()))
    say(f"  arithmetic      {count(config.flops_per_token(context) / 3)}FLOP a token at {context} tokens of context")
    if stored:
        say(f"  on disk         {count(stored)}B of weights")
    return {
        "model_type": config.model_type, "parameters": total, "active_parameters": config.matrix_parameters, "parts": by_part,
        "cache_bytes_per_token": each, "context": context, "batch": batch, "cache_bytes": cache, "weight_bytes": weights, "stored_bytes": stored, "meaning": meaning(config),
    }  # fmt: skip


@torch.no_grad()
def observe(model: Model, prompt: str) -> dict[str, Any]:
    """What the network computes for a prompt: probabilities, attention, and what each layer would answer if it were the
    last (logit lens, nostalgebraist 2020). UserError if the prompt is empty or too long for one page."""
    network, ids = model.network.float(), model.tokenizer.encode(prompt)
    if not 2 <= len(ids) <= MOST_TOKENS:
        raise UserError(f"--prompt has {len(ids)} tokens; a page shows from 2 to {MOST_TOKENS}")
    layers: list[torch.Tensor] = []
    maps: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: layers.append(out[0] + out[1])) for block in network.model.layers]
    ops.observer = lambda p: maps.append(p[0])
    try:
        logits = network(torch.tensor([ids]))[0].float()
    finally:
        ops.observer = None
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
        "top": [[[word[i], round(v, 4)] for i, v in zip(row_i, row_v, strict=True)] for row_i, row_v in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
        "lens": lens,
        "heads": maps[0].shape[0] if maps else 0,
        "attention": [base64.b64encode((m * 255).round().to(torch.uint8).numpy().tobytes()).decode() for m in maps],
    }  # fmt: skip


def write_page(path: Path, title: str, seen: dict[str, Any]) -> None:
    data = json.dumps(seen, ensure_ascii=False).replace("</", "<\\/").replace("<!--", "\\u003c!--")
    write_text(path, _PAGE.replace("__TITLE__", html.escape(title)).replace("__DATA__", data))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>__TITLE__</title>
<style>
:root { color-scheme: light dark; --fg: #1c2430; --bg: #fbfbf9; --soft: #6b7480; --line: #dfe1dc; --card: #fff; --hue: 24, 95, 165; }
@media (prefers-color-scheme: dark) { :root { --fg: #e7e9ec; --bg: #14171b; --soft: #98a2ad; --line: #2c323a; --card: #1b1f25; --hue: 120, 180, 245; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2.5rem 0 .25rem; } p { color: var(--soft); margin: .2rem 0 .8rem; max-width: 46rem; }
.tokens { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; line-height: 2.2; }
.t { font: 15px ui-monospace, monospace; padding: .22em .1em; border-radius: 4px; white-space: pre-wrap; cursor: pointer; border: 0; color: inherit; background: none; }
.t[aria-pressed=true] { outline: 2px solid rgb(var(--hue)); }
.row { display: flex; flex-wrap: wrap; gap: 2rem; } .bars { min-width: 20rem; flex: 1; }
.bar { display: grid; grid-template-columns: 8rem 1fr 4rem; gap: .6rem; align-items: center; font: 14px ui-monospace, monospace; margin: .2rem 0; }
.bar span:first-child { white-space: pre; overflow: hidden; text-overflow: ellipsis; text-align: right; } .bar i { height: .8em; background: rgb(var(--hue)); border-radius: 3px; display: block; min-width: 1px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
table { border-collapse: collapse; font: 12px ui-monospace, monospace; } td, th { padding: .25rem .45rem; white-space: pre; border: 1px solid var(--line); max-width: 8rem; overflow: hidden; text-overflow: ellipsis; }
th { font-weight: 500; color: var(--soft); position: sticky; left: 0; background: var(--card); } select { font: inherit; padding: .2rem .5rem; margin-right: .75rem; }
canvas { image-rendering: pixelated; width: min(30rem, 90vw); height: auto; border: 1px solid var(--line); border-radius: 4px; background: var(--card); } .note { font-size: .85rem; color: var(--soft); min-height: 1.5em; }
svg text { fill: var(--soft); font: 11px system-ui; }
</style>
<h1>__TITLE__</h1><p>Choose a token to see what the model expected after it, what it attends to, and how the layers came to the answer.</p>
<h2>Probability of each token</h2><p>The darker, the less the model expected it. The first token has nothing before it.</p><div class="tokens" id="tokens"></div>
<div class="row"><div class="bars"><h2>What comes next</h2><p id="next"></p><div id="top"></div></div>
<div class="bars"><h2>Entropy</h2><p>Bits of uncertainty about the token that follows each token.</p><div id="entropy"></div></div></div>
<h2>Attention</h2><p>Rows ask, columns answer; the chosen token's row is marked.</p><label>Layer <select id="layer"></select></label><label>Head <select id="head"></select></label><div><canvas id="map"></canvas></div><div class="note" id="where"></div>
<h2>Layer by layer</h2><p>The likeliest next token if each layer were the last (logit lens). Deeper colour is more certain.</p><div class="scroll"><table id="lens"></table></div>
<script type="application/json" id="data">__DATA__</script>
<script>
const d = JSON.parse(document.getElementById('data').textContent), n = d.tokens.length, $ = id => document.getElementById(id);
const show = s => s.replace(/\\n/g, '\\u21b5').replace(/\\t/g, '\\u21e5') || '\\u2205', tint = a => `rgba(var(--hue), ${a.toFixed(3)})`;
let at = n - 1;
d.tokens.forEach((t, i) => { const b = document.createElement('button'); b.className = 't'; b.textContent = show(t);
  const p = d.probability[i]; if (p !== null) { b.style.background = tint(Math.min(.6, -Math.log2(Math.max(p, 1e-5)) / 18)); b.title = `probability ${p}`; }
  b.onclick = () => { at = i; draw(); }; $('tokens').append(b); if (t.includes('\\n')) $('tokens').append(document.createElement('br')); });
for (let i = 0; i < d.attention.length; i++) $('layer').add(new Option(i + 1, i)); for (let i = 0; i < d.heads; i++) $('head').add(new Option(i + 1, i)); $('head').add(new Option('mean', -1), 0);
$('layer').value = d.attention.length - 1; $('head').value = -1; $('layer').onchange = $('head').onchange = draw;
const bytes = d.attention.map(s => Uint8Array.from(atob(s), c => c.charCodeAt(0)));
const weight = (l, h, q, k) => h >= 0 ? bytes[l][(h * n + q) * n + k] : Array.from({length: d.heads}, (_, i) => bytes[l][(i * n + q) * n + k]).reduce((a, b) => a + b) / d.heads;
{ const w = 420, h = 130, most = Math.max(...d.entropy, 1), x = i => 30 + i * (w - 40) / Math.max(1, n - 1), y = e => h - 20 - e / most * (h - 35);
  $('entropy').innerHTML = `<svg viewBox="0 0 ${w} ${h}" width="100%" role="img" aria-label="entropy"><path d="M30 ${h - 20}H${w - 10}" stroke="var(--line)"/><text x="2" y="14">${most.toFixed(1)}</text><text x="12" y="${h - 16}">0</text><polyline fill="none" stroke="rgb(var(--hue))" stroke-width="2" points="${d.entropy.map((e, i) => x(i) + ',' + y(e)).join(' ')}"/><circle id="dot" r="4" fill="rgb(var(--hue))"/></svg>`;
  window.mark = () => { $('dot').setAttribute('cx', x(at)); $('dot').setAttribute('cy', y(d.entropy[at])); }; }
d.lens.forEach((row, l) => { const tr = $('lens').insertRow(); const th = document.createElement('th'); th.textContent = `layer ${l + 1}`; tr.append(th);
  row.forEach(([t, p]) => { const c = tr.insertCell(); c.textContent = show(t); c.title = `${p}`; c.style.background = tint(p * .55); }); });
{ const tr = $('lens').createTHead().insertRow(); const th = document.createElement('th'); th.textContent = 'after'; tr.append(th); d.tokens.forEach(t => { const c = document.createElement('th'); c.style.position = 'static'; c.textContent = show(t); tr.append(c); }); }
function draw() { [...document.querySelectorAll('.t')].forEach((b, i) => b.setAttribute('aria-pressed', i === at)); mark();
  $('next').textContent = `after \\u201c${show(d.tokens[at])}\\u201d, entropy ${d.entropy[at]} bits` + (at + 1 < n ? `; the text goes on with \\u201c${show(d.tokens[at + 1])}\\u201d (${d.probability[at + 1]})` : '');
  $('top').replaceChildren(...d.top[at].map(([t, p]) => { const r = document.createElement('div'); r.className = 'bar'; const a = document.createElement('span'), b = document.createElement('i'), c = document.createElement('span'); a.textContent = show(t); b.style.width = `${p * 100}%`; c.textContent = p.toFixed(3); r.append(a, b, c); return r; }));
  const l = +$('layer').value, h = +$('head').value, s = 8, c = $('map'), g = c.getContext('2d'); c.width = c.height = n * s; if (!bytes.length) return;
  const rgb = getComputedStyle(document.documentElement).getPropertyValue('--hue');
  for (let q = 0; q < n; q++) for (let k = 0; k <= q; k++) { g.fillStyle = `rgba(${rgb}, ${Math.sqrt(weight(l, h, q, k) / 255)})`; g.fillRect(k * s, q * s, s, s); }
  g.strokeStyle = `rgb(${rgb})`; g.strokeRect(.5, at * s + .5, (at + 1) * s - 1, s - 1);
  const best = Array.from({length: at + 1}, (_, k) => [weight(l, h, at, k) / 255, k]).sort((a, b) => b[0] - a[0]).slice(0, 4);
  $('where').textContent = `\\u201c${show(d.tokens[at])}\\u201d looks at ` + best.map(([w, k]) => `\\u201c${show(d.tokens[k])}\\u201d ${(w * 100).toFixed(0)} %`).join(', ');
  $('map').onmousemove = e => { const r = c.getBoundingClientRect(), k = Math.floor((e.clientX - r.left) / r.width * n), q = Math.floor((e.clientY - r.top) / r.height * n); if (k <= q && q < n && k >= 0) $('where').textContent = `\\u201c${show(d.tokens[q])}\\u201d to \\u201c${show(d.tokens[k])}\\u201d: ${(weight(l, h, q, k) / 2.55).toFixed(1)} %`; }; }
draw();
</script></html>
"""
