"""The path of thresholds and the bisection on it, on made-up curves."""

import math

import pytest

from shoal.runtime.experts.thresholds import STEPS, least, pair


def asked(curve, budget):
    """What `least` found, and where it looked."""
    places = []

    def read(thrift):
        places.append(thrift)
        return curve(thrift)

    return least(read, budget), places


def test_the_path_passes_the_published_pair():
    assert pair(0, True) == pair(0, False) == (1, 1)  # nothing is given up
    assert pair(20 / STEPS, True) == (0.6, 0.9)
    assert pair(1, True) == (0, 0.75) and pair(1, False) == (1, 0)
    places = [pair(place / STEPS, low) for low in (True, False) for place in range(STEPS + 1)]
    for path in (places[: STEPS + 1], places[STEPS + 1 :]):
        assert all(low <= a and skip < b for (a, b), (low, skip) in zip(path, path[1:], strict=False))


@pytest.mark.parametrize(
    "curve",
    [
        lambda thrift: 1000 * (1 - thrift) + 1,
        lambda thrift: 1000 * (1 - thrift) ** 4 + 1,
        lambda thrift: 1000 - 125 * math.floor(8 * thrift * 0.999),  # stairs, as routers that weigh all alike give
        lambda thrift: 900 if thrift < 0.5 else 100,
    ],
)
@pytest.mark.parametrize("budget", [126, 300, 501, 875])
def test_the_least_thrift_that_fits_is_found(curve, budget):
    found, places = asked(curve, budget)
    if found is None:
        assert curve(1.0) > budget
        return
    fitting = [place / STEPS for place in range(STEPS + 1) if curve(place / STEPS) <= budget]
    assert found == fitting[0]
    assert len(places) == len(set(places)) <= 2 + math.ceil(math.log2(STEPS))


def test_what_fits_as_it_is_or_never_is_told_at_once():
    assert asked(lambda thrift: 10.0, 10) == (0.0, [0.0])
    assert asked(lambda thrift: 10.0, 9.99) == (None, [0.0, 1.0])


def test_a_curve_with_noise_still_gives_what_was_measured_to_fit():
    for seed in range(200):
        measured = {}

        def read(thrift, seed=seed, measured=measured):
            measured[thrift] = 1000 * (1 - thrift) + 40 * math.sin(1e3 * (thrift + seed))
            return measured[thrift]

        found = least(read, 400)
        assert measured[found] <= 400
