"""Rows of people's data files as samples: a prompt and its answer, a better and a worse one, an answer and whether it
was good, or a prompt alone.

Read are the shapes that others write: OpenAI's messages, ShareGPT's conversations, Alpaca's instructions, prompt and
completion, plain text, preference pairs with the prompt apart or at the beginning of both, and labelled answers.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from craton.base import UserError, read_text
from craton.tasks.rows import Row, iterate_file, iterate_stream
from craton.tasks.task import Task
from craton.text.messages import parts_of

Messages = list[dict[str, Any]]
Said = str | Messages  # a text as it is, or messages that go through the chat template
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
_SHAREGPT |= {"bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system"}
_SHAREGPT |= {"tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "call"}
_LABELS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Sample:
    """prompt: what comes before the answers. answer: the one that is learned; for pairs the better one. form: the shape
    that the row has. row: of a task, for its scorer."""

    where: str
    form: str
    prompt: Said
    answer: Said | None = None
    worse: Said | None = None
    good: bool | None = None
    tools: Messages = field(default_factory=list)
    row: Row = field(default_factory=dict)

    @property
    def chats(self) -> bool:
        """Whether it goes through the chat template."""
        return not isinstance(self.prompt, str)


def _fail(row: Row, name: str, problem: str) -> UserError:
    return UserError(f"{row['where']}: {name} {problem}", field=name)


# ---- messages ---------------------------------------------------------------------------------------------------


def checked_messages(row: Row, name: str, value: Any) -> Messages:
    """Messages in OpenAI's shape, contents in parts. UserError names row and field."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a column of a table
        try:
            value = json.loads(value)
        except ValueError:
            raise _fail(row, name, "is text that is no JSON") from None
    if not isinstance(value, list) or not value:
        raise _fail(row, name, f"is {_short(value)}, must be a list of messages")
    return [_message(row, f"{name}[{i}]", m) for i, m in enumerate(value)]


