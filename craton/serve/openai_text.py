"""OpenAI's text completions and embeddings."""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import APIRouter

from craton.engine.converse import AnswerDelta, Prepared, Talker, sampling_values
from craton.engine.request import Sampling, TokenLogprob
from craton.serve import shapes
from craton.serve.dialect import check_stream_options, finish_reason, sampling_of, usage_of
from craton.serve.openai_chat import DONE
from craton.serve.reply import Reply, State, event, whole
from craton.serve.schema import CompletionRequest, EmbeddingRequest
from craton.serve.served import Answers, ApiError, Json, Served
from craton.serve.worker import Stream
from craton.text.tokenizer import Tokenizer

_MOST_ANSWERS = 512  # to one request


def routes(state: State) -> APIRouter:
    """POST /v1/completions and /v1/embeddings."""
    router = APIRouter()

    @router.post(**state.route("/v1/completions", "A text completion", shapes.COMPLETION, streamed=True))
    async def completions(body: CompletionRequest) -> Reply:
        return Reply(complete(state.counted(body), body), bool(body.stream), state)

    @router.post(**state.route("/v1/embeddings", "Embeddings", shapes.EMBEDDINGS))
    async def embeddings(body: EmbeddingRequest) -> Reply:
        return Reply(embed(state.counted(body), body), False, state)

    return router


# ---- completions ------------------------------------------------------------------------------------------------


