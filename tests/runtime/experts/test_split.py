"""Splits of a layer between CPU and accelerator: by hand, carried out, and against every split there is."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.errors import UsageError
from shoal.runtime.experts.split import EXACT, Costs, assigned, greedy, split

PUBLISHED = Costs(cpu=0, accelerator=0.5, link=0.418, cpu_row=1, warmup=0.79)  # HybriMoE's, in its own unit


def carried_out(found, rows, resident, costs) -> float:
    """When the layer is over, if three workers do what `found` says, one thing at a time and none before it can be."""
    assert sorted(found.cpu + found.accelerator) == list(range(len(rows)))
    assert found.transfers == tuple(one for one in found.accelerator if not resident[one])
    there = {one: 0.0 for one in range(len(rows)) if resident[one]}
    link: list[tuple[float, float]] = []
    for one in found.transfers:
        begin = link[-1][1] if link else 0.0
        link.append((begin, begin + costs.link))
        there[one] = link[-1][1]
    accelerator: list[tuple[float, float]] = []
    for one in found.accelerator:
        begin = max(accelerator[-1][1] if accelerator else 0.0, there[one])
        accelerator.append((begin, begin + costs.accelerator + rows[one] * costs.accelerator_row))
    cpu: list[tuple[float, float]] = []
    for one in found.cpu:
        begin = cpu[-1][1] if cpu else costs.warmup
        cpu.append((begin, begin + costs.cpu + rows[one] * costs.cpu_row))
    for busy in (link, accelerator, cpu):
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(busy))
    return max((end for _, end in link + accelerator + cpu), default=0.0)


def exhaustive(rows, resident, costs) -> float:
    """The least seconds over every set of experts for the accelerator, each in the order that
    test_no_other_order_is_faster is about."""
    count = len(rows)
    sets = np.arange(1 << count)
    cpu, end, arrived = np.zeros((3, 1 << count))
    for one in sorted(range(count), key=lambda one: (not resident[one], -rows[one])):
        on = (sets >> one & 1).astype(bool)
        cpu += np.where(on, 0, costs.cpu + rows[one] * costs.cpu_row)
        arrived += on * (0 if resident[one] else costs.link)
        begin = end if resident[one] else np.maximum(end, arrived)
        end = np.where(on, begin + costs.accelerator + rows[one] * costs.accelerator_row, end)
    cpu += np.where(sets < len(sets) - 1, costs.warmup, 0)
    return float(np.maximum(cpu, end).min())


def some(random, count):
    """A layer of `count` experts: decoding, a prompt's loads, or skewed ones; none, some or all resident; the link, the
    accelerator and the CPU up to a hundred times faster or slower than each other; HybriMoE's costs now and then."""
    rows = [
        np.ones(count, int), random.integers(1, 9, count), random.integers(1, 513, count),
        np.minimum(random.pareto(0.8, count) + 1, 4096).astype(int),
    ][random.integers(4)].tolist()  # fmt: skip
    resident = (random.random(count) < random.choice([0, 0.25, 0.5, 0.75, 1])).tolist()
    if random.random() < 0.2:
        return rows, resident, PUBLISHED
    cost = 10 ** random.uniform(-1, 1, 6) * (random.random(6) < 0.7)
    cost[3:5] /= random.choice([1, 10, 100])
    return rows, resident, Costs(*cost.tolist())


def test_decoding_by_hand():
    # Four experts of one row that are elsewhere: they arrive at 0.418, 0.836, 1.254, .. and the accelerator is done at
    # 0.918, 1.418, 1.918; the CPU with one at 0.79 + 1 and with two at 2.79. The first two are sooner done on the
    # accelerator; the third is not (1.79 < 1.918), the fourth is (1.918 < 2.79)
    found = greedy([1] * 4, [False] * 4, PUBLISHED)
    assert found.accelerator == found.transfers == (0, 1, 2) and found.cpu == (3,)
    assert found.seconds == pytest.approx(1.918)
    assert split([1] * 4, [False] * 4, PUBLISHED) == found
    # With two resident they are done at 0.5 and 1, and the others at 1.5 and 2: but the CPU has one at 1.79
    found = greedy([1] * 4, [False, True, False, True], PUBLISHED)
    assert found.accelerator == (1, 3, 0) and found.transfers == (0,) and found.cpu == (2,)
    assert found.seconds == pytest.approx(1.79)


def test_whoever_is_done_first_takes_it_by_hand():
    # It arrives at 1, and the CPU is done at 2: as soon as the accelerator, then a little sooner
    assert greedy([1], [False], Costs(cpu=2, accelerator=1, link=1)).accelerator == (0,)
    assert greedy([1], [False], Costs(cpu=2, accelerator=1.0625, link=1)).cpu == (0,)


def test_a_prompt_by_hand():
    # The accelerator takes who has most rows, over the link one after the other: 9 arrives at 1 and is done at 3, 7 is
    # there at 2 and done at 5. The CPU has 1 at 1 and 2 at 3
    costs = Costs(cpu=0, accelerator=2, link=1, cpu_row=1)
    found = greedy([2, 9, 1, 7], [False] * 4, costs)
    assert found.accelerator == (1, 3) and found.cpu == (2, 0) and found.seconds == 5
    assert split([2, 9, 1, 7], [False] * 4, costs) == found


