"""The weights of QuantizedLinear as bytes: what linear.h lays down, in numpy.

`pack` and `unpack` are each other's exact inverse; `gather_up` and `gather_down` lay the same out as gathered.h tells,
and have inverses too; `to_matmulnbits` says the same weights, bit for bit, in the layout of ONNX Runtime's MatMulNBits.
Names are those of linear.h, where the format is told in full. It knows nothing about how codes are chosen, nor about
files.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import BundleError

PANEL = 16  # outputs of a panel
BLOCK = 64  # inputs of a block
MAX_SPAN = 1 << 16  # inputs whose products of int8 cannot overflow int32
MAX_INPUTS, MAX_OUTPUTS = 1 << 20, 1 << 26
_AT_ONCE = 1 << 22  # weights that are unpacked at once on the way to another layout


@dataclass(frozen=True)
class LinearFormat:
    """A matrix [outputs, inputs] of `bits` a weight; `group` inputs share a multiplier and a zero, `span` inputs a
    scale; where it is `rotated` (1), the inputs' blocks are (see `rotate`). Every other size is in bytes, or counts
    what the name says."""

    inputs: int
    outputs: int
    bits: int
    group: int
    span: int
    rotated: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.inputs // BLOCK)

    @property
    def padded(self) -> int:
        return self.blocks * BLOCK

    @property
    def panels(self) -> int:
        return -(-self.outputs // PANEL)

    @property
    def spans(self) -> int:
        return -(-self.padded // self.span)

    @property
    def groups(self) -> int:
        return -(-self.padded // self.group)

    @property
    def step(self) -> int:
        return 2 if self.bits < 4 else 1

    @property
    def block_bytes(self) -> int:
        return BLOCK * PANEL * self.bits // 8

    @property
    def groups_at(self) -> int:
        return self.spans * PANEL * 4

    @property
    def codes_at(self) -> int:
        return self.groups_at + -(-self.groups * PANEL // 64) * 64

    @property
    def panel_bytes(self) -> int:
        return self.codes_at + self.blocks * self.block_bytes

    @property
    def bytes(self) -> int:
        return self.panels * self.panel_bytes

    def problem(self) -> str:
        """What is wrong with these numbers, starting with the field's name; empty when nothing is."""
        for name in ("inputs", "outputs", "bits", "group", "span", "rotated"):
            if type(getattr(self, name)) is not int:
                return f"{name} is {getattr(self, name)!r:.40}, not an integer"
        if not (0 < self.inputs <= MAX_INPUTS and 0 < self.outputs <= MAX_OUTPUTS):
            return f"outputs and inputs are {self.outputs} and {self.inputs}, not 1 to {MAX_OUTPUTS} and {MAX_INPUTS}"
        if self.bits not in (2, 3, 4, 8):
            return f"bits is {self.bits}, not 2, 3, 4 or 8"
        if self.span % BLOCK or not BLOCK <= self.span <= min(MAX_SPAN, self.padded):
            return f"span is {self.span}, not a multiple of {BLOCK} up to {min(MAX_SPAN, self.padded)}"
        if self.bits == 8 and self.group != self.span:
            return f"group is {self.group}, not the span of {self.span}"
        if self.group < 32 or self.group % 32 or self.span % self.group:
            return f"group is {self.group}, not a multiple of 32 that divides the span of {self.span}"
        if self.rotated not in (0, 1) or (self.rotated and self.inputs % BLOCK):
            return f"rotated is {self.rotated} with {self.inputs} inputs, not 0, or 1 with whole blocks of {BLOCK}"
        return ""

    def check(self) -> "LinearFormat":
        """Itself. Raises BundleError when these numbers cannot be a matrix."""
        if problem := self.problem():
            raise _refuse(problem)
        return self


GATHERED_BITS = (2, 4, 8)
LINE = 64  # bytes of a channel that lie together in a gathered down


