"""What a model writes beside its answer: thinking and tool calls, in the format that its chat template shows.

Nothing here is written for one family, but for gpt-oss's channels (harmony.py). The template renders probe messages;
what it puts around the probes is the format, which then gives both the grammar that the model is held to and the parser
of what it wrote. A template that does not tell of tools gets them in a system message; one that knows no calls, Hermes'
format.
"""

import json
import os.path
import re
from dataclasses import dataclass, replace
from typing import Any

from craton.base import UserError
from craton.text import fields, harmony
from craton.text.calls import HERMES, ID, ID_PATTERN, CallFormat, Parser
from craton.text.conform import forms, must_show
from craton.text.harmony import ANALYSIS, END, FINAL, MARKS, HarmonyParser, is_harmony
from craton.text.messages import text_of
from craton.text.tokenizer import Tokenizer

_THINKING = [(m, f"{m[0]}/{m[1:]}") for m in ("<think>", "[THINK]", "<seed:think>", "<thinking>")]  # <x> and </x>
_NAMES, _KEYS, _ID = ("probe_first", "probe_second"), ("probe_key", "probe_other"), "a1B2c3D4e"
_QUESTION, _ANSWER = {"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe answer"}
_SPACES = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}  # as json.dumps or compact
_TOLD = (
    "You may call functions to answer. They are described in <tools></tools>, one JSON object a "
    "line:\n<tools>\n{tools}\n</tools>\n"
    "For each call write {form}"
)
_HERMES_FORM = '<tool_call>\n{"name": "FUNCTION", "arguments": {...}}\n</tool_call>'


