"""Data files of every shape that is claimed, and thirty that are wrong: each names file, row and field."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.adapt.data import kind_of, read_samples
from craton.adapt.rows import Packed, Renderer, Tokens, pack, packed_batch
from craton.base import UserError
from craton.model.nll import IGNORE
from craton.text import dialogue
from craton.text.spans import conversation
from craton.text.templates import CHATML, PLAIN, give_template
from craton.text.tokenizer import train_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data" / "instruct"
U, A = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwAD"
PNG += "hgGAWjR9awAAAABJRU5ErkJggg=="
SHOWN = {"type": "image_url", "image_url": {"url": PNG}}
ELSEWHERE = {"type": "image_url", "image_url": {"url": "http://x"}}
HUMAN = {"from": "human", "value": "q"}
FUNCTION = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
GPT = [{"from": "gpt", "value": text} for text in "ab"]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def written(tmp_path, rows, name="d.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "row, kind, chats",
    [
        ({"messages": [U, A]}, "answers", True),
        ({"messages": [U, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "answers", True),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}, "answers", True),
        ({"conversations": [HUMAN, FUNCTION]}, "answers", True),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "answers", True),
        ({"instruction": "Add.", "input": "", "output": "3", "history": [["q", "a"]], "system": "s"}, "answers", True),
        ({"prompt": "1+1=", "completion": "2"}, "answers", False),
        ({"prompt": "1+1=", "response": "2"}, "answers", False),
        ({"prompt": [U], "completion": [A]}, "answers", True),
        ({"text": "Once."}, "answers", False),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs", False),
        ({"prompt": [U], "chosen": [A], "rejected": [{"role": "assistant", "content": "No."}]}, "pairs", True),
        ({"chosen": [U, A], "rejected": [U, {"role": "assistant", "content": "No."}]}, "pairs", True),
        ({"conversations": [HUMAN], "chosen": GPT[0], "rejected": GPT[1]}, "pairs", True),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "pairs", False),
        ({"prompt": "q", "completion": "a", "label": True}, "labelled answers", False),
        ({"messages": [U, A], "label": "false"}, "labelled answers", True),
        ({"messages": [U, A], "kto_tag": False}, "labelled answers", True),
        ({"prompt": [U]}, "prompts", True),
    ],
)  # fmt: skip
def test_shapes(tmp_path, row, kind, chats):
    """Told by their fields."""
    (sample,) = read_samples([written(tmp_path, [row])])
    assert kind_of(sample) == kind and sample.chats is chats


def test_tools_and_pictures_survive(tmp_path):
    """As parts, not as text."""
    user = {"role": "user", "content": [{"type": "text", "text": "See"}, SHOWN]}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    calls = {"role": "assistant", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "3"}
    (sample,) = read_samples([written(tmp_path, [{"messages": [user, calls, result, A], "tools": tools}])])
    assert sample.answer[0]["content"][1] == {"type": "image", "url": PNG}
    assert sample.answer[1]["tool_calls"][0]["function"]["name"] == "add" and sample.tools == tools


@pytest.mark.parametrize("name", sorted(p.name for p in DATA.glob("*.xz")) if DATA.exists() else [])
def test_published_files(name):
    """Those that others publish open as they are."""
    if "self_instruct" in name:
        pytest.skip("seed tasks with instances, a shape of its own")
    samples = list(read_samples([str(DATA / name)]))
    assert len(samples) > 20


WRONG = [
    ([{"messages": [{"role": "bot", "content": "x"}]}], r"d.jsonl:1: messages\[0\].role is \"bot\""),
    ([{"messages": [{"content": "x"}]}], r"messages\[0\].role is null"),
    ([{"messages": [U, A]}, {"messages": [U, {"role": "assistant"}]}], r"d.jsonl:2: messages\[1\].content is missing"),
    ([{"messages": [U, {"role": "assistant", "content": 3}]}], r"messages\[1\].content is 3"),
    ([{"messages": "hello"}], r"d.jsonl:1: messages is \"hello\""),
    ([{"messages": []}], r"messages is \[\]"),
    ([{"messages": [U]}], r"messages has no message of the assistant"),
    ([{"messages": [U, "x"]}], r"messages\[1\] is \"x\""),
    ([{"messages": [U, {"role": "assistant", "tool_calls": [{"x": 1}]}]}], r"messages\[1\].tool_calls\[0\]"),
    ([{"messages": [{"role": "user", "content": [{"type": "text"}]}, A]}], r"messages\[0\].content has a part"),
    ([{"messages": [{"role": "user", "content": [ELSEWHERE]}, A]}], r"d.jsonl:1: messages\[0\].image"),
    ([{"messages": [U, A], "tools": "{"}], r"d.jsonl:1: tools is text that is no JSON"),
    ([{"messages": [U, A], "tools": 3}], r"tools is 3"),
    ([{"conversations": [{"from": "robot", "value": "x"}]}], r"conversations\[0\].from is \"robot\""),
    ([{"conversations": [{"from": "human", "value": 1}]}], r"conversations\[0\].value is 1"),
    ([{"conversations": [{"from": "function_call", "value": "{"}]}], r"function_call that is no JSON"),
    ([{"instruction": 3, "output": "x"}], r"instruction is 3"),
    ([{"instruction": "x", "output": None}], r"output is null"),
    ([{"instruction": "x", "output": "y", "history": [["a"]]}], r"history\[0\]"),
    ([{"prompt": "x", "completion": None}], r"completion is null"),
    ([{"prompt": 1, "completion": "x"}], r"prompt is 1"),
    ([{"text": ""}], r"d.jsonl:1: text is empty"),
    ([{"text": ["x"]}], r"text is \[\"x\"\]"),
    ([{"prompt": "q", "chosen": "a", "rejected": "a"}], r"rejected is the same as chosen"),
    ([{"prompt": "q", "chosen": "a", "rejected": ""}], r"rejected is empty"),
    ([{"prompt": "q", "chosen": "a", "rejected": [A]}], r"rejected is of another shape"),
    ([{"prompt": "q", "chosen": None, "rejected": "a"}], r"chosen is null"),
    ([{"prompt": "q", "completion": "a", "label": "maybe"}], r"label is \"maybe\""),
    ([{"messages": [A, U], "label": True}], r"messages must end with the assistant"),
    ([{"question": "x"}], r"in no shape that is known \(it has question\)"),
    ([{"text": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}], r"d.jsonl:2: is pairs, but .*1 is answers"),
]  # fmt: skip


@pytest.mark.parametrize("rows, problem", WRONG)
def test_wrong_rows(tmp_path, rows, problem):
    """File, row and field are named."""
    with pytest.raises(UserError, match=problem):
        list(read_samples([written(tmp_path, rows)]))


@pytest.mark.parametrize(
    "content, problem",
    [
        (b'{"text": "a"}\n{"text": \n', r"d.jsonl: not valid JSON .*line [23]"),
        (b"[1, 2]\n", r"must be an object"),
        (b"", r"holds no rows"),
        (b"\xff\xfe\x00{", r"d.jsonl"),
    ],
)
def test_wrong_files(tmp_path, content, problem):
    """Not JSON, not objects, nothing, not text."""
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        list(read_samples([str(tmp_path / "d.jsonl")]))


# ---- templates and masks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the quick brown fox says hello to user and assistant. " * 40], 400)


def fresh(tokenizer, template):
    from craton.text.tokenizer import Tokenizer

    return Tokenizer(tokenizer.backend, {**tokenizer.config, "chat_template": template})


def learned_text(tokenizer, made):
    ids = [i for i, on in zip(made.ids, made.learned, strict=True) if on]
    return tokenizer.backend.decode(ids, skip_special_tokens=False)


TALK = [U, A, {"role": "user", "content": "More?"}, {"role": "assistant", "content": "Enough, user."}]


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_only_answers_are_learned(tokenizer, template):
    """With the ends of their turns; by prefixes of the rendered text."""
    own = fresh(tokenizer, template)
    made = conversation(dialogue.learn(own, (own.eos_id,)), TALK, [])
    end = "<|im_end|>" if template == CHATML else "<|endoftext|>"
    assert learned_text(own, made) == f"Hello.{end}Enough, user.{end}"
    assert made.ids == own.encode_rendered(own.render_chat(TALK, None, False))


def test_masks_are_those_of_transformers(tokenizer, tmp_path):
    """Where the template has generation blocks."""
    transformers = pytest.importorskip("transformers")
    template = CHATML.replace(
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\\n' }}",
    )
    assert "generation" in template
    own = fresh(tokenizer, template)
    own.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = theirs.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    made = conversation(dialogue.learn(own, (own.eos_id,)), TALK, [])
    assert made.ids == found["input_ids"]
    assert [int(x) for x in made.learned] == found["assistant_masks"]


def test_tool_output_is_not_learned(tokenizer):
    """Calls are, their results are not."""
    own = fresh(tokenizer, CHATML)
    talk = [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "three"}, A]
    text = learned_text(own, conversation(dialogue.learn(own, (own.eos_id,)), talk, []))
    assert '"name": "add"' in text and "three" not in text and text.endswith("Hello.<|im_end|>")


def test_a_template_is_given_without_changing_ordinary_text(tokenizer):
    """Of tokens that are there."""
    own = fresh(tokenizer, None)
    before = own.encode("hello fox")
    end = give_template(own)
    assert own.backend.id_to_token(end) == "<|im_end|>" and own.encode("hello fox") == before
    assert own.chat_template is not None


def test_rows_that_cannot_be_learned(tokenizer, tmp_path):
    """Too long, and empty: by row and field."""
    own = fresh(tokenizer, CHATML)
    renderer = Renderer(own, dialogue.learn(own, (own.eos_id,)), own.eos_id, 24)
    long = {"messages": [U, {"role": "assistant", "content": "hello " * 60}]}
    (sample,) = read_samples([written(tmp_path, [long])])
    with pytest.raises(UserError, match=r"d.jsonl:1: messages has \d+ tokens, the model's context is 24"):
        renderer.answer(sample, sample.answer, sample.form)


# ---- packing ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_packing_loses_nothing(lengths):
    """Every text is in one row, whole, and no row is longer than there is room."""
    rows = pack(lengths, list(range(len(lengths))), 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)


def test_an_epoch_holds_each_text_once():
    """And the next one in another order; a batch is a function of its number."""
    texts = [Tokens(np.arange(n + 1, dtype=np.int32), np.ones(n + 1, bool)) for n in [3, 9, 30, 12, 7, 40, 5, 22]]
    source = Packed(texts, 40, 2, 0)
    rows = len(source.epoch(0))
    seen = sorted(i for r in range(rows) for i in source.row(r))
    assert seen == list(range(8))
    assert sorted(i for r in range(rows, rows + len(source.epoch(1))) for i in source.row(r)) == list(range(8))
    again = Packed(texts, 40, 2, 0)
    assert (again.batch(3, 0, 1, None).ids == source.batch(3, 0, 1, None).ids).all()


def test_packed_texts_do_not_see_each_other(model_folder):
    """The losses of texts side by side are those of each alone."""
    import craton

    network = craton.load(str(model_folder)).network.float()
    r = np.random.default_rng(0)
    texts = []
    for n in (5, 17, 9, 30):
        ids = r.integers(0, network.config.vocab_size, n).astype(np.int32)
        texts.append(Tokens(ids, np.arange(n) > 2))
    packed = packed_batch([texts], 80)
    assert (packed.target == IGNORE).sum() == 80 - sum(int(t.learned[1:].sum()) for t in texts)
    together = network.token_nll(packed.ids, packed.target, packed.document_start).sum()
    alone = 0.0
    for t in texts:
        one = packed_batch([[t]], len(t) - 1)
        alone += network.token_nll(one.ids, one.target, one.document_start).sum()
    assert abs(float(together - alone)) < 1e-3
