"""Conversations: messages -> ask -> tokens -> parts of an answer. The one path below chat, tasks and every HTTP
dialect, whole or streamed, so that all give the same text."""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from craton.base import UserError, read_json, read_text
from craton.engine.engine import Engine, too_long
from craton.engine.model import load_model, single_file
from craton.engine.request import Completion, EngineEvent, Reasoning, Sampling, TokenLogprob
from craton.engine.structured import Matcher
from craton.text import dialogue
from craton.text.calls import Parser, Part
from craton.text.dialogue import Dialogue
from craton.text.fields import unenforced
from craton.text.harmony import FINAL, HarmonyParser
from craton.text.messages import text_of
from craton.text.tokenizer import Tokenizer
from craton.weights.folder import only_pretrained

# Tokens of thinking that OpenAI's efforts allow. None: as long as the model wants.
EFFORT: dict[str, int | None] = {"minimal": 256, "low": 1024, "medium": 4096, "high": None, "xhigh": None, "max": None}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# GGUF files say nothing of sampling: as llama.cpp, which they are made for.
_OF_GGUF = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
_FORMS = ("json_schema", "regex", "choice", "grammar")


@dataclass
class Talker:
    """A model that can be spoken to."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    dialogue: Dialogue | None  # None: it has no chat template
    defaults: dict[str, float]  # of sampling, from generation_config.json
    pretrained_only: bool  # it goes on with text rather than answering
    parameters: int
    bits: float  # a parameter, as they are stored
    adapter: str | None = None  # of the engine's, that its answers are made with
    created: int = field(default_factory=lambda: int(time.time()))


def open_talker(name: str, path: str, chat_template: Path | None = None, **options: Any) -> Talker:
    """A model folder, a GGUF file, or MODEL+ADAPTER. chat_template: a file with one, instead of the model's own.
    options: of load_model. UserError as load_model raises it."""
    if not Path(path).exists() and "+" in path:
        path, _, options["adapter"] = path.partition("+")
    model, folder = load_model(path, **{"device": None} | options), single_file(Path(path))
    found, defaults, pretrained = None, dict[str, float](), False
    if chat_template is not None:
        model.tokenizer.config["chat_template"] = read_text(chat_template)
    if model.tokenizer.chat_template is not None:
        found = dialogue.learn(model.tokenizer, model.network.config.eos_token_ids)
    if folder.suffix == ".gguf":
        defaults = dict(_OF_GGUF)
    elif folder.is_dir():
        defaults = _defaults(folder / "generation_config.json")
        pretrained = only_pretrained(folder)
    pretrained = chat_template is None and (pretrained or found is None)
    if found and found.turn_end is not None:
        model.engine_options["end_ids"] = (found.turn_end,)
    parameters = model.network.config.parameters
    files = [folder] if folder.suffix == ".gguf" else list(folder.glob("*.safetensors"))
    bits = round(8 * sum(f.stat().st_size for f in files) / parameters, 1)
    return Talker(name, model.engine, model.tokenizer, found, defaults, pretrained, parameters, bits)


def with_adapter(base: Talker, name: str, folder: Path) -> Talker:
    """A talker of an adapter that the base's engine has loaded by this name, with the chat template that the adapter
    brings, if the base has none. UserError as Tokenizer.open."""
    found, pretrained = base.dialogue, base.pretrained_only
    if pretrained and (folder / "tokenizer_config.json").is_file():
        tokenizer = Tokenizer.open(folder)
        if tokenizer.chat_template is not None:
            found, pretrained = dialogue.learn(tokenizer, base.engine.end_ids), False
    return replace(base, name=name, adapter=name, dialogue=found, pretrained_only=pretrained, created=int(time.time()))


def _defaults(file: Path) -> dict[str, float]:
    """Sampling that the model's publisher recommends. UserError for values that cannot be."""
    own = read_json(file) if file.is_file() else {}
    if own.get("do_sample") is False:
        return {"temperature": 0.0}
    found = {k: own[k] for k in NEUTRAL if isinstance(own.get(k), int | float) and not isinstance(own[k], bool)}
    try:
        Sampling(**_usable(found))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return found


