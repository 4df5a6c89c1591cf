"""Brings signed releases onto this device, from a paired edge or a folder: the work around an Updater.

A release is fetched in the background of everything else, tried on zeros before an app sees it, watched for a window,
and confirmed or rolled back. Nothing is fetched while the device is strained. File operations run in a thread, one at
a time. What a release may do is update.py's to say; this module only carries bytes and takes time.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shoal.runtime.errors import LinkError, ShoalError, StorageError, TrustError

from . import messages
from .connection import Connection
from .manifest import Target
from .protocol import Priority
from .store import Store
from .update import Updater

_BUFFER = 256 << 10  # bytes of a model that are handed to the disk at once
_MANIFEST = 64 << 10
_STILL = 60.0  # seconds without progress after which a fetch is given up, to be resumed

_log = logging.getLogger("shoal.agent")


class Source(Protocol):
    """Where a release comes from."""

    async def manifest(self) -> bytes:
        """What is current there, b"" where nothing is."""

    def pieces(self, target: Target, offset: int) -> AsyncGenerator[bytes, None]:
        """The model's bytes from `offset` on. Raises LinkError, StorageError."""


class FromEdge:
    """A paired edge; `offered` is the manifest where it came unasked."""

    def __init__(self, connection: Connection, offered: bytes = b""):
        self._connection, self._offered = connection, offered

    async def manifest(self) -> bytes:
        # Version 0: who was misled into a higher one must still hear of the root that corrects it
        return self._offered or (await self._connection.ask(messages.Updates(0), timeout=30.0)).data

    async def pieces(self, target: Target, offset: int) -> AsyncGenerator[bytes, None]:
        asked = messages.Fetch(target.digest, offset)
        async with self._connection.request(asked, priority=Priority.BULK, timeout=_STILL) as call:
            answer = await call.reply()
            said = tuple(getattr(answer, name, None) for name in ("length", "digest", "offset"))
            if said != (target.length, target.digest, offset):
                raise LinkError(f"The edge has another {target.name}.", f"It offers {said}.", "Publish it again.")
            async for piece in call:
                yield piece


class FromFolder:
    """What `shoal update publish` wrote, on a memory stick for example."""

    def __init__(self, folder: Path):
        self._folder = Path(folder)

    async def manifest(self) -> bytes:
        return await asyncio.to_thread(self._read, "manifest.json", 0, _MANIFEST)

    async def pieces(self, target: Target, offset: int) -> AsyncGenerator[bytes, None]:
        while piece := await asyncio.to_thread(self._read, f"models/{target.digest}.shoal", offset, _BUFFER):
            yield piece[: target.length - offset]
            offset += len(piece)
            if offset >= target.length:
                return

    def _read(self, name: str, offset: int, most: int) -> bytes:
        path = self._folder / name
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(most)
        except OSError as error:
            why = f"{error.strerror}."
            raise StorageError(f"{path} cannot be read.", why, "Publish into the folder again.") from None


