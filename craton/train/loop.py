"""The one training loop: a job's batches and objective, optimizers, schedule, checkpoints, on one process or many.

It does not know what is trained: everything that does is in the job.
"""

import gc
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
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from craton.base import Progress, UserError, amount, count, say, span
from craton.train import checkpoint, memory
from craton.train.distributed import Processes, box, clip_gradients, fill, gathered, local, stored_buffers
from craton.train.job import Job, Kind, Losses, Store, on
from craton.train.loggers import Logger
from craton.train.metrics import Metrics, read_metrics
from craton.train.optim import Optimizers, groups
from craton.train.recipe import Recipe
from craton.train.schedule import Pace, Schedule, planned
from craton.weights.tensorfile import stream_tensors

SPIKE_WINDOW = 64
# Which of PyTorch's attentions is taken, the first that can; on one H200 cuDNN's was the fastest.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass
class RunState:
    """How far a run is: everything besides tensors that the next step depends on."""

    step: int = 0  # updates made
    cursor: int = 0  # next batch
    skipped: tuple[int, ...] = ()  # batches left out for good
    rollbacks: int = 0
    losses: tuple[float, ...] = ()  # the last SPIKE_WINDOW
    seconds: float = 0.0  # spent training, over all resumptions
    steps: int = 0  # after which the run ends; 0: as planned
    decay_from: int = 0
    top: float = 1.0


def build(store: Store, kind: Kind, recipe: Recipe, processes: Processes) -> tuple[Any, Optimizers]:
    """A store's network, each process its part, with the weights that the run begins with; and its optimizers."""
    network = store.build()
    processes.shard(network, store.units(network), store.forwards(network), recipe.run.precision == "bf16")
    fill(network, processes.device, store.rows)
    return network, Optimizers(groups(network, kind, recipe.optimizer), recipe.optimizer)


