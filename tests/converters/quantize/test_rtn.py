"""Rounding to nearest: the format's limits are kept, no search is far from the best there is, and it beats the plain
way, whatever the values are."""

import dataclasses

import numpy as np
import pytest

from shoal.converters.quantize import rtn
from shoal.converters.recipe import Format
from shoal.runtime.kernels import layout
from shoal.runtime.kernels.layout import LinearFormat

FORMATS = [
    *(Format(bits, group, symmetric) for bits in (4, 3, 2) for group in (32, 128) for symmetric in (False, True)),
    Format(4, 64, span=128),
    Format(4, 128, span=256),
    *(Format(8, group, symmetric) for group in (0, 64) for symmetric in (False, True)),
    Format(4, rotated=False),
    Format(8, rotated=False),
]

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


def integers(codes: layout.Codes, shape: LinearFormat) -> np.ndarray:
    """What a weight is of its scale, for every weight."""
    zeros, multipliers = (
        np.repeat(part.astype(int), shape.group, 1)[:, : shape.padded] for part in (codes.zeros, codes.multipliers)
    )
    return multipliers * (shape.step * codes.values.astype(int) - zeros)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_comes_out_is_the_format(format, name):
    rows = ROWS[name].astype(np.float32)
    shape = format.layout(rows.shape[1], len(rows)).check()
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        codes = rtn.quantize(rows, format)
    assert codes.values.shape == (len(rows), shape.padded) and codes.scales.shape == (len(rows), shape.spans)
    assert codes.multipliers.shape == codes.zeros.shape == (len(rows), shape.groups)
    assert np.isfinite(codes.scales).all() and (codes.scales > 0).all()
    assert not (codes.scales.view(np.uint32) & 15).any()  # so that scale times multiplier is exact
    assert all(part.flags.c_contiguous for part in codes)
    if format.bits == 8:
        assert codes.values.dtype == codes.zeros.dtype == np.int8 and (codes.multipliers == 1).all()
        assert not format.symmetric or not codes.zeros.any()
    else:
        assert codes.values.dtype == codes.zeros.dtype == np.uint8 and codes.values.max() < 1 << format.bits
        assert codes.multipliers.min() >= 1 and codes.multipliers.max() <= 15
        top = shape.step * ((1 << format.bits) - 1)
        zeros, multipliers = codes.zeros.astype(int), codes.multipliers.astype(int)
        assert (multipliers * np.maximum(zeros, top - zeros)).max() <= 127  # any code at all fits int8
        assert zeros.max() <= 15 and (not format.symmetric or np.isin(zeros, (top // 2, (top + 1) // 2)).all())


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_are_the_nearest_and_few_weights_are_cut_off(format, name):
    rows = ROWS[name].astype(np.float32)
    shape = format.layout(rows.shape[1], len(rows))
    codes = rtn.quantize(rows, format)
    plain = dataclasses.replace(shape, rotated=0)
    rows = layout.rotate(rows) if shape.rotated else rows  # as they are stored
    scales = np.repeat(codes.scales.astype(np.float64), shape.span, 1)[:, : shape.inputs]
    units = scales * shape.step * np.repeat(codes.multipliers, shape.group, 1)[:, : shape.inputs]
    stored = scales * integers(codes, shape)[:, : shape.inputs]
    low, high = rtn.code_range(format.bits)
    inside = (codes.values > low) & (codes.values < high)
    steps = (np.abs(stored - rows) / units)[inside[:, : shape.inputs]]
    assert not steps.size or steps.max() <= 0.5002
    # What is cut off, of the widest group alone, is a twentieth of it and a step
    most = np.abs(rows).max(1, keepdims=True) + 1e-30
    assert format.bits < 4 or (np.abs(stored - rows) <= 0.2 * most).all()
    if format.bits in (4, 8):
        assert not stored[rows == 0].any()
    assert (np.abs(stored[(rows == 0).all(1)]) < 1e-25).all()
    if name != "huge":  # where a weight may pass the largest float by half a step
        np.testing.assert_allclose(layout.dequantize(plain, codes), stored, rtol=1e-6)
        back = layout.rotate(stored.astype(np.float32)) if shape.rotated else stored
        np.testing.assert_allclose(layout.dequantize(shape, codes), back, rtol=1e-6, atol=1e-6 * np.abs(back).max())


def relative(rows: np.ndarray, stored: np.ndarray) -> float:
    return float(np.linalg.norm(stored - rows) / np.linalg.norm(rows))


def absmax(rows: np.ndarray) -> np.ndarray:
    """The plain way to 4 bits: a float scale for 32 inputs, whose longest is -8 (llama.cpp's Q4_0)."""
    groups = rows.reshape(len(rows), -1, 32)
    scales = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1) / -8
    return (np.clip(np.rint(groups / scales), -8, 7) * scales).reshape(rows.shape)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["normal", "laplace", "t", "rows and columns that differ"])
def test_four_bits_with_a_scale_a_row_beat_a_float_scale_a_group(kind, symmetric):
    random = np.random.default_rng(7)
    rows = {
        "normal": lambda: random.standard_normal((64, 896)),
        "laplace": lambda: random.laplace(size=(64, 896)),
        "t": lambda: random.standard_t(5, (64, 896)),
        "rows and columns that differ": lambda: (
            random.standard_normal((64, 896)) * random.lognormal(0, 1, (64, 1)) * random.lognormal(0, 0.3, 896)
        ),
    }[kind]().astype(np.float32)
    format = Format(4, 32, symmetric)
    stored = layout.dequantize(format.layout(896, 64), rtn.quantize(rows, format))
    assert relative(rows, stored) < (1 if symmetric else 0.93) * relative(rows, absmax(rows))


BITS = {4: 0.10, 3: 0.20, 2: 0.40, 8: 0.012}


@pytest.mark.parametrize("bits", BITS)
def test_what_rounding_costs(bits):
    """Of normal weights, so that a change of the search shows."""
    rows = np.random.default_rng(3).standard_normal((64, 512)).astype(np.float32)
    format = Format(bits)
    assert relative(rows, layout.dequantize(format.layout(512, 64), rtn.quantize(rows, format))) < BITS[bits]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_group_is_searched_nearly_as_well_as_by_trying_everything(bits, symmetric, weighted):
    random = np.random.default_rng(9)
    rows = (random.standard_normal((64, 256)) * random.lognormal(0, 0.3, (64, 256))).astype(np.float32)
    shape = Format(bits, symmetric=symmetric).layout(256, 64)
    values = rtn.columns(rows, shape)
    values /= rtn.scales(values, shape, symmetric)[0]
    top = shape.step * ((1 << bits) - 1)
    roots = random.lognormal(0, 0.5, shape.group).astype(np.float32) if weighted else np.ones(shape.group, np.float32)
    found = all_of_them = 0.0
    for start in range(0, 256, shape.group):
        group = values[start : start + shape.group]

        def cost(multiplier, zero, group=group):
            codes = np.clip(np.rint((group / multiplier + zero) / shape.step), 0, (1 << bits) - 1)
            errors = (codes * shape.step - zero) * multiplier - group
            return np.square(errors * roots[:, None]).sum(0)

        found += cost(*rtn.search(group, shape, symmetric, roots if weighted else None)).sum()
        zeros = {top // 2, (top + 1) // 2} if symmetric else range(top + 1)
        pairs = [(m, z) for m in range(1, 16) for z in zeros if m * max(z, top - z) <= 127]
        all_of_them += np.min([cost(*pair) for pair in pairs], 0).sum()
    assert all_of_them <= found <= all_of_them * (1.03 if bits == 4 else 1.1)


def test_both_ends_of_eight_bits_are_exact():
    rows, format = np.linspace(0, 255, 256, dtype=np.float32)[None], Format(8, rotated=False)
    assert (layout.dequantize(format.layout(256, 1), rtn.quantize(rows, format)) == rows).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rotated_an_outlier_costs_its_row_less(bits):
    """Where a row's scale must reach one long weight, its block of 64 shares that weight."""
    rows = np.random.default_rng(3).standard_normal((32, 512)).astype(np.float32)
    rows[np.arange(32), np.arange(32) * 16] *= 30
    losses = [
        relative(rows, layout.dequantize(format.layout(512, 32), rtn.quantize(rows, format)))
        for format in (Format(bits, 128 * (bits < 8)), Format(bits, 128 * (bits < 8), rotated=False))
    ]
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_are_rounded_by_themselves(format):
    rows = rng.standard_normal((40, 300)).astype(np.float32)
    whole, part = rtn.quantize(rows, format), rtn.quantize(rows[16:], format)
    for some, same in zip(part, whole, strict=True):
        np.testing.assert_array_equal(some, same[16:])
