"""What a split network's answers are worth, from 0 to 1: right labels, or agreement with the uncut network.

A classifier is measured by labels where there are any. A network that gives maps has none here: it is measured by how
much of what the uncut network says it says too, which a wrong answer of the uncut network does not change. It knows
nothing about how the answers were made.
"""

from collections.abc import Callable

import numpy as np

from shoal.runtime.errors import UsageError
from shoal.runtime.vision.regions import regions

Agreement = Callable[[np.ndarray, np.ndarray], float]
_OVERLAP = 0.5  # intersection over union of boxes that are the same


def classes(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The part of rows [n, classes] whose highest class is the label [n]."""
    return float((outputs.argmax(1) == labels).mean())


def pixels(outputs: np.ndarray, uncut: np.ndarray) -> float:
    """Of maps [n, 1, h, w]: F1 of the pixels above 0.5, over all rows. Of several channels: the part of the pixels
    whose highest channel is the same."""
    if outputs.shape[1] > 1:
        return float((outputs.argmax(1) == uncut.argmax(1)).mean())
    found, wanted = outputs > 0.5, uncut > 0.5
    return _f1(int((found & wanted).sum()), int(found.sum()), int(wanted.sum()))


def boxes(outputs: np.ndarray, uncut: np.ndarray) -> float:
    """Of maps [n, 1, h, w]: hmean of the boxes of their regions, over all rows. Two are the same where they overlap by
    half or more; the likeliest takes its best partner first."""
    same = mine = theirs = 0
    for one, other in zip(outputs, uncut, strict=True):
        (found, scores), (wanted, _) = regions(one[0]), regions(other[0])
        free = np.ones(len(wanted), bool)
        for at in np.argsort(-scores, kind="stable"):
            overlaps = _overlaps(found[at], wanted) * free
            if overlaps.size and overlaps.max() >= _OVERLAP:
                free[overlaps.argmax()] = False
        same, mine, theirs = same + int((~free).sum()), mine + len(found), theirs + len(wanted)
    return _f1(same, mine, theirs)


def present(uncut: np.ndarray) -> np.ndarray:
    """bool [n]: whether the uncut network's map [n, channels, ...] has a number above 0.5."""
    return uncut.reshape(len(uncut), -1).max(1) > 0.5


def named(name: str, shape: tuple[int, ...]) -> Agreement:
    """The measure of that name, "" for the usual one of answers of this shape [...], without the batch. Raises
    UsageError where it is not for such answers."""
    dense = len(shape) == 3
    name = name or ("pixels" if dense else "classes")
    if dense != (name != "classes") or (name == "boxes" and shape[0] != 1):
        why = f"An answer is {list(shape)}."
        raise UsageError(f"The network cannot be measured by {name!r}.", why,
                         "Give train() a function of outputs and the uncut network's.")  # fmt: skip
    return {"classes": classes, "pixels": pixels, "boxes": boxes}[name]


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.maximum(sides, 0).prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def _f1(same: int, mine: int, theirs: int) -> float:
    return 2 * same / (mine + theirs) if mine + theirs else 1.0
