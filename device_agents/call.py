"""One request and its answer, on either side of a connection: heads, bodies, and how they end.

A wait that is cancelled or takes too long ends the call and frees its stream on both sides, so nothing has to be
cleaned up after one. It knows nothing about TLS or links: a connection feeds it what the protocol tells.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from shoal.runtime.errors import BusyError, LinkError, ShoalError, UsageError

from .messages import Accepted, Failure, Message, decode, encode, printable
from .protocol import Code, Priority
from .trust import Peer

if TYPE_CHECKING:
    from .connection import Connection

AGAIN = "It may work later: a device tries again by itself."

_AHEAD = 64 << 10  # bytes of a body that are handed to the protocol before its line is free
_SMALL = 4 << 10
_FAMILY = 100  # a reset's code above this is an error's family


class Call:
    """One request and its answer, on either side.

    A wait that is cancelled or takes too long ends the call and frees its stream; leaving it as a context manager does
    too. `message` opened it, `peer` is the other side, `timeout` the seconds without any progress that are too many.
    """

    def __init__(self, connection: "Connection", stream: int, message: Message, priority: Priority, timeout: float):
        self.message, self.priority, self.timeout = message, priority, timeout
        self._connection, self._stream = connection, stream
        self._answer: Message | None = None
        self._received: deque[bytes | bytearray] = deque()
        self._unsent: deque[memoryview] = deque()
        self._queued = 0  # bytes that the protocol had of it, unsent, at the last look
        self._finishing = False  # nothing follows what is unsent
        self._finished = False  # and the protocol knows
        self._ended = False  # the other side has finished
        self._unwanted = False  # it does not read on
        self._error: ShoalError | None = None
        self._changed = asyncio.Event()

    @property
    def peer(self) -> Peer | None:
        return self._connection.peer

    async def reply(self, timeout: float | None = None) -> Message:
        """The answer, waited for `timeout` seconds (the call's own if None). Raises what the other side raised."""
        await self._until(lambda: self._answer is not None, "The answer", timeout)
        return self._answer

    async def answer(self, message: Message | None = None, body: bytes | memoryview | None = None) -> None:
        """Answers, for a handler; once. With a `body` that is all; without, `write` may follow until it returns.

        `body` is sent as the line takes it: it must not change any more.
        """
        self._check()
        if self._answer is not None:
            raise UsageError("The call cannot be answered.", "It was answered before.", "Answer once, then write.")
        answer = Accepted() if message is None else message
        whole = body is not None and not memoryview(body).nbytes
        self._tell(self._connection._protocol.answer, encode(answer), end=whole)
        self._answer, self._finishing, self._finished = answer, body is not None, whole
        if body is not None:
            self._push(body)
        self._connection._wake()
        self._settle()

    async def write(self, data: bytes | memoryview) -> None:
        """Sends more of the body; returns when the line has taken nearly all of it."""
        self._check()
        if self._unwanted:
            return
        if self._finishing:
            raise LinkError("The body cannot go on.", "It was ended before.", "Write it before end().")
        self._push(data)
        await self._until(lambda: not self._unsent, "Room for the body")

    async def end(self) -> None:
        """The body is whole."""
        self._check()
        self._finishing = True
        self._feed()
        self._connection._wake()
        await self._until(lambda: self._finished, "Room for the body")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body, in pieces as they come."""
        while piece := await self._piece():
            yield piece

    async def read(self, limit: int) -> bytes:
        """The rest of the body. Raises LinkError when there are more than `limit` bytes of it."""
        pieces, size = [], 0
        async for piece in self:
            size += len(piece)
            if size > limit:
                self.cancel("The body is too long.")
                raise LinkError(
                    "The body of a message is too long.", f"It has more than {limit} bytes.", "Upgrade shoal."
                )
            pieces.append(piece)
        return b"".join(pieces)

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes of the body; b"" where it ends before the first of them, LinkError where amid them."""
        taken = bytearray()
        while len(taken) < size and (piece := await self._piece(size - len(taken))):
            taken += piece
        if 0 < len(taken) < size:
            raise LinkError("The body of a message is cut short.", f"{size} bytes were due.", "Upgrade shoal.")
        return bytes(taken)

    def cancel(self, why: str = "It is not wanted any more.") -> None:
        """Ends the call on both sides, at once. A second time does nothing."""
        self._fail(LinkError("The call was cancelled.", why, AGAIN))

    async def __aenter__(self) -> "Call":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    # What follows is the connection's side.

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _until(self, done: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Waits until `done`; the call's own time begins anew with whatever happens to it, `timeout` does not."""
        if done():
            return
        loop = asyncio.get_running_loop()
        last = None if timeout is None else loop.time() + timeout
        try:
            while not done():
                self._check()
                self._changed.clear()
                async with asyncio.timeout_at(loop.time() + self.timeout if last is None else last):
                    await self._changed.wait()
        except TimeoutError:
            seconds = self.timeout if timeout is None else timeout
            error = LinkError(f"{what} did not come.", f"{seconds:g} s went by.", AGAIN)
            self._fail(error)
            raise error from None
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def _piece(self, most: int = 1 << 30) -> bytes:
        await self._until(lambda: bool(self._received) or self._ended, "The body")
        if not self._received:
            return b""
        piece = self._received.popleft()
        if len(piece) > most:
            self._received.appendleft(piece[most:])
            piece = piece[:most]
        self._connection._protocol.consumed(self._stream, len(piece))
        self._connection._wake()
        self._settle()
        return bytes(piece)

    def _push(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if view.nbytes:
            self._unsent.append(view.cast("B"))
        self._feed()
        self._connection._wake()

    def _feed(self) -> None:
        """Hands the protocol as much of the body as its line will soon be free for, and notes what the line took."""
        if self._error is not None:
            return
        protocol = self._connection._protocol
        if (queued := protocol.queued(self._stream)) < self._queued:
            self._changed.set()  # progress, also of what was handed over long ago
        self._queued = queued
        if self._finished:
            return
        while self._unsent and (room := _AHEAD - protocol.queued(self._stream)) > 0:
            view = self._unsent.popleft()
            if len(view) > room:
                self._unsent.appendleft(view[room:])
            self._tell(protocol.write, view[:room])
            self._queued += min(room, len(view))
            self._changed.set()
        if self._finishing and not self._unsent:
            self._tell(protocol.end)
            self._finished = True
            self._settle()

    @property
    def _over(self) -> bool:
        """Whole both ways, and read: the protocol has dropped the stream."""
        return self._finished and self._ended and not self._received

    def _fail(self, error: ShoalError) -> None:
        """Ends the call with `error` here, by a reset there, if it has not ended."""
        if self._error is None and not self._over:
            self._lost(error)
            self._connection._protocol.reset(self._stream, Code.CANCELLED, error.why)
            self._connection._wake()

    def _refuse(self, error: ShoalError) -> None:
        """Ends a call of the peer's with `error`, which it gets whole where nothing was answered yet."""
        if self._error is not None:
            return
        protocol = self._connection._protocol
        if self._answer is None:
            with contextlib.suppress(LinkError):  # the peer has reset it already
                self._tell(protocol.answer, encode(Failure.of(error)), end=True)
            protocol.stop(self._stream)
        elif not self._over:
            protocol.reset(self._stream, _FAMILY + error.code, f"{error.what} {error.why}")
        self._lost(error)
        self._connection._wake()

    def _tell(self, act: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Has the protocol do something about the stream. Raises LinkError where it dropped that meanwhile."""
        try:
            act(self._stream, *arguments, **options)
        except UsageError:
            self._lost(LinkError("The call is over.", "The connection is ending.", AGAIN))
            self._check()

    def _stop(self) -> None:
        """What is left of the request is not wanted."""
        if not self._over and self._error is None:
            self._connection._protocol.stop(self._stream)
            self._received.clear()
            self._ended = True
            self._settle()

    def _lost(self, error: ShoalError) -> None:
        """The call is over with `error`, and the protocol knows."""
        self._error = error
        self._received.clear()
        self._unsent.clear()
        self._changed.set()
        self._connection._calls.pop(self._stream, None)

    def _settle(self) -> None:
        """Forgets a call that is over."""
        if self._over:
            self._connection._calls.pop(self._stream, None)
        self._changed.set()

    def _on_answer(self, head: bytes) -> None:
        try:
            answer = decode(head)
            if not isinstance(answer, Failure):
                self._answer = answer
                return self._changed.set()
            error = answer.error()
        except LinkError as damaged:
            error = damaged
        self._connection._protocol.reset(self._stream, Code.DONE)
        self._lost(error)

    def _on_data(self, data: bytes) -> None:
        # Small pieces are joined: a window full of single bytes would be forty times as large as objects.
        if self._received and isinstance(last := self._received[-1], bytearray) and len(last) < _SMALL:
            last += data
        else:
            self._received.append(data if len(data) >= _SMALL else bytearray(data))
        self._changed.set()

    def _on_ended(self) -> None:
        self._ended = True
        self._settle()

    def _on_reset(self, code: int, why: str) -> None:
        if self._ended and code == Code.DONE:  # the answer is whole, and the rest of the request is not wanted
            self._unsent.clear()
            self._unwanted = self._finishing = self._finished = True
            return self._settle()
        why = printable(why) or "It did not say why."
        if code > _FAMILY:
            error = Failure(code - _FAMILY, "The peer gave up in the middle.", why, AGAIN).error()
        elif code in (Code.BUSY, Code.GOING_AWAY):
            error = BusyError("The peer takes no more requests.", why, AGAIN)
        elif code == Code.STALE:
            error = LinkError("The request was dropped.", "The line had no room before its deadline.", AGAIN)
        else:
            error = LinkError("The peer cancelled the call.", why, AGAIN)
        self._lost(error)
