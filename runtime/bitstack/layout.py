"""A BitStack as bytes: entries of packed signs and factors, the order in which they lie, and what they add up to.

A stacked matrix is W = rung + sum over its blocks of  S * (U V)  (Wang et al. 2024, BitStack): S are signs, U [outputs,
rank] and V [rank, inputs] factors in fp16. A rung, where there is one, is the whole matrix in the layout of
QuantizedLinear; it takes the place of every entry of its matrix before it, and blocks go on top of it. With `rotated`
all of it is in the rotated domain (see kernels/layout.py). runtime/kernels/stack.h tells the same for the kernels.
`Index` says what a bundle's stack holds; it is read from untrusted bytes. Nothing here opens files.

An entry is, little-endian, at a multiple of 64 bytes:
  header   64 bytes: magic, uint32 matrix, uint32 step (from 0, of this matrix), uint32 rank (0: a rung), uint32 CRC-32
           of the payload, uint64 bytes of the payload; zeros
  payload  of a rung: as QuantizedLinear has it; of a block:
    V      fp16 [rank][inputs padded to blocks of 64], padded to 64 bytes
    U      fp16 [rank][outputs padded to panels of 16], padded to 64 bytes
    signs  [panels][blocks of 64 inputs] of two vectors of 64 bytes: bit b of byte 4r + i of vector h is 1 where the
           weight of output r and input 32h + 4b + i is positive; padding has zeros
"""

import json
import struct
import zlib
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ..errors import BundleError
from ..kernels.layout import BLOCK, PANEL, LinearFormat, rotate

MAGIC = b"shstack\x01"
HEADER = struct.Struct("<8sIIIIQ32x")
MAX_RANK = 16
MAX_STEPS = 32
MAX_ORDERS = 8
MAX_MATRICES = 1 << 14
MAX_ENTRIES = 1 << 16
VERSION = 1


