"""OpenAI's chat completions, completions and embeddings."""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from craton.base import UserError
from craton.engine.request import Completion, Sampling, TokenLogprob
from craton.serve.ask import EFFORT, Answers, ApiError, Ask, Prepared, Served, run, schema_text, text_of
from craton.serve.schema import ChatRequest, CompletionRequest, EmbeddingRequest, Sampled, Thinking
from craton.serve.worker import Stream
from craton.text.tokenizer import Tokenizer

_MOST_ANSWERS = 512  # to one request
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


# ---- to the engine ----------------------------------------------------------------------------------------------


def sampling_of(body: Sampled) -> dict[str, Any]:
    out = {
        k: getattr(body, k)
        for k in (
            "temperature",
            "top_p",
            "n",
            "seed",
            "presence_penalty",
            "frequency_penalty",
            "top_k",
            "min_p",
            "repetition_penalty",
            "min_tokens",
            "ignore_eos",
        )
    }
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
            raise UserError("structured_outputs: give exactly one of json, regex, choice and grammar")
        out |= given
    return out


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


def messages_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dumped messages with contents as text."""
    out = []
    for m in messages:
        shown = {k: v for k, v in m.items() if v is not None and k in ("role", "name", "tool_call_id", "tool_calls")}
        shown["content"] = text_of(m.get("content"))
        if thought := m.get("reasoning_content") or m.get("reasoning"):
            shown["reasoning_content"] = thought
        for call in shown.get("tool_calls", ()):
            call.pop("index", None)
        out.append(shown)
    return out


def choose(tools: list[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], str]:
    """tool_choice in any form -> the tools that may be called, and "none", "auto" or "required"."""
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


def chat_ask(body: ChatRequest) -> Ask:
    sampling = sampling_of(body)
    if (
        body.max_tokens is not None
        and body.max_completion_tokens is not None
        and body.max_tokens != body.max_completion_tokens
    ):
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", "max_tokens")
    sampling["max_tokens"] = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.logprobs or body.top_logprobs is not None:
        sampling["logprobs"] = body.top_logprobs or 0
    if body.response_format is not None and body.response_format.type != "text":
        if body.structured_outputs is not None:
            raise ApiError(400, "response_format and structured_outputs exclude each other", "response_format")
        sampling["json_schema"] = schema_text(
            {"type": "object"}
            if body.response_format.type == "json_object"
            else body.response_format.json_schema.schema_ or {}
        )
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    choice: Any = body.tool_choice
    if choice is not None and not isinstance(choice, str):
        choice = (
            ([choice.function.name], "required")
            if choice.type == "function"
            else ([t.function.name for t in choice.allowed_tools.tools], choice.allowed_tools.mode)
        )
    tools, mode = choose([t.model_dump(exclude_none=True) for t in body.tools or ()], choice)
    parallel = body.parallel_tool_calls is not False
    effort = body.reasoning_effort or (body.reasoning.effort if body.reasoning else None)
    return Ask(
        sampling,
        messages=messages_of([m.model_dump() for m in body.messages]),
        tools=tools,
        choice=mode,
        parallel=parallel,
        template=dict(body.chat_template_kwargs or {}),
        **thinking_of(body.thinking, effort),
    )


# ---- from the engine --------------------------------------------------------------------------------------------


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.bytes_of(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def logprobs_of(tokenizer: Tokenizer, scores: list[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        _named(tokenizer, s.token, s.logprob) | {"top_logprobs": [_named(tokenizer, t, p) for t, p in s.top]}
        for s in scores
    ]


def usage_of(a: Answers) -> dict[str, Any]:
    return {
        "prompt_tokens": a.prompt_tokens,
        "completion_tokens": a.completion_tokens,
        "total_tokens": a.prompt_tokens + a.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": a.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": a.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _finish(c: Completion, calls: bool) -> str:
    return "length" if c.finish_reason == "length" else "tool_calls" if calls else "stop"


async def chat(served: Served, body: ChatRequest) -> AsyncIterator[bytes]:
    ask = chat_ask(body)
    answers = await run(served, ask)
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": "craton",
        "service_tier": "default",
    }
    want = "logprobs" in ask.sampling
    try:
        async for chunk in (
            _stream_chat(answers, ask, head, want, body) if body.stream else _whole_chat(answers, ask, head, want)
        ):
            yield chunk
    finally:
        answers.close()


async def _whole_chat(answers: Answers, ask: Ask, head: dict[str, Any], want: bool) -> AsyncIterator[bytes]:
    choices: list[dict[str, Any]] = []
    for i in range(answers.prepared.sampling.n):
        choices.append(
            {
                "index": i,
                "message": {"role": "assistant", "content": None, "refusal": None, "annotations": []},
                "logprobs": {"content": [], "refusal": None} if want else None,
                "finish_reason": None,
            }
        )
    async for deltas in answers:
        for d in deltas:
            choice = choices[d.index]
            message = choice["message"]
            for p in d.parts:
                if p.kind == "content":
                    message["content"] = (message["content"] or "") + p.text
                elif p.kind == "reasoning":
                    if not ask.hide_reasoning:
                        message["reasoning_content"] = message.get("reasoning_content", "") + p.text
                elif p.kind == "call":
                    message.setdefault("tool_calls", []).append(
                        {"id": p.id, "type": "function", "function": {"name": p.text, "arguments": ""}}
                    )
                else:
                    message["tool_calls"][p.call]["function"]["arguments"] += p.text
            if want:
                choice["logprobs"]["content"] += logprobs_of(answers.served.tokenizer, d.logprobs)
            if d.finished is not None:
                choice["finish_reason"] = _finish(d.finished, d.calls)
                if message["content"] is None and "tool_calls" not in message:
                    message["content"] = ""
    yield json.dumps(
        {"object": "chat.completion", **head, "choices": choices, "usage": usage_of(answers)}, ensure_ascii=False
    ).encode()


async def _stream_chat(
    answers: Answers, ask: Ask, head: dict[str, Any], want: bool, body: ChatRequest
) -> AsyncIterator[bytes]:
    include = bool(body.stream_options and body.stream_options.include_usage)
    usage = {"usage": None} if include else {}
    # The same for every chunk, so made once: what differs is the middle.
    start = (
        b"data: "
        + json.dumps(
            {"object": "chat.completion.chunk", **head, **usage}, ensure_ascii=False, separators=(",", ":")
        ).encode()[:-1]
        + b',"choices":[{"index":'
    )

    def chunk(
        index: int, delta: dict[str, Any], logprobs: list[TokenLogprob] | None = None, finish: str | None = None
    ) -> bytes:
        scores = (
            json.dumps(
                {"content": logprobs_of(answers.served.tokenizer, logprobs), "refusal": None}, ensure_ascii=False
            ).encode()
            if want and logprobs is not None
            else b"null"
        )
        end = b'"' + finish.encode() + b'"' if finish else b"null"
        middle = json.dumps(delta, ensure_ascii=False, separators=(",", ":")).encode()
        return b'%b%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]}\n\n' % (start, index, middle, scores, end)

    begun: set[int] = set()
    async for deltas in answers:
        out = []
        for d in deltas:
            if d.index not in begun:
                begun.add(d.index)
                out.append(chunk(d.index, {"role": "assistant", "content": "", "refusal": None}))
            scores: list[TokenLogprob] | None = d.logprobs or None
            for p in d.parts:
                if p.kind == "content":
                    out.append(chunk(d.index, {"content": p.text}, scores))
                    scores = None
                elif p.kind == "reasoning":
                    if not ask.hide_reasoning:
                        out.append(chunk(d.index, {"reasoning_content": p.text}))
                elif p.kind == "call":
                    out.append(
                        chunk(
                            d.index,
                            {
                                "tool_calls": [
                                    {
                                        "index": p.call,
                                        "id": p.id,
                                        "type": "function",
                                        "function": {"name": p.text, "arguments": ""},
                                    }
                                ]
                            },
                        )
                    )
                else:
                    out.append(chunk(d.index, {"tool_calls": [{"index": p.call, "function": {"arguments": p.text}}]}))
            if scores:
                out.append(chunk(d.index, {"content": ""}, scores))
            if d.finished is not None:
                out.append(chunk(d.index, {}, None, _finish(d.finished, d.calls)))
        if out:
            yield b"".join(out)
    if include:
        yield event({"object": "chat.completion.chunk", **head, "choices": [], "usage": usage_of(answers)})
    yield DONE


# ---- completions ------------------------------------------------------------------------------------------------


class _Text:
    """One answer of /v1/completions in the making, with its log-probabilities in the old form."""

    def __init__(self, tokenizer: Tokenizer, want: int | None):
        self.tokenizer, self.want, self.offset = tokenizer, want, 0

    def logprobs(self, scores: list[TokenLogprob | None], first: int | None = None) -> dict[str, Any] | None:
        if self.want is None:
            return None
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for s in scores:
            token = s.token if s is not None else first
            assert token is not None
            text = self.tokenizer.bytes_of(token).decode("utf-8", "replace")
            out["tokens"].append(text)
            out["token_logprobs"].append(None if s is None else max(s.logprob, -9999.0))
            out["top_logprobs"].append(
                None
                if s is None
                else {self.tokenizer.bytes_of(t).decode("utf-8", "replace"): max(p, -9999.0) for t, p in s.top}
            )
            out["text_offset"].append(self.offset)
            self.offset += len(text)
        return out


def _completion_asks(served: Served, body: CompletionRequest) -> list[Prepared]:
    """Takes a thread's time."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, f"best_of is {body.best_of}; only what equals n is supported", "best_of")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    if body.echo and body.stream:
        raise ApiError(400, "echo and stream exclude each other", "echo")
    values: dict[str, Any] = {**served.defaults, **{k: v for k, v in sampling_of(body).items() if v is not None}}
    if values.get("top_k") == -1:
        values["top_k"] = 0
    values["max_tokens"], values["logprobs"] = 16 if body.max_tokens is None else body.max_tokens, body.logprobs
    if body.echo and body.logprobs is not None:
        values["prompt_logprobs"] = body.logprobs
    prompts: list[Any] = (
        [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else list(body.prompt)
    )
    if len(prompts) * (body.n or 1) > _MOST_ANSWERS:
        raise ApiError(400, f"prompt: {len(prompts)} prompts times n are more than {_MOST_ANSWERS} answers", "prompt")
    sampling = Sampling(**values)
    matcher = served.engine.matcher(sampling)
    return [
        Prepared(served.tokenizer.encode(p) if isinstance(p, str) else p, sampling, matcher, False, False, False)
        for p in prompts
    ]


async def completions(served: Served, body: CompletionRequest) -> AsyncIterator[bytes]:
    prepared = await asyncio.to_thread(_completion_asks, served, body)
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": "craton",
    }
    running: list[Answers] = []
    try:
        for p in prepared:
            running.append(Answers(served, p, further=bool(running)))
        async for chunk in (_stream_text if body.stream else _whole_text)(running, body, head):
            yield chunk
    finally:
        for a in running:
            a.close()


