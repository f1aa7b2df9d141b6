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
from typing import Any

from craton.base import UserError, nearest
from craton.tasks.rows import Row
from craton.tasks.task import Formulation, Task

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


def _addition(style: str) -> Maker:
    def make(r: random.Random, digits: int) -> Row:
        a, b = _operands(r, digits)
        if style == "reversed":  # the last digit first, as it is computed (arXiv 2307.03381)
            return _row(f"{a}+{b}=", str(a + b)[::-1])
        return _row(f"{a}+{b}=", a + b, _column_sums(a, b) if style == "scratchpad" else "")

    return make


def _multiplication(style: str) -> Maker:
    def make(r: random.Random, digits: int) -> Row:
        a, b = _operands(r, digits)
        if style == "reversed":
            return _row(f"{a}*{b}=", str(a * b)[::-1])
        parts = [f"{a}*{d}{'0' * i}={a * int(d) * 10**i}" for i, d in enumerate(str(b)[::-1])]
        return _row(f"{a}*{b}=", a * b, " ; ".join([*parts, str(a * b)]) if style == "scratchpad" else "")

    return make


def _parity(scratchpad: bool) -> Maker:
    def make(r: random.Random, bits: int) -> Row:
        given = [r.randrange(2) for _ in range(bits)]
        running = [str(sum(given[: i + 1]) % 2) for i in range(bits)]
        worked = f"{' '.join(running)} ; {running[-1]}" if scratchpad else ""
        return _row(f"{' '.join(map(str, given))} =", running[-1], worked)

    return make


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


def _maps(made_up: bool) -> Maker:
    def make(r: random.Random, size: int) -> Row:
        """A made-up function, to be learned from the shots, or values that follow no function. How often the key was
        among the shots bounds what can be known."""
        symbols = _SYMBOLS[:8] if size <= 4 else _SYMBOLS  # few keys, few symbols: small models learn it in a minute
        keys, given = r.sample(symbols, size), r.sample(symbols, size)
        values = dict(zip(keys, given, strict=True))
        drawn = [(key, r.choice(given)) for key in r.choices(keys, k=32)]  # the same items with and without a function
        shots = [_row(key, values[key] if made_up else other) for key, other in drawn]
        key = r.choice(keys)
        return _row(key, values[key], shots=shots)

    return make


def _hops(scratchpad: bool) -> Maker:
    def make(r: random.Random, hops: int) -> Row:
        """A table of a cycle; the entry so many steps on, at once or with the steps between. Shots ask the same table
        from other starts."""
        ring = r.sample(_SYMBOLS, 6)
        after = dict(zip(ring, ring[1:] + ring[:1], strict=True))
        lines = [f"{a} {b}" for a, b in after.items()]
        r.shuffle(lines)

        def ask(start: str) -> Row:
            steps = [start]
            for _ in range(hops):
                steps.append(after[steps[-1]])
            return _row(start, steps[-1], " ".join(steps[1:]) if scratchpad else "")

        first, *others = r.sample(ring, 6)
        mark = "step by step" if scratchpad else "at once"
        head = "\n".join([*lines, f"{hops} on, {mark}:"]) + "\n"
        return ask(first) | {"head": head, "shots": [ask(start) for start in others]}

    return make


# ---- verifiers: whether an answer is right, for a row -------------------------------------------------------------


def _is_countdown(row: Row, answer: str) -> bool:
    """An expression of just these numbers with that value."""
    if not re.fullmatch(r"[\d+\-*() ]{1,200}", answer) or "**" in answer:
        return False
    if sorted(int(n) for n in re.findall(r"\d+", answer)) != row["numbers"]:
        return False
    try:
        return bool(eval(compile(answer.strip(), "answer", "eval"), {"__builtins__": {}}) == row["target"])
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return False


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
    """make: one row. difficulty: the dial's default, and what it means."""

    summary: str
    make: Maker
    difficulty: int
    dial: str
    verifier: str = ""
    joint: str = ""
    shots: int = 0
    introduction: str = ""


