"""Tasks of one's own: a TOML file of a few lines, lm-eval's YAML files, and the generators of reasoning-gym."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from craton.base import UserError, nearest, read_text
from craton.tasks.layouts import layout_of, normalise
from craton.tasks.published import OF_LAYOUT
from craton.tasks.rows import Row, read_file
from craton.tasks.scorers import METRIC, SCORERS
from craton.tasks.task import CHOICE, COMPLETION, LETTERS, Formulation, Task, compiled

_TEXTS = "name train dev test prompt target introduction scorer metric documents pattern rubric judge licence summary"
_KEYS = [*_TEXTS.split(), "choices", "shots", "max_tokens", "stop"]
_KNOWN_SCORERS = [CHOICE, COMPLETION, "judge", *(s for s in SCORERS if s not in ("verified", "ifeval"))]
_LIKELIHOOD_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_per_token", "acc_mutual_info")


def read_task(path: Path) -> Task:
    """The task that a TOML file describes. UserError names file and key."""
    try:
        given = tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
    for key, value in given.items():
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, _KEYS)}; known: {', '.join(_KEYS)}", field=key)
        if key in _TEXTS.split() and not isinstance(value, str):
            raise UserError(f"{path}: {key} is {value!r}, must be text", field=key)
        if key in ("shots", "max_tokens") and not (isinstance(value, int) and value >= 0 and value is not True):
            raise UserError(f"{path}: {key} is {value!r}, must be a whole number", field=key)
    if "test" not in given:
        raise UserError(f'{path}: has no test part; add test = "FILE", a path beside this file', field="test")
    files = {part: path.parent / given[part] for part in ("train", "dev", "test") if part in given}
    for part, file in files.items():
        if not file.is_file():
            raise UserError(f"{path}: {part} is {file}, which is no file", field=part)
    folder = path.parent / given["documents"] if "documents" in given else None
    if folder is not None and not folder.exists():
        raise UserError(f"{path}: documents is {folder}, which is not there", field="documents")
    raw: dict[str, list[Row]] = {part: read_file(file) for part, file in files.items()}
    if not raw["test"]:
        raise UserError(f"{files['test']}: holds no rows", field="test")
    return _described(path, given, raw, folder)


def _described(path: Path, given: dict[str, Any], raw: dict[str, list[Row]], folder: Path | None) -> Task:
    found = layout_of(raw["test"][0])
    assumed = OF_LAYOUT[found[0]] if found and "target" not in given and "prompt" not in given else None
    scorer = given.get("scorer") or (assumed.scorer if assumed else CHOICE if "choices" in given else "normalized")
    if scorer not in _KNOWN_SCORERS:
        known = ", ".join(_KNOWN_SCORERS)
        raise UserError(
            f"{path}: scorer is {scorer!r}{nearest(scorer, _KNOWN_SCORERS)}; known: {known}", field="scorer"
        )
    metric = given.get("metric") or (assumed.metric if assumed and "scorer" not in given else METRIC[scorer])
    if scorer == CHOICE and metric not in _LIKELIHOOD_METRICS:
        raise UserError(f"{path}: metric is {metric!r}; known: {', '.join(_LIKELIHOOD_METRICS)}", field="metric")
    if scorer == "regex" and "pattern" not in given:
        raise UserError(f"{path}: scorer regex needs pattern = '...'", field="pattern")
    if scorer == CHOICE and not assumed and "choices" not in given:
        raise UserError(f"{path}: scorer choice needs choices, a list or the name of a field", field="choices")
    if assumed:
        assert found is not None
        parts = {part: [normalise(row, found[1]) for row in rows] for part, rows in raw.items()}
        formulations = assumed.formulations
    else:
        if "prompt" not in given:
            raise UserError(
                f'{path}: has no prompt; add prompt = "...", Jinja over the fields of a row', field="prompt"
            )
        compiled(given["prompt"])
        read = _reader(given, scorer)
        parts = {part: [read(row) for row in rows] for part, rows in raw.items()}
        joint = "" if scorer == "code" or given["prompt"][-1:].isspace() else " "
        name = "cloze" if scorer == CHOICE else scorer if scorer == COMPLETION else "generation"
        formulations = {name: Formulation(given["prompt"], "{{answers[0]}}", joint=joint)}
    stop = given.get("stop", list(assumed.stop) if assumed else ["\n\n"])
    options: dict[str, Any] = {k: given[k] for k in ("pattern", "rubric", "judge") if k in given}
    return Task(
        given.get("name", path.stem), parts, formulations, scorer, metric, shots=given.get("shots", 0),
        max_tokens=given.get("max_tokens", 256), stop=(stop,) if isinstance(stop, str) else tuple(stop),
        introduction=given.get("introduction", ""), options=options, summary=given.get("summary", ""), kind="own",
        licence=given.get("licence", "yours"), source=str(path), documents=folder,
    )  # fmt: skip


def _reader(given: dict[str, Any], scorer: str) -> Callable[[Row], Row]:
    """How a row's target and choices are found. target: a field, or Jinja; choices: a list, or a field."""
    target, choices = given.get("target"), given.get("choices")
    tests = scorer == "code"

    def value_of(row: Row, name: str) -> Any:
        if "{{" in name or "{%" in name:
            return compiled(name).render(**row)
        if name not in row:
            has = ", ".join(k for k in row if k not in ("where", "id"))
            raise UserError(f"{row['where']}: no field {name!r} (it has {has})", field=name)
        return row[name]

    def read(row: Row) -> Row:
        found = row[target] if target in row else value_of(row, target) if target else ""
        out: Row = {}
        if choices is not None:
            listed = value_of(row, choices) if isinstance(choices, str) else choices
            if not isinstance(listed, list) or len(listed) < 2:
                raise UserError(
                    f"{row['where']}: choices are {listed!r}, must be a list of two or more", field="choices"
                )
            texts = [str(c) for c in listed]
            out = {"choices": texts, "gold": _right(row, found, texts)}
        answers = found if isinstance(found, list) else [found]
        out["answers"] = [a if isinstance(a, str) else str(a) for a in answers]
        if tests:
            out |= {"tests": "\n".join(out["answers"]), "before": row.get("before", "")}
        return row | out

    return read


