"""Rounding with second moments: the loss it minimises, the paper's own update, and moments that cannot be."""

import numpy as np
import pytest

from shoal.converters.quantize import rtn
from shoal.converters.quantize.gptq import Rounding, search
from shoal.converters.recipe import Format
from shoal.runtime.errors import ConvertError

FORMATS = [Format(4), Format(4, 16, symmetric=True), Format(4, 128), Format(8, 64)]


def correlated(inputs: int, tokens: int = 600, seed: int = 3) -> np.ndarray:
    """Activations fp32 [tokens, inputs] as models have them: few directions, and channels of very different size."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((tokens, inputs // 4)) @ random.standard_normal((inputs // 4, inputs))
    x = mixed + 0.3 * random.standard_normal((tokens, inputs))
    return (x * random.lognormal(0, 1, inputs)).astype(np.float32)


def loss(weights, codes, group: int, x) -> float:
    return float(np.linalg.norm((codes.dequantize(group)[:, : weights.shape[1]] - weights) @ x.T))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("inputs", [128, 300, 700])  # whole groups, a padded one, several blocks of carried errors
def test_the_output_errs_less_than_rounded_to_nearest(format, inputs):
    x = correlated(inputs)
    weights = np.random.default_rng(1).standard_normal((40, inputs)).astype(np.float32)
    found = Rounding(x.T @ x, format).quantize(weights)
    nearest = rtn.quantize(weights, format)
    assert found.values.shape == nearest.values.shape
    assert found.values.max() < 1 << format.bits
    assert loss(weights, found, format.group, x) < 0.7 * loss(weights, nearest, format.group, x)


def test_it_is_the_papers_update():
    """Frantar et al. 2022, eq. 2 and 3, with the inverse of what remains made anew at every step, on the same grid."""
    inputs, format = 16, Format(4, 16)
    x = correlated(inputs, seed=8)
    weights = np.random.default_rng(2).standard_normal((5, inputs)).astype(np.float32)
    moments = (x.T @ x).astype(np.float64)
    found = Rounding(x.T @ x, format).quantize(weights)
    scale, zero = found.scales[:, 0].astype(np.float64), found.zeros[:, 0].astype(np.float64)
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(inputs)
    left = weights.astype(np.float64)
    for j in reversed(range(inputs)):
        inverse = np.linalg.inv(damped[: j + 1, : j + 1])
        codes = np.clip(np.rint(left[:, j] / scale + zero), 0, 15)
        np.testing.assert_array_equal(found.values.reshape(5, inputs)[:, j], codes)
        error = left[:, j] - (codes - zero) * scale
        left[:, : j + 1] -= np.outer(error / inverse[j, j], inverse[j])


def test_rows_are_rounded_by_themselves():
    x = correlated(96)
    weights = np.random.default_rng(4).standard_normal((30, 96)).astype(np.float32)
    rounding = Rounding(x.T @ x, Format(4))
    whole, parts = rounding.quantize(weights), [rounding.quantize(weights[start : start + 7]) for start in (0, 7, 14)]
    for index, part in enumerate(parts):
        np.testing.assert_array_equal(part.values, whole.values[7 * index : 7 * index + 7])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_scale_costs_no_more_than_the_widest(format):
    random = np.random.default_rng(6)
    values = random.standard_t(3, (format.group, 50)).astype(np.float32)
    shares = random.lognormal(0, 1, format.group).astype(np.float32)
    scale, zero = search(values, shares, format)

    def cost(scale, zero):
        codes = np.clip(np.rint(values / scale + zero), 0, (1 << format.bits) - 1)
        return (shares[:, None] * (values - (codes - zero) * scale) ** 2).sum(0)

    nearest = rtn.quantize(np.ascontiguousarray(values.T), format)
    widest = cost(nearest.scales[:, 0], nearest.zeros[:, 0].astype(np.float32))
    assert (cost(scale, zero.astype(np.float32)) <= widest * 1.001).all()


@pytest.mark.parametrize("kind", ["one direction", "inputs that never fire", "nothing fires", "one token"])
def test_degenerate_moments(kind):
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
    found = Rounding(x.T @ x, Format(4)).quantize(weights)
    restored = found.dequantize(32)
    assert np.isfinite(restored).all()
    assert not restored[3].any()
    assert loss(weights, found, 32, x) <= loss(weights, rtn.quantize(weights, Format(4)), 32, x) + 1e-6


@pytest.mark.parametrize(
    "moments", [np.ones((4, 5)), np.full((32, 32), np.nan), np.diag([-1.0] * 32), np.diag([np.inf] * 32)]
)
def test_moments_that_cannot_be(moments):
    with pytest.raises(ConvertError):
        Rounding(moments.astype(np.float32), Format(4))