GENERATED: dict[str, Generated] = {
    "addition": Generated("sums", _addition("plain"), 3, "digits"),
    "addition:reversed": Generated("sums, last digit first", _addition("reversed"), 3, "digits"),
    "addition:scratchpad": Generated("sums, column by column", _addition("scratchpad"), 3, "digits", "last"),
    "multiplication": Generated("products", _multiplication("plain"), 2, "digits"),
    "multiplication:reversed": Generated("products, last digit first", _multiplication("reversed"), 2, "digits"),
    "multiplication:scratchpad": Generated("products by parts", _multiplication("scratchpad"), 2, "digits", "last"),
    "parity": Generated("whether ones are odd in number", _parity(False), 8, "bits", joint=" "),
    "parity:scratchpad": Generated("the same, bit by bit", _parity(True), 8, "bits", "last", joint=" "),
    "sorting": Generated("symbols in their order", _sorting, 5, "symbols", joint=" "),
    "edits": Generated("texts reversed, replaced, rotated", _edits, 6, "characters", joint=" "),
    "countdown": Generated("numbers to a target", _countdown, 3, "numbers", "countdown", joint=" "),
    "maze": Generated("the way through a maze", _maze, 3, "cells a side", "maze", joint=" "),
    "dates": Generated("days and weekdays", _dates, 5, "years"),
    "program": Generated("a program from its inputs and outputs", _program, 2, "steps", "program", joint=" "),
    "maps": Generated("a made-up function, from the shots", _maps(True), 6, "keys", joint=" ", shots=16),
    "maps:unrelated": Generated("a control: values without a function", _maps(False), 6, "keys", joint=" ", shots=16),
    "hops": Generated("a table followed some steps, at once", _hops(False), 3, "steps", "", " ", 0, "{{head}}"),
    "hops:scratchpad": Generated(
        "the same with the steps written", _hops(True), 3, "steps", "last", " ", 0, "{{head}}"
    ),
}


def generate(name: str, seed: int, n: int, difficulty: int | None = None) -> list[Row]:
    """n rows of a generated task. The same (seed, n) gives the same rows."""
    g = GENERATED[name]
    dial = g.difficulty if difficulty is None else difficulty
    out = []
    for number in range(n):
        r = random.Random(f"{name.partition(':')[0]}/{seed}/{number}/{dial}")
        out.append(g.make(r, dial) | {"id": number, "where": f"{name}:{number}"})
    return out


def generated_task(name: str, difficulty: int | None = None) -> Task:
    """The task of this name. Its train part has no question of its test part. UserError for an unknown name."""
    if name not in GENERATED:
        raise UserError(f"no generated task {name!r}{nearest(name, GENERATED)}", field="tasks")
    g = GENERATED[name]
    if difficulty is not None and not 1 <= difficulty <= 64:
        raise UserError(f"{name}={difficulty}: the dial ({g.dial}) goes from 1 to 64", field="tasks")

    def parts() -> dict[str, list[Row]]:
        test = generate(name, 1, TEST_ROWS, difficulty)
        asked = {row["question"] for row in test} if "shots" not in test[0] else set()
        train = [row for row in generate(name, 0, TRAIN_ROWS, difficulty) if row["question"] not in asked]
        return {"train": train, "test": test}

    formulation = Formulation("{{question}}", "{{worked}}", joint=g.joint, between="\n")
    scorer = "verified" if g.verifier else "exact"
    title = name if difficulty is None else f"{name}={difficulty}"
    about = dict(kind="generated", licence="none needed", source=f"made by rule, dial {difficulty or g.difficulty}")
    options = {"verifier": g.verifier} if g.verifier else {}
    return Task(
        title, parts, {"generation": formulation}, scorer, "exact_match", shots=g.shots, max_tokens=160, stop=("\n",),
        introduction=g.introduction, options=options, summary=f"{g.summary} ({g.dial}: {g.difficulty})", **about,  # type: ignore[arg-type]
    )  # fmt: skip
