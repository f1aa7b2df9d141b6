"""From messages to parts for a model that writes in channels."""

import pytest

from craton.base import UserError
from craton.engine.converse import AnswerParts, Ask, Talker, prepare
from craton.engine.engine import Engine
from craton.engine.request import Completion, EngineEvent
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.text.dialogue import learn
from tests.text.styles import CHANNELS, HARMONY, SPECIAL, tokenizer

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def talker() -> Talker:
    own = tokenizer(HARMONY + "{{ reasoning_effort }}", special=[*SPECIAL, *CHANNELS])
    end = own.backend.token_to_id("<|return|>")
    config = ModelConfig(own.vocab_size, 32, 32, 1, 2, 1, 16, eos_token_id=end)
    engine = Engine(Decoder(config).requires_grad_(False), own, cache_bytes=1 << 22)
    return Talker("m", engine, own, learn(own, (end,)), {}, False, 1, 32.0)


def parts_of(talker, ask, text):
    prepared = prepare(talker, ask)
    completion = Completion(1, 0, [1], finish_reason="stop")
    deltas = AnswerParts(talker, prepared).feed([EngineEvent(completion, (1,), text, finished=True)])
    return [(p.kind, p.text) for d in deltas for p in d.parts], prepared


def test_marks_of_channels_are_never_content(talker):
    """Also where the prompt has begun the answer: no thinking, or a prefix."""
    again = "<|end|><|start|>assistant<|channel|>final<|message|> again"
    parts, _ = parts_of(talker, Ask({"max_tokens": 9}, messages=HI, thinking=False), f"Hello{again}")
    assert parts == [("content", "Hello"), ("content", " again")]
    parts, _ = parts_of(talker, Ask({"max_tokens": 9}, messages=HI, prefix="He"), "llo<|end|>")
    assert parts == [("content", "llo")]
    parts, _ = parts_of(talker, Ask({"max_tokens": 9}, prompt=[5, 6]), "raw <|end|>")
    assert parts == [("content", "raw <|end|>")]


def test_tools_and_an_answer_that_is_begun(talker):
    parts, prepared = parts_of(talker, Ask({"max_tokens": 9}, messages=HI, prefix="He", tools=TOOLS), "llo")
    assert parts == [("content", "llo")] and not prepared.sampling.grammar
    with pytest.raises(UserError, match="an answer that is begun cannot call"):
        prepare(talker, Ask({}, messages=HI, prefix="He", tools=TOOLS, choice="required"))
    call = "<|channel|>commentary to=functions.f<|message|>{}"
    parts, prepared = parts_of(talker, Ask({"max_tokens": 9}, messages=HI, thinking=False, tools=TOOLS), call)
    assert parts == [("call", "f"), ("arguments", "{}")] and prepared.sampling.grammar


@pytest.mark.parametrize(("budget", "effort"), [(500, "low"), (4096, "medium"), (9000, "high")])
def test_a_budget_of_thinking_is_told_as_an_effort(talker, budget, effort):
    ids = prepare(talker, Ask({"max_tokens": 9}, messages=HI, budget=budget)).ids
    assert talker.tokenizer.decode(ids).endswith(effort)
