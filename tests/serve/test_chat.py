"""`craton chat`: with a folder, with a server, on a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import tiny

from craton.text.tokenizer import Tokenizer
from tests.conftest import craton


def lines(done) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_commands(chat_folder, tmp_path):
    script = f'Tell me a joke.\n/set temperature 0\n/retry\n"""\nCount from\n1 to 5.\n"""\n/undo\nCount from 1 to 5.\n/save {tmp_path}/c.json\n/clear\n/load {tmp_path}/c.json\n/save {tmp_path}/c.md\n/set\n'
    done = craton("chat", chat_folder, "--json", input=script)
    (line,), out = lines(done), done.stderr.splitlines()
    result = json.loads(line)
    assert [m["content"] for m in result["messages"]] == [
        "Tell me a joke.",
        tiny.SHORT,
        "Count from 1 to 5.",
        tiny.LONG,
    ]
    assert (
        json.loads((tmp_path / "c.json").read_text())["messages"] == result["messages"]
        and f"## assistant\n\n{tiny.LONG}" in (tmp_path / "c.md").read_text()
    )
    assert sum(tiny.SHORT in line for line in out) >= 2 and any(
        "thinking" in line and tiny.THOUGHT in line for line in out
    )


def test_thinking_off(chat_folder):
    out = craton("chat", chat_folder, input="/set thinking off\nTell me a joke.\n").stdout
    assert tiny.SHORT in out and tiny.THOUGHT not in out


@pytest.mark.parametrize(
    "line",
    [
        "/nothing",
        "/set colour red",
        "/set temperature warm",
        "/set temperature 999\nhello",
        "/save x.txt",
        "/load /nowhere.json",
        "/retry",
        "/set thinking much",
    ],
)
def test_bad_commands(chat_folder, line):
    done = craton("chat", chat_folder, input=line + "\n")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_with_a_server(server):
    for url in (server.url, server.url + "/v1", server.url + "/"):
        result = json.loads(lines(craton("chat", url, "--json", input="Tell me a joke.\nCount from 1 to 5.\n"))[-1])
        assert [m["content"] for m in result["messages"][1::2]] == [tiny.SHORT, tiny.LONG]
    out = craton("chat", server.url, "--model", "base", "--max-tokens", "4", input="import os\n").stdout
    assert "only pretrained" in out
    for arguments, words in (
        ((server.url, "--model", "nobody"), "--model nobody"),
        (("http://127.0.0.1:1",), "no OpenAI-compatible server"),
        (("http://",), "no OpenAI-compatible server"),
    ):
        done = craton("chat", *arguments, input="x\n")
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_no_template(chat_folder, tmp_path):
    for f in chat_folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    tokenizer = Tokenizer.open(chat_folder)
    del tokenizer.config["chat_template"]
    tokenizer.save(tmp_path)
    done = craton("chat", tmp_path, input="x\n")
    assert done.returncode == 0 and "no chat template: it goes on with your text" in done.stdout
    template = tmp_path / "own.jinja"
    template.write_text(tiny.TEMPLATE)
    done = craton("chat", tmp_path, "--chat-template", template, input="x\n")
    assert done.returncode == 0 and "goes on with" not in done.stdout
    done = craton("chat", "http://127.0.0.1:1", "--chat-template", template, input="x\n")
    assert done.returncode == 2 and "a server has its own" in done.stderr


def test_terminal(chat_folder, tmp_path):
    """On a terminal: a prompt, a line break by Alt-Enter, history from the last time."""

    def talk(keys: list[bytes]) -> str:
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "craton", "chat", str(chat_folder)],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)},
        )
        os.close(follower)
        seen = b""

        def until(what: bytes, seconds: float = 30) -> None:
            nonlocal seen
            end = time.monotonic() + seconds
            while what not in seen and time.monotonic() < end:
                if select.select([leader], [], [], 0.1)[0]:
                    try:
                        seen += os.read(leader, 65536)
                    except OSError:
                        return

        until(b"Ctrl-D ends")
        time.sleep(0.5)
        for key in keys:
            os.write(leader, key)
            until(b"a second")
            time.sleep(0.3)
        os.write(leader, b"\x04")
        until(b"never", 2)
        process.wait(10)
        os.close(leader)
        return seen.decode("utf-8", "replace")

    assert tiny.SHORT in talk([b"Tell me\x1b\ra joke.\r"])
    assert "+Tell me\n+a joke." in (tmp_path / "craton" / "history").read_text()
    assert tiny.SHORT in talk([b"\x1b[A\r"])  # up: the last question again


@pytest.mark.parametrize(
    "url, ours, theirs",
    [
        ("https://api.openai.com/v1", "o", "o"),
        ("https://elsewhere.example/v1", "c", ""),
        ("http://elsewhere.example/v1", "", ""),
        ("http://api.openai.com/v1", "", ""),
        ("https://api.openai.com.evil.example", "c", ""),
        ("http://127.0.0.1:8000", "c", ""),
        ("http://localhost:8000", "c", ""),
    ],
)
def test_keys_go_where_they_belong(monkeypatch, url, ours, theirs):
    """Either key went to any address once, over plain http as well."""
    from craton.engine.remote import key_for

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("CRATON_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "o")
    assert key_for(url) == theirs
    monkeypatch.setenv("CRATON_API_KEY", "c")
    assert key_for(url) == ours
    monkeypatch.delenv("CRATON_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://elsewhere.example/v1")
    assert key_for("https://elsewhere.example/v1") == "o" and key_for("https://api.openai.com/v1") == ""
