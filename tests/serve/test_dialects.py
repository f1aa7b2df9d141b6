"""Open Responses, Anthropic's messages, and what every dialect refuses, through the clients that people have."""

import json

import openai
import pytest
import tiny
from asking import COUNT, HI, PERSON, ROME, WEATHER

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
