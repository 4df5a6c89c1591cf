"""Streams over one reliable line, sans-IO: bytes in, events out; calls in, chunks of bytes out.

It promises: a stream's bytes come out once and in order, or the stream ends with a Reset; nothing of a lower priority
is sent while anything of a higher one could be; what the peer makes this side hold stays under `Limits`; a line that
moves nothing is noticed. It knows no clock (`now` comes in, seconds of any monotonic clock), no socket, and not what
the bytes mean. docs/protocol.md is its specification; its states are tables in states.py.

The owner hands what it read to `receive`, calls `tick` no later than `wakeup`, and whenever the line has taken the last
chunk writes the next, until `next_chunk` is empty; it asks again after each call that may have put something there.
"""

import math
from collections import deque
from collections.abc import Callable

from shoal.runtime.errors import BusyError

from . import frames
from .frames import Frame, ProtocolError, Type, refuse, varint
from .pace import Pace
from .states import (
    CONNECTION,
    FIRST_CREDIT,
    MAX_HEAD,
    Answered,
    Closed,
    Code,
    Data,
    Ended,
    Event,
    GoingAway,
    Half,
    Limits,
    Opened,
    Priority,
    Reset,
    RoundTrip,
    State,
)
from .streams import Stream, misused

__all__ = [
    "Answered", "Closed", "Code", "Data", "Ended", "Event", "GoingAway", "Limits", "Opened", "Priority", "Protocol",
    "ProtocolError", "Reset", "RoundTrip", "State",
]  # fmt: skip

_SMALL = 32  # room in a chunk that is not worth a frame of its own
_CODES = frozenset(Code)


