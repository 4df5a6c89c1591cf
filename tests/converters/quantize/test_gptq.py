"""Rounding with second moments: the loss it minimises, the paper's own update, and moments that cannot be."""

import dataclasses

import numpy as np
import pytest

from shoal.converters.quantize import rtn
from shoal.converters.quantize.gptq import Rounding
from shoal.converters.recipe import Format
from shoal.runtime.errors import ConvertError
from shoal.runtime.kernels import layout

FORMATS = [
    Format(4),
    Format(4, 64, symmetric=True),
    Format(4, 128),
    Format(3, span=128),
    Format(4, 128, span=256),
    Format(2),
    Format(8),
    Format(8, 64, symmetric=True),
]


def correlated(inputs: int, tokens: int = 600, seed: int = 3) -> np.ndarray:
    """Activations fp32 [tokens, inputs] as models have them: few directions, and channels of very different size."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((tokens, inputs // 4)) @ random.standard_normal((inputs // 4, inputs))
    x = mixed + 0.3 * random.standard_normal((tokens, inputs))
    return (x * random.lognormal(0, 1, inputs)).astype(np.float32)


def restored(codes: layout.Codes, format: Format, inputs: int) -> np.ndarray:
    return layout.dequantize(format.layout(inputs, len(codes.values)).check(), codes)


def loss(weights, codes, format: Format, x) -> float:
    return float(np.linalg.norm((restored(codes, format, weights.shape[1]) - weights) @ x.T))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("inputs", [128, 300, 700])  # whole groups, a padded one, several blocks of carried errors
def test_the_output_errs_less_than_rounded_to_nearest(format, inputs):
    x = correlated(inputs)
    weights = np.random.default_rng(1).standard_normal((40, inputs)).astype(np.float32)
    found = Rounding(x.T @ x, format).quantize(weights)
    nearest = rtn.quantize(weights, format)
    for part, same in zip(found, nearest, strict=True):
        assert part.shape == same.shape and part.dtype == same.dtype and part.flags.c_contiguous
    shape = format.layout(inputs, 40)
    if format.bits < 8:
        assert found.values.max() < 1 << format.bits and 1 <= found.multipliers.min() <= found.multipliers.max() <= 15
        top = shape.step * ((1 << format.bits) - 1)
        zeros, multipliers = found.zeros.astype(int), found.multipliers.astype(int)
        assert (multipliers * np.maximum(zeros, top - zeros)).max() <= 127
    assert not (found.scales.view(np.uint32) & 15).any()
    assert loss(weights, found, format, x) < 0.7 * loss(weights, nearest, format, x)


@pytest.mark.parametrize("format", [Format(4, 64), Format(3, 64), Format(8)], ids=str)
def test_rotated_it_is_the_same_of_rotated_weights_and_activations(format):
    x = correlated(128)
    weights = np.random.default_rng(2).standard_normal((5, 128)).astype(np.float32)
    found = Rounding(x.T @ x, format).quantize(weights)
    x, weights = layout.rotate(x), layout.rotate(weights)
    same = Rounding(x.T @ x, dataclasses.replace(format, rotated=False)).quantize(weights)
    assert (found.values != same.values).mean() < 0.02  # moments summed in another order
    np.testing.assert_allclose(found.scales, same.scales, rtol=1e-5)


@pytest.mark.parametrize("format", [Format(bits, 64, rotated=False) for bits in (4, 3, 8)], ids=str)
def test_it_is_the_papers_update(format):
    """Frantar et al. 2022, eq. 2 and 3, with the inverse of what remains made anew at every step, on the same grid."""
    inputs = 64
    x = correlated(inputs, seed=8)
    weights = np.random.default_rng(2).standard_normal((5, inputs)).astype(np.float32)
    moments = (x.T @ x).astype(np.float64)
    found = Rounding(x.T @ x, format).quantize(weights)
    step = format.layout(inputs, 5).step
    unit = found.scales[:, 0].astype(np.float64) * found.multipliers[:, 0] * step
    zero = found.zeros[:, 0].astype(np.float64) / step
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(inputs)
    left = weights.astype(np.float64)
    for j in reversed(range(inputs)):
        inverse = np.linalg.inv(damped[: j + 1, : j + 1])
        codes = np.clip(np.rint(left[:, j] / unit + zero), *rtn.code_range(format.bits))
        np.testing.assert_array_equal(found.values[:, j], codes)
        error = left[:, j] - (codes - zero) * unit
        left[:, : j + 1] -= np.outer(error / inverse[j, j], inverse[j])


def test_rows_are_rounded_by_themselves():
    x = correlated(96)
    weights = np.random.default_rng(4).standard_normal((30, 96)).astype(np.float32)
    rounding = Rounding(x.T @ x, Format(4))
    whole, parts = rounding.quantize(weights), [rounding.quantize(weights[start : start + 7]) for start in (0, 7, 14)]
    for index, part in enumerate(parts):
        # BLAS may sum in another order where there are fewer rows, and a tie then falls the other way
        assert (part.values != whole.values[7 * index : 7 * index + 7]).mean() < 0.02


@pytest.mark.parametrize("kind", ["one direction", "inputs that never fire", "nothing fires", "one token"])
@pytest.mark.parametrize("format", [Format(4), Format(3), Format(8)], ids=str)
def test_degenerate_moments(kind, format):
    x = correlated(64)
    if kind == "one direction":
        x = np.outer(x[:, 0], x[0])
    elif kind == "inputs that never fire":
        x[:, ::3] = 0
    elif kind == "nothing fires":
        x[:] = 0
    else:
        x = x[:1]
    weights = np.random.default_rng(5).standard_normal((8, 64)).astype(np.float32)
    weights[3] = 0
    found = Rounding(x.T @ x, format).quantize(weights)
    assert np.isfinite(restored(found, format, 64)).all()
    assert (np.abs(restored(found, format, 64)[3]) < 1e-25).all()
    assert loss(weights, found, format, x) <= loss(weights, rtn.quantize(weights, format), format, x) + 1e-6


@pytest.mark.parametrize(
    "format", [Format(bits, 32, symmetric, 64) for bits in (4, 3, 2) for symmetric in (False, True)], ids=str
)
def test_what_is_carried_to_where_nothing_was_is_dropped(format):
    x = correlated(128)
    weights = np.random.default_rng(5).standard_normal((8, 128)).astype(np.float32)
    weights[::2, :64] = 0
    found = restored(Rounding(x.T @ x, format).quantize(weights), format, 128)
    assert (np.abs(found[::2, :64]) < 1e-25).all()
    assert np.linalg.norm(found - weights) < np.linalg.norm(weights)


@pytest.mark.parametrize(
    "moments", [np.ones((4, 5)), np.full((32, 32), np.nan), np.diag([-1.0] * 32), np.diag([np.inf] * 32)]
)
def test_moments_that_cannot_be(moments):
    with pytest.raises(ConvertError):
        Rounding(moments.astype(np.float32), Format(4))
