"""A request in no dialect: what the OpenAI, Open Responses and Anthropic endpoints turn theirs into, and the answers as
parts that they turn back. One path, streamed or not, so that both are the same text."""

import asyncio
import base64
import binascii
import io
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from craton.base import UserError, read_json
from craton.engine.engine import Engine
from craton.engine.model import load_model
from craton.engine.request import Completion, Reasoning, Sampling, TokenLogprob
from craton.engine.structured import Matcher
from craton.serve.worker import Failed, Piece, Stream, Worker
from craton.text import dialogue
from craton.text.dialogue import Dialogue, Parser, Part
from craton.text.tokenizer import Tokenizer

# Tokens of thinking that OpenAI's efforts allow. None: as long as the model wants.
EFFORT: dict[str, int | None] = {"minimal": 256, "low": 1024, "medium": 4096, "high": None, "xhigh": None, "max": None}
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ApiError(Exception):
    """An answer that is an error. param: the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}


@dataclass
class Served:
    """A model behind the server."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    worker: Worker
    dialogue: Dialogue | None
    defaults: dict[str, float]  # of sampling, from generation_config.json
    pretrained_only: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def describe(self) -> dict[str, Any]:
        """As /v1/models lists it: OpenAI's fields, Anthropic's, and ours."""
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.created))
        d = self.dialogue
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "craton",
            "type": "model",
            "display_name": self.name,
            "created_at": made,
            "context_length": self.engine.context,
            "defaults": {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                **self.defaults,
            },
            "chat": d is not None,
            "thinks": bool(d and d.thinking),
            "tools": d is not None,
            "images": False,
            "pretrained_only": self.pretrained_only,
        }


def open_served(name: str, path: str, max_wait: float, max_queue: int, observe: Any, **options: Any) -> Served:
    """Load a model folder or GGUF file for serving, or MODEL+ADAPTER. Raises UserError as load_model does."""
    if not Path(path).exists() and "+" in path:
        path, _, options["adapter"] = path.partition("+")
    model, folder = load_model(path, **options), Path(path)
    found, defaults, base = None, dict[str, float](), False
    if model.tokenizer.chat_template is not None:
        found = dialogue.learn(model.tokenizer, model.network.config.eos_token_ids)
    if folder.is_dir():
        if (file := folder / "generation_config.json").is_file():
            own = read_json(file)
            defaults = {
                k: own[k] for k in _DEFAULTS if isinstance(own.get(k), int | float) and not isinstance(own[k], bool)
            }
            if own.get("do_sample") is False:
                defaults = {"temperature": 0.0}
        base = (folder / "record.json").is_file() and read_json(folder / "record.json").get(
            "objective"
        ) == "pretraining"
    if found and found.turn_end is not None:
        model.engine_options["end_ids"] = (found.turn_end,)
    engine = model.engine
    worker = Worker(engine, max_wait, max_queue, observe)
    return Served(name, engine, model.tokenizer, worker, found, defaults, base)


@dataclass
class Ask:
    """sampling: fields of Sampling by name; None means the model's default."""

    sampling: dict[str, Any]
    prompt: list[int] | None = None  # else:
    messages: list[dict[str, Any]] = field(default_factory=list)  # OpenAI's shape, contents as text
    tools: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "auto"  # "none", "auto" or "required"; a named tool is the only one and required
    parallel: bool = True
    thinking: bool | None = None
    budget: int | None = None
    effort: str | None = None
    prefix: str | None = None  # how the answer begins
    template: dict[str, Any] = field(default_factory=dict)
    hide_reasoning: bool = False


@dataclass
class Delta:
    """Something new in one answer."""

    index: int
    parts: list[Part]
    logprobs: list[TokenLogprob]  # of content
    finished: Completion | None
    calls: bool  # whether the answer has called a tool, so far


@dataclass
class Prepared:
    ids: list[int]
    sampling: Sampling
    matcher: Matcher | None
    opened: bool  # the prompt leaves the model thinking
    may_think: bool
    tools: bool


