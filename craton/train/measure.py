"""How long a step takes: measured with a throw-away network of the same job, on all processes together."""

import time
from collections.abc import Callable
from typing import Any

import torch

from craton.model.config import ModelConfig
from craton.train.distributed import Processes, clip_gradients
from craton.train.loop import build
from craton.train.machine import synchronise
from craton.train.pretrain import ModelFolder, kind
from craton.train.recipe import Recipe


def seconds_a_step(config: ModelConfig, recipe: Recipe, processes: Processes) -> float:
    """The median of a few steps on random tokens. Collective."""
    device = processes.device
    network, optimizers = build(ModelFolder(config, recipe.run.seed), kind, recipe, processes)
    length = recipe.data.sequence_length or 512
    micro = max(1, min(recipe.data.batch_tokens or length, 8192 if device == "cpu" else 32_768) // length)
    rows = max(1, (recipe.data.batch_tokens or length) // length)
    pieces = processes.pieces(rows, micro)
    in_a_piece = -(-rows // pieces)
    ids = torch.randint(config.vocab_size, (in_a_piece, length + 1), device=device)
    weight = torch.ones(in_a_piece, length, device=device)
    turns = -(-min(pieces, rows) // processes.world)
    forward, update = list[float](), list[float]()
    end = time.perf_counter() + 2.0
    while processes.agree(len(forward) < 3 or (time.perf_counter() < end and len(forward) < 20)):
        start = time.perf_counter()
        processes.begin_step()
        with torch.autocast(device, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
            total, _ = network.weighted_nll(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weight)
        total.backward()
        synchronise(device)
        middle = time.perf_counter()
        clip_gradients(optimizers.parameters, 1.0)
        optimizers.step(0.0)
        synchronise(device)
        forward.append(middle - start)
        update.append(time.perf_counter() - middle)
    processes.sums.clear()
    each = turns * sorted(forward)[len(forward) // 2] + sorted(update)[len(update) // 2]
    return float(processes.agree(each))


def together(processes: Processes, plan: Callable[[Callable[[ModelConfig, Recipe], float]], Any]) -> Any:
    """plan(measure) on the first process; the others take part in what it measures. Its result, on all."""
    if processes.mesh is None:
        return plan(lambda config, recipe: seconds_a_step(config, recipe, processes))
    if not processes.first:
        while (asked := processes.agree(None))[0] == "measure":
            seconds_a_step(asked[1], asked[2], processes)
        return asked[1]

    def measure(config: ModelConfig, recipe: Recipe) -> float:
        processes.agree(("measure", config, recipe))
        return seconds_a_step(config, recipe, processes)

    result = None
    try:
        result = plan(measure)
    finally:
        processes.agree(("done", result))
    return result
