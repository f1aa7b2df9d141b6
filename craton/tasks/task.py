"""A task: what a model is to do, and how one sees whether it did it.

One object gives the prompts of an evaluation, with worked examples before them (shots), the rows of a fine-tuning run,
rewards, scores, and the text that a corpus must not contain.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from craton.base import UserError
from craton.tasks.rows import Row

PARTS = ("train", "dev", "test")
CHOICE, COMPLETION = "choice", "completion"  # scorers by likelihood; the others look at what was written
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Formulation:
    """One way to put a task into words. prompt, target, context: Jinja over a row; in `choice` (and `target`) also
    `choice`, the text of one, `letter` and `number`.

    joint: what stands between prompt and continuation. context: where it is given each choice has a prompt of its own,
    and what is scored is the one target (partial evaluation, arXiv 1806.02847).
    """

    prompt: str
    target: str = ""
    choice: str = "{{choice}}"
    context: str = ""
    joint: str = " "
    between: str = "\n\n"  # shots
    chat: str = ""  # the prompt where it is put through a chat template, if that is to be another


@dataclass(frozen=True)
class Example:
    """What is asked once, ready to be put to a model. prompts: one, or one a choice. choices: continuations as they are
    scored. gold: which is right. targets: answers that count as right. messages: the same as a conversation."""

    id: str | int
    prompts: tuple[str, ...]
    choices: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()  # of the choices, without what joins them to the prompt
    gold: int | None = None
    targets: tuple[str, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    group: str = ""
    row: Row = field(default_factory=dict)


@dataclass
class Task:
    """parts: rows of "train", "dev" and "test", or a function that reads them at first use. formulations: by name; all
    are tried, and the best counts. shots: worked examples by default. neutral: the prompt without the question, for
    scores that are normalised by what a choice is worth by itself."""

    name: str
    parts: dict[str, list[Row]] | Callable[[], dict[str, list[Row]]]
    formulations: dict[str, Formulation]
    scorer: str
    metric: str
    shots: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    introduction: str = ""  # Jinja over a row, before the shots
    neutral: str = "Answer:"
    options: dict[str, Any] = field(default_factory=dict)  # of the scorer
    summary: str = ""
    kind: str = "file"
    licence: str = "unknown"
    source: str = ""
    documents: Path | None = None

    @property
    def by_likelihood(self) -> bool:
        """Whether given continuations are scored, rather than written ones."""
        return self.scorer in (CHOICE, COMPLETION)

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Of each part that there is."""
        return self.parts if isinstance(self.parts, dict) else self.parts()

    def part(self, name: str) -> list[Row]:
        """The rows of a part. UserError if there are none."""
        rows = self.rows.get(name, [])
        if not rows:
            has = ", ".join(p for p in PARTS if self.rows.get(p)) or "nothing"
            raise UserError(f"task {self.name}: has no {name} part ({has}); name a file for it", field=name)
        return rows

    def items(self, limit: int | None = None) -> list[Row]:
        """The rows that are scored: the first `limit` of the test part."""
        return self.part("test")[:limit]

    def shots_for(self, row: Row, shots: int, seed: int) -> list[Row]:
        """The worked examples before a row: its own where it brings some; else of its group in the train part, or dev,
        the first ones where a group has its own few, else drawn by seed, the same for all rows; else of the test part,
        never the row itself."""
        if shots == 0:
            return []
        if "shots" in row:
            if len(row["shots"]) < shots:
                raise UserError(
                    f"task {self.name}: {shots} shots, but its rows bring {len(row['shots'])}", field="shots"
                )
            return row["shots"][:shots]
        pool, drawn = self._pool(row.get("group", ""))
        if len(pool) <= shots and pool is self.rows.get("test"):
            raise UserError(f"task {self.name}: {shots} shots, but only {len(pool)} rows to take them from")
        if len(pool) < shots:
            raise UserError(f"task {self.name}: {shots} shots, but its train part has {len(pool)} rows")
        chosen = _draw(len(pool), min(len(pool), shots + 1), seed) if drawn else range(shots)
        return [pool[i] for i in chosen if pool[i] is not row][:shots]

    def _pool(self, group: str) -> tuple[list[Row], bool]:
        part = next((p for p in ("train", "dev") if self.rows.get(p)), None)
        if part is None:
            return self.part("test"), True
        return (self._groups[group], False) if group in self._groups else (self.rows[part], True)

    @cached_property
    def _groups(self) -> dict[str, list[Row]]:
        """The rows that shots come from, by their groups."""
        out: dict[str, list[Row]] = {}
        for row in self.rows.get("train") or self.rows.get("dev") or []:
            if row.get("group"):
                out.setdefault(row["group"], []).append(row)
        return out

    def example(self, row: Row, formulation: str, shots: Sequence[Row] = ()) -> Example:
        """A row as it is put to a model, behind its shots. UserError names the row where a template fails."""
        f = self.formulations[formulation]
        head = self._fill(self.introduction, row)
        worked = [self.worked(shot, f) for shot in shots]
        start = head + "".join(prompt + target + f.between for prompt, target in worked)
        group, gold = str(row.get("group", "")), row.get("gold")
        if f.context:
            prompts = tuple(start + self._choice(f.context, row, i) for i in range(len(row["choices"])))
            target, n = self._fill(f.target, row), len(prompts)
            return Example(row["id"], prompts, (f.joint + target,) * n, (target,) * n, gold, group=group, row=row)
        asked = self._fill(f.prompt, row)
        turns = [(p, target.strip()) for p, target in worked] + [(self._fill(f.chat, row) if f.chat else asked, "")]
        turns[0] = head + turns[0][0], turns[0][1]
        messages = []
        for said, target in turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": target}]
        texts: tuple[str, ...] = ()
        if self.scorer == CHOICE:
            texts = tuple(self._choice(f.choice, row, i) for i in range(len(row["choices"])))
            targets: tuple[str, ...] = (texts[row["gold"]],)
        elif self.scorer == COMPLETION:
            texts = targets = (self._fill(f.target, row),)
            gold = 0
        else:
            targets, gold = tuple(row.get("answers") or (self._fill(f.target, row),)), None
        choices = tuple(f.joint + text for text in texts)
        return Example(
            row["id"], (start + asked,), choices, texts, gold, targets, tuple(messages[:-1]), group=group, row=row
        )

    def plain_text(self, row: Row) -> str:
        """What of a row must not have been seen: its question with the right answer, without instructions."""
        if "question" not in row:
            e = self.example(row, next(iter(self.formulations)))
            return f"{e.prompts[0]} {e.texts[e.gold] if e.gold is not None else ''.join(e.targets[:1])}"
        gold = row.get("gold")
        right = row["choices"][gold] if gold is not None else (row.get("answers") or [""])[0]
        parts = (row.get("context"), row["question"], right, row.get("continuation"))
        return " ".join(str(part) for part in parts if part)

    def worked(self, row: Row, f: Formulation) -> tuple[str, str]:
        """The prompt of a shot, and its right answer with what joins them."""
        if f.context:
            return self._choice(f.context, row, row["gold"]), f.joint + self._fill(f.target, row)
        if self.scorer == CHOICE:
            return self._fill(f.prompt, row), f.joint + self._choice(f.choice, row, row["gold"])
        target = self._fill(f.target, row) if f.target else (row.get("answers") or [""])[0]
        return self._fill(f.prompt, row), f.joint + target

    def _choice(self, template: str, row: Row, number: int) -> str:
        text, letter = row["choices"][number], LETTERS[number % len(LETTERS)]
        return self._fill(template, row, choice=text, letter=letter, number=number)

    def _fill(self, template: str, row: Row, **more: Any) -> str:
        return filled(template, row, "prompt", **more)


