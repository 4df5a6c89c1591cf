"""A connection to a peer: requests and their answers, over a transport, TLS and the protocol.

    answer = await connection.ask(State(device_id), timeout=5)      # a message for a message

    async with connection.request(Infer(tail), body=latent, priority=Priority.LATENT, timeout=1, deadline=0.5) as call:
        answer = await call.reply()                                 # raises what the other side raised
        logits = await call.read(1 << 20)                           # the body, at most that many bytes

    connection.serve(handler)                                       # the other side: async def handler(call) -> None

It promises that nothing waits for ever (every wait has a deadline, and one that is cancelled or too late ends the
call), that a slow reader holds up its own stream and nobody else's, that a handler's ShoalError comes out on the other
side as the same family, and that no task outlives the connection. It knows nothing about addresses or pairing.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast
from typing import Protocol as Shape

from shoal.runtime.errors import BusyError, LinkError, RemoteError, ShoalError, TrustError

from .call import AGAIN, Call
from .messages import Hello, Message, decode, encode, printable
from .protocol import (
    Answered,
    Closed,
    Data,
    Ended,
    Event,
    GoingAway,
    Limits,
    Opened,
    Priority,
    Protocol,
    Reset,
    RoundTrip,
)
from .secure import Secure
from .trust import Peer

_FAREWELL = 2.0  # seconds to say goodbye in
_TICK = 1.0  # seconds between looks at the clock at most
_SERVED = 30.0  # seconds without progress that end a call which the peer opened

_log = logging.getLogger(__name__)


class Transport(Shape):
    """Reliable ordered bytes, as links.Transport."""

    name: str
    rate: float | None

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    async def closed(self) -> None: ...
    def abort(self) -> None: ...


Handler = Callable[[Call], Awaitable[None]]


async def released(transport: Transport, timeout: float) -> None:
    """Closes a transport and returns when its port is free for the next one, after `timeout` seconds in any case."""
    transport.close()
    with contextlib.suppress(TimeoutError):
        try:
            async with asyncio.timeout(timeout):
                await transport.closed()
        finally:
            transport.abort()  # nothing to it, unless the peer does not take the last bytes


class Connection:
    """Made by endpoint.dial or a Listener. `peer` is who the other side is, `hello` what it said of itself, `rtt` the
    smoothed round trip in seconds (None: unknown), `going_away` why it will not take requests any more ("": it will).
    `on_closed` is called once with why it ended."""

    def __init__(
        self,
        transport: Transport,
        secure: Secure,
        opener: bool,
        *,
        peer: Peer | None = None,
        early: bytes = b"",
        limits: Limits | None = None,
        handlers: int = 64,
    ):
        """`early` is the plaintext that came along with the handshake; `handlers` how many calls may run at once."""
        self.transport, self.peer = transport, peer
        self.hello: Hello | None = None
        self.rtt: float | None = None
        self.going_away = ""
        self.reason: ShoalError | None = None
        self.on_closed: Callable[[ShoalError], None] | None = None
        self._secure, self._handlers, self._early = secure, handlers, early
        self._loop = asyncio.get_running_loop()
        self._protocol = Protocol(opener, self._loop.time(), limits=limits or Limits(), rate=transport.rate)
        self._calls: dict[int, Call] = {}
        self._handler: Handler | None = None
        self._waiting: dict[int, Call] = {}  # opened by the peer before serve()
        self._tasks: dict[int, asyncio.Task] = {}
        self._ending: ShoalError | None = None  # why, once this side closes it
        self._farewell = _FAREWELL
        self._sendable, self._quiet = asyncio.Event(), asyncio.Event()
        self._protocol.ping()  # so that the round trip is known from the start
        self._run_task = self._loop.create_task(self._run())

    # Calls

    def request(
        self,
        message: Message,
        *,
        priority: Priority = Priority.CONTROL,
        timeout: float = 10.0,
        body: bytes | memoryview | None = None,
        deadline: float | None = None,
        more: bool = False,
    ) -> Call:
        """Opens a call. Its request is whole with `body`, unless `more` follows by `write` and `end`.

        `timeout` is the call's, in seconds without progress; a request that is not on the line within `deadline`
        seconds is dropped, for a late latent is worth nothing. `body` must not change until the reply is there.
        Raises LinkError when the connection is closed, BusyError when the peer takes no more.
        """
        if ended := self.reason or self._ending:
            raise ended
        if self.going_away:
            raise BusyError("The peer takes no more requests.", self.going_away, AGAIN)
        whole = not more and (body is None or not memoryview(body).nbytes)
        due = None if deadline is None else self._loop.time() + deadline
        stream = self._protocol.open(priority, encode(message), deadline=due, end=whole)
        call = self._calls[stream] = Call(self, stream, message, priority, timeout)
        call._finishing, call._finished = not more, whole
        if body is not None:
            call._push(body)
        self._wake()
        return call

    async def ask(self, message: Message, **options: Any) -> Message:
        """The answer to a message, where neither has a body; `options` are those of `request`."""
        async with self.request(message, **options) as call:
            return await call.reply(call.timeout)

    def serve(self, handler: Handler | None) -> None:
        """From now on `handler` gets every call that the peer opens, those before this too; with None they wait."""
        self._handler = handler
        if handler is not None:
            waiting, self._waiting = self._waiting, {}
            for call in waiting.values():
                self._start(call, handler)

    # The end

    async def close(self, why: str = "", error: ShoalError | None = None, farewell: float = _FAREWELL) -> None:
        """Ends the connection: open calls fail, the peer is told if the line takes it in `farewell` seconds, and
        nothing is left. `error` is what the calls here fail with."""
        self._farewell = min(self._farewell, farewell)
        if self._ending is None and self.reason is None:
            self._ending = error or LinkError("The connection is closed.", why or "This side closed it.", AGAIN)
            self._protocol.close(why or self._ending.why)
            self._lose(self._ending)
            self._wake()
            timer = self._loop.call_later(farewell, self._give_up)
            self._run_task.add_done_callback(lambda _: timer.cancel())
        await asyncio.wait([self._run_task])

    def _give_up(self) -> None:
        """The line does not take the farewell."""
        self._farewell = 0.0
        self._run_task.cancel()

    def _lose(self, error: ShoalError) -> None:
        """Fails all that is under way."""
        for call in [*self._calls.values()]:
            call._lost(error)
        self._waiting.clear()

    async def drain(self, timeout: float, why: str = "It is shutting down.") -> None:
        """Lets the calls that are open end, takes no others, then closes; after `timeout` seconds in any case."""
        if self._ending is None and self.reason is None:
            self.going_away = why
            self._protocol.go_away(why)
            self._quiet.clear()
            self._wake()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._quiet.wait()
        await self.close(why)

    async def closed(self) -> ShoalError:
        """Waits for the end and says why."""
        await asyncio.wait([self._run_task])
        return self.reason or LinkError("The connection is closed.", "It never began.", AGAIN)

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # The loops: bytes in, bytes out, time. Each ends by raising why the connection is over.

    async def _run(self) -> None:
        reason: ShoalError = LinkError("The connection is closed.", "This side dropped it.", AGAIN)
        try:
            async with asyncio.TaskGroup() as group:
                for loop in (self._reading(), self._writing(), self._ticking()):
                    group.create_task(loop)
        except* ShoalError as errors:
            # A link may break because of a refusal: then that is what to say.
            ends = cast(tuple[ShoalError, ...], errors.exceptions)
            reason = next((error for error in ends if isinstance(error, TrustError)), ends[0])
        except* Exception:
            _log.exception("the connection to %s failed", self.transport.name)
        finally:
            self.reason = self._ending or reason
            self._lose(self.reason)
            try:
                await self._part()
            finally:
                await released(self.transport, self._farewell)
                self._quiet.set()
                if self.on_closed is not None:
                    self.on_closed(self.reason)

    async def _part(self) -> None:
        """Ends the handlers, and says farewell if the link still takes it."""
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        self._protocol.close(self.reason.why if self.reason else "")
        with contextlib.suppress(LinkError, TimeoutError):
            async with asyncio.timeout(self._farewell):
                if chunk := self._protocol.next_chunk(self._loop.time()):
                    self._secure.send(chunk)
                self._secure.close()
                if data := self._secure.outgoing():
                    await self.transport.write(data)
        if tasks:
            await asyncio.wait(tasks, timeout=_FAREWELL)

    async def _reading(self) -> None:
        self._plaintext(self._early)
        while True:
            data = await self.transport.read()
            self._plaintext(self._secure.receive(data))  # which raises at an end without farewell
            if self._secure.closed or not data:
                raise LinkError("The peer closed the connection.", "It did not say why.", AGAIN)

    def _plaintext(self, plaintext: bytes) -> None:
        self._events(self._protocol.receive(plaintext, self._loop.time()))
        self._wake()

    async def _writing(self) -> None:
        while True:
            self._sendable.clear()
            now = self._loop.time()
            if chunk := self._protocol.next_chunk(now):
                self._secure.send(chunk)
            self._events(self._protocol.tick(now))  # what was dropped is not fed
            if chunk:
                for call in [*self._calls.values()]:
                    call._feed()
            if data := self._secure.outgoing():
                await self.transport.write(data)
            elif self._ending is not None:
                raise self._ending
            else:
                if self._protocol.idle and not self._calls:
                    self._quiet.set()
                await self._sendable.wait()

    async def _ticking(self) -> None:
        while True:
            now = self._loop.time()
            self._events(self._protocol.tick(now))
            self._wake()
            due = self._protocol.wakeup(now)
            await asyncio.sleep(_TICK if due is None else min(max(due - now, 0.01), _TICK))

    def _wake(self) -> None:
        self._sendable.set()

    # What the protocol tells

    def _events(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Opened):
                self._opened(event)
            elif isinstance(event, RoundTrip):
                self.rtt = event.seconds if self.rtt is None else self.rtt + (event.seconds - self.rtt) / 8
            elif isinstance(event, GoingAway):
                self.going_away = printable(event.why) or "It is going away."
            elif isinstance(event, Closed):
                why = printable(event.why).rstrip(".") or "The peer closed it"
                raise LinkError("The connection is over.", f"{why}.", AGAIN)
            elif call := self._calls.get(event.stream):
                if isinstance(event, Data):
                    call._on_data(event.data)
                elif isinstance(event, Answered):
                    call._on_answer(event.head)
                elif isinstance(event, Ended):
                    call._on_ended()
                elif isinstance(event, Reset):
                    call._on_reset(event.code, event.why)
                    self._waiting.pop(event.stream, None)
                    if task := self._tasks.get(event.stream):
                        task.cancel()

    def _opened(self, event: Opened) -> None:
        call = self._calls[event.stream] = Call(self, event.stream, None, event.priority, _SERVED)
        try:
            call.message = decode(event.head)
            if len(self._tasks) + len(self._waiting) >= self._handlers:
                raise BusyError("The peer is busy.", f"{self._handlers} requests are under way.", AGAIN)
        except ShoalError as error:
            return call._refuse(error)
        if self._handler is None:
            self._waiting[event.stream] = call
        else:
            self._start(call, self._handler)

    def _start(self, call: Call, handler: Handler) -> None:
        task = self._tasks[call._stream] = self._loop.create_task(self._serve(call, handler))
        task.add_done_callback(lambda _: self._tasks.pop(call._stream, None))

    async def _serve(self, call: Call, handler: Handler) -> None:
        try:
            await handler(call)
            if call._answer is None:
                await call.answer()
            if call._error is None:
                await call.end()
                call._stop()
        except ShoalError as error:
            call._refuse(error)
        except asyncio.CancelledError:
            call.cancel("The peer ended it.")
            raise
        except Exception:
            _log.exception("a request of %s failed", self.transport.name)
            call._refuse(RemoteError("The peer failed at the request.", "It has an error of its own.", "See its log."))
