"""Tasks of one's own: a TOML file of a few lines, lm-eval's YAML files, and the generators of reasoning-gym."""

import tomllib
from pathlib import Path
from typing import Any

from craton.base import UserError, nearest, read_text
from craton.tasks.layouts import layout_of
from craton.tasks.published import OF_LAYOUT
from craton.tasks.rows import Row, read_file
from craton.tasks.scorers import METRIC, SCORERS
from craton.tasks.task import CHOICE, COMPLETION, LETTERS, Formulation, Task, compiled, expression, filled

_TEXTS = "name train dev test prompt target introduction scorer metric documents pattern rubric judge licence summary"
_KEYS: dict[str, Any] = dict.fromkeys(_TEXTS.split(), str) | {"choices": str | list, "stop": str | list}
_KEYS |= {"shots": int, "max_tokens": int}
_WHAT = {str: "text", int: "a whole number", str | list: "a list or text"}
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
        if not isinstance(value, _KEYS[key]) or (_KEYS[key] is int and (value < 0 or value is True)):
            raise UserError(f"{path}: {key} is {value!r}, must be {_WHAT[_KEYS[key]]}", field=key)
    if "test" not in given:
        raise UserError(f'{path}: has no test part; add test = "FILE", a path beside this file', field="test")
    files = {key: path.parent / given[key] for key in ("train", "dev", "test", "documents") if key in given}
    folder = files.pop("documents", None)
    for part, file in files.items():
        if not file.is_file():
            raise UserError(f"{path}: {part} is {file}, which is no file", field=part)
    if folder is not None and not folder.exists():
        raise UserError(f"{path}: documents is {folder}, which is not there", field="documents")
    raw: dict[str, list[Row]] = {part: read_file(file) for part, file in files.items()}
    if not raw["test"]:
        raise UserError(f"{files['test']}: holds no rows", field="test")
    return _described(path, given, raw, folder)


def _described(path: Path, given: dict[str, Any], raw: dict[str, list[Row]], folder: Path | None) -> Task:
    def need(true: bool, field: str, problem: str) -> None:
        if not true:
            raise UserError(f"{path}: {problem}", field=field)

    layout = layout_of(raw["test"][0]) if "target" not in given and "prompt" not in given else None
    assumed = OF_LAYOUT[layout.name] if layout else None
    scorer = given.get("scorer") or (assumed.scorer if assumed else CHOICE if "choices" in given else "normalized")
    known = f"{nearest(scorer, _KNOWN_SCORERS)}; known: {', '.join(_KNOWN_SCORERS)}"
    need(scorer in _KNOWN_SCORERS, "scorer", f"scorer is {scorer!r}{known}")
    metric = given.get("metric") or (assumed.metric if assumed and "scorer" not in given else METRIC[scorer])
    known = ", ".join(_LIKELIHOOD_METRICS)
    need(scorer != CHOICE or metric in _LIKELIHOOD_METRICS, "metric", f"metric is {metric!r}; known: {known}")
    need(scorer != "regex" or "pattern" in given, "pattern", "scorer regex needs pattern = '...'")
    need(
        scorer != CHOICE or assumed is not None or "choices" in given, "choices",
        "scorer choice needs choices, a list or the name of a field",
    )  # fmt: skip
    if layout and assumed:
        parts = {part: [layout.read(row) for row in rows] for part, rows in raw.items()}
        formulations = assumed.formulations
    else:
        need("prompt" in given, "prompt", 'has no prompt; add prompt = "...", Jinja over the fields of a row')
        compiled(given["prompt"])
        parts = {part: [_read(row, given, scorer) for row in rows] for part, rows in raw.items()}
        joint = "" if scorer == "code" or given["prompt"][-1:].isspace() else " "
        name = "cloze" if scorer == CHOICE else scorer if scorer == COMPLETION else "generation"
        formulations = {name: Formulation(given["prompt"], "{{answers[0]}}", joint=joint)}
    stop = given.get("stop", list(assumed.stop) if assumed else ["\n\n"])
    return Task(
        given.get("name", path.stem), parts, formulations, scorer, metric, shots=given.get("shots", 0),
        max_tokens=given.get("max_tokens", 256), stop=(stop,) if isinstance(stop, str) else tuple(stop),
        introduction=given.get("introduction", ""), summary=given.get("summary", ""), kind="own",
        options={key: given[key] for key in ("pattern", "rubric", "judge") if key in given},
        licence=given.get("licence", "yours"), source=str(path), documents=folder,
    )  # fmt: skip


def _read(row: Row, given: dict[str, Any], scorer: str) -> Row:
    """A row with its answers, choices and tests. target: a field, or Jinja; choices: a list, or a field."""
    found = _value(row, given["target"]) if given.get("target") else ""
    answers = [str(a) for a in found] if isinstance(found, list) else [str(found)]
    out: Row = {"answers": answers}
    if "choices" in given:
        listed = _value(row, given["choices"]) if isinstance(given["choices"], str) else given["choices"]
        if not isinstance(listed, list) or len(listed) < 2:
            raise UserError(f"{row['where']}: choices are {listed!r}, must be a list of two or more", field="choices")
        out["choices"] = [str(c) for c in listed]
        out["gold"] = _right(row, found, out["choices"])
    if scorer == "code":
        out |= {"tests": "\n".join(answers), "before": row.get("before", "")}
    return row | out


def _value(row: Row, name: str) -> Any:
    if name not in row and ("{{" in name or "{%" in name):
        return filled(name, row, "target")
    if name not in row:
        has = ", ".join(k for k in row if k not in ("where", "id"))
        raise UserError(f"{row['where']}: no field {name!r} (it has {has})", field=name)
    return row[name]


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
    kind = given.get("output_type", "generate_until")
    scorers = {"multiple_choice": CHOICE, "loglikelihood": COMPLETION, "generate_until": "exact"}
    if kind not in scorers:
        raise UserError(f"{path}: output_type {kind} is not known here", field="output_type")
    text, target = _jinja(given["doc_to_text"]), _jinja(given.get("doc_to_target", ""))
    out: dict[str, Any] = {"prompt": text, "target": target, "introduction": given.get("description", "")}
    out |= {"scorer": scorers[kind], "name": given["task"], "shots": given.get("num_fewshot") or 0}
    if kind == "multiple_choice":
        out["choices"] = "_choices"
        for row in (row for rows in raw.values() for row in rows):
            row["_choices"] = _listed(given["doc_to_choice"], row)
        metrics = [m["metric"] for m in given.get("metric_list", []) if m["metric"] in _LIKELIHOOD_METRICS]
        out |= {"metric": metrics[-1]} if metrics else {}
    if kind == "generate_until":
        settings = given.get("generation_kwargs") or {}
        out |= {"stop": settings.get("until", ["\n\n"]), "max_tokens": settings.get("max_gen_toks", 256)}
    return _described(path, out, raw, None)


def _jinja(text: Any) -> str:
    """doc_to_...: a template, or the name of a field."""
    return text if "{" in str(text) else "{{" + str(text) + "}}" if text != "" else ""


def _listed(wanted: Any, row: Row) -> list[str]:
    """doc_to_choice: a list, a template that makes one, or the name of a field."""
    if isinstance(wanted, str):
        try:
            wanted = expression(wanted.strip().removeprefix("{{").removesuffix("}}"))(row)
        except ValueError as error:
            raise UserError(f"{row['where']}: doc_to_choice fails ({error})", field="doc_to_choice") from None
    return [str(w) for w in wanted]


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
