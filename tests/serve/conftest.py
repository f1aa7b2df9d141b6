"""A server in a process of its own, over a tiny chat model that was trained for these tests."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny  # noqa: E402
from inprocess import InProcess  # noqa: E402

from craton.serve import guard  # noqa: E402
from craton.serve import reply as reply_module  # noqa: E402
from craton.serve.guard import Settings  # noqa: E402
from tests.text.chatml import CHAT_TEMPLATE  # noqa: E402


class Running:
    """A `craton serve` and its log."""

    def __init__(self, *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None, port: str = "0"):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "craton", "serve", *map(str, arguments), "--port", port],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
        self.lines: list[str] = []
        self.url = ""
        ready = threading.Event()

        def read() -> None:
            assert self.process.stdout
            for line in self.process.stdout:
                self.lines.append(line)
                if found := re.search(r"http://\S+?:\d+", line):
                    self.url = self.url or found[0]
                    ready.set()
            ready.set()

        threading.Thread(target=read, daemon=True).start()
        ready.wait(60)
        assert self.url, "".join(self.lines)
        self.client = httpx.Client(base_url=self.url, timeout=60)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/ready").status_code == 200:
                    break
            time.sleep(0.02)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self.client.post(path, **more)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        rows = [line for line in self.client.get("/metrics").text.splitlines() if re.match(rf"{name}(\{{| )", line)]
        return sum(float(r.rsplit(" ", 1)[1]) for r in rows)

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of an event stream's data lines."""
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("chat") / "chat")


@pytest.fixture(scope="session")
def server(chat_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """chat; base, which was only pretrained; and the same as if it were a chat model that means nothing."""
    wild = tmp_path_factory.mktemp("wild")
    for f in model_folder.iterdir():
        if f.is_file() and f.name != "record.json":
            (wild / f.name).write_bytes(f.read_bytes())
    config = json.loads((wild / "tokenizer_config.json").read_text())
    (wild / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    models = (f"chat,assistant={chat_folder}", f"base={model_folder}", f"wild={wild}")
    running = Running(*models, "--votes", tmp_path_factory.mktemp("votes") / "votes.jsonl")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def ai(server):
    return openai.OpenAI(
        base_url=server.url + "/v1", api_key="x", _strict_response_validation=True, max_retries=0, timeout=30
    )


@pytest.fixture(scope="session")
def lax(server):
    """The strict types forget that a first token has no score, and that a stream's finish_reason is null until its
    end."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0, timeout=30)


@pytest.fixture(scope="session")
def claude(server):
    return anthropic.Anthropic(
        base_url=server.url, api_key="x", _strict_response_validation=True, max_retries=0, timeout=30
    )


@pytest.fixture
def start(chat_folder, monkeypatch):
    running = []

    def go(settings=None, constants=None, **more):
        for name, value in (constants or {}).items():
            monkeypatch.setattr(guard if hasattr(guard, name) else reply_module, name, value)
        running.append(InProcess(chat_folder, settings or Settings(), **more))
        return running[-1]

    yield go
    for r in running:
        r.close()