def _all_usage(running: list[Answers]) -> dict[str, Any]:
    each = [usage_of(a) for a in running]
    out: dict[str, Any] = {k: sum(u[k] for u in each) for k in ("prompt_tokens", "completion_tokens", "total_tokens")}
    out["prompt_tokens_details"] = {"cached_tokens": sum(a.cached_tokens for a in running), "audio_tokens": 0}
    return out


async def _whole_text(running: list[Answers], body: CompletionRequest, head: dict[str, Any]) -> AsyncIterator[bytes]:
    choices = []
    for at, a in enumerate(running):
        n, tokenizer = a.prepared.sampling.n, a.served.tokenizer
        texts, scores, done = [""] * n, [list[TokenLogprob | None]() for _ in range(n)], dict[int, Completion]()
        async for deltas in a:
            for d in deltas:
                texts[d.index] += "".join(p.text for p in d.parts)
                scores[d.index] += d.logprobs
                if d.finished is not None:
                    done[d.index] = d.finished
        for i in range(n):
            made = _Text(tokenizer, body.logprobs)
            text, all_scores, first = texts[i], scores[i], None
            if body.echo:
                ids = a.prepared.ids
                text = (body.prompt if isinstance(body.prompt, str) else tokenizer.decode(ids)) + text
                first = ids[0]
                known = done[0].prompt_logprobs or [None]
                all_scores = [*known, *all_scores]
            choices.append(
                {
                    "index": at * n + i,
                    "text": text,
                    "logprobs": made.logprobs(all_scores, first),
                    "finish_reason": _finish(done[i], False),
                }
            )
    yield json.dumps({**head, "choices": choices, "usage": _all_usage(running)}, ensure_ascii=False).encode()