def prepare(served: Served, ask: Ask) -> Prepared:
    """From messages to tokens; takes a thread's time. Raises UserError for what the model or its template refuses."""
    given = {k: v for k, v in ask.sampling.items() if v is not None}
    values: dict[str, Any] = {**served.defaults, **given}
    if values.get("top_k") == -1:
        values["top_k"] = 0
    opened, tools, may_think = False, False, False
    if ask.prompt is not None:
        ids = ask.prompt
    else:
        d = served.dialogue
        if d is None:
            raise UserError(f"the model {served.name!r} has no chat template; use /v1/completions")
        tools = bool(ask.tools) and ask.choice != "none"
        thinking = ask.thinking
        prompt, opened = d.render(
            ask.messages, ask.tools if tools else [], thinking, ask.effort, ask.prefix, ask.template
        )
        ids = d.tokenizer.encode_rendered(prompt)
        if ask.prefix and any(values.get(k) for k in ("json_schema", "regex", "choice", "grammar")):
            raise UserError(
                "a schema and an answer that was begun exclude each other; leave out the last message or the schema"
            )
        may_think = d.thinking is not None and not ask.prefix and thinking is not False
        if d.thinking and may_think:
            begin = d.tokenizer.encode_rendered(d.thinking[0])
            if opened or len(begin) == 1:
                values["reasoning"] = Reasoning(d.thinking[1], None if opened else begin[0], ask.budget)
        if tools:
            schema = values.pop("json_schema", None)
            if schema is not None and ask.choice == "required":
                raise UserError(
                    "response_format cannot be met by an answer that must call a tool; leave one of them out"
                )
            values["stop_before"] = d.calls.opening.split("\n")[0] or d.calls.opening
            if ask.choice == "required":  # nothing but calls, which no stop text may break
                values["stop"] = ()
            if any(values.get(k) for k in ("regex", "choice", "grammar")):
                raise UserError("tools and structured_outputs exclude each other")
            values["grammar"] = d.grammar(ask.tools, ask.choice, ask.parallel, schema if ask.choice == "auto" else None)
        if tools or d.thinking:
            values["show_special"] = d.show_special(tools)
    room = served.engine.context - len(ids)
    values["max_tokens"] = room if values.get("max_tokens") is None else values["max_tokens"]
    sampling = Sampling(**values)
    return Prepared(ids, sampling, served.engine.matcher(sampling), opened, may_think, tools)


class Answers:
    """A request that runs. Iterate for deltas; close it whatever happens."""

    def __init__(self, served: Served, prepared: Prepared, further: bool = False):
        self.served, self.prepared = served, prepared
        self.stream: Stream = served.worker.submit(prepared.ids, prepared.sampling, prepared.matcher, further=further)
        self.prompt_tokens, self.cached_tokens, self.completion_tokens, self.reasoning_tokens = (
            len(prepared.ids),
            0,
            0,
            0,
        )
        self.parsers = [
            Parser(
                served.dialogue if prepared.may_think or prepared.tools else None,
                prepared.tools,
                prepared.opened,
                prepared.may_think,
            )
            for _ in range(prepared.sampling.n)
        ]
        self.plain = not (prepared.may_think or prepared.tools)
        self.unplaced: list[list[TokenLogprob]] = [
            [] for _ in range(prepared.sampling.n)
        ]  # not known yet to be content
        self.aligned = [_Aligned(served.tokenizer, prepared.sampling.show_special) for _ in range(prepared.sampling.n)]

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        while pieces := await self.stream.take():
            # Each step by itself where scores must be told apart: of thinking, of calls, of the answer.
            yield [self._delta(p) for p in (_joined(pieces) if self.prepared.sampling.logprobs is None else pieces)]

    def _delta(self, piece: Piece) -> Delta:
        parser = self.parsers[piece.index]
        before = parser.state
        parts = [*parser.feed(piece.text), *(parser.feed("", last=True) if piece.finished else ())]
        logprobs, content = piece.logprobs, "".join(p.text for p in parts if p.kind == "content")
        if logprobs and not self.plain:
            logprobs = self._of_content(piece.index, logprobs, before, parser.state, bool(content))
        if logprobs or content:
            logprobs = self.aligned[piece.index].take(logprobs, content)
        self.cached_tokens = max(self.cached_tokens, piece.cached)
        if (c := piece.finished) is not None:
            self.completion_tokens += len(c.token_ids)
            self.reasoning_tokens += c.reasoning_tokens
            if c.finish_reason == "error":
                raise UserError(str(c.stop_reason))
            if c.finish_reason == "cancelled":
                raise Failed("the request was cancelled")
        return Delta(
            piece.index, parts, logprobs, piece.finished, parser.call >= 0 and parser.state not in ("name", "arguments")
        )

    def _of_content(
        self, index: int, new: list[TokenLogprob], before: str, after: str, shown: bool
    ) -> list[TokenLogprob]:
        """Those of the answer, not of thinking or of calls."""
        if before == "start":
            new = self.unplaced[index] + new
            self.unplaced[index] = new if after == "start" else []
        return new if before == "content" or (after == "content" and shown) else []

    def close(self) -> None:
        self.stream.close()


