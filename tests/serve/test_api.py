"""The APIs through the clients that people have, with strict validation, and what those clients do not show."""

import base64
import io
import json
import struct

import openai
import pytest
import tiny
from asking import COUNT, HI, OTHER, PERSON, ROME, TOOLS
from PIL import Image

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
            model="wild", messages=HI, tools=tool, tool_choice="required", temperature=2.0, seed=seed, max_tokens=100
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


def test_a_picture_is_refused_by_name(server):
    data = io.BytesIO()
    Image.new("RGB", (6, 4)).save(data, "PNG")
    part = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()},
    }
    messages = [{"role": "user", "content": [{"type": "text", "text": "Describe"}, part]}]
    for model in ("chat", "base"):
        got = server.post("/v1/chat/completions", json={"model": model, "messages": messages})
        error = got.json()["error"]
        assert got.status_code == 400 and error["param"] == "messages" and "cannot see pictures" in error["message"]
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
    assert [m.id for m in ai.models.list()] == ["chat", "base", "wild", "assistant"]
    assert ai.models.retrieve("base").pretrained_only and not ai.models.retrieve("base").chat
    assert ai.models.retrieve("assistant").id == "assistant" and ai.models.retrieve("chat").chat
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="other", messages=HI)


def test_tokenize_round_trip(server):
    text = "Größe 日本 🙂 x"
    got = server.post(
        "/tokenize", json={"model": "chat", "prompt": text, "add_special_tokens": False, "return_token_strs": True}
    ).json()
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert server.post("/detokenize", json={"model": "chat", "tokens": got["tokens"]}).json() == {"prompt": text}


def test_a_base_model_goes_on_with_the_text(ai, server):
    """On every chat endpoint the same continuation as of the plain text; what only a chat model can is refused."""
    said = [{"role": "system", "content": "The story so far."}, {"role": "user", "content": "One day the"}]
    prompt = "The story so far.\n\nOne day the"
    plain = ai.completions.create(model="base", prompt=prompt, max_tokens=12, temperature=0)
    text = plain.choices[0].text
    options = {"model": "base", "temperature": 0}
    chat = ai.chat.completions.create(messages=said, max_tokens=12, **options)
    assert chat.choices[0].message.content == text
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens
    body = {**options, "instructions": said[0]["content"], "input": "One day the", "max_output_tokens": 12}
    response = server.post("/v1/responses", json=body)
    assert response.json()["output"][-1]["content"][0]["text"] == text
    body = {**options, "system": said[0]["content"], "messages": said[1:], "max_tokens": 12}
    assert server.post("/v1/messages", json=body).json()["content"][0]["text"] == text
    tool = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    for field, more in (("tools", {"tools": tool}), ("response_format", {"response_format": schema})):
        with pytest.raises(openai.BadRequestError, match="'base' was only pretrained") as refused:
            ai.chat.completions.create(model="base", messages=said, **more)
        assert refused.value.param == field
    held = {"structured_outputs": {"choice": ["yes", "no"]}}
    chosen = ai.chat.completions.create(model="base", messages=said, extra_body=held)
    assert chosen.choices[0].message.content in ("yes", "no")


def test_the_last_message_is_continued(ai, server):
    talk = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello there,"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    options = {"model": "chat", "temperature": 0, "max_tokens": 20}
    answer = ai.chat.completions.create(messages=talk, extra_body=more, **options)
    same = server.post("/v1/messages", json={"messages": talk, **options}).json()  # Anthropic's always does so
    assert answer.choices[0].message.content == same["content"][0]["text"]
    for wrong, field in (
        (more | {"add_generation_prompt": True}, "add_generation_prompt"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        (more | {"messages": talk[:1]}, "continue_final_message"),
    ):
        got = server.post("/v1/chat/completions", json={"messages": talk, **options, **wrong})
        assert got.status_code == 400 and got.json()["error"]["param"] == field


def test_zero_probability_mass_is_the_likeliest_token(ai):
    options = {"model": "chat", "messages": HI, "max_tokens": 12}
    answers = [ai.chat.completions.create(top_p=0, temperature=1.5, seed=s, **options) for s in range(3)]
    greedy = ai.chat.completions.create(temperature=0, **options)
    assert {a.choices[0].message.content for a in answers} == {greedy.choices[0].message.content}
