"""OpenAI's chat completions."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter

from craton.engine.converse import AnswerDelta, Ask, schema_text
from craton.serve import dialect, shapes
from craton.serve.reply import Reply, State, event, whole
from craton.serve.schema import ChatRequest
from craton.serve.served import Answers, ApiError, Json, Served, run
from craton.text.messages import parts_of, text_of
from craton.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


def routes(state: State) -> APIRouter:
    """POST /v1/chat/completions."""
    router = APIRouter()

    @router.post(**state.route("/v1/chat/completions", "A chat completion", shapes.CHAT, streamed=True))
    async def chat(body: ChatRequest) -> Reply:
        return Reply(answer(state.counted(body), body), bool(body.stream), state)

    return router


# ---- to the engine ----------------------------------------------------------------------------------------------


def messages_of(messages: list[Json]) -> list[Json]:
    """Dumped messages with contents in our parts."""
    out = []
    for m in messages:
        shown = {k: v for k, v in m.items() if v is not None and k in ("role", "name", "tool_call_id", "tool_calls")}
        shown["content"] = parts_of(m.get("content"))
        if thought := m.get("reasoning_content") or m.get("reasoning"):
            shown["reasoning_content"] = thought
        for call in shown.get("tool_calls", ()):
            call.pop("index", None)
        out.append(shown)
    return out


def ask_of(body: ChatRequest) -> Ask:
    """ApiError for fields that exclude each other."""
    dialect.check_stream_options(body)
    choice: Any = body.tool_choice
    if choice is not None and not isinstance(choice, str):
        if choice.type == "function":
            choice = [choice.function.name], "required"
        else:
            allowed = choice.allowed_tools
            choice = [t.function.name for t in allowed.tools], allowed.mode
    listed = [t.model_dump(exclude_none=True, exclude={"cache_control"}) for t in body.tools or ()]
    tools = dialect.choose_tools(listed, choice, body.parallel_tool_calls is not False)
    sampling, messages = _sampling(body), messages_of([m.model_dump() for m in body.messages])
    effort = body.reasoning_effort or (body.reasoning.effort if body.reasoning else None)
    thinking, template = dialect.thinking_of(body.thinking, effort), dict(body.chat_template_kwargs or {})
    prefix = _begun(body, messages)
    return Ask(sampling, messages=messages, prefix=prefix, template=template, **tools, **thinking)


def _begun(body: ChatRequest, messages: list[Json]) -> str | None:
    """How the answer begins, taken from the messages: where the last one is to be continued."""
    if body.add_generation_prompt is bool(body.continue_final_message):
        problem = "add_generation_prompt is true exactly where continue_final_message is not"
        raise ApiError(400, problem, "add_generation_prompt")
    if not body.continue_final_message:
        return None
    if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls") or not messages[-1]["content"]:
        problem = "continue_final_message: the last message must be text of the assistant's"
        raise ApiError(400, problem, "continue_final_message")
    return text_of(messages.pop()["content"])


def _sampling(body: ChatRequest) -> dict[str, Any]:
    sampling = dialect.sampling_of(body)
    both = body.max_tokens is not None and body.max_completion_tokens is not None
    if both and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", "max_tokens")
    sampling["max_tokens"] = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.logprobs or body.top_logprobs is not None:
        sampling["logprobs"] = body.top_logprobs or 0
    form = body.response_format
    if form is not None and form.type != "text":
        if body.structured_outputs is not None:
            raise ApiError(400, "response_format and structured_outputs exclude each other", "response_format")
        schema = {"type": "object"} if form.type == "json_object" else form.json_schema.schema_ or {}
        sampling["json_schema"] = schema_text(schema)
    return sampling


# ---- from the engine --------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    """One answer as it grows. `add` is the one reading of what the engine says: it keeps the message, and gives the
    pieces that a stream is made of."""

    index: int
    tokenizer: Tokenizer
    scored: bool
    hide_reasoning: bool
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    scores: list[Json] = field(default_factory=list)
    begun: bool = False
    finish: str | None = None

    def add(self, d: AnswerDelta) -> list[Json]:
        """Pieces: {"delta": ..., "logprobs": ..., "finish_reason": ...}."""
        out = [] if self.begun else [_piece({"role": "assistant", "content": "", "refusal": None})]
        self.begun = True
        scores = dialect.logprobs_of(self.tokenizer, d.logprobs) if self.scored and d.logprobs else None
        self.scores += scores or []
        for part in d.parts:
            if part.kind == "content":
                self.content.append(part.text)
                out.append(_piece({"content": part.text}, scores))
                scores = None
            elif part.kind == "reasoning":
                if not self.hide_reasoning:
                    self.reasoning.append(part.text)
                    out.append(_piece({"reasoning_content": part.text}))
            elif part.kind == "call":
                self.calls.append(dialect.call_of(part.id, part.text, ""))
                out.append(_piece({"tool_calls": [{"index": part.call, **dialect.call_of(part.id, part.text, "")}]}))
            else:
                self.calls[part.call]["function"]["arguments"] += part.text
                out.append(_piece({"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}))
        if scores:
            out.append(_piece({"content": ""}, scores))
        if d.finished is not None:
            self.finish = dialect.finish_reason(d.finished, d.calls)
            out.append(_piece({}, None, self.finish))
        return out

    def message(self) -> Json:
        """The choice, whole."""
        content = "".join(self.content) if self.content or not self.calls else None
        message: Json = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        scores = {"content": self.scores, "refusal": None} if self.scored else None
        return {"index": self.index, "message": message, "logprobs": scores, "finish_reason": self.finish}


def _piece(delta: Json, scores: list[Json] | None = None, finish: str | None = None) -> Json:
    logprobs = None if scores is None else {"content": scores, "refusal": None}
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish}


async def answer(served: Served, body: ChatRequest) -> AsyncIterator[bytes]:
    """The body of the response, in pieces where it is streamed."""
    ask = ask_of(body)
    answers = await run(served, ask)
    fixed = {"system_fingerprint": "craton", "service_tier": "default"}
    head = dict(id=f"chatcmpl-{secrets.token_hex(12)}", created=int(time.time()), model=served.name, **fixed)
    scored = "logprobs" in ask.sampling
    tokenizer, n = served.talker.tokenizer, answers.parts.n
    choices = [_Choice(i, tokenizer, scored, ask.hide_reasoning) for i in range(n)]
    try:
        if body.stream:
            async for chunk in _streamed(answers, choices, head, body):
                yield chunk
        else:
            async for deltas in answers:
                for d in deltas:
                    choices[d.index].add(d)
            made = [c.message() for c in choices]
            usage = dialect.usage_of(answers.parts)
            yield whole({"object": "chat.completion", **head, "choices": made, "usage": usage})
    finally:
        answers.close()


async def _streamed(answers: Answers, choices: list[_Choice], head: Json, body: ChatRequest) -> AsyncIterator[bytes]:
    head = {"object": "chat.completion.chunk", **head}
    include = bool(body.stream_options and body.stream_options.include_usage)
    # The same for every chunk, so made once: what differs is the choice.
    start = event({**head, **({"usage": None} if include else {})}).rstrip()[:-1] + b',"choices":['
    async for deltas in answers:
        out = []
        for d in deltas:
            for piece in choices[d.index].add(d):
                text = json.dumps({"index": d.index, **piece}, ensure_ascii=False, separators=(",", ":"))
                out.append(start + text.encode() + b"]}\n\n")
        if out:
            yield b"".join(out)
    if include:
        yield event({**head, "choices": [], "usage": dialect.usage_of(answers.parts)})
    yield DONE
