"""Links that misbehave on purpose, for tests: a TCP proxy and a serial cable (two pseudo-terminals) over `Faults`.

    async with Cable(Faults(rate=11_520)) as cable:      # cable.a and cable.b are paths of ports
    async with Proxy(host, port, Faults(cut=100)) as proxy:    # dial proxy.port

`Faults` is one direction's behaviour; `forward` (device to edge: from a; from who dials) and `backward` may differ, and
may be replaced at any time: what already left keeps its fate. All randomness is seeded.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import pty
import random
import socket
import struct
import termios
import tty
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Faults:
    """One direction of a link. Byte positions count from its start, before anything is lost or doubled."""

    delay: float = 0.0  # seconds
    jitter: float = 0.0  # up to so many seconds more, order kept
    rate: float | None = None  # bytes/s: baud / 10
    stalls: tuple[tuple[int, float], ...] = ()  # (at byte, seconds), ascending
    errors: float = 0.0  # chance of a byte to have one to eight bits flipped
    losses: float = 0.0  # chance of a byte to vanish
    duplicates: float = 0.0  # chance of a piece (up to 4 KiB, 2 ms of a paced line) to come twice
    noise: bytes = b""  # comes first of all
    cut: int | None = None  # ends cleanly (TCP FIN, unplugged cable) at byte n
    reset: int | None = None  # TCP RST (unplugged cable) at byte n
    swallow: int | None = None  # from byte n on nothing arrives, and nobody is told
    seed: int = 0

    def of(self, baud: float) -> "Faults":
        """The same at a line rate."""
        return dataclasses.replace(self, rate=baud / 10)


def damage(data: bytes, chance: float, losses: float, rng: random.Random) -> bytes:
    """`data` with each byte changed by `chance` and lost by `losses`."""
    if not (chance or losses):
        return data
    out = bytearray(data)
    for probability, change in ((chance, True), (losses, False)):
        at = -1
        spots = []
        while probability and (at := at + 1 + int(rng.expovariate(probability))) < len(out):
            spots.append(at)
        for spot in reversed(spots):
            if change:
                out[spot] ^= rng.randrange(1, 256)
            else:
                del out[spot]
    return bytes(out)


class End(Exception):
    """A direction ends here: `reset` hard, otherwise cleanly."""

    def __init__(self, reset: bool):
        self.reset = reset


class Direction:
    """Takes bytes by `put`, gives them to `write` as its faults say. `run` raises End where they end the link."""

    def __init__(self, faults: Faults, write: Callable[[bytes], Awaitable[None]]):
        self.faults, self._write = faults, write
        self.bytes = 0  # taken
        self.passed = 0  # given out
        self.changed = False  # something was damaged, lost, doubled or swallowed
        self.queued = self.peak = 0  # bytes that wait for the line's pace
        self._pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._paced = asyncio.Event()
        self._waiting = bytearray(faults.noise)
        self._rng = random.Random(faults.seed)
        self._free = self._due = 0.0
        self._paced.set()

    def put(self, data: bytes) -> None:
        self._waiting += data
        self.queued = len(self._waiting)
        self.peak = max(self.peak, self.queued)
        self._paced.set()

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pace())
                group.create_task(self._deliver())
        except* End as ends:
            raise ends.exceptions[0] from None

    async def _pace(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._paced.clear()
                await self._paced.wait()
                self._free = max(self._free, loop.time())  # the line was idle; a late wake-up below costs it nothing
            faults = self.faults
            size = 4096 if faults.rate is None else max(1, int(faults.rate * 0.002))
            ends = [(n, reset) for n, reset in ((faults.cut, False), (faults.reset, True)) if n is not None]
            stops = [n for n, _ in ends] + [n for n, _ in faults.stalls] + [faults.swallow or 0]
            size = min([size, len(self._waiting)] + [n - self.bytes for n in stops if n > self.bytes])
            for n, reset in ends:
                if self.bytes >= n:
                    await self._flush()
                    raise End(reset)
            for n, seconds in faults.stalls:
                if self.bytes == n:
                    await asyncio.sleep(seconds)
                    self._free = loop.time()
            piece = bytes(self._waiting[:size])
            del self._waiting[:size]
            if faults.rate is not None:
                self._free += len(piece) / faults.rate
                await asyncio.sleep(max(0.0, self._free - loop.time()))
            self.queued = len(self._waiting)
            self.bytes += len(piece)
            if faults.swallow is not None and self.bytes > faults.swallow:
                self.changed = True
                continue
            harmed = damage(piece, faults.errors, faults.losses, self._rng)
            if faults.duplicates and self._rng.random() < faults.duplicates:
                harmed += harmed
            self.changed |= harmed != piece
            self._due = max(self._due, loop.time() + faults.delay + self._rng.random() * faults.jitter)
            self._pieces.put_nowait((self._due, harmed))

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, piece = await self._pieces.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await self._write(piece)
            self.passed += len(piece)
            self._pieces.task_done()

    async def _flush(self) -> None:
        await self._pieces.join()


class Proxy:
    """Stands before a TCP server at host:port and passes each connection on, with faults. Dial `host`:`port`."""

    def __init__(self, host: str, port: int, forward: Faults | None = None, backward: Faults | None = None):
        self._to = (host, port)
        self.forward, self.backward = forward or Faults(), backward or Faults()
        self.host, self.port = "127.0.0.1", 0
        self.pairs: list[tuple[Direction, Direction]] = []  # of each connection: forward, backward
        self._live: set[asyncio.Task] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, self.host, 0, limit=4096)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._live):
            task.cancel()
        await asyncio.gather(*self._live, return_exceptions=True)

    def become(self, forward: Faults, backward: Faults | None = None) -> None:
        """New faults, for connections to come and those that live."""
        self.forward, self.backward = forward, backward or forward
        for one, other in self.pairs:
            one.faults, other.faults = self.forward, self.backward

    def reset_all(self) -> None:
        """Every connection breaks now, by a TCP RST both ways."""
        for writer in list(self._writers):
            _reset(writer)

    @property
    def bytes(self) -> tuple[int, int]:
        """What all connections took, forward and backward."""
        return sum(a.bytes for a, _ in self.pairs), sum(b.bytes for _, b in self.pairs)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._pass(reader, writer))
        self._live.add(task)
        task.add_done_callback(self._live.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, onward = await asyncio.open_connection(*self._to, limit=4096)
        except OSError:
            return _reset(writer)
        ends = (writer, onward)
        self._writers.update(ends)
        forward, backward = Direction(self.forward, _into(onward)), Direction(self.backward, _into(writer))
        self.pairs.append((forward, backward))
        try:
            async with asyncio.TaskGroup() as group:
                for source, direction, to in ((reader, forward, onward), (there, backward, writer)):
                    group.create_task(self._one_way(source, direction, to))
        except* End as end:
            if any(one.reset for one in end.exceptions if isinstance(one, End)):
                for each in ends:
                    _reset(each)
        except* OSError:
            for each in ends:
                _reset(each)
        finally:
            self._writers.difference_update(ends)
            for each in ends:
                each.close()

    async def _one_way(self, reader: asyncio.StreamReader, direction: Direction, writer: asyncio.StreamWriter) -> None:
        running = asyncio.get_running_loop().create_task(direction.run())
        try:
            while True:
                read = asyncio.ensure_future(reader.read(4096))
                await asyncio.wait({read, running}, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    read.cancel()
                    await running
                if not (data := await read):
                    break
                direction.put(data)
                while direction.queued > 4096 and not running.done():  # TCP holds the sender back, so do we
                    await asyncio.sleep(0.005)
            while direction.queued and not running.done():
                await asyncio.sleep(0.005)
            if running.done():
                await running
            await direction._flush()
            if direction.faults.swallow is not None and direction.bytes >= direction.faults.swallow:
                await asyncio.Event().wait()  # half-open: the other end never learns of it
            with contextlib.suppress(OSError):
                writer.write_eof()
        finally:
            running.cancel()


def _into(writer: asyncio.StreamWriter) -> Callable[[bytes], Awaitable[None]]:
    async def write(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    return write


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Cable:
    """A serial cable: two ports (`a`, `b` are paths) joined with faults; `forward` is from a to b. A baud rate that a
    port is opened with means nothing to it: pace it by `Faults.of(baud)`. A path may be opened again and again."""

    def __init__(self, forward: Faults | None = None, backward: Faults | None = None):
        forward = forward or Faults()
        self._faults = (forward, backward or forward)
        self.a = self.b = ""

    async def __aenter__(self) -> "Cable":
        self._loop = asyncio.get_running_loop()
        self._masters, self._slaves = [], []
        for _ in range(2):
            master, slave = pty.openpty()
            tty.setraw(slave)
            os.set_blocking(master, False)
            self._masters.append(master)
            self._slaves.append(slave)  # held, so that a port that closes is no hang-up
        self.a, self.b = (os.ttyname(slave) for slave in self._slaves)
        self.forward = Direction(self._faults[0], self._writer(1))
        self.backward = Direction(self._faults[1], self._writer(0))
        for end, direction in enumerate((self.forward, self.backward)):
            self._loop.add_reader(self._masters[end], self._readable, end, direction)
        self._tasks = [self._loop.create_task(self._run(d)) for d in (self.forward, self.backward)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.unplug()
        for slave in self._slaves:
            os.close(slave)

    def become(self, forward: Faults, backward: Faults | None = None) -> None:
        """New faults from now on."""
        self.forward.faults, self.backward.faults = forward, backward or forward

    def break_off(self) -> None:
        """The wire is cut: both ports stay, nothing passes. `become(Faults())` mends it."""
        self.become(dataclasses.replace(self.forward.faults, swallow=0))

    def unplug(self) -> None:
        """Both ports vanish, for good. Their names stay ours until the end: who looks for them finds nobody else's."""
        for master in self._masters:
            self._loop.remove_reader(master)
            os.close(master)
        self._masters = []

    @property
    def unread(self) -> tuple[int, int]:
        """Bytes that arrived at a and at b and that nobody has read there."""
        return tuple(  # type: ignore[return-value]
            struct.unpack("I", fcntl.ioctl(slave, termios.FIONREAD, b"\0" * 4))[0] for slave in self._slaves
        )

    async def _run(self, direction: Direction) -> None:
        try:
            await direction.run()
        except End:
            self.unplug()

    def _readable(self, end: int, direction: Direction) -> None:
        with contextlib.suppress(BlockingIOError):
            direction.put(os.read(self._masters[end], 65_536))

    def _writer(self, end: int) -> Callable[[bytes], Awaitable[None]]:
        async def write(data: bytes) -> None:
            while data and self._masters:
                try:
                    data = data[os.write(self._masters[end], data) :]
                except BlockingIOError:  # nobody reads: a UART would lose bytes here, we are kind
                    await asyncio.sleep(0.001)

        return write
