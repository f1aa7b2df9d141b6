"""Tasks made by rule, without end, each with a dial for how hard it is and a verifier that is exact.

A maker is a pure function of a random generator and the difficulty; a part of a task, of (seed, n). Symbols that stand
for themselves are set apart by spaces, so that a tokenizer keeps them apart too.
"""

import datetime
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from craton.base import UserError, nearest
from craton.tasks.rows import Row
from craton.tasks.task import Formulation, Task
from craton.text.arithmetic import value_of

Maker = Callable[[random.Random, int], Row]
_SYMBOLS = "a b c d e f g h k m n p q r s t u v w x y z".split()
TEST_ROWS, TRAIN_ROWS = 500, 2000


def _row(question: str, answer: Any, worked: str = "", **more: Any) -> Row:
    return {"question": question, "answers": [str(answer)], "worked": worked or str(answer), **more}


def _operands(r: random.Random, digits: int) -> tuple[int, int]:
    low = 10 ** (digits - 1) if digits > 1 else 0
    return r.randrange(low, 10**digits), r.randrange(low, 10**digits)


def _column_sums(a: int, b: int) -> str:
    """Digit by digit from the right, with what is carried: "7+8+0=15 ; 1+2+1=4"."""
    steps, carry = [], 0
    for x, y in itertools.zip_longest(str(a)[::-1], str(b)[::-1], fillvalue="0"):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return " ; ".join([*steps, str(a + b)])


def _addition(r: random.Random, digits: int) -> Row:
    a, b = _operands(r, digits)
    return _row(f"{a}+{b}=", a + b, _column_sums(a, b))


def _multiplication(r: random.Random, digits: int) -> Row:
    a, b = _operands(r, digits)
    parts = [f"{a}*{d}{'0' * i}={a * int(d) * 10**i}" for i, d in enumerate(str(b)[::-1])]
    return _row(f"{a}*{b}=", a * b, " ; ".join([*parts, str(a * b)]))


def _parity(r: random.Random, bits: int) -> Row:
    """Bits are o and i: letters, which tokenizers keep together with the space before them."""
    given = [r.randrange(2) for _ in range(bits)]
    running = ["oi"[sum(given[: i + 1]) % 2] for i in range(bits)]
    question = " ".join("oi"[bit] for bit in given)
    return _row(f"{question} =", running[-1], f"{' '.join(running)} ; {running[-1]}")


def _sorting(r: random.Random, size: int) -> Row:
    given = r.sample(_SYMBOLS, min(size, len(_SYMBOLS)))
    return _row(f"{' '.join(given)} =", " ".join(sorted(given)))


def _edits(r: random.Random, size: int) -> Row:
    text = "".join(r.choice("abcdefgh") for _ in range(size))
    a, b = r.sample("abcdefgh", 2)
    done = {
        f"reverse {text}": text[::-1],
        f"replace {a} by {b} in {text}": text.replace(a, b),
        f"delete {a} in {text}": text.replace(a, "") or "-",
        f"double {text}": text + text,
        f"rotate {text}": text[1:] + text[:1],
        f"count {a} in {text}": str(text.count(a)),
    }
    asked = r.choice(list(done))
    return _row(f"{asked} =", done[asked])


def _countdown(r: random.Random, size: int) -> Row:
    numbers = [r.randint(1, 9) for _ in range(max(2, size))]
    value, words = numbers[0], str(numbers[0])
    for number in numbers[1:]:
        operation = r.choice([o for o in "+-*" if o != "-" or value >= number])
        value = {"+": value + number, "-": value - number, "*": value * number}[operation]
        words = f"({words}{operation}{number})"
    shown = numbers[:]
    r.shuffle(shown)
    question = f"{' '.join(map(str, shown))} make {value} ="
    return _row(question, words[1:-1], numbers=sorted(numbers), target=value)


