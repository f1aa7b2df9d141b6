"""/v1/responses, as the Open Responses specification has it. What was answered is kept in memory, so that a later
request can go on from it (previous_response_id); the oldest is forgotten first."""

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from craton.engine.converse import Ask, schema_text
from craton.serve import dialect, shapes
from craton.serve.reply import Reply, State, named_event, whole
from craton.serve.schema import ResponseReasoning
from craton.serve.schema_responses import ResponsesRequest
from craton.serve.served import Answers, ApiError, Json, Served, run
from craton.text.calls import Part
from craton.text.messages import joined

_MOST, _MOST_BYTES = 1000, 64 << 20


class Store:
    """Responses by id and owner, with the conversation that led to each."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[str, str], tuple[Json, list[Json], int]] = OrderedDict()
        self.bytes = 0

    def put(self, owner: str, response: Json, messages: list[Json]) -> None:
        size = len(json.dumps([response, messages]))
        self.kept[owner, response["id"]] = (response, messages, size)
        self.bytes += size
        while self.kept and (len(self.kept) > _MOST or self.bytes > _MOST_BYTES):
            self.bytes -= self.kept.popitem(last=False)[1][2]

    def get(self, owner: str, name: str) -> tuple[Json, list[Json]]:
        if (found := self.kept.get((owner, name))) is None:
            field, why = "previous_response_id", "it was never stored, or is forgotten"
            raise ApiError(404, f"{field}: there is no response {name[:64]!r}; {why}", field, "response_not_found")
        return found[0], found[1]

    def delete(self, owner: str, name: str) -> None:
        self.get(owner, name)
        self.bytes -= self.kept.pop((owner, name))[2]


def routes(state: State) -> APIRouter:
    """/v1/responses."""
    router, store = APIRouter(), Store()

    @router.post(**state.route("/v1/responses", "A response", shapes.RESPONSE, streamed=True))
    async def create(body: ResponsesRequest, request: Request) -> Reply:
        work = respond(state.counted(body), body, store, request.scope["owner"])
        return Reply(work, bool(body.stream), state)

    @router.post("/v1/responses/compact", include_in_schema=False)
    async def compact() -> Response:
        raise ApiError(404, "compaction is not supported", code="not_supported")

    @router.get(**state.route("/v1/responses/{response_id}", "A stored response", shapes.RESPONSE))
    async def read(response_id: str, request: Request) -> Response:
        return JSONResponse(store.get(request.scope["owner"], response_id)[0])

    @router.delete(**state.route("/v1/responses/{response_id}", "Forget a stored response", shapes.DELETED))
    async def delete(response_id: str, request: Request) -> Response:
        store.delete(request.scope["owner"], response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    return router


def messages_of(body: ResponsesRequest) -> list[Json]:
    """Input items in the shape of chat messages."""
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    out: list[Json] = []
    thought = ""

    def assistant() -> Json:
        """Reasoning, text and calls of one turn are items of their own here, but one message there."""
        nonlocal thought
        if not out or out[-1]["role"] != "assistant":
            out.append({"role": "assistant", "content": ""})
        if thought:
            out[-1]["reasoning_content"], thought = thought, ""
        return out[-1]

    for item in body.input:
        if item.type == "message":
            content = dialect.content_of(item.content)
            if item.role == "assistant":
                message = assistant()
                message["content"] = joined(message["content"], content)
            else:
                out.append({"role": item.role, "content": content})
        elif item.type == "reasoning":
            thought = "\n".join(p.text for p in item.content or item.summary)
        elif item.type == "function_call":
            assistant().setdefault("tool_calls", []).append(dialect.call_of(item.call_id, item.name, item.arguments))
        else:
            out.append({"role": "tool", "tool_call_id": item.call_id, "content": dialect.content_of(item.output)})
    return out


def ask_of(body: ResponsesRequest, before: list[Json]) -> tuple[Ask, list[Json]]:
    """The ask, and the conversation without instructions."""
    want = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ())
    sampling = {k: getattr(body, k) for k in ("temperature", "top_p", "presence_penalty", "frequency_penalty")}
    sampling |= {"max_tokens": body.max_output_tokens, "logprobs": (body.top_logprobs or 0) if want else None}
    form = body.text.format if body.text else None
    if form is not None and form.type != "text":
        sampling["json_schema"] = schema_text({"type": "object"} if form.type == "json_object" else form.schema_)
    choice: Any = body.tool_choice
    if choice is not None and not isinstance(choice, str):
        one = choice.type == "function"
        choice = ([choice.name], "required") if one else ([t.name for t in choice.tools], choice.mode)
    listed = [dialect.tool_of(**t.model_dump(exclude={"type"})) for t in body.tools or ()]
    tools = dialect.choose_tools(listed, choice, body.parallel_tool_calls is not False)
    conversation = [*before, *messages_of(body)]
    first = [{"role": "system", "content": body.instructions}] if body.instructions else []
    thinking = dialect.thinking_of(None, body.reasoning.effort if body.reasoning else None)
    return Ask(sampling, messages=[*first, *conversation], **tools, **thinking), conversation


def _resource(served: Served, body: ResponsesRequest) -> Json:
    form = body.text.format if body.text else None
    shown: Json = form.model_dump(by_alias=True) if form else {"type": "text"}
    if "strict" in shown:
        shown["strict"] = True
    choice: Any = body.tool_choice or "auto"
    tools = [t.model_dump() | {"strict": bool(t.strict)} for t in body.tools or ()]
    defaults = served.describe()["defaults"]

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    begun = dict(id=f"resp_{secrets.token_hex(16)}", object="response", created_at=int(time.time()))
    return {
        **begun,
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "model": served.name,
        "previous_response_id": body.previous_response_id,
        "instructions": body.instructions,
        "output": [],
        "error": None,
        "tools": tools,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "truncation": "disabled",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": shown},
        "top_p": given(body.top_p, defaults["top_p"]),
        "presence_penalty": given(body.presence_penalty, 0.0),
        "frequency_penalty": given(body.frequency_penalty, 0.0),
        "top_logprobs": body.top_logprobs or 0,
        "temperature": given(body.temperature, defaults["temperature"]),
        "reasoning": (body.reasoning or ResponseReasoning()).model_dump(),
        "usage": None,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "store": body.store is not False,
        "background": False,
        "service_tier": "default",
        "metadata": body.metadata or {},
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }


class _Items:
    """The output items of a response in the making, and the events that tell of them.

    Thinking is streamed as summary where a summary is asked for, which is how both OpenAI and Open Responses name those
    events; else its item comes whole: for its text they have different events.
    """

    def __init__(self, emit: Callable[..., None], summary: bool):
        self.emit, self.summary = emit, summary
        self.items: list[Json] = []
        self.open: str | None = None  # kind of the last item, while it grows

    def feed(self, parts: list[Part], scores: list[Json]) -> None:
        """What a step added; scores are of its first content."""
        for p in parts:
            self.add(p.kind, p.text, scores if p.kind == "content" else [], p.id)
            if p.kind == "content":
                scores = []

    def add(self, kind: str, text: str, scores: list[Json], call_id: str = "") -> None:
        if kind == "call" or self.open != kind:
            self.close()
            self._begin(kind, text, call_id)
        item = self.items[-1]
        if kind == "content":
            part = item["content"][0]
            part["text"] += text
            part["logprobs"] += scores
            self._place("response.output_text.delta", content_index=0, delta=text, logprobs=scores)
        elif kind == "arguments":
            item["arguments"] += text
            self._place("response.function_call_arguments.delta", delta=text)
        elif kind == "reasoning" and self.summary:
            item["summary"][0]["text"] += text
            self._place("response.reasoning_summary_text.delta", summary_index=0, delta=text)
        elif kind == "reasoning":
            item["content"][0]["text"] += text

    def _begin(self, kind: str, text: str, call_id: str) -> None:
        self.open = "arguments" if kind == "call" else kind
        name = secrets.token_hex(12)
        if kind == "call":
            item: Json = dict(
                type="function_call", id=f"fc_{name}", call_id=call_id, name=text, arguments="", status="in_progress"
            )
        elif kind == "content":
            item = {"type": "message", "id": f"msg_{name}", "status": "in_progress", "role": "assistant", "content": []}
        else:
            item = {"type": "reasoning", "id": f"rs_{name}", "summary": []} | ({} if self.summary else {"content": []})
        self.items.append(item)
        self.emit("response.output_item.added", output_index=len(self.items) - 1, item=item)
        if kind == "content":
            item["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
            self._place("response.content_part.added", content_index=0, part=item["content"][0])
        elif kind == "reasoning" and self.summary:
            item["summary"].append({"type": "summary_text", "text": ""})
            self._place("response.reasoning_summary_part.added", summary_index=0, part=item["summary"][0])
        elif kind == "reasoning":
            item["content"].append({"type": "reasoning_text", "text": ""})

    def _place(self, type_: str, **more: Any) -> None:
        self.emit(type_, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **more)

    def close(self, complete: bool = True) -> None:
        """The last item grows no more."""
        if self.open is None:
            return
        item = self.items[-1]
        if self.open == "arguments":
            self._place("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        elif self.open == "content":
            part = item["content"][0]
            self._place("response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"])
            self._place("response.content_part.done", content_index=0, part=part)
        elif self.summary:
            self._place("response.reasoning_summary_text.done", summary_index=0, text=item["summary"][0]["text"])
            self._place("response.reasoning_summary_part.done", summary_index=0, part=item["summary"][0])
        if "status" in item:
            item["status"] = "completed" if complete else "incomplete"
        self.emit("response.output_item.done", output_index=len(self.items) - 1, item=item)
        self.open = None


async def respond(served: Served, body: ResponsesRequest, store: Store, owner: str) -> AsyncIterator[bytes]:
    """The body of the answer, in pieces where it is streamed."""
    dialect.check_stream_options(body)
    before = store.get(owner, body.previous_response_id)[1] if body.previous_response_id else []
    ask, conversation = ask_of(body, before)
    answers = await run(served, ask)
    response, out, number = _resource(served, body), list[bytes](), 0

    def emit(type_: str, **values: Any) -> None:
        nonlocal number
        if body.stream:
            out.append(named_event(type_, {"type": type_, "sequence_number": number, **values}))
            number += 1

    try:
        items = _Items(emit, bool(body.reasoning and body.reasoning.summary))
        emit("response.created", response=response)
        emit("response.in_progress", response=response)
        finished = None
        async for deltas in answers:
            for d in deltas:
                items.feed(d.parts, dialect.logprobs_of(served.talker.tokenizer, d.logprobs))
                finished = d.finished or finished
            if out:
                yield b"".join(out)
                out.clear()
        assert finished is not None
        _complete(response, items, answers, finished.finish_reason == "length")
        if response["store"]:
            store.put(owner, response, [*conversation, _as_message(items.items)])
        if body.stream:
            emit(f"response.{response['status']}", response=response)
            yield b"".join(out)
        else:
            yield whole(response)
    finally:
        answers.close()


def _complete(response: Json, items: "_Items", answers: Answers, cut: bool) -> None:
    """What is known of a response at its end."""
    if not any(i["type"] != "reasoning" for i in items.items):
        items.add("content", "", [])
    items.close(not cut)
    parts = answers.parts
    response["usage"] = {
        "input_tokens": parts.prompt_tokens,
        "output_tokens": parts.completion_tokens,
        "total_tokens": parts.prompt_tokens + parts.completion_tokens,
        "input_tokens_details": {"cached_tokens": parts.cached_tokens, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": parts.reasoning_tokens},
    }
    response["output"] = items.items
    if cut:
        response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    else:
        response |= {"status": "completed", "completed_at": int(time.time())}


def _as_message(items: list[Json]) -> Json:
    content = "".join(i["content"][0]["text"] for i in items if i["type"] == "message")
    message: Json = {"role": "assistant", "content": content}
    if thought := "".join((i.get("content") or i["summary"])[0]["text"] for i in items if i["type"] == "reasoning"):
        message["reasoning_content"] = thought
    if calls := [i for i in items if i["type"] == "function_call"]:
        message["tool_calls"] = [dialect.call_of(c["call_id"], c["name"], c["arguments"]) for c in calls]
    return message
