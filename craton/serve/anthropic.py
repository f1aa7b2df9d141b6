"""Anthropic's messages and count_tokens."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from craton.engine.request import Completion
from craton.serve.ask import Answers, ApiError, Ask, Served, prepare, run, schema_text, text_of
from craton.serve.openai import choose, thinking_of
from craton.serve.schema import CountTokensRequest, MessagesRequest


def _messages(body: CountTokensRequest) -> list[dict[str, Any]]:
    """In OpenAI's shape: results of tools are messages of their own there."""
    out: list[dict[str, Any]] = []
    if body.system:
        out.append(
            {
                "role": "system",
                "content": text_of(
                    body.system if isinstance(body.system, str) else [p.model_dump() for p in body.system]
                ),
            }
        )
    for m in body.messages:
        if isinstance(m.content, str):
            out.append({"role": m.role, "content": m.content})
            continue
        parts, message = [], dict[str, Any](role=m.role)
        for block in m.content:
            if block.type == "tool_result":
                content = (
                    block.content
                    if block.content is None or isinstance(block.content, str)
                    else [p.model_dump() for p in block.content]
                )
                text = text_of(content)
                out.append(
                    {
                        "role": "tool",
                        "tool_call_id": block.tool_use_id.removeprefix("toolu_"),
                        "content": f"Error: {text}" if block.is_error else text,
                    }
                )
            elif block.type == "tool_use":
                call = {
                    "id": block.id.removeprefix("toolu_"),
                    "type": "function",
                    "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
                }
                message.setdefault("tool_calls", []).append(call)
            elif block.type == "thinking":
                message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
            else:
                parts.append(block.model_dump())
        if parts or len(message) > 1 or not m.content:
            out.append({**message, "content": text_of(parts)})
    return out


def ask_of(body: CountTokensRequest) -> Ask:
    messages, prefix = _messages(body), None
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        last = messages.pop()
        if not last["content"] and last.get("reasoning_content"):
            raise ApiError(400, "messages: the last one holds only thinking; an answer can go on from text", "messages")
        prefix = last["content"]  # the answer goes on from there
    c = body.tool_choice
    if c is not None and c.type == "tool" and c.name is None:
        raise ApiError(400, "tool_choice: type 'tool' needs a name", "tool_choice.name")
    choice: Any = (
        None if c is None else {"auto": "auto", "any": "required", "none": "none"}.get(c.type) or ([c.name], "required")
    )
    listed = [
        {
            "type": "function",
            "function": {
                "name": t.name,
                "parameters": t.input_schema,
                **({"description": t.description} if t.description else {}),
            },
        }
        for t in body.tools or ()
    ]
    tools, mode = choose(listed, choice)
    sampling: dict[str, Any] = {}
    if body.output_config and body.output_config.format:
        sampling["json_schema"] = schema_text(body.output_config.format.schema_)
    if isinstance(body, MessagesRequest):
        sampling |= {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": tuple(body.stop_sequences or ()),
        }
    effort = body.output_config.effort if body.output_config else None
    return Ask(
        sampling,
        messages=messages,
        tools=tools,
        choice=mode,
        parallel=not (c and c.disable_parallel_tool_use),
        prefix=prefix or None,
        **thinking_of(body.thinking, effort),
    )


async def count_tokens(served: Served, body: CountTokensRequest) -> AsyncIterator[bytes]:
    prepared = await asyncio.to_thread(prepare, served, ask_of(body))
    yield json.dumps({"input_tokens": len(prepared.ids)}).encode()


def _usage(a: Answers) -> dict[str, Any]:
    return {
        "input_tokens": a.prompt_tokens - a.cached_tokens,
        "output_tokens": a.completion_tokens,
        "cache_read_input_tokens": a.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_creation": None,
        "inference_geo": None,
        "output_tokens_details": {"thinking_tokens": a.reasoning_tokens},
        "server_tool_use": None,
        "service_tier": "standard",
    }


def _stop(c: Completion, calls: bool) -> tuple[str, str | None]:
    if c.finish_reason == "length":
        return "max_tokens", None
    if isinstance(c.stop_reason, str):
        return "stop_sequence", c.stop_reason
    return ("tool_use" if calls else "end_turn"), None


def _head(served: Served, answers: Answers) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": served.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": _usage(answers),
    }


