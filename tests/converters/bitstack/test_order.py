"""Orders of a stack: every one is whole and keeps each matrix's steps in turn; greedy ones are the best there are."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.converters.bitstack import order
from shoal.converters.bitstack.stacks import worthwhile
from shoal.converters.recipe import Format, Ladder

matrices = st.lists(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=4), min_size=1, max_size=4
)


def levels(tops):
    """Of matrices that stop at every level."""
    return [list(range(1, top + 1)) for top in tops]


def check(found, first, tops):
    assert [found.count(matrix) for matrix in range(len(tops))] == list(tops)
    assert [found[: sum(first)].count(matrix) for matrix in range(len(tops))] == list(first)


@given(matrices, st.integers(0, 5))
def test_every_order_is_whole_and_begins_with_the_floor(steps, seed):
    first, tops = [1] * len(steps), [len(own) for own in steps]
    gains = [[gain for gain, _ in own] for own in steps]
    sizes = [[size for _, size in own] for own in steps]
    measured = {(m, c): (100.0, 100.0 - gains[m][c]) for m in range(len(steps)) for c in range(1, tops[m])}
    for found in (
        order.shuffled(first, tops, seed), order.average(first, levels(tops), measured),
        order.greedy(first, tops, sizes, measured), order.by_gain(first, tops, sizes, lambda m, c: gains[m][c]),
        order.by_level(first, levels(tops), sizes, lambda m, c: gains[m][c]),
    ):  # fmt: skip
        check(found, first, tops)


@settings(deadline=None)
@given(matrices)
def test_by_gain_is_best_at_every_size_that_it_stops_at(steps):
    """At the ends of its runs no other choice of as many bytes gains more: brute force says so."""
    first, tops = [0] * len(steps), [len(own) for own in steps]

    def gain(counts) -> float:
        return sum(own[at][0] for own, count in zip(steps, counts, strict=True) for at in range(count))

    def size(counts) -> int:
        return sum(own[at][1] for own, count in zip(steps, counts, strict=True) for at in range(count))

    found = order.by_gain(first, tops, [[s for _, s in own] for own in steps], lambda m, c: steps[m][c][0])
    choices = list(itertools.product(*(range(top + 1) for top in tops)))
    counts = [0] * len(steps)
    curve = [(0, 0.0)]
    for matrix in found:
        counts[matrix] += 1
        curve.append((size(counts), gain(counts)))
    hull = [point for point in curve if all(_under(point, a, b) for a in curve for b in curve)]
    for bytes_, value in hull:
        best = max(gain(choice) for choice in choices if size(choice) <= bytes_)
        assert value >= best - 1e-6 * max(1, best)


def _under(point, a, b) -> bool:
    """Whether the point is not below the line from a to b."""
    if not a[0] < point[0] < b[0]:
        return True
    return point[1] >= a[1] + (b[1] - a[1]) * (point[0] - a[0]) / (b[0] - a[0]) - 1e-9


def test_average_goes_level_by_level_and_puts_the_greatest_help_first():
    """Worked by hand from the paper's rule."""
    measured = {
        (0, 1): (50.0, 40.0), (1, 1): (50.0, 30.0), (2, 1): (50.0, math.nan),
        (0, 2): (20.0, 15.0), (1, 2): (20.0, 18.0),
    }  # fmt: skip
    assert order.average([1, 1, 1], levels([3, 3, 2]), measured) == [0, 1, 2, 1, 0, 2, 0, 1]


def test_by_level_sorts_each_level_by_gain_a_byte():
    gains = {(0, 1): 4.0, (1, 1): 3.0, (2, 1): 1.0, (0, 2): 1.0, (1, 2): 9.0}
    sizes = [[1, 4, 1], [1, 1, 9], [1, 1]]
    assert order.by_level([1, 1, 1], levels([3, 3, 2]), sizes, lambda m, c: gains[m, c]) == [0, 1, 2, 1, 0, 2, 0, 1]


def test_measuring_raises_one_matrix_at_a_time_from_one_level():
    asked = []

    def perplexity(counts):
        asked.append(tuple(counts))
        return 10.0 / sum(counts)

    found = order.gains([1, 1], levels([3, 2]), perplexity)
    assert asked == [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)]
    assert found[0, 2] == (10 / 4, 10 / 5) and set(found) == {(0, 1), (1, 1), (0, 2)}


