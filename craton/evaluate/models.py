"""Models as evaluation sees them: something that says how likely a continuation is, or writes an answer; in this
process or behind an API."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from craton.base import UserError
from craton.engine.converse import NEUTRAL, AnswerParts, Ask, open_talker, prepare
from craton.engine.remote import is_remote, open_client
from craton.engine.score import Likelihood, encode_pair, loglikelihoods
from craton.evaluate.store import cache_folder, fingerprint, key_of
from craton.model import kernels, modes

Progress = Callable[[int, int], None]
Answers = tuple[int, list["Written"]]  # the number of a prompt, and what was written
LIKELIHOOD_BATCH = 4096  # requests whose tree is made at once
_AHEAD = 512  # answers that are asked for at once
_AT_ONCE, _TEXTS = 8, 16  # requests to a server, texts in one
_THINKING = 2048  # tokens, where a model thinks and nothing else is said


@dataclass(frozen=True)
class Prompt:
    """What an answer is wanted to: a text, or messages where they are to go through the chat template."""

    text: str
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Written:
    """finish: "stop" or "length"."""

    text: str
    finish: str
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class Decoding:
    """How answers are written. n: answers to each prompt. thinking: tokens of it, for models that think; 0 for none."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    n: int = 1
    seed: int = 0
    thinking: int | None = None


