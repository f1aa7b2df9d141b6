"""Conversations in the shapes that chat templates accept.

Clients send system messages late, two questions in a row, ids in another maker's style; many templates refuse one or
another of these. A refused conversation is tried again in forms that say the same.
"""

import hashlib
import string
from collections.abc import Iterator
from typing import Any

from craton.text.calls import ID_LENGTH

Messages = list[dict[str, Any]]
_LETTERS = string.ascii_letters + string.digits


def forms(messages: Messages) -> Iterator[Messages]:
    """A conversation as it is, then each form that differs from those before it."""
    shown = [messages]
    yield messages
    steps = (_short_ids, _one_call_each, _merged, _late_system_as_user, _system_as_user, _answered)
    for step in steps:
        changed = step(shown[-1])
        if changed != shown[-1]:
            shown.append(changed)
            yield changed


def must_show(messages: Messages) -> list[str]:
    """What a prompt must hold, since a template may leave it out without a word: what the system says, and each of
    several calls."""
    texts = [str(m.get("content") or "").strip() for m in messages if m["role"] == "system"]
    shown = [text.splitlines()[0][:200].strip() for text in texts if text]
    for m in messages:
        calls = m.get("tool_calls") or ()
        for call in calls if len(calls) > 1 else ():
            shown += [text for text in _leaves(call["function"]["arguments"]) if text.strip()]
    return shown


def _leaves(value: Any) -> list[str]:
    """Texts and numbers in the arguments of a call."""
    if isinstance(value, dict | list):
        return [leaf for v in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(v)]
    return [str(value)[:200]] if isinstance(value, str | int) and not isinstance(value, bool) else []


def _short_ids(messages: Messages) -> Messages:
    """Calls' ids of nine letters and digits, as Mistral's templates want."""

    def short(own: str) -> str:
        if len(own) == ID_LENGTH and own.isalnum():
            return own
        number = int.from_bytes(hashlib.sha256(own.encode()).digest()[:8], "little")
        return "".join(_LETTERS[number // len(_LETTERS) ** i % len(_LETTERS)] for i in range(ID_LENGTH))

    out = []
    for m in messages:
        m = dict(m)
        if "tool_calls" in m:
            m["tool_calls"] = [{**c, "id": short(c["id"])} if "id" in c else c for c in m["tool_calls"]]
        if "tool_call_id" in m:
            m["tool_call_id"] = short(m["tool_call_id"])
        out.append(m)
    return out


def _one_call_each(messages: Messages) -> Messages:
    """A message for each call, followed by its result, where one message made several."""
    out: Messages = []
    for i, m in enumerate(messages):
        calls = m.get("tool_calls") or ()
        if len(calls) < 2:
            out.append(m)
            continue
        after = messages[i + 1 :]
        results = {r["tool_call_id"]: r for r in after if r.get("role") == "tool" and "tool_call_id" in r}
        for n, call in enumerate(calls):
            out.append({**m, "tool_calls": [call], **({} if n == 0 else {"content": ""})})
            if result := results.get(call.get("id")):
                out.append(result)
    placed: list[int] = []
    single: Messages = []
    for m in out:  # a result that was moved up is not there twice
        if id(m) not in placed:
            single.append(m)
        placed.append(id(m))
    return single


def _merged(messages: Messages) -> Messages:
    """Neighbours of the same role as one message."""
    out: Messages = []
    for m in messages:
        plain = set(m) <= {"role", "content", "tool_calls", "reasoning_content", "thinking", "name"}
        if name := m.get("name") if plain and m["role"] == "user" else None:
            m = {"role": "user", "content": f"{name}: {m.get('content') or ''}"}
        if plain and m["role"] != "tool" and out and out[-1]["role"] == m["role"]:
            before = out[-1]
            texts = [t for t in (before.get("content"), m.get("content")) if t]
            calls = [*(before.get("tool_calls") or ()), *(m.get("tool_calls") or ())]
            out[-1] = {**before, **m, "content": "\n\n".join(texts), **({"tool_calls": calls} if calls else {})}
        else:
            out.append(m)
    return out


def _late_system_as_user(messages: Messages) -> Messages:
    first = messages[:1]
    rest = [{**m, "role": "user"} if m["role"] == "system" else m for m in messages[1:]]
    return _merged(first + rest)


def _system_as_user(messages: Messages) -> Messages:
    return _merged([{**m, "role": "user"} if m["role"] == "system" else m for m in messages])


def _answered(messages: Messages) -> Messages:
    """Every call has a result, every result a call, and what the user says after a result goes with it."""
    out: Messages = []
    waiting: list[str] = []  # calls without a result
    for m in messages:
        role = m["role"]
        if role != "tool":
            out += [{"role": "tool", "tool_call_id": i, "content": "(no result)"} for i in waiting]
            waiting = [c["id"] for c in m.get("tool_calls") or () if "id" in c]
        elif m.get("tool_call_id") in waiting:
            waiting.remove(m["tool_call_id"])
        elif not out or out[-1]["role"] != "tool":  # of no call
            role, m = "user", {"role": "user", "content": m.get("content") or ""}
        if role == "assistant" and all(o["role"] == "system" for o in out):
            out.append({"role": "user", "content": ""})
        if role == "user" and out and out[-1]["role"] == "tool":
            out[-1] = {**out[-1], "content": f"{out[-1].get('content') or ''}\n\n{m.get('content') or ''}"}
        else:
            out.append(m)
    out += [{"role": "tool", "tool_call_id": i, "content": "(no result)"} for i in waiting]
    return _merged(out)
