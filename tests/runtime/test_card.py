"""A card survives its JSON, and JSON from outside is either a card or a BundleError that names the field."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.card import Card, Rope
from shoal.runtime.errors import BundleError

CARD = Card(
    name="m", model_type="llama", task="generate", blocks=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128,
    vocab=100, max_context=256, norm_eps=1e-5, activation="silu", ropes=(Rope((1.0, 0.5), 1.25),), rope_of=(0, 0),
    windows=(0, 32), eos=(2, 5),
)  # fmt: skip


def test_round_trip():
    assert Card.from_json(CARD.to_json()) == CARD


def test_a_part():
    part = dataclasses.replace(CARD, first_block=1, last_block=2, whole="ab")
    assert Card.from_json(part.to_json()) == part
    assert (CARD.span, part.span) == (range(2), range(1, 2)) and part.is_part and part.has_head and not CARD.is_part
    for first, last in ((-1, 1), (1, 1), (2, 0), (0, 3), (2, 1)):
        with pytest.raises(BundleError, match="last_block"):
            Card.from_json(dataclasses.replace(CARD, first_block=first, last_block=last).to_json())


def test_a_newer_cards_unknown_field_is_ignored():
    raw = json.loads(CARD.to_json()) | {"from_the_future": {"x": 1}}
    assert Card.from_json(json.dumps(raw).encode()) == CARD


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from([field.name for field in dataclasses.fields(Card)]), value=JSON)
def test_any_value_in_any_field_is_a_card_or_an_error_that_names_it(name, value):
    raw = json.loads(CARD.to_json()) | {name: value}
    try:
        Card.from_json(json.dumps(raw).encode())
    except BundleError as error:
        assert "Field" in error.why


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"[" * 100000, b"\xff", b"null"])
def test_what_is_no_card(data):
    with pytest.raises(BundleError):
        Card.from_json(data)
