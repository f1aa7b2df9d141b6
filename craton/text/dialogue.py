"""What a model writes beside its answer: thinking and tool calls, in the format that its chat template shows.

Nothing here is written for one family. The template renders probe messages; what it puts around the probes is the
format, which then gives both the grammar that the model is held to and the parser of what it wrote. A template that
knows no tools is told of them in a system message, in Hermes' format.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from craton.base import UserError
from craton.text.calls import HERMES, ID, ID_PATTERN, CallFormat
from craton.text.messages import text_of
from craton.text.tokenizer import Tokenizer

_THINKING = [(m, f"{m[0]}/{m[1:]}") for m in ("<think>", "[THINK]", "<seed:think>", "<thinking>")]  # <x> and </x>
_NAMES, _KEY, _ID = ("probe_first", "probe_second"), "probe_key", "a1B2c3D4e"
_QUESTION, _ANSWER = {"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe answer"}
_SPACES = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}  # as json.dumps or compact
_HERMES = (
    "You may call functions to answer. They are described in <tools></tools>, one JSON object a "
    "line:\n<tools>\n{tools}\n</tools>\n"
    'For each call write <tool_call>\n{{"name": "FUNCTION", "arguments": {{...}}}}\n</tool_call>'
)


@dataclass(frozen=True)
class Dialogue:
    """How one model's conversations look."""

    tokenizer: Tokenizer
    thinking: tuple[str, str] | None
    calls: CallFormat
    turn_end: int | None  # the special token after an answer

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        thinking: bool | None = None,
        effort: str | None = None,
        prefix: str | None = None,
        more: dict[str, Any] | None = None,
    ) -> tuple[str, bool]:
        """Messages and tools in OpenAI's shape -> the prompt, and whether it leaves the model thinking. thinking: None
        is the template's default. prefix: how the answer begins. more: for the template. UserError if the template
        refuses."""
        more = dict(more or {})
        if thinking is not None:
            more |= {"enable_thinking": thinking, "thinking": thinking}
        if effort:
            more["reasoning_effort"] = effort
        special = self.tokenizer.chat_template.special if self.tokenizer.chat_template else {}
        for name in ("self", "messages", "tools", "add_generation_prompt", "documents", *special):
            if name in more:
                raise UserError(f"chat_template_kwargs: {name} cannot be set there", field="chat_template_kwargs")
        shown = [self._message(m) for m in messages]
        if tools and not self.calls.native:
            text = _HERMES.format(tools="\n".join(json.dumps(t["function"], ensure_ascii=False) for t in tools))
            if shown and shown[0]["role"] == "system":
                shown[0] = {**shown[0], "content": f"{shown[0]['content']}\n\n{text}"}
            else:
                shown.insert(0, {"role": "system", "content": text})
        prompt = self.tokenizer.render_chat(shown, tools if tools and self.calls.native else None, True, **more)
        opened = False
        if self.thinking:
            begin, end = self.thinking
            opened = prompt.rstrip().endswith(begin)
            if thinking is False or (prefix and opened):
                if opened:
                    prompt, opened = f"{prompt.rstrip()}\n\n{end}\n\n", False
                elif thinking is False and end not in prompt[-len(end) - 8 :]:
                    prompt += f"{begin}\n\n{end}\n\n"
        return prompt + (prefix or ""), opened

    def _message(self, m: dict[str, Any]) -> dict[str, Any]:
        out = {k: v for k, v in m.items() if v is not None}
        if "content" in out:  # no template here takes pictures yet
            out["content"] = text_of(out["content"])
        if out["role"] == "developer":
            out["role"] = "system"
        calls = out.get("tool_calls")
        if self.calls.native:
            out.setdefault("content", "")
            if calls and not self.calls.as_text:
                out["tool_calls"] = [{**c, "function": {**c["function"], "arguments": _object(c)}} for c in calls]
            return out
        if calls:
            text = "\n".join(
                f'<tool_call>\n{{"name": {json.dumps(c["function"]["name"])}, "arguments": '
                f"{c['function']['arguments']}}}\n</tool_call>"
                for c in calls
            )
            return {"role": "assistant", "content": "\n".join(filter(None, (out.get("content"), text)))}
        if out["role"] == "tool":
            return {"role": "user", "content": f"<tool_response>\n{out.get('content', '')}\n</tool_response>"}
        out.setdefault("content", "")
        return out

    def show_special(self, tools: bool) -> tuple[int, ...]:
        """Special tokens that the parser must see."""
        f = self.calls
        marks = (f.opening, f.middle, f.closing, f.between or "") if tools else ()
        shown = {t for text in (*(self.thinking or ()), *marks) for t in self.tokenizer.encode_rendered(text)}
        return tuple(sorted(shown & self.tokenizer.special_ids))

    def grammar(
        self, tools: dict[str, dict[str, Any]], choice: str, parallel: bool, schema: str | None = None
    ) -> str:
        """Lark grammar of an answer: text (or JSON by the schema) or calls. tools: schemas of arguments by name.
        choice: "auto" or "required"."""
        f = self.calls
        opening = f.opening.split(ID)[0]
        bodies = " | ".join(
            f"{self._lark(json.dumps(n)[1:-1] + f.middle)} %json {json.dumps({**p, 'x-guidance': _SPACES})}"
            for n, p in tools.items()
        )
        more = f"({self._lark(f.between)} body)*" if parallel and f.between is not None else ""
        tail = f"body {more} {self._lark(f.closing)}"
        lines = [f"body: {bodies}"]
        if choice == "required":
            lines.append(f"start: {self._lark(f.opening)} {tail}")
        elif schema is not None:
            lines += [
                f"start: answer | {self._lark(f.opening)} {tail}",
                f"answer: %json {json.dumps({**json.loads(schema), 'x-guidance': {'whitespace_flexible': False}})}",
            ]
        else:  # the opening as text, or as the tokens that text cannot contain
            trigger = "".join(c if c.isalnum() or ord(c) > 127 else f"\\x{ord(c):02X}" for c in opening)
            tokens = f" | TEXT? {self._lark(f.opening)} {tail}" if self._added(opening) else ""
            lines += [
                f"start: TEXT | pre {self._lark(f.opening[len(opening) :])} {tail}{tokens}",
                f"TEXT: /(?s:.*)/ & ~/(?s:.*){trigger}(?s:.*)/",
                f"pre[lazy]: /(?s:.*){trigger}/",
            ]
        return "\n".join(lines)

    def _added(self, text: str) -> dict[str, int]:
        """Added tokens whose names are in a text."""
        return {t.content: i for i, t in self.tokenizer.backend.get_added_tokens_decoder().items() if t.content in text}

    def _lark(self, text: str) -> str:
        """A literal text in Lark; added tokens by number too, since some are never spelled out."""
        names = self._added(text)
        pieces = re.split("(" + "|".join(map(re.escape, [*sorted(names, key=len, reverse=True), ID])) + ")", text)
        out = []
        for p in filter(None, pieces):
            quoted = json.dumps(p, ensure_ascii=False)
            out.append(f"/{ID_PATTERN}/" if p == ID else f"(<[{names[p]}]> | {quoted})" if p in names else quoted)
        return " ".join(out)


