"""Models as evaluation sees them: something that says how likely a continuation is, or writes an answer; in this
process or behind an API."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from craton.base import UserError, sha256
from craton.engine.score import Likelihood, encode_pair, loglikelihoods
from craton.evaluate.store import cache_folder, fingerprint, key_of

Progress = Callable[[int, int], None]
Answers = tuple[int, list["Written"]]  # the number of a prompt, and what was written
LIKELIHOOD_BATCH = 4096  # requests whose tree is made at once
_AHEAD = 512  # answers that are asked for at once
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


class Subject(Protocol):
    """A model that can be evaluated."""

    name: str
    local: bool

    @property
    def identity(self) -> str:
        """What its results are kept under."""
        ...

    @property
    def chats(self) -> bool:
        """Whether it has a chat template of its own use."""
        ...

    @property
    def thinks(self) -> bool:
        """Whether it can think before it answers, for as long as it is told."""
        ...

    def longest(self) -> int | None:
        """Tokens of its context, where they are known."""
        ...

    def count(self, prompt: Prompt) -> int | None:
        """Tokens of a prompt, where they can be counted."""
        ...

    def score(self, requests: Sequence[tuple[Prompt, str]], progress: Progress) -> Iterator[tuple[int, Likelihood]]:
        """For each (context, continuation): its number and likelihood, as they become known."""
        ...

    def write(self, prompts: Sequence[Prompt], how: Decoding, progress: Progress) -> Iterator[Answers]:
        """For each prompt: its number and how.n answers, as they become known."""
        ...


class LocalModel:
    """A folder, a GGUF file or MODEL+ADAPTER, on our own engine: activations in fp32, weights as they are stored."""

    local = True

    def __init__(self, name: str, identity: str, path: str):
        self.name, self.identity, self.path = name, identity, path

    @cached_property
    def talker(self) -> Any:
        """Opened when something has to be computed."""
        from craton.engine.converse import open_talker

        return open_talker(self.name, self.path, exact=True)

    @cached_property
    def chats(self) -> bool:
        return self.talker.dialogue is not None and not self.talker.pretrained_only

    def longest(self) -> int:
        return int(self.talker.engine.context)

    def _ids(self, prompt: Prompt) -> list[int]:
        from craton.engine.converse import Ask, prepare

        tokenizer = self.talker.tokenizer
        if prompt.messages:
            return list(prepare(self.talker, Ask({"max_tokens": 1}, messages=list(prompt.messages), thinking=None)).ids)
        return list(tokenizer.encode(prompt.text))

    def count(self, prompt: Prompt) -> int:
        return len(self._ids(prompt))

    def _pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        if prompt.messages:
            return self._ids(prompt), self.talker.tokenizer.encode_rendered(continuation)
        return encode_pair(self.talker.tokenizer, prompt.text, continuation)

    def score(self, requests: Sequence[tuple[Prompt, str]], progress: Progress) -> Iterator[tuple[int, Likelihood]]:
        from craton.model import kernels, modes

        kernels.keep_freed_memory()
        context = self.longest()
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
        from craton.engine.converse import NEUTRAL, AnswerParts, Ask, prepare

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


def open_subject(name: str, store: Any) -> Subject:
    """The model that a text names: a path, or one behind an API. UserError if it is neither."""
    from craton.engine.remote import is_remote

    if is_remote(name):
        from craton.evaluate.remote import RemoteModel

        return RemoteModel(name)
    path, _, adapter = (name, "", "") if Path(name).exists() else name.partition("+")
    if not Path(path).exists():
        forms = "a folder, a GGUF file, URL#NAME, or openai:, anthropic:, gemini:, mistral: or deepseek:NAME"
        raise UserError(f"{name}: no such model; MODEL is {forms}")
    if (Path(path) / "manifest.json").is_file() and Path(path).resolve().parent.name == "training":
        path = str(_checkpoint(Path(path).resolve()))
    parts = [fingerprint(store, Path(p)) for p in (path, adapter) if p]
    opened = f"{path}+{adapter}" if adapter else path
    return LocalModel(name, key_of("local-fp32", parts), opened)


def _checkpoint(path: Path) -> Path:
    """A checkpoint of a run here, as a model folder in the cache."""
    import torch

    from craton.model.decoder import Decoder
    from craton.train.checkpoint import whole_tensors
    from craton.weights.folder import read_config, write_network

    run = path.parent.parent
    out = cache_folder() / "checkpoints" / sha256(path / "manifest.json")[:16]
    if not out.exists():
        network = Decoder(read_config(run))
        parameters = dict(network.named_parameters())
        with torch.no_grad():
            for name, tensor in whole_tensors(path, "weights"):
                if name in parameters:  # a tied head is the embedding
                    parameters[name].copy_(tensor)
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        write_network(temporary, network, run)
        os.rename(temporary, out)
    return out
