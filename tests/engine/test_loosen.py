"""Tools from programs that write whatever JSON Schema knows."""

import json

import jsonschema
import pytest
from llguidance import LLMatcher

from craton.base import UserError
from craton.engine.engine import Engine
from craton.engine.loosen import loosened
from craton.engine.structured import Grammars
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.text.tokenizer import Tokenizer, train_tokenizer


def problem(schema):
    try:
        return LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    except ValueError as error:
        return str(error)


TEXT = {"type": "string"}
CASES = [
    # schema of one property "x", what is left out of it
    ({"type": "object", "propertyNames": TEXT, "additionalProperties": TEXT}, [".propertyNames"]),
    ({"type": "array", "items": TEXT, "uniqueItems": True, "minItems": 1}, [".uniqueItems"]),
    ({"type": "array", "items": {**TEXT, "format": "password"}, "contains": TEXT}, [".items.format", ".contains"]),
    ({"type": "string", "pattern": "(?<!a)b", "minLength": 2}, [".pattern"]),
    ({"not": {"type": "null"}, "type": ["string", "integer"]}, [".not"]),
    ({"type": "object", "if": {}, "then": {"required": ["a"]}, "properties": {"a": TEXT}}, [".if", ".then"]),
    ({"oneOf": [TEXT, {"type": "string", "maxLength": 3}]}, [".oneOf"]),
    ({"type": "number", "minimum": 5, "maximum": 2}, [".minimum"]),
    ({"$ref": "https://example.org/elsewhere"}, [".$ref"]),
    ({"type": "strnig"}, [".type"]),
    ({"type": "object", "properties": {"not": TEXT, "uniqueItems": TEXT}}, []),
]


@pytest.mark.parametrize(("own", "left_out"), CASES)
def test_only_what_cannot_be_enforced_is_left_out(own, left_out):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1}, "x": own},
        "required": ["n", "x"],
        "additionalProperties": False,
    }
    found, dropped = loosened(schema, problem)
    assert dropped == [f"properties.x{path}" for path in left_out]
    assert not problem(found)
    assert {**found, "properties": None} == {**schema, "properties": None}
    assert found["properties"]["n"] == schema["properties"]["n"]
    kept = {k: v for k, v in own.items() if f".{k}" not in left_out and k not in ("items", "properties")}
    assert kept.items() <= found["properties"]["x"].items()


def test_definitions_are_loosened_where_they_stand():
    schema = {
        "type": "object",
        "$defs": {"key": {"type": "string", "format": "binary", "maxLength": 4}},
        "properties": {"a": {"$ref": "#/$defs/key"}, "b": {"type": "array", "items": {"$ref": "#/$defs/key"}}},
    }
    found, dropped = loosened(schema, problem)
    assert dropped == ["$defs.key.format"] and found["properties"] == schema["properties"]
    jsonschema.Draft202012Validator(found).validate({"a": "abcd", "b": ["x"]})


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer: Tokenizer = train_tokenizer(['some text to learn from, {} "" 0123456789'] * 20, 300)
    config = ModelConfig(tokenizer.vocab_size, 32, 32, 1, 2, 1, 16, eos_token_id=tokenizer.eos_id)
    return Engine(Decoder(config).requires_grad_(False), tokenizer).grammars()


def test_arguments_are_an_object(grammars):
    for schema in ({}, {"properties": {"a": TEXT}}, {"type": ["object", "null"]}, {"$schema": "x", "$id": "y"}):
        assert grammars.tool_schema("f", schema, True)["type"] == "object"
    for kind in ("string", "array", ["null", "string"]):
        with pytest.raises(UserError, match="'f'.*a tool takes an object"):
            grammars.tool_schema("f", {"type": kind}, False)


def test_strict_tools_and_answers_name_what_is_in_the_way(grammars):
    from craton.engine.request import Sampling

    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(UserError, match=r"properties\.a\.uniqueItems of 'f'"):
        grammars.tool_schema("f", schema, True)
    with pytest.raises(UserError, match=r"at properties\.a\.uniqueItems"):
        grammars.matcher(Sampling(json_schema=json.dumps(schema)))