def _usable(values: dict[str, Any]) -> dict[str, Any]:
    """As Sampling takes them: other programs write "all" as -1, and "the likeliest alone" as 0."""
    values = dict(values)
    if values.get("top_k") == -1:
        values["top_k"] = 0
    if values.get("top_p") == 0:
        values |= {"top_p": 1.0, "top_k": 1}
    return values


@dataclass
class Ask:
    """sampling: fields of Sampling by name; None means the model's default. messages: OpenAI's shape, contents in parts
    (craton/text/messages.py); or a prompt in tokens, which is not a conversation."""

    sampling: dict[str, Any]
    prompt: list[int] | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
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
class Prepared:
    """An ask in tokens."""

    ids: list[int]
    sampling: Sampling
    matcher: Matcher | None
    opened: bool = False  # the prompt leaves the model thinking
    may_think: bool = False
    channels: bool = False  # it is written in channels (harmony.py)
    tools: dict[str, dict[str, Any]] | None = None  # schemas of the arguments of those that may be called


def sampling_values(talker: Talker, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of Sampling: what was given over the model's defaults."""
    return _usable({**talker.defaults, **{k: v for k, v in given.items() if v is not None}})


def prepare(talker: Talker, ask: Ask) -> Prepared:
    """From messages to tokens; takes a thread's time. Raises UserError for what the model or its template refuses."""
    values = sampling_values(talker, ask.sampling)
    prepared = Prepared([], Sampling(), None)
    if ask.prompt is not None:
        prepared.ids = ask.prompt
    else:
        _render(talker, ask, values, prepared)
    room = talker.engine.context - len(prepared.ids)
    if values.get("max_tokens") is None:
        if room < 1:
            where = "messages" if ask.prompt is None else "prompt"
            raise too_long(len(prepared.ids), talker.engine.context, ", which leaves no room for an answer", where)
        values["max_tokens"] = room
    end = None if talker.dialogue is None else talker.dialogue.turn_end
    if talker.adapter and end is not None and end not in talker.engine.end_ids:  # of a template that it brings itself
        values["stop_token_ids"] = (*values.get("stop_token_ids", ()), end)
    prepared.sampling = Sampling(**values)
    prepared.matcher = talker.engine.matcher(prepared.sampling)
    return prepared


def _render(talker: Talker, ask: Ask, values: dict[str, Any], prepared: Prepared) -> None:
    """A conversation through the template; tools and thinking become constraints in values."""
    d = talker.dialogue
    if d is None or talker.pretrained_only:
        _continue(talker, ask, values, prepared)
        return
    tools = bool(ask.tools) and ask.choice != "none"
    shown = ask.tools if tools else []
    effort = ask.effort or (_effort_of(ask.budget) if d.harmony else None)
    text, prepared.opened = d.render(ask.messages, shown, ask.thinking, effort, ask.prefix, ask.template)
    _check_length(talker, text)
    prepared.ids = d.tokenizer.encode_rendered(text)
    if ask.prefix and any(values.get(k) for k in _FORMS):
        raise UserError("a schema and a begun answer exclude each other; leave out the last message or the schema")
    prepared.channels = d.harmony
    wanted = ask.thinking is not False or (d.harmony and tools)  # calls are in channels beside the answer's
    prepared.may_think = d.thinking is not None and not ask.prefix and wanted
    if d.harmony:
        values["stop_after"] = FINAL if prepared.may_think else ""
    elif d.thinking and prepared.may_think:
        begin = d.tokenizer.encode_rendered(d.thinking[0])
        if prepared.opened or len(begin) == 1:
            values["reasoning"] = Reasoning(d.thinking[1], None if prepared.opened else begin[0], ask.budget)
    if tools and d.harmony and ask.prefix:  # it is in the answer's channel already
        if ask.choice == "required":
            raise UserError("tools: an answer that is begun cannot call; leave out the last message", field="tools")
    elif tools:
        prepared.tools = _constrain_to_tools(talker, d, ask, values)
    elif d.harmony and prepared.may_think:
        _constrain_answer(d, values)
    if tools or d.thinking:
        values["show_special"] = d.show_special(tools)


def _effort_of(budget: int | None) -> str | None:
    """The nearest that a model can be told whose thinking is one of its channels."""
    known = (name for name in ("low", "medium") if (most := EFFORT[name]) is None or (budget or 0) <= most)
    return None if budget is None else next(known, "high")


def _check_length(talker: Talker, text: str) -> None:
    """UserError at once for a text that cannot fit, whatever its tokens; encoding it would take seconds."""
    least = len(text) // talker.tokenizer.longest_token
    if least > talker.engine.context:
        raise too_long(f"at least {least}", talker.engine.context, "", "messages")


def _continue(talker: Talker, ask: Ask, values: dict[str, Any], prepared: Prepared) -> None:
    """A model that was only pretrained goes on with what was said, as one text."""
    asked = {"tools": ask.tools and ask.choice != "none", "response_format": values.get("json_schema")}
    for name, value in asked.items():
        if value:
            why = f"the model {talker.name!r} was only pretrained: it goes on with text, and knows no {name}"
            raise UserError(f"{name}: {why}; leave it out, or use a chat model", field=name)
    texts = [text_of(m.get("content") or "") for m in ask.messages]
    text = "\n\n".join(t for t in (*texts, ask.prefix) if t)
    _check_length(talker, text)
    prepared.ids = talker.tokenizer.encode(text)


def _constrain_to_tools(talker: Talker, d: Dialogue, ask: Ask, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The grammar of an answer that may call; returns the schemas of arguments."""
    schema = values.pop("json_schema", None)
    if schema is not None and ask.choice == "required":
        problem = "response_format cannot be met by an answer that must call a tool; leave one of them out"
        raise UserError(problem, field="response_format")
    if not d.harmony:
        values["stop_before"] = d.calls.opening.split("\n")[0] or d.calls.opening
    if ask.choice == "required":  # nothing but calls, which no stop text may break
        values["stop"] = ()
    if any(values.get(k) for k in _FORMS):
        raise UserError("tools and structured_outputs exclude each other", field="tools")
    grammars, schemas = talker.engine.grammars(), dict[str, dict[str, Any]]()
    for tool in (t["function"] for t in ask.tools):
        strict = bool(tool.get("strict"))
        written = tool.get("parameters") or {}
        if strict and d.calls.fields and not d.calls.fields.quoted and (path := unenforced(written)):
            problem = f"tools: {path} of {tool['name']!r} cannot be enforced in this model's format"
            raise UserError(f"{problem}; leave it out, or strict", field="tools")
        schemas[tool["name"]] = grammars.tool_schema(tool["name"], written, strict)
    values["grammar"] = d.grammar(schemas, ask.choice, ask.parallel, schema if ask.choice == "auto" else None)
    return schemas


def _constrain_answer(d: Dialogue, values: dict[str, Any]) -> None:
    """What an answer in channels is held to holds for its final one alone. A grammar is of all that is written."""
    schema, regex, choice = (values.pop(k, None) for k in ("json_schema", "regex", "choice"))
    if schema is not None:
        values["grammar"] = d.grammar({}, "auto", False, schema)
    elif regex is not None:
        values["grammar"] = d.grammar({}, "auto", False, None, f"/{regex.replace('/', chr(92) + '/')}/")
    elif choice:
        options = " | ".join(json.dumps(c, ensure_ascii=False) for c in choice)
        values["grammar"] = d.grammar({}, "auto", False, None, f"({options})")


# ---- what comes back --------------------------------------------------------------------------------------------


@dataclass
class AnswerDelta:
    """Something new in one answer."""

    index: int
    parts: list[Part]
    logprobs: list[TokenLogprob]  # of content
    finished: Completion | None  # the whole answer, at its end
    calls: bool  # whether the answer has called a tool, so far


class AnswerParts:
    """The answers to one request, from engine events to parts, counted."""

    def __init__(self, talker: Talker, prepared: Prepared):
        self.talker, self.prepared, self.n = talker, prepared, prepared.sampling.n
        self.prompt_tokens, self.cached_tokens = len(prepared.ids), 0
        self.completion_tokens = self.reasoning_tokens = 0
        own = talker.dialogue
        self.plain = not (prepared.may_think or prepared.channels or prepared.tools is not None)
        self.parsers: list[Parser | HarmonyParser] = []
        for _ in range(self.n):
            if own is None or self.plain:
                self.parsers.append(Parser(None, None))
            else:
                self.parsers.append(own.parser(prepared.tools, prepared.opened, prepared.may_think))
        self.unplaced: list[list[TokenLogprob]] = [[] for _ in range(self.n)]  # not known yet to be content
        self.aligned = [_Aligned(talker.tokenizer, prepared.sampling.show_special) for _ in range(self.n)]

    def feed(self, events: list[EngineEvent]) -> list[AnswerDelta]:
        """In their order. UserError for an answer that its grammar did not let end."""
        # Each step by itself where scores must be told apart: of thinking, of calls, of the answer.
        events = _joined(events) if self.prepared.sampling.logprobs is None else events
        return [self._delta(event) for event in events]

    def _delta(self, event: EngineEvent) -> AnswerDelta:
        index = event.completion.index
        parser = self.parsers[index]
        was = parser.state
        cut = event.finished and event.completion.finish_reason == "length"
        parts = [*parser.feed(event.text), *(parser.feed("", last=True, cut=cut) if event.finished else ())]
        if isinstance(parser, HarmonyParser) and any(p.kind == "reasoning" for p in parts):
            self.reasoning_tokens += len(event.token_ids)
        logprobs, content = list(event.logprobs), "".join(p.text for p in parts if p.kind == "content")
        if logprobs and not self.plain:
            logprobs = self._of_content(index, logprobs, was, parser.state, bool(content))
        if logprobs or content:
            logprobs = self.aligned[index].take(logprobs, content)
        self.cached_tokens = max(self.cached_tokens, event.completion.cached_tokens)
        done = event.completion if event.finished else None
        if done is not None:
            self.completion_tokens += len(done.token_ids)
            self.reasoning_tokens += done.reasoning_tokens
            if done.finish_reason == "error":
                raise UserError(str(done.stop_reason))
        calls = parser.call >= 0 and parser.state not in ("name", "arguments", "key", "value")
        return AnswerDelta(index, parts, logprobs, done, calls)

    def _of_content(self, index: int, new: list[TokenLogprob], was: str, now: str, shown: bool) -> list[TokenLogprob]:
        """Those of the answer, not of thinking or of calls. was, now: states of its parser."""
        if was == "start":
            new = self.unplaced[index] + new
            self.unplaced[index] = new if now == "start" else []
        return new if was == "content" or (now == "content" and shown) else []


class _Aligned:
    """Log-probabilities held until the text of their tokens is out, so that they join to it."""

    def __init__(self, tokenizer: Tokenizer, shown: tuple[int, ...]):
        self.tokenizer, self.held, self.start, self.sent = tokenizer, deque[TokenLogprob](), 0, 0
        self.hidden = tokenizer.special_ids.difference(shown)  # no part of the text

    def take(self, new: list[TokenLogprob], text: str) -> list[TokenLogprob]:
        """Scores whose text is out, now that `text` is."""
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


def _joined(events: list[EngineEvent]) -> list[EngineEvent]:
    """What has come of each answer as one event: a reader that is behind gets fewer, larger ones."""
    if len(events) == 1:
        return events
    out: dict[int, EngineEvent] = {}
    for e in events:
        index = e.completion.index
        if (o := out.get(index)) is not None:
            e = EngineEvent(e.completion, o.token_ids + e.token_ids, o.text + e.text, finished=e.finished)
        out[index] = e
    return list(out.values())


def answer(talker: Talker, prepared: Prepared) -> Iterator[AnswerDelta]:
    """The answers to what `prepare` gave as they come, in this thread, which steps the engine."""
    parts = AnswerParts(talker, prepared)
    for event in talker.engine.stream(prepared.ids, prepared.sampling, prepared.matcher, talker.adapter):
        yield from parts.feed([event])


def schema_text(schema: Any) -> str:
    """A JSON schema as Sampling takes it."""
    return json.dumps(schema, ensure_ascii=False)
