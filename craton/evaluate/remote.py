"""A model behind an API, evaluated: answers through its chat API, likelihoods where the server scores given texts."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from typing import Any

from craton.base import UserError
from craton.engine.remote import open_client
from craton.engine.score import Likelihood
from craton.evaluate.models import Answers, Decoding, Progress, Prompt, Written

_AT_ONCE = 8
_TEXTS = 16  # in one request


class RemoteModel:
    """openai:NAME and its like, or URL#NAME."""

    local = False

    def __init__(self, name: str):
        self.name = name
        self.client = open_client(name)

    chats, thinks = True, False

    @cached_property
    def identity(self) -> str:
        """Its address, and what the server says of it: of craton's, when it was loaded."""
        about: dict[str, Any] = {}
        if self.name.startswith("http"):
            with contextlib.suppress(UserError):
                listed = self.client.request("GET", "/models").get("data") or []
                about = next((m for m in listed if isinstance(m, dict) and m.get("id") == self.client.model), {})
        return f"{self.client.url}#{self.client.model} {json.dumps(about, sort_keys=True)}"

    def longest(self) -> None:
        """Not known; the server refuses what is too long."""
        return

    def count(self, prompt: Prompt) -> None:
        """Not known."""
        return

    def score(self, requests: Sequence[tuple[Prompt, str]], progress: Progress) -> Iterator[tuple[int, Likelihood]]:
        if any(prompt.messages for prompt, _ in requests):
            raise UserError(f"{self.name}: choices cannot be scored through a chat API; use --no-chat", field="chat")
        pieces = range(0, len(requests), _TEXTS)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            waiting = {pool.submit(self._score, requests[i : i + _TEXTS]): i for i in pieces}
            try:
                for done, future in enumerate(as_completed(waiting), 1):
                    for number, scored in enumerate(future.result()):
                        yield waiting[future] + number, scored
                    progress(min(done * _TEXTS, len(requests)), len(requests))
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

    def write(self, prompts: Sequence[Prompt], how: Decoding, progress: Progress) -> Iterator[Answers]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            waiting = {pool.submit(self._write, prompt, how, number): number for number, prompt in enumerate(prompts)}
            try:
                for done, future in enumerate(as_completed(waiting), 1):
                    yield waiting[future], future.result()
                    progress(done, len(prompts))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

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
