"""The APIs through the clients that people have, with strict validation, and what those clients do not show."""

import base64
import io
import json
import struct
import subprocess
import sys

import anthropic
import openai
import pytest
import tiny
from conftest import events
from PIL import Image

WEATHER = {
    "name": "get_weather",
    "description": "Get current weather for a location.",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "City name"}},
        "required": ["location"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
OTHER = {
    "type": "function",
    "function": {
        "name": "other",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer"}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}
HI = [{"role": "user", "content": "Tell me a joke."}]
COUNT = [{"role": "user", "content": "Count from 1 to 5."}]
ROME = [{"role": "user", "content": "What is the weather in Rome?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def ai(server):
    return openai.OpenAI(
        base_url=server.url + "/v1", api_key="x", _strict_response_validation=True, max_retries=0, timeout=30
    )


@pytest.fixture(scope="module")
def lax(server):
    """The strict types forget that a first token has no score, and that a stream's finish_reason is null until its
    end."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(
        base_url=server.url, api_key="x", _strict_response_validation=True, max_retries=0, timeout=30
    )


# ---- OpenAI's chat ----------------------------------------------------------------------------------------------


def test_chat(ai):
    answer = ai.chat.completions.create(model="chat", messages=HI)
    choice = answer.choices[0]
    assert choice.message.content == tiny.SHORT and choice.finish_reason == "stop"
    assert choice.message.reasoning_content == tiny.THOUGHT
    assert (
        answer.usage.prompt_tokens > 5
        and answer.usage.completion_tokens > 5
        and answer.usage.completion_tokens_details.reasoning_tokens > 3
    )
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.5, "seed": 4, "n": 3},
        {"stop": ["four", "x"]},
        {"max_tokens": 17},
        {"tools": TOOLS},
        {"reasoning_effort": "none"},
    ],
)
@pytest.mark.parametrize("messages", [COUNT, ROME])
def test_stream_equals_whole(ai, messages, more):
    whole = ai.chat.completions.create(model="chat", messages=messages, **more)
    chunks = list(
        ai.chat.completions.create(
            model="chat", messages=messages, stream=True, stream_options={"include_usage": True}, **more
        )
    )
    assert (
        len({c.id for c in chunks}) == 1
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        and not chunks[-1].choices
    )
    assert all(c.usage is None for c in chunks[:-1])
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == (choice.message.content or "")
        assert "".join(getattr(c.delta, "reasoning_content", None) or "" for c in mine) == getattr(
            choice.message, "reasoning_content", ""
        )
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        calls = {}
        for c in mine:
            for t in c.delta.tool_calls or []:
                call = calls.setdefault(t.index, ["", ""])
                call[0] += t.function.name or ""
                call[1] += t.function.arguments or ""
        assert list(calls.values()) == [
            [t.function.name, t.function.arguments] for t in choice.message.tool_calls or []
        ]


def test_stop_and_length(ai):
    answer = ai.chat.completions.create(model="chat", messages=COUNT, stop=["four"], reasoning_effort="none").choices[0]
    assert answer.finish_reason == "stop" and answer.message.content == "One, two, three, "
    answer = ai.chat.completions.create(
        model="chat", messages=COUNT, max_completion_tokens=3, reasoning_effort="none"
    ).choices[0]
    assert answer.finish_reason == "length" and tiny.LONG.startswith(answer.message.content)


def test_seed_and_n(ai):
    def ask(seed, n=3):
        return [
            c.message.content
            for c in ai.chat.completions.create(
                model="base", messages=HI, temperature=1.0, seed=seed, n=n, max_tokens=12
            ).choices
        ]

    assert ask(1) == ask(1) and ask(1) != ask(2) and len(set(ask(1))) == 3


def test_logit_bias(ai, server):
    star = server.post("/tokenize", json={"model": "chat", "prompt": "*", "add_special_tokens": False}).json()[
        "tokens"
    ][0]
    answer = ai.chat.completions.create(model="chat", messages=HI, logit_bias={str(star): 100}, max_tokens=5)
    assert answer.choices[0].message.content == "*****"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("effort", ["none", None])
@pytest.mark.parametrize("stop", [None, ["know"]])
def test_logprobs(ai, stream, effort, stop):
    """They join to the text, but for a token that a stop text cuts, and each is among its own alternatives."""
    more = {"reasoning_effort": effort} if effort else {}
    answer = ai.chat.completions.create(
        model="chat", messages=COUNT, logprobs=True, top_logprobs=3, stream=stream, stop=stop, **more
    )
    if stream:
        chunks = [c.choices[0] for c in answer]
        text, scores = (
            "".join(c.delta.content or "" for c in chunks),
            [s for c in chunks if c.logprobs for s in c.logprobs.content],
        )
    else:
        text, scores = answer.choices[0].message.content, answer.choices[0].logprobs.content
    joined = b"".join(bytes(s.bytes) for s in scores).decode()
    assert (
        text and joined.startswith(text) and not joined[0].isspace() and len(joined) - len(text) < len(scores[-1].bytes)
    )
    for s in scores:
        assert (
            len(s.top_logprobs) == 3
            and s.top_logprobs[0].token == s.token
            and abs(s.top_logprobs[0].logprob - s.logprob) < 1e-5
            and s.logprob <= 0
        )


def test_tool_choice(ai):
    def ask(**more):
        return ai.chat.completions.create(model="chat", messages=ROME, tools=[*TOOLS, OTHER], **more).choices[0]

    auto = ask()
    assert auto.finish_reason == "tool_calls" and auto.message.content is None
    (call,) = auto.message.tool_calls
    assert (
        call.function.name == "get_weather" and json.loads(call.function.arguments) == {"location": "Rome"} and call.id
    )
    assert ask(tool_choice="none").message.tool_calls is None
    assert ask(tool_choice="required").message.tool_calls
    named = ask(tool_choice={"type": "function", "function": {"name": "other"}})
    assert [c.function.name for c in named.message.tool_calls] == ["other"] and isinstance(
        json.loads(named.message.tool_calls[0].function.arguments)["n"], int
    )
    allowed = ask(
        tool_choice={
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "other"}}]},
        }
    )
    assert {c.function.name for c in allowed.message.tool_calls} == {"other"}


def test_parallel_tool_calls(ai):
    two = [{"role": "user", "content": "What is the weather in Rome and Oslo?"}]
    calls = ai.chat.completions.create(model="chat", messages=two, tools=TOOLS).choices[0].message.tool_calls
    assert [json.loads(c.function.arguments)["location"] for c in calls] == ["Rome", "Oslo"] and len(
        {c.id for c in calls}
    ) == 2
    assert (
        len(
            ai.chat.completions.create(model="chat", messages=two, tools=TOOLS, parallel_tool_calls=False)
            .choices[0]
            .message.tool_calls
        )
        == 1
    )


def test_tool_results(ai):
    call = ai.chat.completions.create(model="chat", messages=ROME, tools=TOOLS).choices[0].message
    messages = [*ROME, call.model_dump(), {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "sunny"}]
    assert (
        ai.chat.completions.create(model="chat", messages=messages, tools=TOOLS).choices[0].message.content
        == "It is sunny in Rome."
    )


def test_arguments_follow_the_schema_at_any_temperature(ai):
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "list": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["kind", "list"],
        "additionalProperties": False,
    }
    tool = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}]
    for seed in range(5):
        answer = ai.chat.completions.create(
            model="base", messages=HI, tools=tool, tool_choice="required", temperature=2.0, seed=seed, max_tokens=100
        )
        for call in answer.choices[0].message.tool_calls:
            made = json.loads(call.function.arguments)
            assert made["kind"] in ("a", "b") and 1 <= len(made["list"]) <= 3


@pytest.mark.parametrize("stream", [False, True])
def test_response_format(ai, stream):
    """JSON by a schema, after thinking, whatever the temperature."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = ai.chat.completions.create(
        model="chat", messages=HI, response_format=form, temperature=1.3, seed=1, stream=stream
    )
    text = "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
    assert set(json.loads(text)) == {"name", "age"}
    if not stream:
        assert isinstance(
            json.loads(
                ai.chat.completions.create(
                    model="chat", messages=HI, response_format={"type": "json_object"}, max_tokens=60
                )
                .choices[0]
                .message.content
            ),
            dict,
        )


def test_schema_and_tools(ai):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    thought = (
        ai.chat.completions.create(model="chat", messages=HI, response_format=form, max_tokens=90).choices[0].message
    )
    assert thought.reasoning_content == tiny.THOUGHT and set(json.loads(thought.content)) == {"name", "age"}
    assert (
        ai.chat.completions.create(model="chat", messages=ROME, tools=TOOLS, response_format=form)
        .choices[0]
        .message.tool_calls
    )
    answer = (
        ai.chat.completions.create(
            model="chat", messages=ROME, tools=TOOLS, tool_choice="none", response_format=form, max_tokens=80
        )
        .choices[0]
        .message
    )
    assert set(json.loads(answer.content)) == {"name", "age"}


def test_reasoning_budget(ai):
    full = ai.chat.completions.create(model="chat", messages=HI)
    cut = ai.chat.completions.create(
        model="chat", messages=HI, extra_body={"thinking": {"type": "enabled", "budget_tokens": 3}}
    )
    assert cut.usage.completion_tokens_details.reasoning_tokens < full.usage.completion_tokens_details.reasoning_tokens
    assert cut.choices[0].message.content and full.choices[0].message.reasoning_content.startswith(
        cut.choices[0].message.reasoning_content
    )
    off = ai.chat.completions.create(model="chat", messages=HI, reasoning_effort="none")
    assert off.usage.completion_tokens_details.reasoning_tokens == 0 and not hasattr(
        off.choices[0].message, "reasoning_content"
    )


def test_structured_outputs(ai):
    def ask(**s):
        return (
            ai.chat.completions.create(
                model="chat", messages=HI, reasoning_effort="none", max_tokens=40, extra_body={"structured_outputs": s}
            )
            .choices[0]
            .message.content
        )

    assert ask(choice=["yes", "no"]) in ("yes", "no")
    assert ask(regex="[0-9]{4}").isdigit()


def test_cached_tokens(ai):
    messages = [{"role": "system", "content": "cats and jokes " * 30}, *HI]
    ai.chat.completions.create(model="chat", messages=messages)
    again = ai.chat.completions.create(model="chat", messages=messages)
    assert again.usage.prompt_tokens_details.cached_tokens >= again.usage.prompt_tokens - 20


def test_image_is_named_to_the_model(server):
    data = io.BytesIO()
    Image.new("RGB", (6, 4)).save(data, "PNG")
    part = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()},
    }
    messages = [{"role": "user", "content": [{"type": "text", "text": "Describe"}, part]}]
    ids = server.post("/tokenize", json={"model": "chat", "messages": messages}).json()["tokens"]
    assert (
        "(PNG, 6x4). This model cannot see"
        in server.post("/detokenize", json={"model": "chat", "tokens": ids}).json()["prompt"]
    )
    for bad in ("http://example.com/x.png", "data:image/png;base64,AAAA", "data:text/plain;base64,AAAA"):
        part["image_url"]["url"] = bad
        assert server.post("/v1/chat/completions", json={"model": "chat", "messages": messages}).status_code == 400


# ---- completions, embeddings, models ----------------------------------------------------------------------------


def test_completions(ai, lax):
    whole = ai.completions.create(
        model="base", prompt=["def f(", "import "], max_tokens=8, temperature=0, logprobs=2, n=2, seed=1
    )
    assert [c.index for c in whole.choices] == [0, 1, 2, 3] and whole.usage.completion_tokens == 32
    streamed = {}
    for chunk in lax.completions.create(
        model="base", prompt=["def f(", "import "], max_tokens=8, temperature=0, n=2, seed=1, stream=True
    ):
        streamed[chunk.choices[0].index] = streamed.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [streamed[i] for i in range(4)] == [c.text for c in whole.choices]
    for c in whole.choices:
        assert "".join(c.logprobs.tokens) == c.text and len(c.logprobs.token_logprobs) == 8


def test_echo_scores_the_prompt(lax, server):
    ids = server.post("/tokenize", json={"model": "base", "prompt": "import sys, os"}).json()["tokens"]
    answer = lax.completions.create(
        model="base", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0
    ).choices[0]
    scores = answer.logprobs
    assert (
        len(scores.tokens) == len(ids) + 1
        and scores.token_logprobs[0] is None
        and all(p <= 0 for p in scores.token_logprobs[1:])
    )
    only = lax.completions.create(model="base", prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    assert only.token_logprobs == scores.token_logprobs[:-1]


def test_embeddings(ai, server):
    answer = ai.embeddings.create(model="base", input=["one text", "another", "one text"], encoding_format="float")
    a, b, c = (d.embedding for d in answer.data)
    assert a == pytest.approx(c) and a != pytest.approx(b) and sum(x * x for x in a) == pytest.approx(1, abs=1e-4)
    packed = server.post(
        "/v1/embeddings", json={"model": "base", "input": "one text", "encoding_format": "base64"}
    ).json()["data"][0]["embedding"]
    assert list(struct.unpack(f"{len(a)}f", base64.b64decode(packed))) == pytest.approx(a, abs=1e-6)


def test_models(ai, server):
    assert [m.id for m in ai.models.list()] == ["chat", "base"] and ai.models.retrieve("base").pretrained_only
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="other", messages=HI)


def test_tokenize_round_trip(server):
    text = "Größe 日本 🙂 x"
    got = server.post(
        "/tokenize", json={"model": "chat", "prompt": text, "add_special_tokens": False, "return_token_strs": True}
    ).json()
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert server.post("/detokenize", json={"model": "chat", "tokens": got["tokens"]}).json() == {"prompt": text}


# ---- Open Responses ---------------------------------------------------------------------------------------------


def test_responses(ai):
    answer = ai.responses.create(model="chat", input="Tell me a joke.")
    assert (
        answer.output_text == tiny.SHORT
        and answer.status == "completed"
        and [o.type for o in answer.output] == ["reasoning", "message"]
    )
    assert ai.responses.retrieve(answer.id).output_text == tiny.SHORT
    after = ai.responses.create(
        model="chat", input="Count from 1 to 5.", previous_response_id=answer.id, instructions="Be brief."
    )
    assert after.output_text == tiny.LONG and after.usage.input_tokens > answer.usage.input_tokens
    ai.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(answer.id)
    kept = ai.responses.create(model="chat", input="Tell me a joke.", store=False)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(kept.id)


@pytest.mark.parametrize("summary", [None, "auto"])
@pytest.mark.parametrize("prompt", ["Count from 1 to 5.", "What is the weather in Rome and Oslo?"])
def test_responses_stream(ai, prompt, summary):
    tools = [{"type": "function", **WEATHER}]
    more = {"reasoning": {"summary": summary}} if summary else {}
    whole = ai.responses.create(model="chat", input=prompt, tools=tools, **more)
    seen = list(ai.responses.create(model="chat", input=prompt, tools=tools, stream=True, **more))
    assert (
        [e.sequence_number for e in seen] == list(range(len(seen)))
        and seen[0].type == "response.created"
        and seen[-1].type == "response.completed"
    )
    last = seen[-1].response

    def shown(response):
        return [
            (
                o.type,
                getattr(o, "name", None),
                getattr(o, "arguments", None),
                [c.text for c in getattr(o, "content", None) or []],
                [s.text for s in getattr(o, "summary", None) or []],
            )
            for o in response.output
        ]

    assert shown(last) == shown(whole)
    for kind, text in (
        ("response.output_text.delta", whole.output_text),
        (
            "response.function_call_arguments.delta",
            "".join(o.arguments for o in whole.output if o.type == "function_call"),
        ),
    ):
        assert "".join(e.delta for e in seen if e.type == kind) == text
    if summary:
        assert "".join(e.delta for e in seen if e.type == "response.reasoning_summary_text.delta") == tiny.THOUGHT
    assert [e.item.type for e in seen if e.type == "response.output_item.done"] == [o.type for o in whole.output]


def test_responses_tools_and_schema(ai):
    tools = [{"type": "function", **WEATHER}]
    first = ai.responses.create(model="chat", input=ROME, tools=tools)
    call = first.output[-1]
    assert call.type == "function_call" and json.loads(call.arguments) == {"location": "Rome"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    assert (
        ai.responses.create(model="chat", input=[result], previous_response_id=first.id, tools=tools).output_text
        == "It is sunny in Rome."
    )
    by_hand = [*ROME, *[o.model_dump(exclude_none=True) for o in first.output], result]
    assert ai.responses.create(model="chat", input=by_hand, tools=tools).output_text == "It is sunny in Rome."
    made = ai.responses.create(
        model="chat", input="Tell me a joke.", text={"format": {"type": "json_schema", "name": "p", "schema": PERSON}}
    )
    assert set(json.loads(made.output_text)) == {"name", "age"}
    cut = ai.responses.create(model="chat", input="Count from 1 to 5.", max_output_tokens=16)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    scored = ai.responses.create(
        model="chat", input="Tell me a joke.", top_logprobs=2, include=["message.output_text.logprobs"]
    )
    content = scored.output[-1].content[0]
    assert "".join(s.token for s in content.logprobs) == content.text


# ---- Anthropic --------------------------------------------------------------------------------------------------


def test_messages(claude):
    answer = claude.messages.create(model="chat", max_tokens=200, messages=HI, system="Be brief.")
    assert (
        [b.type for b in answer.content] == ["thinking", "text"]
        and answer.content[1].text == tiny.SHORT
        and answer.stop_reason == "end_turn"
    )
    assert (
        claude.messages.create(model="chat", max_tokens=200, messages=HI, thinking={"type": "disabled"}).content[0].text
        == tiny.SHORT
    )
    cut = claude.messages.create(
        model="chat", max_tokens=200, messages=COUNT, stop_sequences=["four"], thinking={"type": "disabled"}
    )
    assert (
        cut.stop_reason == "stop_sequence"
        and cut.stop_sequence == "four"
        and cut.content[0].text == "One, two, three, "
    )
    assert (
        claude.messages.create(model="chat", max_tokens=4, messages=COUNT, thinking={"type": "disabled"}).stop_reason
        == "max_tokens"
    )
    on = claude.messages.create(
        model="chat", max_tokens=100, messages=[*COUNT, {"role": "assistant", "content": "One, two,"}]
    )
    assert on.content[0].text == tiny.LONG.removeprefix("One, two,")


def test_messages_stream(claude):
    with claude.messages.stream(model="chat", max_tokens=300, messages=COUNT) as stream:
        kinds = [e.type for e in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    whole = claude.messages.create(model="chat", max_tokens=300, messages=COUNT)
    assert [(b.type, getattr(b, "text", None), getattr(b, "thinking", None)) for b in final.content] == [
        (b.type, getattr(b, "text", None), getattr(b, "thinking", None)) for b in whole.content
    ]
    assert final.usage.output_tokens == whole.usage.output_tokens and final.stop_reason == "end_turn"


def test_messages_tools(claude):
    tools = [
        {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]},
        {"name": "other", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
    ]
    answer = claude.messages.create(model="chat", max_tokens=200, messages=ROME, tools=tools)
    call = answer.content[-1]
    assert answer.stop_reason == "tool_use" and call.type == "tool_use" and call.input == {"location": "Rome"}
    with claude.messages.stream(model="chat", max_tokens=200, messages=ROME, tools=tools) as stream:
        assert stream.get_final_message().content[-1].input == {"location": "Rome"}
    after = claude.messages.create(
        model="chat",
        max_tokens=200,
        tools=tools,
        messages=[
            *ROME,
            {"role": "assistant", "content": [b.model_dump() for b in answer.content]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
        ],
    )
    assert after.content[-1].text == "It is sunny in Rome."
    assert (
        claude.messages.create(
            model="chat", max_tokens=60, messages=HI, tools=tools, tool_choice={"type": "tool", "name": "other"}
        )
        .content[-1]
        .name
        == "other"
    )
    assert (
        claude.messages.create(
            model="chat", max_tokens=60, messages=HI, tools=tools, tool_choice={"type": "any"}
        ).stop_reason
        == "tool_use"
    )
    assert (
        claude.messages.create(model="chat", max_tokens=60, messages=ROME, tools=tools, tool_choice={"type": "none"})
        .content[-1]
        .type
        == "text"
    )


def test_count_tokens(claude):
    counted = claude.messages.count_tokens(model="chat", messages=HI, system="Be brief.")
    used = claude.messages.create(model="chat", max_tokens=5, messages=HI, system="Be brief.").usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens


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
    assert done.returncode == 0 and len(rows) >= 9 and not [r for r in rows if r["status"] == "failed"], done.stdout


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
