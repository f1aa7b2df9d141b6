"""Anthropic's messages and count_tokens."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter

from craton.engine.converse import AnswerParts, Ask, prepare, schema_text
from craton.engine.request import Completion
from craton.serve import dialect, shapes
from craton.serve.reply import Reply, State, named_event, whole
from craton.serve.schema_anthropic import CountTokensRequest, MessagesRequest
from craton.serve.served import ApiError, Json, Served, run
from craton.text.calls import Part
from craton.text.messages import joined, parts_of, text_of


def routes(state: State) -> APIRouter:
    """/v1/messages."""
    router = APIRouter()

    @router.post(**state.route("/v1/messages", "A message, as Anthropic's API has it", shapes.MESSAGE, streamed=True))
    async def messages(body: MessagesRequest) -> Reply:
        return Reply(answer(state.counted(body), body), bool(body.stream), state)

    @router.post(**state.route("/v1/messages/count_tokens", "Tokens of a message", shapes.COUNTED))
    async def count_tokens(body: CountTokensRequest) -> Reply:
        return Reply(count(state.counted(body), body), False, state)

    return router


# ---- to the engine ----------------------------------------------------------------------------------------------


def messages_of(body: CountTokensRequest) -> list[Json]:
    """In OpenAI's shape: results of tools are messages of their own there."""
    out: list[Json] = []
    if body.system:
        out.append({"role": "system", "content": dialect.content_of(body.system)})
    for m in body.messages:
        if isinstance(m.content, str):
            out.append({"role": m.role, "content": m.content})
            continue
        parts, message = [], Json(role=m.role)
        for block in m.content:
            if block.type == "tool_result":
                out.append(_tool_result(block))
            elif block.type == "tool_use":
                arguments = json.dumps(block.input, ensure_ascii=False)
                call = dialect.call_of(block.id.removeprefix("toolu_"), block.name, arguments)
                message.setdefault("tool_calls", []).append(call)
            elif block.type == "thinking":
                message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
            elif block.type != "redacted_thinking":
                parts.append(block.model_dump())
        if parts or len(message) > 1 or not m.content:
            out.append({**message, "content": parts_of(parts)})
    return out


def _tool_result(block: Any) -> Json:
    content = dialect.content_of(block.content)
    if block.is_error:
        content = f"Error: {content}" if isinstance(content, str) else joined("Error:", content)
    return {"role": "tool", "tool_call_id": block.tool_use_id.removeprefix("toolu_"), "content": content}


def ask_of(body: CountTokensRequest) -> Ask:
    messages, prefix = messages_of(body), None
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        last = messages.pop()
        if not last["content"] and last.get("reasoning_content"):
            raise ApiError(400, "messages: the last one holds only thinking; an answer can go on from text", "messages")
        prefix = text_of(last["content"])  # the answer goes on from there
    c = body.tool_choice
    if c is not None and c.type == "tool" and c.name is None:
        raise ApiError(400, "tool_choice: type 'tool' needs a name", "tool_choice.name")
    words = {"auto": "auto", "any": "required", "none": "none"}
    choice = None if c is None else words.get(c.type) or ([c.name], "required")
    listed = [
        dialect.tool_of(
            name=t.name, parameters=t.input_schema, description=t.description or None, strict=t.strict or None
        )
        for t in body.tools or ()
    ]
    tools = dialect.choose_tools(listed, choice, not (c and c.disable_parallel_tool_use))
    sampling: dict[str, Any] = {}
    if body.output_config and body.output_config.format:
        sampling["json_schema"] = schema_text(body.output_config.format.schema_)
    if isinstance(body, MessagesRequest):
        sampling |= {k: getattr(body, k) for k in ("max_tokens", "temperature", "top_p", "top_k")}
        sampling["stop"] = tuple(body.stop_sequences or ())
    effort = body.output_config.effort if body.output_config else None
    thinking = dialect.thinking_of(body.thinking, effort)
    return Ask(sampling, messages=messages, prefix=prefix or None, **tools, **thinking)


# ---- from the engine --------------------------------------------------------------------------------------------


async def count(served: Served, body: CountTokensRequest) -> AsyncIterator[bytes]:
    """The body of count_tokens."""
    prepared = await asyncio.to_thread(prepare, served.talker, ask_of(body))
    yield whole({"input_tokens": len(prepared.ids)})


def _usage(parts: AnswerParts) -> Json:
    counts = dict(input_tokens=parts.prompt_tokens - parts.cached_tokens, output_tokens=parts.completion_tokens)
    cache = dict(cache_read_input_tokens=parts.cached_tokens, cache_creation_input_tokens=0, cache_creation=None)
    details = {"thinking_tokens": parts.reasoning_tokens}
    other = dict(inference_geo=None, output_tokens_details=details, server_tool_use=None, service_tier="standard")
    return {**counts, **cache, **other}


