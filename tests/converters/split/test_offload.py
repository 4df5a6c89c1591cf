"""Training a choice among several edges: its worlds are the runtime's, and what is trained is better than chance."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shoal.converters.split import offload, offload_sac
from shoal.converters.split.worlds import Context, contexts, play
from shoal.runtime.events import Event
from shoal.runtime.split.learned import Policy, View, encode
from shoal.runtime.split.offload import Server, Task, greedy, simulate


def cheapest(view: View) -> np.ndarray:
    return encode(view)[1].argmin(1)


def blind(view: View) -> np.ndarray:
    rng = np.random.default_rng(len(view.work) + int(1e6 * view.work.sum()) % 1000)
    return np.where(view.present, rng.random(view.present.shape), -1).argmax(1)


def paid(choose, context: Context) -> np.ndarray:
    """What is made least, a task, in each world."""
    seconds, joules = play(choose, context)
    return context.weight * seconds + (1 - context.weight) * context.scale * joules / context.at.shape[1]


def test_many_worlds_at_once_are_the_runtime_s_one_by_one():
    found = contexts(np.random.default_rng(5), 6, 120)
    seconds, joules = play(cheapest, found)
    for world in range(6):
        edges = [
            Server(*(getattr(found, name)[world, edge] for name in ("speed", "rate", "watts", "joules")))
            for edge in np.flatnonzero(found.present[world])
        ]
        tasks = [Task(*row) for row in zip(found.at[world], found.nbytes[world], found.work[world], strict=True)]
        expected = simulate(greedy(found.weight[world], found.scale[world]), edges, tasks)
        assert (seconds[world], joules[world]) == pytest.approx(expected)


def test_the_network_is_the_same_on_a_device():
    torch.manual_seed(1)
    network = offload.Network(16, 2.0)
    torch.nn.init.normal_(network.layers[-1].weight)
    rng = np.random.default_rng(2)
    features, costs, _ = offload.episode(network.policy(), contexts(rng, 8, 20), rng)
    with torch.no_grad():
        expected = network(torch.from_numpy(features), torch.from_numpy(costs)).numpy()
    present = np.isfinite(costs)
    found = Policy.from_bytes(network.policy().to_bytes()).scores(features, costs)
    np.testing.assert_allclose(found[present], expected[present], rtol=1e-4, atol=1e-4)
    assert not present.all() and (expected[~present] < -1e8).all() and np.isneginf(found[~present]).all()


def test_what_is_paid_later_counts_less():
    expected = [[1 + 0.5 * (2 + 0.5 * 4)], [2 + 0.5 * 4], [4]]
    assert offload.to_go(np.array([[1.0], [2.0], [4.0]]), 0.5).tolist() == expected


SHORT = offload.Schedule(rounds=25, worlds=8, copies=4, tasks=40, greed=0.0, hidden=16, rate=1e-2, batch=512)
SHORT_SAC = offload_sac.Schedule(rounds=20, worlds=8, tasks=40, updates=20, batch=256, hidden=16, rate=3e-3)
IMITATE = offload_sac.Schedule(rounds=0, warm=6, tasks=40, batch=128, rate=3e-3)


@pytest.mark.parametrize(
    ("train", "schedule"),
    [(offload.anticipate, SHORT), (offload_sac.train, SHORT_SAC), (offload_sac.train, IMITATE)],
    ids=["policy gradient", "soft actor-critic", "imitation"],
)
def test_a_short_training_is_better_than_chance(train, schedule):
    """From scores that know nothing of the marginal cost, in worlds that were not trained in."""
    unseen = contexts(np.random.default_rng(77), 24, 100)
    events: list[Event] = []
    found = train(schedule, 0, events.append)
    assert found.greed == 0 and events[-1].done == events[-1].total == len(events)
    ratios = np.log(paid(lambda view: found.scores(*encode(view)).argmax(1), unseen) / paid(blind, unseen))
    assert ratios.mean() + 4 * ratios.std() / len(ratios) ** 0.5 < np.log(0.7)


@pytest.mark.parametrize(("train", "schedule"), [(offload.anticipate, SHORT), (offload_sac.train, SHORT_SAC)])
def test_a_seed_says_all(train, schedule):
    brief = replace(schedule, rounds=2)
    assert train(brief, 1).to_bytes() == train(brief, 1).to_bytes() != train(brief, 2).to_bytes()


def test_what_is_shipped_is_better_than_the_greedy_where_it_was_not_trained():
    unseen = contexts(np.random.default_rng(78), 48, 150)
    shipped = Policy.shipped()
    ratios = np.log(paid(lambda view: shipped.scores(*encode(view)).argmax(1), unseen) / paid(cheapest, unseen))
    assert ratios.mean() + 2 * ratios.std() / len(ratios) ** 0.5 < 0