async def _stream_text(running: list[Answers], body: CompletionRequest, head: dict[str, Any]) -> AsyncIterator[bytes]:
    include = bool(body.stream_options and body.stream_options.include_usage)
    usage = {"usage": None} if include else {}
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def pump(at: int, a: Answers) -> None:
        try:
            async for deltas in a:
                queue.put_nowait((at, deltas))
            queue.put_nowait((at, None))
        except Exception as error:
            queue.put_nowait((at, error))

    tasks = [asyncio.create_task(pump(i, a)) for i, a in enumerate(running)]
    made: dict[int, _Text] = {}
    try:
        left = len(tasks)
        while left:
            at, deltas = await queue.get()
            if isinstance(deltas, Exception):
                raise deltas
            if deltas is None:
                left -= 1
                continue
            out, n = [], running[at].prepared.sampling.n
            for d in deltas:
                index = at * n + d.index
                text = made.setdefault(index, _Text(running[at].served.tokenizer, body.logprobs))
                choice = {
                    "index": index,
                    "text": "".join(p.text for p in d.parts),
                    "logprobs": text.logprobs(list(d.logprobs)),
                    "finish_reason": _finish(d.finished, False) if d.finished else None,
                }
                if choice["text"] or choice["finish_reason"] or d.logprobs:
                    out.append(event({**head, **usage, "choices": [choice]}))
            yield b"".join(out)
        if include:
            yield event({**head, "choices": [], "usage": _all_usage(running)})
        yield DONE
    finally:
        for t in tasks:
            t.cancel()


