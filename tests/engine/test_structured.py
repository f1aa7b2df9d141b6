"""Structured output with a model that means nothing: everything parses, validates, ends, or is refused beforehand."""

import json
import random
import re

import jsonschema
import pytest
import torch

import craton
from craton.base import UserError
from craton.engine.engine import Engine
from craton.engine.request import Sampling
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder


@pytest.fixture(scope="module")
def engine(model_folder):
    """Random weights with a trained tokenizer."""
    tokenizer = craton.load(str(model_folder)).tokenizer
    torch.manual_seed(0)
    config = ModelConfig(
        tokenizer.vocab_size, 64, 96, 1, 4, 2, 16, max_position_embeddings=2048, eos_token_id=tokenizer.eos_id
    )
    network = Decoder(config)
    for p in network.parameters():
        p.data.copy_(torch.randn_like(p) * 0.1 if p.ndim > 1 else torch.ones_like(p))
    return Engine(network.requires_grad_(False), tokenizer)


def random_schema(r, depth=0):
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"] + ["object", "array", "anyOf"] * (
        depth < 3
    )
    kind = r.choice(kinds)
    if kind == "object":
        names = r.sample(["name", "age", "äöü", "a b", 'q"uote', "tags", "x", "y1", "zip-code"], r.randrange(0, 5))
        schema = {
            "type": "object",
            "properties": {n: random_schema(r, depth + 1) for n in names},
            "additionalProperties": False,
        }
        if names and r.random() < 0.7:
            schema["required"] = r.sample(names, r.randrange(0, len(names) + 1))
        return schema
    if kind == "array":
        low = r.randrange(0, 3)
        return {
            "type": "array",
            "items": random_schema(r, depth + 1),
            **r.choice(({}, {"minItems": low}, {"minItems": low, "maxItems": low + r.randrange(0, 4)})),
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(r, depth + 1) for _ in range(r.randrange(1, 4))]}
    if kind == "enum":
        return {"enum": r.sample(["red", "grün", 3, -1.5, None, True, "a\nb", [1], {"k": 2}], r.randrange(1, 4))}
    if kind == "const":
        return {"const": r.choice(["x", 7, None, [1, 2]])}
    if kind == "string":
        return {
            "type": "string",
            **r.choice(
                (
                    {},
                    {"maxLength": r.randrange(0, 20)},
                    {"minLength": r.randrange(0, 5)},
                    {"pattern": "^[a-z]{2,5}-[0-9]+$"},
                    {"format": "date"},
                    {"format": "uuid"},
                )
            ),
        }
    if kind in ("integer", "number"):
        low = r.randrange(-50, 50)
        return {
            "type": kind,
            **r.choice(
                ({}, {"minimum": low}, {"minimum": low, "maximum": low + r.randrange(0, 99)}, {"exclusiveMinimum": low})
            ),
        }
    return {"type": kind}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_schemas(engine, temperature):
    r = random.Random(int(temperature))
    schemas = [random_schema(r) for _ in range(250)]
    asked = [Sampling(300, temperature, seed=i, json_schema=json.dumps(s)) for i, s in enumerate(schemas)]
    prompts = [[r.randrange(20, 300) for _ in range(r.randrange(1, 9))] for _ in schemas]
    for schema, (answer,) in zip(schemas, engine.generate(prompts, asked), strict=True):
        value = json.loads(answer.text)
        jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
        assert answer.finish_reason == "stop" or not temperature  # the likeliest tokens may go round until the limit
    assert engine.scheduler.pool.free == engine.scheduler.pool.total


def test_regex_choice_and_grammar(engine):
    for i in range(30):
        s = dict(max_tokens=100, temperature=1.0, seed=i)
        assert re.fullmatch(
            r"[A-F]{3,6}(-[0-9]{2})*",
            engine.generate([[50, 60]], Sampling(**s, regex=r"[A-F]{3,6}(-[0-9]{2})*"))[0][0].text,
        )
        assert engine.generate([[50, 60]], Sampling(**s, choice=("yes", "no", 'it "depends"')))[0][0].text in (
            "yes",
            "no",
            'it "depends"',
        )
        text = engine.generate([[50, 60]], Sampling(**s, grammar='start: "(" start ")" | "x"'))[0][0].text
        assert re.fullmatch(r"\(*x\)*", text) and text.count("(") == text.count(")")


def _field(**schema):
    return {"json_schema": json.dumps({"type": "object", "properties": {"x": schema}, "required": ["x"]})}


