"""Levels: where values go, which steps are steps, and that nothing depends on the machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from hypothesis.extra.numpy import arrays

from shoal.runtime.errors import UsageError
from shoal.runtime.split.quantise import Quantiser

finite = some.floats(width=32, allow_nan=False, allow_infinity=False)


def test_the_nearest_level_and_clipping():
    quantiser = Quantiser(2, [0.5], [-1])  # -1, -0.5, 0, 0.5
    latents = np.array([[-9, -1, -0.76, -0.75, -0.74, -0.25, 0.25, 0.5, 3e38]], np.float32)
    symbols = quantiser.quantise(latents)
    assert symbols.dtype == np.uint8 and symbols.tolist() == [[0, 0, 0, 0, 1, 2, 2, 3, 3]]  # ties go to the even level
    assert quantiser.dequantise(symbols).tolist() == [[-1, -1, -1, -1, -0.5, 0, 0, 0.5, 0.5]]


def test_each_channel_has_its_own_steps():
    quantiser = Quantiser(1, [1, 100], [0, -50])
    latents = np.array([0.2, 0.9, -60, 60], np.float32).reshape(1, 2, 2)
    assert quantiser.quantise(latents).tolist() == [[[0, 1], [0, 1]]]
    assert quantiser.dequantise(quantiser.quantise(latents)).tolist() == [[[0, 1], [-50, 50]]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per_channel", [True, False])
def test_fitted_steps_span_the_samples(bits, per_channel):
    latents = np.random.default_rng(bits).normal(3, 2, (5, 4, 6, 7)).astype(np.float32)
    latents[:, 1] = 7  # a channel that never moves
    latents[:, 2] = 0
    quantiser = Quantiser.fit(latents, bits, per_channel=per_channel)
    assert len(quantiser.scales) == (4 if per_channel else 1)
    back = quantiser.dequantise(quantiser.quantise(latents))
    assert (abs(back - latents) <= quantiser.scales.max() * 0.5001).all()
    assert abs(back[:, 1] - 7).max() <= (1e-5 if per_channel else quantiser.scales[0])


@given(arrays(np.float32, (2, 3, 2), elements=finite), some.integers(1, 8))
def test_any_finite_values_have_steps_and_levels_are_kept(latents, bits):
    try:
        quantiser = Quantiser.fit(latents, bits)
    except UsageError:
        assert np.ptp(latents.astype(np.float64)) > 3e38  # more than fp32 can span
        return
    symbols = quantiser.quantise(latents)
    assert symbols.max() < 2**bits
    assert (quantiser.quantise(quantiser.dequantise(symbols)) == symbols).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(wrong):
    latents = np.zeros((1, 2, 3), np.float32)
    latents[0, 1, 2] = wrong
    with pytest.raises(UsageError, match="NaN or infinity"):
        Quantiser(8, [1], [0]).quantise(latents)
    with pytest.raises(UsageError, match="NaN or infinity"):
        Quantiser.fit(latents, 8)


@pytest.mark.parametrize(
    "latents", [np.zeros((2, 3)), np.zeros(3, np.float32), np.zeros((0, 2), np.float32), np.zeros((1, 3), np.float32)]
)
def test_other_arrays_are_refused(latents):
    with pytest.raises(UsageError):
        Quantiser(8, [1, 1], [0, 0]).quantise(latents)


@pytest.mark.parametrize(
    "scale, offset",
    [(0, 0), (-1, 0), (np.nan, 0), (np.inf, 0), (1, np.nan), (1e-9, 1), (1e-7, 1), (3e38, 0), (1, -3e38)],
)
def test_steps_that_are_none(scale, offset):
    with pytest.raises(UsageError, match="cannot tell apart"):
        Quantiser(8, [scale], [offset])


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_bits(bits):
    with pytest.raises(UsageError, match="They are 1 to 8"):
        Quantiser(bits, [1], [0])
