"""The thread that steps an engine, and the streams by which requests reach it and answers come back.

Everything but `_run` and what it calls happens in the event loop's thread. A request is let in if what is in front of
it can be expected to be done within max_wait; one that was let in and still has not begun by then is turned away too.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from craton.base import UserError
from craton.engine.engine import Engine
from craton.engine.request import EngineEvent, Sampling
from craton.engine.structured import Matcher

log = logging.getLogger("craton.serve")
_FORGET = 0.9  # weight of the past in running means
_GUESS = 256  # tokens an answer has, as long as none has finished


class Overloaded(Exception):
    """Too much to do. retry_after: seconds until it could be done."""

    def __init__(self, retry_after: float, why: str):
        super().__init__(why)
        self.retry_after = max(1, math.ceil(retry_after))


class Unavailable(Exception):
    """The engine failed, or the server is stopping."""


@dataclass(eq=False)
class Stream:
    """One request's way back. `take` gives all that has come since the last call."""

    worker: "Worker"
    left: int  # answers that are not finished
    arrived: float = field(default_factory=time.monotonic)
    request: int | None = None
    first: float | None = None  # when the first token came
    ready: deque[EngineEvent] = field(default_factory=deque)
    waiter: asyncio.Future[None] | None = None
    error: Exception | None = None
    began: bool = False  # its prompt is being computed, or done
    cancelled: bool = False

    @property
    def done(self) -> bool:
        return not self.left or self.error is not None

    async def take(self) -> list[EngineEvent]:
        """At least one event, or [] at the end. Raises what went wrong."""
        while self.error or not self.ready:
            if self.error:
                raise self.error
            if not self.left:
                return []
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        out = list(self.ready)
        self.ready.clear()
        return out

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.wake()

    def close(self) -> None:
        """No more is wanted; cache blocks are free after the next step. Any number of times."""
        if not self.done and not self.cancelled:
            self.cancelled = True
            self.worker.cancel(self)


