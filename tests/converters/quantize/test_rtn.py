"""Rounding to nearest: no weight further from its value than the format's step allows, whatever the values are."""

import numpy as np
import pytest

from shoal.converters.quantize import rtn
from shoal.converters.recipe import Format

FORMATS = [Format(bits, group, symmetric) for bits in (8, 4) for group in (16, 32, 128) for symmetric in (False, True)]
TINY = float(np.finfo(np.float32).tiny)

rng = np.random.default_rng(5)
ROWS = {
    "normal": rng.standard_normal((7, 200)),
    "one group, and less": rng.standard_normal((3, 5)),
    "heavy tails": rng.standard_t(1.5, (5, 256)),
    "one sign": 3 + rng.random((4, 128)),
    "the other sign": -3 - rng.random((4, 128)),
    "zeros": np.zeros((2, 96)),
    "constants": np.repeat([[0.7], [-1e-3], [1e30]], 100, axis=1),
    "one outlier": np.eye(4, 160) * 1e4 + rng.standard_normal((4, 160)) * 1e-3,
    "huge": rng.choice([-3e38, 1e38, 0, 3e38], (4, 130)),
    "close to nothing": rng.standard_normal((4, 64)) * 1e-34,
    "denormal": rng.standard_normal((4, 64)) * 1e-40,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_no_weight_moves_further_than_half_a_step(format, name):
    rows = ROWS[name].astype(np.float32)
    codes = rtn.quantize(rows, format)
    groups = -(-rows.shape[1] // format.group)
    assert codes.values.shape == (len(rows), groups * format.group) and codes.values.max() < 1 << format.bits
    assert codes.scales.shape == codes.zeros.shape == (len(rows), groups)
    assert np.isfinite(codes.scales).all() and (np.abs(codes.scales) >= TINY).all()
    padded = rtn.grouped(rows, format.group).astype(np.float64)
    scales, zeros = codes.scales.astype(np.float64)[..., None], codes.zeros.astype(np.float64)[..., None]
    stored = scales * (codes.values.reshape(padded.shape) - zeros)
    # A symmetric format has one code less on one side: what lies beyond its last one is held there, a step away at most
    top = (1 << format.bits) - 1
    beyond = padded / scales + zeros > top + 0.5001
    assert format.symmetric or not beyond.any()
    steps = np.abs(stored - padded) / np.abs(scales)
    assert steps[~beyond].max() <= 0.5002 and steps.max() <= 1.0001
    # The step is what the range asks for, where that is a number that float32 holds to full precision
    span = np.maximum(padded.max(-1), 0) - np.minimum(padded.min(-1), 0)
    step = np.abs(padded).max(-1) * 2 / (top + 1) if format.symmetric else span / top
    np.testing.assert_allclose(np.abs(codes.scales), np.where(step < TINY, 1, step), rtol=1e-5)
    # Zero is exact, so padding costs nothing and changes nothing
    assert (stored[padded == 0] == 0).all()
    if name != "huge":  # whose product may pass the largest float by half a step
        np.testing.assert_allclose(codes.dequantize(format.group).reshape(padded.shape), stored, rtol=1e-6)


def test_an_extreme_is_exact():
    """Of a symmetric group the longer side, of any other both ends of the range to within the zero point's rounding."""
    rows = np.array([[-8.0, 3, 7, 0.2] * 4, [8.0, -3, -7, 0.2] * 4], np.float32)
    stored = rtn.quantize(rows, Format(4, 16, True)).dequantize(16)
    assert stored[:, 0].tolist() == [-8, 8]
    rows = np.linspace(0, 255, 256, dtype=np.float32)[None]
    assert (rtn.quantize(rows, Format(8, 256)).dequantize(256) == rows).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 2, 15, 32])
def test_packed_codes_come_back(bits, count):
    codes = rng.integers(0, 1 << bits, (6, count), dtype=np.uint8)
    packed = rtn.pack(codes, bits)
    assert packed.shape == (6, -(-count * bits // 8)) and packed.flags.c_contiguous
    assert (rtn.unpack(packed, bits, count) == codes).all()
    if bits == 4 and count > 1:
        assert (packed[:, 0] == codes[:, 0] + 16 * codes[:, 1]).all()  # low nibble first
