"""JSON schemas of the answers, for /openapi.json."""

from typing import Any

Shape = dict[str, Any]
STRING: Shape = {"type": "string"}
INTEGER: Shape = {"type": "integer", "minimum": 0}
NUMBER: Shape = {"type": "number"}
TRUE: Shape = {"const": True}
OBJECT: Shape = {"type": "object"}


def obj(optional: Shape | None = None, **required: Shape) -> Shape:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def many(items: Shape) -> Shape:
    return {"type": "array", "items": items}


def maybe(shape: Shape) -> Shape:
    return {"anyOf": [shape, {"type": "null"}]}


def one(*values: str) -> Shape:
    return {"type": "string", "enum": list(values)}


_TOKEN = obj(token=STRING, logprob=NUMBER, bytes=many(INTEGER))
_CALL = obj(id=STRING, type=one("function"), function=obj(name=STRING, arguments=STRING))
_CHAT_USAGE = obj(
    {"completion_tokens_details": obj(reasoning_tokens=INTEGER)},
    **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), INTEGER),
    prompt_tokens_details=obj(cached_tokens=INTEGER),
)


def _completion(object_: str, finish_reasons: Shape, logprobs: Shape, **choice: Shape) -> Shape:
    """What chat and text completions have in common, around what a choice holds."""
    made = many(obj(index=INTEGER, **choice, finish_reason=finish_reasons, logprobs=maybe(logprobs)))
    return obj(id=STRING, object=one(object_), created=INTEGER, model=STRING, usage=_CHAT_USAGE, choices=made)


_SCORED = {**_TOKEN, "properties": {**_TOKEN["properties"], "top_logprobs": many(_TOKEN)}}
_ANSWER = obj({"reasoning_content": STRING, "tool_calls": many(_CALL)}, role=one("assistant"), content=maybe(STRING))
CHAT = _completion("chat.completion", one("stop", "length", "tool_calls"), obj(content=many(_SCORED)), message=_ANSWER)
_SCORES = obj(
    tokens=many(STRING), token_logprobs=many(maybe(NUMBER)), top_logprobs=many(maybe(OBJECT)), text_offset=many(INTEGER)
)
COMPLETION = _completion("text_completion", one("stop", "length"), _SCORES, text=STRING)
_ITEM = obj(
    {
        **dict.fromkeys(("status", "role", "name", "arguments", "call_id"), STRING),
        **dict.fromkeys(("content", "summary"), many(OBJECT)),
    },
    id=STRING,
    type=one("message", "reasoning", "function_call"),
)
_USED = obj(
    **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), INTEGER),
    input_tokens_details=obj(cached_tokens=INTEGER),
    output_tokens_details=obj(reasoning_tokens=INTEGER),
)
_STATUS = one("completed", "incomplete")
RESPONSE = obj(
    id=STRING, object=one("response"), created_at=INTEGER, status=_STATUS, model=STRING, output=many(_ITEM), usage=_USED
)
DELETED = obj(id=STRING, object=one("response"), deleted=TRUE)
MESSAGE = obj(
    id=STRING,
    type=one("message"),
    role=one("assistant"),
    model=STRING,
    content=many(obj(type=one("text", "thinking", "tool_use"))),
    stop_reason=one("end_turn", "max_tokens", "stop_sequence", "tool_use"),
    stop_sequence=maybe(STRING),
    usage=obj(input_tokens=INTEGER, output_tokens=INTEGER, cache_read_input_tokens=INTEGER),
)
COUNTED = obj(input_tokens=INTEGER)
EMBEDDINGS = obj(
    object=one("list"),
    model=STRING,
    data=many(obj(object=one("embedding"), index=INTEGER, embedding={"anyOf": [many(NUMBER), STRING]})),
    usage=obj(prompt_tokens=INTEGER, total_tokens=INTEGER),
)
TOKENS = obj({"token_strs": many(STRING)}, count=INTEGER, max_model_len=INTEGER, tokens=many(INTEGER))
_DEFAULTS = {"type": "object", "additionalProperties": NUMBER}
MODEL = obj(
    id=STRING,
    object=one("model"),
    created=INTEGER,
    owned_by=STRING,
    context_length=INTEGER,
    parameters=INTEGER,
    defaults=_DEFAULTS,
)
DONE = obj(status=STRING)
MODELS = obj(object=one("list"), data=many(MODEL))
_ERROR = obj(error=obj(message=STRING, type=STRING, param=maybe(STRING), code=maybe(STRING)))
_ANTHROPIC_ERROR = obj(type=one("error"), error=obj(type=STRING, message=STRING))
_WHY = {
    400: "Something in the request is wrong or not supported",
    401: "No valid key",
    404: "Not found",
    408: "It took too long",
    413: "Too large",
    415: "Not JSON",
    429: "Too busy; see Retry-After",
    500: "The server failed",
    503: "The server is stopping",
}


def documented(answer: Shape, streamed: bool, path: str) -> dict[int | str, dict[str, Any]]:
    """What an endpoint answers, by status."""
    error = _ANTHROPIC_ERROR if path.startswith("/v1/messages") else _ERROR
    good: dict[str, Any] = {"application/json": {"schema": answer}}
    if streamed:
        good["text/event-stream"] = {}
    return {
        200: {"description": "OK", "content": good},
        **{s: {"description": why, "content": {"application/json": {"schema": error}}} for s, why in _WHY.items()},
    }


def plain(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": obj(status=STRING)}}
    return {s: {"description": "OK" if s == 200 else "Not now", "content": content} for s in (200, *statuses)}