def filled(template: str, row: Row, key: str, **more: Any) -> str:
    """A template filled from a row. UserError names the row where that fails."""
    if "{" not in template:
        return template
    alone = _name_alone(template)
    if alone in more or alone in row:  # without Jinja, which takes ten times as long
        return str(more[alone] if alone in more else row[alone])
    try:
        return str(compiled(template).render(row, letters=LETTERS, **more))
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"{row.get('where')}: the template of the task's {key} fails ({error})", field=key) from None


@lru_cache(64)
def _name_alone(template: str) -> str:
    """The name in a template that is {{name}} and nothing else."""
    found = re.fullmatch(r"\{\{\s*(\w+)\s*\}\}", template)
    return found[1] if found else ""


@lru_cache
def environment() -> Any:
    """Jinja that can do no harm and refuses names that a row lacks."""
    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


@lru_cache(64)
def compiled(template: str) -> Any:
    """A Jinja template over a row. UserError if it is wrong."""
    try:
        return environment().from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"prompt: not a Jinja template ({error})", field="prompt") from None


@lru_cache(128)
def expression(text: str) -> Callable[[Row], Any]:
    """A Jinja expression over a row. ValueError where it comes to nothing."""
    made = environment().compile_expression(text, undefined_to_none=False)

    def value(row: Row) -> Any:
        try:
            found = made(row)
        except jinja2.TemplateError as error:
            raise ValueError(str(error)) from None
        if isinstance(found, jinja2.Undefined):
            raise ValueError(f"{text} is not there")
        return found

    return value


@lru_cache(16)
def _draw(size: int, wanted: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(size), wanted))
