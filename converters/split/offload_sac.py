"""GMORL's learner (Yang et al. 2025) for a choice among several edges: a discrete soft actor-critic for any preference.

The weight of seconds against joules is part of what the networks see and is drawn anew for each world. What is paid is
the marginal cost. Two critics say of each edge what follows if the task goes there; of the two the worse counts. The
actor takes edges by their soft values, V = π·(Q - α log π), and α keeps its choices as mixed as they should be. The
cost at hand is known exactly, so a critic learns only what comes after it. The actor may begin as the greedy's
imitation. docs/split.md says how it compares with `offload.anticipate`, whose network, worlds and file these are.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.split.learned import FEATURES, Policy

from .offload import Network, episode
from .worlds import contexts

_UNIT = 5.0  # what a critic's output of 1 stands for, in typical tasks' seconds


@dataclass(frozen=True)
class Schedule:
    """`rounds` of `worlds` of `tasks`; the last `kept` rounds are learned from, in `updates` of `batch` choices each.
    `warm` rounds of imitating the greedy come first. What is paid n tasks later counts `discount`^n. `mixed`: the
    entropy that α keeps, as a part of that of a blind choice. `follow`: by how much the slow critics follow each time.
    `greed` as in `offload.Schedule`: how much of the marginal cost the actor's score has that it need not learn."""

    rounds: int = 200
    worlds: int = 64
    tasks: int = 100
    kept: int = 12
    updates: int = 30
    batch: int = 1024
    warm: int = 0
    discount: float = 0.9
    mixed: float = 0.1
    follow: float = 0.01
    greed: float = 0.0
    hidden: int = 64
    rate: float = 1e-3


class Critic(nn.Module):
    """What follows of each edge [n, edges], in typical tasks' seconds. It sees all edges at each, by a mean over what
    it makes of them: what only the state decides, and no choice, would else be laid to an edge's own column."""

    def __init__(self, hidden: int):
        super().__init__()
        self.column = nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU())
        self.state = nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU())
        self.value = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, features: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
        present = (~costs.isinf())[..., None].float()
        state = (self.state(features) * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
        column = self.column(features)
        values = self.value(torch.cat([column, state.expand_as(column)], 2))[..., 0]
        return _UNIT * values - costs.nan_to_num(posinf=0.0)


class Learner:
    """An actor, two critics with slow copies, and α."""

    def __init__(self, terms: Schedule):
        self.terms = terms
        self.actor = Network(terms.hidden, terms.greed)
        self.critics = [Critic(terms.hidden) for _ in range(2)]
        self.slow = copy.deepcopy(self.critics)
        self.log_alpha = torch.full((), -2.0, requires_grad=True)
        weights = [weight for network in self.critics for weight in network.parameters()]
        groups = (self.actor.parameters(), weights, [self.log_alpha])
        self._optimisers = [torch.optim.Adam(group, terms.rate) for group in groups]

    def imitate(self, features: torch.Tensor, costs: torch.Tensor) -> None:
        """The actor's choices become the greedy's a little more: of rows [n, edges, ...]."""
        self._step(0, functional.cross_entropy(self.actor(features, costs), costs.argmin(1)))

    def update(self, here: tuple[torch.Tensor, ...], there: tuple[torch.Tensor, ...]) -> None:
        """From choices (features, costs, choice), and what was seen at the next task (features, costs)."""
        (features, costs, choice), (next_features, next_costs) = here, there
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            chances, logs = self._chances(next_features, next_costs)
            after = (chances * (_worse(self.slow, next_features, next_costs) - alpha * logs)).sum(1)
            target = -costs.gather(1, choice[:, None])[:, 0] + self.terms.discount * after
        losses = [
            functional.smooth_l1_loss(critic(features, costs).gather(1, choice[:, None])[:, 0], target)
            for critic in self.critics
        ]
        self._step(1, losses[0] + losses[1])
        chances, logs = self._chances(features, costs)
        with torch.no_grad():
            values = _worse(self.critics, features, costs)
        self._step(0, (chances * (alpha * logs - values)).sum(1).mean())
        entropy = -(chances * logs).sum(1).detach()
        wanted = self.terms.mixed * torch.log((~costs.isinf()).sum(1).float())
        self._step(2, (self.log_alpha * (entropy - wanted)).mean())
        with torch.no_grad():
            for critic, slow in zip(self.critics, self.slow, strict=True):
                for new, old in zip(critic.parameters(), slow.parameters(), strict=True):
                    old.lerp_(new, self.terms.follow)

    def _chances(self, features: torch.Tensor, costs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logs = torch.log_softmax(self.actor(features, costs), 1)
        return logs.exp(), logs.clamp(min=-50.0)  # an edge that is not present has chance 0, and -1e9 * 0 is no number

    def _step(self, which: int, loss: torch.Tensor) -> None:
        self._optimisers[which].zero_grad()
        loss.backward()
        self._optimisers[which].step()


def train(schedule: Schedule | None = None, seed: int = 0, progress: Progress = silent) -> Policy:
    """A policy by GMORL's learner. Seeded."""
    terms = schedule or Schedule()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    learner = Learner(terms)
    kept: list[tuple[torch.Tensor, ...]] = []
    for done in range(terms.warm + terms.rounds):
        seen = episode(learner.actor.policy(), contexts(rng, terms.worlds, terms.tasks), rng)
        features, costs, choices = (torch.from_numpy(part) for part in seen)
        if done < terms.warm:
            for rows in torch.randperm(costs[..., 0].numel()).split(terms.batch):
                learner.imitate(features.flatten(0, 1)[rows], costs.flatten(0, 1)[rows])
        else:
            kept = [*kept, (features, costs, choices)][-terms.kept :]
            everything = [torch.stack(part) for part in zip(*kept, strict=True)]
            for _ in range(terms.updates):
                which = torch.randint(len(kept), (terms.batch,))
                task, world = (
                    torch.randint(terms.tasks - 1, (terms.batch,)),
                    torch.randint(terms.worlds, (terms.batch,)),
                )
                here = tuple(part[which, task, world] for part in everything)
                learner.update(here, tuple(part[which, task + 1, world] for part in everything[:2]))
        paid = costs.gather(2, choices[..., None]).mean()
        progress(Event("train a choice of edges", done + 1, terms.warm + terms.rounds, f"{paid:.3f} paid", "rounds"))
    return learner.actor.policy()


def _worse(critics: list[Critic], features: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    return torch.min(critics[0](features, costs), critics[1](features, costs))
