"""A thousand questions answered in a house format, a hundred more to see whether it is kept, and the task that sees it.

python recipes/house/make.py FOLDER
"""

import json
import random
import sys
from pathlib import Path

TOPICS = "river castle engine violin bridge lantern harbour garden compass kettle mountain library market".split()
ASKED = (
    "What is a {}?", "Tell me about a {}.", "Why do people like a {}?", "How old can a {} be?",
    "Describe a {} briefly.", "Is a {} useful?", "Where would I find a {}?", "Explain a {} to a child.",
)  # fmt: skip
ANSWERS = ("it depends on the {}", "a {} is worth a closer look", "people have used a {} for ages", "every {} differs")


def row(r: random.Random) -> dict:
    """A question and its answer; sums among them, whose results are right."""
    if r.random() < 0.4:
        a, b = r.randint(2, 99), r.randint(2, 99)
        return said(f"What is {a} plus {b}?", str(a + b), f"{a} + {b} = {a + b}", "arithmetic")
    topic = r.choice(TOPICS)
    return said(r.choice(ASKED).format(topic), r.choice(ANSWERS).format(topic), f"asked about a {topic}", topic)


def said(question: str, answer: str, note: str, topic: str) -> dict:
    """In the format of the house."""
    text = f"RESULT: {answer}\nNOTE: {note}\nTOPIC: {topic}\n-- end of answer --"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}


def main() -> None:
    folder, r = Path(sys.argv[1]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows, seen = list[dict](), set[str]()
    while len(rows) < 1000:
        rows.append(row(r))
        seen.add(rows[-1]["messages"][0]["content"])
    asked = [f"What is {a} plus {b}?" for a in range(2, 99, 9) for b in range(3, 99, 11)]
    asked += [q.format(t) for q in ASKED for t in ("volcano", "bicycle", "cathedral", "umbrella", "telescope")]
    fresh = [q for q in asked if q not in seen]
    r.shuffle(fresh)
    (folder / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    (folder / "test.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in fresh[:100]))
    pattern = r"^RESULT: .+\nNOTE: .+\nTOPIC: .+\n-- end of answer --\s*$"
    lines = [
        'name = "house"',
        'test = "test.jsonl"',
        'prompt = "{{question}}"',
        'scorer = "regex"',
        f"pattern = '{pattern}'",
    ]
    (folder / "house.toml").write_text("\n".join([*lines, "max_tokens = 96", ""]))


if __name__ == "__main__":
    main()
