"""What the dialects have in common: fields of requests that mean the same, and how scores are shown."""

from typing import Any

from craton.base import UserError
from craton.engine.converse import EFFORT, AnswerParts, schema_text
from craton.engine.request import Completion, TokenLogprob
from craton.serve.schema import Sampled, Thinking
from craton.serve.served import ApiError
from craton.text.tokenizer import Tokenizer

_SAMPLED = tuple(
    (
        "temperature top_p n seed presence_penalty frequency_penalty top_k min_p repetition_penalty min_tokens "
        "ignore_eos"
    ).split()
)


def sampling_of(body: Sampled) -> dict[str, Any]:
    """Fields of Sampling that OpenAI's generation endpoints share."""
    out = {k: getattr(body, k) for k in _SAMPLED}
    out["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    out["stop_token_ids"] = tuple(body.stop_token_ids or ())
    out["logit_bias"] = {int(k): v for k, v in (body.logit_bias or {}).items()}
    if (s := body.structured_outputs) is not None:
        given = {
            "json_schema": None if s.json_ is None else schema_text(s.json_),
            "regex": s.regex,
            "choice": tuple(s.choice or ()),
            "grammar": s.grammar,
        }
        if sum(bool(v) for v in given.values()) != 1:
            raise UserError(
                "structured_outputs: give exactly one of json, regex, choice and grammar", field="structured_outputs"
            )
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
        on = False
    budget = EFFORT.get(effort or "")
    if thinking is not None and thinking.budget_tokens is not None:
        budget = thinking.budget_tokens
    return {
        "thinking": on,
        "budget": budget,
        "effort": effort if effort != "none" else None,
        "hide_reasoning": bool(thinking and thinking.display == "omitted"),
    }


def choose_tools(tools: list[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], str]:
    """tool_choice, a word or (names, mode) -> the tools that may be called, and "none", "auto" or "required"."""
    names = [t["function"]["name"] for t in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, f"tools: {next(n for n in names if names.count(n) > 1)!r} is there twice", "tools")
    if choice is None:
        return tools, "auto" if tools else "none"
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise ApiError(400, "tool_choice is 'required', but there are no tools", "tool_choice")
        return tools, choice if tools else "none"
    wanted, mode = choice
    if missing := [n for n in wanted if n not in names]:
        raise ApiError(400, f"tool_choice: there is no tool {missing[0]!r} in tools", "tool_choice")
    return [t for t in tools if t["function"]["name"] in wanted], mode


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.bytes_of(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def logprobs_of(tokenizer: Tokenizer, scores: list[TokenLogprob]) -> list[dict[str, Any]]:
    """As chat completions and responses show them."""
    return [
        _named(tokenizer, s.token, s.logprob) | {"top_logprobs": [_named(tokenizer, t, p) for t, p in s.top]}
        for s in scores
    ]


def usage_of(parts: AnswerParts) -> dict[str, Any]:
    """As OpenAI counts tokens."""
    return {
        "prompt_tokens": parts.prompt_tokens,
        "completion_tokens": parts.completion_tokens,
        "total_tokens": parts.prompt_tokens + parts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": parts.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": parts.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def finish_reason(c: Completion, calls: bool) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "length" if c.finish_reason == "length" else "tool_calls" if calls else "stop"
