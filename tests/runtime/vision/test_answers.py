"""From what networks give to labels and boxes."""

import numpy as np
import pytest

from shoal.runtime.errors import UsageError
from shoal.runtime.vision.classify import classify
from shoal.runtime.vision.detect import corners, detect, suppress
from shoal.runtime.vision.regions import regions


def test_the_likeliest_labels_with_their_probabilities():
    logits = np.log(np.array([[0.1, 0.6, 0.3], [0.4, 0.2, 0.4]], np.float32)) + 1000  # no overflow
    first, second = classify(logits, ["a", "b", "c"], top=2)
    assert [label for label, _ in first] == ["b", "c"] and [label for label, _ in second] == ["a", "c"]
    np.testing.assert_allclose([share for _, share in first], [0.6, 0.3], rtol=1e-3)
    assert classify(np.array([[0.25, 0.75]]), probabilities=True, top=9) == [[("1", 0.75), ("0", 0.25)]]
    with pytest.raises(UsageError, match="3"):
        classify(logits, ["a"])


def overlap(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = np.prod(np.maximum(high - low, 0))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def test_of_boxes_that_show_the_same_the_likeliest_stays():
    rng = np.random.default_rng(0)
    boxes = corners(np.concatenate([rng.uniform(20, 60, (60, 2)), rng.uniform(5, 30, (60, 2))], 1).astype(np.float32))
    scores, kinds = rng.random(60).astype(np.float32), rng.integers(0, 2, 60)
    kept = suppress(boxes, scores, kinds, 0.4)
    assert 2 < len(kept) < 60 and (np.diff(scores[kept]) <= 0).all()
    for i in range(60):  # one stays exactly if no likelier one of its class that stays overlaps it
        rivals = [k for k in kept if kinds[k] == kinds[i] and scores[k] > scores[i]]
        assert (i in kept) == all(overlap(boxes[i], boxes[k]) <= 0.4 for k in rivals)


def test_boxes_of_a_picture():
    boxes = np.array([[10, 10, 8, 8], [11, 10, 8, 8], [50, 50, 4, 2], [90, 90, 8, 8]], np.float32)
    scores = np.array([[0.6, 0.1], [0.9, 0.2], [0.1, 0.5], [0.1, np.nan]], np.float32)
    cat, dog = detect(boxes, scores, ["cat", "dog"], form="cxcywh")
    assert (cat.label, cat.box) == ("cat", (7, 6, 15, 14)) and cat.score == pytest.approx(0.9)
    assert (dog.label, dog.box) == ("dog", (48, 49, 52, 51))
    assert [one.label for one in detect(boxes, scores, form="cxcywh", overlap=0.9, most=2)] == ["0", "0"]
    assert detect(np.zeros((0, 4)), np.zeros((0, 2))) == []
    with pytest.raises(UsageError):
        detect(boxes, scores[:2])


def test_regions_are_what_a_flood_finds_grown_back():
    def flood(mask):
        left, found = {tuple(at) for at in np.argwhere(mask)}, []
        while left:
            todo, region = [left.pop()], []
            while todo:
                y, x = todo.pop()
                region.append((y, x))
                near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
                left -= near
                todo += near
            low, high = np.min(region, 0), np.max(region, 0) + 1
            found.append((low[1], low[0], high[1], high[0]))
        return sorted(found)

    rng = np.random.default_rng(0)
    for part in (0.05, 0.3, 0.5, 0.9):
        chances = rng.random((40, 57)).astype(np.float32)
        boxes, scores = regions(chances, threshold=1 - part, least=0.0, grow=0.0, smallest=1)
        assert sorted(map(tuple, boxes.astype(int).tolist())) == flood(chances > 1 - part)
        assert (scores > 1 - part).all()

    chances = np.zeros((30, 60), np.float32)
    chances[10:14, 20:44] = 0.9  # a line of text, shrunk
    chances[20:22, 5:50] = 0.9  # too thin
    chances[25:30, 40:60] = 0.5  # unlikely
    boxes, scores = regions(chances)
    more = 1.5 * 4 * 24 / (2 * 28)
    np.testing.assert_allclose(boxes, [[20 - more, 10 - more, 44 + more, 14 + more]], rtol=1e-6)
    np.testing.assert_allclose(scores, [0.9], rtol=1e-6)
    assert regions(np.zeros((3, 3)))[0].shape == (0, 4)
    with pytest.raises(UsageError, match="map"):
        regions(chances[None])
