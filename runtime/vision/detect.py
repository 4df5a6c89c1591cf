"""What a detector gives as boxes: those that are likely enough, without those that show the same thing. numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

_MOST = 1000  # boxes that are compared with each other, as many as likeliest


@dataclass(frozen=True)
class Found:
    """`box` is (x, y, x, y), left, top, right and bottom in pixels."""

    label: str
    score: float
    box: tuple[float, float, float, float]


def detect(
    boxes: np.ndarray, scores: np.ndarray, labels: Sequence[str] = (), *, form: str = "xyxy", threshold: float = 0.25,
    overlap: float = 0.5, most: int = 100,
) -> list[Found]:  # fmt: skip
    """Of one picture: boxes [k, 4] and the scores of their classes [k, classes], the likeliest first.

    `form` "xyxy" is corners, "cxcywh" the middle and the size. A box counts as its likeliest class, if that has
    `threshold`; of two of a class that overlap by more than `overlap` (intersection over union) the less likely goes.
    """
    boxes, scores = np.asarray(boxes, np.float32), np.asarray(scores, np.float32)
    wrong = boxes.ndim != 2 or boxes.shape[1:] != (4,) or scores.ndim != 2 or len(scores) != len(boxes)
    if wrong or form not in ("xyxy", "cxcywh") or (labels and len(labels) != scores.shape[1]):
        why = f"The boxes are {list(boxes.shape)} ({form}), the scores {list(scores.shape)}, the labels {len(labels)}."
        raise UsageError("The answer cannot be read.", why, "Give boxes [k, 4] and scores [k, classes].")
    if not scores.size:
        return []
    kinds, best = scores.argmax(1), scores.max(1)
    likely = np.flatnonzero(best >= threshold)  # NaN is not
    likely = likely[np.argsort(-best[likely], kind="stable")][:_MOST]
    boxes, kinds, best = boxes[likely], kinds[likely], best[likely]
    if form == "cxcywh":
        boxes = corners(boxes)
    kept = suppress(boxes, best, kinds, overlap)[:most]
    return [
        Found(labels[kinds[i]] if labels else str(kinds[i]), float(best[i]), tuple(map(float, boxes[i])))  # type: ignore
        for i in kept
    ]


def corners(boxes: np.ndarray) -> np.ndarray:
    """(middle x, middle y, width, height) as (left, top, right, bottom)."""
    middle, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([middle - half, middle + half], axis=1)


def suppress(boxes: np.ndarray, scores: np.ndarray, kinds: np.ndarray, overlap: float) -> list[int]:
    """The places of the boxes [k, 4] (corners) that stay, the likeliest first: greedy, each class by itself."""
    order = np.argsort(-scores, kind="stable")
    sizes = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(1)
    kept: list[int] = []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(int(first))
        low = np.maximum(boxes[first, :2], boxes[order, :2])
        high = np.minimum(boxes[first, 2:], boxes[order, 2:])
        shared = np.maximum(high - low, 0).prod(1)
        union = sizes[first] + sizes[order] - shared
        same = (kinds[order] == kinds[first]) & (shared > overlap * union)
        order = order[~same]
    return kept