def _stop(c: Completion, calls: bool) -> tuple[str, str | None]:
    """stop_reason and stop_sequence."""
    if c.finish_reason == "length":
        return "max_tokens", None
    if isinstance(c.stop_reason, str):
        return "stop_sequence", c.stop_reason
    return ("tool_use" if calls else "end_turn"), None


def _head(served: Served, parts: AnswerParts) -> Json:
    head: Json = dict(
        id=f"msg_{secrets.token_hex(12)}", type="message", role="assistant", model=served.name, content=[]
    )
    stop = dict(stop_reason=None, stop_sequence=None, stop_details=None)
    return {**head, **stop, "container": None, "usage": _usage(parts)}


class _Blocks:
    """The content blocks of a message in the making, and the events that tell of them: the one reading of what the
    engine says."""

    def __init__(self, emit: Callable[..., None], hide_reasoning: bool):
        self.emit, self.hide_reasoning = emit, hide_reasoning
        self.blocks: list[Json] = []
        self.arguments: dict[int, list[str]] = {}  # JSON of a tool's input, by block
        self.open = ""  # kind of the last block, while it grows

    def feed(self, parts: list[Part]) -> None:
        """What a step added."""
        for p in parts:
            if p.kind == "call" or self.open != p.kind:
                self.begin(p.kind, p.text, p.id)
            at = len(self.blocks) - 1
            if p.kind == "content":
                self.blocks[at]["text"] += p.text
                self._delta(type="text_delta", text=p.text)
            elif p.kind == "reasoning" and not self.hide_reasoning:
                self.blocks[at]["thinking"] += p.text
                self._delta(type="thinking_delta", thinking=p.text)
            elif p.kind == "arguments":
                self.arguments.setdefault(at, []).append(p.text)
                self._delta(type="input_json_delta", partial_json=p.text)

    def begin(self, kind: str, text: str = "", id_: str = "") -> None:
        """A new block; the last one grows no more."""
        self.close()
        self.open = "arguments" if kind == "call" else kind
        if kind == "reasoning":
            block: Json = {"type": "thinking", "thinking": "", "signature": ""}
        elif kind == "call":
            block = {"type": "tool_use", "id": f"toolu_{id_}", "name": text, "input": {}, "caller": {"type": "direct"}}
        else:
            block = {"type": "text", "text": "", "citations": None}
        self.blocks.append(block)
        self.emit("content_block_start", index=len(self.blocks) - 1, content_block=block)

    def close(self) -> None:
        """The last block is whole."""
        if self.open == "reasoning":
            self._delta(type="signature_delta", signature="")
        if self.open:
            self.emit("content_block_stop", index=len(self.blocks) - 1)
        self.open = ""

    def content(self) -> list[Json]:
        """All blocks, inputs of tools as objects."""
        for at, pieces in self.arguments.items():
            try:
                self.blocks[at]["input"] = json.loads("".join(pieces))
            except json.JSONDecodeError:  # cut off at max_tokens
                self.blocks[at]["input"] = {}
        return self.blocks

    def _delta(self, **delta: Any) -> None:
        self.emit("content_block_delta", index=len(self.blocks) - 1, delta=delta)


async def answer(served: Served, body: MessagesRequest) -> AsyncIterator[bytes]:
    """The body of the response, in pieces where it is streamed."""
    if body.thinking is not None and body.thinking.type == "enabled" and body.thinking.budget_tokens is None:
        raise ApiError(400, "thinking: type 'enabled' needs budget_tokens", "thinking.budget_tokens")
    ask = ask_of(body)
    answers = await run(served, ask)
    out: list[bytes] = []

    def emit(type_: str, **values: Any) -> None:
        if body.stream:
            out.append(named_event(type_, {"type": type_, **values}))

    blocks, finished, calls, started = _Blocks(emit, ask.hide_reasoning), None, False, False
    try:
        async for deltas in answers:
            if not started:
                started = True
                emit("message_start", message=_head(served, answers.parts))
            for d in deltas:
                blocks.feed(d.parts)
                finished, calls = d.finished or finished, d.calls
            if out:
                yield b"".join(out)
                out.clear()
        assert finished is not None
        if all(b["type"] == "thinking" for b in blocks.blocks):
            blocks.begin("content")
        blocks.close()
        reason, sequence = _stop(finished, calls)
        stopped = {"stop_reason": reason, "stop_sequence": sequence}
        if body.stream:
            delta = {**stopped, "stop_details": None, "container": None}
            emit("message_delta", delta=delta, usage=_usage(answers.parts))
            emit("message_stop")
            yield b"".join(out)
        else:
            yield whole({**_head(served, answers.parts), "content": blocks.content(), **stopped})
    finally:
        answers.close()