class Installer:
    """`changed(models)` is awaited whenever other files are to run (name -> path); it raises ShoalError where one of
    them does not work. `strained()` says what speaks against work now. `window`: seconds of health."""

    def __init__(
        self,
        updater: Updater,
        changed: Callable[[Mapping[str, Path]], Awaitable[None]],
        strained: Callable[[], str] = lambda: "",
        window: float = 60.0,
    ):
        self.updater, self.window = updater, window
        self.doing = ""  # for a person
        self._changed, self._strained = changed, strained
        self._disk, self._looking = asyncio.Lock(), asyncio.Lock()
        self._switched = asyncio.Event()

    async def look(self, source: Source) -> str:
        """Hears what is current at `source`, fetches what is new and puts it on trial. Returns what came of it.

        Raises TrustError where it is refused, LinkError where the link broke: the next look goes on from there.
        """
        async with self._looking:
            try:
                return await self._look(source)
            finally:
                self.doing = ""

    async def _look(self, source: Source) -> str:
        if self.updater.trusted is None:
            return "no signer is trusted"
        if data := await source.manifest():
            await self._do(self.updater.offer, data, time.time())
        if self.updater.state.trial:
            return "a release is on trial"
        if not self.updater.wanted() and not self.updater.ready:
            return "nothing is new"
        if strain := self._strained():
            return f"waits: {strain}"
        for target in self.updater.wanted():
            await self._fetch(source, target)
        if not self.updater.ready:
            return "nothing is new"
        self.doing = "tries the new release"
        await self._do(self.updater.switch)
        try:
            await self._changed(self.updater.models)
        except ShoalError as error:
            await self.fail(error)
            return f"failed: {error.what} {error.why}"
        self._switched.set()
        return "a release is on trial"

    async def settle(self) -> None:
        """Runs what the updater says, and ends every trial after its window. To be run as a task."""
        try:
            await self._changed(self.updater.models)
        except ShoalError as error:
            await self.fail(error)
        while True:
            self._switched.clear()
            if trial := self.updater.state.trial:
                await asyncio.sleep(self.window)
                if self.updater.state.trial is trial:
                    await self._do(self.updater.confirm)
                    _log.info("the release on trial is kept")
            else:
                await self._switched.wait()

    async def fail(self, error: ShoalError) -> None:
        """A model of the trial does not work: back to the release before. Does nothing when none is on trial."""
        if self.updater.state.trial is None:
            return
        _log.warning("the release on trial is rolled back: %s %s", error.what, error.why)
        await self._do(self.updater.fail, f"{error.what} {error.why}")
        await self._changed(self.updater.models)

    async def stop(self) -> None:
        """The next start is expected, and no strike against a trial."""
        with contextlib.suppress(StorageError):
            await self._do(self.updater.pause)
        self.updater.close()

    async def _fetch(self, source: Source, target: Target) -> None:
        """Stages what is missing of `target`, from where it was cut; what came before a failure is kept."""
        have = self.updater.staged(target)
        self.doing = f"fetches {target.name}"
        _log.info("fetching %s from byte %d of %d", target.name, have, target.length)
        buffer = bytearray()
        if have < target.length:
            try:
                async with contextlib.aclosing(source.pieces(target, have)) as pieces:
                    async for piece in pieces:
                        buffer += piece
                        if have + len(buffer) > target.length:
                            why = f"More than {target.length:,} bytes come."
                            raise TrustError(f"The update {target.name} is refused.", why, "Publish it again.")
                        if len(buffer) >= _BUFFER:
                            data, buffer = bytes(buffer), bytearray()
                            have = await self._do(self.updater.stage, target, have, data)
            finally:
                if buffer and have + len(buffer) <= target.length:
                    have = await self._do(self.updater.stage, target, have, bytes(buffer))
        if have < target.length:
            raise LinkError(f"{target.name} came short.", f"{have} of {target.length} bytes.", "It is tried again.")
        await self._do(self.updater.finish, target)

    async def _do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """File operations in a thread. Once begun they end, whoever is cancelled meanwhile."""
        async with self._disk:
            running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait([running])
                raise


async def fetch(connection: Connection, store: Store, digest: str, name: str = "") -> None:
    """Brings the bundle of that digest from the edge into `store`, as `name`, from where it was cut."""
    partial = store.path(digest).with_suffix(".partial")
    offset = partial.stat().st_size if partial.exists() else 0
    async with connection.request(messages.Fetch(digest, offset), priority=Priority.BULK, timeout=_STILL) as call:
        answer = await call.reply()
        if not isinstance(answer, messages.Fetched) or answer.digest != digest:
            raise LinkError("The edge sends another model.", f"{digest:.12} was asked for.", "It is tried again.")
        with await asyncio.to_thread(store.partial, digest, answer.length, name) as file:
            if answer.offset != file.offset:
                raise LinkError("The edge sends another piece.", f"It begins at {answer.offset}.", "It is tried again.")
            async for piece in call:
                await asyncio.to_thread(file.write, piece)
            await asyncio.to_thread(file.finish)
