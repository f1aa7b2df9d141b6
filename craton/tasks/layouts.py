"""The layouts that rows are published in, by their fields (published.toml), each turned into the same few: question,
context, choices, gold, answers, and what code is tested with.

A row that is in none of them keeps its own fields. Sources: the data sets' own files, their copies on the hub, and
llm-foundry's evaluation files (query, choices, gold; context, continuation; context, answer; context_options).
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from craton.base import UserError
from craton.tasks.rows import Row
from craton.tasks.task import LETTERS, environment, expression

TABLES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))


def number(value: Any) -> int:
    """A label as an index: 2, "2", "C"."""
    text = str(value).strip()
    return LETTERS.index(text) if len(text) == 1 and text in LETTERS else int(text)


def clean_wikihow(text: str) -> str:
    """HellaSwag's texts without the marks of the pages they come from, as lm-eval does it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def boxed(text: str) -> str:
    r"""What the last \boxed{...} or \fbox{...} of a solution holds; '' without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return ""
    depth, begin = 0, text.find("{", start)
    if begin < 0:
        return text[start:].partition(" ")[2].split("$")[0].strip()
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin + 1 : at]
    return ""


def _column(choices: Any, name: str) -> list[str]:
    """Of choices with labels, which are published as a table or as a list of objects."""
    return list(choices[name]) if isinstance(choices, dict) else [c[name] for c in choices]


def _several(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _with_aliases(answer: dict[str, Any]) -> list[str]:
    return [answer.get("value", answer.get("Value")), *answer.get("aliases", answer.get("Aliases", []))]


def _asked(text: str) -> str:
    """A question without the words that say that it is one."""
    return re.sub(r"\s*\n?(Answer|A):\s*$", "", re.sub(r"^(Question|Q): ", "", text))


FILTERS: dict[str, Callable[..., Any]] = {
    "number": number, "wikihow": clean_wikihow, "boxed": boxed, "several": _several, "with_aliases": _with_aliases,
    "asked": _asked, "texts": lambda c: _column(c, "text"), "labels": lambda c: _column(c, "label"),
}  # fmt: skip
environment().filters.update(FILTERS)
_LISTED = re.compile(r"^\(?([A-Z])[.):] ?(.*)$", re.M)


def _read_query(row: Row) -> Row:
    """llm-foundry's choices: the query is ready to use. Where choices are letters their texts stand in it."""
    query, choices = row["query"], list(row["choices"])
    listed = _LISTED.findall(query)
    letters, texts = [letter for letter, _ in listed], [text.strip() for _, text in listed]
    if len(listed) == len(choices) and letters == list(LETTERS[: len(listed)]) and choices in (letters, texts):
        question = query[: _LISTED.search(query).start()].strip()  # type: ignore[union-attr]
        question = re.sub(r"\n(Choices|Options):$", "", question)
        choices = texts
    else:
        question = re.sub(r"\s*\n\s*(Answer|A):\s*$", "", query).strip()
    context = ""
    if m := re.match(r"(?:Passage|Context): (.*)\n(?:Question|Q): (.*)$", question, re.S):
        context, question = m[1], m[2]
    out = {"question": re.sub(r"^(Question|Q): ", "", question), "context": context, "choices": choices}
    out |= {"query": re.sub(r"[ \t]+$", "", query), "written_choices": list(row["choices"])}
    return out | {"gold": number(row["gold"])}


@dataclass(frozen=True)
class Layout:
    """fields: those that tell it. when: what is true besides. written: an expression for each common field."""

    name: str
    fields: str
    when: str
    written: dict[str, str]

    def missing(self, row: Row) -> list[str]:
        """Fields that a row lacks."""
        return [word for word in self.fields.split() if not any(name in row for name in word.split("|"))]

    def fits(self, row: Row) -> bool:
        """Whether a row is in this layout."""
        return not self.missing(row) and (not self.when or bool(expression(self.when)(row)))

    @cached_property
    def _expressions(self) -> dict[str, Callable[[Row], Any]]:
        return {field: expression(text) for field, text in self.written.items()}

    def read(self, row: Row) -> Row:
        """A row with the common fields over its own. UserError names file, row and what is wrong with it."""
        if missing := self.missing(row):
            raise UserError(f"{row['where']}: no field {missing[0]!r}", field=missing[0])
        try:
            found = {field: make(row) for field, make in self._expressions.items()}
            found |= _read_query(row) if self.name == "query" else {}
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(f"{row['where']}: a field holds what it cannot ({error})") from None
        gold, choices = found.get("gold", row.get("gold")), found.get("choices")
        if gold is not None and choices is not None and not 0 <= gold < len(choices):
            raise UserError(f"{row['where']}: the right choice is number {gold} of {len(choices)}", field="gold")
        group = row.get("group") or str(found.pop("group", ""))
        return row | found | ({"group": group} if group else {})


LAYOUTS = [Layout(t.pop("name"), t.pop("fields"), t.pop("when", ""), t) for t in [dict(t) for t in TABLES["layouts"]]]


def layout_of(row: Row) -> Layout | None:
    """The layout that a row is in; None where it is in none."""
    return next((layout for layout in LAYOUTS if layout.fits(row)), None)
