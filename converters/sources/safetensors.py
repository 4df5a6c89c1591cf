"""One safetensors file: a validated header over a mapping, and rows as float32.

Format: 8 bytes of header length, a JSON object of names to dtype, shape and byte range, then the data without a hole.
Promises that every tensor lies within the file, overlaps no other and is as long as its shape says, before one is read.
Knows nothing about models or folders.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.runtime.errors import SourceError, UsageError

from . import TensorInfo
from .files import map_file, parse_json

MAX_HEADER = 100_000_000  # what the reference implementation allows
MAX_DIMENSIONS = 16
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "C64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class _Place:
    info: TensorInfo
    offset: int


class SafetensorsFile:
    """The tensors of the file at `path`, mapped until `close`. Raises SourceError for whatever the format forbids."""

    def __init__(self, path: Path):
        self.path = path
        self._data = map_file(path)
        try:
            self._places = self._read_header()
        except BaseException:
            self.close()
            raise
        self.tensors = {name: place.info for name, place in self._places.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start:stop] of a tensor that is there, as a fresh float32 array."""
        info, offset = self._places[name].info, self._places[name].offset
        if info.dtype not in _NUMPY:
            raise self._refuse(
                f"{name!r:.80} is stored as {info.dtype}; weights are read from {', '.join(_NUMPY)}.",
                "Convert from the checkpoint in full precision (usually BF16).",
            )
        shape = info.shape or (1,)
        stop = shape[0] if stop is None else stop
        if not 0 <= start <= stop <= shape[0]:
            raise UsageError(
                f"Rows {start} to {stop} of {name} cannot be read.", f"Its shape is {shape}.", "Ask for rows within it."
            )
        dtype = np.dtype(_NUMPY[info.dtype])
        width = math.prod(shape[1:])
        if width == 0 or start == stop:  # numpy wants an offset within the buffer even for nothing
            return np.empty((stop - start, *shape[1:]), np.float32)
        stored = np.frombuffer(self._data, dtype, (stop - start) * width, offset + start * width * dtype.itemsize)
        if info.dtype == "BF16":  # the upper half of a float32
            values = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            with np.errstate(over="ignore"):
                values = stored.astype(np.float32)
        return values.reshape((stop - start, *shape[1:]) if info.shape else ())

    def close(self) -> None:
        try:
            self._data.close()
        except BufferError:  # somebody still holds a view; the mapping goes with it
            pass

    def _read_header(self) -> dict[str, _Place]:
        if len(self._data) < 8:
            raise self._refuse("It is shorter than 8 bytes.")
        length = int.from_bytes(self._data[:8], "little")
        if length > min(MAX_HEADER, len(self._data) - 8):
            raise self._refuse(
                f"Its header would have {length} bytes; {len(self._data) - 8} follow, {MAX_HEADER} is the limit."
            )
        header = self._data[8 : 8 + length]
        if header[:1] != b"{":
            raise self._refuse("Its header is not a JSON object.")
        entries = parse_json(header, self.path)
        entries.pop("__metadata__", None)
        size = len(self._data) - 8 - length
        places = {name: self._place(name, entry, 8 + length, size) for name, entry in entries.items()}
        end = 8 + length
        for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].info.bytes)):
            if place.offset != end:
                raise self._refuse(f"{name!r:.80} begins at byte {place.offset}; the tensor before it ends at {end}.")
            end += place.info.bytes
        if end != len(self._data):
            raise self._refuse(f"Its tensors end at byte {end} of {len(self._data)}.")
        return places

    def _place(self, name: str, entry: object, base: int, size: int) -> _Place:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._refuse(f"{name!r:.80} does not have a dtype, a shape and data_offsets.")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._refuse(f"{name!r:.80} has the unknown dtype {dtype!r:.40}.")
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._refuse(f"{name!r:.80} has the shape {shape!r:.80}.")
        if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
            raise self._refuse(f"{name!r:.80} lies at {offsets!r:.80} of {size} bytes.")
        stored = offsets[1] - offsets[0]
        if math.prod(shape) * _BITS[dtype] != 8 * stored:
            raise self._refuse(f"{name!r:.80} has {stored} bytes, which is not {dtype} of shape {shape!r:.80}.")
        return _Place(TensorInfo(tuple(shape), dtype, stored), base + offsets[0])

    def _refuse(self, why: str, fix: str = "Download it again.") -> SourceError:
        return SourceError(f"The safetensors file {self.path} cannot be used.", why, fix)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
