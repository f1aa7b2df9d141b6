"""Published tokenizer forms against the libraries they come from, and chat templates against transformers."""

import functools
import itertools
import json
import lzma
import shutil
from pathlib import Path

import pytest

from craton.base import UserError
from craton.text.template import ChatTemplate
from craton.text.tokenizer import Tokenizer, train_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
HARD = [
    "",
    " ",
    "  two  spaces ",
    "a\tb\n\n c\r\n",
    "日本語とEnglish",
    "🙂🙃 naïve “quotes” ½ ﬁ",
    "x" * 500,
    "<s>",
    "</s> [INST] hi",
    "\u200b\u00a0\u3000",
    "ÀÉÎõü ſ İ",
    "1234567890 3.14",
    "don't I'll WE'VE",
    "\x00\x01 \ufffd",
    "한국어 العربية हिन्दी ไทย",
    "<0x41> ▁ ▁▁x",
]


@functools.cache
def lines():
    """10,000 real lines, of prose, code and questions."""
    found = []
    for path in sorted(DATA.rglob("*.xz")):
        if path.name.endswith((".jsonl.xz", ".txt.xz", ".tsv.xz")):
            with lzma.open(path, "rt", encoding="utf-8") as f:
                found += [line.rstrip("\n")[:4000] for line in itertools.islice(f, 250)]
    return (
        HARD + [line for line in found if not any(s in line for s in ("<s>", "</s>", "[INST]", "<unk>", "<|"))][:10_000]
    )


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="shared data not there")
common = pytest.importorskip("mistral_common", exc_type=ImportError)
MISTRAL = Path(common.__file__).parent / "data"


def sentencepiece_case(tmp_path, source, name="tokenizer.model"):
    import sentencepiece

    shutil.copy(source, tmp_path / name)
    return Tokenizer.open(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(source))


@needs_data
@pytest.mark.parametrize("name", ["llama2", "t5", "v1", "v2", "v3", "v7"])
def test_sentencepiece(name, tmp_path):
    source = {
        "llama2": DATA / "tokenizers/llama2/tokenizer.model",
        "t5": DATA / "tokenizers/t5/spiece.model",
        "v1": MISTRAL / "tokenizer.model.v1",
        "v2": MISTRAL / "mistral_instruct_tokenizer_240216.model.v2",
        "v3": MISTRAL / "mistral_instruct_tokenizer_240323.model.v3",
        "v7": MISTRAL / "mistral_instruct_tokenizer_241114.model.v7",
    }[name]
    ours, theirs = sentencepiece_case(tmp_path, source)
    special = [
        theirs.id_to_piece(i) for i in range(theirs.vocab_size()) if theirs.is_control(i) or theirs.is_unknown(i)
    ]
    seen = 0
    for line in lines():
        if any(s in line for s in special):  # special tokens are recognised here and ordinary text there
            continue
        want = theirs.encode(line)
        got = ours.backend.encode(line, add_special_tokens=False).ids
        assert got == want, line
        if theirs.unk_id() not in want:  # shown as ' ⁇ ' there
            assert ours.decode(got) == theirs.decode(want), line
        seen += 1
    assert (
        seen > 9_900
        and ours.vocab_size == theirs.vocab_size()
        and ours.bos_id == (theirs.bos_id() if theirs.bos_id() >= 0 else None)
    )


@needs_data
@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken(name, tmp_path):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    shutil.copy(MISTRAL / name, tmp_path / "tekken.json")
    ours, theirs = Tokenizer.open(tmp_path), Tekkenizer.from_file(MISTRAL / name)
    for line in lines():
        if line in HARD and "[INST]" in line or line == "<s>":
            continue
        want = theirs.encode(line, bos=False, eos=False)
        assert ours.backend.encode(line, add_special_tokens=False).ids == want, line
        assert ours.decode(want) == line
    assert ours.encode("hi")[0] == theirs.bos_id and ours.eos_id == theirs.eos_id and ours.vocab_size == theirs.n_words


