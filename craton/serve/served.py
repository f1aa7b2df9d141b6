"""A model behind the server: spoken to through its worker, and listed for clients."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craton.engine.converse import (
    NEUTRAL,
    AnswerDelta,
    AnswerParts,
    Ask,
    Prepared,
    Talker,
    open_talker,
    prepare,
    with_adapter,
)
from craton.serve.worker import Stream, Unavailable, Worker
from craton.weights.adapter import low_ranks

Json = dict[str, Any]  # an object of a request or of an answer


class ApiError(Exception):
    """An answer that is an error. param: the field at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}


@dataclass
class Served:
    """A model that can be spoken to, and the thread that steps it."""

    talker: Talker
    worker: Worker

    parent: str | None = None  # the base of an adapter

    @property
    def name(self) -> str:
        """As requests name it."""
        return self.talker.name

    def describe(self) -> Json:
        """As /v1/models lists it: OpenAI's fields, Anthropic's, and ours."""
        talker, d = self.talker, self.talker.dialogue
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(talker.created))
        openai = dict(id=talker.name, object="model", created=talker.created, owned_by="craton", parent=self.parent)
        anthropic = dict(type="model", display_name=talker.name, created_at=when)
        ours = dict(context_length=talker.engine.context, defaults={**NEUTRAL, **talker.defaults})
        ours |= dict(parameters=talker.parameters, bits=talker.bits)
        chats = d is not None and not talker.pretrained_only
        can = dict(chat=chats, thinks=bool(chats and d and d.thinking), tools=chats, images=False)
        return {**openai, **anthropic, **ours, **can, "pretrained_only": talker.pretrained_only}


def open_served(name: str, path: str, max_wait: float, max_queue: int, observe: Any, **options: Any) -> Served:
    """A model for serving; its worker is not started yet. Raises UserError as open_talker does."""
    talker = open_talker(name, path, **options)
    return Served(talker, Worker(talker.engine, max_wait, max_queue, observe))


def adapter_served(base: Served, name: str, folder: Path) -> Served:
    """An adapter of a base that is not started yet. UserError if it is not one for it."""
    base.talker.engine.load_adapter(name, folder)
    return Served(with_adapter(base.talker, name, folder), base.worker, base.name)


async def load_adapter(base: Served, name: str, folder: Path) -> Served:
    """The same while the base is serving: read beside it, and put in between two of its steps."""
    engine = base.talker.engine
    parts = await asyncio.to_thread(low_ranks, engine.runner.source, folder)
    talker = await asyncio.to_thread(with_adapter, base.talker, name, folder)
    await base.worker.between_steps(lambda: engine.put_adapter(name, parts))
    return Served(talker, base.worker, base.name)


class Answers:
    """A request that runs. Iterate for deltas; close it whatever happens."""

    def __init__(self, served: Served, prepared: Prepared, already_admitted: bool = False):
        self.served, self.parts = served, AnswerParts(served.talker, prepared)
        asked = (prepared.ids, prepared.sampling, prepared.matcher)
        adapter = served.talker.adapter
        self.stream: Stream = served.worker.submit(*asked, adapter=adapter, already_admitted=already_admitted)

    async def __aiter__(self) -> AsyncIterator[list[AnswerDelta]]:
        while events := await self.stream.take():
            deltas = self.parts.feed(events)
            if any(d.finished and d.finished.finish_reason == "cancelled" for d in deltas):
                raise Unavailable("the request was cancelled")
            yield deltas

    def close(self) -> None:
        """No more is wanted."""
        self.stream.close()


async def run(served: Served, ask: Ask) -> Answers:
    """Prepared in a thread, then submitted. Raises UserError and Overloaded."""
    return Answers(served, await asyncio.to_thread(prepare, served.talker, ask))
