"""What the dialects have in common: fields of requests that mean the same, and how scores are shown."""

from typing import Any

from craton.base import UserError
from craton.engine.converse import EFFORT, AnswerParts, schema_text
from craton.engine.request import Completion, TokenLogprob
from craton.serve.schema import Sampled, Thinking
from craton.serve.served import ApiError, Json
from craton.text.messages import Content, parts_of
from craton.text.tokenizer import Tokenizer

_SAMPLED = (
    "temperature top_p n seed presence_penalty frequency_penalty top_k min_p repetition_penalty min_tokens ignore_eos"
).split()


def sampling_of(body: Sampled) -> dict[str, Any]:
    """Fields of Sampling that OpenAI's generation endpoints share."""
    out = {k: getattr(body, k) for k in _SAMPLED}
    out["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    out["stop_token_ids"] = tuple(body.stop_token_ids or ())
    out["logit_bias"] = {int(k): v for k, v in (body.logit_bias or {}).items()}
    if (s := body.structured_outputs) is not None:
        schema = None if s.json_ is None else schema_text(s.json_)
        given = {"json_schema": schema, "regex": s.regex, "choice": tuple(s.choice or ()), "grammar": s.grammar}
        if sum(bool(v) for v in given.values()) != 1:
            name = "structured_outputs"
            raise UserError(f"{name}: give exactly one of json, regex, choice and grammar", field=name)
        out |= given
    return out


def check_stream_options(body: Any) -> None:
    """ApiError for options of a stream without one."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")


def thinking_of(thinking: Thinking | None, effort: str | None) -> dict[str, Any]:
    """Fields of Ask. A budget given in tokens wins over an effort."""
    on = None if thinking is None or thinking.type == "adaptive" else thinking.type == "enabled"
    if effort == "none":
        on, effort = False, None
    budget = EFFORT.get(effort or "")
    if thinking is not None and thinking.budget_tokens is not None:
        budget = thinking.budget_tokens
    hidden = bool(thinking and thinking.display == "omitted")
    return {"thinking": on, "budget": budget, "effort": effort, "hide_reasoning": hidden}


def tool_of(**function: Any) -> Json:
    """A tool in OpenAI's shape, of its function's fields; those that are None are left out."""
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def call_of(id_: str, name: str, arguments: str) -> Json:
    """A call of a tool in OpenAI's shape."""
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def content_of(content: Any) -> Content:
    """Content of a message of Anthropic's or Open Responses' API in our parts."""
    return parts_of([p.model_dump() for p in content] if isinstance(content, list) else content)


def choose_tools(tools: list[Json], choice: Any, parallel: bool) -> dict[str, Any]:
    """Fields of Ask: the tools that may be called. choice: tool_choice, a word or (names, mode); None is "auto"."""
    choice = choice or "auto"
    names = [t["function"]["name"] for t in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, f"tools: {next(n for n in names if names.count(n) > 1)!r} is there twice", "tools")
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise ApiError(400, "tool_choice is 'required', but there are no tools", "tool_choice")
        mode = choice if tools else "none"
    else:
        wanted, mode = choice
        if missing := [n for n in wanted if n not in names]:
            raise ApiError(400, f"tool_choice: there is no tool {missing[0]!r} in tools", "tool_choice")
        tools = [t for t in tools if t["function"]["name"] in wanted]
    return {"tools": tools, "choice": mode, "parallel": parallel}


def logprobs_of(tokenizer: Tokenizer, scores: list[TokenLogprob]) -> list[Json]:
    """As chat completions and responses show them."""

    def shown(token: int, logprob: float) -> Json:
        data = tokenizer.bytes_of(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}

    return [shown(s.token, s.logprob) | {"top_logprobs": [shown(t, p) for t, p in s.top]} for s in scores]


def usage_of(parts: AnswerParts) -> Json:
    """As OpenAI counts tokens."""
    read, made = parts.prompt_tokens, parts.completion_tokens
    counts = dict(prompt_tokens=read, completion_tokens=made, total_tokens=read + made)
    never = dict(audio_tokens=0, accepted_prediction_tokens=0, rejected_prediction_tokens=0)
    return {
        **counts,
        "prompt_tokens_details": {"cached_tokens": parts.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": parts.reasoning_tokens, **never},
    }


def finish_reason(c: Completion, calls: bool) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "length" if c.finish_reason == "length" else "tool_calls" if calls else "stop"
