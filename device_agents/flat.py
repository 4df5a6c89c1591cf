"""Frozen dataclasses as FlatBuffers: one walk writes a table, one walk checks and reads it.

A class's typed fields, in order, are the slots of its table: bool, int (int64), float (double), str, bytes, another
class, and tuples of these. So the class is the schema; `schema` prints it for other languages. A class may grow at its
end: slots beyond it are not followed, and an absent one is the class's default.

The format is https://flatbuffers.dev/internals; its Python library has no verifier and writes one value per call, so
both walks are here. Every offset, vtable, vector and string is compared with the buffer before it is used, and what a
buffer unfolds to is bounded too, for offsets that meet in one place would make much out of little. Types do not
recurse, so neither walk is deeper than the classes are nested. It knows nothing about messages or links.
"""

import dataclasses
import math
import struct
import types
import typing
from typing import Any, NamedTuple, TypeVar

from shoal.runtime.errors import LinkError, UsageError

MAX_BYTES = (64 << 10) - 2  # a stream's head less a type number; larger things are bodies

_U16, _U32, _I32, _I64, _F64 = (struct.Struct(f"<{letter}") for letter in "HIiqd")
_LETTER = {bool: "?", int: "q", float: "d"}
_WIDTH = {bool: 1, int: 8, float: 8}  # anything else is a 4-byte offset to it
_REQUIRED = dataclasses.MISSING
_SLOTS: dict[type, tuple["Slot", ...]] = {}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Blob:
    """What stands in a vector for bytes: FlatBuffers has no vectors of vectors."""

    value: bytes = b""


class Slot(NamedTuple):
    """One slot of a table: `kind` is bool, int, float, str, bytes or a class, `many` a vector of them; `default` is
    what absence means, `_REQUIRED` where it is an error."""

    name: str
    kind: Any
    many: bool
    default: Any

    @property
    def width(self) -> int:
        """Bytes inside the table."""
        return 4 if self.many else _WIDTH.get(self.kind, 4)


def slots(kind: type) -> tuple[Slot, ...]:
    """The table of a class. Raises TypeError where FlatBuffers could not say the same."""
    if kind not in _SLOTS:
        hints = typing.get_type_hints(kind)
        _SLOTS[kind] = tuple(_slot(field, hints[field.name]) for field in dataclasses.fields(kind))
    return _SLOTS[kind]


def _slot(field: dataclasses.Field, hint: Any) -> Slot:
    default, many = field.default, typing.get_origin(hint) is tuple
    if isinstance(hint, types.UnionType):  # `Health | None`: absent
        hint = next(one for one in hint.__args__ if one is not types.NoneType)
    elif many:
        hint = typing.get_args(hint)[0]
    if not many and hint in _WIDTH:
        default = hint() if default is _REQUIRED else default  # an absent scalar is a default one: there is no other
    elif hint not in (bool, int, float, str, bytes) and not dataclasses.is_dataclass(hint):
        raise TypeError(f"{field.name} is a {hint}")
    elif default is not _REQUIRED and default not in ((), "", b"", None):
        raise TypeError(f"{field.name} has the default {default!r}")
    return Slot(field.name, hint, many, default)


def pack(value: Any) -> bytes:
    """A FlatBuffer with the root `value`. Raises UsageError where a field does not fit its type, or all is too long."""
    out = bytearray(4)
    try:
        _U32.pack_into(out, 0, _put_table(out, value, {}))
    except (struct.error, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{type(value).__name__} cannot be sent.", f"A field does not fit its type: {error}.", "Mend the value."
        ) from None
    if len(out) > MAX_BYTES:
        raise UsageError(
            f"{type(value).__name__} cannot be sent.",
            f"It has {len(out)} bytes, over the limit of {MAX_BYTES}.",
            "Send what is large as the body.",
        )
    return bytes(out)


