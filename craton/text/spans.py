"""What of a text is learned: the words of the assistant, as spans of the text that the chat template makes. The text is
turned into tokens once, so that a mask never shifts against its tokens."""

import os.path
from dataclasses import dataclass
from typing import Any

from craton.base import UserError
from craton.text.dialogue import Dialogue
from craton.text.template import BEGIN, END
from craton.text.tokenizer import Tokenizer

Span = tuple[int, int]  # characters


@dataclass(frozen=True)
class Learned:
    """Token ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


def conversation(dialogue: Dialogue, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Learned:
    """Messages in OpenAI's shape -> tokens; learned is what the assistant says, its calls and the end of its turn.
    UserError where the template refuses them, or shows an answer otherwise than it is asked for."""
    text, marked = dialogue.render_whole(messages, tools)
    if marked:
        text, spans = _unmarked(text)
    else:
        spans = [_span(dialogue, messages, tools, i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]
    return tokens(dialogue.tokenizer, text, spans)


def last_answer(dialogue: Dialogue, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Learned:
    """The same, but only the last answer is learned."""
    text, marked = dialogue.render_whole(messages, tools)
    if marked:
        text, spans = _unmarked(text)
        spans = spans[-1:]
    else:
        spans = [_span(dialogue, messages, tools, len(messages) - 1, text)]
    return tokens(dialogue.tokenizer, text, spans)


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """The text without marks, and the spans that they told."""
    out, spans, at = list[str](), list[Span](), 0
    for number, piece in enumerate(text.split(BEGIN)):
        said, ended, rest = piece.partition(END)
        if number == 0:
            said, rest = "", piece
        elif not ended:
            raise UserError("chat_template: a generation block has no end")
        if said:
            spans.append((at, at + len(said)))
        out += [said, rest]
        at += len(said) + len(rest)
    return "".join(out), spans


def _span(dialogue: Dialogue, messages: list[dict[str, Any]], tools: list[dict[str, Any]], i: int, whole: str) -> Span:
    """Where message i stands in the whole text: behind what the model is asked with, up to the end of its turn."""
    asked, _ = dialogue.render(messages[:i], tools)
    begin = len(os.path.commonprefix([asked, whole]))
    rest = asked[begin:]
    if rest.strip() and not (dialogue.thinking and rest.strip().startswith(dialogue.thinking[0])):
        problem = f"the chat template shows what comes before message {i} otherwise once it is answered"
        raise UserError(f"messages: {problem}; give each answer as a conversation of its own", field="messages")
    until = whole
    if i + 1 < len(messages):
        until, _ = dialogue.render_whole(messages[: i + 1], tools)
    end = len(os.path.commonprefix([until, whole]))
    said = whole[begin:end]
    turn_end = None if dialogue.turn_end is None else dialogue.tokenizer.backend.id_to_token(dialogue.turn_end)
    if turn_end and turn_end in said:
        return begin, begin + said.rindex(turn_end) + len(turn_end)
    if not said.strip():
        raise UserError(f"messages: the chat template does not show message {i}", field="messages")
    return begin, begin + len(said.rstrip()) if dialogue.turn_end is not None else end


def tokens(tokenizer: Tokenizer, text: str, spans: list[Span], add_special: bool = False) -> Learned:
    """A text in tokens; learned are those that begin within a span. A token that begins before a span belongs to what
    comes before."""
    try:
        encoding = tokenizer.backend.encode(text, add_special_tokens=add_special)
    except TypeError:
        raise UserError("the text holds halves of characters (lone surrogates); leave them out") from None
    learned, at = [], 0
    for (begin, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        inside = at < len(spans) and spans[at][0] <= begin and end > begin
        learned.append(inside and not (add_special and special))
    return Learned(encoding.ids, learned)
