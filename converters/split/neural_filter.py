"""Whether there is anything in a picture that is worth sending: a tiny network on the stem's output, and its threshold.

After Matsubara and Levorato (2020). The threshold is read off held-out rows so that a wanted part of those with
something in them passes; what it really passes is to be measured on others. It knows nothing about detectors.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shoal.runtime.errors import UsageError

from .distil import Batch, Loss, Rows

_BATCH = 250


class NeuralFilter(nn.Module):
    """A feature fp32 [n, *feature], (channels, h, w), to logits [n, 2]: nothing, something. The paper's has `side` 64,
    to which a larger feature is averaged, and `width` 64. Its answer is for each of 8 x 8 places; `anywhere` looks for
    the strongest one instead, wherever it is, which needs fewer pictures to learn from."""

    def __init__(self, feature: Sequence[int], side: int = 64, width: int = 64, anywhere: bool = False):
        super().__init__()
        channels, height, length = feature
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        factor = max(min(height, length) // side, 1)
        self.layers = nn.Sequential(
            *[nn.AvgPool2d(factor)] * (factor > 1),
            nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, quarter, 2, bias=False), nn.BatchNorm2d(quarter), nn.ReLU(),
        )  # fmt: skip
        sides = [((side // factor // 2 + 1) // 2) - 1 for side in (height, length)]
        if min(sides) < 1:
            why = f"The feature is {list(feature)}."
            raise UsageError("There is no filter on a feature so small.", why, "Take an earlier one.")
        pool = min(max(side // 32, 1), *sides)
        numbers = quarter * (1 if anywhere else (sides[0] // pool) * (sides[1] // pool))
        self.layers.append(nn.AdaptiveMaxPool2d(1) if anywhere else nn.AvgPool2d(pool))
        self.layers.extend([nn.Flatten(1), nn.Linear(numbers, 2)])

    def forward(self, feature):
        return self.layers(feature)


def filter_loss(network: NeuralFilter) -> Loss:
    """Cross-entropy over batches of "input" (the stem's output) and "label" (1: something is there)."""

    def loss(batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return F.cross_entropy(network(batch["input"]), batch["label"].long())

    return loss


@torch.no_grad()
def scores(network: NeuralFilter, rows: Rows) -> np.ndarray:
    """fp32 [n]: how likely there is something in each row, as the head's output `score` says."""
    network.eval()
    return np.concatenate([network(batch["input"]).softmax(1)[:, 1].numpy() for batch in rows.batches(_BATCH)])


def threshold_for(scores: np.ndarray, present: np.ndarray, recall: float) -> float:
    """The highest threshold at which at least a part `recall` of held-out rows with something in them score as high.
    Raises UsageError where none has anything in it."""
    found = np.sort(np.asarray(scores, np.float64)[np.asarray(present, bool)])[::-1]
    if not len(found) or not 0 < recall <= 1:
        why = f"{len(found)} rows have something in them."
        raise UsageError(f"No threshold has a recall of {recall}.", why, "Give labelled rows, and a recall up to 1.")
    return float(found[int(np.ceil(recall * len(found) - 1e-9)) - 1])


def saved(scores: np.ndarray, present: np.ndarray, threshold: float) -> tuple[float, float]:
    """(recall, the part of the rows without anything for which nothing is sent) at a threshold, on rows that did not
    choose it; NaN where there is no such row."""
    sent = np.asarray(scores) >= threshold
    present = np.asarray(present, bool)
    return _part(sent[present]), _part(~sent[~present])


def _part(rows: np.ndarray) -> float:
    return float(rows.mean()) if len(rows) else float("nan")
