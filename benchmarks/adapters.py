"""Many adapters of one base at once against the base alone: tokens a second, and whether each answer is that of the
adapter by itself.

python benchmarks/adapters.py MODEL [--adapters 40] [--rank 8] [--tokens 48] [--rounds 3] [--out FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from craton.base import write_json
from craton.engine.model import load_model
from craton.engine.request import Sampling
from craton.model.lora import LoraSpec, shape_of, targets_of
from craton.weights.adapter import CONFIG, WEIGHTS


def made_up(network, folder: Path, rank: int, seed: int) -> None:
    """An adapter of every linear layer, in bf16, strong enough to change answers."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in targets_of(network, ()):
        rows, cols = shape_of(network.get_submodule(name))
        a = torch.randn(rank, cols, generator=generator) / cols**0.5
        b = 0.02 * torch.randn(rows, rank, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
    save_file(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"})


def answers(engine, prompts, names, tokens: int) -> tuple[list[list[int]], float]:
    """Greedy tokens of each request, and seconds."""
    engine.forget()
    how = Sampling(tokens, 0.0, ignore_eos=True)
    began = time.perf_counter()
    numbers = [engine.add(p, how, adapter=name) for p, name in zip(prompts, names, strict=True)]
    found = engine._run(numbers)
    return [c[0].token_ids for c in found], time.perf_counter() - began


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("model")
    for name, default in (("adapters", 40), ("rank", 8), ("tokens", 48), ("rounds", 3)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--out", type=Path)
    a = arguments.parse_args()
    model = load_model(a.model)
    engine = model.engine
    with tempfile.TemporaryDirectory() as scratch:
        names = [f"a{i}" for i in range(a.adapters)]
        for i, name in enumerate(names):
            made_up(model.network, Path(scratch) / name, LoraSpec(rank=a.rank).rank, i)
            engine.load_adapter(name, Path(scratch) / name)
    text = "The history of the bridge over the river begins with"
    prompts = [model.tokenizer.encode(f"{text} the year {1500 + 7 * i}") for i in range(a.adapters)]
    base, own = list[float](), list[float]()
    together: list[list[int]] = []
    for _ in range(a.rounds):
        plain, seconds = answers(engine, prompts, [None] * a.adapters, a.tokens)
        base.append(a.adapters * a.tokens / seconds)
        together, seconds = answers(engine, prompts, names, a.tokens)
        own.append(a.adapters * a.tokens / seconds)
    alone = [answers(engine, [p], [n], a.tokens)[0][0] for p, n in zip(prompts, names, strict=True)]
    ratio = statistics.median(o / b for o, b in zip(own, base, strict=True))
    result = {"adapters": a.adapters, "rank": a.rank, "base_tokens_per_second": base, "adapters_tokens_per_second": own}
    result |= {"ratio": round(ratio, 3), "as_alone": sum(x == y for x, y in zip(together, alone, strict=True))}
    result |= {"unlike_the_base": sum(x != y for x, y in zip(together, plain, strict=True))}
    result |= {"threads": torch.get_num_threads(), "model": Path(a.model).name}
    print(json.dumps(result))
    if a.out:
        write_json(a.out, result)


if __name__ == "__main__":
    main()