class _Aligned:
    """Log-probabilities held until the text of their tokens is out, so that they join to it."""

    def __init__(self, tokenizer: Tokenizer, shown: tuple[int, ...]):
        self.tokenizer, self.held, self.start, self.sent = tokenizer, deque[TokenLogprob](), 0, 0
        self.hidden = tokenizer.special_ids.difference(shown)  # no part of the text

    def take(self, new: list[TokenLogprob], text: str) -> list[TokenLogprob]:
        self.held.extend(s for s in new if s.token not in self.hidden)
        if text and not self.sent and not text[0].isspace():  # white space that was dropped before the answer
            first = b"".join(self.tokenizer.bytes_of(s.token) for s in self.held)
            self.start = len(first.lstrip()) - len(first)
        self.sent += len(text.encode())
        out = []
        while self.held and (self.start < self.sent or not self.tokenizer.bytes_of(self.held[0].token)):
            out.append(self.held.popleft())
            self.start += len(self.tokenizer.bytes_of(out[-1].token))
        return out


def _joined(pieces: list[Piece]) -> list[Piece]:
    """What has come of each answer as one piece: a reader that is behind gets fewer, larger ones."""
    if len(pieces) == 1:
        return pieces
    out: dict[int, Piece] = {}
    for p in pieces:
        if (o := out.get(p.index)) is None:
            out[p.index] = p
        else:
            out[p.index] = Piece(
                p.index, o.text + p.text, o.token_ids + p.token_ids, o.logprobs + p.logprobs, p.finished, p.cached
            )
    return list(out.values())


async def run(served: Served, ask: Ask) -> Answers:
    """Prepared in a thread, then submitted. Raises UserError and Refused."""
    return Answers(served, await asyncio.to_thread(prepare, served, ask))


def text_of(content: Any) -> str:
    """The parts of a message as text. An image becomes a note, since no model here sees yet; UserError if it is
    none."""
    if content is None or isinstance(content, str):
        return content or ""
    out = []
    for part in content:
        kind = part["type"]
        if kind in ("text", "input_text", "output_text", "reasoning_text", "summary_text"):
            out.append(part["text"])
        elif kind == "refusal":
            out.append(part["refusal"])
        elif kind == "image_url":
            out.append(_image(part["image_url"]["url"]))
        elif kind == "input_image":
            out.append(_image(part["image_url"]))
        elif kind == "image":
            out.append(_image(f"data:{part['source']['media_type']};base64,{part['source']['data']}"))
    return "\n".join(out)


def _image(url: str) -> str:
    head, comma, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise UserError("image: give it as data:image/...;base64,...; addresses are not fetched")
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:  # reads the header only
            size = f"{image.width}x{image.height}"
            return f"[An image was attached here ({image.format}, {size}). This model cannot see images.]"
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError("image: not a picture that can be read") from None


def schema_text(schema: Any) -> str:
    return json.dumps(schema, ensure_ascii=False)
