"""Where connections begin: dialling, pairing, and listening for both.

It promises that a stranger costs little (ten seconds, one of a bounded number of places, no task left), that `dial`
returns only once the other side has judged us and said Hello, and that a peer which is revoked loses its connections
within seconds.

Over every link the device first sends eight bytes: "shoal", the version (1), a purpose and a newline. P: pairing
follows (pairing.py). S: TLS 1.3 (secure.py), at once, and the streams of docs/protocol.md inside it, of which the
device's first opens with Hello and is answered with Hello. The edge says the same eight bytes before its part, or
refuses with the purpose E, the length of a reason (u16, little-endian) and the reason, and closes.
"""

import asyncio
import contextlib
import struct
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from shoal.runtime.errors import LinkError, ShoalError, TrustError

from . import links
from .connection import Call, Connection, released
from .identity import Identity
from .links import Address, Transport
from .messages import VERSION, Hello, Message, printable
from .pairing import Code, DevicePairing, EdgePairing, Window
from .protocol import Limits
from .secure import Secure
from .trust import Peer, Peers

HANDSHAKE = 10.0  # seconds from a link's first byte to Hello, or to the end of a pairing

_MAGIC = b"shoal\x01"  # the version of the preamble, of pairing and of the protocol above
_PAIR, _SESSION, _REFUSED = b"P", b"S", b"E"
_LENGTH = 8  # bytes of a preamble: magic, purpose, newline
_MOST_REASON = 500
_FAREWELL = 1.0  # seconds to be understood in
_SWEEP = 2.0  # seconds between looks at who is still trusted
_AGAIN = "Check the address and the cable, and try again."


def _preamble(purpose: bytes) -> bytes:
    return _MAGIC + purpose + b"\n"


async def dial(
    address: Address | str,
    identity: Identity,
    peers: Peers,
    timeout: float = HANDSHAKE,
    *,
    hello: Hello | None = None,
    limits: Limits | None = None,
) -> Connection:
    """A connection to the paired edge at `address`, which has accepted us: its Hello is there.

    `hello` is what this side says of itself. Raises LinkError, TrustError (`why` tells which side does not trust
    which), or what the edge answered.
    """
    address = _address(address)
    hello = hello or Hello(VERSION, "device", identity.name, clock_ms=_clock())
    secure = Secure(identity, peers.certificates, server=False)
    async with _link(address, timeout) as transport:
        await transport.write(_preamble(_SESSION) + secure.outgoing())
        rest = await _answer(transport, _SESSION)
        early = await _shake(transport, secure, rest)
        peer = _trusted(peers, secure, "edge")
        connection = Connection(transport, secure, True, peer=peer, early=early, limits=limits)
        try:
            answer = await connection.ask(hello, timeout=timeout)
            connection.hello = _judged(answer, peer, hello.features)
        except BaseException:
            await connection.close("The greeting failed.", farewell=0.2)
            raise
    return connection


async def pair(
    address: Address | str, code: Code, identity: Identity, peers: Peers, timeout: float = 2 * HANDSHAKE
) -> Peer:
    """Pairs with the edge at `address`, whose person shows `code`; both sides trust each other from then on.

    Raises TrustError with the reason where it fails, LinkError where the link does.
    """
    address = _address(address)
    async with _link(address, timeout) as transport:
        await transport.write(_preamble(_PAIR))
        rest = await _answer(transport, _PAIR)
        pairing = DevicePairing(identity, code, seen=2 * _preamble(_PAIR))
        peer = await _converse(transport, pairing, rest)
        await _free(transport)
    return peers.add(replace(peer, address=str(address)))