def test_matrices_that_do_not_stop_at_a_level_wait_for_the_next():
    """The second begins at a rung, the third goes from its blocks to the second rung: levels 2, 3 and 4."""
    stops, asked = [[1, 2, 3, 4], [2, 3, 4], [1, 2, 4]], []

    def perplexity(counts):
        asked.append(tuple(counts))
        return 100.0 / sum(counts)

    found = order.gains([2, 1, 2], stops, perplexity)
    assert asked == [(2, 1, 2), (3, 1, 2), (2, 2, 2), (3, 2, 2), (4, 2, 2), (3, 3, 2), (3, 2, 3)]
    assert set(found) == {(0, 2), (1, 1), (0, 3), (1, 2), (2, 2)}
    assert order.average([2, 1, 2], stops, found) == [0, 0, 1, 2, 2, 0, 1, 0, 1, 2]
    sizes = [[1] * 4, [1] * 3, [1] * 3]
    assert order.by_level([2, 1, 2], stops, sizes, lambda m, c: m) == [0, 0, 1, 2, 2, 1, 0, 2, 1, 0]


@pytest.mark.parametrize(
    ("rivals", "stops", "kept"),
    [
        (0, [(200, 1.0)], [0]),
        (1, [(200, 1.0), (210, 0.1), (300, 0.02)], [1, 2]),  # the floor's rival: half the error
        (1, [(200, 1.0), (210, 0.51), (300, 0.2)], [0, 1, 2]),  # and else after it
        (1, [(200, 1.0), (210, 1.01), (300, 0.2)], [0, 1, 2]),  # the last one always
        (2, [(200, 1.0), (210, 1.01), (220, 1.02), (300, 0.2)], [0, 2, 3]),  # one before it not if it has more
        (1, [(200, 1.0), (190, 0.51), (300, 0.2)], [0, 2]),  # or is no larger
        (1, [(200, 1.0), (190, 0.5), (300, 0.2)], [1, 2]),  # and has not half
        (1, [(200, 1.0), (300, 0.2)], [0, 1]),  # but for the last
        (2, [(200, 1.0), (210, 0.4), (220, 0.1), (300, 0.02)], [1, 2, 3]),
        (2, [(200, 1.0), (210, 1.1), (220, 0.4), (300, 0.02)], [2, 3]),
        (0, [(200, 1.0), (210, 0.1), (300, 0.02)], [0, 1, 2]),
        (0, [(200, 1.0), (200, 0.9), (300, 0.2)], [1, 2]),  # no larger and better: comes instead
        (0, [(200, 1.0), (190, 1.5), (300, 0.2)], [0, 2]),  # smaller, and worse by more than its bytes are worth
        (0, [(200, 1.0), (190, 1.01), (300, 0.2)], [1, 2]),  # and by less
        (0, [(400, 0.1), (300, 0.2), (390, 0.09)], [1, 2]),
        (0, [(400, 0.1), (300, 0.9)], [1]),  # the last is what blocks go on
    ],
)  # fmt: skip
def test_a_matrix_begins_with_what_loses_least_for_its_bytes(rivals, stops, kept):
    assert worthwhile(stops, 800, rivals) == kept


def test_steps_gain_what_they_gain_where_they_come():
    sizes = [1, 1, 2, 1]
    assert order.blended([4, 3, 4, 1], [4, 3, 4, 1], sizes) == [4, 3, 4, 1]
    # The second gains most at once, and the fourth only once the others are there
    early, late = [2, 5, 2, 0], [2, 1, 2, 4]
    found = order.blended(early, late, sizes)
    rates = [gain / size for gain, size in zip(found, sizes, strict=True)]
    assert found[1] == 5 and rates[1] > rates[3] >= rates[2]
    assert order.blended([], [], []) == []


def test_a_shuffle_is_of_its_seed():
    assert order.shuffled([1, 1], [9, 9], 1) == order.shuffled([1, 1], [9, 9], 1) != order.shuffled([1, 1], [9, 9], 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_what_is_no_number_comes_last(bad):
    measured = {(0, 1): (50.0, bad), (1, 1): (50.0, 49.0)}
    assert order.greedy([1, 1], [2, 2], [[1, 1], [1, 1]], measured) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("ladder", "levels"),
    [
        (Ladder(), [2, 3, 8]), (Ladder(first=1, blocks=0), [1]), (Ladder(first=2, blocks=1), [2, 3]),
        (Ladder(rungs=(Format(3), Format(4))), [2, 3, 4]), (Ladder(first=0, rungs=(Format(4),)), [1]),
    ],
)  # fmt: skip
def test_inputs_are_looked_at_where_a_ladder_has_models_by_themselves(ladder, levels):
    assert ladder.levels == levels
