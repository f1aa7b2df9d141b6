"""gpt-oss's format: an answer is messages, each in a channel; "analysis" is thinking, "final" is the answer, and a
message to a function is a call (https://cookbook.openai.com/articles/openai-harmony).
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from craton.text.calls import Part, new_id
from craton.text.fields import may_begin

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
MARKS = (START, CHANNEL, MESSAGE, END, CONSTRAIN)  # that the parser must see
ANALYSIS, FINAL = f"{CHANNEL}analysis{MESSAGE}", f"{CHANNEL}final{MESSAGE}"
_AFTER = (END, CALL, RETURN, START, CHANNEL)  # what ends a message


def is_harmony(source: str, vocabulary: Any) -> bool:
    """Whether a template writes channels. vocabulary: of the tokenizer."""
    return CHANNEL in source and all(mark in vocabulary for mark in (START, CHANNEL, MESSAGE, END))


class HarmonyParser:
    """Text in, parts out, as calls.Parser; the text begins after `<|start|>assistant`."""

    def __init__(self, tools: bool, in_final: bool = False):
        """tools: whether calls are read. in_final: the text begins amid the answer."""
        self.tools, self.buffer, self.call = tools, "", -1
        self.state = "content" if in_final else "header"

    def feed(self, text: str, last: bool = False, cut: bool = False) -> Iterator[Part]:
        """The parts that more text makes certain. last: no more comes. cut: because no more was allowed."""
        self.buffer += text
        while True:
            before = self.state, len(self.buffer)
            yield from self._header(last) if self.state == "header" else self._body(last)
            if (self.state, len(self.buffer)) == before:
                break
        if last and self.state == "arguments":
            self.state = "header"

    def _header(self, last: bool) -> Iterator[Part]:
        """Who speaks to whom in which channel, until the message begins."""
        if not any(
            self.buffer.startswith(s) or s.startswith(self.buffer) for s in (START, CHANNEL, " to=", "assistant")
        ):
            self.state = "content"  # a model that does not keep to the format
            return
        head, found, rest = self.buffer.partition(MESSAGE)
        if not found:
            if last:
                self.buffer = ""
            return
        self.buffer = rest
        to = re.search(r"to=(?:functions\.)?([^\s<]+)", head)
        if to and self.tools:
            self.state, self.call = "arguments", self.call + 1
            yield Part("call", to[1], self.call, new_id())
        else:
            self.state = "reasoning" if f"{CHANNEL}analysis" in head else "content"

    def _body(self, last: bool) -> Iterator[Part]:
        ends = [at for mark in _AFTER if (at := self.buffer.find(mark)) >= 0]
        end = min(ends, default=len(self.buffer))
        if not ends and not last:
            end -= max(may_begin(self.buffer, mark) for mark in _AFTER)
        text, self.buffer = self.buffer[:end], self.buffer[end:]
        if text:
            yield Part(self.state, text, max(self.call, 0) if self.state == "arguments" else 0)
        if ends:
            mark = next(m for m in _AFTER if self.buffer.startswith(m))
            self.buffer = self.buffer.removeprefix(mark) if mark not in (START, CHANNEL) else self.buffer
            self.state = "header"


def grammar(lark: Any, tools: dict[str, dict[str, Any]], required: bool, answer: str | None) -> str:
    """Lark grammar of whole answers; a call ends one. lark: a literal text in Lark. tools: schemas of arguments by
    name. required: to call one. answer: the rule's right side that the answer is held to, for any text None."""
    after = f"{lark(END)} {lark(START + 'assistant')}"
    calls = [f"{_call(lark, name)} %json {json.dumps(schema)}" for name, schema in tools.items()]
    ending = ["call"] if required else ["final", *(["call"] if calls else [])]
    lines = [
        f"start: (think | preamble)* ({' | '.join(ending)})",
        f"think: {lark(ANALYSIS)} TEXT {after}",
        f"preamble: {lark(CHANNEL + 'commentary' + MESSAGE)} TEXT {after}",
        "TEXT: /(?s:.*)/",
    ]
    if calls:
        lines.append(f"call: {' | '.join(calls)}")
    if not required:
        lines += [f"final: {lark(FINAL)} answer", f"answer: {answer or 'TEXT'}"]
    return "\n".join(lines)


def _call(lark: Any, name: str) -> str:
    """Everything before the arguments; models put the recipient in either place."""
    kind = f'(" "? {lark(CONSTRAIN)}? " "? "json")?'
    first = f"{lark(f' to=functions.{name}')} {lark(CHANNEL + 'commentary')} {kind} {lark(MESSAGE)}"
    second = f"{lark(CHANNEL + 'commentary')} {lark(f' to=functions.{name}')} {kind} {lark(MESSAGE)}"
    return f"({first} | {second})"
