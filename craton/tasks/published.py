"""Benchmarks by name, rows of one table: how lm-eval 0.4.13 puts them into words, how they are scored, where they come
from. The letter form of choices beside the cloze form is that of OLMES (arXiv 2406.08446)."""

from dataclasses import dataclass
from pathlib import Path

from craton.base import UserError
from craton.tasks.layouts import layout_of, normalise
from craton.tasks.rows import Row, read_hub, read_parts
from craton.tasks.task import Formulation, Task

_CLOZE = Formulation("Question: {{question}}\nAnswer:")
_LISTED = "{% for c in choices %}{{letters[loop.index0]}}. {{c}}\n{% endfor %}Answer:"
_LETTER = Formulation("Question: {{question}}\n" + _LISTED, choice="{{letter}}")
BOTH = {"cloze": _CLOZE, "letter": _LETTER}
_MMLU = {"cloze": _CLOZE, "letter": Formulation("{{question}}\n" + _LISTED, choice="{{letter}}")}
_READING = Formulation("{{context}}\n\nQuestion: {{question}}\n\nAnswer:", "{{answers[0]}}")
_ABOUT = "{% if group %}The following are multiple choice questions (with answers) about "
_ABOUT += "{{group.replace('_', ' ')}}.\n\n{% endif %}"
_TESTS = "{{test_list | join('\n')}}"
_MBPP = "You are an expert Python programmer, and here is your task: {{question}} Your code should pass these tests:"
_MBPP += f"\n\n{_TESTS}\n[BEGIN]\n"
_COMPLETE = "Complete this Python function. Answer with all of it in a code block.\n\n```python\n{{question}}```"
_SCHEMA = {"partial": Formulation("", "{{continuation}}", context="{{choice}}")}
_COMPLETION = {"completion": Formulation("{{question}}", "{{continuation}}")}
_QUESTION = {"generation": Formulation("Question: {{question}}\nAnswer:", "{{answers[0]}}")}
_WORKED = {"generation": Formulation("Question: {{question}}\nAnswer:", "{{worked}}")}


@dataclass(frozen=True)
class Published:
    """A benchmark. hub: data set and configuration."""

    summary: str
    formulations: dict[str, Formulation]
    scorer: str
    metric: str
    licence: str
    hub: tuple[str, str | None]
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    shots: int = 0
    introduction: str = ""


_ASK = ("Question:", "</s>", "<|im_end|>")  # where an answer to a question ends, as lm-eval has it
_DEF = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_LINE = ("\n", ".", ",")

