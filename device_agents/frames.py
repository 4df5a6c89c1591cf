"""Frames: what two peers' streams of bytes are cut into, and back. docs/protocol.md has the layout, byte by byte.

It promises that any bytes become frames or a ProtocolError, that a length is judged before a byte of it is kept, and
that no more than one frame is ever held. It knows nothing of what a frame means beyond its own shape: protocol.py does.
"""

from enum import IntEnum
from typing import NamedTuple

from shoal.runtime.errors import LinkError

MAX_PAYLOAD = (1 << 14) - 1  # a length of two bytes, and a frame that fits one TLS record
MAX_STREAM = (1 << 31) - 1
MAX_HEADER = 1 + 5 + 2
MAX_WHY = 200  # bytes: a frame that says why fits the smallest chunk

IGNORABLE, END, BRIEF, TYPE = 0x80, 0x40, 0x20, 0x1F  # the first byte of a frame: three flags and its type


class Type(IntEnum):
    """Those from PING on are about the connection, those before it about a stream."""

    DATA = 0
    OPEN = 1
    ANSWER = 2
    CREDIT = 3
    RESET = 4
    PING = 16
    PONG = 17
    GO_AWAY = 18
    CLOSE = 19


MAY_END = frozenset({Type.DATA, Type.OPEN, Type.ANSWER})
_KNOWN = frozenset(Type)


class ProtocolError(LinkError):
    """The peer broke a rule of the protocol: the connection is over."""


def refuse(why: str) -> ProtocolError:
    """`why` names the frame and the field."""
    return ProtocolError(
        "The peer does not keep to the protocol.", why, "Connect again; if it stays, update shoal on both sides."
    )


class Frame(NamedTuple):
    """`stream` is 0 where the frame is about the connection."""

    type: int
    stream: int
    end: bool
    payload: bytes


def varint(value: int) -> bytes:
    """Seven bits a byte, low ones first, the high bit set on all but the last (LEB128)."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Short(Exception):
    """What is there ends inside a frame."""


def read_varint(data: bytes | bytearray, at: int, most: int, field: str) -> tuple[int, int]:
    """(value, position after it) of the number at `at`, the only way to write it and at most `most`.

    Raises ProtocolError as soon as the number cannot be right, and _Short when it may be but is not whole.
    """
    value = shift = 0
    while True:
        if at >= len(data):
            raise _Short
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if value > most or shift > 35:
            raise refuse(f"{field} is over {most}.")
        if byte < 0x80:
            if byte == 0 and shift > 7:
                raise refuse(f"{field} is written with more bytes than it needs.")
            return value, at


def payload_varint(payload: bytes, at: int, most: int, field: str) -> tuple[int, int]:
    """The same inside a frame, where what is not whole is wrong."""
    try:
        return read_varint(payload, at, most, field)
    except _Short:
        raise refuse(f"{field} is cut short.") from None


def reason(why: str) -> bytes:
    """`why` as it ends a RESET, GO_AWAY or CLOSE: UTF-8, cut at 200 bytes."""
    return why.encode(errors="replace")[:MAX_WHY].decode(errors="ignore").encode()


def read_reason(payload: bytes) -> str:
    """The same read, fit for a terminal."""
    if len(payload) > MAX_WHY:
        raise refuse(f"A reason has {len(payload)} bytes, over the limit of {MAX_WHY}.")
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in payload.decode(errors="replace"))


class Encoder:
    """Writes headers; it remembers the last stream named, so that a run of frames of one stream names it once."""

    def __init__(self) -> None:
        self._stream = 0

    def header(self, type: Type, stream: int, length: int, end: bool = False) -> bytes:
        first = type | (END if end else 0)
        if not stream or stream == self._stream:
            return bytes((first | BRIEF,)) + varint(length)
        self._stream = stream
        return bytes((first,)) + varint(stream) + varint(length)

    def frame(self, type: Type, stream: int, payload: bytes, end: bool = False) -> bytes:
        return self.header(type, stream, len(payload), end) + payload


class Decoder:
    """Bytes in by `feed`, whole frames out by `next`. `len()` is what it holds."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._stream = 0

    def __len__(self) -> int:
        return len(self._buffer) - self._at

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Frame | None:
        """The next frame, None when it is not whole yet. Ignorable ones of unknown types are left out."""
        try:
            while (frame := self._frame()).type not in _KNOWN:
                pass
            return frame
        except _Short:
            del self._buffer[: self._at]
            self._at = 0
            return None

    def _frame(self) -> Frame:
        buffer, at, stream = self._buffer, self._at, self._stream
        if at == len(buffer):
            raise _Short
        first = buffer[at]
        at += 1
        type, end = first & TYPE, bool(first & END)
        if type not in _KNOWN and not first & IGNORABLE:
            raise refuse(f"A frame's type is {type}, which is unknown and not to be ignored.")
        if type in _KNOWN and end and type not in MAY_END:
            raise refuse(f"A frame of type {Type(type).name} ends a stream.")
        if type >= Type.PING:
            if not first & BRIEF:
                raise refuse(f"A frame of type {type} is about the connection and names a stream.")
        elif not first & BRIEF:
            stream, at = read_varint(buffer, at, MAX_STREAM, "A frame's stream")
            if not stream:
                raise refuse("A frame's stream is 0.")
        elif not stream:
            raise refuse("A frame is about the last stream named, and none was.")
        length, at = read_varint(buffer, at, MAX_PAYLOAD, "A frame's length")
        if len(buffer) - at < length:
            raise _Short
        self._at, self._stream = at + length, stream
        return Frame(type, 0 if type >= Type.PING else stream, end, bytes(buffer[at : at + length]))
