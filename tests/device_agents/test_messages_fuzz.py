"""Bytes that a peer made up: a message comes out, or a LinkError; nothing else, and never much of anything."""

import random
import struct

import pytest

from shoal.device_agents import flat, messages
from shoal.device_agents.messages import Health, Mode, Model, Offer, Shape, State
from shoal.runtime.errors import LinkError

STATE = State(
    "d", (Model("ab", "m", modes=(Mode(1, 8), Mode(2, 4, 100, 1.5, 0.9))), Model("cd")), Health(50.0, 1), ("a", "bc")
)


def samples():
    """One of every message, with something in every field."""
    sample = {bool: True, int: 5, float: 1.5, str: "abc", bytes: b"\x00\xff"}

    def full(kind):
        found = []
        for slot in flat.slots(kind):
            one = sample[slot.kind] if slot.kind in sample else full(slot.kind)
            found.append((one, one) if slot.many else one)
        return kind(*found)

    return [messages.encode(full(kind)) for kind in messages.TYPES.values()] + [messages.encode(STATE)]


def judged(data):
    """Whether these bytes are a message. One that is survives being sent on."""
    try:
        message = messages.decode(data)
    except LinkError:
        return False
    assert repr(messages.decode(messages.encode(message))) == repr(message)  # repr: NaN is NaN
    return True


def mutated(seeds, random):
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        if not data:
            break
        at, kind = random.randrange(len(data)), random.randrange(7)
        if kind == 0:
            data[at] = random.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 2 and len(data) >= 4:
            word = random.choice((0, 1, 4, len(data), len(data) - at, 1 << 31, (1 << 32) - 4, (1 << 32) - 1))
            struct.pack_into("<I", data, min(at, len(data) - 4) & ~1, word & 0xFFFFFFFF)
        elif kind == 3:
            del data[at : at + random.randrange(1, 9)]
        elif kind == 4:
            data[at:at] = random.randbytes(random.randrange(1, 9))
        elif kind == 5:
            data[at:] = random.choice(seeds)[at:]
        elif len(data) >= 8:
            source = random.randrange(len(data) - 3) & ~3
            data[at & ~3 : (at & ~3) + 4] = data[source : source + 4]
    return bytes(data)


def fuzz(count, seed):
    seeds, source = samples(), random.Random(seed)
    return sum(judged(mutated(seeds, source)) for _ in range(count))


def test_mutated_messages():
    good = fuzz(200_000, seed=8)
    assert 10_000 < good < 190_000  # both ways were walked


@pytest.mark.deep
def test_many_mutated_messages():
    fuzz(10_000_000, seed=9)


def test_every_byte_and_every_length():
    for seed in (messages.encode(STATE), messages.encode(Offer(b"xy", (b"1", b"22")))):
        assert judged(seed)
        for at in range(len(seed)):
            judged(seed[:at])
            for value in {0, 0xFF, (seed[at] + 1) & 0xFF, *(seed[at] ^ 1 << bit for bit in range(8))}:
                judged(seed[:at] + bytes([value]) + seed[at + 1 :])


def test_noise():
    source = random.Random(3)
    for number in (0, 1, 11, 20, 9999):
        for size in (*range(40), 1000, flat.MAX_BYTES, flat.MAX_BYTES + 1):
            judged(struct.pack("<H", number) + source.randbytes(size))


def test_the_largest_that_unfolds_is_bounded():
    """As many tables as 64 KiB can hold become that many objects, and no more."""
    shapes = tuple(Shape() for _ in range(4000))
    message = messages.decode(messages.encode(messages.Infer("t", shapes=shapes)))
    assert len(message.shapes) == 4000
