"""What a preference got for how far it moved the model: the share of answers that write their steps, before and after,
and the divergence from the base, KL(tuned || base) in nats an answer, of the tuned models' own answers.

python recipes/preferences/gained.py TASK BASE ADAPTER...
"""

import sys

import numpy as np

from craton.adapt.rows import Tokens, log_probabilities
from craton.engine.engine import Engine
from craton.engine.model import load_model
from craton.engine.request import Sampling
from craton.tasks.find import find_task

PROMPTS, ANSWERS = 100, 4


def main() -> None:
    task, base = find_task(sys.argv[1]), load_model(sys.argv[2])
    name = next(iter(task.formulations))
    prompts = [base.tokenizer.encode(task.example(row, name).prompts[0]) for row in task.part("test")[:PROMPTS]]
    how = Sampling(task.max_tokens, stop=task.stop, temperature=1.0, n=ANSWERS, seed=1)
    print(f"{'model':<12} {'reward':>7} {'KL':>8} {'gain/KL':>8}")
    start = 0.0
    for path in sys.argv[2:]:
        model = base if path == sys.argv[2] else load_model(sys.argv[2], adapter=path)
        engine = Engine(model.network, model.tokenizer, cache_bytes=256 << 20)
        texts, rewards = list[Tokens](), list[bool]()
        for asked, answers in zip(prompts, engine.generate(prompts, how), strict=True):
            for answer in answers:
                ids = np.array([*asked, *answer.token_ids], np.int32)
                texts.append(Tokens(ids, np.arange(len(ids)) >= len(asked)))
                rewards.append(";" in answer.text)
        moved = log_probabilities(model.network, texts) - log_probabilities(base.network, texts)
        reward, kl = float(np.mean(rewards)), float(moved.mean())
        start = reward if path == sys.argv[2] else start
        worth = f"{(reward - start) / kl:8.3f}" if kl > 1e-3 else f"{'-':>8}"
        print(f"{path.rstrip('/').split('/')[-1]:<12} {reward:7.3f} {kl:8.3f} {worth}")


if __name__ == "__main__":
    main()
