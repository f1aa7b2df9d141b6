"""What training a decoder takes of memory, said before anything is allocated."""

import torch

from craton.base import UserError, amount, count, free_memory
from craton.model.config import ModelConfig
from craton.train.recipe import Recipe

_SOME = 200 << 20  # bytes, and a tenth of the rest: buffers of libraries, held-out rows, products for a moment


def compiles(recipe: Recipe, device: str) -> bool:
    """Whether blocks are compiled: where it is asked for, and on GPUs for runs that are long enough."""
    enough = device == "cuda" and (recipe.run.steps or 0) >= 1000
    return recipe.run.compile == "on" or (recipe.run.compile == "auto" and enough)


def fixed_bytes(config: ModelConfig, recipe: Recipe, world: int) -> int:
    """Bytes of one process for weights, gradients and optimizer state in fp32."""
    states = 2 if recipe.optimizer.name != "muon" else 1  # of a matrix; AdamW has two, Muon one
    matrices = config.matrix_parameters
    return 4 * (matrices * (2 + states) + (config.parameters - matrices) * 4) // world


def training_bytes(config: ModelConfig, recipe: Recipe, world: int) -> int:
    """Bytes that training adds to one process: the fixed ones, and what the backward pass needs of a piece of a batch.
    (From 2 to 12 layers it was within 15 % of what was used, mostly above.)"""
    kept = config.num_hidden_layers * (2 * config.hidden_size + config.intermediate_size)  # of a token
    size = 2 if recipe.run.precision == "bf16" else 4
    tokens = min(recipe.data.micro_tokens or 8192, recipe.data.batch_tokens or 8192)
    return _SOME + (fixed_bytes(config, recipe, world) + tokens * kept * size) * 11 // 10


def kept_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes that a forward pass on a GPU in bf16 keeps of a token until the backward pass: inputs and outputs of each
    product, and the norms' inputs; uncompiled half as much again."""
    c = config
    heads = (c.num_attention_heads * 2 + c.num_key_value_heads * 2) * c.head_dim
    kept = 2 * c.num_hidden_layers * (4 * c.hidden_size + 2 * heads + 4 * c.intermediate_size)
    return kept if compiles(recipe, "cuda") else kept * 3 // 2


def micro_tokens(config: ModelConfig, recipe: Recipe, world: int, free: int) -> int:
    """Tokens of a forward pass on a GPU: what its memory holds, no more than a batch, whole rows."""
    length = recipe.data.sequence_length or 1
    batch = max(length, (recipe.data.batch_tokens or 1) // world)
    room = max(0, int(0.7 * free) - _SOME - fixed_bytes(config, recipe, world)) // kept_bytes(config, recipe)
    most = min(batch, 131_072, max(length, room))
    pieces = -(-batch // most)
    return max(length, -(-batch // pieces) // length * length)


def recomputes(config: ModelConfig, recipe: Recipe, world: int, free: int) -> bool:
    """Whether a GPU with so many bytes cannot keep what a forward pass leaves for the backward pass."""
    tokens = min(recipe.data.micro_tokens or 8192, recipe.data.batch_tokens or 8192)
    return _SOME + fixed_bytes(config, recipe, world) + tokens * kept_bytes(config, recipe) > 0.9 * free


def free(device: str) -> int:
    """Bytes that this process can have, taken before it has measured anything: what a measurement gave back stays with
    the process and does not count as free again."""
    if device != "cuda":
        return free_memory()
    torch.cuda.empty_cache()  # what a measurement left is free too
    return int(torch.cuda.mem_get_info()[0])


def check(config: ModelConfig, recipe: Recipe, world: int, free: int) -> None:
    """UserError if training such a network takes more than so many bytes."""
    needed = training_bytes(config, recipe, world)
    if needed > free:
        many = f" on each of {world} processes" if world > 1 else ""
        what = f"{config.num_hidden_layers} layers of {config.hidden_size} ({count(config.parameters)} parameters)"
        fix = "give a smaller --depth or data.micro_tokens, or more processes"
        raise UserError(
            f"training {what} needs about {amount(needed, 'B')} of memory{many}, {amount(free, 'B')} are free; {fix}",
            code="memory",
        )
