"""The device's daemon: it keeps the link to its edge, and answers apps whether there is one or not.

    agent = Agent(home() / "device", "edge.local:4707", models={"camera": Path("camera.shoal")})
    await agent.start()
    answer = await agent.infer({"image": array}, deadline=0.2)      # .where is "edge" or "local"
    await agent.stop()

It promises that a request ends by its deadline whatever the link does; that while the edge is gone the agent does
nothing but try again, every two seconds at most, so that it is ready within three of the edge's return; and that a
release of models which does not work here is gone before it does harm. Apps speak to it by `App`, over a Unix socket.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoal.runtime.errors import BackendError, BundleError, BusyError, LinkError, ShoalError, TrustError, UsageError
from shoal.runtime.split.link import Reply, late

from . import discovery, endpoint, messages
from .app_server import AppServer
from .apps import Answer, App, Piece, socket_path
from .connection import Call, Connection
from .health import Reading, Sensors, strain
from .home import private_folder
from .identity import Identity
from .install import FromEdge, FromFolder, Installer, fetch
from .links import Address
from .local import Local, LocalModels
from .negotiate import FEATURES
from .remote import Remote
from .store import Store
from .texts import Texts
from .trust import Peer, Peers
from .update import Updater, boot_id

__all__ = ["Agent", "Answer", "App", "Backoff", "Piece", "socket_path"]

HEALTH = 10.0  # seconds between two reports
UPDATES = 3600.0  # seconds between two questions for updates
_UNTRUSTED = 20.0  # seconds between two tries at an edge that does not trust us, or we it
_AGAIN = 5.0  # seconds between two tries at something that failed over a link that works
_LOOK = 2.0  # seconds between two looks at whom we trust
_SHORT, _LONG = 2.5, 15.0  # seconds that a try to connect may take: mostly short, for the sake of coming back soon

_log = logging.getLogger("shoal.agent")


class Backoff:
    """How long to wait before the next try: doubling from `first` to `most`, half of it by chance, so that a thousand
    devices do not come back at once. A link that lasted begins anew. Pure; `chance` gives 0 to 1."""

    def __init__(self, first: float = 0.1, most: float = 2.0, chance: Callable[[], float] = random.random):
        self.first, self.most, self._chance = first, most, chance
        self.failures = 0

    def failed(self) -> float:
        """Seconds to wait after this failure."""
        wait = min(self.most, self.first * 2 ** min(self.failures, 30))
        self.failures += 1
        return wait * (0.5 + self._chance() / 2)

    def lasted(self, seconds: float) -> None:
        """A connection was up for that long: one that breaks at once is a failure like any other."""
        if seconds >= self.most:
            self.failures = 0


class Agent:
    """One device, kept in `folder`. `address` is its edge's; None takes what pairing noted.

    `models` are bundles that it has besides those of updates; `window` the seconds of health that a release must
    survive. Raises TrustError, StorageError, BusyError where another agent has the folder.
    """

    def __init__(
        self,
        folder: Path,
        address: Address | str | None = None,
        *,
        app_socket: Path | None = None,
        models: Mapping[str, Path] | None = None,
        name: str | None = None,
        window: float = 60.0,
        threads: int = 0,
        memory: int | str | None = None,
        sensors: Sensors | None = None,
    ):
        self.folder = private_folder(Path(folder))
        self.identity = Identity.open(self.folder, name)
        self.peers = Peers.open(self.folder / "peers")
        self._address = Address.parse(address) if isinstance(address, str) else address
        self._store = Store(self.folder / "models")
        self.models = LocalModels(models or {}, self._store, threads)
        self.sensors, self.reading, self._read_at = sensors or Sensors(), Reading(), -HEALTH
        self.connection: Connection | None = None
        self.trouble = ""  # why there is no link
        self._backoff = Backoff()
        self._linked, self._unhappy = asyncio.Event(), asyncio.Event()
        self._remote = Remote(self._unhappy.set)
        self._texts = Texts(self._connected, memory, threads)
        self._installer = Installer(
            Updater(self.folder / "updates", boot_id()), self._install, lambda: strain(self._sensed()), window
        )  # fmt: skip
        self._offered: asyncio.Queue[bytes] = asyncio.Queue(1)
        self._wanted: asyncio.Queue[tuple[str, ...]] = asyncio.Queue(1)
        self._installing = asyncio.Lock()
        self._hints: list[Address] = []
        self._apps = AppServer(app_socket or self.folder / "agent.sock", self)
        self._task: asyncio.Task | None = None
        # What an edge may ask of this device; another module may add to it
        self.jobs: dict[type, Callable[[Call], Awaitable[None]]] = {
            messages.Renegotiate: self._renegotiate, messages.Offer: self._offer, messages.ListModels: self._list
        }  # fmt: skip

    # Life

    async def start(self) -> "Agent":
        """Ready for apps when it returns; the link comes when it can."""
        try:
            await self._apps.start()
        except BaseException:
            await self._installer.stop()
            raise
        self._task = asyncio.create_task(self._run())
        return self

    async def stop(self, drain: float = 3.0) -> None:
        """Takes nothing new, gives what is under way `drain` seconds, and leaves no task. A trial is not harmed."""
        await self._apps.stop()
        if self.connection is not None:
            await self.connection.drain(drain, "The device is shutting down.")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._texts.close()
        await asyncio.to_thread(self.models.close)
        await self._installer.stop()

    async def closed(self) -> None:
        """Waits until the agent stops, and raises what stopped it."""
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()

    async def __aenter__(self) -> "Agent":
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._installer.settle())
            group.create_task(self._keep_link())

    # What apps ask for

    async def infer(self, tensors: Mapping[str, np.ndarray], deadline: float = 1.0, model: str = "") -> Answer:
        """The edge's answer if it can come early enough that one of our own still fits `deadline`; else our own."""
        began = time.monotonic()
        local = self.models.find(model)
        until = began + deadline
        failure: ShoalError = self._no_link()
        if self.connection is not None:
            latest = until - self._remote.spare(local, deadline)
            try:
                async with asyncio.timeout(max(0.0, latest - began)):
                    sent: Mapping[str, np.ndarray] | bytes = tensors
                    mode = self._remote.mode()
                    if local is not None and "head" in local.roles:
                        sent = await asyncio.to_thread(local.prepare, tensors, mode)
                    left = latest - time.monotonic()
                    reply = await self._remote.ask(self.connection, sent, left, local, mode)
                return Answer(reply.outputs, "edge", time.monotonic() - began)
            except TimeoutError:
                failure = LinkError("The edge did not answer in time.", f"{deadline:g} s were given.", "Allow more.")
                self._remote.late()
            except ShoalError as error:
                failure = error
        if local is None or not local.answers:
            raise failure
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                outputs = await asyncio.to_thread(local.answer, tensors)
        except TimeoutError:
            why = f"{failure.what} This device is too slow."
            raise BusyError("There is no answer in time.", why, "Allow more.") from None
        except (BackendError, BundleError) as error:
            await self._blame(local, error)
            raise
        return Answer(outputs, "local", time.monotonic() - began, failure.why)

    async def ask(self, message: bytes, mode: int, deadline: float, model: str = "") -> Reply:
        """The edge's answer to a latent of `model` that the codec of `mode` wrote.

        Raises LinkError where there is no link and where the edge makes nothing of it, BusyError where it does not
        answer within `deadline` seconds or is not asked, UsageError where this device has no such model.
        """
        local = self.models.find(model)
        if local is None:
            why = f"It has {', '.join(sorted(self.models.open)) or 'none'}."
            raise UsageError(f"This device has no model {model!r:.80}.", why, "Start its agent with --model.")
        if self.connection is None:
            raise self._no_link()
        until = time.monotonic() + deadline
        try:
            async with asyncio.timeout(deadline):
                return await self._remote.ask(self.connection, message, deadline, local, mode, patient=False)
        except (TimeoutError, LinkError):  # a call of its own that ends with the deadline is late, not lost
            if time.monotonic() < until - 0.005:
                raise
            raise late(deadline) from None

    def modes(self) -> tuple[int, ...]:
        """Those that are agreed with the edge now."""
        return self._remote.agreement.modes if self._remote.agreement is not None else ()

    def _no_link(self) -> LinkError:
        return LinkError("There is no link to the edge.", self.trouble or "It comes.", "Try again.")

    async def generate(self, text: str, model: str = "", **options: Any) -> AsyncGenerator[Piece, None]:
        """The answer to `text`, piece by piece; options as of App.generate."""
        local = self.models.find(model, text=True)
        try:
            async with contextlib.aclosing(self._texts.generate(local, model, text, **options)) as pieces:
                async for piece in pieces:
                    yield piece
        except (BackendError, BundleError) as error:
            await self._blame(local, error)
            raise

    async def _blame(self, local: Local | None, error: ShoalError) -> None:
        """A model of ours failed: one of a release on trial is rolled back with it."""
        if local is not None and self._installer.updater.models.get(local.name) == local.path:
            await self._installer.fail(error)

    def status(self) -> dict[str, Any]:
        """Everything that a person may want to see, as JSON."""
        connection, updater, agreed = self.connection, self._installer.updater, self._remote.agreement
        trial = updater.state.trial
        return {
            "name": self.identity.name, "id": self.identity.id, "trouble": self.trouble,
            "edge": connection.peer.name if connection and connection.peer else "",
            "link": connection.transport.name if connection else "", "rtt": connection.rtt if connection else None,
            "agreement": {"tail": agreed.tail, "modes": list(agreed.modes), "why": agreed.why} if agreed else None,
            "health": vars(self._sensed()), "strain": strain(self.reading),
            "models": [
                {"name": name, "digest": one.model.digest, "role": one.model.role, "bytes": one.model.length}
                for name, one in sorted(self.models.open.items())
            ],
            "updates": {"signer": updater.trusted.pinned if updater.trusted else "",
                        "current until": updater.trusted.expires() if updater.trusted else None,
                        "trial": dict(trial.models) if trial else None, "doing": self._installer.doing,
                        "refused": [why for _, why in updater.state.refused], "note": updater.note},
        }  # fmt: skip

    async def update(self, folder: Path) -> str:
        """Takes a release from a folder, as from an edge; returns what came of it. Raises ShoalError."""
        return await self._installer.look(FromFolder(folder))

    def _sensed(self) -> Reading:
        """How the device is, as of the last few seconds."""
        if time.monotonic() - self._read_at > HEALTH:
            self.reading, self._read_at = self.sensors.read(), time.monotonic()
        return self.reading

    async def _install(self, updated: Mapping[str, Path]) -> None:
        """From now on these models of updates run. Raises ShoalError for one on trial that does not work here."""
        async with self._installing:
            on_trial = self._installer.updater.state.trial is not None
            gone = await asyncio.to_thread(self.models.change, updated, on_trial)
            await asyncio.to_thread(self._texts.forget, {local.path for local in gone})
            for local in gone:
                await asyncio.to_thread(local.close)
        self._unhappy.set()  # the edge should know

    # The link

    async def _connected(self) -> Connection:
        """The link, waited for."""
        while self.connection is None or self.connection.reason is not None:
            self._linked.clear()
            await self._linked.wait()
        return self.connection

    async def _keep_link(self) -> None:
        while True:
            try:
                address = self._where()
                connection = await endpoint.dial(
                    address, self.identity, self.peers, _LONG if self._backoff.failures % 4 == 3 else _SHORT,
                    hello=messages.Hello(
                        messages.VERSION, "device", self.identity.name, features=tuple(sorted(FEATURES)),
                        clock_ms=time.time_ns() // 1_000_000,
                    ),
                )  # fmt: skip
            except TrustError as error:
                self._tell(error)
                await self._until_trusted(_UNTRUSTED)
            except ShoalError as error:
                self._tell(error)
                await asyncio.sleep(self._backoff.failed())
                if self._backoff.failures % 16 == 8:
                    self._hints = await self._search()
            else:
                began = time.monotonic()
                await self._session(connection, address)
                self._backoff.lasted(time.monotonic() - began)
                await asyncio.sleep(self._backoff.failed())

    async def _until_trusted(self, seconds: float) -> None:
        """Waits, unless a pairing changes whom this device trusts."""
        with contextlib.suppress(ShoalError):
            known = self.peers.certificates()
            for _ in range(round(seconds)):
                await asyncio.sleep(1.0)
                if self.peers.certificates() != known:
                    return

    async def _search(self) -> list[Address]:
        """Where on the local network an edge that we trust says it is: a hint, believed once it has shown its key."""
        with contextlib.suppress(ShoalError):
            ids = [peer.id for peer in self.peers.list() if peer.role == "edge"]
            found = await discovery.search(2.0)
            named = [one for one in found if one.id and any(id.startswith(one.id) for id in ids)]
            return [address for one in named for address in one.addresses][:8]
        return []

    def _where(self) -> Address:
        """The edge's address: a hint once, else the given one, else where the two met last. Raises TrustError."""
        if self._hints:
            return self._hints.pop(0)
        if self._address is not None:
            return self._address
        edges = [peer for peer in self.peers.list() if peer.role == "edge"]
        known = [peer.address for peer in sorted(edges, key=lambda peer: peer.seen_at, reverse=True) if peer.address]
        if not known:
            raise TrustError("There is no edge to go to.", "None is paired.", "Pair: shoal pair ADDRESS CODE.")
        return Address.parse(known[0])

    def _tell(self, error: ShoalError) -> None:
        if self.trouble != error.why:
            _log.warning("no link: %s %s", error.what, error.why)
        self.trouble = error.why

    async def _session(self, connection: Connection, address: Address) -> None:
        """Everything that is done over one connection, until it ends."""
        assert connection.peer is not None
        _log.info("linked to %s by %s", connection.peer.name, connection.transport.name)
        self.connection, self.trouble = connection, ""
        with contextlib.suppress(ShoalError):
            await asyncio.to_thread(self.peers.saw, connection.peer, str(address))
        connection.serve(self._serve)
        self._linked.set()
        tasks = [
            asyncio.create_task(work(connection))
            for work in (self._negotiate, self._bring, self._report, self._update, self._watch)
        ]  # fmt: skip
        try:
            self._tell(await connection.closed())  # before the link is gone: who sees none reads why
        finally:
            self.connection = None
            self._remote.forget()
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    _log.error("a task of the link failed", exc_info=ended)
            await connection.close()

    async def _negotiate(self, connection: Connection) -> None:
        """States what this device has, as often as that or the agreement needs it."""
        while True:
            self._unhappy.clear()
            self.reading, self._read_at = await asyncio.to_thread(self.sensors.read), time.monotonic()
            health = self.reading.message(connection.transport.rate)
            state = messages.State(self.identity.id, self.models.stated, health, tuple(sorted(FEATURES)))
            wait = _AGAIN
            try:
                agreed = await connection.ask(state, timeout=30.0)
                if isinstance(agreed, messages.Agreement):
                    self._remote.agree(agreed)
                    wait = max(1.0, min(float(agreed.valid_s), 3600.0))
                    with contextlib.suppress(asyncio.QueueFull):
                        self._wanted.put_nowait(agreed.fetch)
            except ShoalError as error:
                _log.warning("nothing was agreed: %s %s", error.what, error.why)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._unhappy.wait()
                await asyncio.sleep(0.2)  # reasons come together

    async def _bring(self, connection: Connection) -> None:
        """Fetches what the edge wants this device to have. Where a signer is trusted, only he brings models."""
        while True:
            wanted = await self._wanted.get()
            missing = [digest for digest in wanted[:4] if self._store.get(digest) is None]
            if not missing or self._installer.updater.trusted is not None or not self._may_update(connection.peer):
                continue
            try:
                listed = await connection.ask(messages.ListModels(), timeout=30.0)
                names = {model.digest: model.name for model in getattr(listed, "models", ())}
                for digest in missing:
                    await fetch(connection, self._store, digest, names.get(digest, ""))
                await self._install(self._installer.updater.models)
            except ShoalError as error:
                _log.warning("a model was not fetched: %s %s", error.what, error.why)

    async def _report(self, connection: Connection) -> None:
        while True:
            await asyncio.sleep(HEALTH)
            self.reading, self._read_at = await asyncio.to_thread(self.sensors.read), time.monotonic()
            with contextlib.suppress(ShoalError):
                await connection.ask(self.reading.message(connection.transport.rate), timeout=HEALTH)

    async def _update(self, connection: Connection) -> None:
        """Looks for updates when the link is new, when the edge offers one, and every hour."""
        offered = b""
        while True:
            wait = UPDATES
            try:
                if self._may_update(connection.peer):
                    said = await self._installer.look(FromEdge(connection, offered))
                    if said.startswith("waits") or self._installer.updater.state.trial:
                        wait = 10 * _AGAIN
            except ShoalError as error:
                _log.warning("no update: %s %s", error.what, error.why)
                wait = 10 * _AGAIN
            offered = b""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    offered = await self._offered.get()

    async def _watch(self, connection: Connection) -> None:
        """Ends the link to an edge that is no longer trusted here, and notes changed rights."""
        assert connection.peer is not None
        while True:
            await asyncio.sleep(_LOOK)
            try:
                peer = self.peers.get(connection.peer.fingerprint)
            except ShoalError:  # damaged: no longer trusted
                peer = None
            if peer is None:
                return await connection.close(error=TrustError("The edge is not trusted.", "It was revoked.", "Pair."))
            connection.peer = peer

    def _may_update(self, peer: Peer | None) -> bool:
        return peer is not None and peer.may("update")

    # What an edge asks of a device

    async def _serve(self, call: Call) -> None:
        job = self.jobs.get(type(call.message))
        if job is None:
            kind = type(call.message).__name__
            raise UsageError(f"A device does not answer {kind}.", "It has no such job.", "Upgrade shoal there.")
        await job(call)

    async def _renegotiate(self, call: Call) -> None:
        self._unhappy.set()

    async def _offer(self, call: Call) -> None:
        if not self._may_update(call.peer):
            raise TrustError("This device takes no updates from you.", "It was not allowed.", "Run shoal peers allow.")
        with contextlib.suppress(asyncio.QueueFull):
            self._offered.put_nowait(call.message.manifest)

    async def _list(self, call: Call) -> None:
        await call.answer(messages.Models(self.models.stated))
