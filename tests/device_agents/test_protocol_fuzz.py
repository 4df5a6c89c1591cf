"""Whatever arrives, the protocol reports events or raises ProtocolError, and holds no more than its limits.

Inputs are noise, and sentences of a grammar of frames that are right, nearly right, or damaged afterwards. Each goes in
whole and byte by byte, into a side that already has streams of its own; both must report the same.
"""

import random
from collections.abc import Iterable

import pytest

from shoal.device_agents.frames import MAX_HEADER, MAX_PAYLOAD, Type, varint
from shoal.device_agents.protocol import Limits, Priority, Protocol, ProtocolError, Reset, State

LIMITS = Limits(streams=8, window=48 << 10, buffered=300_000)
NUMBERS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 127, 128, 300, 16_383, 16_384, 65_536, 2**31 - 1, 2**31, 2**35, 2**70]


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 40))


def number(rng: random.Random) -> bytes:
    """Mostly small, at times huge or longer than need be."""
    value = rng.choice(NUMBERS) if rng.random() < 0.1 else rng.randrange(1, 8)
    return varint(value) if rng.random() < 0.98 else bytes((value & 0x7F | 0x80, 0))


def content(rng: random.Random, type: int) -> bytes:
    """What belongs into a frame of that type, now and then of another."""
    if rng.random() < 0.05:
        type = rng.choice(list(Type))
    text = rng.randbytes(rng.choice([0, 1, 5, 250] if rng.random() < 0.05 else [0, 1, 5]))
    match type:
        case Type.OPEN:
            priority = rng.randrange(3) if rng.random() < 0.98 else rng.randrange(256)
            return (
                bytes((priority,))
                + varint(rng.choice([0, 0, len(text), 3, 70_000][: 4 + (rng.random() < 0.02)]))
                + text
            )
        case Type.ANSWER:
            return varint(rng.choice([0, 0, len(text), 3])) + text
        case Type.CREDIT:
            return number(rng)
        case Type.RESET:
            return number(rng) + text
        case Type.PING | Type.PONG:
            return rng.choice([b"\1", b"\1", rng.randbytes(rng.randrange(10))])
        case Type.DATA:
            return text or b"."
        case _:
            return text


def frame(rng: random.Random, opened: list[int], asked: list[int]) -> bytes:
    """`opened` by the peer, the last of it never used; `asked` by this side and not answered."""
    weights = [8, 6, 3, 3, 2, 2, 2, 0.3, 0.1, 0.2] if len(opened) > 1 else [0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    type = rng.choices([*Type, rng.randrange(32)], weights)[0]
    payload = content(rng, type)
    if rng.random() < 0.004:
        payload = bytes(rng.choice([16_000, MAX_PAYLOAD, MAX_PAYLOAD + 1]))
    if rng.random() < 0.02:
        stream = rng.choice(NUMBERS)
    elif type == Type.OPEN:
        stream = opened[-1]
        opened.append(stream + 2 * rng.choice([1, 1, 1, 5]))
    elif type == Type.ANSWER:
        stream = asked.pop() if asked else 2
    else:
        stream = rng.choice(opened[:-1] or [1]) if rng.random() < 0.9 else 4
    brief = 0x20 if type >= 16 or (rng.random() < 0.2 and type == Type.DATA) else 0
    end = 0x40 if rng.random() < (0.1 if type < 3 else 0.005) else 0
    ignorable = 0x80 if rng.random() < (0.7 if type not in list(Type) else 0.02) else 0
    length = len(payload) if rng.random() < 0.995 else rng.randrange(40_000)
    return bytes((type | brief | end | ignorable,)) + (b"" if brief else varint(stream)) + varint(length) + payload


def sentence(rng: random.Random) -> bytes:
    opened, asked = [rng.choice([1, 1, 5])], [4, 2]
    data = b"".join(frame(rng, opened, asked) for _ in range(rng.randrange(1, 12)))
    if rng.random() < 0.1:
        at = rng.randrange(len(data))
        data = data[:at] + rng.randbytes(1) + data[at + rng.randrange(3) :]
    return data


def listener() -> Protocol:
    """An edge in the middle of things: it asked twice and was not answered yet."""
    edge = Protocol(False, 0.0, limits=LIMITS)
    edge.open(Priority.CONTROL, b"ask", end=True)
    edge.open(Priority.BULK, b"send")
    edge.ping()
    edge.next_chunk(0.0)
    return edge


def hear(pieces: Iterable[bytes]) -> tuple[list, str]:
    """The events and the error in words; what is held is looked at after each piece."""
    edge, events, error, held = listener(), [], "", {}
    try:
        for piece in pieces:
            new = edge.receive(piece, 0.0)
            events += new
            for event in new:
                if isinstance(event, Reset):
                    held.pop(event.stream, None)
                elif size := len(getattr(event, "data", b"")) + len(getattr(event, "head", b"")):
                    held[event.stream] = held.get(event.stream, 0) + size
            assert sum(size for stream, size in held.items() if stream in edge._streams) <= edge._reserved
            assert len(edge._decoder) < MAX_HEADER + MAX_PAYLOAD
            assert len(edge._streams) <= LIMITS.streams and 0 <= edge._reserved <= LIMITS.buffered
        events += edge.tick(0.0)
        edge.tick(0.0)
    except ProtocolError as caught:
        error = caught.why
        assert caught.what and caught.fix and edge.state is State.CLOSED
    said = 0
    while chunk := edge.next_chunk(0.0):
        assert len(chunk) <= edge.chunk
        said += len(chunk)
    assert said < 10_000 and not edge._pending
    return events, error


def check(data: bytes) -> bool:
    """Whether it was sense."""
    events, error = hear([data])
    assert hear(data[at : at + 1] for at in range(len(data))) == (events, error)
    return not error and bool(events)


def run(seed: int, noises: int, sentences: int) -> None:
    rng = random.Random(seed)
    for _ in range(noises):
        check(noise(rng))
    sense = sum(check(sentence(rng)) for _ in range(sentences))
    assert 0.1 * sentences < sense < 0.9 * sentences  # the grammar finds both ways


def test_any_bytes_are_events_or_a_protocol_error():
    run(1, noises=2000, sentences=4000)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(10))
def test_any_bytes_are_events_or_a_protocol_error_at_length(seed):
    run(100 + seed, noises=5_000, sentences=15_000)


def test_every_way_to_cut_or_spoil_a_good_session():
    device = Protocol(True, 0.0)
    first = device.open(Priority.LATENT, b"infer")
    device.write(first, b"latent")
    device.end(first)
    device.reset(first)
    device.ping()
    second = device.open(Priority.BULK, b"fetch", end=True)
    good = device.next_chunk(0.0)
    device.reset(second)
    device.go_away("restart")
    good += device.next_chunk(0.0)
    assert check(good)
    for at in range(len(good)):
        hear([good[:at]])
        for value in {0, 1, 0x7F, 0x80, 0xFF, good[at] ^ 1, good[at] ^ 0x20, good[at] ^ 0x40, good[at] ^ 0x80}:
            check(good[:at] + bytes((value,)) + good[at + 1 :])