def _prepare(talker: Talker, body: CompletionRequest) -> list[Prepared]:
    """Each prompt in tokens. Takes a thread's time."""
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise ApiError(400, f"best_of is {body.best_of}; only what equals n is supported", "best_of")
    check_stream_options(body)
    if body.echo and body.stream:
        raise ApiError(400, "echo and stream exclude each other", "echo")
    values = sampling_values(talker, sampling_of(body))
    values["max_tokens"], values["logprobs"] = 16 if body.max_tokens is None else body.max_tokens, body.logprobs
    if body.echo and body.logprobs is not None:
        values["prompt_logprobs"] = body.logprobs
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts: list[Any] = [body.prompt] if one else list(body.prompt)
    if len(prompts) * n > _MOST_ANSWERS:
        raise ApiError(400, f"prompt: {len(prompts)} prompts times n are more than {_MOST_ANSWERS} answers", "prompt")
    sampling = Sampling(**values)
    matcher = talker.engine.matcher(sampling)
    ids = [talker.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    return [Prepared(i, sampling, matcher) for i in ids]


@dataclass
class _Text:
    """One answer as it grows. `add` is the one reading of what the engine says."""

    index: int
    tokenizer: Tokenizer
    wanted: int | None  # how many likeliest tokens are shown; None: no scores
    text: list[str] = field(default_factory=list)
    scores: list[TokenLogprob | None] = field(default_factory=list)
    prompt_scores: list[TokenLogprob | None] = field(default_factory=list)
    offset: int = 0
    finish: str | None = None

    def add(self, d: AnswerDelta) -> Json | None:
        """The choice of a streamed event; None if nothing is new."""
        new = "".join(p.text for p in d.parts)
        self.text.append(new)
        self.scores += d.logprobs
        if d.finished is not None:
            self.finish = finish_reason(d.finished, False)
            self.prompt_scores = d.finished.prompt_logprobs or [None]
        if not (new or d.finished or d.logprobs):
            return None
        shown = self.logprobs(list(d.logprobs))
        return {"index": self.index, "text": new, "logprobs": shown, "finish_reason": self.finish}

    def whole(self, echoed: str, prompt: list[int]) -> Json:
        """The choice, whole. echoed: the prompt's text that comes first, with its scores; "" for none."""
        self.offset = 0
        scores = [*self.prompt_scores, *self.scores] if echoed else self.scores
        text = echoed + "".join(self.text)
        shown = self.logprobs(scores, prompt[0])
        return {"index": self.index, "text": text, "logprobs": shown, "finish_reason": self.finish}

    def logprobs(self, scores: list[TokenLogprob | None], first: int | None = None) -> Json | None:
        """In the old form, offsets going on from call to call. first: the token that has no score."""
        if self.wanted is None:
            return None
        out: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for s in scores:
            token = s.token if s is not None else first
            assert token is not None
            text = self._name(token)
            top = None if s is None else {self._name(t): max(p, -9999.0) for t, p in s.top}
            out["tokens"].append(text)
            out["token_logprobs"].append(None if s is None else max(s.logprob, -9999.0))
            out["top_logprobs"].append(top)
            out["text_offset"].append(self.offset)
            self.offset += len(text)
        return out

    def _name(self, token: int) -> str:
        return self.tokenizer.bytes_of(token).decode("utf-8", "replace")


async def _merged(running: list[Answers]) -> AsyncGenerator[tuple[int, list[AnswerDelta]]]:
    """What comes of any of several requests, with its number."""
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def pump(at: int, answers: Answers) -> None:
        try:
            async for deltas in answers:
                queue.put_nowait((at, deltas))
            queue.put_nowait((at, None))
        except Exception as error:
            queue.put_nowait((at, error))

    tasks = [asyncio.create_task(pump(i, a)) for i, a in enumerate(running)]
    try:
        left = len(tasks)
        while left:
            at, deltas = await queue.get()
            if isinstance(deltas, Exception):
                raise deltas
            if deltas is None:
                left -= 1
            else:
                yield at, deltas
    finally:
        for task in tasks:
            task.cancel()


async def complete(served: Served, body: CompletionRequest) -> AsyncIterator[bytes]:
    """The body of the response, in pieces where it is streamed."""
    prepared = await asyncio.to_thread(_prepare, served.talker, body)
    head: Json = dict(id=f"cmpl-{secrets.token_hex(12)}", object="text_completion", created=int(time.time()))
    head |= {"model": served.name, "system_fingerprint": "craton"}
    n, tokenizer = prepared[0].sampling.n, served.talker.tokenizer
    made = [_Text(i, tokenizer, body.logprobs) for i in range(n * len(prepared))]
    include = bool(body.stream_options and body.stream_options.include_usage)
    streamed_head = {**head, **({"usage": None} if include else {})}
    running: list[Answers] = []
    try:
        for p in prepared:
            running.append(Answers(served, p, already_admitted=bool(running)))
        async with aclosing(_merged(running)) as merged:
            async for at, deltas in merged:
                pieces = [made[at * n + d.index].add(d) for d in deltas]
                if body.stream:
                    yield b"".join(event({**streamed_head, "choices": [c]}) for c in pieces if c)
        usage = _usage(running)
        if body.stream:
            if include:
                yield event({**head, "choices": [], "usage": usage})
            yield DONE
        else:
            echoes = [_echo(body, tokenizer, p.ids) for p in prepared]
            choices = [text.whole(echoes[i // n], prepared[i // n].ids) for i, text in enumerate(made)]
            yield whole({**head, "choices": choices, "usage": usage})
    finally:
        for a in running:
            a.close()


def _echo(body: CompletionRequest, tokenizer: Tokenizer, ids: list[int]) -> str:
    if not body.echo:
        return ""
    return body.prompt if isinstance(body.prompt, str) else tokenizer.decode(ids)


def _usage(running: list[Answers]) -> Json:
    each = [usage_of(a.parts) for a in running]
    out: Json = {k: sum(u[k] for u in each) for k in ("prompt_tokens", "completion_tokens", "total_tokens")}
    cached = sum(a.parts.cached_tokens for a in running)
    out["prompt_tokens_details"] = {"cached_tokens": cached, "audio_tokens": 0}
    return out


# ---- embeddings -------------------------------------------------------------------------------------------------


async def embed(served: Served, body: EmbeddingRequest) -> AsyncIterator[bytes]:
    """The body of the response."""
    size, tokenizer = served.talker.engine.config.hidden_size, served.talker.tokenizer
    if body.dimensions not in (None, size):
        raise ApiError(400, f"dimensions is {body.dimensions}; this model's embeddings have {size}", "dimensions")
    one = isinstance(body.input, str) or (body.input and isinstance(body.input[0], int))
    many: list[Any] = [body.input] if one else list(body.input)
    ids = await asyncio.to_thread(lambda: [tokenizer.encode(x) if isinstance(x, str) else x for x in many])
    if empty := [i for i, x in enumerate(ids) if not x]:
        raise ApiError(400, f"input: text {empty[0]} is empty", "input")
    streams: list[Stream] = []
    try:
        for x in ids:
            admitted = bool(streams)
            streams.append(served.worker.submit(x, Sampling(max_tokens=0), embed=True, already_admitted=admitted))
        data = []
        for i, stream in enumerate(streams):
            vector: list[float] = []
            while events := await stream.take():
                vector = events[-1].completion.embedding if events[-1].finished else vector
            shown: Any = vector
            if body.encoding_format == "base64":
                shown = base64.b64encode(np.asarray(vector, np.float32).tobytes()).decode()
            data.append({"object": "embedding", "index": i, "embedding": shown})
    finally:
        for stream in streams:
            stream.close()
    tokens = sum(map(len, ids))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    yield json.dumps({"object": "list", "data": data, "model": served.name, "usage": usage}).encode()
