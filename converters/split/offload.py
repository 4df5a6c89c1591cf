"""Trains a choice among several edges: `runtime.split.learned`'s network, in worlds that differ.

Summed over an episode, the marginal costs of all choices are the seconds of all tasks (or seconds and joules): each is
what the tasks that are there lose, seen at once instead of while it happens. So `offload.greedy` is what a learner
would be that looks at the next cost only, and what can be learned is what a choice costs tasks yet to come.

`anticipate` is a policy gradient from greedy on: the same tasks are met by several copies of a world, each choosing at
random by its scores, and a choice is as good as what its copy pays from there on, less what they all pay on average.
Tasks are not of the policy's making, so taking their luck out that way changes no gradient (Mao et al. 2019).
`offload_sac.train` is GMORL's learner. Both take edges, speeds, rates, load and preference anew for each world.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.split.learned import FEATURES, Policy, encode

from .worlds import Context, Worlds, contexts


@dataclass(frozen=True)
class Schedule:
    """`rounds` of `worlds`, each in as many `copies`, of `tasks`. What is paid n tasks later counts `discount`^n.
    Scores begin as the marginal cost times -`greed`: the higher, the less is tried. `passes` over each round's
    choices, `batch` at a time, at a `rate` that falls to 0. A choice's odds count up to `clip` away from what they
    were (PPO)."""

    rounds: int = 300
    worlds: int = 24
    copies: int = 8
    tasks: int = 150
    discount: float = 0.98
    greed: float = 10.0
    hidden: int = 64
    rate: float = 2e-3
    passes: int = 2
    batch: int = 4096
    clip: float = 0.2


class Network(nn.Module):
    """The network of `learned.Policy`, whose scores are nothing but the marginal cost's part to begin with."""

    def __init__(self, hidden: int, greed: float):
        super().__init__()
        first, second, last = nn.Linear(FEATURES, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
        self.greed = greed

    def forward(self, features: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
        """As `learned.Policy.scores`, but that -1e9 stands where an edge is not present."""
        scores = self.layers(features)[..., 0] - self.greed * cost.nan_to_num(posinf=0.0)
        return scores.masked_fill(cost.isinf(), -1e9)

    def policy(self) -> Policy:
        """As it is now."""
        parts = [part.detach().numpy() for part in self.layers.parameters()]
        return Policy([parts[0].T, parts[1], parts[2].T, parts[3], parts[4][0]], self.greed)


def anticipate(schedule: Schedule | None = None, seed: int = 0, progress: Progress = silent) -> Policy:
    """A policy that looks further than the next cost, from a policy gradient. Seeded."""
    terms = schedule or Schedule()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network = Network(terms.hidden, terms.greed)
    optimiser = torch.optim.Adam(network.parameters(), terms.rate)
    for done in range(terms.rounds):
        optimiser.param_groups[0]["lr"] = terms.rate * (1 - done / terms.rounds)
        met = contexts(rng, terms.worlds, terms.tasks)
        met = met.rows(np.repeat(np.arange(terms.worlds), terms.copies))
        features, costs, choices = episode(network.policy(), met, rng)
        paid = np.take_along_axis(costs, choices[..., None], 2)[..., 0]
        later = to_go(paid, terms.discount).reshape(terms.tasks, terms.worlds, terms.copies)
        better = later.mean(2, keepdims=True) - later
        better /= better.std((0, 2), keepdims=True) + 1e-9  # a full world's seconds count no more than an empty one's
        _improve(
            network, optimiser, _flat(features), _flat(costs), _flat(choices), _flat(better.reshape(paid.shape)), terms
        )
        progress(Event("train a choice of edges", done + 1, terms.rounds, f"{paid.mean():.3f} paid", "rounds"))
    return network.policy()


def episode(policy: Policy, context: Context, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every task's features [tasks, worlds, edges, FEATURES], costs [tasks, worlds, edges] and the choice that was made
    [tasks, worlds], at random by `policy`'s scores."""
    worlds, seen = Worlds(context), []
    for task in range(context.at.shape[1]):
        worlds.until(context.at[:, task])
        nbytes, work = context.nbytes[:, task], context.work[:, task]
        features, cost = encode(worlds.view(nbytes, work))
        scores = policy.scores(features, cost)
        choice = (scores + rng.gumbel(size=scores.shape)).argmax(1)
        worlds.place(choice, nbytes, work)
        seen.append((features, cost.astype(np.float32), choice))
    features, costs, choices = (np.stack(part) for part in zip(*seen, strict=True))
    return features, costs, choices


def to_go(paid: np.ndarray, discount: float) -> np.ndarray:
    """What is paid from each task on, of paid [tasks, ...], what comes n tasks later times `discount`^n."""
    found, rest = np.zeros_like(paid, np.float64), np.zeros(paid.shape[1:])
    for task in reversed(range(len(paid))):
        found[task] = rest = paid[task] + discount * rest
    return found


def _improve(network, optimiser, features, costs, choices, better, terms: Schedule) -> None:
    with torch.no_grad():
        before = torch.log_softmax(network(features, costs), 1).gather(1, choices[:, None])[:, 0]
    for _ in range(terms.passes):
        for rows in torch.randperm(len(choices)).split(terms.batch):
            now = torch.log_softmax(network(features[rows], costs[rows]), 1).gather(1, choices[rows, None])[:, 0]
            odds, gain = (now - before[rows]).exp(), better[rows]
            loss = -torch.min(odds * gain, odds.clamp(1 - terms.clip, 1 + terms.clip) * gain).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def _flat(array: np.ndarray) -> torch.Tensor:
    """[tasks, worlds, ...] as [tasks * worlds, ...], of floats fp32."""
    kind = np.float32 if array.dtype.kind == "f" else array.dtype
    return torch.from_numpy(array.reshape(-1, *array.shape[2:]).astype(kind))