class Listener:
    """Takes devices at `addresses`, paired ones to `on_connection`, and those with the code of `window()` to `peers`.

    `on_connection(connection)` is awaited in a task of the connection's own; when it returns, the connection stays
    until it ends by itself. At most `most` connections and as many handshakes: of these the oldest gives way to a new
    one, and so does a peer's oldest connection when it makes more than `most_of_one`.
    """

    def __init__(
        self,
        addresses: Iterable[Address | str],
        identity: Identity,
        peers: Peers,
        on_connection: Callable[[Connection], Awaitable[None]],
        window: Callable[[], Window | None] = lambda: None,
        on_paired: Callable[[Peer], None] = lambda peer: None,
        *,
        hello: Callable[[], Hello] | None = None,
        limits: Limits | None = None,
        most: int = 256,
        most_of_one: int = 4,
        handshake: float = HANDSHAKE,
    ):
        self.connections: list[Connection] = []  # those that are greeted and open, oldest first
        self._wanted = [_address(address) for address in addresses]
        self._identity, self._peers, self._limits = identity, peers, limits
        self._on_connection, self._on_paired, self._window = on_connection, on_paired, window
        self._hello = hello or (lambda: Hello(VERSION, "edge", identity.name, clock_ms=_clock()))
        self._most, self._most_of_one, self._handshake = most, most_of_one, handshake
        self._listeners: list[links.Listener] = []
        self._shaking: dict[asyncio.Task, None] = {}  # oldest first
        self._tasks: set[asyncio.Task] = set()
        self._sweeper: asyncio.Task | None = None

    @property
    def addresses(self) -> list[Address]:
        """Where it listens, with the real ports."""
        return [listener.address for listener in self._listeners]

    async def start(self) -> "Listener":
        """Raises LinkError where one of the addresses cannot be had; then none is."""
        try:
            for address in self._wanted:
                self._listeners.append(await links.listen(address, self._accept))
        except BaseException:
            await self.close()
            raise
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def close(self, drain: float = 0.0, why: str = "The edge is shutting down.") -> None:
        """Takes nobody any more; gives what is under way `drain` seconds. No task is left."""
        for listener in self._listeners:
            listener.close()
        for task in self._shaking:
            task.cancel()
        if self._sweeper is not None:
            self._sweeper.cancel()
        ends = [one.drain(drain, why) if drain else one.close(why) for one in self.connections]
        await asyncio.gather(*ends)
        for task in self._tasks:
            task.cancel()
        if rest := [*self._tasks, *([self._sweeper] if self._sweeper else [])]:
            await asyncio.wait(rest)
        for listener in self._listeners:
            await listener.closed()

    async def __aenter__(self) -> "Listener":
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _accept(self, transport: Transport) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._shaking[task] = None
        if len(self._shaking) > self._most:
            next(iter(self._shaking)).cancel()
        try:
            try:
                async with asyncio.timeout(self._handshake):
                    connection = await self._take(transport)
            finally:
                self._shaking.pop(task, None)
            if connection is not None:
                await self._keep(connection)
        except TimeoutError:
            pass  # a stranger that dawdles is not told why
        finally:
            transport.close()
            self._tasks.discard(task)

    async def _take(self, transport: Transport) -> Connection | None:
        """The connection that a stranger becomes; None where it came to pair, or is refused."""
        first, rest = await _exactly(transport, _LENGTH)
        purpose = first[len(_MAGIC) : -1]
        if not first.startswith(b"shoal"):
            return None  # somebody else's protocol: anything we say would be noise
        if first == _preamble(_PAIR):
            await self._pair(transport, rest)
        elif first != _preamble(_SESSION):
            await self._refuse(transport, f"This edge speaks version {_MAGIC[-1]}, and knows no purpose {purpose!r}.")
        elif len(self.connections) >= self._most:
            await self._refuse(transport, f"The edge is busy: it has {self._most} connections.")
        elif not self._peers.certificates():
            await self._refuse(transport, "No device is paired with this edge.")
        else:
            return await self._greet(transport, rest)
        return None

    async def _refuse(self, transport: Transport, reason: str) -> None:
        data = reason.encode()[:_MOST_REASON]
        await transport.write(_preamble(_REFUSED) + struct.pack("<H", len(data)) + data)
        await _hear_out(transport)

    async def _pair(self, transport: Transport, rest: bytes) -> None:
        window, now = self._window(), asyncio.get_running_loop().time()
        state = window.state(now) if window is not None else "not open"
        if window is None or state != "open":
            return await self._refuse(transport, f"The pairing window is {state}. Run `shoal edge pair` on the edge.")
        await transport.write(_preamble(_PAIR))
        pairing = EdgePairing(self._identity, window, now, seen=2 * _preamble(_PAIR))
        device = await _converse(transport, pairing, rest, self._peers.add)
        self._on_paired(device)

    async def _greet(self, transport: Transport, rest: bytes) -> Connection:
        secure = Secure(self._identity, self._peers.certificates, server=True)
        await transport.write(_preamble(_SESSION))
        early = await _shake(transport, secure, rest)
        peer = _trusted(self._peers, secure, "device")
        connection = Connection(transport, secure, False, peer=peer, early=early, limits=self._limits)
        greeted: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        hello = self._hello()

        def fail(error: ShoalError) -> None:
            if not greeted.done():
                greeted.set_exception(error)

        async def greet(call: Call) -> None:
            try:
                found = _judged(call.message, peer, hello.features)
                connection.serve(None)  # what it asks next waits for the owner's handler
                await call.answer(hello, b"")
            except ShoalError as error:
                fail(error)
                raise
            if not greeted.done():
                greeted.set_result(found)

        try:
            connection.on_closed = fail
            connection.serve(greet)
            connection.hello = await greeted
            connection.on_closed = None
        except ShoalError as error:
            await connection.drain(1.0, error.why)  # so that the Failure is read
            raise
        except BaseException:
            await connection.close("The greeting failed.", farewell=0.2)
            raise
        return connection

    async def _keep(self, connection: Connection) -> None:
        peer = connection.peer
        assert peer is not None
        same = [one for one in self.connections if one.peer and one.peer.fingerprint == peer.fingerprint]
        self.connections.append(connection)
        try:
            if len(same) >= self._most_of_one:
                await same[0].close("A newer connection takes its place.", farewell=0.2)
            await self._on_connection(connection)
            await connection.closed()
        finally:
            self.connections.remove(connection)
            await connection.close()

    async def _sweep(self) -> None:
        """Ends the connections of who was revoked, and notes changed rights and names."""
        while True:
            await asyncio.sleep(_SWEEP)
            for connection in [*self.connections]:
                with contextlib.suppress(ShoalError):
                    if connection.peer is not None:
                        connection.peer = self._peers.get(connection.peer.fingerprint)
                    if connection.peer is None:
                        await connection.close(error=TrustError("The peer is not trusted.", "It was revoked.", "Pair."))