async def messages(served: Served, body: MessagesRequest) -> AsyncIterator[bytes]:
    if body.thinking is not None and body.thinking.type == "enabled" and body.thinking.budget_tokens is None:
        raise ApiError(400, "thinking: type 'enabled' needs budget_tokens", "thinking.budget_tokens")
    ask = ask_of(body)
    answers = await run(served, ask)
    try:
        async for chunk in _stream(served, answers, ask) if body.stream else _whole(served, answers, ask):
            yield chunk
    finally:
        answers.close()


def _block(kind: str, text: str, id_: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if kind == "call":
        return {"type": "tool_use", "id": f"toolu_{id_}", "name": text, "input": {}, "caller": {"type": "direct"}}
    return {"type": "text", "text": "", "citations": None}


async def _whole(served: Served, answers: Answers, ask: Ask) -> AsyncIterator[bytes]:
    content: list[dict[str, Any]] = []
    arguments: dict[int, str] = {}
    finished, calls = None, False
    async for deltas in answers:
        for d in deltas:
            for p in d.parts:
                kind = {"content": "text", "reasoning": "thinking", "call": "", "arguments": "tool_use"}[p.kind]
                if not content or content[-1]["type"] != kind:
                    content.append(_block(p.kind, p.text, p.id))
                block = content[-1]
                if p.kind == "arguments":
                    arguments[len(content) - 1] = arguments.get(len(content) - 1, "") + p.text
                elif p.kind == "content":
                    block["text"] += p.text
                elif p.kind == "reasoning" and not ask.hide_reasoning:
                    block["thinking"] += p.text
            finished, calls = d.finished or finished, d.calls
    assert finished is not None
    for at, text in arguments.items():
        try:
            content[at]["input"] = json.loads(text)
        except json.JSONDecodeError:  # cut off at max_tokens
            content[at]["input"] = {}
    reason, sequence = _stop(finished, calls)
    if all(b["type"] == "thinking" for b in content):
        content.append(_block("content", "", ""))
    yield json.dumps(
        {**_head(served, answers), "content": content, "stop_reason": reason, "stop_sequence": sequence},
        ensure_ascii=False,
    ).encode()


async def _stream(served: Served, answers: Answers, ask: Ask) -> AsyncIterator[bytes]:
    out: list[bytes] = []

    def emit(type_: str, **values: Any) -> None:
        data = json.dumps({"type": type_, **values}, ensure_ascii=False, separators=(",", ":"))
        out.append(f"event: {type_}\ndata: {data}\n\n".encode())

    index, open_, finished, calls, shown = -1, "", None, False, False

    def begin(kind: str, text: str, id_: str) -> None:
        nonlocal index, open_
        end()
        index, open_ = index + 1, "arguments" if kind == "call" else kind
        emit("content_block_start", index=index, content_block=_block(kind, text, id_))

    def end() -> None:
        nonlocal open_
        if open_:
            if open_ == "reasoning":
                emit("content_block_delta", index=index, delta={"type": "signature_delta", "signature": ""})
            emit("content_block_stop", index=index)
        open_ = ""

    started = False
    async for deltas in answers:
        if not started:
            started = True
            emit("message_start", message=_head(served, answers))
        for d in deltas:
            for p in d.parts:
                if p.kind == "call" or open_ != p.kind:
                    begin(p.kind, p.text, p.id)
                shown = shown or p.kind != "reasoning"
                if p.kind == "content":
                    emit("content_block_delta", index=index, delta={"type": "text_delta", "text": p.text})
                elif p.kind == "reasoning" and not ask.hide_reasoning:
                    emit("content_block_delta", index=index, delta={"type": "thinking_delta", "thinking": p.text})
                elif p.kind == "arguments":
                    emit("content_block_delta", index=index, delta={"type": "input_json_delta", "partial_json": p.text})
            finished, calls = d.finished or finished, d.calls
        if out:
            yield b"".join(out)
            out.clear()
    assert finished is not None
    if not shown:
        begin("content", "", "")
    end()
    reason, text = _stop(finished, calls)
    emit(
        "message_delta",
        delta={"stop_reason": reason, "stop_sequence": text, "stop_details": None, "container": None},
        usage=_usage(answers),
    )
    emit("message_stop")
    yield b"".join(out)
