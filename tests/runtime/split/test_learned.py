"""A learned choice among several edges: what it sees, what it may choose, its file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.errors import BundleError, UsageError
from shoal.runtime.split.learned import FEATURES, Load, Policy, View, drain, encode, marginal
from shoal.runtime.split.offload import Server, Task, greedy, simulate
from shoal.runtime.split.offload import drain as drain_one
from shoal.runtime.split.offload import marginal as marginal_of_one

LOAD = Load(0.3, 1e5, 1.6)
works = st.lists(st.floats(0.01, 10.0), max_size=5)
amounts = st.floats(0.05, 5.0)
edges = st.lists(st.builds(Server, amounts, amounts, amounts, amounts, works.map(tuple)), min_size=1, max_size=6)


def policy(seed: int = 0, hidden: int = 8, greed: float = 1.0) -> Policy:
    rng = np.random.default_rng(seed)
    shapes = [(FEATURES, hidden), (hidden,), (hidden, hidden), (hidden,), (hidden,)]
    return Policy([rng.normal(size=shape) for shape in shapes], greed)


def view(servers: list[Server], task: Task, room: int = 7) -> View:
    """The choice as arrays, with an edge that is not there behind them."""
    numbers = np.array([[one.speed, one.rate, one.watts, one.joules] for one in servers] + [[1e3, 1e9, 0, 0]]).T
    left = np.array([[*one.works, *[0.0] * (room - len(one.works))] for one in servers] + [[0.0] * room])
    one = np.array([task.nbytes, task.work, LOAD.every, LOAD.nbytes, LOAD.work, 0.7, 1.0])[:, None]
    return View(*numbers[:, None], np.array([[True] * len(servers) + [False]]), left[None], *one)


@settings(max_examples=50, deadline=None)
@given(edges, amounts, amounts)
def test_the_marginal_cost_in_arrays_is_that_of_one(servers, nbytes, work):
    seen, task = view(servers, Task(0.0, nbytes, work)), Task(0.0, nbytes, work)
    expected = np.array([marginal_of_one(server, task) for server in servers])
    np.testing.assert_allclose(np.stack(marginal(seen), 2)[0, :-1], expected, rtol=1e-6)
    left = drain(np.array(servers[0].works), np.array(servers[0].speed), np.array(nbytes))
    expected_left = drain_one(servers[0].works, servers[0].speed, nbytes)[0]
    np.testing.assert_allclose(left[left > 1e-9], [work for work in expected_left if work > 1e-9], atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(edges, amounts, amounts, st.integers(0, 5), st.randoms(use_true_random=False))
def test_an_edge_is_scored_for_what_it_is_not_for_its_place(servers, nbytes, work, seed, random):
    found, task = policy(seed), Task(0.0, nbytes, work)
    order = list(range(len(servers)))
    random.shuffle(order)
    scores = found.scores(*encode(view(servers, task)))[0]
    moved = found.scores(*encode(view([servers[place] for place in order], task)))[0]
    np.testing.assert_allclose(moved[:-1], scores[order], rtol=1e-4, atol=1e-4)
    assert scores[-1] == moved[-1] == -np.inf  # fast as it would be, it is not there
    chosen = found.choice(LOAD, 0.7)(servers, task)
    assert 0 <= chosen < len(servers) and scores[chosen] == pytest.approx(scores[:-1].max(), abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(edges, amounts, amounts)
def test_units_do_not_matter(servers, nbytes, work):
    task, other = Task(0.0, nbytes, work), Load(LOAD.every, LOAD.nbytes * 8, LOAD.work * 1e9)
    scaled = [
        Server(one.speed * 1e9, one.rate * 8, one.watts, one.joules / 1e9, tuple(1e9 * left for left in one.works))
        for one in servers
    ]
    here = view(servers, task)
    there = view(scaled, Task(0.0, nbytes * 8, work * 1e9))
    there = View(**{**vars(there), "typical_nbytes": np.array([other.nbytes]), "typical_work": np.array([other.work])})
    np.testing.assert_allclose(encode(there)[0], encode(here)[0], atol=1e-4)


def test_without_a_network_it_is_the_greedy():
    parts = [np.zeros_like(part) for part in policy().weights]
    rng = np.random.default_rng(3)
    servers = [Server(1.0, 1.0, 0.5), Server(2.0, 0.5, 0.1, 0.2), Server(4.0, 0.2)]
    columns = np.cumsum(rng.exponential(0.3, 100)), *rng.lognormal(size=(2, 100))
    tasks = [Task(*row) for row in zip(*columns, strict=True)]
    for weight in (1.0, 0.5):
        learned = simulate(Policy(parts, 1.0).choice(Load.of(tasks), weight), servers, tasks)
        assert learned == simulate(greedy(weight), servers, tasks)


def test_a_file_is_what_was_written(tmp_path):
    data = policy(1, 64).to_bytes()
    (tmp_path / "edges.policy").write_bytes(data)
    assert Policy.load(tmp_path / "edges.policy").to_bytes() == data
    assert len(data) == 16 + 4 * (FEATURES * 64 + 64 + 64 * 64 + 64 + 64)
    with pytest.raises(BundleError, match="cannot be read"):
        Policy.load(tmp_path / "none.policy")


def test_damaged_bytes_are_refused_or_are_a_policy():
    data, rng = policy().to_bytes(), np.random.default_rng(0)
    servers, task = [Server(1.0, 1.0), Server(2.0, 1.0)], Task(0.0, 1.0, 1.0)
    refused = 0
    for trial in range(3000):
        bad = bytearray(data)
        for place in rng.integers(0, len(bad) if trial % 2 else 20, rng.integers(1, 4)):
            bad[place] = rng.integers(0, 256)
        bad = bad[: rng.integers(0, len(bad))] if trial % 5 == 0 else bad
        try:
            assert Policy.from_bytes(bytes(bad)).choice(LOAD)(servers, task) in (0, 1)
        except BundleError:
            refused += 1
    assert 1000 < refused < 3000  # a weight may be another weight


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_numbers_that_are_none_are_refused(value):
    weights = list(policy().weights)
    weights[3] = np.full_like(weights[3], value)
    with pytest.raises(UsageError, match="not finite"):
        Policy(weights, 1.0)
    with pytest.raises(UsageError, match="marginal cost"):
        Policy(policy().weights, value)
    data = policy().to_bytes()
    with pytest.raises(BundleError, match="not finite"):
        Policy.from_bytes(data[:-4] + np.float32(value).tobytes())
    with pytest.raises(BundleError, match="bytes"):
        Policy.from_bytes(data + b"\0")


def test_what_cannot_be_is_refused():
    for load in (Load(0.0, 1.0, 1.0), Load(1.0, np.inf, 1.0), Load(1.0, 1.0, np.nan)):
        with pytest.raises(UsageError, match="no such load"):
            policy().choice(load)
    for preference in ((1.5, 1.0), (0.5, -1.0), (np.nan, 1.0)):
        with pytest.raises(UsageError, match="preference"):
            policy().choice(LOAD, *preference)
    choose = policy().choice(LOAD)
    for servers in ([], [Server(0.0, 1.0)], [Server(1.0, np.nan)], [Server(1.0, 1.0, works=(np.inf,))]):
        with pytest.raises(UsageError, match="nothing to choose"):
            choose(servers, Task(0.0, 1.0, 1.0))
    for nbytes, work in ((1.0, 0.0), (np.inf, 1.0), (1.0, np.nan)):
        with pytest.raises(UsageError, match="nothing to choose"):
            choose([Server(1.0, 1.0)], Task(0.0, nbytes, work))
    with pytest.raises(UsageError, match="no load"):
        Load.of([Task(0.0, 1.0, 1.0)])
