"""The plan is arithmetic: it fits what it is given, says so before anything is loaded, and refuses with a way out."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.budget import MIB, Sizes, parse_size, plan
from shoal.runtime.card import Card, Rope
from shoal.runtime.errors import BudgetError, UsageError

CARD = Card(
    name="m", model_type="llama", task="generate", blocks=24, hidden=896, heads=14, kv_heads=2, head_dim=64, ffn=4864,
    vocab=151936, max_context=32768, norm_eps=1e-6, activation="silu", ropes=(Rope((1.0,) * 32),), rope_of=(0,) * 24,
    windows=(0,) * 24,
)  # fmt: skip
SIZES = Sizes(weights=2 * MIB, repacked=400 * MIB, tokenizer=8 * MIB, session=7 * MIB)


@settings(max_examples=200, deadline=None)
@given(memory=st.integers(1, 4 << 30), slots=st.integers(1, 8), kv=st.sampled_from(["fp32", "fp16", "int8"]))
def test_a_plan_fits_its_budget_and_no_longer_context_would(memory, slots, kv):
    try:
        found = plan(CARD, SIZES, memory=memory, slots=slots, kv=kv)
    except BudgetError as error:
        assert error.plan.total > memory
        return
    assert found.total <= memory
    if found.context + 64 <= CARD.max_context:
        with pytest.raises(BudgetError):
            plan(CARD, SIZES, memory=memory, slots=slots, kv=kv, chunk=found.chunk, context=found.context + 64)


def test_each_fix_that_a_refusal_names_works():
    with pytest.raises(BudgetError) as refused:
        plan(CARD, SIZES, memory=600 * MIB, context=16384)
    context = int(refused.value.fix.split("context of ")[1].split()[0])
    assert plan(CARD, SIZES, memory=600 * MIB, context=context).total <= 600 * MIB
    assert "int8" in refused.value.fix
    assert plan(CARD, SIZES, memory=600 * MIB, context=16384, kv="int8").total <= 600 * MIB
    with pytest.raises(BudgetError) as hopeless:
        plan(CARD, SIZES, memory=100 * MIB)
    allowed = int(hopeless.value.fix.split("llow ")[1].split()[0])
    assert plan(CARD, SIZES, memory=allowed * MIB).total <= allowed * MIB
    assert "key-value cache" in hopeless.value.why  # the table


def test_slots_and_formats_cost_what_they_are():
    one, two = (plan(CARD, SIZES, context=1024, slots=slots) for slots in (1, 2))
    row = {r.name: r.bytes for r in one.rows}["key-value cache"]
    assert row == 24 * 2 * 2 * 1024 * 64 * 4
    assert {r.name: r.bytes for r in two.rows}["key-value cache"] == 2 * row
    for kv, share in (("fp16", 2), ("int8", 4)):
        smaller = plan(CARD, SIZES, context=1024, kv=kv)
        assert {r.name: r.bytes for r in smaller.rows}["key-value cache"] == row // share


@pytest.mark.parametrize(
    "wrong", [{"slots": 0}, {"context": 1}, {"context": 40000}, {"chunk": 0}, {"kv": "fp4"}, {"memory": -1}]
)
def test_impossible_arguments_are_named(wrong):
    with pytest.raises(UsageError):
        plan(CARD, SIZES, **wrong)


def test_sizes_in_words():
    assert parse_size("200MB") == 200_000_000
    assert parse_size("1.5GiB") == 3 << 29
    assert parse_size(" 800m ") == 800_000_000
    assert parse_size(7) == 7 and parse_size(None) is None
    for wrong in ("", "MB", "-1MB", "nanMB", "inf", "1 parsec", "1e400GB"):
        with pytest.raises(UsageError):
            parse_size(wrong)


def test_an_encoder_has_no_cache():
    encoder = dataclasses.replace(CARD, task="embed", max_context=512, ropes=(), windows=(), rope_of=())
    assert "key-value cache" not in {row.name for row in plan(encoder, SIZES).rows}
