"""The one training loop: batches + objective + optimizer + schedule + checkpoints + record, on one process or many."""

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craton.base import Progress, UserError, count, say, span
from craton.corpus.batches import Batch, Batches, heldout_rows
from craton.corpus.store import Corpus
from craton.engine.model import greedy
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.initialise import initialise
from craton.text.tokenizer import Tokenizer
from craton.train import checkpoint, machine
from craton.train.distributed import Processes, norm, whole
from craton.train.loggers import Logger
from craton.train.objective import Objective, next_token
from craton.train.optim import Optimizers
from craton.train.recipe import Recipe
from craton.weights.folder import released, write_config

SPIKE_WINDOW = 64


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass
class Progressed:
    """How far a run is: everything besides tensors that the next step depends on."""

    step: int = 0  # updates made
    cursor: int = 0  # next batch
    skipped: tuple[int, ...] = ()  # batches left out for good
    rollbacks: int = 0
    losses: tuple[float, ...] = ()  # the last SPIKE_WINDOW
    seconds: float = 0.0  # spent training, over all resumptions


def factor(recipe: Recipe, step: int) -> float:
    """Learning rate of a step as a share of the peak: linear warm-up, stable, linear decay (WSD, arXiv 2404.06395)."""
    s, steps = recipe.schedule, recipe.run.steps or 1
    warm = min(1.0, (step + 1) / s.warmup_steps) if s.warmup_steps else 1.0
    decay = max(1, round(s.decay_share * steps))
    left = min(1.0, (steps - step) / decay)
    return min(warm, s.final_share + (1 - s.final_share) * left)


def make(config: ModelConfig, recipe: Recipe, processes: Processes) -> tuple[Decoder, Optimizers]:
    """Network, initialised from the seed and sharded, and its optimizers."""
    with torch.device("meta"):
        network = Decoder(config)
    network = network.to_empty(device="cpu")
    if config.tie_word_embeddings:
        network.tie()
    initialise(network, recipe.run.seed)
    network.to(processes.device)
    processes.shard(network, recipe.run.precision == "bf16")
    o = recipe.optimizer
    lrs = {
        "matrix": o.matrix_lr or 0.0,
        "embedding": o.embedding_lr or 0.0,
        "head": o.head_lr or 0.0,
        "norm": o.norm_lr or 0.0,
    }
    return network, Optimizers(network, o.name, lrs, o.momentum, (o.beta1, o.beta2), o.weight_decay or 0.0)


def _on(batch: Batch, device: str) -> Batch:
    if device == "cpu":
        return batch
    moved = [None if x is None else x.to(device, non_blocking=True) for x in vars(batch).values()]
    return Batch(*moved)  # type: ignore[arg-type]


def _precision(recipe: Recipe, device: str) -> Any:
    return torch.autocast(device, torch.bfloat16) if recipe.run.precision == "bf16" else contextlib.nullcontext()