class Protocol:
    """One side of a connection. `opener` is the side that dialled; `rate` the line's bytes a second where known.

    A call about a stream that is gone raises UsageError, except `reset`, `stop`, `consumed` and `queued`, which may
    come late: a stream is gone once Reset was reported, or both halves are done and all of its Data consumed.
    """

    def __init__(self, opener: bool, now: float, *, limits: Limits | None = None, rate: float | None = None):
        self.state = State.OPEN
        self.limits = limits or Limits()
        self._pace = Pace(rate, self.limits.keep_alive, self.limits.silence, now)
        self._encoder, self._decoder = frames.Encoder(), frames.Decoder()
        self._streams: dict[int, Stream] = {}
        self._next, self._peers_last = (1, 0) if opener else (2, 0)
        self._reserved = self._turn = 0
        self._now, self._soonest = now, math.inf  # the soonest deadline
        self._events: list[Event] = []
        self._error: ProtocolError | None = None
        # What waits to be sent: first what is about the connection, then by priority (the dicts are ordered sets)
        self._ping_due, self._ping = False, (0, math.nan)  # the last one's number; when it went, nan once answered
        self._pong: bytes | None = None
        self._leaving: bytes | None = None
        self._parting = b""
        self._resets: list[deque[tuple[int, bytes]]] = [deque() for _ in Priority]
        self._credits: list[dict[int, Stream]] = [{} for _ in Priority]
        self._waiting: list[dict[int, Stream]] = [{} for _ in Priority]
        self._on: dict[int, Callable[[Frame], None]] = {
            Type.DATA: self._on_data, Type.OPEN: self._on_open, Type.ANSWER: self._on_answer,
            Type.CREDIT: self._on_credit, Type.RESET: self._on_reset, Type.PING: self._on_ping,
            Type.PONG: self._on_pong, Type.GO_AWAY: self._on_go_away, Type.CLOSE: self._on_close,
        }  # fmt: skip

    # What the caller does

    def open(self, priority: Priority, head: bytes, *, deadline: float | None = None, end: bool = False) -> int:
        """Begins a stream and returns its number. Not sent whole by `deadline`, it is dropped: Reset(STALE).

        Raises BusyError when too much is under way or the connection is ending, UsageError for a head over 64 KiB.
        """
        if self.state is not State.OPEN or self._next > frames.MAX_STREAM:
            raise BusyError("No request can be made.", "This connection is ending.", "Connect again.")
        if not self._room(FIRST_CREDIT):
            raise BusyError("No request can be made.", f"{len(self._streams)} are under way.", "Wait for one to end.")
        it = Stream(self._next, Priority(priority), True, math.inf if deadline is None else deadline)
        it.begin(head)
        if end:
            it.step("end")
        self._next += 2
        self._soonest = min(self._soonest, it.deadline)
        self._add(it)
        return it.id

    def answer(self, stream: int, head: bytes = b"", end: bool = False) -> None:
        """Begins this side's half of a stream that the peer opened."""
        it = self._alive(stream)
        if it.mine:
            raise misused(f"Stream {stream} was opened by this side: the peer answers it.")
        it.begin(head)
        if end:
            it.step("end")
        self._settle(it)

    def write(self, stream: int, data: bytes | bytearray | memoryview) -> None:
        """Queues body bytes (a copy, unless `bytes`); how many may queue is the caller's to bound, by `queued`."""
        it = self._alive(stream)
        it.write(data)
        self._settle(it)

    def end(self, stream: int) -> None:
        """This side's half is whole."""
        it = self._alive(stream)
        it.step("end")
        self._settle(it)

    def reset(self, stream: int, code: int = Code.CANCELLED, why: str = "") -> None:
        """Drops the stream, with what was not sent of it; nothing of it is reported any more."""
        if it := self._streams.get(stream):
            self._drop(it)
            if it.begun or not it.mine:
                self._refuse(it.id, it.priority, code, why)

    def stop(self, stream: int) -> None:
        """The rest of the peer's body is not wanted: it is not reported, and the peer is told once our half is sent."""
        if it := self._streams.get(stream):
            it.stop()
            self._settle(it)

    def consumed(self, stream: int, size: int) -> None:
        """`size` more bytes of the stream's Data are held no longer, so the peer may send as many again."""
        if (it := self._streams.get(stream)) and not it.unwanted:
            it.consume(size)
            self._settle(it)

    def queued(self, stream: int) -> int:
        """Bytes of the stream, head included, that are not sent yet; 0 if it is gone."""
        return it.queued if (it := self._streams.get(stream)) else 0

    def ping(self) -> None:
        """Asks for a RoundTrip."""
        self._ping_due = self.state is not State.CLOSED

    def go_away(self, why: str = "") -> None:
        """No more streams, of either side; those alive go on, and `idle` says when they are done."""
        if self.state is not State.CLOSED:
            self._leaving = frames.reason(why)
            self.state = CONNECTION[self.state]["go away"]

    def close(self, why: str = "") -> None:
        """Over at once, every stream dropped; one last chunk tells the peer."""
        if self.state is not State.CLOSED:
            self._over(frames.reason(why))

    @property
    def idle(self) -> bool:
        """No stream is alive and nothing waits to be sent."""
        return not self._streams and not self._pending

    @property
    def rate(self) -> float | None:
        """Bytes a second that the line takes: as given, else as measured (None until it was)."""
        return self._pace.rate

    @property
    def chunk(self) -> int:
        """Bytes of the largest chunk: 45 ms of the line, within 256 bytes and a TLS record."""
        return self._pace.chunk

    # Time

    def tick(self, now: float) -> list[Event]:
        """Does what is due. Raises the ProtocolError that `receive` held back behind events."""
        if self.state is not State.CLOSED:
            self._expire(now)
            if why := self._pace.dead(self._pending, now):
                self._over(None)
                self._events.append(Closed(why))
            elif self._pace.quiet(now):
                self._ping_due = True
        return self._report()

    def wakeup(self, now: float) -> float | None:
        """When `tick` is due next: `now` if at once, later than that right after a tick; None once all is over."""
        if self._events or self._error:
            return now
        if self.state is State.CLOSED:
            return None
        return min(self._soonest, self._pace.wakeup(self._ping_due))

    # Bytes out

    def next_chunk(self, now: float) -> bytes:
        """The next bytes for the line, at most `chunk`; b"" if nothing waits that may be sent."""
        if self.state is State.CLOSED:
            parting, self._parting = self._parting, b""
            return parting
        self._expire(now)
        self._pace.asked(now)
        out, size = bytearray(), self.chunk
        if self._ping_due:
            self._ping_due, self._ping = False, ((self._ping[0] + 1) % 256, now)
            out += self._encoder.frame(Type.PING, 0, bytes((self._ping[0],)))
        if self._pong is not None:
            out += self._encoder.frame(Type.PONG, 0, self._pong)
            self._pong = None
        if self._leaving is not None:
            out += self._encoder.frame(Type.GO_AWAY, 0, self._leaving)
            self._leaving = None
        for priority in Priority:
            self._fill(out, size, priority)
            if out:
                break  # a record filled up with less urgent bytes would arrive no sooner than they do
        self._pace.given(len(out), self._pending, now)
        return bytes(out)

    def _fill(self, out: bytearray, size: int, priority: Priority) -> None:
        """Adds frames of one priority, as many as fit."""
        resets, credits, waiting = self._resets[priority], self._credits[priority], self._waiting[priority]
        while resets and size - len(out) >= frames.MAX_HEADER + len(resets[0][1]):
            out += self._encoder.frame(Type.RESET, *resets.popleft())
        while (credits or waiting) and size - len(out) >= _SMALL:
            if credits:
                it = credits.pop(next(iter(credits)))
                out += self._encoder.frame(Type.CREDIT, it.id, varint(it.grant()))
            else:
                self._send(out, size, min(waiting.values(), key=lambda it: (it.deadline, it.turn)))

    def _send(self, out: bytearray, size: int, it: Stream) -> None:
        type, first = Type.DATA, b""
        if not it.begun:
            type, first = (Type.OPEN, bytes((it.priority,))) if it.mine else (Type.ANSWER, b"")
            first += varint(it.head_unsent)
        count = min(it.most(), size - len(out) - frames.MAX_HEADER - len(first))
        it.sent = it.sending is Half.ENDED and count == it.queued
        out += self._encoder.header(type, it.id, len(first) + count, it.sent) + first
        it.take(count, out)
        self._turn += 1
        it.begun, it.turn = True, self._turn
        self._settle(it)

    @property
    def _pending(self) -> bool:
        told = self._ping_due or self._pong is not None or self._leaving is not None or bool(self._parting)
        return told or any(self._resets) or any(self._credits) or any(self._waiting)

    # Bytes in

    def receive(self, data: bytes, now: float) -> list[Event]:
        """What the peer's bytes mean. A ProtocolError after events is raised by the next `receive` or `tick`."""
        if self.state is not State.CLOSED and data:
            self._now = now
            self._pace.heard(now)
            self._decoder.feed(data)
            try:
                while self.state is not State.CLOSED and (frame := self._decoder.next()):
                    self._on[frame.type](frame)
            except ProtocolError as error:
                self._error = error
                self._over(frames.reason(error.why))
        return self._report()

    def _on_open(self, frame: Frame) -> None:
        if frame.stream % 2 == self._next % 2 or frame.stream in self._streams:
            raise refuse(f"OPEN has stream {frame.stream}, which is not the peer's to open.")
        if not frame.payload or frame.payload[0] >= len(Priority):
            raise refuse("OPEN has no priority that exists.")
        length, at = frames.payload_varint(frame.payload, 1, MAX_HEAD, "OPEN's head length")
        if sum(map(len, self._resets)) >= 4 * self.limits.streams:
            raise refuse("OPEN comes while as many as there may be were refused and the peer does not read it.")
        self._peers_last = max(self._peers_last, frame.stream)
        it = Stream(frame.stream, Priority(frame.payload[0]), False, reserved=FIRST_CREDIT + length)
        if self.state is State.OPEN and self._room(it.reserved):
            it.expect(length)
            self._add(it)
            self._accept(it, frame.payload[at:], frame.end)
        else:
            self._refuse(it.id, it.priority, Code.BUSY if self.state is State.OPEN else Code.GOING_AWAY)

    def _on_answer(self, frame: Frame) -> None:
        length, at = frames.payload_varint(frame.payload, 0, MAX_HEAD, "ANSWER's head length")
        if it := self._known(frame):
            if not it.mine:
                raise refuse(f"ANSWER is to stream {it.id}, which the peer opened.")
            it.expect(length)
            it.reserved += length
            self._reserved += length
            if self._reserved > self.limits.buffered:
                self.reset(it.id, Code.BUSY)
                self._events.append(Reset(it.id, Code.BUSY, "its answer does not fit what is left of the buffers"))
            else:
                self._accept(it, frame.payload[at:], frame.end)

    def _on_data(self, frame: Frame) -> None:
        if not frame.payload and not frame.end:
            raise refuse("DATA has no bytes and is not the end.")
        if it := self._known(frame):
            self._accept(it, frame.payload, frame.end)

    def _accept(self, it: Stream, data: bytes, end: bool) -> None:
        self._events += it.accept(data, end)
        self._reserved += it.widen(self.limits.window, self.limits.buffered // 2 - self._reserved)
        self._settle(it)

    def _on_credit(self, frame: Frame) -> None:
        more, at = frames.payload_varint(frame.payload, 0, frames.MAX_STREAM, "CREDIT's amount")
        if at != len(frame.payload) or not more:
            raise refuse("CREDIT is not one number above 0.")
        if it := self._known(frame):
            it.credit += more
            if it.credit > frames.MAX_STREAM:
                raise refuse(f"CREDIT for stream {it.id} adds up to {it.credit} bytes.")
            self._settle(it)

    def _on_reset(self, frame: Frame) -> None:
        code, at = frames.payload_varint(frame.payload, 0, frames.MAX_STREAM, "RESET's code")
        why = frames.read_reason(frame.payload[at:])
        if it := self._known(frame):
            self._drop(it)
            if it.mine or it.receiving is not Half.HEAD:  # else nobody was told of it
                self._events.append(Reset(it.id, Code(code) if code in _CODES else code, why))

    def _on_ping(self, frame: Frame) -> None:
        if not 1 <= len(frame.payload) <= 8:
            raise refuse(f"PING has {len(frame.payload)} bytes.")
        self._pong = frame.payload  # of several, the last is answered

    def _on_pong(self, frame: Frame) -> None:
        number, went = self._ping
        if frame.payload == bytes((number,)) and not math.isnan(went):
            self._events.append(RoundTrip(self._now - went))
            self._ping = number, math.nan

    def _on_go_away(self, frame: Frame) -> None:
        self._events.append(GoingAway(frames.read_reason(frame.payload)))
        self.state = CONNECTION[self.state]["go away"]

    def _on_close(self, frame: Frame) -> None:
        self._events.append(Closed(frames.read_reason(frame.payload)))
        self._over(None)

    # What both ways share

    def _known(self, frame: Frame) -> Stream | None:
        """The stream a frame is about; None when it is gone, and the peer sent the frame before it knew."""
        it, mine = self._streams.get(frame.stream), frame.stream % 2 == self._next % 2
        if frame.stream >= (self._next if mine else self._peers_last + 1) or it and mine and not it.begun:
            raise refuse(f"{Type(frame.type).name} is about stream {frame.stream}, which nobody opened.")
        return it

    def _alive(self, stream: int) -> Stream:
        if it := self._streams.get(stream):
            return it
        raise misused(f"Stream {stream} is over.")

    def _room(self, size: int) -> bool:
        return len(self._streams) < self.limits.streams and self._reserved + size <= self.limits.buffered

    def _add(self, it: Stream) -> None:
        self._streams[it.id] = it
        self._reserved += it.reserved
        self._settle(it)

    def _settle(self, it: Stream) -> None:
        """After any change: lists the stream where it has something to send, or drops it when it is over."""
        if it.over:
            self._drop(it)
            if it.receiving is not Half.ENDED:
                self._refuse(it.id, it.priority, Code.DONE)
            return
        for queue, listed in (self._waiting, it.sendable), (self._credits, it.owes):
            if listed:
                queue[it.priority][it.id] = it
            else:
                queue[it.priority].pop(it.id, None)

    def _drop(self, it: Stream) -> None:
        del self._streams[it.id]
        self._reserved -= it.reserved
        self._waiting[it.priority].pop(it.id, None)
        self._credits[it.priority].pop(it.id, None)

    def _refuse(self, stream: int, priority: Priority, code: int, why: str = "") -> None:
        self._resets[priority].append((stream, varint(code) + frames.reason(why)))

    def _expire(self, now: float) -> None:
        if now < self._soonest:
            return
        self._soonest = math.inf
        for it in [it for it in self._streams.values() if not it.sent]:
            if it.deadline <= now:
                self.reset(it.id, Code.STALE)
                self._events.append(Reset(it.id, Code.STALE, "its deadline passed before it was sent"))
            else:
                self._soonest = min(self._soonest, it.deadline)

    def _over(self, parting: bytes | None) -> None:
        """Closed; `parting` is the reason to send as the last frame, None where nobody would read it."""
        self.state = CONNECTION[self.state]["close"]
        self._streams, self._decoder, self._reserved = {}, frames.Decoder(), 0
        self._ping_due, self._pong, self._leaving = False, None, None
        for queues in self._resets, self._credits, self._waiting:
            for queue in queues:
                queue.clear()
        self._parting = b"" if parting is None else self._encoder.frame(Type.CLOSE, 0, parting)

    def _report(self) -> list[Event]:
        if self._error and not self._events:
            error, self._error = self._error, None
            raise error
        events, self._events = self._events, []
        return events
