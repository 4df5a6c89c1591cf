"""Negotiation is a function: what it may never say, what it says of typical devices, and that it does not swing."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.device_agents.messages import Agreement, Health, Hello, Mode, Model, State, decode, encode
from shoal.device_agents.negotiate import (
    FEATURES,
    Link,
    Offer,
    Renegotiation,
    Terms,
    differs,
    negotiate,
    seconds,
    version,
)
from shoal.runtime.errors import LinkError

E1, E2, T1, D1, D2 = ("e1" * 32, "e2" * 32, "71" * 32, "d1" * 32, "d2" * 32)
MODES = (Mode(1, 8, 27_600, 30.0, 0.42), Mode(2, 4, 6_900, 30.0, 0.39), Mode(3, 2, 1_700, 12.0, 0.33))
HEAD = Model(D1, "cats", "encoder", E1, T1, MODES, 1 << 20)
TAIL = Model(D2, "cats", "tail", E1, T1, MODES, 1 << 24)
FAST = Link(10e6, 0.002)
SERIAL = Link(11_520, 0.01)


def state(*models, **health):
    return State("device", models or (HEAD,), Health(**health))


def test_a_fast_link_allows_every_mode_best_first():
    said = negotiate(state(), Offer((TAIL,), seconds={D2: 0.008}), FAST)
    assert (said.tail, said.encoder, said.modes, said.fetch) == (D2, E1, (1, 2, 3), ())
    assert 40 <= said.deadline_ms <= 200 and 1 <= said.inflight <= 4
    assert decode(encode(said)) == said


def test_a_serial_cable_allows_what_it_can_carry():
    assert negotiate(state(), Offer((TAIL,)), SERIAL).modes == (2, 3)  # 27.6 kB take 2.4 s
    slow = negotiate(state(), Offer((TAIL,)), Link(960, 0.02))
    assert slow.tail == "" and not slow.modes and "no mode answers" in slow.why


def test_a_hot_or_empty_device_is_spared():
    for health in ({"temperature_c": 90.0}, {"battery_percent": 5.0, "on_power": 0}, {"battery_percent": 5.0}):
        assert negotiate(state(**health), Offer((TAIL,)), FAST).modes == (3,)
    assert negotiate(state(battery_percent=5.0, on_power=1), Offer((TAIL,)), FAST).modes == (1, 2, 3)


def test_a_busy_edge_says_so_and_asks_for_patience():
    said = negotiate(state(), Offer((TAIL,), load=0.95), FAST)
    assert said.tail == "" and "busy" in said.why and 0 < said.valid_s < Terms().valid
    held = negotiate(state(), Offer((TAIL,)), FAST)
    kept = negotiate(state(), Offer((TAIL,), load=0.95), FAST, held=held)
    assert kept.tail == D2 and kept.inflight <= held.inflight  # who has an agreement keeps it longer


def test_a_missing_head_is_offered_where_it_fits():
    other = Model("d3" * 32, "cats", "encoder", E2, T1, MODES, 1 << 20)
    for models in ((other,), (Model("d4" * 32, "dogs", "decode"),)):
        said = negotiate(state(*models), Offer((TAIL, HEAD)), FAST)
        assert said.tail == "" and said.fetch == (D1,) and "fetch" in said.why
        assert not negotiate(state(*models, memory_available=1000), Offer((TAIL, HEAD)), FAST).fetch
        assert not negotiate(state(*models), Offer((TAIL, HEAD)), Link(100, 0.1)).fetch  # three hours
    assert negotiate(state(other), Offer((HEAD,)), FAST).why == "The edge has no tail."
    tables = Model(D1, "cats", "encoder", E1, "72" * 32, MODES)
    assert "belongs" in negotiate(state(tables), Offer((TAIL,)), FAST).why


def test_names_pair_what_names_no_encoder():
    head, tail = Model(D1, "cats", "encoder"), Model(D2, "cats", "tail")
    assert negotiate(state(head), Offer((tail,)), FAST).modes == (0,)
    assert not negotiate(state(Model(D1, "dogs", "encoder")), Offer((tail,)), FAST).tail
    assert not negotiate(state(Model(D1, "cats", "encoder", E1)), Offer((tail,)), FAST).tail


def test_a_bundle_that_both_sides_have_is_computed_on_the_edge_where_that_is_worth_it():
    for role in ("tail", "head+tail"):
        both = Model(D2, "cats", role, "", "", MODES)
        assert negotiate(state(both), Offer((both,)), FAST).modes == (1, 2, 3)
    alone = Model(D2, "cats", "tail")
    assert not negotiate(state(Model(D1, "cats", "tail")), Offer((alone,)), FAST).tail  # another one's latents
    said = negotiate(State("x"), Offer((alone,)), FAST)
    assert not said.fetch  # a tail makes no latents
    assert negotiate(State("x"), Offer((Model(D2, "cats", "head+tail"),)), FAST).fetch == (D2,)


def test_versions_skew_both_ways():
    newer = (*MODES, Mode(9, 6, 5000, 1.0, 0.99))
    for head, tail in ((newer, MODES), (MODES, newer)):
        said = negotiate(
            state(Model(D1, "cats", "encoder", E1, T1, head)), Offer((Model(D2, "cats", "tail", E1, T1, tail),)), FAST
        )
        assert said.modes == (1, 2, 3)
    moved = Model(D2, "cats", "tail", E1, T1, (Mode(1, 4, 27_600, 30.0, 0.42), MODES[1]))
    assert negotiate(state(), Offer((moved,)), FAST).modes == (2,)  # mode 1 means something else there
    alone = Model(D2, "cats", "tail", E1, T1, (Mode(7, 8, 100),))
    assert "no mode in common" in negotiate(state(), Offer((alone,)), FAST).why
    assert version(Hello(5, "device", features=("levitate",))) == 1
    assert version(Hello(1, "device", required=("split",))) == 1
    for hello in (Hello(0, "device"), Hello(1, "device", required=("levitate", *FEATURES))):
        with pytest.raises(LinkError):
            version(hello)


def test_an_agreement_outlives_noise_and_follows_what_lasts():
    terms = Terms()
    offer = Offer((TAIL,))
    held = negotiate(state(), offer, Link(13_000, 0.01), terms)
    watch = Renegotiation(held, 0.0, terms)
    # Around the rate where the middle mode just fits, nothing ever changes
    edge = next(
        rate for rate in range(5000, 20_000, 10) if seconds(MODES[1], D2, offer, Link(rate, 0.01)) <= terms.most
    )
    for step in range(200):
        rate = edge * (1 + 0.15 * math.sin(step))
        candidate = negotiate(state(), offer, Link(rate, 0.01), terms, held)
        assert watch.observe(candidate, 0.1 * step) == ""
    # A dip shorter than `hold` is ignored, a lasting one is told once, and again only after `rest`
    worse = negotiate(state(), offer, Link(2500, 0.01), terms, held)
    assert differs(held, worse)
    assert watch.observe(worse, 30.0) == "" and watch.observe(worse, 31.9) == ""
    assert watch.observe(held, 32.0) == "" and watch.observe(worse, 33.0) == ""
    said = [at / 10 for at in range(331, 500) if watch.observe(worse, at / 10)]
    assert said[0] == 35.0 and all(b - a >= terms.rest for a, b in zip(said, said[1:], strict=False))
    fresh = Renegotiation(held, 100.0, terms)
    assert "no tail" in fresh.observe(negotiate(state(), Offer(), FAST, terms, held), 100.1, gone=True)


numbers = st.one_of(st.just(math.nan), st.floats(-1e9, 1e9), st.just(math.inf))
modes = st.builds(Mode, st.integers(-2, 4), st.integers(-1, 9), st.integers(-5, 1 << 30), numbers, numbers)
digests = st.sampled_from(["", E1, E2, T1, D1, D2])
roles = st.sampled_from(["", "tail", "encoder", "decode", "head+tail"])
models = st.builds(
    Model, digests, st.sampled_from(["", "cats", "dogs"]), roles, digests, digests,
    st.lists(modes, max_size=4).map(tuple), st.integers(-1, 1 << 40),
)  # fmt: skip
healths = st.builds(Health, numbers, st.integers(-1, 2), numbers, st.integers(-1, 1 << 40), numbers, numbers, numbers)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(models, max_size=4), st.none() | healths, st.lists(models, max_size=4), st.floats(0, 2), st.floats(0, 10),
    st.none() | st.floats(1, 1e9), st.none() | st.floats(0, 60),
)  # fmt: skip
def test_whatever_a_device_says_the_answer_holds_together(mine, health, theirs, load, queue, rate, rtt):
    said = State("x", tuple(mine), health)
    offer = Offer(tuple(theirs), load, queue, {D2: 0.5})
    first = negotiate(said, offer, Link(rate, rtt))
    for answer in (first, negotiate(said, offer, Link(rate, rtt), held=first)):
        assert decode(encode(answer)) == answer
        assert bool(answer.modes) == bool(answer.deadline_ms) == bool(answer.inflight)
        assert not answer.modes or answer.tail in {model.digest for model in theirs if "tail" in model.role}
        assert set(answer.fetch) <= {model.digest for model in theirs} - {model.digest for model in mine}
        assert answer.why and answer.valid_s >= 1 and 0 <= answer.deadline_ms <= 2000 and answer.inflight <= 4
        assert isinstance(answer, Agreement)
    assert not differs(first, negotiate(said, offer, Link(rate, rtt), held=first))