def _maze(r: random.Random, size: int) -> Row:
    """A perfect maze of size x size, carved depth first; the way from corner to corner as moves."""
    width = 2 * max(2, size) + 1
    grid = [["#"] * width for _ in range(width)]
    path, seen = [(1, 1)], {(1, 1)}
    grid[1][1], way = ".", {(1, 1): ""}
    while path:
        y, x = path[-1]
        moves = [("U", -2, 0), ("D", 2, 0), ("L", 0, -2), ("R", 0, 2)]
        open_ = [m for m in moves if 0 < y + m[1] < width and 0 < x + m[2] < width and (y + m[1], x + m[2]) not in seen]
        if not open_:
            path.pop()
            continue
        name, dy, dx = r.choice(open_)
        to = (y + dy, x + dx)
        grid[y + dy // 2][x + dx // 2] = grid[to[0]][to[1]] = "."
        way[to] = way[(y, x)] + name
        seen.add(to)
        path.append(to)
    grid[1][1], grid[width - 2][width - 2] = "S", "G"
    drawn = ["".join(line) for line in grid]
    return _row("\n".join(drawn) + "\nmoves =", " ".join(way[(width - 2, width - 2)]), grid=drawn)


def _dates(r: random.Random, years: int) -> Row:
    day = datetime.date(2000, 1, 1) + datetime.timedelta(r.randrange(365 * max(1, years)))
    more = r.randint(1, 30 * max(1, years))
    kind = r.randrange(3)
    if kind == 0:
        return _row(f"{day} plus {more} days =", day + datetime.timedelta(more))
    if kind == 1:
        return _row(f"weekday of {day} =", day.strftime("%A"))
    return _row(f"days from {day} to {day + datetime.timedelta(more)} =", more)


OPERATIONS: dict[str, Callable[[int], int]] = {
    "inc": lambda x: x + 1, "dec": lambda x: x - 1, "double": lambda x: 2 * x, "square": lambda x: x * x,
    "negate": lambda x: -x, "half": lambda x: x // 2,
}  # fmt: skip


def execute(program: str, value: int) -> int | None:
    """What a program of the micro language (words of OPERATIONS, left to right) makes of a number; None if it is none,
    or grows without bound."""
    words = program.split()
    for word in words:
        if word not in OPERATIONS or abs(value) > 10**12:
            return None
        value = OPERATIONS[word](value)
    return value if words else None


def _program(r: random.Random, steps: int) -> Row:
    words = [r.choice(list(OPERATIONS)) for _ in range(max(1, steps))]
    inputs = r.sample(range(1, 10), 5)
    cases = [(x, execute(" ".join(words), x)) for x in inputs]
    shown = " , ".join(f"{x} > {y}" for x, y in cases[:3])
    return _row(f"{shown} :", " ".join(words), cases=cases, most=2 * steps + 2)


def _maps(r: random.Random, size: int, made_up: bool = True) -> Row:
    """A made-up function, to be learned from the shots, or values that follow no function. How often the key was among
    the shots bounds what can be known."""
    symbols = _SYMBOLS[:8] if size <= 4 else _SYMBOLS  # few keys, few symbols: small models learn it in a minute
    keys, given = r.sample(symbols, size), r.sample(symbols, size)
    values = dict(zip(keys, given, strict=True))
    drawn = [(key, r.choice(given)) for key in r.choices(keys, k=32)]  # the same items with and without a function
    shots = [_row(key, values[key] if made_up else other) for key, other in drawn]
    key = r.choice(keys)
    return _row(key, values[key], shots=shots)


def _hops(r: random.Random, hops: int) -> Row:
    """A table of a cycle; the entry so many steps on. Shots ask the same table from other starts."""
    ring = r.sample(_SYMBOLS, 6)
    after = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    table = [f"{a} {b}" for a, b in after.items()]
    r.shuffle(table)

    def ask(start: str) -> Row:
        steps = [start]
        for _ in range(hops):
            steps.append(after[steps[-1]])
        return _row(start, steps[-1], " ".join(steps[1:]))

    first, *others = r.sample(ring, 6)
    return ask(first) | {"head": "\n".join([*table, f"{hops} on, "]), "shots": [ask(start) for start in others]}


def _styled(row: Row, style: str) -> Row:
    """A row as it is asked for: with the steps written (scratchpad), the last character first, as digits are computed
    (reversed, arXiv 2307.03381), or the answer alone."""
    answer = row["answers"][0][::-1] if style == "reversed" else row["answers"][0]
    row |= {"answers": [answer], "worked": row["worked"] if style == "scratchpad" else answer}
    for shot in row.get("shots", []):
        _styled(shot, style)
    return row


# ---- verifiers: whether an answer is right, for a row -------------------------------------------------------------


def _is_countdown(row: Row, answer: str) -> bool:
    """An expression of just these numbers with that value."""
    if not re.fullmatch(r"[\d+\-*() ]{1,200}", answer):
        return False
    if sorted(int(n) for n in re.findall(r"\d+", answer)) != row["numbers"]:
        return False
    return value_of(answer) == row["target"]


def _is_way(row: Row, answer: str) -> bool:
    """Moves that lead from S to G, two fields each, through no wall."""
    y, x = 1, 1
    for move in answer.split():
        if move not in ("U", "D", "L", "R"):
            return False
        dy, dx = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}[move]
        if row["grid"][y + dy][x + dx] == "#":
            return False
        y, x = y + 2 * dy, x + 2 * dx
    return bool(row["grid"][y][x] == "G")


