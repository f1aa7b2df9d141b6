"""The command: starting, stopping, being killed, refusing; and random requests from the OpenAPI document."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import tiny
from conftest import Running

from craton.serve.run import vllm_command
from tests.conftest import craton

HI = {"model": "chat", "messages": [{"role": "user", "content": "Tell me a joke."}]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{chat}", "--host", "0.0.0.0"], "API key is needed"),
        (["/nowhere"], "no such model"),
        (["a={chat}", "a={chat}"], "two models"),
        (["{chat}", "--port", "99999"], "--port"),
        (["{chat}", "--max-wait", "0"], "--max-wait"),
        (["{chat}", "--api-keys", "{empty}"], "holds no key"),
        (["{chat}", "--api-keys", "{short}"], "at least 8"),
        (["{chat}", "--engine", "other"], "--engine"),
        (["{chat}", "--engine", "vllm"], "not installed"),
        (["{chat}", "--engine", "vllm", "--max-wait", "9"], "--max-wait"),
        (["{chat}", "--api-keys", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input(chat_folder, tmp_path, arguments, words):
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "short").write_text("abc\n")
    done = craton(
        "serve",
        *(a.format(chat=chat_folder, empty=tmp_path / "empty", short=tmp_path / "short") for a in arguments),
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_port_in_use(server, chat_folder):
    port = server.url.rsplit(":", 1)[1]
    done = craton("serve", chat_folder, "--port", port)
    assert done.returncode == 2 and "cannot listen there" in done.stderr


def test_terminate_drains(chat_folder, tmp_path):
    """SIGTERM: what runs is finished, nothing new is taken, then it ends."""
    r = Running(f"chat={chat_folder}", cwd=tmp_path)
    body = {**HI, "ignore_eos": True, "max_tokens": 2500, "stream": True, "stream_options": {"include_usage": True}}
    with r.client.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        r.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(httpx.TransportError):
            httpx.get(r.url + "/ready", timeout=2)
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["usage"]["completion_tokens"] == 2500
    assert r.process.wait(10) in (0, -signal.SIGTERM)


def test_killed_and_started_again(chat_folder, tmp_path):
    """kill -9 in the middle of answers: the next start is whole, and quick."""
    r = Running(f"chat={chat_folder}", "--votes", tmp_path / "votes.jsonl")
    vote = {
        "messages": HI["messages"],
        "left": {"model": "chat", "text": "a"},
        "right": {"model": "chat", "text": "b"},
        "vote": "left",
    }
    assert r.post("/votes", json=vote).status_code == 200

    def ask():
        with contextlib.suppress(httpx.TransportError):
            r.post("/v1/chat/completions", json={**HI, "ignore_eos": True, "max_tokens": 3000})

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    time.sleep(0.3)
    r.stop(signal.SIGKILL)
    for t in threads:
        t.join()
    r = Running(f"chat={chat_folder}", "--votes", tmp_path / "votes.jsonl")
    assert r.post("/v1/chat/completions", json=HI).json()["choices"][0]["message"]["content"] == tiny.SHORT
    assert json.loads((tmp_path / "votes.jsonl").read_text())["vote"] == "left"
    r.stop()


def test_keys_from_the_environment(chat_folder, tmp_path):
    r = Running(f"chat={chat_folder}", "--host", "0.0.0.0", env={"CRATON_API_KEY": "secret-0123456789"}, cwd=tmp_path)
    url = r.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(url + "/v1/models").status_code == 401
    assert httpx.get(url + "/v1/models", headers={"authorization": "Bearer secret-0123456789"}).status_code == 200
    r.stop()


def test_vllm_command(chat_folder, tmp_path, monkeypatch):
    """The same folder, name, place and limits go to vLLM; keys do not show in its arguments."""
    program = tmp_path / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ.get('VLLM_API_KEY')]))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    command = vllm_command([f"m={chat_folder}"], "127.0.0.1", 9000, [], [], 64)
    assert command[1:] == [
        "serve",
        str(chat_folder),
        "--served-model-name",
        "m",
        "--host",
        "127.0.0.1",
        "--port",
        "9000",
        "--max-num-seqs",
        "64",
        "--shutdown-timeout",
        "30",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "craton", "serve", f"m={chat_folder}", "--engine", "vllm", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        env={**os.environ, "CRATON_API_KEY": "secret-0123456789"},
    )
    arguments, key = json.loads(done.stdout.splitlines()[-1])
    assert (
        arguments[:2] == ["serve", str(chat_folder)]
        and key == "secret-0123456789"
        and "secret" not in " ".join(arguments)
    )


@pytest.mark.parametrize(
    ("phases", "least"), [("fuzzing", 80), pytest.param("examples,coverage,fuzzing", 1000, marks=pytest.mark.slow)]
)
def test_random_requests(server, tmp_path, phases, least):
    """What the OpenAPI document allows never fails the server, and every answer is as the document says."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,negative_data_rejection,unsupported_method"
    program = Path(sys.executable).parent / "schemathesis"
    done = subprocess.run(
        [
            program,
            "run",
            f"{server.url}/openapi.json",
            "--max-examples",
            "8",
            "--phases",
            phases,
            "--seed",
            "1",
            "--no-color",
            "--checks",
            checks,
            "--request-timeout",
            "30",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) > least and server.process.poll() is None
