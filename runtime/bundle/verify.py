"""Decides whether bytes are a bundle, before anything is allocated for them and before FlatBuffers reads one.

Four steps, in this order: `header` (64 bytes against the file's size), `digest` (nothing changed since it was written),
`structure` (every offset, vtable, vector and string of the index stays inside it and in its limits) and `rules`
(what the entries say makes sense together). The FlatBuffers library for Python has no verifier; `structure` follows
the specification at https://flatbuffers.dev/internals, driven by the tables below, which mirror schema.fbs.

A failure is a BundleError whose `why` begins with the field. It knows nothing about files: bytes and sizes come in.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import BundleError
from . import layout
from .layout import Graph, Header, Section

_AGAIN = "Copy the file again, or convert the checkpoint again."

_U16, _U32, _I32 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i")


class _Field(NamedTuple):
    """A slot of a table. `most` bounds a string or vector (bytes, elements), `items` are the fields of its tables."""

    name: str
    type: str  # bool, uint, ulong, string, sha256, tables
    most: int = 0
    items: tuple["_Field", ...] = ()


_WIDTH = {"bool": 1, "uint": 4, "ulong": 8}  # anything else is a 4-byte offset to it, and required
_SECTION = (
    _Field("kind", "string", layout.MAX_NAME),
    _Field("name", "string", layout.MAX_NAME),
    _Field("offset", "ulong"),
    _Field("length", "ulong"),
    _Field("alignment", "uint"),
    _Field("required", "bool"),
    _Field("sha256", "sha256", 32),
)
_GRAPH = (
    _Field("name", "string", layout.MAX_NAME),
    _Field("role", "string", layout.MAX_NAME),
    _Field("backend", "string", layout.MAX_NAME),
    _Field("chunk", "uint"),
    _Field("first_block", "uint"),
    _Field("last_block", "uint"),
    _Field("section", "string", layout.MAX_NAME),
)
# The schema does not recurse, so neither does a walk along it: two levels of tables, each counted.
_INDEX = (
    _Field("sections", "tables", layout.MAX_SECTIONS, _SECTION),
    _Field("graphs", "tables", layout.MAX_GRAPHS, _GRAPH),
)


def header(data: bytes, size: int) -> Header:
    """Reads and checks the header of a file of `size` bytes; `data` holds its first 64, or all if there are fewer."""
    if len(data) < layout.HEADER.size:
        raise refuse(f"header is cut short: the file has {size} bytes")
    found = Header(*layout.HEADER.unpack_from(data))
    if found.magic != layout.MAGIC:
        raise refuse(f"magic is {found.magic!r}", "Give a .shoal file; `shoal convert` makes one from a checkpoint.")
    if found.major > layout.MAJOR or found.flags & ~layout.FLAGS:
        raise _unknown(f"version is {found.major}.{found.minor} with flags {found.flags:#x}", found)
    if found.major < 1:
        raise refuse(f"version is {found.major}.{found.minor}, which never existed")
    if found.file_length != size:
        raise refuse(f"file length is {found.file_length} bytes, but the file has {size}")
    if found.index_length > layout.MAX_INDEX:
        raise refuse(f"index length is {found.index_length} bytes, over the limit of {layout.MAX_INDEX}")
    if found.index_offset < layout.HEADER.size or found.index_offset % layout.INDEX_ALIGNMENT:
        raise refuse(f"index offset is {found.index_offset}")
    if found.index_offset + found.index_length != size:
        raise refuse(f"index ends at byte {found.index_offset + found.index_length}, the file at {size}")
    return found


def digest(data: bytes, index: bytes) -> bytes:
    """SHA-256 of the header before its digest field and the index: the identity of every byte of the bundle."""
    return hashlib.sha256(data[: layout.DIGESTED] + index).digest()


def structure(index: bytes) -> None:
    """Checks that `index` is a FlatBuffer of schema.fbs that its accessors cannot leave.

    Slots beyond the schema belong to later minor versions: the accessors never read them, so they are not followed.
    """
    if len(index) < 8:
        raise refuse(f"index is {len(index)} bytes, too short to be one")
    _table(index, _U32.unpack_from(index)[0], _INDEX, "index")


def _table(data: bytes, position: int, fields: tuple[_Field, ...], where: str) -> None:
    if position % 4 or not 4 <= position <= len(data) - 4:
        raise refuse(f"{where} lies at byte {position} of {len(data)}")
    vtable = position - _I32.unpack_from(data, position)[0]
    if vtable % 2 or not 4 <= vtable <= len(data) - 4:
        raise refuse(f"{where} has its vtable at byte {vtable} of {len(data)}")
    vtable_size, table_size = _U16.unpack_from(data, vtable)[0], _U16.unpack_from(data, vtable + 2)[0]
    if vtable_size % 2 or not 4 <= vtable_size <= len(data) - vtable:
        raise refuse(f"{where} has a vtable of {vtable_size} bytes")
    if not 4 <= table_size <= len(data) - position:
        raise refuse(f"{where} has a size of {table_size} bytes")
    for slot, field in enumerate(fields):
        entry = 4 + 2 * slot
        offset = _U16.unpack_from(data, vtable + entry)[0] if entry < vtable_size else 0
        width = _WIDTH.get(field.type)
        if offset:
            if not 4 <= offset <= table_size - (width or 4) or (position + offset) % (width or 4):
                raise refuse(f"{where}.{field.name} lies at byte {offset} of its table")
            if not width:
                _pointed(data, position + offset, field, f"{where}.{field.name}")
            elif field.type == "bool" and data[position + offset] > 1:
                raise refuse(f"{where}.{field.name} is {data[position + offset]}, not true or false")
        elif not width:
            raise refuse(f"{where}.{field.name} is missing")


def _pointed(data: bytes, position: int, field: _Field, where: str) -> None:
    """The string or vector that the offset at `position` leads to. Offsets are unsigned: they only lead forward."""
    start = position + _U32.unpack_from(data, position)[0]
    if start % 4 or not position < start <= len(data) - 4:
        raise refuse(f"{where} leads to byte {start} of {len(data)}")
    count, first = _U32.unpack_from(data, start)[0], start + 4
    if count > field.most:
        raise refuse(f"{where} has {count} elements, over the limit of {field.most}")
    if count * (4 if field.type == "tables" else 1) + (field.type == "string") > len(data) - first:
        raise refuse(f"{where} has {count} elements and {len(data) - first} bytes left")
    if field.type == "tables":
        for number, element in enumerate(range(first, first + 4 * count, 4)):
            _table(data, element + _U32.unpack_from(data, element)[0], field.items, f"{where}[{number}]")
    elif field.type == "sha256":
        if count != field.most:
            raise refuse(f"{where} has {count} bytes, not {field.most}")
    else:
        if data[first + count]:
            raise refuse(f"{where} does not end in a zero byte")
        try:
            data[first : first + count].decode()
        except UnicodeDecodeError:
            raise refuse(f"{where} is not UTF-8") from None


def rules(found: Header, sections: Sequence[Section], graphs: Sequence[Graph]) -> list[tuple[int, int]]:
    """Checks the entries together and returns the gaps (start, end) that have to be zero; they are few and short.

    A section begins at the first multiple of its alignment after the one before it, the index likewise after the last:
    so sections are sorted, none overlap, and no gap is as wide as an alignment.
    """
    gaps, seen, end = [], set(), layout.HEADER.size
    for number, section in enumerate(sections):
        where = f"sections[{number}]"
        if problem := section.problem():
            raise refuse(f"{where}.{problem}")
        if (section.kind, section.name) in seen:
            raise refuse(f"{where} is a second {section.kind!r} of the name {section.name!r}")
        seen.add((section.kind, section.name))
        if section.required and section.kind not in layout.KINDS:
            raise _unknown(f"{where} is required and of the kind {section.kind!r}", found)
        if section.offset != layout.align(end, section.alignment):
            raise refuse(f"{where}.offset is {section.offset}, not {layout.align(end, section.alignment)}")
        gaps.append((end, section.offset))
        end = section.offset + section.length
        if end > found.index_offset:
            raise refuse(f"{where}.length is {section.length}: it ends at byte {end}, inside the index")
    if found.index_offset != layout.align(end, layout.INDEX_ALIGNMENT):
        raise refuse(f"index offset is {found.index_offset}, but the sections end at byte {end}")
    gaps.append((end, found.index_offset))
    if sum(stop - start for start, stop in gaps) > layout.MAX_GAPS:
        raise refuse(f"sections have gaps of more than {layout.MAX_GAPS} bytes")
    names = set()
    for number, graph in enumerate(graphs):
        where = f"graphs[{number}]"
        if problem := graph.problem():
            raise refuse(f"{where}.{problem}")
        if graph.name in names:
            raise refuse(f"{where}.name is {graph.name!r}, a second time")
        names.add(graph.name)
        if ("graph", graph.section) not in seen:
            raise refuse(f"{where}.section is {graph.section!r}, and no graph section has that name")
    return [(start, stop) for start, stop in gaps if start < stop]


def refuse(phrase: str, fix: str = _AGAIN) -> BundleError:
    """The error for `phrase`, which begins with the field. The reader puts the file's path into `what`."""
    return BundleError("The bundle cannot be used.", f"Its {phrase}.", fix)


def _unknown(phrase: str, found: Header) -> BundleError:
    reads = f"this shoal reads {layout.MAJOR}.{layout.MINOR}"
    if (found.major, found.minor) <= (layout.MAJOR, layout.MINOR):
        return refuse(f"{phrase}, unknown here: {reads}")
    fix = "Upgrade shoal, or convert the checkpoint again with this version."
    return refuse(f"{phrase}; it needs >= {found.major}.{found.minor}, {reads}", fix)