def _put_table(out: bytearray, value: Any, vtables: dict[bytes, int]) -> int:
    """Appends a table, then what it points to. Returns its position."""
    fields = slots(type(value))
    present = []
    for number, slot in enumerate(fields):
        found = getattr(value, slot.name)
        if slot.kind is bytes and slot.many:
            found = tuple(map(Blob, found))
        absent = found is None if slot.default is _REQUIRED else _same(found, slot.default)
        if not absent:
            present.append((slot.width, number, slot, found))
        elif slot.default is _REQUIRED:
            raise ValueError(f"{slot.name} is missing")
    present.sort(key=lambda one: -one[0])  # the widest first, so that nothing needs a gap
    size, offsets = 4, [0] * (max((one[1] for one in present), default=-1) + 1)
    for width, number, _, _ in present:
        offsets[number] = size
        size += width
    vtable = struct.pack(f"<{2 + len(offsets)}H", 4 + 2 * len(offsets), size, *offsets)
    where = vtables.get(vtable)
    if where is None:
        where = vtables[vtable] = _pad(out, 2)
        out += vtable
    start = _pad(out, 8, 4)  # 8-byte fields follow the 4-byte way to the vtable
    out += bytes(size)
    _I32.pack_into(out, start, start - where)
    for _, number, slot, found in present:
        at = start + offsets[number]
        if not slot.many and slot.kind in _LETTER:
            struct.pack_into("<" + _LETTER[slot.kind], out, at, found)
        else:
            _U32.pack_into(out, at, _put(out, slot.kind, slot.many, found, vtables) - at)
    return start


def _put(out: bytearray, kind: Any, many: bool, value: Any, vtables: dict[bytes, int]) -> int:
    """Appends a string, vector or table and returns its position."""
    if many:
        if kind in _LETTER:
            start = _pad(out, 8, 4)
            out += struct.pack(f"<I{len(value)}{_LETTER[kind]}", len(value), *value)
            return start
        start = _pad(out, 4)
        out += _U32.pack(len(value)) + bytes(4 * len(value))
        for at, one in zip(range(start + 4, start + 4 + 4 * len(value), 4), value, strict=True):
            _U32.pack_into(out, at, _put(out, Blob if kind is bytes else kind, False, one, vtables) - at)
        return start
    if kind is str or kind is bytes:
        data = value.encode() + b"\0" if kind is str else bytes(memoryview(value))
        start = _pad(out, 4)
        out += _U32.pack(len(data) - (kind is str)) + data
        return start
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} is not a {kind.__name__}")
    return _put_table(out, value, vtables)


def _pad(out: bytearray, alignment: int, rest: int = 0) -> int:
    out += bytes((rest - len(out)) % alignment)
    return len(out)


