"""What every dialect refuses, by name, and what once went wrong."""

import json
import subprocess
import sys

import pytest
from asking import HI, ROME, TOOLS
from conftest import events

# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "more", "field"),
    [
        ("/v1/chat/completions", {"wrong_field": 1}, "wrong_field"),
        ("/v1/chat/completions", {"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ("/v1/chat/completions", {"store": True}, "store"),
        ("/v1/chat/completions", {"temperature": 3}, "temperature"),
        ("/v1/chat/completions", {"n": 17}, "n"),
        ("/v1/chat/completions", {"n": 0}, "n"),
        ("/v1/chat/completions", {"top_logprobs": 33}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "extra": 1}]}, "extra"),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("/v1/chat/completions", {"tools": [*TOOLS, *TOOLS]}, "tools"),
        ("/v1/chat/completions", {"logit_bias": {"99999999": 1}}, "logit_bias"),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            "json_schema",
        ),
        ("/v1/chat/completions", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ("/v1/responses", {"messages": None, "input": "x", "background": True}, "background"),
        ("/v1/responses", {"messages": None, "input": "x", "previous_response_id": "resp_x"}, "previous_response_id"),
        ("/v1/messages", {"max_tokens": 5, "container": "x"}, "container"),
        ("/v1/messages", {}, "max_tokens"),
        ("/v1/completions", {"messages": None, "prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"messages": None, "prompt": [999999]}, "999999"),
        ("/v1/embeddings", {"messages": None, "input": "x", "dimensions": 7}, "dimensions"),
        ("/v1/embeddings", {"messages": None, "input": []}, "input"),
    ],
)
def test_refused_by_name(server, path, more, field):
    body = {
        k: v for k, v in {"model": "chat", "messages": HI, **more}.items() if v is not None or k not in ("messages",)
    }
    answer = server.post(path, json=body)
    assert answer.status_code in (400, 404), answer.text
    assert field in answer.json()["error"]["message"], answer.text
    assert "\n" not in answer.json()["error"]["message"]


def test_too_long(server):
    answer = server.post(
        "/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": "word " * 5000}]}
    )
    assert answer.status_code == 400 and "tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize("over", [0, 1, 900])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
def test_a_prompt_that_leaves_no_room(server, over, path):
    """Without max_tokens: it was "max_tokens is -904" once, or an empty answer where the prompt just filled it."""
    context = server.client.get("/v1/models").json()["data"][0]["context_length"]

    def asked(words):
        text = "hi " * words
        if path == "/v1/completions":
            return {"model": "chat", "prompt": text}
        key = "input" if path.endswith("responses") else "messages"
        return {"model": "chat", key: [{"role": "user", "content": text}]}

    def tokens(words):
        body = asked(words)
        body = (
            body
            if "prompt" in body
            else {"model": "chat", "messages": next(v for v in body.values() if isinstance(v, list))}
        )
        return server.post("/tokenize", json=body).json()["count"]

    step = tokens(200) - tokens(199)
    words = 200 + -(-(context + over - tokens(200)) // step)
    assert tokens(words) >= context + over
    answer = server.post(path, json=asked(words))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
    assert str(context) in error["message"] and "-" not in error["message"]


def test_stream_error_is_a_status(server):
    answer = server.post(
        "/v1/chat/completions",
        json={
            "model": "chat",
            "messages": HI,
            "stream": True,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}},
        },
    )
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_stream_frames(server):
    answer = server.post("/v1/chat/completions", json={"model": "chat", "messages": HI, "stream": True})
    assert (
        answer.headers["content-type"].startswith("text/event-stream")
        and answer.text.endswith("data: [DONE]\n\n")
        and events(answer)[0]["object"] == "chat.completion.chunk"
    )


@pytest.mark.parametrize("form", ["openai-chat", "open-responses", "anthropic"])
def test_llm_comply(server, form):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "llm_comply.cli",
            "-u",
            server.url + "/v1",
            "-k",
            "x",
            "-m",
            "chat",
            "--format",
            form,
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    results = json.loads(done.stdout)
    rows = results["results"] if isinstance(results, dict) else results
    failed = [r["id"] for r in rows if r["status"] == "failed"]
    assert len(rows) >= 9 and [f for f in failed if not f.endswith("image-input")] == [], failed


# ---- what once went wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_value_that_is_the_name_of_a_special_token(server, temperature):
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"a": {"const": "</tool_call>"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }
    got = server.post(
        "/v1/chat/completions",
        json={
            "model": "chat",
            "messages": HI,
            "tools": [tool],
            "tool_choice": "required",
            "reasoning_effort": "none",
            "temperature": temperature,
            "seed": 1,
            "max_tokens": 80,
        },
    ).json()
    assert [json.loads(c["function"]["arguments"]) for c in got["choices"][0]["message"]["tool_calls"]] == [
        {"a": "</tool_call>"}
    ] * len(got["choices"][0]["message"]["tool_calls"])


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_stop_texts_do_not_cut_calls(ai, choice):
    call = ai.chat.completions.create(
        model="chat", messages=ROME, tools=TOOLS, tool_choice=choice, stop=["location", "Rome", '"']
    ).choices[0]
    assert call.finish_reason == "tool_calls" and json.loads(call.message.tool_calls[0].function.arguments)["location"]