# Whatever ends these most can come again without end; a closer that only looks for brackets and quotes goes round.
ENDLESS = {
    "count of things": ({"regex": "[0-9]+ apples"}, "[0-9]+ apples"),
    "suffix": ({"regex": r".+\.py"}, r".+\.py"),
    "two literals": ({"regex": r"(?s:.*)alpha(?s:.*)omega!"}, r"(?s:.*)alpha(?s:.*)omega!"),
    "version": ({"regex": r"v[0-9]+\.[0-9]+(-(rc|beta)[0-9]+)?;"}, r"v[0-9]+\.[0-9]+(-(rc|beta)[0-9]+)?;"),
    "email": (_field(type="string", format="email"), r'\{"x":"[^@]+@.+"\}'),
    "uri": (_field(type="string", format="uri"), r'\{"x":"[a-zA-Z][^:]*:.*"\}'),
    "repository": (_field(type="string", pattern="^[^/]+/[^/]+$"), r'\{"x":"[^/]+/[^/]+"\}'),
    "file": (_field(type="string", pattern=r"^.*\.toml$"), r'\{"x":".*\.toml"\}'),
    "grammar": ({"grammar": "start: A+ B\nA: /[a-z]+@[a-z]+;/\nB: /[^!]+!/"}, r"([a-z]+@[a-z]+;)+[^!]+!"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_could_go_on_for_ever_is_closed_late_and_whole(engine, name):
    options, pattern = ENDLESS[name]
    matcher, r = engine.matcher(Sampling(48, **options)), random.Random(3)
    for most in (48, 24):
        trial, ids = matcher.copy(), []
        for left in range(most, 0, -1):
            allowed = trial.mask(torch.zeros(engine.config.vocab_size), left) == 0
            assert trial.closing is None or left < 30, "closed long before it had to be"
            choice = r.choice(allowed.nonzero().flatten().tolist())
            token, complete = trial.take(choice, left - 1)
            ids.append(token)
            if complete:
                break
        assert complete and re.fullmatch(pattern, engine.tokenizer.decode(ids)), engine.tokenizer.decode(ids)


def test_an_end_that_is_not_found_never_starts_closing(engine):
    """A way out that no search can find: the answer stays the model's, and is cut."""
    word = "qzjxk" * 9
    matcher = engine.matcher(Sampling(16, regex=rf"[a-z]+{word}[0-9]{{40}}x"))
    for left in range(16, 0, -1):
        allowed = matcher.mask(torch.zeros(engine.config.vocab_size), left) == 0
        assert allowed.sum() > 1
        token, complete = matcher.take(int(allowed.nonzero()[0]), left - 1)
        assert not complete and token == int(allowed.nonzero()[0])


def test_neighbours_are_free(engine):
    """A request with a schema beside one without: neither changes the other."""
    free, bound = (
        Sampling(30, 0.0, ignore_eos=True),
        Sampling(
            60,
            0.0,
            json_schema='{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}',
        ),
    )
    alone = [engine.generate([[40, 41]], s)[0][0].token_ids for s in (free, bound)]
    both = [a[0].token_ids for a in engine.generate([[40, 41], [40, 41]], [free, bound])]
    assert both == alone and json.loads(engine.tokenizer.decode(both[1]))["a"] is not None
    lookup = Engine(engine.runner.source, engine.tokenizer, speculate="lookup")
    assert [a[0].token_ids for a in lookup.generate([[40, 41], [40, 41]], [free, bound])] == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[]"}, "json_schema"),
        ({"json_schema": '{"type": "integer", "minimum": 5, "maximum": 4}'}, "json_schema"),
        ({"json_schema": '{"enum": []}'}, "json_schema"),
        ({"json_schema": "false"}, "json_schema"),
        ({"json_schema": '{"type": "strung"}'}, "json_schema"),
        (
            {
                "json_schema": '{"type": "array", "uniqueItems": true, "items": {"type": "integer"}, "contains": {"type": "string"}}'
            },
            "json_schema",
        ),
        ({"json_schema": '{"a": "' + "x" * 300_000 + '"}'}, "json_schema has"),
        ({"json_schema": '{"$ref": "https://example.com/schema.json"}'}, "json_schema"),
        ({"json_schema": "[" * 100_000}, "json_schema"),
        ({"regex": "("}, "regex"),
        ({"grammar": "start: nothing"}, "grammar"),
    ],
)
def test_what_cannot_be_met_is_refused(engine, options, message):
    with pytest.raises(UserError, match=message):
        engine.add([5], Sampling(**options))
    assert not engine.busy


def test_a_huge_regex_ends_its_own_answer_only(engine):
    huge, plain = Sampling(5, 0.0, regex="((a{1000}){1000}b?){1000}"), Sampling(5, 0.0, ignore_eos=True)
    answers = engine.generate([[5], [5]], [huge, plain])
    assert answers[1][0].finish_reason == "length" and answers[0][0].finish_reason in ("length", "error")
    assert engine.scheduler.pool.free == engine.scheduler.pool.total
