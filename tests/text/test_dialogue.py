"""Formats of thinking and tool calls, learned from templates in the published styles."""

import json
import random
from dataclasses import replace

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from craton.text.calls import HERMES, Parser, Part
from craton.text.dialogue import learn
from craton.text.fields import json_of
from craton.text.tokenizer import Tokenizer

CHATML = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
QWEN = """{%- if tools %}<|im_start|>system
# Tools
<tools>{% for t in tools %}
{{ t | tojson }}{% endfor %}
</tools><|im_end|>
{% endif %}{%- for m in messages %}{%- if m.role == 'assistant' %}<|im_start|>assistant
THINK{{ m.content }}{%- for c in m.tool_calls or [] %}{{ '\n' if not loop.first or m.content else '' }}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{%- endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
SWITCH{% endif %}"""
SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN3 = QWEN.replace("SWITCH", SWITCH).replace(
    "THINK", "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
)
LLAMA = """{{ bos_token }}{%- if tools %}<|start_header_id|>system<|end_header_id|>
{% for t in tools %}{{ t | tojson }}{% endfor %}<|eot_id|>{% endif %}{%- for m in messages %}{%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{%- endif %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eom_id|>{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content }}<|eot_id|>{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """{{ bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{%- if tools and loop.last or tools and not loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif %}[INST]{{ m.content }}[/INST]{%- elif m.tool_calls %}[TOOL_CALLS][{%- for c in m.tool_calls %}{%- if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{%- endif %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{{ ', ' if not loop.last else '' }}{%- endfor %}]</s>{%- else %}{{ m.content }}</s>{%- endif %}{%- endfor %}"""
DEEPSEEK = """{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{%- for m in messages %}{%- if m.role == 'user' %}<User>{{ m.content }}{%- elif m.tool_calls %}<Assistant><calls>{%- for c in m.tool_calls %}{{ '\n' if not loop.first else '' }}<call>{{ c.type + '<sep>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```</call>' }}{%- endfor %}</calls></s>{%- else %}<Assistant>{{ m.content.split('</think>')[-1] }}</s>{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<Assistant><think>
{% endif %}"""
_TOLD = "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
_TURNS = (
    "{%- for m in messages %}{%- if m.tool_calls %}<Assistant>CALLS</s>{%- elif m.role == 'assistant' %}<Assistant>"
    "{{ m.content }}</s>{%- else %}<User>{{ m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<Assistant>{% endif %}"
)
# Each argument in a tag of its own, texts without quotes.
CODER = _TOLD + _TURNS.replace(
    "CALLS",
    "{%- for c in m.tool_calls %}{{ '\\n' if not loop.first else '' }}{{ '<tool_call>\\n<function=' + c.function.name + "
    "'>\\n' }}{%- for k, v in c.function.arguments | items %}{{ '<parameter=' + k + '>\\n' }}{{ v if v is string else "
    "v | tojson }}{{ '\\n</parameter>\\n' }}{%- endfor %}{{ '</function>\\n</tool_call>' }}{%- endfor %}",
)
PAIRS = _TOLD + _TURNS.replace(
    "CALLS",
    "{%- for c in m.tool_calls %}{{ '\\n<tool_call>' + c.function.name }}{%- for k, v in c.function.arguments | items %}"
    "{{ '\\n<arg_key>' + k + '</arg_key>\\n<arg_value>' }}{{ v if v is string else v | tojson }}{{ '</arg_value>' }}"
    "{%- endfor %}{{ '\\n</tool_call>' }}{%- endfor %}",
)
# A call as Python writes it.
PYTHONIC = _TOLD + _TURNS.replace(
    "CALLS",
    "[{%- for c in m.tool_calls %}{{ ', ' if not loop.first else '' }}{{ c.function.name + '(' }}{%- for k, v in "
    "c.function.arguments | items %}{{ ', ' if not loop.first else '' }}{{ k + '=' }}{{ v | tojson }}{%- endfor %}"
    "{{ ')' }}{%- endfor %}]",
)
# As DeepSeek R1's: calls are written, where the content is none, but nobody tells of tools.
UNTOLD = DEEPSEEK.replace("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}", "").replace(
    "{%- elif m.tool_calls %}", "{%- elif m.content is none %}"
)
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "[TOOL_CALLS]",
    "[INST]",
    "[/INST]",
    "<User>",
    "<Assistant>",
    "<calls>",
    "</calls>",
    "<call>",
    "</call>",
    "<sep>",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": n,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for n in ("weather", "wea", "get-time")
]
SCHEMAS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
ENDS = ("<|im_end|>", "</s>", "<|eot_id|>", "<|eom_id|>")


def tokenizer(
    template: str,
    special: list[str] = SPECIAL,
    added: tuple[str, ...] = ("<tool_call>", "</tool_call>", "<think>", "</think>"),
) -> Tokenizer:
    backend = Backend(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(a, special=False, normalized=False) for a in added])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})


def merge(parts: list[Part]) -> list[Part]:
    """Neighbours of the same kind and call joined."""
    out: list[Part] = []
    for p in parts:
        if out and out[-1].kind == p.kind and out[-1].call == p.call and p.kind != "call":
            out[-1] = replace(out[-1], text=out[-1].text + p.text)
        else:
            out.append(p)
    return out


def dialogue(template: str, **more):
    t = tokenizer(template, **more)
    return learn(t, tuple(t.backend.token_to_id(e) for e in ENDS if e in t.backend.get_vocab()))


STYLES = {
    "chatml": (CHATML, HERMES.opening, False),
    "qwen": (QWEN.replace("THINK", "").replace("SWITCH", ""), '<tool_call>\n{"name": "', True),
    "qwen3": (QWEN3, '<tool_call>\n{"name": "', True),
    "llama": (LLAMA, '{"name": "', True),
    "mistral": (MISTRAL, '[TOOL_CALLS][{"name": "', True),
    "deepseek": (DEEPSEEK, "<calls><call>function<sep>", True),
    "untold": (UNTOLD, "<calls><call>function<sep>", True),
    "coder": (CODER, "<tool_call>\n<function=", True),
    "pairs": (PAIRS, "<tool_call>", True),
    "pythonic": (PYTHONIC, "[", True),
}


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


def parsed(parser, text, r=None, **end):
    """What a parser makes of a text that comes in pieces."""
    r, parts, at = r or random.Random(0), [], 0
    while at < len(text):
        step = r.choice((1, 3, 20))
        parts += parser.feed(text[at : at + step])
        at += step
    return [(p.kind, p.text) for p in merge([*parts, *parser.feed("", True, **end)])]


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


HARMONY = """<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>{%- for m in messages %}{%- if m.role == 'assistant' %}{%- if m.tool_calls %}{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{%- endif %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{%- elif loop.last and not add_generation_prompt %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{%- endif %}{%- elif m.role == 'tool' %}<|start|>functions.f to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
CHANNELS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]


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
