"""Frames on a line that only carries bytes: consistent overhead byte stuffing (COBS) and a CRC-32.

A frame is `COBS(body + crc32) 0x00`: no other byte of it is zero, so after noise the next zero is a fresh start, and
the cost is one byte and at most one in 254 more (Cheshire and Baker, IEEE/ACM Transactions on Networking 7(2), 1999).
The CRC is *keyed*: it begins at a number that both ends agreed on. For one body, two keys never give the same CRC, so a
whole frame of another session is never taken for one of this session, at no cost in bytes. A key keeps nobody out: it
is no secret. This module knows nothing of what a body means.
"""

from zlib import crc32

_CODES = [bytes([length + 1]) for length in range(254)]  # what stands before so many bytes that are not zero


def encode(data: bytes) -> bytes:
    """`data` without a zero byte: at most 1 + len(data) // 254 longer. The delimiter is not included."""
    pieces = []
    for run in data.split(b"\0"):
        if len(run) < 254:
            pieces.append(_CODES[len(run)] + run)
            continue
        whole = len(run) // 254 * 254
        for start in range(0, whole, 254):
            pieces.append(b"\xff" + run[start : start + 254])
        pieces.append(_CODES[len(run) - whole] + run[whole:])
    if pieces[-1] == b"\x01" and len(pieces) > 1 and pieces[-2][0] == 0xFF:
        pieces.pop()  # a full block at the very end implies no zero that an empty one would have to take back
    return b"".join(pieces)


def decode(data: bytes) -> bytes | None:
    """What `encode` was given, or None where `data` (one or more bytes, no delimiter) is not COBS."""
    if b"\0" in data:
        return None
    pieces = []
    position, length = 0, len(data)
    while position < length:
        code = data[position]
        end = position + code
        if end > length:
            return None
        pieces.append(data[position + 1 : end])
        if code != 0xFF and end < length:
            pieces.append(b"\0")
        position = end
    return b"".join(pieces)


def seal(body: bytes, key: int) -> bytes:
    """The frame of `body` under `key` (32 bits), delimiter included: 6 bytes longer and at most one in 254 more."""
    return encode(body + crc32(body, key).to_bytes(4, "little")) + b"\0"


def unseal(frame: bytes) -> tuple[bytes, int] | None:
    """The body and the CRC of a frame without its delimiter; None where it is no frame. `genuine` judges the CRC."""
    plain = decode(frame)
    if plain is None or len(plain) < 5:
        return None
    return plain[:-4], int.from_bytes(plain[-4:], "little")


def genuine(body: bytes, check: int, key: int) -> bool:
    """Whether this body was sealed under this key and arrived whole."""
    return crc32(body, key) == check
