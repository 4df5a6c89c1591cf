"""Whether there is anything in a picture that is worth sending: a tiny network on the stem's output, and its threshold.

After Matsubara and Levorato (2020). The threshold is read off held-out rows so that a wanted part of those with
something in them passes; what it really passes is to be measured on others. It knows nothing about detectors.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shoal.runtime.errors import UsageError

from .distil import Batch, Loss


class NeuralFilter(nn.Module):
    """A feature fp32 [n, channels, h, w] to logits [n, 2]: nothing, something. The paper's has `side` 64 and `width`
    64; a side that the feature has not is not pooled up to."""

    def __init__(self, channels: int, side: int = 64, width: int = 64):
        super().__init__()
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        self.side = side
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, quarter, 2, bias=False), nn.BatchNorm2d(quarter), nn.ReLU(),
        )  # fmt: skip
        self.pool = max(side // 32, 1)
        self.linear = nn.LazyLinear(2)

    def forward(self, feature):
        if feature.shape[-1] > self.side:  # an average whose windows are equal, which every exporter knows
            feature = F.avg_pool2d(feature, feature.shape[-1] // self.side)
        found = self.layers(feature)
        return self.linear(F.avg_pool2d(found, min(self.pool, found.shape[-1], found.shape[-2])).flatten(1))


def filter_loss(network: NeuralFilter) -> Loss:
    """Cross-entropy over batches of "input" (the stem's output) and "label" (1: something is there)."""

    def loss(batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return F.cross_entropy(network(batch["input"]), batch["label"].long())

    return loss


def threshold_for(scores: np.ndarray, present: np.ndarray, recall: float) -> float:
    """The highest threshold at which at least a part `recall` of held-out rows with something in them score as high.
    Raises UsageError where none has anything in it."""
    found = np.sort(np.asarray(scores, np.float64)[np.asarray(present, bool)])[::-1]
    if not len(found) or not 0 < recall <= 1:
        why = f"{len(found)} rows have something in them."
        raise UsageError(f"No threshold has a recall of {recall}.", why, "Give labelled rows, and a recall up to 1.")
    return float(found[int(np.ceil(recall * len(found) - 1e-9)) - 1])


def saved(scores: np.ndarray, present: np.ndarray, threshold: float) -> tuple[float, float]:
    """(recall, the part of the rows for which nothing is sent) at a threshold, on rows that did not choose it."""
    sent = np.asarray(scores) >= threshold
    present = np.asarray(present, bool)
    return float(sent[present].mean()), float(1 - sent.mean())
