"""Early exits: an answer from a feature on the way, and how far its confidence can be believed.

A classifier's highest softmax says more than it knows; one temperature, fitted on data that trained nothing, mends most
of it (Guo et al. 2017). An exit answers where its calibrated confidence reaches a threshold, as in SPINN (Laskaridis et
al. 2020). It knows nothing about networks beyond the feature it is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from shoal.runtime.errors import UsageError


class Exit(nn.Module):
    """A feature fp32 [n, channels, ...] to logits [n, classes]: a hidden layer where `hidden` is not 0, then the mean
    over positions and a linear layer. An early feature of a deep network knows little of classes by itself: `halvings`
    convolutions of `hidden` channels and stride 2 take the layer's place. `temperature` divides the logits and leaves
    the answer as it is."""

    def __init__(self, channels: int, classes: int, hidden: int = 0, halvings: int = 0):
        super().__init__()
        layers: list[nn.Module] = []
        for at in range(halvings):
            inner = hidden if at else channels
            layers += [nn.Conv2d(inner, hidden, 3, 2, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
        if hidden and not halvings:
            layers = [nn.Conv2d(channels, hidden, 1), nn.ReLU()]
        self.layers = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(hidden or channels, classes)
        )
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, feature):
        return self.layers(feature) / self.temperature


def confidences(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The highest softmax of each row of logits [n, classes]."""
    scaled = np.asarray(logits, np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    return 1 / np.exp(scaled).sum(1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature from 1/20 to 20 with the least cross-entropy on held-out logits [n, classes], labels [n]."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or len(logits) != len(labels) or not len(logits):
        raise UsageError(
            "No temperature fits these.", f"Logits are {logits.shape}, labels {len(labels)}.", "Give both."
        )

    def entropy(log: float) -> float:
        scaled = logits / np.exp(log)
        scaled -= scaled.max(1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels)), labels]).mean())

    low, high, golden = -np.log(20), np.log(20), (5**0.5 - 1) / 2
    while high - low > 1e-4:  # convex in 1 / T, so with one minimum in log T
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if entropy(left) < entropy(right) else (left, high)
    return float(np.exp((low + high) / 2))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: by bins of confidence, the mean of |accuracy - confidence|, weighed by rows."""
    of = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)
    gap = np.bincount(of, np.asarray(correct, float) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(of))


@dataclass(frozen=True)
class Point:
    """At this threshold a part `exits` of the rows leaves early, and all together have this accuracy."""

    threshold: float
    exits: float
    accuracy: float


def curve(confidence: np.ndarray, early: np.ndarray, late: np.ndarray, thresholds: Sequence[float]) -> list[Point]:
    """What each threshold gives, of rows whose early and late answers are right (bool [n])."""
    points = []
    for threshold in thresholds:
        leaves = np.asarray(confidence) >= threshold
        points.append(Point(float(threshold), float(leaves.mean()), float(np.where(leaves, early, late).mean())))
    return points