def _address(address: Address | str) -> Address:
    return Address.parse(address) if isinstance(address, str) else address


def _clock() -> int:
    return time.time_ns() // 1_000_000


@contextlib.asynccontextmanager
async def _link(address: Address, timeout: float):
    """A link to `address`, closed where the block fails or takes longer than `timeout`."""
    transport = None
    try:
        async with asyncio.timeout(timeout):
            transport = await links.connect(address, timeout)
            yield transport
    except TimeoutError:
        await _free(transport)
        raise LinkError(f"{address.name} did not answer in time.", f"{timeout:g} s went by.", _AGAIN) from None
    except BaseException:
        await _free(transport)
        raise


async def _free(transport: Transport | None) -> None:
    """Closes a link, and waits until its port can be opened again."""
    if transport is not None:
        await released(transport, _FAREWELL)


async def _hear_out(transport: Transport) -> None:
    """Waits for the peer to go: a TCP socket that is closed over unread bytes takes back what was last said on it."""
    with contextlib.suppress(LinkError, TimeoutError):
        async with asyncio.timeout(_FAREWELL):
            while await transport.read():
                pass


async def _read(transport: Transport) -> bytes:
    data = await transport.read()
    if not data:
        raise LinkError("The link was cut.", f"The peer at {transport.name} closed it.", _AGAIN)
    return data


