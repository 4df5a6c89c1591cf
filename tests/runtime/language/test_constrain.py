"""A constrained answer cannot leave its grammar, says when it was cut, and a hostile grammar is refused when given."""

import json
import re

import numpy as np
import pytest

import shoal
from shoal.runtime.errors import UsageError
from shoal.runtime.language.tools import OPEN, ToolCallParser, call_grammar

pytest.importorskip("llguidance")
LIST = {
    "type": "object", "required": ["value", "next"], "additionalProperties": False,
    "properties": {"value": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"n": {"enum": [7]}},
     "required": ["n"], "additionalProperties": False}}} for name in ("first", "second")
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_bundle):
    """Random weights: whatever is right about its answers, the constraint made so."""
    with shoal.load(tiny_bundle, context=250, slots=2) as model:
        yield model


def answer(model, count=200, stop=(), seed=0, **grammar):
    constraint = model.constrain(**grammar)
    generation = model.generate([5, 6, 7], max_tokens=count, constraint=constraint, temperature=1, seed=seed, stop=stop)
    return generation.finish(), generation.stats


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_keeps_to_its_grammar(model, seed):
    text, stats = answer(model, json_schema=LIST, seed=seed)
    assert stats.finish == "length" or json.loads(text)["value"] in (1, 2)
    assert "\n\n" not in text
    text, stats = answer(model, regex=r"[ab]{3}-[0-9]{2}", seed=seed)
    assert stats.finish == "stop" and re.fullmatch(r"[ab]{3}-[0-9]{2}", text)


@pytest.mark.parametrize("name", [None, "second"])
def test_a_call_that_must_be_made_is_made(model, name):
    text, stats = answer(model, lark=call_grammar(TOOLS, name), count=240)
    assert stats.finish == "stop" and text.startswith(OPEN)
    rest, (call,) = ToolCallParser(["first", "second"]).push(text)
    assert not rest and call.arguments == {"n": 7} and call.name in ([name] if name else ["first", "second"])


def test_an_answer_that_is_cut_says_so(model):
    text, stats = answer(model, count=2, json_schema=LIST)
    assert stats.finish == "length" and stats.generated_tokens == 2
    with pytest.raises(ValueError):
        json.loads(text)
    text, stats = answer(model, regex="x{9}STOP", stop=("ST",))
    assert (text, stats.finish) == ("x" * 9, "stop")


def deep(levels: int) -> dict:
    return {"type": "object", "properties": {"a": deep(levels - 1)}, "required": ["a"]} if levels else {"type": "null"}


@pytest.mark.parametrize(
    "grammar",
    [
        {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        {"json_schema": {"type": "no such type"}},
        {"json_schema": {"$ref": "file:///etc/passwd"}},
        {"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}},
        {"json_schema": "{"},
        {"json_schema": "[]"},
        {"json_schema": "[" * 100_000},
        {"json_schema": {"enum": ["x" * (1 << 20)]}},
        {"json_schema": deep(400)},
        {"regex": "(a"},
        {"regex": ""},
        {"lark": "start: nowhere"},
        {"regex": "a", "lark": "start: /a/"},
        {},
    ],
    ids=str,
)
def test_a_grammar_that_cannot_be_used_is_refused(model, grammar):
    with pytest.raises(UsageError):
        model.constrain(**grammar)


def test_a_reason_is_more_than_its_first_line(model):
    with pytest.raises(UsageError, match="look-around"):
        model.constrain(json_schema={"type": "string", "pattern": "(?=x)"})


def test_a_mask_fits_its_logits_only(model):
    with pytest.raises(UsageError, match="do not|does not fit"):
        model.constrain(regex="a").mask(np.zeros(3, np.float32))