@dataclass(frozen=True)
class Dialogue:
    """How one model's conversations look."""

    tokenizer: Tokenizer
    thinking: tuple[str, str] | None
    calls: CallFormat
    turn_end: int | None  # the special token after an answer
    harmony: bool = False  # answers have channels; thinking and calls are not as the fields say

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
        template = self.tokenizer.chat_template
        special = template.special if template else {}
        for name in ("self", "messages", "tools", "add_generation_prompt", "documents", *special):
            if name in more:
                raise UserError(f"chat_template_kwargs: {name} cannot be set there", field="chat_template_kwargs")
        prompt = self._rendered(*self._shown(messages, tools), more)
        if self.harmony:
            final = thinking is False and not tools or prefix
            return prompt + (FINAL if final else "") + (prefix or ""), False
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

    def render_whole(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> tuple[str, bool]:
        """A conversation to its end, as it is learned from, and whether the words of the assistant stand between
        template.BEGIN and END, as they do where the template has generation blocks. UserError as `render`."""
        template = self.tokenizer.chat_template
        marks = template is not None and bool(re.search(r"\{%-?\s*generation\s*-?%\}", template.source))
        more = {"mark_answers": True} if marks else {}
        return self._rendered(*self._shown(messages, tools), more, False), marks

    def _shown(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as the template is given them."""
        shown = [self._message(m) for m in messages]
        if tools and not self.calls.shows_tools:
            text = self._told(tools)
            if shown and shown[0]["role"] == "system":
                shown[0] = {**shown[0], "content": f"{shown[0]['content']}\n\n{text}"}
            else:
                shown.insert(0, {"role": "system", "content": text})
        return shown, tools if tools and self.calls.shows_tools else None

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, more: dict[str, Any], ask: bool = True
    ) -> str:
        """The prompt, of the first form of the conversation that the template takes and shows whole. UserError of the
        first, if it takes none."""
        made, problem = None, None
        texts = must_show(messages)
        for form in forms(messages):
            try:
                prompt = self.tokenizer.render_chat(form, tools, ask, **more)
            except UserError as error:
                problem = problem or error
                continue
            if all(text in prompt or json.dumps(text, ensure_ascii=False)[1:-1] in prompt for text in texts):
                return prompt
            made = made or prompt
        if made is None:
            assert problem
            raise problem
        return made

    def _told(self, tools: list[dict[str, Any]]) -> str:
        """What a system message says about tools."""
        f = self.calls
        form = f"{f.opening}FUNCTION{f.middle}{{...}}{f.closing}".replace(ID, "ID") if f.native else _HERMES_FORM
        listed = "\n".join(json.dumps(t["function"], ensure_ascii=False) for t in tools)
        return _TOLD.format(tools=listed, form=form)

    def _message(self, m: dict[str, Any]) -> dict[str, Any]:
        out = {k: v for k, v in m.items() if v is not None and not (k == "tool_calls" and not v)}
        if "content" in out:  # no template here takes pictures yet
            out["content"] = text_of(out["content"])
        if out["role"] == "developer":
            out["role"] = "system"
        if self.harmony and "reasoning_content" in out:
            out["thinking"] = out.pop("reasoning_content")
        calls = out.get("tool_calls")
        if self.calls.native:
            out.setdefault("content", "")
            if calls and self.calls.no_content:
                out["content"] = None
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

    def parser(self, tools: dict[str, dict[str, Any]] | None, opened: bool, may_think: bool) -> Parser | HarmonyParser:
        """Of an answer. tools: schemas of arguments by name; None if no calls are read. opened: it begins amid
        thinking."""
        if self.harmony:
            return HarmonyParser(tools is not None, in_final=not may_think)
        return Parser(None if tools is None else self.calls, self.thinking, opened, may_think, tools)

    def show_special(self, tools: bool) -> tuple[int, ...]:
        """Special tokens that the parser must see."""
        f = self.calls
        own = (f.fields.first, f.fields.key_end, f.fields.separator, f.fields.last) if f.fields else ()
        marks: tuple[str, ...] = (f.opening, f.middle, f.closing, f.between or "", *own) if tools else ()
        if self.harmony:
            marks = MARKS
        shown = {t for text in (*(self.thinking or ()), *marks) for t in self.tokenizer.encode_rendered(text)}
        return tuple(sorted(shown & self.tokenizer.special_ids))

    def grammar(
        self,
        tools: dict[str, dict[str, Any]],
        choice: str,
        parallel: bool,
        schema: str | None = None,
        answer: str | None = None,
    ) -> str:
        """Lark grammar of an answer: text (or JSON by the schema) or calls. tools: schemas of arguments by name.
        choice: "auto" or "required". answer: what an answer in channels is held to, in Lark."""
        f = self.calls
        if self.harmony:
            answer = f"%json {_exact(schema)}" if schema else answer
            return harmony.grammar(self._lark, tools, choice == "required", answer)
        opening = f.opening.split(ID)[0]
        bodies, lines = list[str](), list[str]()
        for i, (name, parameters) in enumerate(tools.items()):
            if f.fields:
                arguments, more_rules = fields.rules(i, parameters, f.fields, self._lark)
                bodies.append(f"{self._lark(name)} {arguments}")
                lines += more_rules
            else:
                arguments = json.dumps({**parameters, "x-guidance": _SPACES})
                bodies.append(f"{self._lark(json.dumps(name)[1:-1] + f.middle)} %json {arguments}")
        more = f"({self._lark(f.between)} body)*" if parallel and f.between is not None else ""
        tail = f"body {more} {self._lark(f.closing)}"
        lines.append(f"body: {' | '.join(bodies)}")
        if choice == "required":
            lines.append(f"start: /\\n?/ {self._lark(f.opening)} {tail}")
        elif schema is not None:
            lines += [f"start: answer | {self._lark(f.opening)} {tail}", f"answer: %json {_exact(schema)}"]
        elif f.fields and f.fields.quoted:
            lines += self._called_by_name(tools, f, f"{more} {self._lark(f.closing)}")
        else:  # the opening as text, or as the tokens that text cannot contain
            trigger = _as_regex(opening)
            tokens = f" | TEXT? {self._lark(f.opening)} {tail}" if self._added(opening) else ""
            lines += [
                f"start: TEXT | pre {self._lark(f.opening[len(opening) :])} {tail}{tokens}",
                f"TEXT: /(?s:.*)/ & ~/(?s:.*){trigger}(?s:.*)/",
                f"pre[lazy]: /(?s:.*){trigger}/",
            ]
        return "\n".join(lines)

    def _called_by_name(self, tools: dict[str, dict[str, Any]], f: CallFormat, tail: str) -> list[str]:
        """Rules of text or calls where only a function's name tells them apart."""
        assert f.fields
        begin, starts, lines = f.fields.begin, list[str](), list[str]()
        rest = replace(f.fields, first=f.fields.first[len(begin) :], empty=f.fields.empty[len(begin) :])
        for i, (name, parameters) in enumerate(tools.items()):
            arguments, own = fields.rules(len(tools) + i, parameters, rest, self._lark)
            starts.append(f"pre{i} {arguments} {tail}")
            lines += [*own, f"pre{i}[lazy]: /(?s:.*){_as_regex(f.opening + name + begin)}/"]
        triggers = "|".join(_as_regex(opening) for opening in f.openings(tools))
        lines.append(f"TEXT: /(?s:.*)/ & ~/(?s:.*)({triggers})(?s:.*)/")
        return [f"start: TEXT | {' | '.join(starts)}", *lines]

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


def _as_regex(text: str) -> str:
    """A literal text in a regular expression of Lark's."""
    return "".join(c if c.isalnum() or ord(c) > 127 else f"\\x{ord(c):02X}" for c in text)


def _exact(schema: str) -> str:
    """A JSON schema for a grammar, without spaces that it does not ask for."""
    return json.dumps({**json.loads(schema), "x-guidance": {"whitespace_flexible": False}})


def _object(call: dict[str, Any]) -> Any:
    """A call's arguments for a template: what is no JSON, such as a call that was cut off, in an object of its own."""
    written = call["function"]["arguments"] or "{}"
    try:
        return json.loads(written)
    except json.JSONDecodeError:
        return {"invalid_json": written}


# ---- learning the format from the template ----------------------------------------------------------------------


def learn(tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> Dialogue:
    """The format of a tokenizer's chat template, for a model that ends its turns with one of end_ids. UserError if it
    has no template."""
    if tokenizer.chat_template is None:
        raise UserError("tokenizer_config.json: no chat_template, so this model cannot chat")
    source = "\n".join(t.source for t in tokenizer.chat_templates.values())
    if is_harmony(source, tokenizer.backend.get_vocab()):
        return Dialogue(tokenizer, (ANALYSIS, END), CallFormat("", "", "", None), _turn_end(tokenizer), harmony=True)
    thinking = next((m for m in _THINKING if m[1] in source), None)
    ends = [text for i in end_ids if (text := tokenizer.backend.id_to_token(i))]
    return Dialogue(tokenizer, thinking, _learn_calls(tokenizer, thinking, ends) or HERMES, _turn_end(tokenizer))


def _learn_calls(tokenizer: Tokenizer, thinking: tuple[str, str] | None, ends: list[str]) -> CallFormat | None:
    """How the template writes calls; None if it does not."""
    parameters = {"type": "object", "properties": {k: {"type": "string"} for k in _KEYS}}
    functions = [{"name": n, "description": "-", "parameters": parameters} for n in _NAMES]
    tools = [{"type": "function", "function": f} for f in functions]
    try:
        start = tokenizer.render_chat([_QUESTION], tools, True)
        answer = tokenizer.render_chat([_QUESTION, _ANSWER], tools, False)
    except UserError:
        return None
    if thinking and start.rstrip().endswith(thinking[0]):
        start = start.rstrip().removesuffix(thinking[0])
    tail = answer.rpartition("probe answer")[2]
    turn_ends = {*ends, *([tail.strip()] if tail.strip() else []), *_specials(tokenizer, tail)[:1]}

    def written(names: tuple[str, ...], as_text: bool, content: str | None, keys: tuple[str, ...]) -> str | None:
        """What comes after the prompt where an answer calls these functions; None if the template refuses."""
        calls = []
        for n in names:
            arguments: Any = {k: _value(n, k) for k in keys}
            function = {"name": n, "arguments": json.dumps(arguments) if as_text else arguments}
            calls.append({"id": _ID, "type": "function", "function": function})
        try:
            text = tokenizer.render_chat(
                [_QUESTION, {**_ANSWER, "content": content, "tool_calls": calls}], tools, False
            )
        except UserError:
            return None
        return _turn(text[len(start) :], thinking, turn_ends) if text.startswith(start) else None

    added = [t.content for t in tokenizer.backend.get_added_tokens_decoder().values()]
    shows = all(n in start for n in _NAMES)
    for as_text, content in ((False, ""), (True, ""), (False, None), (True, None)):
        one, two = (written(n, as_text, content, _KEYS[:1]) for n in (_NAMES[:1], _NAMES))
        settings: dict[str, Any] = dict(native=True, shows_tools=shows, as_text=as_text, no_content=content is None)
        if one and (found := _in_json(one, two)):
            return CallFormat(*found, **settings)
        one, two = (written(n, as_text, content, _KEYS) for n in (_NAMES[:1], _NAMES))
        bare = written(_NAMES[:1], as_text, content, ())
        if one and bare and (cut := _in_fields(one, two, bare, added)):
            opening, closing, between, own = cut
            return CallFormat(opening, "", closing, between, **settings, fields=own)
    return None


def _value(name: str, key: str) -> str:
    """A probe that no template changes."""
    return f"{name} {key} value"


def _turn(text: str, thinking: tuple[str, str] | None, turn_ends: set[str]) -> str:
    """An answer without empty thinking before it and the turn's end after it."""
    if thinking:
        text = re.sub(re.escape(thinking[0]) + r"\s*" + re.escape(thinking[1]) + r"\s*", "", text)
    return text[: min((at for e in turn_ends if (at := text.find(e)) >= 0), default=len(text))].rstrip()


def _in_json(one: str, two: str | None) -> tuple[str, str, str, str | None] | None:
    """opening, middle, closing and between of calls whose arguments are JSON."""
    found = _cut(one, _NAMES[:1])
    if found is None:
        return None
    both = _cut(two, _NAMES) if two else None
    (opening, middle), closing = found[0], found[-1][0]
    return opening, middle, closing, both[1][0] if both else None


def _cut(text: str, names: tuple[str, ...]) -> list[tuple[str, str]] | None:
    """[(text before a name, text between it and its arguments)..., (what follows the last, "")]."""
    out, at, key = [], 0, _KEYS[0]
    for name in names:
        place = text.find(name, at)
        found = text.find(f'"{key}"', place)
        begin = text.rfind("{", place, found) if place >= 0 and found >= 0 else -1
        if begin < 0:
            return None
        try:
            value, length = json.JSONDecoder().raw_decode(text[begin:])
        except json.JSONDecodeError:
            return None
        if value != {key: _value(name, key)}:
            return None
        out.append((text[at:place].replace(_ID, ID), text[place + len(name) : begin].replace(_ID, ID)))
        at = begin + length
    out.append((text[at:].replace(_ID, ID), ""))
    return out


def _in_fields(
    one: str, two: str | None, bare: str, tokens: list[str]
) -> tuple[str, str, str | None, fields.Fields] | None:
    """opening, closing, between and how the arguments of calls are written, one by one. bare: a call without any.
    tokens: names of added tokens, which are not cut through."""
    name, values = _NAMES[0], [_value(_NAMES[0], k) for k in _KEYS]
    cuts, rest = list[str](), one
    for mark in (name, _KEYS[0], values[0], _KEYS[1], values[1]):
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        cuts.append(before)
    opening, first, key_end, separator, _ = cuts
    quote = key_end[-1:] if key_end[-1:] in ("'", '"') and rest[:1] == key_end[-1:] else ""
    key_end = key_end.removesuffix(quote) if quote else key_end
    separator, rest = separator.removeprefix(quote), rest.removeprefix(quote)
    begun, _, after_bare = bare.partition(name)
    if begun != opening or not first or not key_end or not separator:
        return None
    between = None
    if two and (place := two.find(_NAMES[1])) >= 0:
        between = two[:place].rpartition(values[1])[2].removeprefix(quote)
    # What ends the last argument goes with the arguments; the rest closes the call.
    ends = [separator, rest, rest if between is None else between]
    begun_last = 0 if quote else len(os.path.commonprefix(ends))
    begun_last = min(_outside(tokens, text, begun_last)[0] for text in ends)
    shared = len(os.path.commonprefix([rest[begun_last:][::-1], after_bare[::-1]]))
    at = max(
        _outside(tokens, rest, len(rest) - shared)[1],
        _outside(tokens, after_bare, len(after_bare) - shared)[1] - len(after_bare) + len(rest),
    )
    shared = len(rest) - at
    last, closing = rest[: len(rest) - shared], rest[len(rest) - shared :]
    if between is not None and not between.startswith(last):
        between = None
    empty = after_bare[: len(after_bare) - shared]
    own = fields.Fields(first, key_end, separator, last, empty, bool(quote))
    return opening.lstrip(), closing, between and between.removeprefix(last), own


def _outside(tokens: list[str], text: str, at: int) -> tuple[int, int]:
    """The places next to `at`, before and after it, that are not within the name of a token."""
    spans = [(m.start(), m.end()) for t in tokens for m in re.finditer(re.escape(t), text)]
    return next(((a, b) for a, b in spans if a < at < b), (at, at))


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
