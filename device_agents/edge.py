"""The edge's daemon: it listens, answers devices, and says what it sees.

    edge = Edge(home() / "edge", ["0.0.0.0:4707", "serial:/dev/ttyUSB0?baud=921600"], memory=2 << 30)
    await edge.start()
    edge.open_window()          # a device may pair for 120 seconds
    await edge.stop(drain=10)

It promises that a device which breaks takes nothing else along, that `stop` lets requests end and then leaves no task,
and that what is agreed with a device is looked at every second and taken back when it no longer holds. How a message is
answered is in answers.py; this module knows nothing about tensors.
"""

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.runtime.errors import BudgetError, LinkError, ShoalError, TrustError, UsageError

from . import endpoint, messages
from .admin import Admin
from .answers import Answers
from .connection import Call, Connection
from .devices import Device
from .figures import Counter
from .home import private_folder
from .identity import Identity
from .links import DEFAULT_PORT, Address
from .negotiate import FEATURES, Terms, version
from .pairing import Code, Window
from .reach import is_loopback, reachable
from .snapshot import Model, Pairing, Round, Snapshot
from .store import Entry, Store
from .tails import Tail, Tails
from .trust import Peer, Peers

if TYPE_CHECKING:
    from .discovery import Announcement

LISTEN = (f":{DEFAULT_PORT}",)  # of every interface
_LOOK = 1.0  # seconds between looks at models, agreements and the manifest
_SAW = 60.0  # seconds between notes of when a device was last seen
_TELL = 5.0  # seconds that a device has to take an unasked message

_log = logging.getLogger("shoal.edge")


