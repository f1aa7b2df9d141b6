"""Conversations and answers of the kinds that break others: templates that refuse, histories of agents, odd schemas."""

import json
import random

import pytest
from llguidance import LLMatcher, LLTokenizer

from craton.text.dialogue import learn
from craton.text.fields import json_of
from tests.text.styles import (
    CHANNELS,
    HARMONY,
    LLAMA,
    MISTRAL,
    SCHEMAS,
    SPECIAL,
    STYLES,
    TOOLS,
    dialogue,
    parsed,
    tokenizer,
)

# ---- templates that refuse ---------------------------------------------------------------------------------------

NO_SYSTEM = "{%- for m in messages %}{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}<{{ m.role }}>{{ m.content | trim }}\n{%- endfor %}<model>"
SILENT = (
    "{%- for m in messages %}{%- if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{%- endif %}{%- endfor %}<model>"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT])
def test_nothing_that_was_said_is_lost(template):
    """System messages, late ones too, neighbours of one role, results of tools: all are in the prompt."""
    d = dialogue(template)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "rainy"},
        {"role": "assistant", "content": "three", "tool_calls": []},
        {"role": "developer", "content": "Now in verse."},
        {"role": "user", "content": "four"},
    ]
    prompt, _ = d.render(talk, TOOLS)
    for text in ("Be brief.", "one", "two", "sunny", "rainy", "three", "Now in verse.", "four", "<tools>"):
        assert text in prompt
    assert prompt.index("Be brief.") < prompt.index("one") < prompt.index("sunny") < prompt.index("Now in verse.")


def test_calls_in_another_makers_style():
    """Mistral's template wants ids of nine characters, Llama's one call a message: both get them."""
    calls = [
        {"id": f"call_{n}_of_another", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        for n in (1, 2)
    ]
    results = [{"role": "tool", "tool_call_id": c["id"], "content": f"result {c['id'][5]}"} for c in calls]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    prompt, _ = dialogue(MISTRAL).render(talk, TOOLS)
    ids = [text.split('"')[0] for text in prompt.split('"id": "')[1:]]
    assert len(set(ids)) == 2 and all(len(i) == 9 and i.isalnum() for i in ids)
    prompt, _ = dialogue(LLAMA).render(talk, TOOLS)
    order = [prompt.index(t) for t in ("result 1", "result 2")]
    assert prompt.count("<|eom_id|>") == 2 and order == sorted(order) and prompt.count("result 1") == 1


def test_a_refusal_that_no_form_mends_is_told():
    from craton.base import UserError

    d = dialogue("{{ raise_exception('I take no messages') }}")
    with pytest.raises(UserError, match="I take no messages"):
        d.render([{"role": "user", "content": "hi"}], [])


# ---- what trackers of other projects tell of --------------------------------------------------------------------


def test_channels_that_never_end():
    """Turns that a model invents, one after the other: the parser always comes to an end."""
    d = learn(t := tokenizer(HARMONY, special=[*SPECIAL, *CHANNELS]), (t.backend.token_to_id("<|return|>"),))
    final = "<|channel|>final<|message|>x"
    for text in (
        f"{final}<|end|><|start|>user<|message|>hi",
        f"{final}<|call|><|start|>functions.f to=assistant<|channel|>commentary<|message|>y",
        "<|start|>system<|message|>x",
        "<|start|><|start|><|start|>",
        f"<|start|><|start|>assistant{final}",
        "<|channel|><|channel|><|message|><|message|><|end|>",
    ):
        for seed in range(5):
            parsed(d.parser(None, False, True), text, random.Random(seed))
            parsed(d.parser(SCHEMAS, False, True), text, random.Random(seed))


REFERRED = {
    "type": "object",
    "$defs": {"word": {"type": "string"}, "sign": {"enum": ["1", "2"]}, "n": {"type": "integer"}},
    "properties": {
        "a": {"$ref": "#/$defs/word"},
        "b": {"anyOf": [{"$ref": "#/$defs/word"}, {"type": "null"}]},
        "c": {"$ref": "#/$defs/sign"},
        "d": {"const": "5"},
        "e": {"allOf": [{"$ref": "#/$defs/n"}]},
    },
}


@pytest.mark.parametrize("style", ["coder", "pairs", "pythonic"])
def test_types_behind_references(style):
    d = dialogue(STYLES[style][0])
    lt = LLTokenizer(d.tokenizer.backend.to_str(), eos_token=d.tokenizer.backend.token_to_id("</s>"))
    free = {"type": "object", "additionalProperties": {"type": "integer"}}
    root = {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"k": {"type": "string"}}}}}
    either = {"type": "object", "anyOf": [{"properties": {"k": {"type": "string"}}}, {"required": ["m"]}]}
    for schema, value in (
        (REFERRED, {"a": "123", "b": "42", "c": "1", "d": "5", "e": 7}),
        (REFERRED, {"a": "x", "b": None}),
        (free, {"one": 1, "two": 2}),
        (root, {"k": "v"}),
        (either, {"k": "v"}),
        ({"type": "object", "required": ["zz"]}, {"zz": "v"}),
    ):
        call = {"id": "abcDEF123", "type": "function", "function": {"name": "f", "arguments": json.dumps(value)}}
        said = d._message({"role": "assistant", "content": "", "tool_calls": [call]})
        text = d.tokenizer.render_chat([{"role": "user", "content": "q"}, said], TOOLS, False)
        text = text.partition("<Assistant>")[2].removesuffix("</s>")
        matcher = LLMatcher(lt, LLMatcher.grammar_from_lark(d.grammar({"f": schema}, "required", True)))
        ids = d.tokenizer.encode_rendered(text)
        assert matcher.validate_tokens(ids) == len(ids), (text, matcher.get_error())
        parts = parsed(d.parser({"f": schema}, False, False), text)
        assert json.loads(next(t for kind, t in parts if kind == "arguments")) == value
    for bad in ("NaN", "Infinity", "1e999"):
        written = json.loads(json_of(bad, False, {"type": "number"}), parse_constant=lambda c: pytest.fail(c))
        assert written == bad


