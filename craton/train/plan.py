"""The dial: a budget or a depth becomes a whole recipe, with a reason for each choice.

Rules and where they come from:
- width 64 per layer, so one number fixes the shape (nanochat); feed-forward 2.75 times the width (Llama 3, Qwen 3);
  two query heads per key-value head
- tokens = 12 per parameter, counting matrices and head (nanochat measured 10.3-11.2 for the best loss at a given
  compute with Muon, and uses 12), but at most 8 passes over the corpus (arXiv 2305.16264: 4 are nearly free, 16 end it)
- batch tokens grow as (tokens)^0.383 (Power Lines, arXiv 2505.13738)
- matrices 0.02 spectral norm a step with Muon, other rates below: tuned on this loop at 1M-10M parameters
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import replace

from craton.base import UserError, count, span
from craton.corpus.store import Corpus
from craton.model.config import ModelConfig
from craton.train.recipe import Recipe

TOKENS_PER_PARAMETER = 12
MOST_EPOCHS = 8
FEWEST_STEPS = 20  # below, warm-up and decay leave nothing between them


def parse_budget(text: str) -> tuple[str, float]:
    """'10m' -> ('seconds', 600.0); '1e16flop' -> ('flop', 1e16). UserError otherwise."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(s|m|h|d|flops?)\s*", text.lower())
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if not match or not value > 0 or math.isinf(value):
        raise UserError(f"--budget {text}: write a time (90s, 10m, 2h, 1d) or compute (1e16flop)")
    if match[2].startswith("flop"):
        return "flop", value
    return "seconds", value * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def shape(recipe: Recipe, depth: int, corpus: Corpus) -> ModelConfig:
    """The decoder of a depth, with what the recipe fixes. UserError if the sizes do not fit each other."""
    m, tokenizer = recipe.model, corpus.tokenizer
    hidden = m.hidden_size or 64 * depth
    head_dim = m.head_dim or (64 if hidden % 64 == 0 and hidden >= 512 else 32)
    heads = m.num_attention_heads or max(1, hidden // head_dim)
    kv = m.num_key_value_heads or (heads // 2 if heads % 2 == 0 else heads)
    length = recipe.data.sequence_length or 512
    try:
        return ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=hidden,
            intermediate_size=m.intermediate_size or max(64, round(2.75 * hidden / 64) * 64),
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=head_dim,
            max_position_embeddings=m.max_position_embeddings or max(length, 1024),
            rope_theta=m.rope_theta,
            tie_word_embeddings=m.tie_word_embeddings,
            bos_token_id=tokenizer.document_id,
            eos_token_id=tokenizer.document_id,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


Measure = Callable[[ModelConfig, Recipe], float]  # seconds that one step takes, batch_tokens of it


def plan(
    recipe: Recipe, corpora: list[Corpus], peak: float, measure: Measure, began: float, device: str
) -> tuple[Recipe, ModelConfig, list[str]]:
    """Resolve every None of the recipe. Returns it, the model's configuration and the reasons, a line each.

    began: time.monotonic() at the command's start, so that a time budget covers all of the command.
    """
    r = replace(
        recipe, **{k: replace(getattr(recipe, k)) for k in ("run", "model", "data", "optimizer", "schedule", "safety")}
    )
    why: list[str] = []
    corpus = corpora[0]
    available = sum(c.length("train") for c in corpora)
    if r.run.precision is None:
        r.run.precision = "bf16" if device == "cuda" else "fp32"
    if r.data.document_mask is None:
        r.data.document_mask = device == "cpu"
        why.append(
            "attention stays inside documents: the CPU kernel skips the rest"
            if device == "cpu"
            else "attention may cross documents: a mask would cost speed here"
        )
    if r.data.sequence_length is None:
        r.data.sequence_length = 512 if device == "cpu" else 2048
    if available < r.data.sequence_length + 1:
        raise UserError(
            f"{corpus.folder}: {available} training tokens, fewer than one row of data.sequence_length "
            f"{r.data.sequence_length}; give more text"
        )
    budget = parse_budget(r.run.budget) if r.run.budget else None
    depth = r.model.num_hidden_layers

    if depth is None:
        if budget is None and r.run.steps is None:
            raise UserError("say how much to train: --budget 10m, --budget 1e15flop, --depth 4 or --steps 500")
        if budget is None:
            depth = 4
            why.append("depth 4: the default when only --steps is given")
        else:
            kind, amount = budget
            compute = amount if kind == "flop" else 0.6 * peak * max(1.0, amount - (time.monotonic() - began)) * 0.9
            depth = next((d for d in range(24, 1, -1) if _wanted(r, d, corpus, available, compute)), 1)
            if kind == "seconds":
                # The guess was 60 % of peak; small models reach less.
                while depth > 1:
                    c = shape(r, depth, corpus)
                    batch = _batch(r, compute / c.flops_per_token(r.data.sequence_length))
                    rate = batch / measure(c, _with_batch(r, batch))
                    tokens = rate * (amount - (time.monotonic() - began)) * 0.9
                    if tokens >= _fewest(r, depth, corpus, available):
                        break
                    depth -= 1
            why.append(
                f"depth {depth}: the nearest to {TOKENS_PER_PARAMETER} tokens a parameter that the budget allows"
            )
    config = shape(r, depth, corpus)
    for other in corpora[1:]:
        if (
            other.manifest["files"]["tokenizer/tokenizer.json"]["sha256"]
            != corpus.manifest["files"]["tokenizer/tokenizer.json"]["sha256"]
        ):
            raise UserError(
                f"{other.folder}: built with another tokenizer than {corpus.folder}; build it with --tokenizer "
                f"{corpus.folder}/tokenizer"
            )
    flops = config.flops_per_token(r.data.sequence_length)
    target = float(TOKENS_PER_PARAMETER * config.matrix_parameters)
    if r.run.steps is None:
        if budget is None:
            tokens = min(target, MOST_EPOCHS * available)
            why.append(
                f"{count(tokens)} tokens: {TOKENS_PER_PARAMETER} a parameter"
                if tokens == target
                else f"{count(tokens)} tokens: {MOST_EPOCHS} passes over the corpus"
            )
        elif budget[0] == "flop":
            tokens = budget[1] / flops
        else:
            guess = _batch(r, min(target, 4 * available))
            step = measure(config, _with_batch(r, guess))
            left = budget[1] - (time.monotonic() - began)
            # What is not steps: evaluations, checkpoints, samples, report; and a margin for noise.
            tokens = max(0.0, 0.92 * left - 3) / step * guess
            why.append(f"{count(guess / step)} tokens/s measured at this size, {span(left)} left of {r.run.budget}")
        batch = _batch(r, tokens)
        r.run.steps = int(tokens / batch)
        if r.run.steps < FEWEST_STEPS:
            raise UserError(
                f"--budget {r.run.budget or f'depth {depth}'}: too small for any model here ({r.run.steps} steps of "
                f"{batch} tokens, at least {FEWEST_STEPS} needed); give more"
            )
    else:
        batch = _batch(r, min(target, 4 * available))
    r.data.batch_tokens = batch
    steps, tokens = r.run.steps, r.run.steps * batch
    why.append(
        f"batch of {batch} tokens: grows as the 0.383 power of the {count(tokens)} tokens"
        if recipe.data.batch_tokens is None
        else f"batch of {batch} tokens, as given"
    )
    if r.data.micro_tokens is None:
        r.data.micro_tokens = min(batch, max(r.data.sequence_length, 8192 if device == "cpu" else 32_768))
    o = r.optimizer
    scale = math.sqrt(batch / 8192) if batch < 8192 else 1.0
    if o.name == "muon":
        o.matrix_lr = o.matrix_lr or 0.02 * scale
        o.embedding_lr = o.embedding_lr or (0.2 if not config.tie_word_embeddings else 0.01) * scale
        o.head_lr = o.head_lr or 0.004 * scale * math.sqrt(256 / config.hidden_size)
        o.norm_lr = o.norm_lr if o.norm_lr is not None else 0.01 * scale
        o.weight_decay = o.weight_decay if o.weight_decay is not None else 0.1
    else:
        peak_lr = min(0.004, 0.003 * math.sqrt(256 / config.hidden_size)) * scale
        o.matrix_lr, o.embedding_lr, o.head_lr = o.matrix_lr or peak_lr, o.embedding_lr or peak_lr, o.head_lr or peak_lr
        o.norm_lr = o.norm_lr if o.norm_lr is not None else peak_lr
        o.weight_decay = o.weight_decay if o.weight_decay is not None else 0.1
    if r.schedule.warmup_steps is None:
        r.schedule.warmup_steps = min(40, max(1, steps // 20)) if o.name == "muon" else max(1, steps // 20)
    # An eighth of the run, but no more than about ten minutes at 40 % of peak: that is what a crash may cost.
    r.run.checkpoint_every = r.run.checkpoint_every or max(10, min(steps // 8, int(600 * 0.4 * peak / (batch * flops))))
    r.run.evaluate_every = r.run.evaluate_every or max(10, steps // 8)
    r.model.num_hidden_layers = depth
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ):
        setattr(r.model, key, getattr(config, key))
    if batch % r.data.sequence_length or batch < r.data.sequence_length:
        raise UserError(
            f"data.batch_tokens {batch} must be a multiple of data.sequence_length {r.data.sequence_length}"
        )
    if r.data.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"data.sequence_length {r.data.sequence_length} is longer than model.max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    why.append(
        f"{steps} steps, {count(tokens)} tokens = {tokens / config.matrix_parameters:.1f} a parameter, "
        f"{tokens / available:.1f} passes over the corpus, {tokens * flops:.2g} FLOP"
    )
    return r, config, why


def _wanted(r: Recipe, depth: int, corpus: Corpus, available: int, compute: float) -> bool:
    c = shape(r, depth, corpus)
    tokens = compute / c.flops_per_token(r.data.sequence_length or 512)
    return tokens >= _fewest(r, depth, corpus, available)


def _fewest(r: Recipe, depth: int, corpus: Corpus, available: int) -> float:
    """Tokens from which a depth beats the next smaller one: then both are equally far, as ratios, from
    TOKENS_PER_PARAMETER, since tokens within a budget fall as parameters grow. (Measured at 80 s: depth 2 with 3.4
    tokens a parameter ends at 1.510 bits per byte, depth 1 with 28 at 1.519.)"""
    smaller = shape(r, depth - 1, corpus).matrix_parameters if depth > 1 else 0
    return min(TOKENS_PER_PARAMETER * smaller, MOST_EPOCHS * available)


def _batch(r: Recipe, tokens: float) -> int:
    """Tokens a step for a run of so many tokens: a power of two of rows."""
    length = r.data.sequence_length or 512
    if r.data.batch_tokens:
        return r.data.batch_tokens
    wanted = 524_288 * (max(tokens, 1.0) / 1.6e9) ** 0.383 / 8
    return length * 2 ** max(0, round(math.log2(max(1.0, wanted / length))))


def _with_batch(r: Recipe, batch: int) -> Recipe:
    return replace(r, data=replace(r.data, batch_tokens=batch))
