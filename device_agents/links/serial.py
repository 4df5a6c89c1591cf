"""Links over serial ports: a UART, USB-CDC, a pseudo-terminal, socket:// and rfc2217:// URLs, all with arq.py on them.

Promises what `Transport` promises whatever the line does, and that little more than what the line carries in SLACK
waits below a `write`: by the rate, and by what the kernel says still waits where it says so (a pty does not). A
listener whose port vanishes (USB pulled) waits for it to come back. How a port is read and written is in ports.py.
"""

import asyncio
import contextlib
from collections.abc import Callable

from shoal.runtime.errors import LinkError

from . import Accept, Address, Listener, Transport, arq
from .ports import Port, open_port, sentence

_UNREAD = 256 * 1024  # payload that nobody reads, from where on more is refused
_AT_ONCE = 4096  # bytes that may wait in a port whose rate is unknown
_REOPEN = 1.0  # seconds between two tries at a port that vanished


async def connect(address: Address, timeout: float) -> Transport:
    loop = asyncio.get_running_loop()
    port = await open_port(address)
    session = arq.Arq(loop.time(), address.rate, opener=True)
    transport = SerialTransport(port, address, session, over=lambda _: port.close())
    try:
        async with asyncio.timeout(timeout):
            await transport.opened()
    except TimeoutError:
        why = session.why or f"nothing answered within {timeout:g} seconds"
        raise LinkError(
            f"{address.name} did not answer.",
            sentence(why),
            "Check the cable, that both sides use one baud rate, and that the edge listens at the other end.",
        ) from None
    finally:
        if session.state == "syn":
            transport.gone("it was given up")
    return transport


async def listen(address: Address, accept: Accept) -> Listener:
    listener = SerialListener(address, accept)
    listener.use(await open_port(address))
    return listener


class SerialTransport(Transport):
    """One session on a port. `begun` is called when a peer has opened it, `over` when nothing more will be sent."""

    def __init__(
        self,
        port: Port,
        address: Address,
        session: arq.Arq,
        over: Callable[["SerialTransport"], None],
        begun: Callable[["SerialTransport"], None] | None = None,
    ):
        self.name, self.rate, self.sent, self.received = address.name, address.rate, 0, 0
        self.arq = session
        self.unplugged = False
        self._port, self._over, self._begun = port, over, begun
        self._loop = asyncio.get_running_loop()
        self._inbox = bytearray()
        self._broken = ""
        self._done = self._closing = False
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        port.sink = self
        self._pump()

    # ---- for who owns the link

    async def opened(self) -> None:
        while self.arq.state == "syn":
            await self._changed.wait()
        if self._broken:
            raise self._error()

    async def read(self) -> bytes:
        while not self._inbox:
            if self._closing:
                return b""
            if self._broken:
                raise self._error()
            if self.arq.state == "closed":
                return b""
            await self._changed.wait()
        data = bytes(self._inbox)
        self._inbox.clear()
        self.arq.hold = False
        return data

    async def write(self, data: bytes) -> None:
        if self._closing or self.arq.state != "open":
            raise self._error()
        self.arq.send(data)
        self._pump()
        while self.arq.state == "open" and (ahead := self.arq.ahead(self._loop.time())) > arq.SLACK:
            if self.arq.queued:
                await self._changed.wait()
            else:
                await asyncio.sleep(ahead - arq.SLACK)
        if self._broken:
            raise self._error()

    def close(self) -> None:
        self._closing = True
        self.arq.close(self._loop.time())
        self._pump()

    async def closed(self) -> None:
        while not self._done:
            await self._changed.wait()

    def abort(self) -> None:
        self._closing = True
        self.arq.abandon("this side gave it up")
        self._pump()

    # ---- for the port

    def feed(self, data: bytes) -> None:
        self.received += len(data)
        self._inbox += self.arq.receive(data, self._loop.time())
        self.arq.hold = len(self._inbox) > _UNREAD
        if self._begun is not None and self.arq.state == "open":
            begun, self._begun = self._begun, None
            begun(self)
        self._pump()

    def ready(self) -> None:
        self._pump()

    def gone(self, why: str) -> None:
        if not self._done:
            self.unplugged = True
            self.arq.abandon(why)
            self._pump()

    def _pump(self) -> None:
        """Gives the port what it may have now, and comes back when it may have more."""
        if self._done:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        waiting = self._port.waiting()
        self.arq.waiting(waiting, now)
        full = self.rate is None and waiting > _AT_ONCE
        if not full and (data := self.arq.outgoing(now)):
            self.sent += len(data)
            self._port.write(data)
        self._broken = self.arq.why if self.arq.state in ("lost", "reset") else ""
        due = now + 0.002 if full else self.arq.wakeup(now)
        self._done = due is None and self.arq.state in ("lost", "reset", "closed")
        if due is not None:
            self._timer = self._loop.call_at(due, self._pump)
        self._changed.set()
        self._changed = asyncio.Event()
        if self._done:
            self._over(self)

    def _error(self) -> LinkError:
        if self._broken:
            return LinkError(f"The link over {self.name} broke.", sentence(self._broken), "Connect again.")
        whom = "This side" if self._closing else "The peer"
        return LinkError(f"The link over {self.name} is closed.", f"{whom} closed it.", "Connect again.")


class SerialListener(Listener):
    """Holds the port for good: each session on it waits for a SYN, becomes a Transport, and is followed by the next."""

    def __init__(self, address: Address, accept: Accept):
        super().__init__(address, accept)
        self._loop = asyncio.get_running_loop()
        self._port: Port | None = None
        self._current: SerialTransport | None = None
        self._ended = asyncio.Event()
        self._ending = False
        self._reopening: asyncio.Task | None = None

    def use(self, port: Port) -> None:
        self._port = port
        self._wait(arq.Arq(self._loop.time(), self.address.rate, opener=False))

    def close(self) -> None:
        self._ending = True
        if self._current is None:
            self._release()
        elif self._current.arq.state == "listen":
            self._current.close()

    async def closed(self) -> None:
        await self._ended.wait()
        if self._reopening is not None:
            await asyncio.wait([self._reopening])

    def _wait(self, session: arq.Arq, rest: bytes = b"") -> None:
        assert self._port is not None
        self._current = SerialTransport(self._port, self.address, session, self._over, self.serve)
        if rest:
            self._current.feed(rest)

    def _over(self, transport: SerialTransport) -> None:
        """A session ended: a successor has the port, or the wait for the next SYN, or nobody where it vanished."""
        self._current = None
        if self._ending:
            self._release()
        elif transport.unplugged:
            self._release()
            self._reopening = self._loop.create_task(self._reopen())
        elif transport.arq.successor is not None:
            self._wait(transport.arq.successor, transport.arq.rest)
        else:
            self._wait(arq.Arq(self._loop.time(), self.address.rate, opener=False))

    def _release(self) -> None:
        if self._port is not None:
            self._port.close()
            self._port = None
        if self._ending:
            self._ended.set()

    async def _reopen(self) -> None:
        while not self._ending:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REOPEN):
                    await self._ended.wait()
                    return
            with contextlib.suppress(LinkError):
                port = await open_port(self.address)
                if not self._ending:
                    return self.use(port)
                port.close()