def _is_program(row: Row, answer: str) -> bool:
    """A program that gives every output, of the inputs that were not shown too."""
    short = len(answer.split()) <= row["most"]
    return short and all(execute(answer, x) == y for x, y in row["cases"])


def _is_last(row: Row, answer: str) -> bool:
    """The last word of what was written is the answer."""
    words = answer.split()
    return bool(words) and words[-1] == row["answers"][0]


VERIFIERS: dict[str, Callable[[Row, str], bool]] = {
    "countdown": _is_countdown, "maze": _is_way, "program": _is_program, "last": _is_last
}  # fmt: skip


@dataclass(frozen=True)
class Generated:
    """make: one row. difficulty: the dial's default; dial: what it means."""

    summary: str
    make: Maker
    difficulty: int
    dial: str
    verifier: str = ""
    joint: str = " "
    shots: int = 0
    introduction: str = ""


GENERATED: dict[str, Generated] = {
    "addition": Generated("sums", _addition, 3, "digits", joint=""),
    "addition:reversed": Generated("sums, last digit first", _addition, 3, "digits", joint=""),
    "addition:scratchpad": Generated("sums, column by column", _addition, 3, "digits", "last", ""),
    "multiplication": Generated("products", _multiplication, 2, "digits", joint=""),
    "multiplication:reversed": Generated("products, last digit first", _multiplication, 2, "digits", joint=""),
    "multiplication:scratchpad": Generated("products by parts", _multiplication, 2, "digits", "last", ""),
    "parity": Generated("whether ones are odd in number", _parity, 12, "bits"),
    "parity:scratchpad": Generated("the same, bit by bit", _parity, 12, "bits", "last"),
    "sorting": Generated("symbols in their order", _sorting, 5, "symbols"),
    "edits": Generated("texts reversed, replaced, rotated", _edits, 6, "characters"),
    "countdown": Generated("numbers to a target", _countdown, 3, "numbers", "countdown"),
    "maze": Generated("the way through a maze", _maze, 5, "cells a side", "maze"),
    "dates": Generated("days and weekdays", _dates, 5, "years", joint=""),
    "program": Generated("a program from its inputs and outputs", _program, 2, "steps", "program"),
    "maps": Generated("a made-up function, from the shots", _maps, 6, "keys", shots=16),
    "maps:unrelated": Generated("values without a function", partial(_maps, made_up=False), 6, "keys", shots=16),
    "hops": Generated("a table followed at once", _hops, 3, "steps", introduction="{{head}}at once:\n"),
    "hops:scratchpad": Generated(
        "the same, written", _hops, 3, "steps", "last", introduction="{{head}}step by step:\n"
    ),
}


def generate(name: str, seed: int, n: int, difficulty: int | None = None) -> list[Row]:
    """n rows of a generated task. The same (seed, n) gives the same rows."""
    g, (base, _, style) = GENERATED[name], name.partition(":")
    dial = g.difficulty if difficulty is None else difficulty
    out = []
    for number in range(n):
        row = _styled(g.make(random.Random(f"{base}/{seed}/{number}/{dial}"), dial), style)
        out.append(row | {"id": number, "where": f"{name}:{number}"})
    return out


def unasked(test: list[Row], rows: list[Row]) -> list[Row]:
    """Generated rows whose questions are not in the test part, where questions alone make an item."""
    asked = set() if "shots" in test[0] else {row["question"] for row in test}
    return [row for row in rows if row["question"] not in asked]


def generated_task(name: str, difficulty: int | None = None) -> Task:
    """The task of this name. Its train part has no question of its test part. UserError for an unknown name."""
    if name not in GENERATED:
        raise UserError(f"no generated task {name!r}{nearest(name, GENERATED)}", field="tasks")
    g = GENERATED[name]
    if difficulty is not None and not 1 <= difficulty <= 64:
        raise UserError(f"{name}={difficulty}: the dial ({g.dial}) goes from 1 to 64", field="tasks")

    def parts() -> dict[str, list[Row]]:
        test = generate(name, 1, TEST_ROWS, difficulty)
        return {"train": unasked(test, generate(name, 0, TRAIN_ROWS, difficulty)), "test": test}

    return Task(
        name if difficulty is None else f"{name}={difficulty}", parts,
        {"generation": Formulation("{{question}}", "{{worked}}", joint=g.joint, between="\n")},
        "verified" if g.verifier else "exact", "exact_match", shots=g.shots, max_tokens=160, stop=("\n",),
        introduction=g.introduction, options={"verifier": g.verifier} if g.verifier else {},
        summary=f"{g.summary} ({g.dial}: {g.difficulty})", kind="generated", licence="none needed",
        source=f"made by rule, dial {difficulty or g.difficulty}",
    )  # fmt: skip