def gathered_bytes(format: LinearFormat) -> int:
    """Of a down whose channels lie together (gathered.h)."""
    lines = -(-format.outputs * format.bits // (8 * LINE))
    outputs = lines * LINE * 8 // format.bits
    return (4 * format.spans + format.groups) * outputs + format.inputs * lines * LINE


class Codes(NamedTuple):
    """Rows of a matrix as integers: `values` [rows, padded], uint8, or int8 of 8 bits; `multipliers` uint8 1..15
    [rows, groups], of 8 bits all 1; `zeros` [rows, groups], uint8 0..15, or int8 of 8 bits; `scales` fp32
    [rows, spans]."""

    values: np.ndarray
    multipliers: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray


class NBits(NamedTuple):
    """A matrix in the layout of MatMulNBits: `codes` uint8 [outputs, blocks, block * bits / 8] and `zeros` uint8
    [outputs, ceil(blocks * bits / 8)], both low nibble first; `scales` fp32 [outputs, blocks]."""

    bits: int
    block: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


def pack(format: LinearFormat, codes: Codes) -> np.ndarray:
    """The panels of these rows, uint8 [bytes]; rows come in slices of whole panels, only a matrix's last may be ragged.
    What pads the last panel is zero."""
    rows = len(codes.values)
    panels = -(-rows // PANEL)
    values, multipliers, zeros, scales = (_padded(part, panels * PANEL) for part in codes)
    data = np.zeros((panels, format.panel_bytes), np.uint8)
    header = data[:, : format.groups_at].view(np.float32).reshape(panels, format.spans, PANEL)
    header[:] = scales.reshape(panels, PANEL, -1).swapaxes(1, 2)
    groups = data[:, format.groups_at :][:, : format.groups * PANEL].reshape(panels, format.groups, PANEL)
    both = zeros.view(np.uint8) if format.bits == 8 else multipliers | zeros << 4
    groups[:] = both.reshape(panels, PANEL, -1).swapaxes(1, 2)
    blocks = data[:, format.codes_at :].reshape(panels, format.blocks, format.block_bytes)
    for width, shift, at in _planes(format.bits):
        # Fields of 4 inputs fill the bytes of a word; `fields` such words make one
        words = (values.view(np.uint8) >> shift & (1 << width) - 1).view(np.uint32)
        words = words.reshape(panels, PANEL, format.blocks, -1, 8 // width).transpose(0, 2, 3, 1, 4)
        packed = words[..., 0].copy()
        for field in range(1, 8 // width):
            packed |= words[..., field] << field * width
        blocks[:, :, at : at + packed[0, 0].nbytes] = packed.view(np.uint8).reshape(panels, format.blocks, -1)
    return data.reshape(-1)


def gather_up(format: LinearFormat, data: np.ndarray) -> np.ndarray:
    """Panels of a gate and its up in turn, as `pack` made them, as one matrix after the other, the up's outputs each in
    one piece (gathered.h)."""
    data = data.reshape(-1, 2, format.panel_bytes).swapaxes(0, 1).copy()
    ups, groups = data[1], format.groups * PANEL

    def by_output(part: np.ndarray) -> np.ndarray:
        """uint8 [panels, 16, bytes] of what lies by group or word, [panels, count, 16]."""
        return np.ascontiguousarray(part.reshape(len(ups), -1, PANEL).swapaxes(1, 2)).view(np.uint8)

    scales = by_output(ups[:, : format.groups_at].view(np.uint32))
    shared = by_output(ups[:, format.groups_at :][:, :groups])
    shared = np.pad(shared, ((0, 0), (0, 0), (0, -format.groups % 4)))
    codes = by_output(ups[:, format.codes_at :].view(np.uint32))
    ups[:, : format.groups_at] = scales.reshape(len(ups), -1)
    ups[:, format.groups_at :] = np.concatenate([shared, codes], 2).reshape(len(ups), -1)
    return data.reshape(-1)


def gather_down(format: LinearFormat, codes: Codes) -> np.ndarray:
    """A whole matrix with its inputs' weights each in one piece, uint8 [gathered_bytes] (gathered.h). What pads a line
    is zero."""
    fields, rows = 32 // format.bits, len(codes.values)
    more = -rows % (fields * PANEL)
    values, multipliers, zeros, scales = (np.pad(part, ((0, more), (0, 0))) for part in codes)
    groups = zeros.view(np.uint8) if format.bits == 8 else multipliers | zeros << 4
    columns = values[:, : format.inputs].view(np.uint8).T.astype(np.uint32)
    columns = columns.reshape(format.inputs, -1, fields, PANEL)  # a line's 16 words, of so many fields
    words = np.bitwise_or.reduce(columns << np.arange(fields, dtype=np.uint32)[:, None] * format.bits, 2)
    parts = (scales.astype(np.float32).T, groups.T, words)
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])


def ungather_up(format: LinearFormat, data) -> np.ndarray:
    """What `gather_up` was given."""
    gates, ups = np.frombuffer(data, np.uint8).reshape(2, -1, format.panel_bytes)
    ups = ups.copy()

    def shared(part: np.ndarray) -> np.ndarray:
        """uint8 [panels, bytes] of what lies by output, [panels, 16, count]."""
        return np.ascontiguousarray(part.swapaxes(1, 2)).reshape(len(ups), -1).view(np.uint8)

    rows = np.ascontiguousarray(ups[:, format.groups_at :].reshape(len(ups), PANEL, -1))
    codes_at = -(-format.groups // 4) * 4
    scales = shared(ups[:, : format.groups_at].copy().view(np.uint32).reshape(len(ups), PANEL, -1))
    groups, codes = shared(rows[:, :, : format.groups]), shared(rows[:, :, codes_at:].copy().view(np.uint32))
    ups[:, : format.groups_at], ups[:, format.codes_at :] = scales, codes
    ups[:, format.groups_at : format.codes_at] = 0
    ups[:, format.groups_at :][:, : groups.shape[1]] = groups
    return np.stack([gates, ups], 1).reshape(-1)


def ungather_down(format: LinearFormat, data) -> Codes:
    """What `gather_down` was given, what pads its inputs 0."""
    fields = 32 // format.bits
    outputs = -(-format.outputs // (fields * PANEL)) * fields * PANEL
    scales, groups, words = np.split(
        np.frombuffer(data, np.uint8), np.cumsum((4 * format.spans, format.groups)) * outputs
    )
    packed = words.view(np.uint32).reshape(format.inputs, -1, 1, PANEL)
    fielded = packed >> np.arange(fields, dtype=np.uint32)[:, None] * format.bits & (1 << format.bits) - 1
    columns = fielded.astype(np.uint8).reshape(format.inputs, -1).T[: format.outputs]
    values = np.pad(columns, ((0, 0), (0, format.padded - format.inputs)))
    both = np.ascontiguousarray(groups.reshape(-1, outputs).T[: format.outputs])
    scales = np.ascontiguousarray(scales.view(np.float32).reshape(-1, outputs).T[: format.outputs])
    if format.bits == 8:
        return Codes(values.view(np.int8), np.ones_like(both), both.view(np.int8), scales)
    return Codes(values, both & 15, both >> 4, scales)


def unpack(format: LinearFormat, data, start: int = 0) -> Codes:
    """The rows of `data`: the matrix, or whole panels of it from output `start` on. `format` has been checked; raises
    BundleError for other bytes than its panels."""
    data = np.frombuffer(data, np.uint8)
    panels, rest = divmod(len(data), format.panel_bytes)
    first, within = divmod(start, PANEL)
    if rest or within or first < 0 or not 0 < panels <= format.panels - first:
        raise _refuse(f"data are {len(data)} bytes from output {start}, not panels of {format.panel_bytes} bytes")
    data = data.reshape(panels, format.panel_bytes)
    rows = min(panels * PANEL, format.outputs - start)
    scales = data[:, : format.groups_at].view(np.float32).reshape(panels, format.spans, PANEL)
    groups = data[:, format.groups_at :][:, : format.groups * PANEL].reshape(panels, format.groups, PANEL)
    both = _rows(groups.swapaxes(1, 2), rows)
    values = np.zeros((panels, PANEL, format.padded), np.uint8)
    blocks = data[:, format.codes_at :].reshape(panels, format.blocks, format.block_bytes)
    for width, shift, at in _planes(format.bits):
        packed = blocks[:, :, at : at + BLOCK * PANEL * width // 8].view(np.uint32)
        packed = packed.reshape(panels, format.blocks, -1, PANEL).transpose(0, 3, 1, 2)
        words = values.view(np.uint32).reshape(*packed.shape, 8 // width)
        for field in range(8 // width):
            words[..., field] |= (packed >> field * width & 0x01010101 * ((1 << width) - 1)) << shift
    values = _rows(values, rows)
    scales = _rows(scales.swapaxes(1, 2), rows)
    if format.bits == 8:
        return Codes(values.view(np.int8), np.ones_like(both), both.view(np.int8), scales)
    return Codes(values, both & 15, both >> 4, scales)


def rotate(rows: np.ndarray) -> np.ndarray:
    """fp32 [.., inputs] with each block of 64 inputs times the Walsh-Hadamard matrix / 8, which is its own inverse."""
    x = np.ascontiguousarray(rows, np.float32).reshape(-1, BLOCK)
    for distance in (1, 2, 4, 8, 16, 32):
        pairs = x.reshape(-1, 2, distance)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
    return (x * np.float32(0.125)).reshape(rows.shape)


def dequantize(format: LinearFormat, codes: Codes) -> np.ndarray:
    """The weights fp32 [rows, inputs], to the bit those that every kernel means, and rotated back where they are."""
    zeros = np.repeat(codes.zeros.astype(np.int16), format.group, 1)[:, : format.inputs]
    multipliers = np.repeat(codes.multipliers.astype(np.int16), format.group, 1)[:, : format.inputs]
    integers = multipliers * (codes.values[:, : format.inputs].astype(np.int16) * format.step - zeros)
    weights = integers * np.repeat(codes.scales, format.span, 1)[:, : format.inputs]
    return rotate(weights) if format.rotated else weights


def nbits_shape(format: LinearFormat) -> tuple[int, int, int]:
    """What `to_matmulnbits` makes of a format: bits, inputs of a block, blocks of a row."""
    block = math.gcd(format.group, 256)
    return 8 if format.bits == 8 else 4, block, -(-format.inputs // block)


def to_matmulnbits(format: LinearFormat, data) -> NBits:
    """The same weights, exactly (rotated, if they are), for MatMulNBits: 2 to 4 bits become 4, 8 stay 8. Beside the
    result it takes a few MB.

    Raises BundleError where a scale times a multiplier is no float32, which it is in all that the converter writes, or
    where `data` is not the matrix.
    """
    format.check()
    data = np.frombuffer(data, np.uint8)
    if len(data) != format.bytes:
        raise _refuse(f"data are {len(data)} bytes, not {format.bytes}")
    bits, block, blocks = nbits_shape(format)
    found = NBits(
        bits,
        block,
        np.empty((format.outputs, blocks, block * bits // 8), np.uint8),
        np.empty((format.outputs, blocks), np.float32),
        np.empty((format.outputs, -(-blocks * bits // 8)), np.uint8),
    )
    starts = np.arange(blocks) * block
    panels = max(1, _AT_ONCE // (PANEL * format.padded))
    for panel in range(0, format.panels, panels):
        part = data[panel * format.panel_bytes : (panel + panels) * format.panel_bytes]
        codes = unpack(format, part, panel * PANEL)
        rows = slice(panel * PANEL, panel * PANEL + len(codes.values))
        scales = codes.scales.astype(np.float64)[:, starts // format.span]
        scales *= codes.multipliers[:, starts // format.group]
        with np.errstate(over="ignore"):
            found.scales[rows] = scales
        if not (np.isfinite(scales) & (found.scales[rows] == scales)).all():
            raise _refuse("scale times a multiplier is not exact")
        values, zeros = codes.values, codes.zeros[:, starts // format.group]
        if bits == 8:
            values, zeros = values.view(np.uint8) ^ 128, zeros.view(np.uint8) ^ 128
        elif format.step > 1:
            values = values * np.uint8(format.step)
        # Whole blocks may be more than whole blocks of ours, or less
        values = np.pad(values[:, : blocks * block], ((0, 0), (0, max(0, blocks * block - format.padded))))
        found.codes[rows] = _nibbles(values, bits).reshape(len(values), blocks, -1)
        found.zeros[rows] = _nibbles(zeros, bits)
    return found


def _planes(bits: int) -> list[tuple[int, int, int]]:
    """(bits of a code, from which one, and where in a block) of the planes of a block: 3 bits are 2 and 1."""
    return [(2, 0, 0), (1, 2, BLOCK * PANEL // 4)] if bits == 3 else [(bits, 0, 0)]


def _padded(part: np.ndarray, rows: int) -> np.ndarray:
    part = np.ascontiguousarray(part)
    return part if len(part) == rows else np.pad(part, ((0, rows - len(part)), (0, 0)))


def _rows(panels: np.ndarray, rows: int) -> np.ndarray:
    return np.ascontiguousarray(panels.reshape(-1, panels.shape[-1])[:rows])


def _nibbles(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _refuse(problem: str) -> BundleError:
    return BundleError("A matrix of the model cannot be used.", f"Its {problem}.", "Convert the checkpoint again.")