def _object(call: dict[str, Any]) -> Any:
    try:
        return json.loads(call["function"]["arguments"] or "{}")
    except json.JSONDecodeError:
        message = f"messages: the arguments of tool call {call.get('id')!r} are not JSON"
        raise UserError(message, field="messages") from None


# ---- learning the format from the template ----------------------------------------------------------------------


def learn(tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> Dialogue:
    """The format of a tokenizer's chat template, for a model that ends its turns with one of end_ids. UserError if it
    has no template."""
    if tokenizer.chat_template is None:
        raise UserError("tokenizer_config.json: no chat_template, so this model cannot chat")
    source = tokenizer.chat_template.source
    thinking = next((m for m in _THINKING if m[1] in source), None)
    ends = [text for i in end_ids if (text := tokenizer.backend.id_to_token(i))]
    return Dialogue(tokenizer, thinking, _learn_calls(tokenizer, thinking, ends) or HERMES, _turn_end(tokenizer))


def _turn_end(tokenizer: Tokenizer) -> int | None:
    try:
        text = tokenizer.render_chat([_QUESTION, _ANSWER], None, False)
    except UserError:
        return None
    after = tokenizer.encode_rendered(text.rpartition("probe answer")[2].lstrip())
    return after[0] if after and after[0] in tokenizer.special_ids else None


def _specials(tokenizer: Tokenizer, text: str) -> list[str]:
    """The special tokens in a text, in order."""
    ids = [i for i in tokenizer.encode_rendered(text) if i in tokenizer.special_ids]
    return [str(tokenizer.backend.id_to_token(i)) for i in ids]


def _learn_calls(tokenizer: Tokenizer, thinking: tuple[str, str] | None, ends: list[str]) -> CallFormat | None:
    parameters = {"type": "object", "properties": {_KEY: {"type": "string"}}}
    functions = [{"name": n, "description": "-", "parameters": parameters} for n in _NAMES]
    tools = [{"type": "function", "function": f} for f in functions]

    def rendered(names: tuple[str, ...], as_text: bool) -> str | None:
        arguments = [{_KEY: n + " value"} for n in names]
        calls = [
            {"id": _ID, "type": "function", "function": {"name": n, "arguments": json.dumps(a) if as_text else a}}
            for n, a in zip(names, arguments, strict=True)
        ]
        try:
            return tokenizer.render_chat([_QUESTION, {**_ANSWER, "content": "", "tool_calls": calls}], tools, False)
        except UserError:
            return None

    try:
        start = tokenizer.render_chat([_QUESTION], tools, True)
        if not all(n in start for n in _NAMES):
            return None
        answer = tokenizer.render_chat([_QUESTION, _ANSWER], tools, False)
    except UserError:
        return None
    if thinking and start.rstrip().endswith(thinking[0]):
        start = start.rstrip().removesuffix(thinking[0])
    tail = answer.rpartition("probe answer")[2]
    turn_ends = {*ends, *([tail.strip()] if tail.strip() else []), *_specials(tokenizer, tail)[:1]}
    for as_text in (False, True):
        one = rendered(_NAMES[:1], as_text)
        if one is None or not one.startswith(start):
            continue
        found = _cut(one[len(start) :], _NAMES[:1])
        if found is None:
            continue
        (opening, middle), closing = found[0], found[-1][0]
        if thinking:
            opening = re.sub(re.escape(thinking[0]) + r"\s*" + re.escape(thinking[1]) + r"\s*", "", opening)
        closing = closing[: min((at for e in turn_ends if (at := closing.find(e)) >= 0), default=len(closing))].rstrip()
        two = rendered(_NAMES, as_text)
        both = _cut(two[len(start) :], _NAMES) if two and two.startswith(start) else None
        between = both[1][0] if both else None
        return CallFormat(opening, middle, closing, between, True, as_text)
    return None


def _cut(text: str, names: tuple[str, ...]) -> list[tuple[str, str]] | None:
    """[(text before a name, text between it and its arguments)..., (what follows the last, "")]."""
    out, at = [], 0
    for name in names:
        place = text.find(name, at)
        key = text.find(f'"{_KEY}"', place)
        begin = text.rfind("{", place, key) if place >= 0 and key >= 0 else -1
        if begin < 0:
            return None
        try:
            value, length = json.JSONDecoder().raw_decode(text[begin:])
        except json.JSONDecodeError:
            return None
        if value != {_KEY: name + " value"}:
            return None
        out.append((text[at:place].replace(_ID, ID), text[place + len(name) : begin].replace(_ID, ID)))
        at = begin + length
    out.append((text[at:].replace(_ID, ID), ""))
    return out