# ---- embeddings -------------------------------------------------------------------------------------------------


async def embeddings(served: Served, body: EmbeddingRequest) -> AsyncIterator[bytes]:
    size = served.engine.config.hidden_size
    if body.dimensions not in (None, size):
        raise ApiError(400, f"dimensions is {body.dimensions}; this model's embeddings have {size}", "dimensions")
    many: list[Any] = (
        [body.input] if isinstance(body.input, str) or isinstance(body.input[0], int) else list(body.input)
    )
    ids = await asyncio.to_thread(lambda: [served.tokenizer.encode(x) if isinstance(x, str) else x for x in many])
    if empty := [i for i, x in enumerate(ids) if not x]:
        raise ApiError(400, f"input: text {empty[0]} is empty", "input")
    streams: list[Stream] = []
    try:
        for x in ids:
            streams.append(served.worker.submit(x, Sampling(max_tokens=0), embed=True, further=bool(streams)))
        data = []
        for i, stream in enumerate(streams):
            vector: list[float] = []
            while pieces := await stream.take():
                vector = pieces[-1].finished.embedding if pieces[-1].finished else vector
            shown = (
                base64.b64encode(np.asarray(vector, np.float32).tobytes()).decode()
                if body.encoding_format == "base64"
                else vector
            )
            data.append({"object": "embedding", "index": i, "embedding": shown})
    finally:
        for stream in streams:
            stream.close()
    tokens = sum(map(len, ids))
    yield json.dumps(
        {
            "object": "list",
            "data": data,
            "model": served.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    ).encode()
