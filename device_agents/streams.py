"""One stream of a connection: what waits to be sent of it, what came of it, and the credit of both ways.

It keeps the order of states.HALVES and the bounds of states.Limits. It knows neither frames nor the other streams.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from shoal.runtime.errors import UsageError

from .frames import refuse
from .states import FIRST_CREDIT, HALVES, MAX_HEAD, Answered, Data, Ended, Event, Half, Opened, Priority


def misused(why: str) -> UsageError:
    return UsageError("The call does not fit the stream's state.", why, "Follow the states in docs/protocol.md.")


@dataclass(eq=False, slots=True)
class Stream:
    """`sending` is how far the caller went with this side's half; `begun` and `sent` are how far the line did."""

    id: int
    priority: Priority
    mine: bool
    deadline: float = math.inf
    reserved: int = FIRST_CREDIT  # of the connection's buffers: the window and the head

    sending: Half = Half.IDLE
    begun: bool = False
    sent: bool = False
    queued: int = 0
    credit: int = FIRST_CREDIT
    turn: int = 0  # when it last sent, counted in frames
    head_unsent: int = 0
    _unsent: deque[bytes] = field(default_factory=deque)
    _at: int = 0  # bytes of _unsent[0] that went

    receiving: Half = Half.IDLE
    granted: int = FIRST_CREDIT  # granted, unread and owed make up the window
    unread: int = 0
    owed: int = 0
    unwanted: bool = False
    _head: bytearray = field(default_factory=bytearray)
    _head_length: int = 0
    _widened: bool = False

    def step(self, event: str) -> None:
        """This side's half goes on; UsageError where the table has no such step."""
        if event not in HALVES[self.sending]:
            raise misused(f"{event!r} on stream {self.id}, whose half of this side is {self.sending.name}.")
        self.sending = HALVES[self.sending][event]

    def begin(self, head: bytes) -> None:
        if len(head) > MAX_HEAD:
            raise misused(f"A head has {len(head)} bytes, over the limit of {MAX_HEAD}.")
        self.step("begin")
        self.step("whole")
        self.head_unsent = len(head)
        self._queue(head)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.step("bytes")
        self._queue(bytes(data))

    def _queue(self, data: bytes) -> None:
        if data:
            self._unsent.append(data)
            self.queued += len(data)

    @property
    def sendable(self) -> bool:
        """The line could take something of it now."""
        if self.begun and self.queued:
            return self.head_unsent + self.credit > 0
        return self.sending is not Half.IDLE and not self.begun or self.sending is Half.ENDED and not self.sent

    def most(self) -> int:
        """How many queued bytes may go: the head's are free, the body's cost credit."""
        return min(self.queued, self.head_unsent + self.credit)

    def take(self, count: int, out: bytearray) -> None:
        """Moves `count` queued bytes to `out`."""
        self.queued -= count
        self.credit -= max(count - self.head_unsent, 0)
        self.head_unsent = max(self.head_unsent - count, 0)
        while count:
            part = self._unsent[0][self._at : self._at + count]
            out += part
            count -= len(part)
            self._at += len(part)
            if self._at == len(self._unsent[0]):
                self._unsent.popleft()
                self._at = 0

    def came(self, event: str) -> None:
        """The peer's half goes on; ProtocolError where the table has no such step."""
        if event not in HALVES[self.receiving]:
            raise refuse(f"{event!r} on stream {self.id}, whose half of the peer is {self.receiving.name}.")
        self.receiving = HALVES[self.receiving][event]

    def expect(self, head_length: int) -> None:
        self.came("begin")
        self._head_length = head_length

    def accept(self, data: bytes, end: bool) -> list[Event]:
        """What a frame's bytes say: the head once it is whole, the body as it comes, the end."""
        events: list[Event] = []
        if data:
            self.came("bytes")
        if self.receiving is Half.HEAD:
            missing = self._head_length - len(self._head)
            self._head += data[:missing]
            data = data[missing:]
            if len(self._head) == self._head_length:
                self.came("whole")
                head, self._head = bytes(self._head), bytearray()
                events.append(Answered(self.id, head) if self.mine else Opened(self.id, self.priority, head))
        if len(data) > self.granted:
            raise refuse(f"Stream {self.id} brings {len(data)} bytes where {self.granted} are granted.")
        self.granted -= len(data)
        if data and not self.unwanted:
            self.unread += len(data)
            events.append(Data(self.id, data))
        if end:
            self.came("end")
            events += [] if self.unwanted else [Ended(self.id)]
        return events

    def widen(self, window: int, room: int) -> int:
        """The first bytes of a body that goes on open the whole window, if it fits `room`; what that reserves."""
        more = window - FIRST_CREDIT
        if self._widened or not self.unread or self.receiving is not Half.BODY:
            return 0
        self._widened = True
        if not 0 < more <= room:
            return 0
        self.reserved += more
        self.owed += more
        return more

    def consume(self, size: int) -> None:
        if not 0 <= size <= self.unread:
            raise misused(f"{size} bytes of stream {self.id} are consumed where {self.unread} were unread.")
        self.unread -= size
        self.owed += size

    def stop(self) -> None:
        self.unwanted, self.unread, self.owed = True, 0, 0

    @property
    def owes(self) -> bool:
        """A quarter of the window or more could be granted again, and the peer has a use for it."""
        worth = self.owed * 4 >= self.granted + self.unread + self.owed
        return self.owed > 0 and worth and self.receiving is not Half.ENDED and not self.unwanted

    def grant(self) -> int:
        owed, self.owed = self.owed, 0
        self.granted += owed
        return owed

    @property
    def over(self) -> bool:
        """Both halves are done, and what came was read."""
        return self.sent and (self.receiving is Half.ENDED or self.unwanted) and not self.unread
