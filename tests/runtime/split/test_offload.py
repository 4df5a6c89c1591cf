"""Several edges: the sums of processor sharing against a simulation in small steps, and the greedy against others."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.split.offload import (
    Server,
    Task,
    drain,
    greedy,
    marginal,
    residence,
    selfish,
    shortest_queue,
    simulate,
    single,
)

works = st.lists(st.floats(0.01, 10.0), max_size=6)
speeds = st.floats(0.5, 4.0)


def shared(left: list[float], speed: float, seconds: float = 1e9) -> tuple[list[float], float]:
    """Processor sharing by its definition, from one end to the next: what is left, and the sum of the times."""
    spent = 0.0
    while left and seconds > 0:
        step = min(min(left) * len(left) / speed, seconds)
        spent, seconds = spent + step * len(left), seconds - step
        left = [work - step * speed / len(left) for work in left]
        left = [work for work in left if work > 1e-9]
    return left, spent


@given(works, speeds, st.floats(0.0, 10.0))
def test_residence_and_draining_are_those_of_processor_sharing(found, speed, seconds):
    assert residence(found, speed) == pytest.approx(shared(found, speed)[1])
    left, spent = drain(found, speed, seconds)
    expected, sum_of_times = shared(found, speed, seconds)
    assert sorted(left) == pytest.approx(sorted(expected), abs=1e-6) and spent == pytest.approx(sum_of_times)
    assert spent + residence(left, speed) == pytest.approx(residence(found, speed), abs=1e-6)


@given(works, speeds, st.floats(0.1, 5.0), st.floats(0.0, 4.0))
def test_the_marginal_cost_is_what_the_simulator_finds(found, speed, work, sending):
    server, task = Server(speed, 1.0, watts=2.0, joules=0.5), Task(0.0, sending, work)
    there = [Task(0.0, 0.0, one) for one in found]
    with_it, joules = simulate(single(0), [server], [*there, task])
    without = simulate(single(0), [server], there)[0] * len(there)
    seconds, energy = marginal(Server(speed, 1.0, 2.0, 0.5, tuple(found)), task)
    assert with_it * (len(there) + 1) - without == pytest.approx(seconds, abs=1e-6)
    assert energy == pytest.approx(2.0 * sending + 0.5 * work)
    assert joules == pytest.approx(energy + 0.5 * sum(found))


def arrivals(seed: int, every: float, count: int = 400) -> list[Task]:
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(every, count))
    return [
        Task(*row) for row in zip(at, rng.lognormal(0, 0.5, count) * 1e5, rng.lognormal(0, 1.0, count), strict=True)
    ]


EDGES = [Server(1.0, 5e5), Server(2.0, 2e5), Server(4.0, 1e5), Server(0.5, 2e6)]


@pytest.mark.parametrize("every", [2.0, 0.4, 0.2])
def test_the_greedy_is_better_than_one_edge_and_than_the_shortest_queue(every):
    def mean(choose):
        return np.mean([simulate(choose, EDGES, arrivals(seed, every))[0] for seed in range(8)])

    found = mean(greedy())
    assert found < min(mean(single(place)) for place in range(len(EDGES)))
    assert found < mean(shortest_queue)
    assert found < 1.02 * mean(selfish)  # hardly ever worse, and better where edges are full


def test_joules_are_weighed_against_seconds():
    edges = [Server(1.0, 1e6, watts=2.0), Server(1.0, 1e5, watts=0.05)]
    tasks = arrivals(1, 3.0, 100)
    quick, frugal = (simulate(greedy(weight), edges, tasks) for weight in (1.0, 0.0))
    assert quick[0] < frugal[0] and quick[1] > frugal[1]
