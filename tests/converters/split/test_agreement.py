"""What answers are worth: labels, pixels and boxes that the uncut network has too."""

import numpy as np
import pytest

from shoal.converters.split import agreement
from shoal.runtime.errors import UsageError


def lines(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """A map [1, 40, 60] with these regions."""
    found = np.zeros((1, 40, 60), np.float32)
    for left, top, right, bottom in boxes:
        found[0, top:bottom, left:right] = 0.9
    return found


def test_boxes_count_once_and_over_all_rows():
    uncut = np.stack([lines((5, 5, 25, 11), (5, 25, 25, 31)), lines((30, 5, 50, 12)), lines()])
    assert agreement.boxes(uncut, uncut) == 1
    moved = np.stack([lines((6, 5, 26, 11), (40, 25, 55, 31)), lines(), lines()])  # one there, one elsewhere, one lost
    assert agreement.boxes(moved, uncut) == pytest.approx(2 * 1 / (2 + 3))
    assert agreement.boxes(uncut[2:], uncut[2:]) == 1  # nothing, and nothing was to be found
    assert agreement.boxes(uncut[:1], uncut[2:]) == 0
    assert agreement.present(uncut).tolist() == [True, True, False]


def test_pixels_and_classes():
    uncut = np.stack([lines((0, 0, 10, 10))])
    assert agreement.pixels(np.stack([lines((0, 0, 10, 5))]), uncut) == pytest.approx(2 * 50 / 150)
    kinds = np.random.default_rng(0).random((2, 3, 8, 8))
    assert agreement.pixels(kinds, kinds[:, ::-1]) < agreement.pixels(kinds, kinds) == 1
    assert agreement.classes(np.eye(4), np.array([0, 1, 2, 0])) == 0.75


def test_a_measure_is_of_answers_of_its_shape():
    assert agreement.named("", (10,)) is agreement.classes and agreement.named("", (1, 8, 8)) is agreement.pixels
    assert agreement.named("boxes", (1, 8, 8)) is agreement.boxes
    for name, shape in (("classes", (1, 8, 8)), ("boxes", (10,)), ("boxes", (2, 8, 8)), ("pixels", (10,))):
        with pytest.raises(UsageError, match=name):
            agreement.named(name, shape)
