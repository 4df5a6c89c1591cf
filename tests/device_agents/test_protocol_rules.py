"""What a peer must not say is refused, each by its name; and docs/protocol.md says what the code does."""

import re
from pathlib import Path

import pytest

from shoal.device_agents import frames, pace, states
from shoal.device_agents.frames import Type, varint
from shoal.device_agents.protocol import Code, Limits, Priority, Protocol, ProtocolError, State
from shoal.device_agents.states import FIRST_CREDIT, MAX_HEAD

CONTROL = Priority.CONTROL
PAGE = Path(__file__).resolve().parents[2] / "docs/protocol.md"


def raw(type, stream, payload=b"", end=False):
    return frames.Encoder().frame(type, stream, payload, end)


def opening(stream, priority=CONTROL, end=False):
    return raw(Type.OPEN, stream, bytes((priority, 0)), end)


ODD = opening(1)
BAD = {
    "the edge's number": opening(2),
    "opened twice": ODD + opening(1),
    "a stream 0": b"\x01\x00",
    "no stream named yet": bytes((frames.BRIEF,)) + b"\x01.",
    "a length over 16 KiB": b"\x00\x01\x80\x80\x01",
    "a number too long": b"\x01\x81\x00\x02\0\0",
    "a stream over 31 bits": b"\x00\xff\xff\xff\xff\x0f",
    "no priority": raw(Type.OPEN, 1),
    "an unknown priority": opening(1, priority=3),
    "no head length": raw(Type.OPEN, 1, b"\0"),
    "a head over 64 KiB": raw(Type.OPEN, 1, b"\0" + varint(MAX_HEAD + 1)),
    "an end inside the head": raw(Type.OPEN, 1, b"\0\x05abc", end=True),
    "data after the end": opening(1, end=True) + raw(Type.DATA, 1, b"x"),
    "an end after the end": opening(1, end=True) + raw(Type.DATA, 1, end=True),
    "empty data": ODD + raw(Type.DATA, 1),
    "data nobody opened": raw(Type.DATA, 1, b"x"),
    "data on what this side might open": raw(Type.DATA, 2, b"x"),
    "more than was granted": ODD + b"".join(raw(Type.DATA, 1, bytes(16_000)) for _ in range(3)),
    "an answer from who asked": ODD + raw(Type.ANSWER, 1, b"\0"),
    "no credit": ODD + raw(Type.CREDIT, 1, b"\0"),
    "two credits in one": ODD + raw(Type.CREDIT, 1, b"\x01\x01"),
    "a credit over 31 bits": ODD + raw(Type.CREDIT, 1, varint(2**31 - 1)),
    "a credit for nobody": raw(Type.CREDIT, 7, b"\x01"),
    "a reset without code": ODD + raw(Type.RESET, 1),
    "a reset with a novel": ODD + raw(Type.RESET, 1, b"\0" + bytes(201)),
    "a reset that ends": ODD + raw(Type.RESET, 1, b"\0", end=True),
    "an empty ping": raw(Type.PING, 0),
    "a large ping": raw(Type.PING, 0, bytes(9)),
    "a ping about a stream": bytes((Type.PING, 1, 1, 0)),
    "a ping that ends": raw(Type.PING, 0, b"1", end=True),
    "a farewell with a novel": raw(Type.CLOSE, 0, bytes(201)),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_by_an_edge(name):
    edge = Protocol(False, 0.0)
    with pytest.raises(ProtocolError) as caught:
        edge.receive(BAD[name], 0.0)
        edge.tick(0.0)
    assert caught.value.code == 12 and caught.value.why.endswith(".") and edge.state is State.CLOSED


@pytest.mark.parametrize("sent, answer", [(True, b"\x05abc"), (False, b"\0")])
def test_an_answer_out_of_place_is_refused(sent, answer):
    device = Protocol(True, 0.0)
    stream = device.open(CONTROL, b"")
    if sent:
        device.next_chunk(0.0)
        assert device.receive(raw(Type.ANSWER, stream, answer), 0.0) == []  # 2 bytes of the head are missing
    with pytest.raises(ProtocolError):
        device.receive(raw(Type.ANSWER, stream, b"\0"), 0.0)


# The page


def cells(title):
    """The rows of the first table after a heading, without its own head."""
    section = PAGE.read_text().split(f"# {title}\n", 1)[1]
    table = re.search(r"^\|[-:|]+\|\n((?:\|.*\n)+)", section, re.M)[1]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def test_the_page_has_the_frames_and_the_codes_of_the_code():
    assert {(int(row[0]), row[1]) for row in cells("Frames") if row[0].isdigit()} == {
        (type, type.name) for type in Type
    }
    assert {row[1] for row in cells("Frames") if row[2] == "yes"} == {type.name for type in frames.MAY_END}
    assert {(int(row[0]), row[1]) for row in cells("Codes of RESET")} == {(code, code.name) for code in Code}
    assert {(int(row[0]), row[1]) for row in cells("Priorities")} == {
        (priority, priority.name) for priority in Priority
    }


@pytest.mark.parametrize("title, table", [("A half of a stream", states.HALVES), ("The connection", states.CONNECTION)])
def test_the_page_has_the_state_tables_of_the_code(title, table):
    assert {(*row[:3],) for row in cells(title)} == {
        (state.name, event, after.name) for state, row in table.items() for event, after in row.items()
    }


def test_the_page_has_the_limits_of_the_code():
    limits = Limits()
    stated = {row[0]: float(re.sub("[^0-9.]", "", row[1])) for row in cells("Limits")}
    assert stated == {
        "frame payload": frames.MAX_PAYLOAD,
        "stream number": frames.MAX_STREAM,
        "head": states.MAX_HEAD,
        "reason": frames.MAX_WHY,
        "first credit": FIRST_CREDIT,
        "streams": limits.streams,
        "window": limits.window,
        "buffered": limits.buffered,
        "refusals waiting": 4 * limits.streams,
        "keep-alive": limits.keep_alive,
        "silence": limits.silence,
        "chunk": pace.CHUNK_SECONDS * 1000,
    }
