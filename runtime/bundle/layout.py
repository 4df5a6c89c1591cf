"""What a bundle is made of: the header, the limits and the entries of the index, as docs/format.md lays them down.

Values only. It knows nothing about files or FlatBuffers.
"""

import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

MAGIC = b"\x89shoal"  # the first byte is not text, so a tool that mangles text is found out
MAJOR, MINOR = 1, 0
FLAGS = 0  # the header flags this version understands: none yet, and every flag is required
HEADER = struct.Struct("<6sBBIIQQ32s")  # magic, major, minor, flags, index length, file length, index offset, digest
DIGESTED = 32  # bytes of the header under the digest: all that come before it

INDEX_ALIGNMENT = 8
MAX_INDEX = 16 << 20
MAX_ALIGNMENT = 1 << 20
MAX_SECTIONS = 1024
MAX_GRAPHS = 1024
MAX_NAME = 255
MAX_GAPS = 64 << 20  # all gaps together: opening a file reads them, so a hostile one must not hold gigabytes

KINDS = frozenset(
    {"card", "recipe", "graph", "weights", "tokenizer", "chat_template", "parity", "modes", "codec", "stack", "experts",
     "static", "context_binary"}
)  # fmt: skip
RESERVED = frozenset({"adapter", "signature"})

_WORD = re.compile(r"[a-z][a-z0-9_.-]{0,63}")


class Header(NamedTuple):
    """The first 64 bytes, in the file's order (lengths and offsets in bytes, `digest` 32 bytes)."""

    magic: bytes
    major: int
    minor: int
    flags: int
    index_length: int
    file_length: int
    index_offset: int
    digest: bytes


@dataclass(frozen=True)
class Section:
    """A named run of bytes: `offset` from the start of the file, `length`, the `alignment` of the offset in bytes.

    `required` means that a reader which does not know the kind must refuse the file.
    """

    kind: str
    name: str
    offset: int
    length: int
    alignment: int
    required: bool
    sha256: bytes

    def problem(self) -> str:
        """What is wrong with this entry by itself, starting with the field's name; empty when nothing is."""
        if not _WORD.fullmatch(self.kind):
            return f"kind is {self.kind!r:.80}, not a lower-case word"
        if not _is_name(self.name):
            return f"name is {self.name!r:.80}, not at most {MAX_NAME} bytes of printable UTF-8"
        if not (0 < self.alignment <= MAX_ALIGNMENT and self.alignment & (self.alignment - 1) == 0):
            return f"alignment is {self.alignment}, not a power of two up to {MAX_ALIGNMENT}"
        return ""


@dataclass(frozen=True)
class Graph:
    """An ONNX graph over the blocks range(first_block, last_block), so last_block itself is not in it.

    `role` says what it computes (decode, embed, ...), `backend` for which processor it was made (cpu, gpu, npu, ...),
    `chunk` how many tokens it takes a step (0: any number), `section` which section of kind "graph" holds it.
    """

    name: str
    role: str
    backend: str
    chunk: int
    first_block: int
    last_block: int
    section: str

    def problem(self) -> str:
        """What is wrong with this entry by itself, starting with the field's name; empty when nothing is."""
        for field in ("name", "section"):
            if not _is_name(getattr(self, field)):
                return f"{field} is {getattr(self, field)!r:.80}, not at most {MAX_NAME} bytes of printable UTF-8"
        for field in ("role", "backend"):
            if not _WORD.fullmatch(getattr(self, field)):
                return f"{field} is {getattr(self, field)!r:.80}, not a lower-case word"
        for field in ("chunk", "first_block", "last_block"):
            if not 0 <= getattr(self, field) < 1 << 32:
                return f"{field} is {getattr(self, field)}, outside 0 to 2^32-1"
        if self.first_block > self.last_block:
            return f"first_block is {self.first_block}, after last_block {self.last_block}"
        return ""


def _is_name(text: str) -> bool:
    # Not printable: control characters and escape sequences (names reach terminals), lone surrogates.
    return text.isprintable() and len(text.encode()) <= MAX_NAME


def align(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` (a power of two) that is not before `offset`."""
    return -(-offset // alignment) * alignment
