"""The header of a GGUF file, believed only as far as its bytes go.

Format: ggml's docs/gguf.md, versions 2 and 3, little endian. Every count and length is compared with the bytes that
remain before anything is allocated or walked, so that work and memory stay proportional to the file and arrays stay in
the mapping until they are asked for. Knows nothing about architectures, tokenizers or quantisation.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from shoal.runtime.errors import SourceError

from .files import map_file

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME = 1 << 12
MAX_STRINGS = 1 << 22  # in all arrays of one file: a vocabulary and its merges have under a million
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_INTEGERS = frozenset((0, 1, 2, 3, 4, 5, 10, 11))
_NUMBERS = _INTEGERS | {6, 12}
REQUIRED = object()


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` rows first (GGUF stores it the other way round), `bytes` at `offset` of `data`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    bytes: int
    data: mmap.mmap = field(repr=False, compare=False)


@dataclass(frozen=True)
class _Array:
    """An array that stays in the file: `count` elements of GGUF type `type` from `offset`."""

    type: int
    count: int
    offset: int


class Metadata:
    """Keys and values of a header. A getter names the type it wants; a value of another one is a SourceError that
    names the key, and so is a missing key without a default."""

    def __init__(self, data: mmap.mmap, refuse: Callable[[str], SourceError]):
        self._data, self._refuse = data, refuse
        self._values: dict[str, tuple[int, object]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default=REQUIRED, low: int = 0, high: int = (1 << 31) - 1):
        """An integer within [low, high]. An array of equal ones (a value for each block) counts as its element."""
        kind, value = self._get(key, default)
        if kind is None:
            return value
        if isinstance(value, _Array) and value.type in _INTEGERS and 0 < value.count <= 1 << 16:
            distinct = np.unique(self._numbers(value))
            if len(distinct) > 1:
                raise self._refuse(f"{key} differs from block to block ({distinct[0]} to {distinct[-1]}).")
            kind, value = value.type, int(distinct[0])
        if kind not in _INTEGERS or not isinstance(value, int):
            raise self._refuse(f"{key} is not an integer.")
        if not low <= value <= high:
            raise self._refuse(f"{key} is {value}, outside {low} to {high}.")
        return value

    def number(self, key: str, default=REQUIRED):
        """A finite float; an integer is taken as one."""
        kind, value = self._get(key, default)
        if kind is None:
            return value
        if kind not in _NUMBERS or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._refuse(f"{key} is not a finite number.")
        return float(value)

    def flag(self, key: str, default=REQUIRED):
        kind, value = self._get(key, default)
        if kind is not None and kind != _BOOL:
            raise self._refuse(f"{key} is not a boolean.")
        return value

    def text(self, key: str, default=REQUIRED):
        kind, value = self._get(key, default)
        if kind is not None and kind != _STRING:
            raise self._refuse(f"{key} is not a string.")
        return value

    def numbers(self, key: str, default=REQUIRED):
        """A one-dimensional array of integers, floats or booleans, copied."""
        kind, value = self._get(key, default)
        if kind is None:
            return value
        if not isinstance(value, _Array) or value.type == _STRING:
            raise self._refuse(f"{key} is not an array of numbers.")
        return self._numbers(value)

    def strings(self, key: str, default=REQUIRED):
        """A list of str."""
        kind, value = self._get(key, default)
        if kind is None:
            return value
        if not isinstance(value, _Array) or value.type != _STRING:
            raise self._refuse(f"{key} is not an array of strings.")
        data, position, result = self._data, value.offset, []
        length_at = struct.Struct("<Q").unpack_from
        try:
            for _ in range(value.count):  # the lengths were checked when the header was read
                start = position + 8
                position = start + length_at(data, position)[0]
                result.append(data[start:position].decode())
        except UnicodeDecodeError:
            raise self._refuse(f"{key} has a string that is not UTF-8 (number {len(result)}).") from None
        return result

    def count(self, key: str) -> int:
        """The length of an array; 0 where there is none."""
        value = self._get(key, None)[1]
        return value.count if isinstance(value, _Array) else 0

    def is_array(self, key: str) -> bool:
        return isinstance(self._get(key, None)[1], _Array)

    def _numbers(self, array: _Array) -> np.ndarray:
        dtype = np.dtype("?" if array.type == _BOOL else "<" + _SCALARS[array.type])
        if array.type == _BOOL:  # bytes other than 0 and 1 are no booleans to numpy
            return np.frombuffer(self._data, np.uint8, array.count, array.offset) != 0
        return np.frombuffer(self._data, dtype, array.count, array.offset).copy()

    def _get(self, key: str, default) -> tuple[int | None, object]:
        if key in self._values:
            return self._values[key]
        if default is REQUIRED:
            raise self._refuse(f"{key} is missing.")
        return None, default


class Header:
    """`metadata` and `tensors` of the GGUF file at `path`, which stays mapped until `close`.

    Raises SourceError for anything that the format does not allow, that does not fit in the file, or that is beyond
    the limits above.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data = map_file(path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        try:
            self.data.close()
        except BufferError:  # somebody still holds a view; the mapping goes with it
            pass

    def _read(self) -> None:
        self._position, self._strings = 0, 0
        if self._take(4, "the magic") != b"GGUF":
            raise self._refuse("It does not begin with GGUF.")
        self.version = self._scalar("I", "the version")
        if self.version & 0xFFFF == 0 and self.version:
            raise self._refuse("It is big endian.", "Convert the model to GGUF on a little-endian machine.")
        if self.version not in (2, 3):
            raise self._refuse(
                f"Its version is {self.version}; 2 and 3 are known.", "Convert it with today's llama.cpp."
            )
        tensors = self._scalar("Q", "the number of tensors")
        keys = self._scalar("Q", "the number of keys")
        # A tensor takes at least 32 bytes of header (name's length, dimensions, type, offset), a key at least 13.
        if tensors > MAX_TENSORS or keys > MAX_KEYS or 32 * tensors + 13 * keys > self._left:
            raise self._refuse(f"{tensors} tensors and {keys} keys cannot be in it.")
        self.metadata = Metadata(self.data, self._refuse)
        for _ in range(keys):
            key = self._string("a key", MAX_NAME)
            if key in self.metadata:
                raise self._refuse(f"The key {key!r:.80} is there twice.")
            label = f"{key!r:.80}"
            self.metadata._values[key] = self._value(self._scalar("I", label), label)
        self.alignment = self.metadata.integer("general.alignment", 32, 1, MAX_ALIGNMENT)
        if self.alignment & (self.alignment - 1):
            raise self._refuse(f"general.alignment is {self.alignment}, not a power of two.")
        found = [self._tensor() for _ in range(tensors)]
        base = -(-self._position // self.alignment) * self.alignment
        self.tensors = self._place(found, base)

    @property
    def _left(self) -> int:
        return len(self.data) - self._position

    def _take(self, length: int, what: str) -> bytes:
        if length > self._left:
            raise self._refuse(f"It ends within {what}: {length} bytes wanted, {self._left} left.")
        self._position += length
        return self.data[self._position - length : self._position]

    def _scalar(self, code: str, what: str):
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))[0]

    def _string(self, what: str, limit: int) -> str:
        length = self._scalar("Q", what)
        if length > limit:
            raise self._refuse(f"{what} is {length} bytes long; {limit} is the limit.")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise self._refuse(f"{what} is not UTF-8.") from None

    def _value(self, kind: int, key: str) -> tuple[int, object]:
        if kind == _STRING:
            return kind, self._string(key, 1 << 24)
        if kind == _ARRAY:
            return kind, self._array(key)
        if kind not in _SCALARS:
            raise self._refuse(f"{key} has the unknown type {kind}.")
        value = self._scalar(_SCALARS[kind], key)
        return kind, bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> _Array:
        kind = self._scalar("I", key)
        count = self._scalar("Q", key)
        array = _Array(kind, count, self._position)
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind]) * count
            if size > self._left:
                raise self._refuse(f"{key} has {count} elements; {self._left} bytes are left.")
            self._position += size
        elif kind == _STRING:
            self._skip_strings(count, key)
        else:  # an array of arrays is allowed on paper; nothing writes one and llama.cpp refuses it too
            raise self._refuse(f"{key} is an array of the type {kind}.")
        return array

    def _skip_strings(self, count: int, key: str) -> None:
        self._strings += count
        if 8 * count > self._left or self._strings > MAX_STRINGS:
            raise self._refuse(
                f"{key} has {count} strings; {self._left} bytes are left and {MAX_STRINGS} is the limit."
            )
        data, position, last = self.data, self._position, len(self.data) - 8
        length_at = struct.Struct("<Q").unpack_from
        for index in range(count):
            if position > last:
                raise self._refuse(f"It ends within {key}, at string {index} of {count}.")
            position += 8 + length_at(data, position)[0]
        if position > len(data):
            raise self._refuse(f"It ends within {key}.")
        self._position = position

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
        name = self._string("a tensor's name", MAX_NAME)
        label = f"the tensor {name!r:.80}"
        count = self._scalar("I", label)
        if not 1 <= count <= MAX_DIMENSIONS:
            raise self._refuse(f"It gives {label} {count} dimensions.")
        shape = tuple(self._scalar("Q", label) for _ in range(count))[::-1]
        kind = self._scalar("I", label)
        offset = self._scalar("Q", label)
        try:
            kind = GGMLQuantizationType(kind)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self._refuse(f"It gives {label} the unknown type {kind}.") from None
        elements = math.prod(shape)
        if elements == 0 or shape[-1] % block:
            raise self._refuse(f"It gives {label} the shape {shape}, which {kind.name} cannot have.")
        if offset % self.alignment:
            raise self._refuse(f"It places {label} at {offset}, not a multiple of {self.alignment}.")
        return name, shape, kind, offset, elements // block * size

    def _place(self, found: list, base: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset, size in found:
            if base + offset + size > len(self.data):
                raise self._refuse(
                    f"The tensor {name!r:.80} of shape {shape} ends at byte {base + offset + size} of {len(self.data)}."
                )
            if name in tensors:
                raise self._refuse(f"The tensor {name!r:.80} is there twice.")
            tensors[name] = Tensor(name, shape, kind, base + offset, size, self.data)
        end = 0
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._refuse(f"The tensor {tensor.name!r:.80} overlaps another one.")
            end = tensor.offset + tensor.bytes
        return tensors

    def _refuse(self, why: str, fix: str = "Download it again, or convert the model to GGUF again.") -> SourceError:
        return SourceError(f"The GGUF file {self.path} cannot be used.", why, fix)
