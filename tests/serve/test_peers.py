"""Other people's clients against `craton serve`, and what coding clients send."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import events

HERE = Path(__file__).parent
PYTHON = os.environ.get("CRATON_PEERS_PYTHON", sys.executable)
MODULES = {"llm": "llm", "litellm": "litellm", "langchain": "langchain_openai, langchain_anthropic"}


@pytest.mark.slow
@pytest.mark.parametrize("client", MODULES)
def test_their_clients(server, client):
    if subprocess.run([PYTHON, "-c", f"import {MODULES[client]}"], capture_output=True).returncode:
        pytest.skip(f"{client} is not installed")
    command = [PYTHON, HERE / "peers.py", client, server.url, "chat"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for name, value in found.items():
        assert value, name
        if name.endswith(("streamed", "whole")):
            assert "Hello" in value or len(value) > 3, (name, value)
        if name.endswith("call"):
            assert value[0] == "weather"
        if name.endswith(("person", "schema")) and client == "langchain":
            assert value == ["age", "name"]
    if client == "llm":
        assert json.loads(found["schema"]).keys() >= {"name", "age"}
        assert "sunny" in found["tools"]  # what the function said


REQUESTS = sorted((HERE / "recorded").glob("*.json"))


@pytest.mark.parametrize("path", REQUESTS, ids=lambda p: p.stem)
def test_what_coding_clients_send(server, path):
    """Requests with the fields of each client, streamed: a whole stream in the dialect's words comes back."""
    recorded = json.loads(path.read_text())
    headers = recorded.get("headers", {})
    got = server.post(recorded["path"], json={**recorded["body"], "model": "chat"}, headers=headers)
    assert got.status_code == 200, got.text
    sent = events(got)
    if recorded["path"] == "/v1/messages":
        kinds = [e["type"] for e in sent]
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and "error" not in kinds
    elif recorded["path"] == "/v1/responses":
        assert [e["type"] for e in sent][0] == "response.created"
        assert [e["type"] for e in sent][-1] in ("response.completed", "response.incomplete")
    else:
        assert any(c["finish_reason"] for e in sent for c in e["choices"]) and sent[-1]["usage"]
