"""Benchmarks by name, rows of the table in published.toml: how they are put into words, how they are scored, where they
come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craton.base import UserError
from craton.tasks.layouts import TABLES, layout_of
from craton.tasks.rows import Row, read_hub, read_parts
from craton.tasks.task import CHOICE, COMPLETION, Formulation, Task
from craton.tasks.translation import articles

ALIASES: dict[str, str] = TABLES["aliases"]


@dataclass(frozen=True)
class Published:
    """A benchmark. hub: data set#configuration."""

    formulations: dict[str, Formulation]
    scorer: str
    metric: str
    summary: str = ""
    licence: str = "unknown"
    hub: str = ""
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    shots: int = 0
    introduction: str = ""

    @property
    def partial(self) -> bool:
        """Whether the choices are beginnings of one continuation."""
        return any(f.context for f in self.formulations.values())


def _published(line: dict[str, Any]) -> Published:
    made = {name: Formulation(**words) for name, words in TABLES["forms"][line["forms"]].items()}
    about = {key: value for key, value in line.items() if key not in ("forms", "stop")}
    return Published(made, **about, stop=tuple(line.get("stop", ())))


PUBLISHED = {name: _published(line) for name, line in TABLES["benchmarks"].items()}
OF_LAYOUT = {
    layout: PUBLISHED[line] if isinstance(line, str) else _published(line)
    for layout, line in TABLES["otherwise"].items()
}


def published_task(name: str, path: Path | None, hub: str = "") -> Task:
    """The benchmark of this name, from a local path or the hub (ORG/NAME or ORG/NAME#CONFIGURATION); a name that is in
    no table takes the layout that the file is in. UserError for a file whose rows cannot be read as such."""
    known = PUBLISHED.get(ALIASES.get(name, name))
    source = str(path or hub or (known.hub if known else ""))
    raw = read_hub(source) if path is None else read_parts(path)
    everything = [row for rows in raw.values() for row in rows]
    if not everything:
        raise UserError(f"{source}: holds no rows")
    if known is PUBLISHED["translation"]:
        return _task(name, known, articles(raw), source)
    if path is not None:
        _add_labels(everything, path)
    _complete(everything)
    layout = layout_of(everything[0])
    if layout is None:
        has = ", ".join(k for k in everything[0] if k not in ("where", "id"))
        fix = "describe them in a .toml file (docs/eval.md)"
        raise UserError(f"{source}: rows are in no layout that is known (they have {has}); {fix}")
    parts = {part: [layout.read(row) for row in rows] for part, rows in raw.items()}
    p = known or OF_LAYOUT[layout.name]
    first = next(row for rows in parts.values() for row in rows)
    if not _suits(p, first):
        fix = f"give the file another name than {name} to have it read as it is"
        raise UserError(f"{source}: its rows ({layout.name}) are not those of {name}; {fix}")
    if known is PUBLISHED["boolq"]:  # whatever the file has
        for row in (row for rows in parts.values() for row in rows):
            right = row["choices"][row["gold"]].lower()
            row.update(choices=["no", "yes"], gold=int(right == "yes"), question=row["question"].rstrip("?"))
    return _task(name, p, parts, source)


def _suits(p: Published, row: Row) -> bool:
    """Whether a row in the common fields has what a benchmark's templates and scorer need."""
    if p.scorer == CHOICE:
        return "choices" in row and ("continuation" in row) == p.partial
    needs = {COMPLETION: "continuation", "code": "tests", "ifeval": "instruction_id_list"}.get(p.scorer, "answers")
    return needs in row and "choices" not in row


def _add_labels(rows: list[Row], path: Path) -> None:
    """PIQA's labels were published in a file beside the questions."""
    beside = path.with_name(path.name.partition(".")[0] + "-labels.lst")
    if not beside.exists() or not all("sol1" in row and "label" not in row for row in rows):
        return
    labels = beside.read_text().split()
    if len(labels) != len(rows):
        raise UserError(f"{beside}: {len(labels)} labels for {len(rows)} rows")
    for row, label in zip(rows, labels, strict=True):
        row["label"] = label


def _complete(rows: list[Row]) -> None:
    """What only the whole file tells: a classification's labels are its choices; LAMBADA's last word is asked for."""
    if all("label" in row and "text" in row and "choices" not in row for row in rows):
        labels = sorted({str(row["label"]) for row in rows})
        for row in rows if 2 <= len(labels) <= 26 else []:
            row.update(question=row["text"], choices=labels, answer=str(row["label"]))
    for row in rows:
        if "text" in row and not set(row) - {"where", "id", "text", "domain"} and " " in str(row["text"]):
            row["context"], _, row["continuation"] = row["text"].rstrip().rpartition(" ")


def _task(name: str, p: Published, parts: dict[str, list[Row]], source: str) -> Task:
    return Task(
        name, parts, p.formulations, p.scorer, p.metric, shots=p.shots, max_tokens=p.max_tokens, stop=p.stop,
        introduction=p.introduction, summary=p.summary, licence=p.licence, source=source,
        kind="choices" if p.scorer in (CHOICE, COMPLETION) else "generation",
    )  # fmt: skip
