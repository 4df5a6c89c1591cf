"""What a segmenting detector gives as boxes: the connected regions of a map of probabilities, grown back. numpy only.

Text detectors of this kind (DB, Liao et al. 2020) give the middle of each line, shrunk, so that lines do not touch.
"""

import numpy as np

from ..errors import UsageError

_MOST = 1000  # regions that are looked at, as many as come first


def regions(
    chances: np.ndarray, *, threshold: float = 0.3, least: float = 0.6, grow: float = 1.5, smallest: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes fp32 [k, 4] (left, top, right, bottom, in pixels) and scores fp32 [k] of a map fp32 [h, w].

    A region is pixels above `threshold` that touch, corners too; its score is their mean, which must be `least`. Its
    upright box grows by `grow` times its area / its perimeter to each side, what DB shrank it by. Boxes of less than
    `smallest` pixels in height or width are left out. Raises UsageError.
    """
    chances = np.asarray(chances)
    if chances.ndim != 2 or not chances.size:
        raise UsageError("This is no map.", f"It is {list(chances.shape)}.", "Give [h, w].")
    boxes, scores = [], []
    for rows, left, right in _connected(chances > threshold)[:_MOST]:
        low, high = np.array([left.min(), rows.min()]), np.array([right.max(), rows.max() + 1])
        sums = sum(float(chances[y, x:z].sum()) for y, x, z in zip(rows, left, right, strict=True))
        score, size = sums / float((right - left).sum()), high - low
        if score >= least and min(size) >= smallest:
            more = grow * size.prod() / (2 * size.sum())
            boxes.append(np.concatenate([np.maximum(low - more, 0), np.minimum(high + more, chances.shape[::-1])]))
            scores.append(score)
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32)


def _connected(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The runs of each region: rows, first pixels, the pixels after their last; regions by their first run."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, left = np.nonzero(edges == 1)
    right = np.nonzero(edges == -1)[1]
    above = np.searchsorted(rows, np.arange(len(mask) + 1))  # where each row's runs begin
    root = list(range(len(rows)))

    def find(run: int) -> int:
        while root[run] != run:
            root[run] = run = root[root[run]]
        return run

    for run, row in enumerate(rows):
        if row:
            begin, end = above[row - 1], above[row]
            near = begin + np.nonzero((left[begin:end] <= right[run]) & (right[begin:end] >= left[run]))[0]
            for other in near:
                one, two = sorted((find(run), find(int(other))))
                root[two] = one
    of = np.array([find(run) for run in range(len(rows))], int)
    return [(rows[of == key], left[of == key], right[of == key]) for key in np.unique(of)]
