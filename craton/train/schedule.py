"""The learning rate over a run, and how a time budget is kept: by moving the run's end, with the decay before it.

Linear warm-up, stable, linear decay (WSD, arXiv 2404.06395). As long as the rate is stable nothing depends on where
the end is, so it can be moved to where the time runs out, whatever else the machine does meanwhile. Each move is an
event in metrics.jsonl and part of a checkpoint's state, so that a resumed run makes the same steps.
"""

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from craton.train.recipe import Recipe

FINISH = 2.2  # seconds that samples, record, report and leaving take on an idle machine
_WINDOW = 12  # steps that a forecast looks back on


@dataclass(frozen=True)
class Schedule:
    """Where the run ends and the decay before it: from step `decay_from`, where the share is `top`, to `steps`."""

    steps: int
    decay_from: int
    top: float = 1.0

    def moved(self, recipe: Recipe, step: int, steps: int) -> "Schedule":
        """The run ends after `steps` instead; `step` of them are made. A decay that has begun goes on from where it
        is."""
        decay = decay_steps(recipe, steps)
        if step <= self.decay_from and steps - decay >= step:
            return Schedule(steps, steps - decay, self.top)
        return Schedule(steps, step, self._falling(recipe, step))

    def _falling(self, recipe: Recipe, step: int) -> float:
        final = recipe.schedule.final_share
        left = min(1.0, (self.steps - step) / max(1, self.steps - self.decay_from))
        return final + (self.top - final) * left

    def share(self, recipe: Recipe, step: int) -> float:
        """Learning rate of a step as a share of the peak."""
        warmup = recipe.schedule.warmup_steps
        warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return min(warm, self._falling(recipe, step))


def decay_steps(recipe: Recipe, steps: int) -> int:
    """Steps that the rate falls over."""
    return max(1, round(recipe.schedule.decay_share * steps))


def planned(recipe: Recipe) -> Schedule:
    """The schedule that a resolved recipe begins with."""
    steps = recipe.run.steps or 1
    return Schedule(steps, steps - decay_steps(recipe, steps))


def _scheduled() -> tuple[float, float]:
    """Seconds that the main thread has run, and that it could have but others did; zeros where the system does not
    say."""
    try:
        ran, waited = Path("/proc/self/schedstat").read_text().split()[:2]
        return int(ran) / 1e9, int(waited) / 1e9
    except (OSError, ValueError):
        return 0.0, 0.0


class Pace:
    """Forecasts how many steps there is time for."""

    def __init__(self, deadline: float, look_steps: float = 0.0):
        """deadline: of the whole command, as time.monotonic() counts. look_steps: steps that a look takes as long as,
        until one was timed."""
        self.deadline, self.look_steps = deadline, look_steps
        self.steps = deque[float](maxlen=_WINDOW)
        self.look = self.save = 0.0  # seconds that the last one took
        self.ran, self.waited = _scheduled()
        self.slow, self.considered = 1.0, 0.0

    def stepped(self, seconds: float) -> None:
        """A step was made. How much slower than alone this process runs is told by its waiting for a processor."""
        self.steps.append(seconds)
        ran, waited = _scheduled()
        if ran - self.ran > 0.5:
            self.slow = min(6.0, 1.0 + (waited - self.waited) / (ran - self.ran))
            self.ran, self.waited = ran, waited

    def steps_for(self, made: int, schedule: Schedule, look_every: int, save_every: int) -> int | None:
        """Steps after which to end, where that differs enough from the schedule; else None. made: steps so far."""
        now = time.monotonic()
        if len(self.steps) < 3 or now - self.considered < max(1.0, 0.02 * (self.deadline - now)):
            return None
        self.considered = now
        left = schedule.steps - made
        looks = max(1, -(-left // look_every))
        saves = max(1, -(-left // save_every))
        each = sorted(self.steps)[len(self.steps) // 2]
        each = max(each, 0.9 * sum(self.steps) / len(self.steps))
        look = self.look or self.look_steps * each
        room = self.deadline - now - FINISH * self.slow - looks * look - saves * self.save
        fitting = max(1, int(room / each))
        if 0.97 * left - 0.5 <= fitting <= 1.05 * left + 1:
            return None
        return made + fitting
