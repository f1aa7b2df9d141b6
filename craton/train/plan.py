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

from craton.base import UserError, amount, count, span
from craton.corpus.store import Corpus
from craton.model.config import ModelConfig
from craton.train import memory
from craton.train.recipe import Recipe
from craton.train.schedule import FINISH

TOKENS_PER_PARAMETER = 12
MOST_EPOCHS = 8
LAYERS_TOKENS = 2_500_000  # from which three layers of 64 beat one: 1.594 against 1.614 bits a byte in 3 minutes
FEWEST_STEPS = 20  # below, warm-up and decay leave nothing between them
_LOOKS, _FEW_LOOKS = 8, 4  # at held-out text in a run, and in one of a few minutes
_LOOK_TOKENS = 65_536
_LOOKING = 0.035  # of a time budget


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
    recipe: Recipe,
    corpora: list[Corpus],
    peak: float,
    measure: Measure,
    began: float,
    device: str,
    world: int = 1,
    base: ModelConfig | None = None,
) -> tuple[Recipe, ModelConfig, list[str]]:
    """Resolve every None of the recipe. Returns it, the model's configuration and the reasons, a line each. base: of a
    model that is trained further.

    began: time.monotonic() at the command's start, so that a time budget covers all of the command. peak: FLOP/s of all
    processes. UserError if what is asked for cannot be.
    """
    sections = {k: replace(getattr(recipe, k)) for k in ("run", "model", "data", "optimizer", "schedule", "safety")}
    planner = _Planner(replace(recipe, **sections), corpora, peak, measure, began, device, world)
    planner.rows()
    if base is None:
        depth = planner.depth()
        config = shape(planner.r, depth, corpora[0])
    else:
        depth, config = base.num_hidden_layers, base
        if recipe.run.steps is None and recipe.run.budget is None:
            raise UserError("say how much to train: --budget 10m, --budget 1e15flop or --steps 500")
    planner.check_tokenizers()
    planner.length(config, depth)
    planner.rates(config)
    if base is not None:
        planner.gently(recipe)
    planner.intervals(config)
    planner.fix(config, depth)
    return planner.r, config, planner.why


