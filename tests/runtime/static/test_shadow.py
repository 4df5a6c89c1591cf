"""The outlier path in integers: nothing is lost, whatever is clipped, and cold rows count as hot ones do."""

import numpy as np
import pytest

from shoal.runtime.errors import BackendError, BundleError
from shoal.runtime.static.layout import Shadow
from shoal.runtime.static.shadow import Outliers

INPUTS, OUTPUTS, SCALE = 96, 40, 0.037


def made(hot=(), seed=0, at=5):
    """A shadow over a section whose weights begin at an odd place; (outliers, weights, scales)."""
    draw = np.random.default_rng(seed)
    weights = draw.integers(-128, 128, (INPUTS, OUTPUTS), np.int8)
    scales = draw.random(OUTPUTS, np.float32) * 0.01
    section = bytes(at) + weights.tobytes() + bytes(3) + scales.tobytes()
    step = Shadow(0, "x", "y", SCALE, INPUTS, OUTPUTS, at, at + weights.nbytes + 3, tuple(hot), 1.0)
    return Outliers(step, memoryview(section)), weights, scales


def inputs(seed: int, rows: int = 17) -> np.ndarray:
    """Rows with a few channels far beyond the clip, and some values on the very edge of rounding."""
    draw = np.random.default_rng(seed)
    x = draw.normal(0, 40 * SCALE, (rows, INPUTS)).astype(np.float32)
    x[:, draw.choice(INPUTS, 4, replace=False)] *= 300
    edges = np.array([127.5, 126.5, -128.5, -127.5, -129.5, 128.5, 1e7], np.float32) * np.float32(SCALE)
    x[draw.integers(0, rows, 40), draw.integers(0, INPUTS, 40)] = draw.choice(edges, 40)
    return x


@pytest.mark.parametrize("seed", range(20))
def test_the_clipped_product_and_its_shadow_are_the_whole_integer_product(seed):
    outliers, weights, scales = made(hot=range(0, INPUTS, 3), seed=seed)
    x, whole = inputs(seed), weights.astype(np.int64)
    q = np.rint(x / np.float32(SCALE)).astype(np.int64)
    main = q.clip(-128, 127)
    channels, rest = outliers.residual(x)
    np.testing.assert_array_equal(channels, np.flatnonzero((q != main).any(0)))
    assert len(channels)
    np.testing.assert_array_equal(main @ whole + outliers.accumulate(channels, rest).astype(np.int64), q @ whole)
    out = np.full((len(x), OUTPUTS), np.nan, np.float32)
    outliers.run(x, out)
    missing = ((q - main) @ whole) * scales.astype(np.float64) * SCALE
    np.testing.assert_allclose(out, missing, rtol=1e-6, atol=0)


def test_hot_and_cold_rows_count_alike():
    found = []
    for hot in ((), range(INPUTS), (3, 50)):
        out = np.empty((17, OUTPUTS), np.float32)
        made(hot)[0].run(inputs(1), out)
        found.append(out)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_where_nothing_is_clipped_the_shadow_is_zero():
    outliers, *_ = made()
    out = np.ones((2, OUTPUTS), np.float32)
    outliers.run(np.full((2, INPUTS), 127.49 * SCALE, np.float32), out)
    assert not out.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_an_error(value):
    outliers, *_ = made()
    x = np.zeros((3, INPUTS), np.float32)
    x[1, 7] = value
    with pytest.raises(BackendError, match="not a number"):
        outliers.run(x, np.empty((3, OUTPUTS), np.float32))


def test_weights_beyond_the_section_are_refused():
    step = Shadow(0, "x", "y", SCALE, INPUTS, OUTPUTS, 0, 1 << 40, (), 1.0)
    with pytest.raises(BundleError, match="beyond their section"):
        Outliers(step, memoryview(bytes(INPUTS * OUTPUTS)))
