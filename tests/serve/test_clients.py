"""What people's own clients send."""

import gzip
import json
import zlib

import pytest

from craton.serve.run import named

ASK = {"model": "chat", "messages": [{"role": "user", "content": "Tell me a joke."}], "max_tokens": 4, "temperature": 0}


def post(server, body, encoding):
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return server.client.post("/v1/chat/completions", content=body, headers=headers)


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes), ("GZIP", gzip.compress)],
)
def test_compressed_bodies(server, encoding, encode):
    done = post(server, encode(json.dumps(ASK).encode()), encoding)
    plain = server.client.post("/v1/chat/completions", json=ASK).json()
    assert done.status_code == 200 and done.json()["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("br", b"x", 415),
        ("gzip", b"{}", 400),
        ("gzip", gzip.compress(json.dumps(ASK).encode())[:-20], 400),
        ("gzip", gzip.compress(b" " * (64 << 20)), 413),  # 64 kB that become 64 MB
    ],
)
def test_compressed_bodies_that_are_refused(server, encoding, body, status):
    done = post(server, body, encoding)
    assert done.status_code == status and done.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/"])
def test_head_is_get_without_the_body(server, path):
    done = server.client.head(path)
    assert done.status_code == 200 and not done.content


def test_names_with_a_slash(chat_folder, tmp_path):
    assert named([f"org/name={chat_folder}"]) == {"org/name": str(chat_folder)}
    odd = tmp_path / "a=b"
    odd.symlink_to(chat_folder)
    assert named([str(odd)]) == {chat_folder.name: str(odd)}


def test_anthropics_clients_look_for_these_words(server):
    body = {"model": "chat", "max_tokens": 5, "messages": [{"role": "user", "content": "word " * 9000}]}
    done = server.client.post("/v1/messages", json=body)
    assert done.status_code == 400 and done.json()["error"]["message"].startswith("prompt is too long: ")
    body = {"model": "chat", "messages": body["messages"]}
    error = server.client.post("/v1/chat/completions", json=body).json()["error"]
    assert error["code"] == "context_length_exceeded" and "the context is" in error["message"]


def test_hints_about_caches_have_no_effect(server):
    """As coding clients send them, in each dialect."""
    cached = {
        "type": "text",
        "text": "Tell me a joke.",
        "cache_control": {"type": "ephemeral", "scope": "global", "ttl": "1h"},
    }
    tool = {"name": "look", "input_schema": {"type": "object"}, "eager_input_streaming": True}
    tool["cache_control"] = {"type": "ephemeral", "new": {"a": [1]}}
    body = {"model": "chat", "max_tokens": 4, "temperature": 0, "tools": [tool], "tool_choice": {"type": "none"}}
    body |= {"messages": [{"role": "user", "content": [cached]}], "context_management": {"edits": [{"type": "clear"}]}}
    done = server.client.post("/v1/messages", json=body)
    plain = server.client.post("/v1/chat/completions", json=ASK).json()
    assert done.status_code == 200, done.text
    hinted = server.client.post(
        "/v1/chat/completions", json=ASK | {"messages": [{"role": "user", "content": [cached]}]}
    )
    assert hinted.status_code == 200 and hinted.json()["choices"] == plain["choices"]