class _Planner:
    """A recipe on its way from what was asked to what is done. `r` is filled in, `why` says the reasons."""

    def __init__(
        self,
        recipe: Recipe,
        corpora: list[Corpus],
        peak: float,
        measure: Measure,
        began: float,
        device: str,
        world: int,
    ):
        self.free, self.world = memory.free(device), world
        self.r, self.corpora, self.peak, self.measure, self.began = recipe, corpora, peak, measure, began
        self.cpu = device == "cpu"
        self.why: list[str] = []
        self.looks = _LOOKS
        self.available = sum(c.length("train") for c in corpora)
        self.budget = parse_budget(recipe.run.budget) if recipe.run.budget else None
        self.given_batch = recipe.data.batch_tokens

    def left(self) -> float:
        """Seconds of a time budget that are left."""
        assert self.budget is not None
        return self.budget[1] - (time.monotonic() - self.began)

    def rows(self) -> None:
        """Precision, and what a row of a batch is."""
        r = self.r
        r.run.precision = r.run.precision or ("fp32" if self.cpu else "bf16")
        if r.data.document_mask is None:
            r.data.document_mask = self.cpu
            inside = "stays inside documents: the CPU kernel skips the rest"
            across = "may cross documents: a mask would cost speed here"
            self.why.append(f"attention {inside if self.cpu else across}")
        r.data.sequence_length = length = r.data.sequence_length or (512 if self.cpu else 2048)
        if self.available < length + 1:
            few = f"{self.available} training tokens, fewer than one row of data.sequence_length {length}"
            raise UserError(f"{self.corpora[0].folder}: {few}; give more text")

    def depth(self) -> int:
        """The number of layers, given or derived."""
        r = self.r
        if r.model.num_hidden_layers is not None:
            return r.model.num_hidden_layers
        if self.budget is None:
            if r.run.steps is None:
                raise UserError("say how much to train: --budget 10m, --budget 1e15flop, --depth 4 or --steps 500")
            self.why.append("depth 4: the default when only --steps is given")
            return 4
        kind, amount = self.budget
        compute = amount if kind == "flop" else 0.6 * self.peak * max(1.0, self.left()) * 0.9
        depth = next((d for d in range(24, 1, -1) if self._enough(d, compute)), 1)
        if kind == "seconds":
            depth = self._measured_depth(depth, compute)
        if depth == 1 and r.model.hidden_size is None and self._three_layers(compute):
            r.model.hidden_size = 64
            many = f"{count(LAYERS_TOKENS)} tokens, from which they beat one"
            self.why.append(f"3 layers of 64: the budget allows them {many}")
            return 3
        self.why.append(f"depth {depth}: nearest to {TOKENS_PER_PARAMETER} tokens a parameter that the budget allows")
        return depth

    def _three_layers(self, compute: float) -> bool:
        """Whether narrow layers get enough tokens in place of a single one."""
        narrow = replace(self.r, model=replace(self.r.model, hidden_size=64))
        c = shape(narrow, 3, self.corpora[0])
        tokens = compute / c.flops_per_token(self.r.data.sequence_length or 512)
        if tokens >= LAYERS_TOKENS and self.budget and self.budget[0] == "seconds":
            batch = _batch(narrow, tokens)
            tokens = batch / self.measure(c, _with_batch(narrow, batch)) * self.left() * 0.9
        return bool(LAYERS_TOKENS <= tokens <= MOST_EPOCHS * self.available)

    def _enough(self, depth: int, compute: float) -> bool:
        """Whether so much compute gives a depth the tokens it needs, and it fits the memory."""
        c = shape(self.r, depth, self.corpora[0])
        try:
            memory.check(c, self.r, self.world, self.free)
        except UserError:
            return False
        return compute / c.flops_per_token(self.r.data.sequence_length or 512) >= self._fewest(depth)

    def _measured_depth(self, depth: int, compute: float) -> int:
        """The guess was 60 % of peak; small models reach less."""
        while depth > 1:
            c = shape(self.r, depth, self.corpora[0])
            batch = _batch(self.r, compute / c.flops_per_token(self.r.data.sequence_length or 512))
            rate = batch / self.measure(c, _with_batch(self.r, batch))
            if rate * self.left() * 0.9 >= self._fewest(depth):
                break
            depth -= 1
        return depth

    def _fewest(self, depth: int) -> float:
        """Tokens from which a depth beats the next smaller one: then both are equally far, as ratios, from
        TOKENS_PER_PARAMETER, since tokens within a budget fall as parameters grow. (Measured at 80 s: depth 2 with 3.4
        tokens a parameter ends at 1.510 bits per byte, depth 1 with 28 at 1.519.)"""
        smaller = shape(self.r, depth - 1, self.corpora[0]).matrix_parameters if depth > 1 else 0
        return min(TOKENS_PER_PARAMETER * smaller, MOST_EPOCHS * self.available)

    def check_tokenizers(self) -> None:
        """All corpora have the same ids."""
        first, *others = self.corpora
        name = "tokenizer/tokenizer.json"
        for other in others:
            if other.manifest["files"][name]["sha256"] != first.manifest["files"][name]["sha256"]:
                fix = f"build it with --tokenizer {first.folder}/tokenizer"
                raise UserError(f"{other.folder}: built with another tokenizer than {first.folder}; {fix}")

    def length(self, config: ModelConfig, depth: int) -> None:
        """Steps and tokens a step."""
        r = self.r
        target = float(TOKENS_PER_PARAMETER * config.matrix_parameters)
        if r.run.steps is None:
            tokens = self._tokens(config, target)
            batch = _batch(r, tokens)
            r.run.steps = int(tokens / batch)
            if r.run.steps < FEWEST_STEPS:
                asked = r.run.budget or f"depth {depth}"
                few = f"{r.run.steps} steps of {batch} tokens, at least {FEWEST_STEPS} needed"
                raise UserError(f"--budget {asked}: too small for any model here ({few}); give more")
        else:
            batch = _batch(r, min(target, 4 * self.available))
        r.data.batch_tokens = batch
        rule = f": grows as the 0.383 power of the {count(r.run.steps * batch)} tokens"
        self.why.append(f"batch of {batch} tokens{rule if self.given_batch is None else ', as given'}")
        if r.data.micro_tokens is None and self.cpu:
            r.data.micro_tokens = min(batch, max(r.data.sequence_length or 1, 8192))
        elif r.data.micro_tokens is None:
            r.data.micro_tokens = memory.micro_tokens(config, r, self.world, self.free)

    def _tokens(self, config: ModelConfig, target: float) -> float:
        """Tokens to train on."""
        r = self.r
        if self.budget is None:
            tokens = min(target, MOST_EPOCHS * self.available)
            rule = (
                f"{TOKENS_PER_PARAMETER} a parameter" if tokens == target else f"{MOST_EPOCHS} passes over the corpus"
            )
            self.why.append(f"{count(tokens)} tokens: {rule}")
            return tokens
        if self.budget[0] == "flop":
            return self.budget[1] / config.flops_per_token(r.data.sequence_length or 512)
        guess = _batch(r, min(target, 4 * self.available))
        memory.check(config, _with_batch(r, guess), self.world, self.free)
        step = self.measure(config, _with_batch(r, guess))
        left = self.left()
        self.why.append(f"{count(guess / step)} tokens/s measured at this size, {span(left)} left of {r.run.budget}")
        self.looks = _LOOKS if left > 300 else _FEW_LOOKS
        if r.run.evaluate_tokens is None:  # a forward pass takes two fifths of a step's time
            fitting = int(_LOOKING * left / self.looks * 2.5 * guess / step)
            r.run.evaluate_tokens = max(8192, min(_LOOK_TOKENS, fitting))
        # What is neither steps nor looks: checkpoints, samples, report. The end is moved later where this is not true.
        return max(0.0, (1 - _LOOKING) * left - FINISH) / step * guess

    def rates(self, config: ModelConfig) -> None:
        """Learning rates, weight decay, warm-up."""
        o, batch, steps = self.r.optimizer, self.r.data.batch_tokens or 1, self.r.run.steps or 1
        scale = math.sqrt(batch / 8192) if batch < 8192 else 1.0
        if o.name == "muon":
            o.matrix_lr = o.matrix_lr or 0.02 * scale
            o.embedding_lr = o.embedding_lr or (0.2 if not config.tie_word_embeddings else 0.01) * scale
            o.head_lr = o.head_lr or 0.004 * scale * math.sqrt(256 / config.hidden_size)
            norm_lr = 0.01 * scale
        else:
            norm_lr = min(0.004, 0.003 * math.sqrt(256 / config.hidden_size)) * scale
            o.matrix_lr, o.embedding_lr = o.matrix_lr or norm_lr, o.embedding_lr or norm_lr
            o.head_lr = o.head_lr or norm_lr
        o.norm_lr = o.norm_lr if o.norm_lr is not None else norm_lr
        o.weight_decay = o.weight_decay if o.weight_decay is not None else 0.1
        if self.r.schedule.warmup_steps is None:
            most = 40 if o.name == "muon" else steps
            self.r.schedule.warmup_steps = min(most, max(1, steps // 20))

    def gently(self, asked: Recipe) -> None:
        """A tenth of the learning rates that are right from nothing, where none were asked for."""
        for name in ("matrix_lr", "embedding_lr", "head_lr", "norm_lr"):
            if getattr(asked.optimizer, name) is None:
                setattr(self.r.optimizer, name, 0.1 * getattr(self.r.optimizer, name))
        self.why.append("a tenth of the learning rates from nothing, so that what was learned before is kept")

    def intervals(self, config: ModelConfig) -> None:
        """How often is saved and looked."""
        run, steps = self.r.run, self.r.run.steps or 1
        step_flops = (self.r.data.batch_tokens or 1) * config.flops_per_token(self.r.data.sequence_length or 512)
        # An eighth of the run, but no more than about ten minutes at 40 % of peak: that is what a crash may cost.
        run.checkpoint_every = run.checkpoint_every or max(10, min(steps // 8, int(600 * 0.4 * self.peak / step_flops)))
        run.evaluate_every = run.evaluate_every or max(10, steps // self.looks)
        run.evaluate_tokens = run.evaluate_tokens or _LOOK_TOKENS

    def fix(self, config: ModelConfig, depth: int) -> None:
        """The model's sizes into the recipe, checked against the rows."""
        r = self.r
        r.model.num_hidden_layers = depth
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            setattr(r.model, key, getattr(config, key))
        r.model.max_position_embeddings = most = config.max_position_embeddings
        batch, length, steps = r.data.batch_tokens or 0, r.data.sequence_length or 1, r.run.steps or 0
        if batch % length or batch < length:
            raise UserError(f"data.batch_tokens {batch} must be a multiple of data.sequence_length {length}")
        if length > most:
            raise UserError(f"data.sequence_length {length} is longer than model.max_position_embeddings {most}")
        tokens = steps * batch
        compute = amount(tokens * config.flops_per_token(length), "FLOP")
        passes = f"{tokens / self.available:.1f} passes over the corpus"
        each = f"{tokens / config.matrix_parameters:.1f} a parameter"
        self.why.append(f"{steps} steps, {count(tokens)} tokens = {each}, {passes}, {compute}")


def _batch(r: Recipe, tokens: float) -> int:
    """Tokens a step for a run of so many tokens: a power of two of rows."""
    length = r.data.sequence_length or 512
    if r.data.batch_tokens:
        return r.data.batch_tokens
    wanted = 524_288 * (max(tokens, 1.0) / 1.6e9) ** 0.383 / 8
    return length * 2 ** max(0, round(math.log2(max(1.0, wanted / length))))


def _with_batch(r: Recipe, batch: int) -> Recipe:
    return replace(r, data=replace(r.data, batch_tokens=batch))