def accumulate(
    network: nn.Module, parameters: list[nn.Parameter], job: Job, recipe: Recipe, processes: Processes, number: int
) -> dict[str, tuple[float, float]]:
    """Add up the gradient of a batch, piece by piece. Returns the sums and counts of the whole batch by name, 'loss'
    among them; the gradient is still to be divided by the loss's count. Collective."""
    total_groups = job.source.rows // job.source.together
    groups_a_piece = max(1, (recipe.data.micro_tokens or 1) // (job.cost.units * job.source.together))
    pieces, world = processes.pieces(total_groups, groups_a_piece), processes.world
    named: list[str] = []
    figures: list[Tensor] = []
    processes.begin_step()
    for turn in range(0, min(pieces, total_groups), world):
        share = turn + processes.rank
        empty = share >= total_groups  # takes part, so that the others' gradients come together, and adds nothing
        batch = on(job.source.batch(number, 0 if empty else share, pieces, network), processes.device)
        processes.begin_piece(parameters)
        with sdpa_kernel(_ATTENTION, set_priority=True):  # backward too, where blocks are computed again
            with torch.autocast(processes.device, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
                losses = job.objective(network, batch)
            (losses.total * 0.0 if empty else losses.total).backward()
        named = ["loss", *losses.sums]
        figures.append(_figures(losses) * (0.0 if empty else 1.0))
    each = processes.stack(torch.stack(figures)).transpose(0, 1).flatten(0, 1)  # piece after piece
    sums = torch.zeros_like(each[0])
    for piece in each:
        sums += piece
    return {name: (s, c) for name, (s, c) in zip(named, sums.tolist(), strict=True)}


def _figures(losses: Losses) -> Tensor:
    """(1 + sums, 2) fp64, without a gradient."""
    pairs = [(losses.total, losses.count), *losses.sums.values()]
    return torch.stack([torch.stack([s.detach().double(), c.detach().double()]) for s, c in pairs])


class Run:
    """A run in its folder: fresh or resumed, driven by `train`."""

    def __init__(
        self, out: Path, job: Job, recipe: Recipe, processes: Processes, peak: float, deadline: float | None = None
    ):
        """peak: FLOP/s of the machine in a large product. deadline: of a time budget, as time.monotonic() counts."""
        look_steps = (recipe.run.evaluate_tokens or 0) / (recipe.data.batch_tokens or 1) / 2.5  # forward passes only
        self.pace = Pace(deadline, look_steps) if deadline is not None else None
        self.made_before = 0  # steps that were made before an interruption, and are made again just so
        self.moves_before: dict[int, int] = {}  # of the end, in those: at step -> steps
        self.out, self.job, self.recipe, self.processes, self.peak = out, job, recipe, processes, peak
        free = memory.free(processes.device)
        self.network, self.optimizers = build(job.store, job.kind, recipe, processes)
        self.parameters = self.optimizers.parameters
        self.state = RunState()
        self.stopped_by: int | None = None
        self.logger = Logger(recipe.run.logger if processes.first else "none", out)
        if memory.compiles(recipe, processes.device):
            torch._dynamo.config.recompile_limit = 64  # rows of several lengths, with and without gradients
            for unit in job.store.units(self.network):
                for module in unit:
                    module.compile()
        if processes.device == "cuda" and hasattr(self.network, "model"):
            needed = memory.recomputes(self.network.config, recipe, processes.world, free)
            self.network.model.recompute = recipe.run.recompute == "on" or (recipe.run.recompute == "auto" and needed)

    @property
    def units(self) -> int:
        """Of cost, in all steps made."""
        return self.state.step * self.job.source.rows * self.job.cost.units

    @property
    def schedule(self) -> Schedule:
        """As planned, or as it was last moved."""
        state = self.state
        return Schedule(state.steps, state.decay_from, state.top) if state.steps else planned(self.recipe)

    def _move_end(self, steps: int, metrics: Metrics | None) -> None:
        """The run ends after so many steps instead."""
        state, before = self.state, self.schedule
        moved = before.moved(self.recipe, state.step, steps)
        state.steps, state.decay_from, state.top = moved.steps, moved.decay_from, moved.top
        if metrics:
            event = {"event": "end_moved", "at_step": state.step, "to_step": state.step, "from_steps": before.steps}
            metrics.write(event | {"steps": steps, "decay_from": moved.decay_from, "seconds": state.seconds})

    # ---- saving ----

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: what is trained, and buffers."""
        trained = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        return {**trained, **dict(stored_buffers(self.network))}

    def save(self) -> None:
        """Publish a checkpoint and the released folder's weights. Collective."""
        tensors = {"weights": self._tensors(), "optimizer": self.optimizers.state()}
        folder, keep = self.out / "training", self.recipe.run.keep_checkpoints
        path = checkpoint.save(folder, self.state.step, tensors, vars(self.state), self.processes, keep)
        self._release(path)

    def _release(self, path: Path) -> None:
        """The store's file: another name of the checkpoint's file where that holds just the same, else written tensor
        by tensor, none of which is gathered before its turn. Collective."""
        own = {**dict(self.network.named_parameters()), **dict(stored_buffers(self.network))}
        shapes = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in own.items()}
        released = self.job.store.published(shapes)
        name = getattr(self.job.store, "weights_file", "model.safetensors")
        target, temporary = self.out / name, self.out / f".{name}.tmp"
        same = {n: t.shape for n, t in released.items()} == {n: t.shape for n, t in self._tensors().items()}
        problem = None
        if same and self.processes.world == 1:
            _link(path / "weights-00000.safetensors", target)
            return
        source = {ext: name for name, t in shapes.items() for ext in self.job.store.published({name: t})}
        held: dict[str, Tensor] = {}
        left = sorted(released)

        def get(ext: str) -> Tensor:
            left.remove(ext)
            name = source[ext]
            if name not in held:
                held.clear()
                held[name] = gathered(own[name])
            return self.job.store.published({name: held[name]})[ext]

        if self.processes.first:
            try:
                stream_tensors(temporary, released, get)
                os.replace(temporary, target)
            except OSError as error:
                problem = error.strerror or str(error)
        for ext in list(left):  # the others take part in gathering, and all of them where writing failed
            get(ext)
        if problem := self.processes.agree(problem):
            raise UserError(f"{target}: cannot be written ({problem}); free some space and go on with --resume")

    def restore(self) -> bool:
        """Go to the newest valid checkpoint, or to the start when there is none. Returns whether there was one."""
        path, refused = checkpoint.newest_valid(self.out / "training", self.processes)
        if self.processes.first:
            for line in refused:
                say(line)
        if path is None:
            fill(self.network, self.processes.device, self.job.store.rows)
            self.optimizers.clear()
            self.state = RunState(skipped=self.state.skipped, rollbacks=self.state.rollbacks)
            return False
        with checkpoint.Checkpoint(path) as opened:
            self._take_up(opened)
            known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in opened.state.items()}
        self.state = RunState(**known)
        return True

    @torch.no_grad()
    def _take_up(self, opened: checkpoint.Checkpoint) -> None:
        """Weights and optimizer state, each process its part. UserError if they are another network's."""
        own, names = self._tensors(), opened.names("weights")
        if set(own) != set(names):
            raise UserError(f"{opened.path}: holds other tensors than the recipe's model")
        for name, tensor in own.items():
            shape = tuple(tensor.shape)
            if shape != names[name]:
                raise UserError(f"{opened.path}: tensor {name} has shape {names[name]}, the recipe says {shape}")
            if local(tensor).numel():
                local(tensor).copy_(opened.read("weights", name, box(tensor)))
        self.optimizers.load(opened.names("optimizer"), lambda name, where: opened.read("optimizer", name, where))

    # ---- training ----

    def train(self) -> None:
        """Run to the recipe's last step. Raises Interrupted after a signal, UserError when it gives up."""
        every = self.recipe.run.checkpoint_every or 1
        line = Progress()
        previous = {s: signal.signal(s, self._stop) for s in _STOPPING if signal.getsignal(s) is not signal.SIG_IGN}
        self._remember()
        metrics = Metrics(self.out / "metrics.jsonl", self.state.step) if self.processes.first else None
        if self.processes.device == "cuda":  # what is there stays: collecting it again and again would hold up launches
            gc.collect()
            gc.freeze()
        began, times = time.monotonic() - self.state.seconds, deque[float](maxlen=20)
        try:
            while self.state.step < self.schedule.steps:
                start = time.perf_counter()
                row = self._step(line, metrics)
                if row is None:
                    continue
                self.state.seconds = time.monotonic() - began
                times.append(time.perf_counter() - start)
                stop, end = self.processes.agree((self.stopped_by, self._end(times[-1])))
                if end is not None:
                    self._move_end(end, metrics)
                self._report(row, line, metrics, sum(times) / len(times))
                last = self.state.step >= self.schedule.steps
                if self.state.step % every == 0 or last or stop is not None:
                    start = time.perf_counter()
                    self.save()
                    if self.pace:
                        self.pace.save = time.perf_counter() - start
                if stop is not None and not last:
                    raise Interrupted(signal.Signals(stop).name)
        finally:
            line.clear()
            gc.unfreeze()
            for s, handler in previous.items():
                signal.signal(s, handler)
            if metrics:
                metrics.close()
            self.logger.close()

    def _remember(self) -> None:
        """What an interrupted run did after the checkpoint that this one goes on from."""
        rows = read_metrics(self.out / "metrics.jsonl")
        self.made_before = max((r["step"] for r in rows if "step" in r), default=0)
        moves = [r for r in rows if r.get("event") == "end_moved" and r["at_step"] > self.state.step]
        self.moves_before = {r["at_step"]: r["steps"] for r in moves}

    def _end(self, seconds: float) -> int | None:
        """Steps after which to end from now on, None for no change. seconds: of the step just made."""
        step, run = self.state.step, self.recipe.run
        if step <= self.made_before:
            return self.moves_before.get(step)
        if self.pace is None:
            return None
        self.pace.stepped(seconds)
        return self.pace.steps_for(step, self.schedule, run.evaluate_every or 1, run.checkpoint_every or 1)

    def _step(self, line: Progress, metrics: Metrics | None) -> dict[str, Any] | None:
        """One update; its figures. None if it was not made, and the run is back at its last checkpoint."""
        state = self.state
        while state.cursor in state.skipped:
            state.cursor += 1
        sums = accumulate(self.network, self.parameters, self.job, self.recipe, self.processes, state.cursor)
        counted = sums["loss"][1]
        if not counted > 0:
            what = f"no position of batch {state.cursor} counts (the sum of weights is {counted:g})"
            raise UserError(f"step {state.step}: {what}; nothing could be learned from it")
        means = {name: s / c if c else math.nan for name, (s, c) in sums.items()}
        norm = clip_gradients(self.parameters, self.recipe.optimizer.clip, 1 / counted)
        if (problem := self._problem(means["loss"], norm)) is not None:
            line.clear()
            self._roll_back(problem, metrics)
            return None
        share = self.schedule.share(self.recipe, state.step)
        self.optimizers.step(share)
        state.step, state.cursor = state.step + 1, state.cursor + 1
        state.losses = (*state.losses, means["loss"])[-SPIKE_WINDOW:]
        figures = {**means, **self.job.further(means)}
        unit = {self.job.cost.unit: self.units, "batch": state.cursor - 1}
        return {"step": state.step, **unit, **figures, "lr_share": share, "gradient_norm": norm}

    def _report(self, row: dict[str, Any], line: Progress, metrics: Metrics | None, seconds: float) -> None:
        """Look at the network now and then; write the step's row down. seconds: a step. Collective."""
        state, run, cost, rows = self.state, self.recipe.run, self.job.cost, self.job.source.rows
        steps, rate = self.schedule.steps, rows * cost.units / seconds
        peak_share = rows * cost.matrix_flops / seconds / self.peak / self.processes.world
        row |= {f"{cost.unit}_per_second": rate, "peak_share": peak_share, "seconds": state.seconds}
        looked = None
        if state.step % (run.evaluate_every or 1) == 0 or state.step >= steps:
            start = time.perf_counter()
            looked = self.job.look(self.network, self.processes)
            row |= looked.figures
            if self.pace:
                self.pace.look = time.perf_counter() - start
        if metrics is None:
            return
        metrics.write(row)
        self.logger.write(row)
        bits = f"{row['bits_per_byte']:.3f} bits/byte  " if "bits_per_byte" in row else ""
        ahead = (steps - state.step) * seconds
        if self.pace and ahead > 0:
            ahead = max(0.0, self.pace.deadline - time.monotonic())
        left, flops = span(ahead), amount(rows * cost.flops / seconds, "FLOP/s")
        speed = f"{count(rate)} {cost.unit}/s  {100 * peak_share:.0f}% of peak  {flops}"
        line.show(f"step {state.step}/{steps}  {left} left  loss {row['loss']:.3f}  {bits}{speed}")
        if looked is not None and looked.line:
            line.clear()
            say(f"step {state.step:>6}  {looked.line}")

    def _stop(self, number: int, _: Any) -> None:
        self.stopped_by = number

    def _problem(self, loss: float, norm: float) -> str | None:
        """Why this step must not be taken, or None. The same on every process: loss and norm are global."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss}, gradient norm {norm}"
        past, sigmas = self.state.losses, self.recipe.safety.spike_sigmas
        if sigmas and len(past) == SPIKE_WINDOW:
            mean = sum(past) / len(past)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in past) / len(past))
            if loss > mean + sigmas * deviation and loss > 1.1 * mean:
                return f"loss {loss:.3f} after {mean:.3f} +- {deviation:.3f}"
        return None

    def _roll_back(self, problem: str, metrics: Metrics | None) -> None:
        """Back to the last checkpoint; this batch and the one before it are left out from now on."""
        old, most = self.state, self.recipe.safety.most_rollbacks
        step, batch = old.step, old.cursor
        if old.rollbacks >= most:
            after = f"given up after {old.rollbacks} rollbacks (safety.most_rollbacks)"
            fix = f"lower the learning rates or look at the data of batch {batch} ('craton corpus trace')"
            raise UserError(f"step {step}: {problem}; {after}; {fix}")
        out = tuple(sorted({*old.skipped, max(0, batch - 1), batch}))
        self.restore()
        self.state.skipped, self.state.rollbacks = out, old.rollbacks + 1
        for p in self.parameters:
            p.grad = None
        if self.processes.first:
            skipped = f"batches {max(0, batch - 1)}-{batch} are skipped ({old.rollbacks + 1} of at most {most})"
            say(f"step {step}: {problem}; rolled back to step {self.state.step}, {skipped}")
        if metrics:
            event = {"event": "rollback", "at_step": step, "problem": problem, "to_step": self.state.step}
            metrics.rewind(self.state.step, event | {"skipped": list(out)})


def _link(source: Path, target: Path) -> None:
    """target becomes source's content at once: a second name for the same file, or a copy where that is impossible."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
