"""Round to nearest: the baseline that every other method must beat.

A group of consecutive inputs of one output shares a scale and, unless symmetric, a zero point:
w = scale * (code - zero). The layout is MatMulNBits': codes of a group in order, low nibble first.
"""

from dataclasses import dataclass

import numpy as np

from ..recipe import Format


@dataclass(frozen=True)
class Codes:
    """`values` uint8 [outputs, inputs padded to whole groups]; `scales` fp32 and `zeros` uint8 [outputs, groups]."""

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def dequantize(self, group: int) -> np.ndarray:
        """fp32 [outputs, padded inputs]."""
        outputs, groups = self.scales.shape
        values = self.values.reshape(outputs, groups, group).astype(np.float32)
        return ((values - self.zeros[..., None]) * self.scales[..., None]).reshape(outputs, groups * group)


def quantize(rows: np.ndarray, format: Format) -> Codes:
    """Rounds fp32 [outputs, inputs]; the last group is padded with zeros, which cost no range."""
    groups = grouped(rows, format.group)
    scales, zeros = grid(groups, format)
    return Codes(encode(groups, scales, zeros, format.bits).reshape(len(rows), -1), scales, zeros)


def grouped(rows: np.ndarray, group: int) -> np.ndarray:
    """fp32 [outputs, groups, group], padded with zeros."""
    padding = -rows.shape[1] % group
    if padding:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    return np.ascontiguousarray(rows, np.float32).reshape(len(rows), -1, group)


def grid(groups: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points that span each group's range, zero included exactly."""
    top = (1 << format.bits) - 1
    if format.symmetric:
        middle = 1 << (format.bits - 1)
        # The side that is longer gets the extra code: -8 .. 7
        extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
        scales = -extreme / middle
        return _nonzero(scales), np.full(scales.shape, middle, np.uint8)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = _nonzero(high / top - low / top)  # high - low may be infinite
    return scales, np.clip(np.rint(-low / scales), 0, top).astype(np.uint8)


def encode(groups: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8, same shape as `groups`."""
    codes = groups / scales[..., None]
    codes += zeros[..., None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, (1 << bits) - 1, out=codes).astype(np.uint8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, n] of `bits` each to bytes [rows, ceil(n * bits / 8)], low bits first."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack`: uint8 [rows, count]."""
    if bits == 8:
        return packed
    codes = np.empty((len(packed), packed.shape[1] * 2), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    return codes[:, :count]


def _nonzero(scales: np.ndarray) -> np.ndarray:
    scales = scales.astype(np.float32)
    return np.where(np.abs(scales) < np.finfo(np.float32).tiny, np.float32(1), scales)
