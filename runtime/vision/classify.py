"""Logits of a classifier as labels. numpy only."""

from collections.abc import Sequence

import numpy as np

from ..errors import UsageError


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, fp32."""
    shifted = np.exp(np.float32(logits) - np.max(logits, axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def classify(
    logits: np.ndarray, labels: Sequence[str] = (), top: int = 5, *, probabilities: bool = False
) -> list[list[tuple[str, float]]]:
    """For each row of logits [n, classes] the `top` likeliest labels (without any, the class's number) with their
    probabilities, the likeliest first, of equal ones the first. `probabilities`: the network has its own softmax."""
    logits = np.asarray(logits)
    if logits.ndim != 2 or (labels and len(labels) != logits.shape[1]):
        why = f"The logits are {list(logits.shape)}, and there are {len(labels)} labels."
        raise UsageError("The answer cannot be read.", why, "Give logits [n, classes] and a label for each class.")
    shares = logits if probabilities else softmax(logits)
    found = np.argsort(-shares, axis=1, kind="stable")[:, : max(1, top)]
    return [
        [(labels[one] if labels else str(one), float(row[one])) for one in best.tolist()]
        for row, best in zip(shares, found, strict=True)
    ]