@dataclass(frozen=True)
class StackFormat:
    """The blocks of a matrix [outputs, inputs]. Sizes are bytes, or count what the name says."""

    inputs: int
    outputs: int
    rank: int
    rotated: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.inputs // BLOCK)

    @property
    def panels(self) -> int:
        return -(-self.outputs // PANEL)

    @property
    def u_at(self) -> int:
        return _up(2 * self.rank * self.blocks * BLOCK)

    @property
    def signs_at(self) -> int:
        return self.u_at + _up(2 * self.rank * self.panels * PANEL)

    @property
    def payload_bytes(self) -> int:
        return self.signs_at + self.panels * self.blocks * (BLOCK * PANEL // 8)


Step = LinearFormat | StackFormat  # a rung, or a block


@dataclass(frozen=True)
class Stacked:
    """One matrix [outputs, inputs] of a stack: its product's `name`, and its `steps` in the order in which they come:
    rungs and blocks."""

    name: str
    inputs: int
    outputs: int
    rotated: int
    steps: tuple[Step, ...]

    def live(self, count: int) -> range:
        """Which of the first `count` steps count: those from the last rung on."""
        rungs = [at for at in range(count) if isinstance(self.steps[at], LinearFormat)]
        return range(rungs[-1] if rungs else 0, count)


@dataclass(frozen=True)
class Entry:
    """One entry of the stack's file: `step` of `matrix`, `offset` and `length` in bytes, header included."""

    matrix: int
    step: int
    offset: int
    length: int


@dataclass(frozen=True)
class Index:
    """What a bundle's stack holds: `matrices`, and `order`, the matrix of each entry in the file; the first `floor`
    entries are what the model needs to run at all. `sort` names how the order was found, `orders` has others, by name.
    `curve` has measured points (entries, perplexity)."""

    matrices: tuple[Stacked, ...]
    order: tuple[int, ...]
    floor: int
    sort: str = ""
    curve: tuple[tuple[int, float], ...] = ()
    orders: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def counts(self, entries: int | None = None, order: tuple[int, ...] | None = None) -> list[int]:
        """How many steps each matrix has among the first `entries` of the stack, or of another `order`."""
        found = [0] * len(self.matrices)
        for matrix in (self.order if order is None else order)[:entries]:
            found[matrix] += 1
        return found

    def entries(self) -> list[Entry]:
        """All entries, in the file's order."""
        counts, found, offset = [0] * len(self.matrices), [], 0
        for matrix in self.order:
            step = self.matrices[matrix].steps[counts[matrix]]
            found.append(Entry(matrix, counts[matrix], offset, entry_bytes(step)))
            counts[matrix] += 1
            offset += found[-1].length
        return found

    def sizes(self, order: tuple[int, ...] | None = None) -> list[int]:
        """Bytes that must be resident for the first 0, 1, 2, ... entries: what rungs replaced does not count."""
        counts, held, found = [0] * len(self.matrices), [0] * len(self.matrices), [0]
        for matrix in self.order if order is None else order:
            step = self.matrices[matrix].steps[counts[matrix]]
            counts[matrix] += 1
            before = held[matrix]
            held[matrix] = entry_bytes(step) + (0 if isinstance(step, LinearFormat) else before)
            found.append(found[-1] + held[matrix] - before)
        return found

    def to_json(self) -> bytes:
        matrices = [
            {"name": one.name, "inputs": one.inputs, "outputs": one.outputs, "rotated": one.rotated,
             "steps": [_step_to_json(step) for step in one.steps]}
            for one in self.matrices
        ]  # fmt: skip
        raw = {"version": VERSION, "matrices": matrices, "order": self.order, "floor": self.floor, "sort": self.sort,
               "curve": self.curve, "orders": self.orders}  # fmt: skip
        return json.dumps(raw, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Index":
        """Reads untrusted bytes; unknown keys are ignored. Raises BundleError naming the field that is wrong."""
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            raise _refuse(f"index is not JSON of version {VERSION}")
        listed = raw.get("matrices")
        if not isinstance(listed, list) or not 0 < len(listed) <= MAX_MATRICES:
            raise _refuse(f"matrices are not a list of 1 to {MAX_MATRICES}")
        matrices = tuple(_stacked(entry, f"matrices[{at}]") for at, entry in enumerate(listed))
        others = raw.get("orders", {})
        if not isinstance(others, dict) or len(others) > MAX_ORDERS or not all(map(_is_word, others)):
            raise _refuse(f"orders are not at most {MAX_ORDERS} by name")
        order = _order(raw.get("order"), matrices, "order")
        orders = {name: _order(found, matrices, f"orders.{name}") for name, found in others.items()}
        floor, sort, curve = raw.get("floor"), raw.get("sort", ""), raw.get("curve", [])
        if type(floor) is not int or not 0 <= floor <= len(order):
            raise _refuse(f"floor is {floor!r:.40}, not one of 0 to {len(order)}")
        if sort != "" and not _is_word(sort):
            raise _refuse("sort is not a short word")
        if not isinstance(curve, list) or len(curve) > MAX_ENTRIES:
            raise _refuse("curve is not a list")
        for point in curve:
            whole = isinstance(point, list) and len(point) == 2 and type(point[0]) is int
            if not (whole and 0 <= point[0] <= len(order) and type(point[1]) in (int, float) and 0 < point[1] < 1e300):
                raise _refuse("curve has a point that is not (entries, perplexity)")
        found = cls(matrices, order, floor, sort, tuple((at, float(value)) for at, value in curve), orders)
        for counts in (found.counts(floor), *(found.counts(floor, other) for other in orders.values())):
            for one, count in zip(matrices, counts, strict=True):
                if count == 0:
                    raise _refuse(f"floor leaves the matrix {one.name!r:.80} without an entry")
        sizes = found.sizes()
        if any(more <= less for less, more in pairwise(sizes)):
            raise _refuse("order has an entry that adds no bytes")
        return found


def pack(format: StackFormat, u: np.ndarray, v: np.ndarray, signs: np.ndarray) -> bytearray:
    """The payload of a block: factors u fp16 [outputs, rank] and v fp16 [rank, inputs], `signs` [outputs, inputs], true
    where a weight is positive."""
    data = bytearray(format.payload_bytes)
    view = np.frombuffer(data, np.uint8)
    view[: 2 * v.size // format.inputs * format.blocks * BLOCK].view(np.float16).reshape(format.rank, -1)[
        :, : format.inputs
    ] = v
    ends = format.u_at + 2 * format.rank * format.panels * PANEL
    view[format.u_at : ends].view(np.float16).reshape(format.rank, -1)[:, : format.outputs] = u.T
    whole = np.zeros((format.panels * PANEL, format.blocks * BLOCK), bool)
    whole[: format.outputs, : format.inputs] = signs
    quads = whole.reshape(format.panels, PANEL, format.blocks, 2, 8, 4).transpose(0, 2, 3, 1, 5, 4)
    view[format.signs_at :] = np.packbits(np.ascontiguousarray(quads).reshape(-1), bitorder="little")
    return data


def unpack(format: StackFormat, payload) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `pack` was given. Raises BundleError for another length."""
    view = np.frombuffer(payload, np.uint8)
    if len(view) != format.payload_bytes:
        raise _refuse(f"block has {len(view)} bytes, not {format.payload_bytes}")
    v = view[: 2 * format.rank * format.blocks * BLOCK].view(np.float16).reshape(format.rank, -1)
    ends = format.u_at + 2 * format.rank * format.panels * PANEL
    u = view[format.u_at : ends].view(np.float16).reshape(format.rank, -1)
    bits = np.unpackbits(view[format.signs_at :], bitorder="little").view(bool)
    quads = bits.reshape(format.panels, format.blocks, 2, PANEL, 4, 8).transpose(0, 3, 1, 2, 5, 4)
    signs = quads.reshape(format.panels * PANEL, -1)[: format.outputs, : format.inputs]
    return u[:, : format.outputs].T, v[:, : format.inputs], signs


def add(format: StackFormat, payload, weights: np.ndarray) -> None:
    """Adds a block to `weights` fp32 [outputs, inputs] in place, to the bit as the kernels rebuild it (rotated, where
    the format is)."""
    u, v, signs = (part.astype(np.float32) for part in unpack(format, payload))
    size = u[:, :1] * v[:1]
    for rank in range(1, format.rank):  # rounded once a term, as a fused multiply-add does
        size = (u[:, rank, None].astype(np.float64) * v[rank] + size).astype(np.float32)
    weights += np.where(signs > 0, size, -size)


def reconstruct(format: StackFormat, payloads, base: np.ndarray | None = None) -> np.ndarray:
    """The weights fp32 [outputs, inputs] of these blocks on top of `base`, rotated back where the format is rotated."""
    weights = np.zeros((format.outputs, format.inputs), np.float32) if base is None else base.astype(np.float32)
    for payload in payloads:
        add(format, payload, weights)
    return rotate(weights) if format.rotated else weights


def entry_bytes(step: Step) -> int:
    """Of one entry in the file, header included."""
    return HEADER.size + (step.bytes if isinstance(step, LinearFormat) else step.payload_bytes)


def header(matrix: int, step: int, format: Step, payload) -> bytes:
    """The 64 bytes before an entry's payload."""
    rank = 0 if isinstance(format, LinearFormat) else format.rank
    return HEADER.pack(MAGIC, matrix, step, rank, zlib.crc32(payload), len(payload))


def check(entry: memoryview, matrix: int, step: int, format: Step, name: str = "") -> None:
    """Refuses, with BundleError, an entry that is not the one meant, or whose bytes are not those that were written."""
    rank = 0 if isinstance(format, LinearFormat) else format.rank
    expected = (MAGIC, matrix, step, rank, entry_bytes(format) - HEADER.size)
    if len(entry) != entry_bytes(format):
        raise _refuse(f"entry {step} of {name or matrix} has {len(entry)} bytes, not {entry_bytes(format)}")
    magic, found_matrix, found_step, found_rank, crc, length = HEADER.unpack_from(entry)
    if (magic, found_matrix, found_step, found_rank, length) != expected:
        raise _refuse(f"entry {step} of {name or matrix} is another one")
    if zlib.crc32(entry[HEADER.size :]) != crc:
        raise _refuse(f"entry {step} of {name or matrix} is damaged: its checksum differs")


def _stacked(raw, where: str) -> Stacked:
    if not isinstance(raw, dict):
        raise _refuse(f"{where} is not an object")

    def integer(raw: dict, key: str, low: int, high: int) -> int:
        value = raw.get(key)
        if type(value) is not int or not low <= value <= high:
            raise _refuse(f"{where}.{key} is {value!r:.40}, not one of {low} to {high}")
        return value

    name, steps = raw.get("name"), raw.get("steps")
    if not isinstance(name, str) or not 0 < len(name) <= 4096 or not name.isprintable():
        raise _refuse(f"{where}.name is not a name")
    inputs, outputs = integer(raw, "inputs", 1, 1 << 20), integer(raw, "outputs", 1, 1 << 26)
    rotated = integer(raw, "rotated", 0, 1)
    if rotated and inputs % BLOCK:
        raise _refuse(f"{where}.rotated is 1 with {inputs} inputs, which are not whole blocks of {BLOCK}")
    if not isinstance(steps, list) or not 0 < len(steps) <= MAX_STEPS:
        raise _refuse(f"{where}.steps are not a list of 1 to {MAX_STEPS}")
    found: list[Step] = []
    for step in steps:
        if not isinstance(step, dict):
            raise _refuse(f"{where}.steps has one that is not an object")
        if "rank" in step:
            found.append(StackFormat(inputs, outputs, integer(step, "rank", 1, MAX_RANK), rotated))
            continue
        rung = LinearFormat(inputs, outputs, step.get("bits"), step.get("group"), step.get("span"), rotated)  # type: ignore[arg-type]
        if problem := rung.problem():
            raise _refuse(f"{where}.steps has a rung whose {problem}")
        found.append(rung)
    return Stacked(name, inputs, outputs, rotated, tuple(found))


def _step_to_json(step: Step) -> dict:
    if isinstance(step, StackFormat):
        return {"rank": step.rank}
    return {"bits": step.bits, "group": step.group, "span": step.span}


def _order(raw, matrices: tuple[Stacked, ...], where: str) -> tuple[int, ...]:
    if not isinstance(raw, list) or len(raw) > MAX_ENTRIES:
        raise _refuse(f"{where} is not a list of at most {MAX_ENTRIES}")
    counts = [0] * len(matrices)
    for matrix in raw:
        if type(matrix) is not int or not 0 <= matrix < len(matrices):
            raise _refuse(f"{where} names a matrix that is not there")
        counts[matrix] += 1
    if counts != [len(one.steps) for one in matrices]:
        raise _refuse(f"{where} does not have each matrix as often as it has steps")
    return tuple(raw)


def _is_word(text) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 64 and text.isprintable()


def _up(size: int) -> int:
    return -(-size // 64) * 64


def _refuse(problem: str) -> BundleError:
    return BundleError("The bundle's stack cannot be used.", f"Its {problem}.", "Convert the checkpoint again.")