def test_where_the_greedy_falls_short_by_hand():
    # It has the accelerator at residents, done at 2 and 4, while the CPU takes one row. The five rows that are left
    # take the CPU until 6 and the accelerator, too, but it could have had them at 3, and the CPU three times one
    costs = Costs(cpu=0, accelerator=2, link=1, cpu_row=1)
    rows, resident = [1, 1, 1, 5], [True, True, False, False]
    assert greedy(rows, resident, costs).seconds == 6
    found = split(rows, resident, costs)
    assert found.seconds == 3 and found.accelerator == found.transfers == (3,) and found.cpu == (2, 1, 0)
    # Where rows cost the accelerator something it is late even with two experts: 2 + 3 against 4 beside 1 + 3
    costs = Costs(cpu=0, accelerator=0, link=1, cpu_row=1, accelerator_row=0.5)
    assert greedy([4, 6], [True, False], costs).seconds == 5
    found = split([4, 6], [True, False], costs)
    assert found.seconds == 4 and found.cpu == (0,) and found.transfers == (1,)


def test_all_on_one_of_them():
    costs = Costs(cpu=0.25, accelerator=0.5, link=1, cpu_row=0.5, accelerator_row=0.125, warmup=2)
    rows, resident = [4, 2, 8], [False, True, False]
    assert assigned(rows, resident, costs, ()).seconds == 2 + 2.25 + 1.25 + 4.25
    # 1 until 0.75; 2 arrives at 1, until 2.5; 0 is there at 2, until 3.5
    found = assigned(rows, resident, costs, range(3))
    assert found.accelerator == (1, 2, 0) and found.transfers == (2, 0) and found.seconds == 3.5
    assert split([], [], costs).seconds == 0
    # A link that takes forever, and an accelerator that does
    assert split(rows, resident, replace(costs, link=1e9)).transfers == ()
    assert split(rows, resident, replace(costs, accelerator=1e9)).accelerator == ()


def test_no_other_order_is_faster():
    random = np.random.default_rng(3)
    slower = 0
    for _ in range(60):
        rows, resident, costs = some(random, 5)
        found = assigned(rows, resident, costs, range(5))
        assert carried_out(found, rows, resident, costs) == pytest.approx(found.seconds)
        for sent in itertools.permutations(found.transfers):
            there = {one: (at + 1) * costs.link for at, one in enumerate(sent)}
            for computed in itertools.permutations(range(5)):
                end = 0.0
                for one in computed:
                    end = max(end, there.get(one, 0.0)) + costs.accelerator + rows[one] * costs.accelerator_row
                assert end >= found.seconds - 1e-9 * end
                slower += end > found.seconds * 1.05
    assert slower > 1000  # so that the order does matter


@pytest.mark.parametrize("count", range(1, EXACT + 1))
def test_nothing_is_faster_up_to_ten_experts(count):
    random = np.random.default_rng(count)
    published = []
    for _ in range(300):
        rows, resident, costs = some(random, count)
        found, least = split(rows, resident, costs), exhaustive(rows, resident, costs)
        assert found.seconds == pytest.approx(carried_out(found, rows, resident, costs), rel=1e-9)
        assert found.seconds == pytest.approx(least, rel=1e-9), (rows, resident, costs)
        one = greedy(rows, resident, costs)
        assert carried_out(one, rows, resident, costs) == pytest.approx(one.seconds, rel=1e-9)
        published.append(one.seconds / least if least else 1.0)
    assert min(published) > 1 - 1e-9
    assert count < 3 or max(published) > 1.05  # what going through the experts once leaves on the table


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 4096)), st.booleans()), max_size=EXACT),
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=6, max_size=6),
)
def test_nothing_is_faster_whatever_it_costs(experts, cost):
    rows, resident, costs = [one for one, _ in experts], [one for _, one in experts], Costs(*cost)
    found = split(rows, resident, costs)
    assert found.seconds == pytest.approx(carried_out(found, rows, resident, costs), rel=1e-9)
    assert found.seconds == pytest.approx(exhaustive(rows, resident, costs), rel=1e-9)


def test_beyond_ten_experts_it_stays_close():
    random = np.random.default_rng(5)
    ratios = []
    for _ in range(60):
        rows, resident, costs = some(random, random.integers(11, 15))
        found = split(rows, resident, costs)
        assert found.seconds == pytest.approx(carried_out(found, rows, resident, costs), rel=1e-9)
        assert found.seconds <= greedy(rows, resident, costs).seconds
        least = exhaustive(rows, resident, costs)
        ratios.append(found.seconds / least if least else 1.0)
    assert 1 - 1e-9 < min(ratios) and max(ratios) < 1.05
    # Two that are as fast share 24 experts nearly perfectly; the greedy leaves one of them waiting
    rows, resident = random.integers(1, 513, 24).tolist(), [True] * 24
    costs = Costs(cpu=0, accelerator=0, link=1, cpu_row=1, accelerator_row=1)
    assert sum(rows) / 2 <= split(rows, resident, costs).seconds < 1.002 * sum(rows) / 2
    assert greedy(rows, resident, costs).seconds > 1.01 * sum(rows) / 2


def test_impossible_layers_are_refused():
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError):
            Costs(cpu=1, accelerator=1, link=wrong)
    for rows, resident in (([1, 2], [True]), ([1, 0], [True, False])):
        for way in (split, greedy):
            with pytest.raises(UsageError):
                way(rows, resident, PUBLISHED)