def _same(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return len(value) == 0
    if value != value:
        return default != default  # NaN is NaN
    return value == default and repr(value) == repr(default)  # and -0.0 is not 0.0


class _Malformed(Exception):
    def __init__(self, phrase: str):
        super().__init__(phrase)
        self.where: list[str] = []


def unpack(kind: type[T], data: bytes) -> T:
    """The `kind` that is the root of `data`, all of it checked. Raises LinkError, which names the field."""
    try:
        if not 8 <= len(data) <= MAX_BYTES:
            raise _Malformed(f"has {len(data)} bytes")
        return _Reader(data).table(_U32.unpack_from(data)[0], kind)
    except _Malformed as error:
        raise LinkError(
            "A message of the peer cannot be read.",
            f"{'.'.join([kind.__name__, *error.where])} {error}.",
            "Run the same version of shoal on both sides.",
        ) from None


class _Reader:
    """One buffer, and how many bytes it may still unfold to."""

    def __init__(self, data: bytes):
        self._data, self._left = data, MAX_BYTES

    def table(self, position: int, kind: type[T]) -> T:
        """The table at `position`."""
        data = self._data
        if position % 4 or not 4 <= position <= len(data) - 4:
            raise _Malformed(f"lies at byte {position} of {len(data)}")
        vtable = position - _I32.unpack_from(data, position)[0]
        if vtable % 2 or not 4 <= vtable <= len(data) - 4:
            raise _Malformed(f"has its vtable at byte {vtable} of {len(data)}")
        vtable_size, size = _U16.unpack_from(data, vtable)[0], _U16.unpack_from(data, vtable + 2)[0]
        if vtable_size % 2 or not 4 <= vtable_size <= len(data) - vtable:
            raise _Malformed(f"has a vtable of {vtable_size} bytes")
        if not 4 <= size <= len(data) - position:
            raise _Malformed(f"has a size of {size} bytes")
        self._spend(size)
        values = []
        for number, slot in enumerate(slots(kind)):
            entry = 4 + 2 * number
            offset = _U16.unpack_from(data, vtable + entry)[0] if entry < vtable_size else 0
            try:
                values.append(self._slot(position, offset, size, slot))
            except _Malformed as error:
                error.where.insert(0, slot.name)
                raise
        return kind(*values)

    def _slot(self, position: int, offset: int, size: int, slot: Slot) -> Any:
        if not offset:
            if slot.default is _REQUIRED:
                raise _Malformed("is missing")
            return slot.default
        at, width = position + offset, slot.width
        if not 4 <= offset <= size - width or at % width:
            raise _Malformed(f"lies at byte {offset} of its table")
        if slot.many:
            return self._vector(self._follow(at), slot.kind)
        if slot.kind is bool:
            return self._bool(self._data[at])
        if slot.kind is int:
            return _I64.unpack_from(self._data, at)[0]
        if slot.kind is float:
            return _F64.unpack_from(self._data, at)[0]
        return self._pointed(self._follow(at), slot.kind)

    def _follow(self, at: int) -> int:
        """Where the offset at `at` leads. Offsets are unsigned: they only lead forward."""
        start = at + _U32.unpack_from(self._data, at)[0]
        if start % 4 or not at < start <= len(self._data) - 4:
            raise _Malformed(f"leads to byte {start} of {len(self._data)}")
        return start

    def _count(self, start: int, width: int, more: int = 0) -> int:
        """How many elements of `width` bytes begin after the count at `start`; `more` bytes follow them."""
        count = _U32.unpack_from(self._data, start)[0]
        if count * width + more > len(self._data) - start - 4:
            raise _Malformed(f"has {count} elements and {len(self._data) - start - 4} bytes left")
        self._spend(4 + count * width)
        return count

    def _vector(self, start: int, kind: Any) -> tuple:
        width = _WIDTH.get(kind, 4)
        count, first = self._count(start, width), start + 4
        if first % width:
            raise _Malformed(f"has its elements at byte {first}")
        if kind is bool:
            return tuple(map(self._bool, self._data[first : first + count]))
        if kind in _LETTER:
            return struct.unpack_from(f"<{count}{_LETTER[kind]}", self._data, first)
        elements = (self._follow(at) for at in range(first, first + 4 * count, 4))
        if kind is bytes:
            return tuple(self.table(element, Blob).value for element in elements)
        return tuple(self._pointed(element, kind) for element in elements)

    def _pointed(self, start: int, kind: Any) -> Any:
        """The string, bytes or table at `start`."""
        if kind is bytes:
            count = self._count(start, 1)
            return bytes(self._data[start + 4 : start + 4 + count])
        if kind is not str:
            return self.table(start, kind)
        count = self._count(start, 1, more=1)
        end = start + 4 + count
        if self._data[end]:
            raise _Malformed("does not end in a zero byte")
        try:
            return str(self._data[start + 4 : end], "utf-8")
        except UnicodeDecodeError:
            raise _Malformed("is not UTF-8") from None

    def _bool(self, byte: int) -> bool:
        if byte > 1:
            raise _Malformed(f"is {byte}, not true or false")
        return byte == 1

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _Malformed(f"unfolds to more than {MAX_BYTES} bytes")


_WORD = {bool: "bool", int: "long", float: "double", str: "string", bytes: "[ubyte]"}


def schema(kinds: typing.Iterable[type]) -> str:
    """The same tables in FlatBuffers' own language (.fbs), those that they nest included."""
    tables: dict[type, str] = {}

    def add(kind: type) -> None:
        if kind in tables:
            return
        tables[kind] = ""  # its place, before those it nests
        lines = []
        for slot in slots(kind):
            word = _WORD.get(slot.kind, getattr(slot.kind, "__name__", ""))
            if slot.many and slot.kind is bytes:
                word = "Blob"
                add(Blob)
            elif slot.kind not in _WORD:
                add(slot.kind)
            note = ""
            if slot.default is _REQUIRED:
                note = " (required)"
            elif slot.default not in ((), "", b"", None, 0):
                note = " = nan" if math.isnan(slot.default) else f" = {str(slot.default).lower()}"
            lines.append(f"  {slot.name}:{f'[{word}]' if slot.many else word}{note};\n")
        tables[kind] = f"table {kind.__name__} {{\n{''.join(lines)}}}\n"

    for kind in kinds:
        add(kind)
    return "\n".join(tables.values())
