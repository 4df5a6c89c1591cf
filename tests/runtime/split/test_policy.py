"""The choice of a mode: what brute force finds, never late where it need not be, steady; and worth it over traces."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.split.modes import Mode
from shoal.runtime.split.policy import (
    LOCAL,
    Estimate,
    Knowledge,
    Situation,
    Terms,
    choose,
    fixed,
    local_only,
    predict,
    reserve,
)
from shoal.runtime.split.replay import replay
from shoal.runtime.split.shaped import Channel, Trace, synthetic

figures = st.floats(0.0, 1.0) | st.sampled_from([0.5, math.nan])
times = st.floats(0.0, 200.0) | st.sampled_from([10.0, math.nan])
tables = st.lists(st.tuples(st.integers(0, 20_000), times, figures), min_size=1, max_size=8).map(
    lambda rows: [Mode(number, 1, "c", 4, *row) for number, row in enumerate(rows, 1)]
)
estimates = st.builds(Estimate, st.floats(1e2, 1e7), st.floats(0, 0.3), st.floats(0, 0.1))
owns = st.none() | st.builds(lambda ms, accuracy: Mode(LOCAL, device_ms=ms, accuracy=accuracy), times, figures)
situations = st.builds(
    Situation, tables, estimates, st.floats(0.03, 0.3), st.none() | estimates, owns, st.integers(1, 4),
    st.integers(0, 8), st.sampled_from([False, False, True]),
)  # fmt: skip
terms_ = st.builds(Terms, st.floats(0.5, 1.0), st.floats(0.0, 0.3))


def able(now: Situation, terms: Terms) -> list[tuple[Mode, float]]:
    """What is in time, and what it takes, said once more in another way."""
    own_ms = math.nan if now.local is None else now.local.device_ms
    spare = now.deadline - terms.guard - now.images * own_ms / 1000
    reserved = spare >= 0
    line = (now.likely or now.estimate) if reserved else now.estimate
    found = []
    for mode in () if now.gone else now.modes:
        head = 0.0 if math.isnan(mode.device_ms) else now.images * mode.device_ms / 1000
        took = head + line.rtt + now.images * (mode.bytes / line.rate + line.tail)
        if took <= terms.margin * now.deadline and (not reserved or head <= spare):
            found.append((mode, took))
    own_s = now.images * own_ms / 1000
    if now.local is not None and not math.isnan(now.local.accuracy) and own_s <= terms.margin * now.deadline:
        found.append((now.local, own_s))
    return found


def worth(mode: Mode) -> float:
    return -1.0 if math.isnan(mode.accuracy) else mode.accuracy


@given(situations, terms_)
def test_no_choice_is_late_where_one_is_in_time(now, terms):
    said, found = choose(now, terms), dict(able(now, terms))
    if found:
        assert said.mode in found
        assert said.seconds == pytest.approx(found[said.mode])
    elif now.local is not None:
        assert said.mode.id == LOCAL
    else:
        assert said.seconds == min(predict(mode, now.estimate, now.images) for mode in now.modes)


@given(situations, terms_)
def test_without_a_mode_in_use_it_is_the_most_accurate_in_time(now, terms):
    now = Situation(now.modes, now.estimate, now.deadline, now.likely, now.local, now.images, 99, now.gone)
    found = able(now, terms)
    if not found:
        return
    said = choose(now, terms)
    best = max(worth(mode) for mode, _ in found)
    assert worth(said.mode) == best
    assert said.seconds == pytest.approx(min(took for mode, took in found if worth(mode) == best))


@given(situations, terms_)
def test_a_mode_in_use_is_left_only_for_a_better_one_with_room_to_spare(now, terms):
    said, found = choose(now, terms), dict(able(now, terms))
    held = next((mode for mode in found if mode.id == now.current), None)
    if held is not None and said.mode.id != held.id:
        assert worth(said.mode) > worth(held)
        assert found[said.mode] <= (terms.margin - terms.hysteresis) * now.deadline + 1e-12


def test_it_does_not_swing_where_the_link_does():
    modes = [Mode(1, bytes=1000, device_ms=1.0, accuracy=0.6), Mode(2, bytes=9000, device_ms=1.0, accuracy=0.8)]
    fast, slow = Estimate(110e3, 0.005, 0.001), Estimate(95e3, 0.005, 0.001)

    def switches(terms: Terms) -> int:
        current, count = 1, 0
        for turn in range(40):
            now = choose(Situation(modes, fast if turn % 2 else slow, 0.1, current=current), terms).mode.id
            current, count = now, count + (now != current)
        return count

    assert switches(Terms(hysteresis=0.0, margin=0.95)) >= 38
    assert switches(Terms(hysteresis=0.1, margin=0.95)) <= 1


def test_the_device_s_own_answer_counts_as_a_mode_where_its_accuracy_is_known():
    modes, line = [Mode(1, bytes=100, device_ms=1.0, accuracy=0.6)], Estimate(1e6, 0.01, 0.001)
    for own, expected in ((Mode(0, device_ms=20.0, accuracy=0.9), 0), (Mode(0, device_ms=20.0, accuracy=0.5), 1),
                          (Mode(0, device_ms=20.0), 1), (Mode(0, device_ms=200.0, accuracy=0.9), 1)):  # fmt: skip
        assert choose(Situation(modes, line, 0.1, local=own)).mode.id == expected
    assert reserve(Situation(modes, line, 0.1, local=Mode(0, device_ms=20.0)), Terms(guard=0.0)) == pytest.approx(0.08)


@settings(deadline=None)
@given(st.floats(1e4, 1e6), st.floats(0.002, 0.1), st.integers(0, 99))
def test_bandwidth_and_round_trip_are_told_apart_by_messages_of_different_sizes(rate, rtt, seed):
    known, sizes = Knowledge.prior(), (200, 20_000, 2000)
    for turn in range(300):
        size = sizes[(turn + seed) % 3]
        known = known.answered(size, size / rate + rtt + 0.004, 0.004, float(turn))
    found = known.estimate()
    for size in sizes:
        assert size / found.rate + found.rtt == pytest.approx(size / rate + rtt, rel=0.15)
    assert found.tail == pytest.approx(0.004, rel=1e-3)
    assert known.estimate(1).rate <= found.rate and known.estimate(1).rtt >= found.rtt


def test_silence_makes_it_careful_and_probes_rarer():
    known = Knowledge.prior().answered(1000, 0.03, 0.005, 10.0)
    later = known.late(1000, 0.1, 11.0)
    assert later.estimate().rate < known.estimate().rate and later.estimate().rtt > known.estimate().rtt
    assert not later.due(12.5) and later.due(13.1) and known.due(11.1)
    gone = later.lost(14.0)
    assert gone.gone and not gone.due(17.9) and gone.due(18.1)
    back = gone.answered(1000, 0.03, 0.005, 20.0)
    assert not back.gone and back.silent == 0
    hostile = [math.nan, -5.0, 1e9, math.inf]
    for said in hostile:  # an edge's word about itself
        assert all(map(math.isfinite, vars(known.answered(1000, 0.03, said, 21.0).estimate(1)).values()))


# A mode table in the shape of slimmable encoders: time by members, bytes by bits, accuracies that saturate. Made up.
ACCURACY = {(1, 1): 0.55, (1, 2): 0.72, (1, 4): 0.80, (1, 8): 0.81, (2, 1): 0.60, (2, 2): 0.77, (2, 4): 0.85,
            (2, 8): 0.862, (4, 1): 0.63, (4, 2): 0.80, (4, 4): 0.89, (4, 8): 0.905}  # fmt: skip
MODES = [Mode(number, members, f"b{bits}", bits, 250 * bits + 30, 5.0 * members, accuracy)
         for number, ((members, bits), accuracy) in enumerate(ACCURACY.items(), 1)]  # fmt: skip
OWN = Mode(LOCAL, device_ms=24.0, accuracy=0.70)


def scores(kind: str, deadline: float, *choosers, **options):
    delay, loss = {"3g": (0.035, 0.01), "lte": (0.02, 0.003), "wifi": (0.003, 0.01)}[kind]
    for chooser in choosers:
        up, down = (Channel(synthetic(kind, 300, seed), delay=delay, jitter=delay / 4, loss=loss, seed=seed + 2)
                    for seed in (1, 2))  # fmt: skip
        yield replay(chooser, MODES, OWN, up, down, deadline=deadline, requests=300, period=0.4, **options)


@pytest.mark.parametrize("kind", ["3g", "lte", "wifi"])
@pytest.mark.parametrize("deadline", [0.03, 0.1, 0.2, 0.3])
def test_over_traces_it_beats_each_fixed_mode_and_the_device_alone(kind, deadline):
    [policy, own] = scores(kind, deadline, choose, local_only)
    alone = list(scores(kind, deadline, *(fixed(mode.id) for mode in MODES), fallback=False))
    assert policy.missed == 0 == own.missed
    assert policy.accuracy >= max(own.accuracy, *(score.accuracy for score in alone))
    assert policy.missed <= min(score.missed for score in alone)
    if deadline >= 0.2:
        assert policy.edge > 150 and policy.accuracy > own.accuracy + 0.05


def test_a_link_that_dies_and_comes_back_is_found_again():
    dead = Trace([(60.0, 1e6)], stalls=[(20.0, 20.0)])
    score = replay(choose, MODES, OWN, Channel(dead, delay=0.01), Channel(1e6, delay=0.01), deadline=0.1,
                   requests=120, period=0.5)  # fmt: skip
    assert score.missed == 0 and score.probes >= 1
    assert 60 <= score.edge <= 81  # of 80 while there was a link
