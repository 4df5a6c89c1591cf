"""Two protocols over a pipe that loses nothing, driven by hypothesis in any order: what must always be so, is."""

import itertools
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.device_agents import frames
from shoal.device_agents.frames import Type
from shoal.device_agents.protocol import (
    Answered,
    Closed,
    Code,
    Data,
    Ended,
    GoingAway,
    Limits,
    Opened,
    Priority,
    Protocol,
    Reset,
)
from shoal.device_agents.states import FIRST_CREDIT, Half
from shoal.runtime.errors import BusyError, UsageError

SIDE, PICK, SHARE = st.integers(0, 1), st.integers(0, 7), st.integers(1, 4)
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([2000, FIRST_CREDIT, FIRST_CREDIT + 1, 100_000]))


def counted(size: int, seed: int) -> bytes:
    """`size` bytes of which none can be missing, doubled or moved unseen."""
    return bytes(itertools.islice(itertools.cycle((seed % 65_536).to_bytes(2, "big") + bytes(range(251))), size))


@dataclass
class Way:
    """One direction of a stream: what was put in, what came out."""

    head: bytes | None = None
    put: bytearray = field(default_factory=bytearray)
    ended: bool = False
    got: bytearray = field(default_factory=bytearray)
    whole: bool = False
    credit: int = FIRST_CREDIT  # on the wire, with every CREDIT that its sender had got
    head_left: int | None = None


@dataclass
class Side:
    protocol: Protocol
    decoder: frames.Decoder = field(default_factory=frames.Decoder)  # watches what it sends
    pipe: bytearray = field(default_factory=bytearray)  # sent, not arrived
    arriving: frames.Decoder = field(default_factory=frames.Decoder)  # watches what arrives
    dead: set[int] = field(default_factory=set)  # it dropped these: nothing of them may be reported
    stopped: set[int] = field(default_factory=set)  # it wants no body of these
    unread: dict[int, int] = field(default_factory=dict)
    leaving: bool = False


