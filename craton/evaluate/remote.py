"""A model behind an API, evaluated: answers through its chat API, likelihoods where the server scores given texts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

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
        self.identity = f"{self.client.url}#{self.client.model}"

    chats, thinks = True, False

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
        """A continuation begins at the first token that does not end before it."""
        rows = self.client.prompt_logprobs([prompt.text + continuation for prompt, continuation in requests])
        out = []
        for (prompt, _), tokens in zip(requests, rows, strict=True):
            start = len(prompt.text.rstrip(" "))
            own = [(value, best) for offset, value, best in tokens if offset >= start and value is not None]
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
