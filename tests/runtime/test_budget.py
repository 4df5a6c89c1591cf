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


# A stack --------------------------------------------------------------------------------------------------------------

STACKED = dataclasses.replace(
    SIZES, repacked=0, graph="fused", stack=tuple(40 * MIB + at * (MIB // 3) for at in range(600)), floor=7
)


@settings(max_examples=200, deadline=None)
@given(memory=st.integers(1, 1 << 30), slots=st.integers(1, 4), context=st.none() | st.integers(2, 4096))
def test_the_largest_prefix_that_fits_is_taken(memory, slots, context):
    try:
        found = plan(CARD, STACKED, memory=memory, slots=slots, context=context)
    except BudgetError as error:
        assert error.plan.entries == STACKED.floor and "7 of 599 blocks, its floor" in error.why
        return
    row = next(row for row in found.rows if row.name == "stack")
    assert (row.bytes, row.where, row.kind) == (STACKED.stack[found.entries], "mapped", "elastic")
    assert row.note.startswith(f"{found.entries} of 599 blocks") and found.to_dict()["entries"] == found.entries
    assert found.total <= memory and STACKED.floor <= found.entries < 600
    same = {"slots": slots, "context": found.context, "chunk": found.chunk}
    assert plan(CARD, STACKED, memory=memory, **same).entries == found.entries
    if found.entries < 599:
        with pytest.raises(BudgetError):
            plan(CARD, STACKED, memory=memory, entries=found.entries + 1, **same)


def test_memory_that_shrinks_costs_context_then_blocks_then_context():
    plans = [plan(CARD, STACKED, memory=memory * MIB) for memory in range(480, 110, -5)]
    for before, after in zip(plans, plans[1:], strict=False):
        assert after.context <= before.context and (after.entries <= before.entries or after.chunk < before.chunk)
    assert (plans[0].context, plans[0].entries) == (4096, 599)
    assert all(found.entries == 599 for found in plans if found.context > 1024)
    assert all(found.entries == 7 for found in plans if found.context < 960)
    assert any(found.context == 1024 and 100 < found.entries < 500 for found in plans)
    asked = [plan(CARD, STACKED, memory=memory * MIB, context=2048) for memory in (400, 300, 200)]
    assert {found.context for found in asked} == {2048} and asked[0].entries > asked[1].entries > asked[2].entries
    with pytest.raises(BudgetError):
        plan(CARD, STACKED, memory=120 * MIB, context=2048)


def test_of_a_loaded_model_the_context_stays_as_long_as_the_floor_fits():
    for memory, context in ((400, 2048), (200, 2048), (130, 0)):
        found = plan(CARD, STACKED, memory=memory * MIB, chunk=256, loaded=True, keep=2048)
        assert found.context == context or (context == 0 and found.context < 2048 and found.entries < 20)
    assert plan(CARD, STACKED, keep=2048).context == 2048 and plan(CARD, STACKED).entries == 599


@pytest.mark.parametrize("entries", [6, 600, -1, True, "all", 8.0])
def test_a_number_of_entries_that_is_none(entries):
    with pytest.raises(UsageError):
        plan(CARD, STACKED, entries=entries)


def test_what_has_no_stack_has_no_entries():
    found = plan(CARD, SIZES)
    assert found.entries == 0 and "stack" not in {row.name for row in found.rows}
