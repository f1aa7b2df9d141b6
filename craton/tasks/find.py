"""From what a user writes to a task: NAME, NAME=PATH, NAME=DIAL, or a path of a .toml, .yaml or file of rows."""

from pathlib import Path
from typing import Any

from craton.base import UserError, nearest
from craton.tasks.generated import GENERATED, generated_task
from craton.tasks.memorised import canary_task, memorised_task
from craton.tasks.own import gym_task, harness_task, read_task
from craton.tasks.published import ALIASES, PUBLISHED, published_task
from craton.tasks.task import Task


def find_task(text: str) -> Task:
    """The task that a text names. UserError says what is wrong with it."""
    if text.endswith((".toml", ".yaml", ".yml")):
        return read_task(Path(text)) if text.endswith(".toml") else harness_task(Path(text))
    name, equals, value = text.partition("=")
    if name in GENERATED:
        if value and not value.isdigit():
            raise UserError(f"{text}: the dial of {name} is a whole number ({GENERATED[name].dial})", field="tasks")
        return generated_task(name, int(value) if value else None)
    if text == "canaries":
        return canary_task()
    if name == "memorised":
        return memorised_task(Path(value or "."))
    if name.startswith("gym:"):
        return gym_task(name.removeprefix("gym:"))
    if equals:
        if not name or not value:
            raise UserError(f"{text!r}: write NAME=PATH", field="tasks")
        path = Path(value)
        if value.startswith("hf://"):
            return published_task(name, None, value.removeprefix("hf://"))
        if path.suffix in (".toml", ".yaml", ".yml"):
            task = find_task(value)
            task.name = name
            return task
        return published_task(name, path)
    if Path(text).exists():
        return published_task(Path(text).name.partition(".")[0], Path(text))
    if ALIASES.get(text, text) in PUBLISHED:
        known = PUBLISHED[ALIASES.get(text, text)]
        if not known.hub:
            raise UserError(f"{text}: give its file, as {text}=PATH", field="tasks")
        return published_task(text, None)
    everything = [*PUBLISHED, *ALIASES, *GENERATED]
    fix = "a published name (NAME=PATH for a local file), a generated one, or a .toml file; see craton tasks"
    raise UserError(f"no task {text!r}{nearest(text, everything)}: {fix}", field="tasks")


def find_tasks(texts: str) -> list[Task]:
    """Several, with commas between them. UserError for one that is named twice."""
    tasks = [find_task(text.strip()) for text in texts.split(",") if text.strip()]
    if not tasks:
        raise UserError("--tasks names no task", field="tasks")
    names = [task.name for task in tasks]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"--tasks: two tasks are named {twice}; give one another name, as other=PATH", field="tasks")
    return tasks


def known_tasks() -> list[dict[str, Any]]:
    """Every task that has a name of its own: its kind, metric, size and source."""
    out: list[dict[str, Any]] = []
    for name, p in PUBLISHED.items():
        kind = "choices" if p.scorer == "choice" else p.scorer
        size, source = "the file's", f"hub {p.hub}" if p.hub else "a file"
        about = {"shots": p.shots, "licence": p.licence, "formulations": list(p.formulations)}
        out.append({"name": name, "kind": kind, "metric": p.metric, "size": size, "source": source} | about)
        out[-1]["summary"] = p.summary
    for name, g in GENERATED.items():
        about = {"shots": g.shots, "licence": "none needed", "formulations": ["generation"]}
        source = f"made by rule; {name}=N sets {g.dial}"
        out.append(
            {"name": name, "kind": "generated", "metric": "exact_match", "size": "any", "source": source} | about
        )
        out[-1]["summary"] = g.summary
    more = {"kind": "memorisation", "metric": "acc", "shots": 0, "licence": "the corpus's own"}
    named = (("memorised", "training text word for word (memorised=CORPUS)"), ("canaries", "planted secrets"))
    return out + [{"name": name, "size": "", "source": "", "summary": what} | more for name, what in named]
