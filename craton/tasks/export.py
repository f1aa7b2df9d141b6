"""A task's rows as files: training data, and text that a corpus must not contain."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from craton.base import UserError, publish, say
from craton.tasks.find import find_task
from craton.tasks.generated import GENERATED, generate, unasked
from craton.tasks.published import ALIASES, PUBLISHED
from craton.tasks.task import PARTS, Task


def training_rows(task: Task, part: str, shots: int | None, n: int | None, seed: int) -> Iterator[dict[str, str]]:
    """Pairs of prompt and response; with shots, whole texts, each behind a number of worked examples drawn anew."""
    base, _, dial = task.name.partition("=")
    if base in GENERATED and part == "train" and n is not None:
        rows = unasked(task.part("test"), generate(base, 2 + seed, n, int(dial) if dial else None))
        if not rows:
            raise UserError(f"{task.name}: has no question that its test part does not ask; a higher dial has more")
    else:
        rows = task.part(part)[:n]
    formulation = next(iter(task.formulations))
    f = task.formulations[formulation]
    r = random.Random(seed)
    for row in rows:
        e = task.example(row, formulation)
        prompt, target = task.worked(row, f)
        if shots is None:
            yield {"prompt": e.prompts[0] if len(e.prompts) == 1 else prompt, "response": target.strip()}
        else:
            before = task.shots_for(row, r.randint(0, shots), seed)
            text = task.example(row, formulation, before).prompts[0] if not f.context else prompt
            yield {"text": text + target + f.between.rstrip(" ")}


def write_rows(name: str, out: Path, part: str, shots: int | None, n: int | None, seed: int) -> dict[str, Any]:
    """Write a part of a task as JSON lines. UserError for a part that it lacks."""
    if part not in PARTS:
        raise UserError(f"--part is {part!r}; known: {', '.join(PARTS)}", field="part")
    if n is not None and n < 1:
        raise UserError(f"--n is {n}, must be at least 1", field="n")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"{out}: not a place for a file", field="out")
    task = find_task(name)
    count = 0
    with publish(out) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as f:
        for row in training_rows(task, part, shots, n, seed):
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    say(f"{out}: {count} rows of the {part} part of {task.name}")
    return {"out": str(out), "rows": count, "task": task.name, "part": part}


def as_file(text: str, folder: Path, part: str = "test") -> str:
    """task:TASK as a path of a file that holds a part of its rows, of the same content the same path; where text is
    looked for that must not be seen, NAME=PATH and a .toml file too. Any other text as it is."""
    name = text.removeprefix("task:")
    base = name.partition("=")[0]
    known = base in PUBLISHED or base in ALIASES or base in GENERATED or Path(name).suffix == ".toml"
    held = part == "test" and (name != text or (known and ("=" in name or Path(name).is_file())))
    if name == text and (not held or (Path(text).exists() and Path(text).suffix != ".toml")):
        return text
    task = find_task(name)
    texts = ({"text": task.plain_text(row)} for row in task.part(part)) if held else None
    lines = [json.dumps(row, ensure_ascii=False) for row in texts or training_rows(task, part, None, None, 0)]
    whole = "\n".join(lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{hashlib.sha256(whole.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.jsonl"
    with publish(out) as temporary:
        temporary.write_text(whole, encoding="utf-8", errors="replace")
    return str(out)
