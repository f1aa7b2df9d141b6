"""Demonstrations by someone who is right some of the time: answers to countdown made wrong, others left alone.

python recipes/countdown/noise.py ROWS OUT SHARE
"""

import json
import random
import re
import sys


def wrong(r: random.Random, question: str) -> str:
    """An expression of the same numbers, in the same form, that misses the target."""
    numbers, target = question.removesuffix(" =").split(" make ")
    while True:
        given = numbers.split()
        r.shuffle(given)
        answer = given[0]
        for number in given[1:]:
            answer = f"({answer}{r.choice('+-*')}{number})"
        answer = answer[1:-1]
        if eval(answer) != int(target):  # digits and operators alone, made here
            return answer


def main() -> None:
    rows, out, share = sys.argv[1], sys.argv[2], float(sys.argv[3])
    r = random.Random(0)
    with open(rows, encoding="utf-8") as given, open(out, "w", encoding="utf-8") as made:
        for line in given:
            question, answer = re.fullmatch(r"(.* =) (.*)\n", json.loads(line)["text"]).groups()
            said = wrong(r, question) if r.random() < share else answer
            made.write(json.dumps({"text": f"{question} {said}\n"}) + "\n")


if __name__ == "__main__":
    main()
