"""A small teacher that was trained on pictures drawn here: ten smooth patterns, moved, faint, and under noise."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from shoal.converters.split import distil
from shoal.converters.split.distil import CUT, Rows, Schedule

TAPS = ("first", "second")


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU())
        self.linear = nn.Linear(48, 10)

    def forward(self, x):
        return self.linear(self.second(self.first(x)).mean((2, 3)))


def head() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    )


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [count, 3, 16, 16] and labels."""
    patterns = np.random.default_rng(7).standard_normal((10, 3, 4, 4))
    patterns = patterns.repeat(4, 2).repeat(4, 3)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    found = np.stack([np.roll(patterns[label], rng.integers(-3, 4, 2), (1, 2)) for label in labels])
    found = found * rng.uniform(0.3, 1, (count, 1, 1, 1)) + 1.0 * rng.standard_normal(found.shape)
    return found.astype(np.float32), labels


@dataclass
class Teacher:
    head: nn.Module
    tail: nn.Module
    train: Rows  # input, label, the features and outputs
    test: Rows

    def accuracy(self, answer) -> float:
        """Of `answer`(input) on the test's rows."""
        with torch.no_grad():
            logits = answer(torch.from_numpy(self.test.arrays["input"]))
        return float((logits.argmax(1).numpy() == self.test.arrays["label"]).mean())

    def own_tail(self) -> nn.Module:
        return copy.deepcopy(self.tail)


def teach() -> Teacher:
    """Trains it, on one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of two, one waits for the other wherever something else runs
    network = nn.Sequential(head(), Tail())
    sets = []
    for count, seed in ((1500, 1), (1000, 2)):
        x, labels = pictures(count, seed)
        sets.append({"input": x, "label": labels})

    def loss(batch, generator):
        return nn.functional.cross_entropy(network(batch["input"]), batch["label"])

    distil.fit(network, list(network.parameters()), loss, Rows(sets[0]), Schedule(8, 50, 2e-3, cosine=True))
    network.eval().requires_grad_(False)
    for held in sets:
        held.update({key: value.numpy() for key, value in
                     distil.teach(network[0], network[1], TAPS, torch.from_numpy(held["input"])).items()})  # fmt: skip
    assert CUT in sets[0]
    return Teacher(network[0], network[1], Rows(sets[0]), Rows(sets[1]))