def _right(row: Row, target: Any, choices: list[str]) -> int:
    """Which choice a target names: its text, its number from 0, or its letter."""
    text = str(target).strip()
    if text in choices:
        return choices.index(text)
    if text.isdigit() and int(text) < len(choices):
        return int(text)
    if len(text) == 1 and text in LETTERS[: len(choices)]:
        return LETTERS.index(text)
    raise UserError(f"{row['where']}: the target {text!r} is none of the choices", field="target")


# ---- by adapter -------------------------------------------------------------------------------------------------


def harness_task(path: Path) -> Task:
    """A task file of lm-eval with local data files and templates of Jinja; what needs its Python code is refused."""
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path}: reading lm-eval's files needs pyyaml; pip install 'craton[eval]'") from None
    try:
        given = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        problem = str(error).replace("\n", " ")
        raise UserError(f"{path}: not a task file without Python code ({problem})") from None
    data = (given.get("dataset_kwargs") or {}).get("data_files") or {}
    if given.get("dataset_path") not in ("json", "csv", "parquet") or not isinstance(data, dict):
        raise UserError(
            f"{path}: dataset_path must be json with dataset_kwargs.data_files by split", field="dataset_path"
        )
    names = {"train": "training_split", "dev": "validation_split", "test": "test_split"}
    splits = {part: given.get(name) for part, name in names.items()}
    if not splits["test"]:
        splits["test"] = splits.pop("dev")
    if not splits["test"]:
        raise UserError(f"{path}: has no test part; name one as test_split", field="test_split")
    raw = {part: read_file(path.parent / data[split]) for part, split in splits.items() if split in data}
    text, target = _jinja(given["doc_to_text"]), _jinja(given.get("doc_to_target", ""))
    kind = given.get("output_type", "generate_until")
    out: dict[str, Any] = {"prompt": text, "target": target, "introduction": given.get("description", "")}
    if kind == "multiple_choice":
        wanted = given["doc_to_choice"]
        out |= {"choices": wanted, "scorer": CHOICE}
        raw = {part: [row | {"_choices": _listed(wanted, row)} for row in rows] for part, rows in raw.items()}
        out["choices"] = "_choices"
    elif kind == "loglikelihood":
        out["scorer"] = COMPLETION
    elif kind == "generate_until":
        out["scorer"] = "exact"
        settings = given.get("generation_kwargs") or {}
        out |= {"stop": settings.get("until", ["\n\n"]), "max_tokens": settings.get("max_gen_toks", 256)}
    else:
        raise UserError(f"{path}: output_type {kind} is not known here", field="output_type")
    metrics = [m["metric"] for m in given.get("metric_list", []) if isinstance(m.get("metric"), str)]
    if out["scorer"] == CHOICE and metrics and metrics[-1] in _LIKELIHOOD_METRICS:
        out["metric"] = metrics[-1]
    out |= {"name": given["task"], "shots": given.get("num_fewshot") or 0}
    return _described(path, out, raw, None)


def _jinja(text: Any) -> str:
    """doc_to_...: a template, or the name of a field."""
    return text if "{" in str(text) else "{{" + str(text) + "}}" if text != "" else ""


def _listed(wanted: Any, row: Row) -> list[str]:
    if isinstance(wanted, list):
        return [str(w) for w in wanted]
    if "{" not in wanted:
        return [str(w) for w in row[wanted]]
    inner = wanted.strip().removeprefix("{{").removesuffix("}}")
    environment: Any = compiled("x").environment
    return [str(w) for w in environment.compile_expression(inner)(**row)]


def gym_task(name: str) -> Task:
    """A data set of reasoning-gym, judged by its own verifier."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(f"gym:{name}: needs pip install 'craton[gym]'", field="tasks") from None
    known = list(reasoning_gym.factory.DATASETS)
    if name not in known:
        raise UserError(f"no data set {name!r} in reasoning-gym{nearest(name, known)}", field="tasks")

    def rows(seed: int, n: int) -> list[Row]:
        made = reasoning_gym.create_dataset(name, seed=seed, size=n)
        return [
            {"id": i, "where": f"gym:{name}:{i}", "question": e["question"], "answers": [str(e["answer"])],
             "entry": e, "verify": made.score_answer}
            for i, e in enumerate(made)
        ]  # fmt: skip

    formulation = Formulation("{{question}}\nAnswer:", "{{answers[0]}}")
    return Task(
        f"gym:{name}", lambda: {"train": rows(0, 200), "test": rows(1, 200)}, {"generation": formulation}, "verified",
        "score", stop=("\n",), options={"verifier": "gym"}, kind="generated", source="reasoning-gym",
    )  # fmt: skip