class Worker:
    """One engine in its thread."""

    def __init__(self, engine: Engine, max_wait: float, max_queue: int, observe: Callable[[str, float], None]):
        self.engine, self.max_wait, self.max_queue, self.observe = engine, max_wait, max_queue, observe
        self.wake = threading.Condition()
        self.inbox: deque[Callable[[], None]] = deque()
        self.streams: dict[int, Stream] = {}  # by the engine's number
        self.alive: set[Stream] = set()
        self.stopping = False
        # Measured: tokens a second through the network, seconds a step, answers finished a second.
        self.rate, self.step_seconds, self.finish_rate = 0.0, 0.0, 0.0
        self.last_finish = 0.0
        self.backlog = 0  # prompt tokens that the engine has and has not computed
        self.backlog_inbox = 0  # and those on the way to it
        self.running = self.waiting = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread.start()

    def warm_up(self) -> None:
        """A prompt and a few tokens through the engine before the first request: memory is touched, speed known."""
        engine = self.engine
        token = next(i for i in range(engine.config.vocab_size) if i not in engine.end_ids)
        for size in (16, 128):
            size = max(1, min(size, engine.context - 4))
            began = time.perf_counter()
            engine.generate([[token] * size], Sampling(max_tokens=1, temperature=0.0, ignore_eos=True))
            self.rate = size / (time.perf_counter() - began)
            engine.forget()
        if engine.context >= 16:
            began = time.perf_counter()
            engine.generate([[token] * 4], Sampling(max_tokens=8, temperature=0.0, ignore_eos=True))
            self.step_seconds = (time.perf_counter() - began) / 8
        engine.forget()

    # ---- in the event loop ----

    def expected_wait(self, answers: int) -> float:
        """Seconds until a request that comes now would begin."""
        wait = (self.backlog + self.backlog_inbox) / self.rate if self.rate else 0.0
        most = self.engine.scheduler.max_running
        ahead = sum(s.left for s in self.alive) + answers - most
        short = self.waiting > 0 and not self.backlog_inbox and self.engine.scheduler.pool.free < 2
        if ahead > 0 or short:
            finishing = self.finish_rate or most / (_GUESS * max(self.step_seconds, 1e-3))
            wait += max(ahead, self.waiting) / finishing
        return wait

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        matcher: Matcher | None = None,
        embed: bool = False,
        adapter: str | None = None,
        already_admitted: bool = False,
    ) -> Stream:
        """A request for the engine. already_admitted: it is a further part of one that was let in.

        Raises Overloaded if it would wait too long, and Unavailable if the server is stopping or its engine's thread
        has ended. What is wrong with the request itself is raised by `Stream.take`."""
        if self.stopping or not self.thread.is_alive():
            raise Unavailable("the server is stopping")
        wait = self.expected_wait(sampling.n)
        if len(self.alive) >= self.max_queue and not already_admitted:
            seconds = 1 / (self.finish_rate or 1)
            raise Overloaded(seconds, f"{len(self.alive)} requests are being served, which is the most")
        if wait > self.max_wait and not already_admitted:
            raise Overloaded(wait - self.max_wait, f"the wait is about {wait:.0f} s, more than {self.max_wait:.0f} s")
        stream = Stream(self, sampling.n)
        self.alive.add(stream)
        self.backlog_inbox += len(prompt)

        def add() -> None:
            try:
                stream.request = self.engine.add(prompt, sampling, matcher=matcher, embed=embed, adapter=adapter)
                self.streams[stream.request] = stream
                if stream.cancelled:
                    self.engine.cancel(stream.request)
            except UserError as error:
                self._post(self._drop, stream, error)
            except Exception as error:
                log.exception("a request could not be added")
                self._post(self._drop, stream, Unavailable(f"{type(error).__name__}: {error}"))
            finally:
                self._post(self._arrived, len(prompt))

        self._send(add)
        return stream

    async def between_steps(self, call: Callable[[], None]) -> None:
        """Run something in the engine's thread. What it raises is raised here."""
        assert self.loop is not None
        done: asyncio.Future[None] = self.loop.create_future()

        def run() -> None:
            try:
                call()
            except Exception as error:
                self._post(done.set_exception, error)
            else:
                self._post(done.set_result, None)

        self._send(run)
        await done

    def cancel(self, stream: Stream) -> None:
        if stream.request is not None:
            self.engine.cancel(stream.request)
        self._send(lambda: None)

    def check(self) -> None:
        """Turn away what has waited too long; called now and then."""
        now = time.monotonic()
        for stream in [s for s in self.alive if not s.began and not s.cancelled and now - s.arrived > self.max_wait]:
            stream.fail(Overloaded(self.expected_wait(0), f"it has waited {self.max_wait:.0f} s"))
            stream.cancelled = True
            self.cancel(stream)

    async def stop(self, patience: float) -> None:
        """Answers in the making are finished, for so many seconds at most; then the thread ends."""
        until = time.monotonic() + patience
        while self.alive and time.monotonic() < until and self.thread.is_alive():
            await asyncio.sleep(0.05)
        self.stopping = True
        for stream in list(self.alive):
            stream.fail(Unavailable("the server is stopping"))
        self._send(lambda: None)
        await asyncio.to_thread(self.thread.join, 10)

    def _arrived(self, tokens: int) -> None:
        self.backlog_inbox -= tokens

    def _drop(self, stream: Stream, error: Exception | None = None) -> None:
        self.alive.discard(stream)
        if error:
            stream.fail(error)

    def _deliver(self, arrived: list[tuple[Stream, EngineEvent]], seconds: float, tokens: int) -> None:
        now = time.monotonic()
        for stream, event in arrived:
            if stream.first is None and (event.token_ids or event.finished):
                stream.first = now
                if event.token_ids:
                    self.observe("time_to_first_token", now - stream.arrived)
            stream.ready.append(event)
            if event.finished:
                stream.left -= 1
                if event.completion.finish_reason != "cancelled":
                    self._finished(now)
                if not stream.left:
                    self._drop(stream)
            stream.wake()
        self.observe("step", seconds)
        self.observe("generated", tokens)

    def _finished(self, now: float) -> None:
        """The mean time between answers that finish, as a rate."""
        gap = min(60.0, max(1e-4, now - self.last_finish)) if self.last_finish else 0.0
        if gap:
            mean = 1 / self.finish_rate if self.finish_rate else gap
            self.finish_rate = 1 / (_FORGET * mean + (1 - _FORGET) * gap)
        self.last_finish = now

    # ---- between the threads ----

    def _send(self, command: Callable[[], None]) -> None:
        with self.wake:
            self.inbox.append(command)
            self.wake.notify()

    def _post(self, command: Callable[..., None], *values: Any) -> None:
        assert self.loop is not None
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(command, *values)

    # ---- in the engine's thread ----

    def _run(self) -> None:
        while not self.stopping:
            with self.wake:
                while not self.inbox and not self.engine.busy and not self.stopping:
                    self.wake.wait()
            try:
                while self.inbox:
                    self.inbox.popleft()()
                if self.engine.busy:
                    self._step()
            except Exception as error:  # what ran fails; the server goes on
                log.exception("a step of the engine failed")
                self._give_up(f"{type(error).__name__}: {error}")

    def _step(self) -> None:
        counters, began = self.engine.counters, time.perf_counter()
        tokens, steps = counters.computed_tokens, counters.steps
        events = self.engine.step()
        seconds = time.perf_counter() - began
        many = max(1, counters.steps - steps)  # a GPU makes several at a time
        self._measure(seconds / many, (counters.computed_tokens - tokens) // many)
        arrived = [(s, e) for e in events if (s := self.streams.get(e.completion.request)) is not None]
        for event in events:
            if event.completion.request not in self.engine.requests:
                self.streams.pop(event.completion.request, None)
        self._post(self._deliver, arrived, seconds, sum(len(e.token_ids) for e in events))

    def _measure(self, seconds: float, tokens: int) -> None:
        engine = self.engine
        running = engine.scheduler.running
        if tokens >= max(32, 4 * len(running)):  # mostly prompts
            self.rate = _FORGET * self.rate + (1 - _FORGET) * tokens / seconds if self.rate else tokens / seconds
        self.step_seconds = _FORGET * self.step_seconds + (1 - _FORGET) * seconds if self.step_seconds else seconds
        self.backlog = engine.backlog
        self.running, self.waiting = len(running), len(engine.scheduler.waiting)
        for generation in running:
            if (stream := self.streams.get(engine.answers[generation].completion.request)) is not None:
                stream.began = True

    def _give_up(self, why: str) -> None:
        self.engine.fail_all()
        self.backlog = self.running = self.waiting = 0
        for stream in self.streams.values():
            self._post(self._drop, stream, Unavailable(why))
        self.streams.clear()