@needs_data
def test_gpt2(tmp_path):
    import tiktoken

    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(DATA / "tokenizers/gpt2" / name, tmp_path)
    ours = Tokenizer.open(tmp_path)
    table = {c: b for b, c in __import__("craton.text.formats").text.formats.byte_to_unicode().items()}
    ranks = {
        bytes(table[c] for c in t): i
        for t, i in json.loads((tmp_path / "encoder.json").read_text()).items()
        if t != "<|endoftext|>"
    }
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    for line in lines():
        want = theirs.encode_ordinary(line)
        assert ours.encode(line) == want and ours.decode(want) == line
    assert ours.eos_id == 50256


@needs_data
def test_tokenizer_json(tmp_path):
    from transformers import AutoTokenizer

    folder = DATA / "tokenizers/torchtitan_test"
    ours, theirs = Tokenizer.open(folder), AutoTokenizer.from_pretrained(folder)
    for line in lines():
        assert ours.encode(line) == theirs.encode(line)
        assert ours.decode(ours.encode(line)) == theirs.decode(theirs.encode(line), skip_special_tokens=True)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tekken.json"])
def test_damaged_tokenizers(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        Tokenizer.open(tmp_path)


# In the style of the published ones: each with what makes it hard (tools, trimming, namespaces, dates, refusals).
TEMPLATES = {
    "llama3": """{{- bos_token }}
{%- if tools is not none %}{{- '<|start_header_id|>system<|end_header_id|>\n\nTools:\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    "qwen": """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
    {%- if m.role == 'assistant' and '</think>' in m.content %}
        {%- set content = m.content.split('</think>')[-1].lstrip('\n') %}
    {%- else %}{% set content = m.content %}{% endif %}
<|im_start|>{{ m.role }}{% if loop.index0 == ns.last %} (last){% endif %}

{{ content }}<|im_end|>
{% if m.tool_calls is defined %}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endif %}
{% endfor %}
{% if tools %}{% for t in tools %}{{ t.function.name }}: {{ t['function']['description'] }}{% endfor %}{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}""",
    "mistral": """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{% generation %}{{ message['content'] + eos_token}}{% endgeneration %}{% endif %}{% if loop.last %}{% break %}{% endif %}{% endfor %}""",
    "dated": """{%- set d = strftime_now("%Y") %}{{ d }} {% for k, v in messages[0].items() %}{{ k }}={{ v }} {% endfor %}{{ messages | length }} {{ {"a": "é<&>"} | tojson }} {{ unk_token }}""",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather <now> in a 'city'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
MESSAGES = [
    {"role": "user", "content": "  Hi é & <b>\n"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nHello",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "user", "content": "And?"},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_templates_render_as_in_transformers(name, tools, prompt, model_folder, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(model_folder, tmp_path / "m", ignore=shutil.ignore_patterns("training", "*.safetensors"))
    (tmp_path / "m" / "chat_template.jinja").write_text(TEMPLATES[name])
    ours, theirs = Tokenizer.open(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    want = theirs.apply_chat_template(
        MESSAGES, tools=tools, add_generation_prompt=prompt, tokenize=False, enable_thinking=False
    )
    assert ours.render_chat(MESSAGES, tools, prompt, enable_thinking=False) == want
    ids = theirs.apply_chat_template(
        MESSAGES, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=False, enable_thinking=False
    )
    assert ours.encode_chat(MESSAGES, tools, prompt, enable_thinking=False) == ids


def test_several_templates(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m", ignore=shutil.ignore_patterns("training", "*.safetensors"))
    path = tmp_path / "m" / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {
                "chat_template": [
                    {"name": "tool_use", "template": "T"},
                    {"name": "default", "template": "D{{ messages[0].content }}"},
                ]
            }
        )
    )
    assert Tokenizer.open(tmp_path / "m").render_chat([{"role": "user", "content": "x"}]) == "Dx"


HOSTILE = {
    "loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "multiply": "{{ 'a' * 10**10 }}",
    "double": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ "
    "ns.s }}",
    "list": "{{ ([0] * 10**9) | length }}",
    "center": "{{ 'a' | center(10**10) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "power": "{{ 9**(9**9) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{% import 'os' as os %}{{ os.system('touch pwned') }}",
    "syntax": "{% for %}",
    "undefined": "{{ nothing.at.all }}",
    "long": "{% for i in range(100000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' * 100 "
    "}}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name, monkeypatch, tmp_path):
    from craton.text import template

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(template, "SECONDS", 2.0)
    chat = ChatTemplate(HOSTILE[name], {})
    with pytest.raises(UserError, match="longer than 2 s" if name == "loop" else "chat_template"):
        chat.render([{"role": "user", "content": "x"}])
    assert not (tmp_path / "pwned").exists()
    chat.source = "{{ messages[0].content }}"  # and the next one is served
    assert chat.render([{"role": "user", "content": "x"}]) == "x"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ self._TemplateReference__context }}",
        "{{ cycler.__init__ }}",
    ],
)
def test_internals_are_out_of_reach(template):
    try:
        text = ChatTemplate(template, {}).render([])
    except UserError:
        return
    assert text == ""


@pytest.mark.parametrize("legacy", [False, None])
def test_tokens_added_beside_a_sentencepiece_model(legacy, tmp_path):
    """Markers that a finetune added stay whole, with the ids that its files give, as transformers reads them."""
    import io

    import sentencepiece
    from transformers import AutoTokenizer

    model, lines = io.BytesIO(), [f"the user and the assistant say {n} words, and then some" for n in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tool = 342 if legacy is False else 345  # transformers would move it up
    added = {"<|im_start|>": 340, "<|im_end|>": 341, "<tool>": tool}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    decoder = {str(i): {"content": t, "special": t != "<tool>", "normalized": False} for t, i in added.items()}
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | ({} if legacy is None else {"legacy": legacy})))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    ours = Tokenizer.open(tmp_path)
    assert ours.eos_id == 341 and ours.backend.token_to_id("<tool>") == tool and ours.vocab_size == tool + 1
    assert 341 in ours.special_ids and tool not in ours.special_ids
    text = "<|im_start|>user\nthe words<|im_end|>\n<tool> and"
    ids = ours.encode(text)
    assert [i for i in ids if i >= 340] == [340, 341, tool]
    if legacy is False:
        theirs = AutoTokenizer.from_pretrained(str(tmp_path))
        for t in (text, " <tool>x", "the <|im_end|> <|im_end|>user"):
            assert [i for i in ours.encode(t) if i != 1] == [i for i in theirs(t).input_ids if i != 1]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|other|>": 5}))
    with pytest.raises(UserError, match="'<|other|>' has the id 5"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("place", ["list", "files"])
def test_templates_by_name(place, tmp_path):
    """The one for tools where there are tools, as transformers has it."""
    from transformers import AutoTokenizer

    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    named = {"default": plain, "tool_use": "{{ tools | length }} tools " + plain, "rag": "no"}
    tokenizer = train_tokenizer(["some text"] * 20, 300)
    tokenizer.config["chat_template"] = None
    tokenizer.save(tmp_path)
    if place == "list":
        config = tokenizer.config | {"chat_template": [{"name": n, "template": t} for n, t in named.items()]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        (tmp_path / "chat_template.jinja").write_text(named["default"])
        (tmp_path / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(named[name])
    ours, theirs = Tokenizer.open(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    talk = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f", "description": "-", "parameters": {"type": "object"}}}
    for tools in (None, [tool]):
        wanted = theirs.apply_chat_template(talk, tools=tools, tokenize=False)
        assert ours.render_chat(talk, tools, False) == wanted
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    assert Tokenizer.open(tmp_path / "again").render_chat(talk, [tool]) == "1 tools <user>hi"