def _message(row: Row, name: str, m: Any) -> dict[str, Any]:
    if not isinstance(m, dict):
        raise _fail(row, name, f"is {_short(m)}, must be an object with role and content")
    if "role" not in m and ("from" in m or "value" in m):
        return _of_sharegpt(row, name, m)
    role = m.get("role")
    if role not in ROLES:
        raise _fail(row, f"{name}.role", f"is {_short(role)}, must be one of {', '.join(ROLES)}")
    content, calls = m.get("content"), m.get("tool_calls")
    if content is not None and not isinstance(content, str | list):
        raise _fail(row, f"{name}.content", f"is {_short(content)}, must be text or a list of parts")
    if content is None and not calls:
        raise _fail(row, f"{name}.content", "is missing")
    out = {k: v for k, v in m.items() if v is not None}
    if isinstance(content, list) and any(isinstance(p, dict) and "value" in p for p in content):
        out, content = _of_parts(row, name, out, content)
        calls = out.get("tool_calls")
    try:
        out["content"] = parts_of(content)
    except (KeyError, TypeError) as error:
        raise _fail(row, f"{name}.content", f"has a part that is none ({error})") from None
    except UserError as error:
        raise UserError(f"{row['where']}: {name}.{error}", field=f"{name}.content") from None
    if calls:
        out["tool_calls"] = [_call(row, f"{name}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return out


def _of_parts(row: Row, name: str, m: dict[str, Any], parts: Messages) -> tuple[dict[str, Any], Messages]:
    """LLaMA-Factory's parts {type, value}: what was thought and called beside what was said."""
    said: Messages = []
    for part in parts:
        kind, value = part.get("type"), part.get("value")
        if not isinstance(value, str):
            raise _fail(row, f"{name}.content", f"has a part that is none ({_short(part)})")
        if kind == "reasoning":
            m["reasoning_content"] = m.get("reasoning_content", "") + value
        elif kind == "tool_call":
            m["tool_calls"] = [*m.get("tool_calls", []), *_written_calls(row, f"{name}.content", value)]
        else:
            said.append({"type": "text", "text": value})
    return m, said


def _written_calls(row: Row, name: str, text: str) -> Messages:
    """A call, or several, that stand as JSON in a text."""
    try:
        made = json.loads(text)
    except ValueError:
        raise _fail(row, name, "is a function_call that is no JSON") from None
    return [_call(row, name, call) for call in (made if isinstance(made, list) else [made])]


def _call(row: Row, name: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _fail(row, name, f"is {_short(call)}, must have function.name and function.arguments")
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**own, "type": "function", "function": {"name": function["name"], "arguments": written}}


def _of_sharegpt(row: Row, name: str, m: dict[str, Any]) -> dict[str, Any]:
    role, value = _SHAREGPT.get(str(m.get("from"))), m.get("value")
    if role is None:
        raise _fail(row, f"{name}.from", f"is {_short(m.get('from'))}, must be one of {', '.join(_SHAREGPT)}")
    if not isinstance(value, str):
        raise _fail(row, f"{name}.value", f"is {_short(value)}, must be text")
    if role != "call":
        return {"role": role, "content": value}
    return {"role": "assistant", "content": "", "tool_calls": _written_calls(row, f"{name}.value", value)}


def _tools(row: Row) -> Messages:
    value = row.get("tools") or []
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError:
            raise _fail(row, "tools", "is text that is no JSON") from None
    if not isinstance(value, list) or not all(isinstance(t, dict) for t in value):
        raise _fail(row, "tools", f"is {_short(value)}, must be a list of functions")
    return [t if "function" in t else {"type": "function", "function": t} for t in value]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- rows -------------------------------------------------------------------------------------------------------


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _fail(row, name, f"is {_short(value)}, must be text" if name in row else "is missing")
    return value


def _said(row: Row, name: str) -> Said:
    """A text, a message or messages."""
    value = row.get(name)
    if isinstance(value, dict):
        value = [value]
    return _text(row, name) if isinstance(value, str) else checked_messages(row, name, value)


def _as_user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _as_assistant(said: Said) -> Messages:
    return [{"role": "assistant", "content": said}] if isinstance(said, str) else said


def _conversation(row: Row, name: str) -> Sample:
    messages = checked_messages(row, name, row[name])
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    while messages[-1]["role"] in ("user", "tool") and any(m["role"] == "assistant" for m in messages):
        messages.pop()  # nothing of it is learned
    if not any(m["role"] == "assistant" for m in messages):
        raise _fail(row, name, "has no message of the assistant, so nothing could be learned from it")
    return Sample(row["where"], name, [], messages, tools=_tools(row))


def _alpaca(row: Row) -> Sample:
    more = row.get("input") or ""
    question = _text(row, "instruction") + (f"\n\n{more}" if more else "")
    before: Messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _fail(row, f"history[{i}]", f"is {_short(pair)}, must be a question and its answer")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return Sample(row["where"], "instruction", before + _as_user(question), _as_assistant(_text(row, "output")))


def _answer_name(row: Row) -> str:
    return next((name for name in ("completion", "response", "answer", "output") if name in row), "completion")


def _completion(row: Row) -> Sample:
    name = _answer_name(row)
    prompt, answer = _said(row, "prompt"), _said(row, name)
    if isinstance(prompt, str) and isinstance(answer, list):
        prompt = _as_user(prompt)
    if not isinstance(prompt, str):
        return Sample(row["where"], f"prompt, {name}", prompt, _as_assistant(answer), tools=_tools(row))
    return Sample(row["where"], f"prompt, {name}", prompt, answer)


def _pair(row: Row) -> Sample:
    better, worse = _said(row, "chosen"), _said(row, "rejected")
    if type(better) is not type(worse):
        raise _fail(row, "rejected", "is of another shape than chosen; give both as text or both as messages")
    prompt: Said = ""
    for name in ("prompt", "messages", "conversations", "question", "instruction"):
        if name in row:
            prompt = _said(row, name)
            break
    else:
        prompt, better, worse = _apart(row, better, worse)
    if isinstance(prompt, list) and isinstance(better, list) and better[: len(prompt)] == prompt:
        better, worse = better[len(prompt) :], worse[len(prompt) :]  # the prompt is in front of both once more
    if isinstance(prompt, list) or isinstance(better, list):
        prompt = _as_user(prompt) if isinstance(prompt, str) else prompt
        better, worse = _as_assistant(better), _as_assistant(worse)
    if better == worse:
        raise _fail(row, "rejected", "is the same as chosen, so nothing can be learned from the pair")
    for name, said in (("chosen", better), ("rejected", worse)):
        if not said:
            raise _fail(row, name, "is empty")
    return Sample(row["where"], "chosen, rejected", prompt, better, worse, tools=_tools(row))


def _apart(row: Row, better: Said, worse: Said) -> tuple[Said, Said, Said]:
    """The prompt that two conversations begin with together, and what is left of each."""
    if isinstance(better, str) or isinstance(worse, str):
        assert isinstance(better, str) and isinstance(worse, str)
        shared = next((i for i, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b), None)
        if shared is None:
            shared = min(len(better), len(worse))
        turn = max(better.rfind(mark, 0, shared) + len(mark) for mark in ("\n\nAssistant:", "\nAssistant:"))
        cut = turn if turn > len("\nAssistant:") else 0
        return better[:cut], better[cut:], worse[cut:]
    same = next(
        (i for i, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b), min(len(better), len(worse))
    )
    while same and better[same - 1]["role"] == "assistant" and same == min(len(better), len(worse)):
        same -= 1
    return better[:same], better[same:], worse[same:]


def _labelled(row: Row) -> Sample:
    name = "kto_tag" if "kto_tag" in row else "label"
    good = _LABELS.get(str(row[name]).lower())
    if good is None:
        raise _fail(row, name, f"is {_short(row[name])}, must be true or false")
    if "messages" in row or "conversations" in row:
        messages = checked_messages(row, "messages", row.get("messages") or row["conversations"])
        if messages[-1]["role"] != "assistant":
            raise _fail(row, "messages", "must end with the assistant's, which is what is labelled")
        return Sample(row["where"], f"messages, {name}", messages[:-1], messages[-1:], good=good, tools=_tools(row))
    plain = _completion(row)
    return Sample(row["where"], f"{plain.form}, {name}", plain.prompt, plain.answer, good=good, tools=plain.tools)


def _prompt_alone(row: Row) -> Sample:
    return Sample(row["where"], "prompt", _said(row, "prompt"), tools=_tools(row), row=row)


def _plain(row: Row) -> Sample:
    text = _text(row, "text")
    if not text.strip():
        raise _fail(row, "text", "is empty")
    return Sample(row["where"], "text", "", text)


# Fields that tell a row's shape, the first that fits; and how it is read.
FORMS: list[tuple[tuple[str, ...], Callable[[Row], Sample]]] = [
    (("chosen", "rejected"), _pair),
    (("kto_tag",), _labelled),
    (("prompt", "completion", "label"), _labelled),
    (("messages", "label"), _labelled),
    (("messages",), lambda row: _conversation(row, "messages")),
    (("conversations",), lambda row: _conversation(row, "conversations")),
    (("conversation",), lambda row: _conversation(row, "conversation")),
    (("instruction", "output"), _alpaca),
    (("prompt", "completion"), _completion),
    (("prompt", "response"), _completion),
    (("prompt", "answer"), _completion),
    (("text",), _plain),
    (("prompt",), _prompt_alone),
]
KNOWN = "; ".join(", ".join(names) for names, _ in FORMS)


def read_row(row: Row) -> Sample:
    """A row as a sample. UserError names file, row and field."""
    own = {k for k in row if k not in ("where", "id", "group")}
    read = next((read for names, read in FORMS if own >= set(names)), None)
    if read is None:
        has = ", ".join(sorted(own)) or "nothing"
        raise UserError(f"{row['where']}: in no shape that is known (it has {has}); known are {KNOWN}")
    return read(row)


def read_samples(paths: Iterable[str]) -> Iterator[Sample]:
    """The samples of files, in order; '-' is what comes in. UserError for the first row that is wrong, for a file
    without any, and for rows of different shapes, which would be learned from differently."""
    forms: dict[str, str] = {}
    for path in paths:
        count = 0
        for sample in _of_file(path):
            count += 1
            kind = kind_of(sample)
            if forms and kind not in forms:
                other, where = next(iter(forms.items()))
                raise UserError(f"{sample.where}: is {kind}, but {where} is {other}; give one kind of rows")
            forms.setdefault(kind, sample.where)
            yield sample
        if not count:
            raise UserError(f"{path}: holds no rows")


def kind_of(sample: Sample) -> str:
    """What can be learned from a sample, in words."""
    if sample.worse is not None:
        return "pairs"
    if sample.good is not None:
        return "labelled answers"
    return "prompts" if sample.answer is None else "answers"


def _of_file(path: str) -> Iterator[Sample]:
    if path == "-":
        yield from map(read_row, iterate_stream())
        return
    if Path(path).suffix in (".txt", ".md"):
        try:
            yield _plain({"where": path, "text": read_text(Path(path))})
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        return
    yield from map(read_row, iterate_file(Path(path)))


def task_samples(task: Task, part: str, chats: bool) -> Iterator[Sample]:
    """The rows of a task's part: what a model is asked, as its score asks it, and the right answer. chats: as a
    conversation, for a model that has a template."""
    name = next(iter(task.formulations))
    f = task.formulations[name]
    for row in task.part(part):
        e = task.example(row, name)
        prompt, target = task.worked(row, f)
        if chats and not task.by_likelihood:
            said: Messages = [{"role": "assistant", "content": target.strip()}]
            yield Sample(row["where"], task.name, list(e.messages), said, row=row)
        else:
            yield Sample(row["where"], task.name, e.prompts[0] if len(e.prompts) == 1 else prompt, target, row=row)
