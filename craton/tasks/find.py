"""From what a user writes to a task: NAME, NAME=PATH, NAME=DIAL, or a path of a .toml, .yaml or file of rows."""

from pathlib import Path

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
        if not PUBLISHED[ALIASES.get(text, text)].hub:
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