async def _exactly(transport: Transport, size: int, have: bytes = b"") -> tuple[bytes, bytes]:
    """The next `size` bytes, and what came after them."""
    while len(have) < size:
        have += await _read(transport)
    return have[:size], have[size:]


async def _answer(transport: Transport, purpose: bytes) -> bytes:
    """Reads the edge's preamble; returns what came after it. Raises LinkError with the reason of a refusal."""
    first, rest = await _exactly(transport, _LENGTH)
    if first == _preamble(purpose):
        return rest
    if not first.startswith(b"shoal") or first[-1:] != b"\n":
        raise LinkError(f"{transport.name} is no edge of shoal.", "It speaks another protocol.", _AGAIN)
    if first[len(_MAGIC) : -1] != _REFUSED:
        why = f"It answers {first!r}, and this side speaks version {_MAGIC[-1]}."
        raise LinkError("The edge cannot be talked to.", why, "Upgrade the older side.")
    size, rest = await _exactly(transport, 2, rest)
    reason, _ = await _exactly(transport, min(struct.unpack("<H", size)[0], _MOST_REASON), rest)
    why = printable(reason.decode("utf-8", "replace"), _MOST_REASON)
    raise LinkError("The edge refused.", why, "Do what it says, then try again.")


async def _shake(transport: Transport, secure: Secure, data: bytes) -> bytes:
    """Brings the session up; returns the plaintext that came with the end of it. The peer hears of a failure."""
    try:
        while True:
            plaintext = secure.receive(data) if data else b""
            if out := secure.outgoing():
                await transport.write(out)
            if secure.ready:
                return plaintext
            data = await transport.read()
            if not data:
                secure.receive(b"")  # which raises
    except ShoalError:
        if alert := secure.outgoing():
            with contextlib.suppress(LinkError):
                await transport.write(alert)
                await _hear_out(transport)
        raise


async def _converse(transport: Transport, pairing: DevicePairing | EdgePairing, data: bytes, keep=lambda peer: peer):
    """Leads a pairing to its end. What the other side waits for is sent after `keep` has made the peer a pinned one."""
    loop = asyncio.get_running_loop()
    try:
        while True:
            peer = pairing.receive(data, loop.time()) if data else None
            if peer is not None:
                peer = keep(peer)
            if out := pairing.outgoing():
                await transport.write(out)
            if peer is not None:
                return peer
            data = await _read(transport)
    except TrustError:
        if out := pairing.outgoing():
            with contextlib.suppress(LinkError):
                await transport.write(out)
                await _hear_out(transport)
        raise


def _trusted(peers: Peers, secure: Secure, role: str) -> Peer:
    """The peer whose certificate it is, in the role it was paired in."""
    peer = peers.get(secure.fingerprint)
    if peer is None or peer.role != role:
        why = "It was revoked meanwhile." if peer is None else f"It was paired as a {peer.role}, not as a {role}."
        raise TrustError("The peer is not trusted.", why, "Pair the two again.")
    return peer


def _judged(hello: Message, peer: Peer, features: tuple[str, ...]) -> Hello:
    """The other side's first message, if it can be gone on with."""
    if not isinstance(hello, Hello):
        raise LinkError("The peer does not keep to the protocol.", "Its first message is no Hello.", "Upgrade shoal.")
    if hello.role != peer.role:
        raise TrustError("The peer is not trusted.", f"It comes as {hello.role!r:.20}.", "Pair the two again.")
    if missing := sorted(set(hello.required) - set(features)):
        needed = printable(", ".join(missing))
        raise LinkError("The two sides do not fit.", f"{needed} is required and unknown here.", "Upgrade shoal here.")
    return hello