PUBLISHED: dict[str, Published] = {
    "hellaswag": Published("how an everyday scene goes on", {"cloze": Formulation("{{question}}")}, "choice",
        "acc_norm", "MIT", ("Rowan/hellaswag", None)),
    "arc_easy": Published("school science, the easier questions", BOTH, "choice", "acc_norm", "CC BY-SA 4.0",
        ("allenai/ai2_arc", "ARC-Easy")),
    "arc_challenge": Published("school science, the harder questions", BOTH, "choice", "acc_norm", "CC BY-SA 4.0",
        ("allenai/ai2_arc", "ARC-Challenge")),
    "piqa": Published("which of two ways works", {"cloze": _CLOZE}, "choice", "acc_norm", "AFL-3.0",
        ("baber/piqa", None)),
    "winogrande": Published("whom a blank stands for", _SCHEMA, "choice", "acc", "Apache-2.0",
        ("allenai/winogrande", "winogrande_xl")),
    "wsc273": Published("whom a pronoun stands for (Winograd)", _SCHEMA, "choice", "acc", "CC BY 4.0",
        ("winograd_wsc", "wsc273")),
    "openbookqa": Published("science with common sense",
        {"cloze": Formulation("{{question}}"), "letter": _LETTER}, "choice", "acc_norm", "Apache-2.0",
        ("allenai/openbookqa", "main")),
    "commonsense_qa": Published("everyday knowledge", BOTH, "choice", "acc", "MIT", ("tau/commonsense_qa", None)),
    "siqa": Published("why people do things",
        {"cloze": Formulation("Q: {{context}} {{question}}\nA:")}, "choice", "acc", "CC BY 4.0",
        ("lighteval/siqa", None)),
    "sciq": Published("science exams with a passage",
        {"cloze": Formulation("{{context}}\nQuestion: {{question}}\nAnswer:")}, "choice", "acc_norm", "CC BY-NC 3.0",
        ("allenai/sciq", None)),
    "boolq": Published("yes or no, from a passage",
        {"cloze": Formulation("{{context}}\nQuestion: {{question}}?\nAnswer:")}, "choice", "acc", "CC BY-SA 3.0",
        ("aps/super_glue", "boolq")),
    "winogender": Published("bias: pronouns and occupations", {"cloze": Formulation("{{question}}")}, "choice", "acc",
        "MIT", ("oskarvanderwal/winogender", "all")),
    "mmlu": Published("57 subjects, from school to profession", _MMLU, "choice", "acc", "MIT", ("cais/mmlu", "all"),
        introduction=_ABOUT),
    "lambada": Published("the last word of a passage", _COMPLETION, "completion", "acc", "MIT",
        ("EleutherAI/lambada_openai", "default")),
    "triviaqa": Published("trivia, without a text to look in", _QUESTION, "exact", "exact_match", "Apache-2.0",
        ("mandarjoshi/trivia_qa", "rc.nocontext"), _LINE),
    "squad": Published("an answer from a passage", {"generation": _READING}, "f1", "f1", "CC BY-SA 4.0",
        ("rajpurkar/squad", None), ("\n",), 64),
    "gsm8k": Published("word problems of school arithmetic", _WORKED, "numeric", "exact_match", "MIT",
        ("openai/gsm8k", "main"), _ASK, shots=5),
    "math": Published("competition mathematics",
        {"generation": Formulation("Problem: {{question}}\nAnswer:", "{{worked}}")}, "math", "exact_match", "MIT",
        ("EleutherAI/hendrycks_math", "algebra"), ("Problem:",), 512, 4),
    "humaneval": Published("Python functions from their docstrings",
        {"generation": Formulation("{{question}}", "{{code}}", joint="", chat=_COMPLETE)}, "code", "pass@1", "MIT",
        ("openai/openai_humaneval", None), _DEF, 512),
    "mbpp": Published("short Python programs", {"generation": Formulation(_MBPP, "{{code}}\n[DONE]", joint="")},
        "code", "pass@1", "CC BY 4.0", ("google-research-datasets/mbpp", "full"), ("[DONE]",), 512, 3),
    "ifeval": Published("instructions that code can check",
        {"generation": Formulation("{{question}}", joint="")}, "ifeval", "prompt_level_strict_acc", "Apache-2.0",
        ("google/IFEval", None), (), 1024),
    "translation": Published("the Universal Declaration of Human Rights, article by article",
        {"generation": Formulation("{{from}}: {{question}}\n{{to}}:", "{{answers[0]}}")}, "chrf", "chrf",
        "public domain", ("", None), ("\n",), 512, 3),
}  # fmt: skip

ALIASES = {"openbook_qa": "openbookqa", "obqa": "openbookqa", "lambada_openai": "lambada", "csqa": "commonsense_qa"}
ALIASES |= {"trivia_qa": "triviaqa", "winograd_wsc": "wsc273", "social_iqa": "siqa", "hendrycks_math": "math"}
ALIASES |= {"minerva_math": "math", "human_eval": "humaneval", "arc_c": "arc_challenge", "arc_e": "arc_easy"}

# How a layout is put into words where the name has no row above: as it is written.
OF_LAYOUT: dict[str, Published] = {
    "choices": Published("", BOTH, "choice", "acc", "unknown", ("", None)),
    "schema": Published("", _SCHEMA, "choice", "acc", "unknown", ("", None)),
    "query": Published("", {"cloze": Formulation("{{query}}")}, "choice", "acc", "unknown", ("", None)),
    "bigbench": Published("", {"cloze": Formulation("{{question}}")}, "choice", "acc", "unknown", ("", None)),
    "completion": Published("", _COMPLETION, "completion", "acc", "unknown", ("", None)),
    "open": Published("", _WORKED, "normalized", "exact_match", "unknown", ("", None), ("\n\n", "Question:")),
    "pair": Published("", _QUESTION, "normalized", "exact_match", "unknown", ("", None), ("\n\n", "Question:")),
}
_SAME = {"hellaswag": "hellaswag", "reading_choices": "boolq", "reading": "squad", "winogender": "winogender"}
_SAME |= {"math": "math", "humaneval": "humaneval", "mbpp": "mbpp", "ifeval": "ifeval", "trivia": "triviaqa"}
_SAME |= {"gsm8k": "gsm8k"}
OF_LAYOUT |= {layout: PUBLISHED[name] for layout, name in _SAME.items()}


