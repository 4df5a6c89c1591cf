"""Round to nearest: the baseline that every other method must beat.

What is chosen is linear.h's format: a span of inputs has a scale, a group of them a multiplier and a zero point, all
integers. The scale of a span is fixed first, from its groups' extremes, so that the widest just fits; then each group
searches the few multipliers and zeros around those that fit it. It knows nothing about how codes lie in memory.
"""

import numpy as np

from shoal.runtime.kernels.layout import Codes, LinearFormat, rotate

from ..recipe import Format

_FINEST = np.float32(2.0**-100)  # a scale: what is smaller counts as zero
_MULTIPLIERS = 15
_REACH = 120  # the largest integer weight that both a range of 15 codes and a whole multiplier give within int8
# Measured: few codes gain more by lying closer together than they lose at the ends
_FIT = np.float32(0.95)  # of the widest group's extent is what a scale spans
_TRIED = {4: range(-1, 3), 3: range(-1, 5), 2: range(10)}  # by how much less than what fits a group tries to multiply


def quantize(rows: np.ndarray, format: Format) -> Codes:
    """Rounds fp32 [outputs, inputs], finite. Each row by itself, so a matrix may come in slices."""
    layout = format.layout(rows.shape[1], len(rows))
    values = columns(rows, layout)
    steps = scales(values, layout, format.symmetric)
    codes = np.empty(values.shape, np.int8 if layout.bits == 8 else np.uint8)
    multipliers = np.empty((layout.groups, len(rows)), np.uint8)
    zeros = np.empty(multipliers.shape, codes.dtype)
    for index in range(layout.groups):
        group = slice(index * layout.group, (index + 1) * layout.group)
        values[group] /= steps[group.start // layout.span]
        multiplier, zero = search(values[group], layout, format.symmetric)
        codes[group] = encode(values[group], multiplier, zero, layout)
        multipliers[index], zeros[index] = multiplier, zero
    return by_rows(codes, multipliers, zeros, steps, layout)


def columns(rows: np.ndarray, layout: LinearFormat) -> np.ndarray:
    """fp32 [inputs padded with zeros to whole groups, outputs]: an input is a row here, so that every step of a
    rounding runs over contiguous outputs. Rotated, where the layout is."""
    values = np.zeros((layout.groups * layout.group, len(rows)), np.float32)
    values[: rows.shape[1]] = (rotate(rows) if layout.rotated else rows).T
    return values


def by_rows(
    codes: np.ndarray, multipliers: np.ndarray, zeros: np.ndarray, steps: np.ndarray, layout: LinearFormat
) -> Codes:
    """What was chosen column by column, [.., outputs], row by row."""
    parts = (codes[: layout.padded], multipliers, zeros, steps)
    return Codes(*(np.ascontiguousarray(part.T) for part in parts))


def scales(values: np.ndarray, layout: LinearFormat, symmetric: bool, room: float = 1.0) -> np.ndarray:
    """The scale of each span, fp32 [spans, outputs], of values fp32 [inputs, outputs] that may grow by `room`.

    Their last four bits are zero, so that a scale times a multiplier is exact.
    """
    reach = _reach(layout.bits)
    found = np.empty((layout.spans, values.shape[1]), np.float32)
    for index in range(layout.spans):
        span = values[index * layout.span : (index + 1) * layout.span]
        groups = span.reshape(-1, layout.group, span.shape[1])
        low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
        longer = np.maximum(-low, high)
        if layout.bits == 8:
            wanted = longer / 127 if symmetric else high / 255 - low / 255  # high - low may be infinite
        elif symmetric:
            wanted = longer / (_MULTIPLIERS * ((reach + 1) // 2))
        else:
            most = _MULTIPLIERS * reach
            wanted = np.maximum(high / most - low / most, longer / min(most, _REACH))
        found[index] = wanted.max(0) * np.float32(room * (1 if layout.bits == 8 else _FIT))
    return (np.maximum(found, _FINEST).view(np.uint32) & ~np.uint32(15)).view(np.float32)


def search(
    values: np.ndarray, layout: LinearFormat, symmetric: bool, roots: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers and zeros, fp32 [outputs], of one group fp32 [group, outputs] in units of its scale, with which
    rounding it costs least; an error at input j counts `roots`[j] times, squared."""
    low, high = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
    if layout.bits == 8:
        zero = np.zeros_like(low) if symmetric else np.clip(np.rint(-128 - low), -128, 127)
        return np.ones_like(low), zero
    reach = _reach(layout.bits)
    fitting = np.ceil(np.maximum(-low, high) / ((reach + 1) // 2) if symmetric else (high - low) / reach)
    middle = (low + high) / 2
    # What is beyond all measure of its scale, which was carried to where nothing was, keeps these
    least, best, origin = np.full_like(low, np.inf), np.ones_like(low), np.full_like(low, reach // 2)
    errors = np.empty_like(values)
    for less in _TRIED[layout.bits]:
        multiplier = np.clip(fitting - less, 1, _MULTIPLIERS)
        # From a code at one end of the range to the zero is at most so far that int8 holds the product
        most = np.minimum(np.floor(127 / multiplier), reach)
        centre = np.float32(reach / 2) if symmetric else reach / 2 - middle / multiplier
        for zero in (np.floor(centre), np.floor(centre) + 1) if reach % 2 or not symmetric else (centre,):
            zero = np.clip(zero, reach - most, most)
            _codes(values, multiplier, zero, layout, errors)
            errors *= multiplier * layout.step
            errors -= multiplier * zero
            errors -= values
            if roots is not None:
                errors *= roots[:, None]
            cost = np.asarray(np.einsum("gn,gn->n", errors, errors))
            better = cost < least
            least[better], best[better], origin[better] = cost[better], multiplier[better], zero[better]  # type: ignore[index]
    return best, origin


def encode(values: np.ndarray, multiplier: np.ndarray, zero: np.ndarray, layout: LinearFormat) -> np.ndarray:
    """The nearest codes, uint8 or of 8 bits int8, of values fp32 [.., outputs] in units of their scale."""
    return _codes(values, multiplier, zero, layout).astype(np.int8 if layout.bits == 8 else np.uint8)


def code_range(bits: int) -> tuple[int, int]:
    """The lowest code and the highest."""
    return (-128, 127) if bits == 8 else (0, (1 << bits) - 1)


def _codes(values, multiplier, zero, layout, out=None):
    codes = np.multiply(values, 1 / (multiplier * layout.step), out=out)
    codes += zero / layout.step
    np.rint(codes, out=codes)
    return np.clip(codes, *code_range(layout.bits), out=codes)


def _reach(bits: int) -> int:
    """From the lowest code to the highest, in multipliers."""
    return ((1 << bits) - 1) * (2 if bits < 4 else 1)
