"""Formats of thinking and tool calls, learned from templates in the published styles."""

import json
import random

import pytest
from llguidance import LLMatcher, LLTokenizer

from craton.text.calls import Parser
from craton.text.dialogue import learn
from tests.text.styles import (
    CHANNELS,
    DEEPSEEK,
    ENDS,
    HARMONY,
    QWEN3,
    SCHEMAS,
    SPECIAL,
    STYLES,
    TOOLS,
    dialogue,
    merge,
    parsed,
    tokenizer,
)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("special", [False, True])
def test_learned(style, special):
    template, opening, native = STYLES[style]
    markers = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    d = dialogue(template, special=[*SPECIAL, *markers], added=()) if special else dialogue(template)
    assert d.calls.opening == opening and d.calls.native == native
    assert (d.calls.between is None) == (style == "llama")
    assert d.thinking == (("<think>", "</think>") if style in ("qwen3", "deepseek", "untold") else None)
    assert d.calls.as_text == (style in ("deepseek", "untold")) and d.calls.no_content == (style == "untold")
    assert bool(d.calls.fields) == (style in ("coder", "pairs", "pythonic"))
    assert d.calls.shows_tools == (style not in ("chatml", "untold"))


@pytest.mark.parametrize("style", STYLES)
def test_grammar_and_parser(style):
    """What the template itself writes for calls is accepted by the grammar and read back, however it is cut."""
    d = dialogue(STYLES[style][0])
    calls = [("weather", {"city": 'New "York" {', "days": 3}), ("wea", {"city": "Rom", "days": 1})][
        : 1 if d.calls.between is None else 2
    ]
    written = [
        {"id": "abcDEF123", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls
    ]
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": written}]
    start, opened = d.render(history[:1], TOOLS)
    assert opened == (style in ("deepseek", "untold"))
    start = start.removesuffix("<think>\n")
    whole = d.tokenizer.render_chat([d._message(m) for m in history], TOOLS if d.calls.native else None, False)
    if style == "untold":
        assert '"weather"' in start and "<calls><call>function<sep>FUNCTION" in start
        start = d.tokenizer.render_chat(history[:1], None, True).removesuffix("<think>\n")
    if d.calls.native:
        assert whole.startswith(start)
        text = whole[len(start) :]
    else:
        text = whole.partition("assistant\n")[2]
    text = text.replace("<think>\n\n</think>\n\n", "")
    text = min((text.split(e)[0] for e in ENDS), key=len)
    lt = LLTokenizer(d.tokenizer.backend.to_str(), eos_token=d.tokenizer.backend.token_to_id("</s>"))
    for choice, before in (("required", ""), ("auto", ""), ("auto", "Let me see. ")):
        matcher = LLMatcher(lt, LLMatcher.grammar_from_lark(d.grammar(SCHEMAS, choice, True)))
        ids = d.tokenizer.encode_rendered(before + text)
        assert matcher.validate_tokens(ids) == len(ids), (choice, before + text, matcher.get_error())
        matcher.consume_tokens(ids)
        assert matcher.is_accepting()
    for bad in (text.replace("weather", "nothing"), text.replace("city", "town")):
        choice = "required" if style == "pythonic" else "auto"  # else it is text there
        matcher = LLMatcher(lt, LLMatcher.grammar_from_lark(d.grammar(SCHEMAS, choice, True)))
        ids = d.tokenizer.encode_rendered(bad)
        assert matcher.validate_tokens(ids) < len(ids)
    if len(calls) == 2:
        matcher = LLMatcher(lt, LLMatcher.grammar_from_lark(d.grammar(SCHEMAS, "required", False)))
        ids = d.tokenizer.encode_rendered(text)
        assert matcher.validate_tokens(ids) < len(ids)
    r = random.Random(0)
    for before in ("", "So: < {\n"):
        for thought in ("", "hm <tool\n"):
            marked = (f"<think>{thought}</think>\n\n" if thought else "") if d.thinking else ""
            source = marked + before + text
            seen = set()
            for _ in range(40):
                parser, parts, at = Parser(d.calls, d.thinking, may_think=True, schemas=SCHEMAS), [], 0
                while at < len(source):
                    step = r.choice((1, 2, 5, 30, 400))
                    parts += parser.feed(source[at : at + step])
                    at += step
                parts = merge([*parts, *parser.feed("", True)])
                seen.add(tuple((p.kind, p.text, p.call) for p in parts))
            assert len(seen) == 1
            found = [p for p in parts if p.kind == "call"]
            assert [p.text for p in found] == [n for n, _ in calls]
            assert [json.loads(p.text) for p in parts if p.kind == "arguments"] == [a for _, a in calls]
            assert "".join(p.text for p in parts if p.kind == "content") == before.rstrip()
            if marked:
                assert parts[0].kind == "reasoning" and parts[0].text == thought.rstrip()
            assert len({p.id for p in found}) == len(found) and all(len(p.id) == 9 for p in found)


def test_no_tools_means_no_parsing():
    d = dialogue(STYLES["qwen"][0])
    text = 'See <tool_call>\n{"name": "x"  \n'
    parser = Parser(None, d.thinking, may_think=True)
    parts = merge([*parser.feed(text), *parser.feed("", True)])
    assert [(p.kind, p.text) for p in parts] == [("content", text)]


def test_thinking_switch():
    d = dialogue(QWEN3)
    user = [{"role": "user", "content": "hi"}]
    assert d.render(user, [])[0].endswith("assistant\n")
    assert d.render(user, [], False) == (d.render(user, [])[0] + "<think>\n\n</think>\n\n", False)
    d = dialogue(DEEPSEEK)
    assert d.render(user, [])[1]
    prompt, opened = d.render(user, [], False)
    assert prompt.endswith("<think>\n\n</think>\n\n") and not opened
    assert d.render(user, [], prefix="The answer")[0].endswith("</think>\n\nThe answer")


def test_templates_where_many_files_are_open():
    """A server with many connections: select() knows no file beyond the 1024th."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1400:
        pytest.skip("no more files can be opened here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    held = [open("/dev/null") for _ in range(1100)]  # noqa: SIM115
    try:
        prompt, _ = dialogue(STYLES["qwen"][0]).render([{"role": "user", "content": "hi"}], [])
    finally:
        for f in held:
            f.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "hi" in prompt


MIXED = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "text": {"type": "string"},
        "lines": {"type": "array", "items": {"type": "integer"}},
        "really": {"type": "boolean"},
        "kind": {"enum": ["a b", "c"]},
        "zip": {"type": ["string", "null"]},
    },
    "required": ["path", "really"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("style", ["coder", "pairs", "pythonic"])
def test_arguments_one_by_one(style):
    """Text with everything that ends things, numbers, truth, choices; some are left out; no arguments at all."""
    d = dialogue(STYLES[style][0])
    schemas = {"edit": MIXED, "now": {"type": "object", "properties": {}}, "any": {"type": "object"}}
    code = 'def f(a, b):\n    return {"x": [1, 2)]}, "</param", \'q\', a <b>\n\n<tool_cal'
    calls = [
        ("edit", {"path": "a/b.py", "text": code, "lines": [1, -2], "really": True, "kind": "a b", "zip": "0123"}),
        ("now", {}),
        ("edit", {"path": "", "really": False}),
    ]
    lt = LLTokenizer(d.tokenizer.backend.to_str(), eos_token=d.tokenizer.backend.token_to_id("</s>"))
    for some in (calls[:1], calls[1:2], calls[2:], calls):
        written = [
            {"id": "abcDEF123", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
            for n, a in some
        ]
        said = d._message({"role": "assistant", "content": "", "tool_calls": written})
        text = d.tokenizer.render_chat([{"role": "user", "content": "q"}, said], TOOLS, False)
        text = text.partition("<Assistant>")[2].removesuffix("</s>")
        matcher = LLMatcher(lt, LLMatcher.grammar_from_lark(d.grammar(schemas, "required", True)))
        ids = d.tokenizer.encode_rendered(text)
        assert matcher.validate_tokens(ids) == len(ids), (text, matcher.get_error())
        for seed in range(20):
            parts = parsed(d.parser(schemas, False, False), text, random.Random(seed))
            names = [t for kind, t in parts if kind == "call"]
            given = [json.loads(t) for kind, t in parts if kind == "arguments"]
            assert list(zip(names, given, strict=True)) == some
    if style == "pythonic":
        parts = parsed(d.parser(schemas, False, False), "[edit(path='it\\'s', really=True, zip=None)]")
        assert json.loads(parts[1][1]) == {"path": "it's", "really": True, "zip": None}


def test_channels():
    """gpt-oss: thinking, what is said before a call, calls in both published spellings, the answer."""
    d = learn(t := tokenizer(HARMONY, special=[*SPECIAL, *CHANNELS]), (t.backend.token_to_id("<|return|>"),))
    assert d.harmony and d.turn_end == t.backend.token_to_id("<|return|>")
    head, after = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
    thought = [("reasoning", "Hm <tool")]
    answer = f"{head}Hm <tool{after}<|channel|>final<|message|>So it is."
    call = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}'
    other = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}'
    said = "<|channel|>commentary<|message|>I look." + after
    calls = [("call", "weather"), ("arguments", '{"city": "Rome"}')]
    wanted = {
        answer: [*thought, ("content", "So it is.")],
        f"{head}Hm <tool{after}{call}": [*thought, *calls],
        f"{head}Hm <tool{after}{said}{other}": [*thought, ("content", "I look."), *calls],
        "no channels at all": [("content", "no channels at all")],
    }
    lt = LLTokenizer(t.backend.to_str(), eos_token=t.backend.token_to_id("<|return|>"))
    for text, parts in wanted.items():
        for seed in range(20):
            assert parsed(d.parser(SCHEMAS, False, True), text, random.Random(seed)) == parts
        matcher = LLMatcher(lt, LLMatcher.grammar_from_lark(d.grammar(SCHEMAS, "auto", True)))
        ids = t.encode_rendered(text)
        assert (matcher.validate_tokens(ids) == len(ids)) == text.startswith("<"), text
    required = LLMatcher(lt, LLMatcher.grammar_from_lark(d.grammar(SCHEMAS, "required", True)))
    assert required.validate_tokens(t.encode_rendered(answer)) < len(t.encode_rendered(answer))
    schema = json.dumps({"enum": ["So it is.", 1]})
    held = LLMatcher(lt, LLMatcher.grammar_from_lark(d.grammar({}, "auto", True, schema)))
    assert held.validate_tokens(t.encode_rendered(answer)) < len(t.encode_rendered(answer))
    quoted = answer.replace("So it is.", '"So it is."')
    assert held.validate_tokens(t.encode_rendered(quoted)) == len(t.encode_rendered(quoted))
    history = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "12"},
    ]
    prompt, _ = d.render(history, TOOLS)
    assert "analysis<|message|>Hm<|end|>" in prompt and prompt.endswith("<|start|>assistant")
    assert d.render(history[:1], [], thinking=False)[0].endswith("<|channel|>final<|message|>")


def test_a_call_that_is_cut_in_its_opening_leaves_nothing_behind():
    d = dialogue(STYLES["qwen"][0])
    for n in range(3, len(d.calls.opening)):
        text = "Let me see.\n" + d.calls.opening[:n]
        assert parsed(d.parser(SCHEMAS, False, False), text, cut=True) == [("content", "Let me see.")]
    assert parsed(d.parser(SCHEMAS, False, False), "1 <t") == [("content", "1 <t")]