def published_task(name: str, path: Path | None, hub: str = "") -> Task:
    """The benchmark of this name, from a local path or the hub (ORG/NAME or ORG/NAME#CONFIGURATION); a name that is in
    no table takes the layout that the file is in. UserError for a file whose rows cannot be read as such."""
    known = PUBLISHED.get(ALIASES.get(name, name))
    if path is None:
        data, _, configuration = hub.partition("#")
        raw = read_hub(data, configuration or None) if known is None or hub else read_hub(*known.hub)
    else:
        raw = read_parts(path)
    raw = _completed(raw, path)
    if labels := _labels(raw):
        raw = {
            p: [r | {"question": r["text"], "choices": labels, "answer": str(r["label"])} for r in rows]
            for p, rows in raw.items()
        }
    first = next(row for rows in raw.values() for row in rows[:1]) if any(raw.values()) else None
    if first is None:
        raise UserError(f"{path or name}: holds no rows")
    if known is PUBLISHED["translation"]:
        from craton.tasks.translation import articles

        return _task(name, known, articles(raw), str(path))
    found = layout_of(first)
    if found is None:
        has = ", ".join(k for k in first if k not in ("where", "id"))
        fix = "describe them in a .toml file (docs/eval.md)"
        raise UserError(f"{path or name}: rows are in no layout that is known (they have {has}); {fix}")
    layout, read = found
    if known is not None and not _suits(known, layout):
        fix = f"give the file another name than {name} to have it read as it is"
        raise UserError(f"{path or name}: its rows ({layout}) are not those of {name}; {fix}")
    if layout == "query" and known is None:
        raw = {part: [normalise(r, read) for r in rows] for part, rows in raw.items()}
        parts = {part: [r | {"choices": r["written_choices"]} for r in rows] for part, rows in raw.items()}
        return _task(name, OF_LAYOUT[layout], parts, str(path))
    parts = {part: [normalise(row, read) for row in rows] for part, rows in raw.items()}
    source = str(path or hub or (known.hub[0] if known else ""))
    return _task(name, known or OF_LAYOUT[layout], _spoken(parts, known), source)


def _suits(known: Published, layout: str) -> bool:
    """Whether rows of a layout can be put to a benchmark's templates."""
    if known.scorer == "choice":
        partial = known.formulations is _SCHEMA
        return (layout == "schema") == partial and layout in (*_CHOICES, "schema")
    if known.scorer == "completion":
        return layout == "completion"
    if known.scorer in ("code", "ifeval"):
        return layout == "ifeval" if known.scorer == "ifeval" else layout in ("humaneval", "mbpp")
    return layout in ("open", "pair", "trivia", "reading", "gsm8k", "math")


_CHOICES = ("choices", "query", "hellaswag", "reading_choices", "winogender", "bigbench")


def _completed(raw: dict[str, list[Row]], path: Path | None) -> dict[str, list[Row]]:
    """Rows with what was published apart: PIQA's labels in a file beside, LAMBADA's last word in its text."""
    rows = [row for part in raw.values() for row in part]
    beside = path.with_name(path.name.partition(".")[0] + "-labels.lst") if path is not None else None
    if beside is not None and beside.exists() and all("sol1" in row and "label" not in row for row in rows):
        labels = beside.read_text().split()
        if len(labels) != len(rows):
            raise UserError(f"{beside}: {len(labels)} labels for {len(rows)} rows")
        for row, label in zip(rows, labels, strict=True):
            row["label"] = label
    for row in rows:
        if "text" in row and not set(row) - {"where", "id", "text", "domain"} and " " in str(row["text"]):
            row["context"], _, row["continuation"] = row["text"].rstrip().rpartition(" ")
    return raw


def _labels(raw: dict[str, list[Row]]) -> list[str]:
    """The labels of a classification, {text, label}; none where the rows are something else."""
    rows = [row for part in raw.values() for row in part]
    if not rows or any("label" not in row or "text" not in row or "choices" in row for row in rows):
        return []
    found = sorted({str(row["label"]) for row in rows})
    return found if 2 <= len(found) <= 26 else []


def _spoken(parts: dict[str, list[Row]], known: Published | None) -> dict[str, list[Row]]:
    """BoolQ's choices in lower case, "no" before "yes", whatever the file has."""
    if known is PUBLISHED["boolq"]:
        for row in (r for rows in parts.values() for r in rows):
            right = row["choices"][row["gold"]].lower()
            row.update(choices=["no", "yes"], gold=int(right == "yes"), question=row["question"].rstrip("?"))
    return parts


def _task(name: str, p: Published, parts: dict[str, list[Row]], source: str) -> Task:
    more = dict(stop=p.stop, max_tokens=p.max_tokens, shots=p.shots, introduction=p.introduction)
    kind = "choices" if p.scorer in ("choice", "completion") else "generation"
    about = dict(summary=p.summary, licence=p.licence, source=source, kind=kind)
    return Task(name, parts, p.formulations, p.scorer, p.metric, **more, **about)  # type: ignore[arg-type]