def test_a_call_that_is_cut_off(ai):
    answer = ai.chat.completions.create(
        model="chat", messages=ROME, tools=TOOLS, reasoning_effort="none", max_tokens=400
    ).choices[0]
    assert answer.finish_reason == "tool_calls"
    for most in range(1, 30):
        cut = ai.chat.completions.create(
            model="chat", messages=ROME, tools=TOOLS, reasoning_effort="none", max_tokens=most
        ).choices[0]
        if cut.finish_reason == "tool_calls":
            assert isinstance(json.loads(cut.message.tool_calls[-1].function.arguments), dict)


def test_many_inputs_are_one_request(server):
    got = server.post("/v1/embeddings", json={"model": "base", "input": ["a b"] * 400})
    assert got.status_code == 200 and len(got.json()["data"]) == 400
    got = server.post("/v1/completions", json={"model": "base", "prompt": ["a b"] * 256, "max_tokens": 1})
    assert got.status_code == 200 and len(got.json()["choices"]) == 256
    assert (
        server.post(
            "/v1/completions", json={"model": "base", "prompt": ["a b"] * 256, "n": 16, "max_tokens": 1}
        ).status_code
        == 400
    )


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        (
            "/v1/chat/completions",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "object", "x-guidance": None}},
                }
            },
            "x-guidance",
        ),
        ("/v1/chat/completions", {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ("/v1/chat/completions", {"stream": "x"}, "stream:"),
        ("/v1/chat/completions", {"structured_output": {}}, "structured_output:"),
        ("/v1/chat/completions", {"Seed": 1}, "Seed:"),
        ("/v1/chat/completions", {"internal_x": 1}, "internal_x:"),
        (
            "/v1/chat/completions",
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "much"}}]}
                ]
            },
            "detail",
        ),
        (
            "/v1/messages",
            {
                "max_tokens": 50,
                "messages": [*HI, {"role": "assistant", "content": '{"a":'}],
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
            },
            "schema",
        ),
        (
            "/v1/messages",
            {
                "max_tokens": 50,
                "messages": [
                    *HI,
                    {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}]},
                ],
            },
            "only thinking",
        ),
    ],
)
def test_refused_in_words(server, path, more, words):
    got = server.post(path, json={"model": "chat", "messages": HI, **more})
    assert got.status_code == 400 and words in got.json()["error"]["message"], got.text


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "-Infinity"])
def test_what_json_cannot_write_again(server, value):
    tools = f'[{{"type": "function", "name": "f", "parameters": {{"x": {value}}}}}]'
    bodies = {
        "/v1/responses": f'{{"model": "chat", "input": "x", "tools": {tools}, "tool_choice": "none"}}',
        "/votes": f'{{"messages": [{{"a": {value}}}], "left": {{"model": "chat", "text": ""}}, "right": {{"model": "chat", "text": ""}}, "vote": "tie"}}',
    }
    for path, body in bodies.items():
        assert server.post(path, content=body, headers={"content-type": "application/json"}).status_code == 400
    good = server.post(
        "/v1/responses",
        content='{"model": "chat", "input": "\\ud83d\\ude42 NaN", "max_output_tokens": 16}',
        headers={"content-type": "application/json"},
    )
    assert good.status_code == 200


def test_cached_tokens_from_the_start(server):
    body = {
        "model": "chat",
        "max_tokens": 30,
        "stream": True,
        "messages": [{"role": "user", "content": "my name is Alice " * 20}],
    }
    server.post("/v1/messages", json=body)
    seen = events(server.post("/v1/messages", json=body))
    first, last = seen[0]["message"]["usage"], seen[-2]["usage"]
    assert (
        first["cache_read_input_tokens"] == last["cache_read_input_tokens"] > 16
        and first["input_tokens"] == last["input_tokens"]
    )


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (
            "chat/completions",
            {"tool_choice": {"type": "function", "function": {"name": "a b"}}},
            "tool_choice.function.name",
        ),
        ("responses", {"input": []}, "input"),
        ("responses", {"input": "x", "tools": [{"type": "custom", "name": "p", "format": {}}]}, "tools.0.type"),
        (
            "messages",
            {"max_tokens": 3, "tools": [{"type": "web_search_20250305", "name": "w", "max_uses": 5}]},
            "tools.0.type",
        ),
    ],
)
def test_the_field_at_fault_is_named(server, path, body, field):
    messages = {} if path == "responses" else {"messages": [{"role": "user", "content": "x"}]}
    got = server.post(f"/v1/{path}", json={"model": "chat", **messages, **body})
    assert got.status_code == 400 and field in got.json()["error"]["message"], got.text


def test_text_with_tools_that_is_cut_says_so(server):
    """Half an answer must not look like a whole one, whether or not it could have called."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    talk = [{"role": "user", "content": "Say hello."}]
    for more in ({}, {"tools": [tool]}):
        body = {"model": "wild", "messages": talk, "max_tokens": 5, "logit_bias": {}, **more}
        got = server.post("/v1/chat/completions", json={**body, "temperature": 0}).json()
        if got["usage"]["completion_tokens"] == 5:
            assert got["choices"][0]["finish_reason"] == "length"
    half = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"a":"\\ud83d"}'}}]}
    got = server.post("/v1/chat/completions", json={"model": "chat", "messages": [*talk, half], "max_tokens": 2})
    assert got.status_code == 400 and "surrogates" in got.json()["error"]["message"]