class Edge:
    """One edge, kept in `folder`. `listen` are addresses, TCP and serial; limits as in tails.py."""

    def __init__(
        self, folder: Path, listen: Iterable[Address | str], *, name: str | None = None, memory: int | None = None,
        max_batch: int = 8, max_wait: float = 0.003, inflight: int = 4, queue: int = 128, threads: int = 0,
        disk: int | None = None, terms: Terms | None = None, announce: bool = False,
        servers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """`disk` bounds the store, `memory` what open models hold, in bytes: a quarter for tails, the rest for language
        models. `announce` says on the local network that the edge is here. `servers` are URLs of inference servers
        (Open Inference Protocol v2), by the name of the tail that each runs. Raises StorageError, TrustError."""
        self.folder = private_folder(Path(folder))
        self.identity = Identity.open(self.folder, name)
        self.peers = Peers.open(self.folder / "peers")
        self.store = Store(self.folder / "models", disk)
        share = None if memory is None else memory // 4
        self.memory = memory
        self.tails = Tails(self._open_tail, max_batch, max_wait, queue, inflight, share)
        self.threads, self.servers = threads, dict(servers or {})
        self.answers = Answers(
            self.identity.name, self.store, self.tails, terms or Terms(inflight=inflight), self.folder,
            None if memory is None or share is None else memory - share,
        )  # fmt: skip
        self.listen = [Address.parse(one) if isinstance(one, str) else one for one in listen]
        self.devices: dict[str, Device] = {}
        self.window: Window | None = None
        self.rounds: list[Round] = []  # whoever trains puts them here, newest first
        self.draining = False
        self._announce = announce
        self._announcement: Announcement | None = None
        self._pairing: Pairing | None = None
        self._gone = Counter()  # of devices since revoked
        self._listener: endpoint.Listener | None = None
        self._admin = Admin(self)
        self._watcher: asyncio.Task | None = None
        self._telling: set[asyncio.Task] = set()
        self._queues: set[asyncio.Queue[object]] = set()
        self._offered = (0, b"")
        self._started_at = time.time()

    # Life

    async def start(self) -> "Edge":
        """Raises LinkError where an address cannot be had, UsageError where an edge runs in the folder already."""
        self._started_at = time.time()
        await self._admin.start()
        try:
            await self.answers.look()
            self._offered = await asyncio.to_thread(self._manifest)
            self._listener = endpoint.Listener(
                self.listen, self.identity, self.peers, self._connected, lambda: self.window, self._paired,
                hello=self._hello,
            )  # fmt: skip
            await self._listener.start()
        except BaseException:
            await self._admin.stop()
            raise
        self._watcher = asyncio.create_task(self._watch())
        if self._announce:
            self._spawn(self._be_found())
        return self

    async def stop(self, drain: float = 10.0) -> None:
        """Takes nothing new, gives what runs `drain` seconds, and frees all."""
        self.draining = True
        self.close_window()
        self._tell_watchers()
        for task in (self._watcher, *self._telling):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._announcement is not None:
            await self._announcement.close()
        if self._listener is not None:
            await self._listener.close(drain)
        await self.answers.close(0.0)
        await self._admin.stop()

    @property
    def addresses(self) -> list[Address]:
        """Where it listens, with the real ports."""
        return self._listener.addresses if self._listener else []

    # Pairing and peers

    def open_window(self, seconds: float = 120.0) -> Window:
        """From now on one device may pair, with the code of the window that is returned; an open one ends."""
        if self.draining:
            raise UsageError("No device can pair.", "The edge is shutting down.", "Start it again.")
        self.close_window()
        self.window = Window(Code.new(), asyncio.get_running_loop().time(), seconds)
        opened = time.time()
        address = reachable(self.addresses)
        self._pairing = {
            "state": "open", "code": str(self.window.code),
            "text": f"shoal pair {shlex.quote(address)} {self.window.code}",
            "address": address, "opened_at": opened, "closes_at": opened + seconds,
            "tries_left": self.window.tries, "paired": "",
        }  # fmt: skip
        self._tell_watchers()
        return self.window

    def close_window(self) -> None:
        """Nobody can pair any more."""
        if self.pairing() is not None and self.window is not None:
            self.window.close()
            if self._pairing is not None and self._pairing["state"] == "open":
                self._pairing |= {"state": "closed", "code": "", "text": ""}
        self.window = None
        self._tell_watchers()

    def pairing(self) -> Pairing | None:
        """The last pairing window as it is now; its code only while it is open."""
        if self.window is not None and self._pairing is not None and self._pairing["state"] == "open":
            state = self.window.state(asyncio.get_running_loop().time())
            self._pairing["tries_left"] = self.window.tries
            if state != "open":
                self._pairing |= {"state": state, "code": "", "text": ""}  # type: ignore[typeddict-item]
        return self._pairing

    def rename(self, fingerprint: str, name: str) -> None:
        """Raises UsageError."""
        self._device(fingerprint).peer = self.peers.rename(self._peer(fingerprint), name)
        self._tell_watchers()

    def revoke(self, fingerprint: str) -> None:
        """Trusts a device no more and ends its connections."""
        self.peers.revoke(self._peer(fingerprint))
        self._forget(fingerprint)
        self._tell_watchers()

    # What others see

    def subscribe(self) -> "asyncio.Queue[object]":
        """A queue that gets something whenever it is worth to look again; what does not fit is dropped."""
        queue: asyncio.Queue[object] = asyncio.Queue(4)
        self._queues.add(queue)
        return queue

    def unsubscribe(self, queue: "asyncio.Queue[object]") -> None:
        self._queues.discard(queue)

    def snapshot(self) -> Snapshot:
        """Everything that a person may want to see, as JSON."""
        now, clock = asyncio.get_running_loop().time(), time.time()
        peers = self.peers.list()
        devices = [self._device(peer.fingerprint, peer) for peer in peers if peer.role == "device"]
        total = Counter()
        for counter in (self._gone, *(device.requests for device in self.devices.values())):
            for name, value in counter.say().items():
                setattr(total, name, getattr(total, name) + value)
        language = {model["digest"]: model["bytes"] for model in self.answers.language_models()}
        used = sum(language.values()) + sum(tail.resident for tail in self.tails.open_tails.values())
        return {
            "name": self.identity.name, "id": self.identity.id, "version": _version(), "time": clock,
            "started_at": self._started_at, "addresses": [str(address) for address in self.addresses],
            "draining": self.draining, "memory": {"used": used, "limit": self.memory},
            "requests": total.say(), "latency": self.answers.timings.say(now),
            "devices": [device.say(self.answers.models, now) for device in devices],
            "models": [self._model(entry, language) for entry in self.store.list()], "rounds": self.rounds[:50],
            "pairing": self.pairing(),
        }  # fmt: skip

    def _model(self, entry: Entry, language: dict[str, int]) -> Model:
        tail = self.tails.open_tails.get(entry.digest)
        return {
            "digest": entry.digest, "name": entry.name, "role": entry.role, "bytes": entry.bytes,
            "resident": tail.resident if tail else language.get(entry.digest), "used_at": entry.used_at,
            "served": tail.served if tail else 0, "batches": tail.batches if tail else 0,
            "queued": self.tails.waiting.count(entry.digest), "where": tail.where if tail else "",
        }  # fmt: skip

    # Devices

    async def _connected(self, connection: Connection) -> None:
        assert connection.peer is not None and connection.hello is not None
        try:
            version(connection.hello)
        except LinkError as error:
            return await connection.close(error.why, error)
        device = self._device(connection.peer.fingerprint, connection.peer)
        device.opened(connection, time.time())
        _log.info("%s is connected by %s", device.peer.name, connection.transport.name)
        address = connection.transport.name.partition(" ")[2]
        await self._saw(device, address)
        self._tell_watchers()
        connection.serve(functools.partial(self._answer, device))
        try:
            why = await connection.closed()
            _log.info("%s has gone: %s", device.peer.name, why.why)
        finally:
            device.closed(connection)
            await self._saw(device)
            self._tell_watchers()

    async def _answer(self, device: Device, call: Call) -> None:
        try:
            await self.answers.answer(device, call)
        finally:
            self._tell_watchers()

    def _device(self, fingerprint: str, peer: Peer | None = None) -> Device:
        """The device of that fingerprint, made when it is first seen."""
        peer = peer or self._peer(fingerprint)
        device = self.devices.get(fingerprint)
        if device is None:
            device = self.devices[fingerprint] = Device(peer)
        device.peer = peer
        return device

    def _peer(self, fingerprint: str) -> Peer:
        peer = self.peers.get(fingerprint)
        if peer is None:
            raise UsageError("There is no such device.", "It was revoked, or never paired.", "See shoal peers list.")
        return peer

    def _forget(self, fingerprint: str) -> None:
        """Ends the connections of who is trusted no more, and keeps only its figures, in the sum."""
        device = self.devices.pop(fingerprint, None)
        if device is None:
            return
        for name, value in device.requests.say().items():
            if name != "running":
                setattr(self._gone, name, getattr(self._gone, name) + value)
        self.answers.forget(fingerprint)
        error = TrustError("The edge does not trust this device.", "It was revoked.", "Pair again.")
        for connection in [*device.connections]:
            self._spawn(connection.close(error.why, error))

    async def _saw(self, device: Device, address: str | None = None) -> None:
        with contextlib.suppress(ShoalError):  # revoked this moment, or the disk is full: no reason to stop serving
            device.peer = await asyncio.to_thread(self.peers.saw, device.peer, address or None)

    def _paired(self, peer: Peer) -> None:
        if self._pairing is not None:
            self._pairing |= {"state": "used", "code": "", "text": "", "paired": peer.name}
        _log.info("paired with %s (%s)", peer.name, peer.id)
        self._tell_watchers()

    async def _be_found(self) -> None:
        """Announces the edge; a network that does not allow it is no reason not to serve."""
        from .discovery import announce

        ports = [address.port for address in self.addresses if address.kind == "tcp" and not is_loopback(address)]
        try:
            if ports:
                self._announcement = await announce(self.identity.name, ports[0], self.identity.id)
        except ShoalError as error:
            _log.warning("%s", error)

    # Every second

    async def _watch(self) -> None:
        """Looks at what others may have changed: peers, models, the manifest; and at what was agreed."""
        seen, warned = 0.0, ""
        while True:
            await asyncio.sleep(_LOOK)
            try:
                await self.answers.look()
                await self._make_room()
                trusted = {peer.fingerprint: peer for peer in await asyncio.to_thread(self.peers.list)}
                for fingerprint, device in [*self.devices.items()]:
                    if fingerprint not in trusted:
                        self._forget(fingerprint)
                    else:
                        device.peer = trusted[fingerprint]
                        if why := self.answers.reconsider(device):
                            self._tell(device, messages.Renegotiate(why))
                if (manifest := await asyncio.to_thread(self._manifest)) != self._offered:
                    self._offered = manifest
                    for device in self.devices.values():
                        if manifest[1] and device.peer.may("update"):
                            self._tell(device, messages.Offer(manifest[1]))
                if time.monotonic() - seen > _SAW:
                    seen = time.monotonic()
                    for device in [device for device in self.devices.values() if device.connections]:
                        await self._saw(device)
                before = self._pairing and self._pairing["state"]
                if (now := self.pairing()) is not None and now["state"] != before:
                    self._tell_watchers()
                if self._announcement is not None:
                    await self._announcement.pairing(now is not None and now["state"] == "open")
                warned = ""
            except ShoalError as error:
                if str(error) != warned:  # once, not every second
                    warned = str(error)
                    _log.warning("%s", error)

    async def _make_room(self) -> None:
        """Removes the models longest unused, but none that is open, where the store is over its size."""
        most = self.store.most
        if most is not None and sum(model.length for model in self.answers.models.values()) > most:
            gone = await asyncio.to_thread(self.store.collect, most, {*self.tails.open_tails})
            for entry in gone:
                _log.info("removed %s (%s), the longest unused: the store is full", entry.name, entry.digest[:12])
            await self.answers.look()

    def _manifest(self) -> tuple[int, bytes]:
        try:
            return self.answers.manifest()
        except ShoalError as error:
            _log.warning("%s", error)
            return 0, b""

    def _tell(self, device: Device, message: messages.Message) -> None:
        """Says `message` to a device, if it listens."""

        async def say(connection: Connection) -> None:
            with contextlib.suppress(ShoalError):
                await connection.ask(message, timeout=_TELL)

        if device.connections:
            self._spawn(say(device.connections[-1]))

    def _spawn(self, work) -> None:
        task = asyncio.ensure_future(work)
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def _tell_watchers(self) -> None:
        for queue in self._queues:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait("look")

    def _hello(self) -> messages.Hello:
        return messages.Hello(
            messages.VERSION, "edge", self.identity.name, f"shoal {_version()}", tuple(sorted(FEATURES)),
            clock_ms=time.time_ns() // 1_000_000,
        )  # fmt: skip

    def _open_tail(self, digest: str) -> Tail:
        """Opens a tail here, or where a server runs it under its name."""
        bundle, remote, url = self.answers.open(digest), None, ""
        try:
            entry, most = self.store.get(digest), self.tails.memory
            if entry is not None and (url := self.servers.get(entry.name, "")):
                from .oip import RemoteSession

                remote = RemoteSession(url, entry.name)
            elif entry is not None and most is not None and entry.bytes > most:
                why = f"It has {entry.bytes:,} bytes; tails may hold {most:,}, a quarter of the edge's memory."
                raise BudgetError("The tail does not fit the memory.", why, "Give the edge more with --memory.")
            return Tail(bundle, self.threads, remote, url)
        except BaseException:
            bundle.close()
            raise


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("shoal")
    except importlib.metadata.PackageNotFoundError:
        return "0"
