"""The frame layer: what goes in comes out, and what was changed on the way never does."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.device_agents.links import cobs


def _by_the_book(data: bytes) -> bytes:
    """COBS a byte at a time, as the paper has it."""
    out, at, code = bytearray(b"\0"), 0, 1
    for index, byte in enumerate(data):
        if byte:
            out.append(byte)
            code += 1
        if byte == 0 or (code == 255 and index + 1 < len(data)):
            out[at], at, code = code, len(out), 1
            out.append(0)
    out[at] = code
    return bytes(out)


@given(
    st.lists(st.sampled_from([b"\0", b"\1", b"x" * 253, b"y" * 254, b"z" * 255, b"\xff"]), max_size=12).map(b"".join)
)
@example(b"")
@example(b"a" * 254)
@example(b"a" * 508 + b"\0")
def test_encode_is_cobs_and_decode_takes_it_back(data):
    encoded = cobs.encode(data)
    assert encoded == _by_the_book(data)
    assert b"\0" not in encoded and len(encoded) <= len(data) + 1 + len(data) // 254
    assert cobs.decode(encoded) == data


def test_the_example_of_the_paper():
    assert cobs.encode(b"\x11\x22\0\x33") == b"\x03\x11\x22\x02\x33"
    assert cobs.encode(bytes(3)) == b"\1\1\1\1"


@pytest.mark.parametrize("data", [b"\5abc", b"\0", b"\2a\0", b"\xff" + b"a" * 253])
def test_what_is_not_cobs(data):
    assert cobs.decode(data) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_a_frame_or_not(data):
    opened = cobs.unseal(data)
    assert opened is None or len(opened[0]) >= 1


def test_two_keys_never_agree():
    rng = random.Random(5)
    for _ in range(2000):
        body, one, other = rng.randbytes(rng.randrange(1, 60)), rng.getrandbits(32), rng.getrandbits(32)
        opened = cobs.unseal(cobs.seal(body, one)[:-1])
        assert opened is not None and opened[0] == body
        assert cobs.genuine(*opened, one)
        assert one == other or not cobs.genuine(*opened, other)


def _undetected(frames: int) -> int:
    """Corrupted frames of which anything but the original body was taken as genuine."""
    rng = random.Random(11)
    wrong = harmed = 0
    key = 0x1234_5678
    while harmed < frames:
        body = rng.randbytes(rng.choice((2, 9, 30, 60, 250)))
        sealed = cobs.seal(body, key)
        line = bytearray(sealed)
        kind = rng.randrange(5)
        if kind == 0:  # scattered bits
            for _ in range(rng.randrange(1, 9)):
                line[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # a burst
            start = rng.randrange(len(line))
            for at in range(start, min(len(line), start + rng.randrange(1, 12))):
                line[at] = rng.randrange(256)
        elif kind == 2:  # bytes lost
            start = rng.randrange(len(line))
            del line[start : start + rng.randrange(1, 6)]
        elif kind == 3:  # bytes that were not sent
            start = rng.randrange(len(line))
            line[start:start] = rng.randbytes(rng.randrange(1, 6))
        else:  # two neighbours change places
            at = rng.randrange(len(line) - 1)
            line[at], line[at + 1] = line[at + 1], line[at]
        if line == sealed:
            continue
        harmed += 1
        for piece in bytes(line).split(b"\0"):
            opened = cobs.unseal(piece)
            wrong += opened is not None and opened[0] != body and cobs.genuine(*opened, key)
    return wrong


def test_no_error_goes_undetected():
    assert _undetected(100_000) == 0


@pytest.mark.deep
def test_no_error_goes_undetected_in_a_million():
    assert _undetected(1_000_000) == 0
