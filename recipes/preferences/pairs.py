"""Pairs of answers to the same sums: with steps is preferred to without. CHANCE of them are the other way round.

python recipes/preferences/pairs.py STEPS DIRECT OUT [CHANCE]
"""

import json
import random
import sys
from pathlib import Path


def main() -> None:
    steps, direct, out = sys.argv[1:4]
    chance, r = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0, random.Random(0)
    lines = (Path(path).read_text(encoding="utf-8").splitlines() for path in (steps, direct))
    with open(out, "w", encoding="utf-8") as made:
        for a, b in zip(*lines, strict=True):
            with_steps, without = json.loads(a), json.loads(b)
            assert with_steps["prompt"] == without["prompt"]
            two = [f" {answer['response']}\n" for answer in (with_steps, without)]
            if r.random() < chance:
                two.reverse()
            made.write(json.dumps({"prompt": with_steps["prompt"], "chosen": two[0], "rejected": two[1]}) + "\n")


if __name__ == "__main__":
    main()