class Talk(RuleBasedStateMachine):
    @initialize(rate=st.sampled_from([None, 1_000, 11_520]), small=st.booleans())
    def connect(self, rate, small):
        limits = Limits(streams=5, buffered=400_000) if small else Limits()
        self.now, self.steps = 0.0, 0
        self.sides = [Side(Protocol(opener, 0.0, limits=limits, rate=rate)) for opener in (True, False)]
        self.ways: dict[tuple[int, int], Way] = {}  # (sender, stream)
        self.priority: dict[int, Priority] = {}
        self.reset: set[int] = set()

    def way(self, sender: int, stream: int) -> Way:
        return self.ways.setdefault((sender, stream), Way())

    def choose(self, at: int, pick: int, wanted) -> int | None:
        streams = sorted(it.id for it in self.sides[at].protocol._streams.values() if wanted(it))
        return streams[pick % len(streams)] if streams else None

    # What callers do. Where no stream fits a step, one is opened: few steps are lost

    @rule(at=SIDE, priority=st.sampled_from(Priority), size=st.sampled_from([0, 3, 300, 5000]), body=SIZES,
          late=st.sampled_from([None, None, None, 0.5]))  # fmt: skip
    def open(self, at, priority, size, body, late=None):
        protocol, head = self.sides[at].protocol, counted(size, len(self.ways))
        try:
            stream = protocol.open(priority, head, deadline=None if late is None else self.now + late)
        except BusyError:
            return
        assert stream not in self.priority and stream % 2 != at
        self.priority[stream] = priority
        way = self.way(at, stream)
        way.head, way.put = head, bytearray(counted(body, stream))
        protocol.write(stream, bytes(way.put))

    @rule(at=SIDE, pick=PICK, size=st.sampled_from([0, 3, 300]), end=st.booleans())
    def answer(self, at, pick, size, end):
        stream = self.choose(at, pick, lambda it: not it.mine and it.sending is Half.IDLE and it.receiving in READ)
        if stream is None:
            return self.open(1 - at, Priority.LATENT, size, 10)
        head = counted(size, len(self.ways))
        self.sides[at].protocol.answer(stream, head, end=end)
        self.way(at, stream).head, self.way(at, stream).ended = head, end

    @rule(at=SIDE, pick=PICK, size=SIZES)
    def write(self, at, pick, size):
        stream = self.choose(at, pick, lambda it: it.sending is Half.BODY)
        if stream is None:
            return self.open(at, Priority.BULK, 0, size)
        body = counted(size, len(self.ways[at, stream].put))
        self.sides[at].protocol.write(stream, body)
        self.ways[at, stream].put += body

    @rule(at=SIDE, pick=PICK)
    def end(self, at, pick):
        stream = self.choose(at, pick, lambda it: it.sending is Half.BODY)
        if stream is not None:
            self.sides[at].protocol.end(stream)
            self.ways[at, stream].ended = True

    @rule(at=SIDE, pick=PICK, gently=st.booleans())
    def drop(self, at, pick, gently):
        stream = self.choose(at, pick, lambda it: not gently or it.mine or it.receiving in READ)
        if stream is not None:
            self.reset.add(stream)
            if gently:
                self.sides[at].stopped.add(stream)
                self.sides[at].protocol.stop(stream)
            else:
                self.sides[at].dead.add(stream)
                self.sides[at].protocol.reset(stream, Code.CANCELLED, "why")
            self.sides[at].unread.pop(stream, None)

    @rule(at=SIDE, pick=PICK, share=SHARE)
    def consume(self, at, pick, share):
        side = self.sides[at]
        if unread := sorted(side.unread):
            stream = unread[pick % len(unread)]
            size = max(1, side.unread[stream] * share // 4)
            side.protocol.consumed(stream, size)
            side.unread[stream] -= size
            if not side.unread[stream]:
                del side.unread[stream]

    @rule(at=SIDE, wrong=st.sampled_from(["write", "end", "answer", "ping"]))
    def misuse(self, at, wrong):
        protocol = self.sides[at].protocol
        if wrong == "ping":
            return protocol.ping()
        try:
            getattr(protocol, wrong)(*((10_001, b"") if wrong == "write" else (10_001,)))
        except UsageError:
            return
        raise AssertionError

    @precondition(lambda self: self.steps > 40)
    @rule(at=SIDE)
    def leave(self, at):
        self.sides[at].protocol.go_away("bye")
        self.sides[at].leaving = True

    # What the line does

    @rule(at=SIDE, chunks=st.integers(1, 20), share=SHARE)
    def move(self, at, chunks, share):
        """Side `at` sends; a quarter to all of what is on the way arrives, cut anywhere."""
        self.steps += 1
        for _ in range(chunks):
            self.send(at)
        self.deliver(at, share / 4)

    def send(self, at):
        side = self.sides[at]
        chunk = side.protocol.next_chunk(self.now)
        assert len(chunk) <= side.protocol.chunk
        side.pipe += chunk
        side.decoder.feed(chunk)
        lowest = Priority.CONTROL
        for frame in iter(side.decoder.next, None):
            if frame.stream:
                assert self.priority[frame.stream] >= lowest
                lowest = self.priority[frame.stream]
            self.watch(at, frame)
        assert not len(side.decoder), "a chunk is whole frames"
        for it in side.protocol._streams.values():
            assert not (it.sendable and it.priority < lowest), "something lower went first"

    def watch(self, at: int, frame: frames.Frame) -> None:
        """Credit, counted from the wire alone."""
        if frame.type not in (Type.OPEN, Type.ANSWER, Type.DATA):
            return
        way, size = self.way(at, frame.stream), len(frame.payload)
        if frame.type != Type.DATA:
            skip = 1 if frame.type == Type.OPEN else 0
            way.head_left, begin = frames.payload_varint(frame.payload, skip, 1 << 16, "")
            size -= begin
        head = min(size, way.head_left)
        way.head_left -= head
        way.credit -= size - head
        assert way.credit >= 0, "more than was granted"

    def deliver(self, at, share):
        source, target = self.sides[at], self.sides[1 - at]
        size = int(len(source.pipe) * share)
        piece = bytes(source.pipe[:size])
        del source.pipe[:size]
        target.arriving.feed(piece)
        for frame in iter(target.arriving.next, None):
            if frame.type == Type.CREDIT:
                self.way(1 - at, frame.stream).credit += frames.payload_varint(frame.payload, 0, 1 << 31, "")[0]
        for event in target.protocol.receive(piece, self.now):
            self.report(1 - at, event)

    @rule(seconds=st.sampled_from([0.1, 0.4, 3.0]))
    def wait(self, seconds):
        self.now += seconds
        for at, side in enumerate(self.sides):
            for event in side.protocol.tick(self.now):
                self.report(at, event)
            assert (due := side.protocol.wakeup(self.now)) is None or due > self.now
        for at in (0, 1):
            self.move(at, 1, 4)  # a line that is never silent for so long that it is given up

    def report(self, at: int, event) -> None:
        side = self.sides[at]
        if isinstance(event, GoingAway):
            assert self.sides[1 - at].leaving
        if not hasattr(event, "stream"):
            assert not isinstance(event, Closed)
            return
        stream = event.stream
        way = self.way(1 - at, stream)
        assert stream not in side.dead, "a cancelled stream delivers nothing"
        assert stream not in side.stopped or not isinstance(event, Data | Ended)
        assert not way.whole or isinstance(event, Reset), "nothing follows the end"
        match event:
            case Opened() | Answered():
                assert event.head == way.head and not way.got
                assert isinstance(event, Answered) == (stream % 2 != at)
            case Data():
                way.got += event.data
                side.unread[stream] = side.unread.get(stream, 0) + len(event.data)
                assert way.put.startswith(way.got) if len(way.got) < 1000 else len(way.got) <= len(way.put)
            case Ended():
                assert way.ended and way.got == way.put
                way.whole = True
            case Reset():
                self.reset.add(stream)
                side.dead.add(stream)
                side.unread.pop(stream, None)
                assert event.code in set(Code)

    @invariant()
    @precondition(lambda self: hasattr(self, "sides"))
    def within_limits(self):
        for side in self.sides:
            protocol = side.protocol
            assert len(protocol._streams) <= protocol.limits.streams
            assert sum(side.unread.values()) <= protocol._reserved <= protocol.limits.buffered
            assert protocol._reserved == sum(it.reserved for it in protocol._streams.values())
            for it in protocol._streams.values():
                assert it.unwanted or it.unread == side.unread.get(it.id, 0)
                assert (it.id in protocol._waiting[it.priority]) == it.sendable

    def teardown(self):
        """Everybody finishes what was begun, and reads: then every byte was delivered, and both sides are idle."""
        if not hasattr(self, "sides"):
            return
        for _ in range(2000):
            for at, side in enumerate(self.sides):
                for stream, it in list(side.protocol._streams.items()):
                    if not it.mine and it.sending is Half.IDLE and it.receiving in READ:
                        side.protocol.answer(stream, b"")
                        self.way(at, stream).head = b""
                    if it.sending is Half.BODY:
                        side.protocol.end(stream)
                        self.way(at, stream).ended = True
                for stream, size in list(side.unread.items()):
                    side.protocol.consumed(stream, size)
                    del side.unread[stream]
                while side.protocol._pending:
                    self.send(at)
                self.deliver(at, 1.0)
            if all(side.protocol.idle and not side.pipe for side in self.sides):
                break
        assert all(side.protocol.idle for side in self.sides)
        for stream in self.priority.keys() - self.reset:
            for sender in (0, 1):
                way = self.ways[sender, stream]
                assert way.whole and way.got == way.put


READ = (Half.BODY, Half.ENDED)  # its head was reported

TestTalk = Talk.TestCase
TestTalk.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