class LocalModel:
    """A folder, a GGUF file or MODEL+ADAPTER, on our own engine: activations in fp32, weights as they are stored."""

    local = True

    def __init__(self, name: str, identity: str, path: str):
        self.name, self.identity, self.path = name, identity, path

    @cached_property
    def talker(self) -> Any:
        """Opened when something has to be computed."""
        return open_talker(self.name, self.path, exact=True)

    @cached_property
    def chats(self) -> bool:
        return self.talker.dialogue is not None and not self.talker.pretrained_only

    @cached_property
    def context(self) -> int:
        """Tokens."""
        return int(self.talker.engine.context)

    def _ids(self, prompt: Prompt) -> list[int]:
        if prompt.messages:
            return list(prepare(self.talker, Ask({"max_tokens": 1}, messages=list(prompt.messages), thinking=None)).ids)
        return list(self.talker.tokenizer.encode(prompt.text))

    def count(self, prompt: Prompt) -> int:
        return len(self._ids(prompt))

    def _pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        if prompt.messages:
            return self._ids(prompt), self.talker.tokenizer.encode_rendered(continuation)
        return encode_pair(self.talker.tokenizer, prompt.text, continuation)

    def score(self, requests: Sequence[tuple[Prompt, str]], progress: Progress) -> Iterator[tuple[int, Likelihood]]:
        kernels.keep_freed_memory()
        context = self.context
        for first in range(0, len(requests), LIKELIHOOD_BATCH):
            pairs = []
            for prompt, continuation in requests[first : first + LIKELIHOOD_BATCH]:
                before, after = self._pair(prompt, continuation)
                if not after:
                    raise UserError(f"{self.name}: a continuation has no token: {continuation!r}")
                if len(after) >= context:
                    raise UserError(f"{self.name}: a continuation has {len(after)} tokens, the context is {context}")
                pairs.append((before[max(0, len(before) + len(after) - 1 - context) :], after))

            def shown(done: int, of: int, first: int = first, n: int = len(pairs)) -> None:
                progress(first + done * n // of, len(requests))

            network = self.talker.engine.runner.modules()
            with modes.exact_activations():
                for number, found in loglikelihoods(network, pairs, shown):
                    yield first + number, found

    def write(self, prompts: Sequence[Prompt], how: Decoding, progress: Progress) -> Iterator[Answers]:
        engine, waiting, done = self.talker.engine, list(enumerate(prompts))[::-1], 0
        running: dict[int, _Answering] = {}
        while waiting or running:
            while waiting and len(running) < _AHEAD:
                number, prompt = waiting.pop()
                one = self._answering(number, prompt, how)
                running[engine.add(one.prepared.ids, one.prepared.sampling, matcher=one.prepared.matcher)] = one
            for event in engine.step():
                if event.completion.request not in running:
                    continue
                one = running[event.completion.request]
                one.take(event)
                if len(one.finished) == how.n:
                    del running[event.completion.request]
                    done += 1
                    progress(done, len(prompts))
                    yield one.number, one.written()

    def _answering(self, number: int, prompt: Prompt, how: Decoding) -> "_Answering":
        """An answer to come, along the same path as in chat and server. Thinking is given room of its own."""
        sampling: dict[str, Any] = NEUTRAL | {"temperature": how.temperature, "stop": how.stop, "n": how.n}
        sampling |= {"seed": how.seed + number, "max_tokens": how.max_tokens}
        ask = Ask(sampling, prompt=None if prompt.messages else self.talker.tokenizer.encode(prompt.text))
        if prompt.messages:
            ask.messages, ask.budget = list(prompt.messages), how.thinking
            ask.thinking = None if how.thinking is None else how.thinking > 0
            if self.thinks and how.thinking != 0:
                ask.budget = how.thinking or _THINKING
                sampling["max_tokens"] += ask.budget
        prepared = prepare(self.talker, ask)
        return _Answering(number, prepared, AnswerParts(self.talker, prepared))

    @property
    def thinks(self) -> bool:
        """Whether its chat template has a place for thinking."""
        return self.chats and self.talker.dialogue.thinking is not None


class _Answering:
    """The answers to one prompt, in the making."""

    def __init__(self, number: int, prepared: Any, parts: Any):
        self.number, self.prepared, self.parts = number, prepared, parts
        self.texts = [""] * prepared.sampling.n
        self.finished: dict[int, Any] = {}

    def take(self, event: Any) -> None:
        """What a step added: only what is the answer itself, not thinking, counts as its text."""
        for delta in self.parts.feed([event]):
            self.texts[delta.index] += "".join(p.text for p in delta.parts if p.kind == "content")
            if delta.finished is not None:
                self.finished[delta.index] = delta.finished

    def written(self) -> list[Written]:
        """All of them, in their order."""
        return [
            Written(self.texts[i], c.finish_reason or "stop", c.prompt_tokens, len(c.token_ids))
            for i, c in sorted(self.finished.items())
        ]


class RemoteModel:
    """openai:NAME and its like, or URL#NAME: answers through its chat API, likelihoods where the server scores given
    texts."""

    local, chats, thinks = False, True, False

    def __init__(self, name: str):
        self.name, self.client = name, open_client(name)

    @cached_property
    def identity(self) -> str:
        """Its address, and what the server says of it: of craton's, when it was loaded."""
        about: dict[str, Any] = {}
        if self.name.startswith("http"):
            with contextlib.suppress(UserError):
                listed = self.client.request("GET", "/models").get("data") or []
                about = next((m for m in listed if isinstance(m, dict) and m.get("id") == self.client.model), {})
        return f"{self.client.url}#{self.client.model} {json.dumps(about, sort_keys=True)}"

    def score(self, requests: Sequence[tuple[Prompt, str]], progress: Progress) -> Iterator[tuple[int, Likelihood]]:
        if any(prompt.messages for prompt, _ in requests):
            raise UserError(f"{self.name}: choices cannot be scored through a chat API; use --no-chat", field="chat")
        pieces = [requests[i : i + _TEXTS] for i in range(0, len(requests), _TEXTS)]
        for number, found in self._at_once(self._score, pieces, progress):
            yield from enumerate(found, number * _TEXTS)

    def write(self, prompts: Sequence[Prompt], how: Decoding, progress: Progress) -> Iterator[Answers]:
        return self._at_once(lambda one: self._write(one[1], how, one[0]), list(enumerate(prompts)), progress)

    def _at_once(self, ask: Callable[[Any], Any], what: list[Any], progress: Progress) -> Iterator[tuple[int, Any]]:
        """(number, what came of it) of each, some at a time, as they become known."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            waiting = {pool.submit(ask, one): number for number, one in enumerate(what)}
            try:
                for done, future in enumerate(as_completed(waiting), 1):
                    progress(done, len(what))
                    yield waiting[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _score(self, requests: Sequence[tuple[Prompt, str]]) -> list[Likelihood]:
        """Of the tokens that begin within each continuation."""
        rows = self.client.prompt_logprobs([prompt.text + continuation for prompt, continuation in requests])
        out = []
        for (prompt, continuation), tokens in zip(requests, rows, strict=True):
            length = len(continuation) + len(prompt.text) - len(prompt.text.rstrip())
            own = [(value, best) for left, value, best in tokens if left <= length and value is not None]
            if not own:
                raise UserError(f"{self.name}: the server gave no log-probability for a continuation")
            out.append(Likelihood(sum(v for v, _ in own), all(b for _, b in own), len(own)))
        return out

    def _write(self, prompt: Prompt, how: Decoding, number: int) -> list[Written]:
        settings = dict(max_tokens=how.max_tokens, temperature=how.temperature, stop=list(how.stop)[:4])
        out = []
        for i in range(how.n):
            seed = how.seed + number + 1000 * i if how.temperature else None
            if prompt.messages:
                reply = self.client.chat(prompt.messages, seed=seed, **settings)
            else:
                reply = self.client.complete(prompt.text, seed=seed, **settings)
            text = reply.text
            for stop in how.stop:  # those over the four that servers take
                text = text.partition(stop)[0]
            out.append(Written(text, reply.finish, reply.prompt_tokens, reply.completion_tokens))
        return out


Subject = LocalModel | RemoteModel


def open_subject(name: str, store: Any) -> Subject:
    """The model that a text names: a path, or one behind an API. UserError if it is neither."""
    if is_remote(name):
        return RemoteModel(name)
    path, _, adapter = (name, "", "") if Path(name).exists() else name.partition("+")
    if not Path(path).exists():
        forms = "a folder, a GGUF file, URL#NAME, or openai:, anthropic:, gemini:, mistral: or deepseek:NAME"
        raise UserError(f"{name}: no such model; MODEL is {forms}")
    if (Path(path) / "manifest.json").is_file() and Path(path).resolve().parent.name == "training":
        from craton.train.checkpoint import as_folder  # it brings what many processes need, a second and more

        path = str(as_folder(Path(path).resolve(), cache_folder() / "checkpoints"))
    parts = [fingerprint(store, Path(p)) for p in (path, adapter) if p]
    opened = f"{path}+{adapter}" if adapter else path
    return LocalModel(name, key_of("local-fp32", parts), opened)