def gradients(
    network: Decoder, batch: Batch, objective: Objective, recipe: Recipe, device: str, world: int = 1
) -> Tensor:
    """Accumulate the gradient of a batch in slices of micro_tokens; returns the loss, this process's share of it."""
    rows = max(1, (recipe.data.micro_tokens or 1) // batch.ids.shape[1])
    total = torch.zeros((), device=device)
    for at in range(0, batch.ids.shape[0], rows):
        piece = _on(Batch(*(None if x is None else x[at : at + rows] for x in vars(batch).values())), device)  # type: ignore[arg-type]
        with _precision(recipe, device):
            loss, _ = objective(network, piece)
        (loss * world if world > 1 else loss).backward()
        total += loss.detach().float()
    return total


def seconds_a_step(config: ModelConfig, recipe: Recipe, device: str) -> float:
    """Measured on random tokens with a throw-away network of this process: the fastest of a few steps."""
    alone = Processes.__new__(Processes)
    alone.rank, alone.world, alone.device, alone.mesh = 0, 1, device, None
    network, optimizers = make(config, recipe, alone)
    length = recipe.data.sequence_length or 512
    micro = max(1, min(recipe.data.batch_tokens or length, 8192 if device == "cpu" else 32_768) // length)
    ids = torch.randint(config.vocab_size, (micro, length + 1), device=device)
    batch = Batch(
        ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.full((micro, length), 1e-6, device=device), None
    )
    slices = max(1, (recipe.data.batch_tokens or length) // (micro * length))
    forward: list[float] = []
    update: list[float] = []
    end = time.perf_counter() + 2.0
    while len(forward) < 3 or (time.perf_counter() < end and len(forward) < 20):
        start = time.perf_counter()
        with _precision(recipe, device):
            next_token(network, batch)[0].backward()
        _synchronise(device)
        middle = time.perf_counter()
        norm(list(network.parameters()), 1.0)
        optimizers.step(0.0)
        _synchronise(device)
        forward.append(middle - start)
        update.append(time.perf_counter() - middle)
    _, world = machine.world()
    return slices * sorted(forward)[len(forward) // 2] / world + sorted(update)[len(update) // 2]


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Run:
    """A run in its folder: fresh or resumed, driven by `train`."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        config: ModelConfig,
        corpora: list[Corpus],
        weights: list[float],
        processes: Processes,
        peak: float,
        objective: Objective = next_token,
    ):
        self.out, self.recipe, self.config, self.corpora = out, recipe, config, corpora
        self.processes, self.peak, self.objective, self.device = processes, peak, objective, processes.device
        d = recipe.data
        self.length = d.sequence_length or 1
        self.rows = (d.batch_tokens or 0) // self.length
        if self.rows % processes.world:
            raise UserError(
                f"data.batch_tokens is {self.rows} rows, which {processes.world} processes cannot share equally; set "
                f"data.batch_tokens to a multiple of {processes.world * self.length}"
            )
        self.batches = Batches(corpora, weights, self.length, self.rows, recipe.run.seed, bool(d.document_mask))
        self.heldout = heldout_rows(corpora, self.length, recipe.run.evaluate_tokens, bool(d.document_mask))
        self.tokenizer = corpora[0].tokenizer
        self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes())
        self.bytes_per_token = sum(c.manifest["splits"]["train"]["bytes"] for c in corpora) / max(
            1, sum(c.length("train") for c in corpora)
        )
        self.network, self.optimizers = make(config, recipe, processes)
        self.progress = Progressed()
        self.stopped_by: int | None = None
        self.logger = Logger(recipe.run.logger if processes.first else "none", out)
        compile_ = recipe.run.compile == "on" or (
            recipe.run.compile == "auto" and self.device == "cuda" and (recipe.run.steps or 0) >= 1000
        )
        if compile_:
            for block in self.network.model.layers:
                block.compile()

    # ---- saving ----

    def save(self) -> None:
        """Publish a checkpoint and the model folder's weights. Collective."""
        model, optimizer = whole(self.network.state_dict()), whole(self.optimizers.state())
        problem = None
        if self.processes.first:
            try:
                model = released(self.network, model)
                path = checkpoint.save(
                    self.out / "training",
                    self.progress.step,
                    model,
                    optimizer,
                    vars(self.progress),
                    self.recipe.run.keep_checkpoints,
                )
                _link(path / "model.safetensors", self.out / "model.safetensors")
            except UserError as error:
                problem = str(error)
        if problem := self.processes.agree(problem):
            raise UserError(problem)

    def restore(self) -> bool:
        """Go to the newest valid checkpoint, or to the start when there is none. Returns whether there was one."""
        path, refused = checkpoint.newest_valid(self.out / "training")
        if self.processes.first:
            for line in refused:
                say(line)
        if path is None:
            fresh, self.optimizers = make(self.config, self.recipe, self.processes)
            self.network = fresh
            self.progress = Progressed(skipped=self.progress.skipped, rollbacks=self.progress.rollbacks)
            return False
        model, optimizer, state = checkpoint.load(path)
        self._fill(model, path)
        self.optimizers.load(optimizer)
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items()}
        self.progress = Progressed(**known)
        return True

    def _fill(self, model: dict[str, Tensor], where: Path) -> None:
        """Parameters from whole tensors, each process taking its shard."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        own = dict(self.network.named_parameters())
        if set(own) != set(model):
            raise UserError(f"{where}: holds other tensors than the recipe's model")
        with torch.no_grad():
            for name, p in own.items():
                if p.shape != model[name].shape:
                    raise UserError(
                        f"{where}: tensor {name} has shape {tuple(model[name].shape)}, the recipe says {tuple(p.shape)}"
                    )
                value = model[name].to(p.device)
                p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)

    # ---- looking ----

    def evaluate(self) -> dict[str, float]:
        """Held-out loss: nats a token and bits a byte. Collective; empty if nothing is held out."""
        if not self.heldout:
            return {}
        rank, world, sums = self.processes.rank, self.processes.world, torch.zeros(2, dtype=torch.float64)
        rounds = -(-len(self.heldout) // world)
        with torch.no_grad(), _precision(self.recipe, self.device):
            for i in range(rounds):
                at = i * world + rank
                batch = _on(self.heldout[min(at, len(self.heldout) - 1)], self.device)
                _, nll = next_token(self.network, batch)
                if at < len(self.heldout):
                    sums[0] += nll.double().sum().cpu()
                    sums[1] += self.token_bytes[batch.target.cpu()].sum()
        nats, size = self.processes.sum(sums.float() if self.device == "cuda" else sums).tolist()
        return {
            "heldout_loss": nats / (len(self.heldout) * self.length),
            "heldout_bits_per_byte": nats / math.log(2) / max(1.0, size),
        }

    def sample(self, tokens: int = 48) -> str:
        """A greedy continuation of the first held-out words; '' where the network is sharded."""
        if self.processes.mesh is not None:
            return ""
        source = self.heldout[0].ids[0] if self.heldout else self.batches.batch(0).ids[0]
        prompt = source[:12].tolist()
        out = greedy(self.network, prompt, min(tokens, self.config.max_position_embeddings - 13))
        return f"{self.tokenizer.decode(prompt)}|{self.tokenizer.decode(out)}"

    # ---- training ----

    def train(self) -> None:
        """Run to the recipe's last step. Raises Interrupted after a signal, UserError when it gives up."""
        r, p = self.recipe, self.progress
        steps, every = r.run.steps or 0, r.run.checkpoint_every or 1
        flops = self.config.flops_per_token(self.length)
        line = Progress()
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        metrics = _Metrics(self.out / "metrics.jsonl", p.step) if self.processes.first else None
        began, rates = time.monotonic() - p.seconds, deque[float](maxlen=20)
        try:
            while p.step < steps:
                start = time.perf_counter()
                while p.cursor in p.skipped:
                    p.cursor += 1
                loss = self._gradients(p.cursor)
                size = norm(list(self.network.parameters()), r.optimizer.clip)
                if (problem := self._problem(loss, size)) is not None:
                    line.clear()
                    self._roll_back(problem, metrics)
                    p = self.progress
                    continue
                share = factor(r, p.step)
                self.optimizers.step(share)
                p.step, p.cursor = p.step + 1, p.cursor + 1
                p.losses = (*p.losses, loss)[-SPIKE_WINDOW:]
                p.seconds = time.monotonic() - began
                rates.append(time.perf_counter() - start)
                rate = self.rows * self.length * len(rates) / sum(rates)
                row: dict[str, Any] = {
                    "step": p.step,
                    "tokens": p.step * self.rows * self.length,
                    "batch": p.cursor - 1,
                    "loss": loss,
                    "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
                    "lr_share": share,
                    "gradient_norm": size,
                    "tokens_per_second": rate,
                    "peak_share": rate * 6 * self.config.matrix_parameters / self.peak / self.processes.world,
                    "seconds": p.seconds,
                }
                if p.step % (r.run.evaluate_every or 1) == 0 or p.step == steps:
                    row |= self.evaluate()
                    row["sample"] = self.sample()
                if metrics:
                    metrics.write(row)
                    self.logger.write(row)
                    left = (steps - p.step) * sum(rates) / len(rates)
                    line.show(
                        f"step {p.step}/{steps}  loss {loss:.3f}  {row['bits_per_byte']:.3f} bits/byte  "
                        f"{count(rate)} tok/s  {100 * row['peak_share']:.0f}% of peak  {count(rate * flops)}FLOP/s  "
                        f"{span(left)} left"
                    )
                    if "heldout_loss" in row:
                        line.clear()
                        say(
                            f"step {p.step:>6}  held-out {row['heldout_bits_per_byte']:.4f} bits/byte, loss "
                            f"{row['heldout_loss']:.4f}  {row['sample'][:100]!r}"
                        )
                stop = self.processes.agree(self.stopped_by)
                if p.step % every == 0 or p.step == steps or stop is not None:
                    self.save()
                if stop is not None and p.step < steps:
                    raise Interrupted(signal.Signals(stop).name)
        finally:
            line.clear()
            for s, handler in previous.items():
                signal.signal(s, handler)
            if metrics:
                metrics.close()
            self.logger.close()

    def _gradients(self, number: int) -> float:
        """Accumulate a batch's gradient; returns its loss, over all processes. One process adds up the same two halves
        as two processes do, so that both give the same bits (Muon and Adam turn rounding into visible differences)."""
        rank, world = self.processes.rank, self.processes.world
        shares = 2 if world == 1 and self.rows % 2 == 0 else world
        total = torch.zeros((), device=self.device)
        for share in range(rank, shares, world):
            total += gradients(
                self.network, self.batches.batch(number, share, shares), self.objective, self.recipe, self.device, world
            )
        return float(self.processes.sum(total))

    def _stop(self, number: int, _: Any) -> None:
        self.stopped_by = number

    def _problem(self, loss: float, size: float) -> str | None:
        """Why this step must not be taken, or None. The same on every process: loss and norm are global."""
        if not math.isfinite(loss) or not math.isfinite(size):
            return f"loss {loss}, gradient norm {size}"
        past, sigmas = self.progress.losses, self.recipe.safety.spike_sigmas
        if sigmas and len(past) == SPIKE_WINDOW:
            mean = sum(past) / len(past)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in past) / len(past))
            if loss > mean + sigmas * deviation and loss > 1.1 * mean:
                return f"loss {loss:.3f} after {mean:.3f} +- {deviation:.3f}"
        return None

    def _roll_back(self, problem: str, metrics: "_Metrics | None") -> None:
        """Back to the last checkpoint; this batch and the one before it are left out from now on."""
        step, batch, old = self.progress.step, self.progress.cursor, self.progress
        if old.rollbacks >= self.recipe.safety.most_rollbacks:
            raise UserError(
                f"step {step}: {problem}; given up after {old.rollbacks} rollbacks (safety.most_rollbacks); lower "
                f"the learning rates or look at the data of batch {batch} ('craton corpus trace')"
            )
        out = tuple(sorted({*old.skipped, max(0, batch - 1), batch}))
        self.restore()
        self.progress.skipped, self.progress.rollbacks = out, old.rollbacks + 1
        for p in self.network.parameters():
            p.grad = None
        if self.processes.first:
            say(
                f"step {step}: {problem}; rolled back to step {self.progress.step}, batches "
                f"{max(0, batch - 1)}-{batch} are skipped ({old.rollbacks + 1} of at most "
                f"{self.recipe.safety.most_rollbacks})"
            )
        if metrics:
            metrics.rewind(
                self.progress.step,
                {
                    "event": "rollback",
                    "at_step": step,
                    "problem": problem,
                    "to_step": self.progress.step,
                    "skipped": list(out),
                },
            )


class _Metrics:
    """metrics.jsonl: a line a step, and a line an event. Lines of steps that are to be made again are taken out."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self._cut(step)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def _cut(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run
            if row.get("step", row.get("to_step", 0)) <= step:
                kept.append(line)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(k + "\n" for k in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def rewind(self, step: int, event: dict[str, Any]) -> None:
        self.file.close()
        self._cut(step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.write(event)

    def close(self) -> None:
        self.file.close()


def _link(source: Path, target: Path) -> None:
    """target becomes source's content at once: a second name for the same file, or a copy where that is impossible."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def write_release(out: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Everything of the model folder but the weights."""
    write_config(out, config)
    tokenizer.config["model_max_length"] = config.max_position_embeddings
    tokenizer.save(out)