def test_brackets_in_text_are_no_calls():
    d = dialogue(STYLES["pythonic"][0])
    lt = LLTokenizer(d.tokenizer.backend.to_str(), eos_token=d.tokenizer.backend.token_to_id("</s>"))
    for text in ("See [the docs](http://x).", "[1, 2, 3] is a list", "a[weather] = b[i]("):
        matcher = LLMatcher(lt, LLMatcher.grammar_from_lark(d.grammar(SCHEMAS, "auto", True)))
        ids = d.tokenizer.encode_rendered(text)
        assert matcher.validate_tokens(ids) == len(ids)
        assert parsed(d.parser(SCHEMAS, False, False), text) == [("content", text)]
    text = 'See [this]: [weather(city="Rome")]'
    assert parsed(d.parser(SCHEMAS, False, False), text)[:2] == [("content", "See [this]:"), ("call", "weather")]


def _call(i, arguments="{}"):
    return {"id": i, "type": "function", "function": {"name": "weather", "arguments": arguments}}


ALTERNATING = MISTRAL.replace(
    "{%- for m in messages %}",
    "{%- set ns = namespace(n=0) %}{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'assistant' and not "
    "m.tool_calls) %}{%- if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('must alternate') }}{%- endif %}"
    "{%- set ns.n = ns.n + 1 %}{%- endif %}",
    1,
)


@pytest.mark.parametrize(
    "talk",
    [
        [("user", "a"), ("calls", "c1"), ("tool", "c1", "b"), ("user", "c")],
        [("user", "a"), ("calls", "c1"), ("user", "b")],
        [("assistant", "a"), ("user", "b")],
        [("user", "a"), ("tool", "c9", "b"), ("user", "c")],
        [("system", "z"), ("named", "a"), ("named", "b")],
    ],
)
def test_histories_of_agents(talk):
    messages = []
    for role, *rest in talk:
        if role == "calls":
            messages.append({"role": "assistant", "content": "", "tool_calls": [_call(rest[0])]})
        elif role == "tool":
            messages.append({"role": "tool", "tool_call_id": rest[0], "content": f"<{rest[1]}>"})
        elif role == "named":
            messages.append({"role": "user", "name": "bob", "content": f"<{rest[0]}>"})
        else:
            messages.append({"role": role, "content": f"<{rest[0]}>"})
    wanted = [f"<{rest[-1]}>" for role, *rest in talk if role != "calls"]
    for template in (ALTERNATING, NO_SYSTEM):
        prompt, _ = dialogue(template).render(messages, TOOLS)
        assert all(text in prompt for text in wanted), prompt


def test_no_call_is_lost_and_a_cut_one_does_no_harm():
    d = learn(t := tokenizer(HARMONY, special=[*SPECIAL, *CHANNELS]), (t.backend.token_to_id("<|return|>"),))
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [_call("1", '{"a": 1111}'), _call("2", '{"a": 2222}')]},
        {"role": "tool", "tool_call_id": "2", "content": "r2"},
        {"role": "tool", "tool_call_id": "1", "content": "r1"},
    ]
    prompt, _ = d.render(talk, TOOLS)
    places = [prompt.index(text) for text in ("1111", "r1", "2222", "r2")]
    assert places == sorted(places)
    talk[1]["tool_calls"] = [_call("1", '{"a": "cut off he')]
    for one in (d, dialogue(MISTRAL), dialogue(STYLES["qwen"][0])):
        assert "cut off he" in one.render(talk[:3], TOOLS)[0]
