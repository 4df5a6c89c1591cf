"""How an edge answers each message of a paired device.

It promises that a request needs the right that its kind asks for, that nothing of a body is read before there is room
for it, and that a request which cannot be answered in time or now is refused at once, so that the device can compute
by itself. It knows nothing about sockets, pairing or daemons. One method a message; a new one is a line in `_KINDS`.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BusyError, TrustError, UsageError

from . import messages
from .connection import Call
from .devices import Device
from .figures import Timings
from .negotiate import Offer, Renegotiation, Terms, negotiate
from .store import Store
from .tails import Answer, LateError, Tail, Tails

if TYPE_CHECKING:
    from .language import Language

_PIECE = 64 << 10  # bytes read from a model and handed to the line at a time
_MANIFEST = 48 << 10  # bytes of a manifest that one message carries

_log = logging.getLogger("shoal.edge")


class Answers:
    """The edge's side of the conversation. `models` are what the store had when `look` was last called."""

    def __init__(
        self, name: str, store: Store, tails: Tails, terms: Terms, folder: Path, language_memory: int | None = None
    ):
        """`folder` is where the published manifest lies, as manifest.json; `name` is said with every answer."""
        self.name, self.store, self.tails, self.terms = name, store, tails, terms
        self.manifest_path = folder / "manifest.json"
        self.models: dict[str, messages.Model] = {}
        self.timings = Timings()  # of all devices
        self._language: Language | None = None
        self._language_memory = language_memory

    async def look(self) -> None:
        """Reads the store again: another process may have added a model."""
        entries = await asyncio.to_thread(self.store.list)
        self.models = {entry.digest: entry.model() for entry in entries}

    async def answer(self, device: Device, call: Call) -> None:
        """Answers `call` of `device`, or raises the ShoalError that the device is to see."""
        right, method = _KINDS.get(type(call.message), (None, None))
        if method is None:
            kind = type(call.message).__name__
            raise UsageError(f"{kind} is no request.", "An edge does not answer it.", "Upgrade shoal on both sides.")
        if right and not device.peer.may(right):
            why = f"It may {', '.join(sorted(device.peer.rights)) or 'do nothing'}; this needs {right!r}."
            raise TrustError("The edge does not allow it.", why, "On the edge: shoal peers allow.")
        await method(self, device, call)

    def offer(self) -> Offer:
        """What the edge has for anybody now."""
        now = asyncio.get_running_loop().time()
        models = tuple(self.models.values())
        return Offer(models, self.tails.load(now), self.tails.wait, self.tails.seconds())

    def reconsider(self, device: Device) -> str:
        """Why `device` should state itself again, "" while what is agreed stands."""
        if device.state is None or device.agreement is None or device.watch is None:
            return ""
        candidate = negotiate(device.state, self.offer(), device.link, self.terms, device.agreement)
        gone = bool(device.agreement.tail) and device.agreement.tail not in self.models
        return device.watch.observe(candidate, asyncio.get_running_loop().time(), gone)

    def manifest(self) -> tuple[int, bytes]:
        """(version, bytes) of the published manifest; (0, b"") where there is none."""
        from .manifest import Manifest

        try:
            if self.manifest_path.stat().st_size > _MANIFEST:
                raise UsageError(
                    "The manifest is too long.", f"It has over {_MANIFEST} bytes.", "Publish fewer models."
                )
            data = self.manifest_path.read_bytes()
            return Manifest.decode(data).timestamp.content.version, data
        except FileNotFoundError:
            return 0, b""
        except OSError as error:
            raise UsageError("The manifest cannot be read.", f"{error.strerror}.", "Mend the edge's folder.") from None

    # One method a message

    async def _state(self, device: Device, call: Call) -> None:
        said: messages.State = call.message
        await self.look()
        device.state, device.health = said, said.health or device.health
        agreed = negotiate(said, self.offer(), device.link, self.terms, device.agreement)
        device.agreement = agreed
        device.watch = Renegotiation(agreed, asyncio.get_running_loop().time(), self.terms)
        await call.answer(agreed)

    async def _health(self, device: Device, call: Call) -> None:
        device.health = call.message

    async def _infer(self, device: Device, call: Call) -> None:
        asked, began = call.message, asyncio.get_running_loop().time()
        if asked.tables:
            self._same_tables(asked)
        with self._counted(device), self.tails.admit(device.peer.fingerprint, _due(asked, began)) as slot:
            tail = await slot.open(asked.tail)
            layout = tail.layout(asked.names, asked.dtypes, [shape.dims for shape in asked.shapes])
            slot.reserve(layout.nbytes)
            body = await self._body(device, call, layout.nbytes, began)
            await self._inferred(call, tail, await slot.run(layout, layout.read(body)))

    async def _infer_coded(self, device: Device, call: Call) -> None:
        loop = asyncio.get_running_loop()
        asked, began = call.message, loop.time()
        self._same_tables(asked)
        with self._counted(device), self.tails.admit(device.peer.fingerprint, _due(asked, began)) as slot:
            tail, most = await slot.open(asked.tail), self.tails.waiting.max_batch
            codec = tail.codec(asked.mode)
            if not 0 < asked.length <= codec.longest(most):
                why = f"It has {asked.length:,} bytes; {most} latents take {codec.longest(most):,} at most."
                raise UsageError("The message does not fit the tail.", why, "Send fewer images at once.")
            slot.reserve(asked.length)
            body = await self._body(device, call, asked.length, began)
            layout = tail.coded(codec, codec.count(body, most))
            slot.reserve(layout.nbytes)
            came = loop.time()
            latents = await asyncio.to_thread(codec.decode, body, layout.rows)
            decoded = loop.time() - came
            found = await slot.run(layout, {layout.arrays[0][0]: latents})
            await self._inferred(call, tail, replace(found, computed=found.computed + decoded))

    def _same_tables(self, asked: messages.Infer | messages.InferCoded) -> None:
        """Raises UsageError where a device codes with other tables than the tail's."""
        known = self.models.get(asked.tail)
        if known is not None and asked.tables != known.tables:
            why = "The latents were coded with other tables than its own."
            raise UsageError("The tail cannot read these latents.", why, "State what the device has, and agree anew.")

    async def _body(self, device: Device, call: Call, length: int, began: float) -> bytes:
        body = await call.read(length)
        device.transferred(len(body), asyncio.get_running_loop().time() - began)
        device.mode = call.message.mode
        return body

    async def _inferred(self, call: Call, tail: Tail, found: Answer) -> None:
        said = messages.Inferred(
            tuple(found.outputs), tuple(array.dtype.name for array in found.outputs.values()),
            tuple(messages.Shape(array.shape) for array in found.outputs.values()),
            queue_ms=1000 * found.queued, compute_ms=1000 * found.computed, batch=found.batch,
            where=f"{self.name} by {tail.where}" if tail.where else self.name,
        )  # fmt: skip
        await call.answer(said, b"".join(_raw(array) for array in found.outputs.values()))

    async def _fetch(self, device: Device, call: Call) -> None:
        asked: messages.Fetch = call.message
        if not (device.peer.may("infer") or device.peer.may("update")):
            raise TrustError("The edge does not allow it.", "It may fetch no model.", "On the edge: shoal peers allow.")
        bundle = await asyncio.to_thread(self.open, asked.digest)
        with bundle:
            length = os.fstat(bundle.fileno()).st_size
            if not 0 <= asked.offset <= length:
                why = f"It has {length:,} bytes, none at {asked.offset:,}."
                raise UsageError("The model cannot be fetched from there.", why, "Begin at 0.")
            await call.answer(messages.Fetched(length, bundle.digest, asked.offset))
            at = asked.offset
            while at < length:
                piece = await asyncio.to_thread(os.pread, bundle.fileno(), min(_PIECE, length - at), at)
                if not piece:
                    raise UsageError("The model cannot be read on.", f"It ends at byte {at:,}.", "Fetch it again.")
                await call.write(piece)
                at += len(piece)

    async def _list(self, device: Device, call: Call) -> None:
        await self.look()
        await call.answer(messages.Models(tuple(self.models.values())))

    async def _updates(self, device: Device, call: Call) -> None:
        version, data = await asyncio.to_thread(self.manifest)
        await call.answer(messages.Manifest(data if version > call.message.version else b""))

    async def _continue_language(self, device: Device, call: Any) -> None:
        with self._counted(device, stream=True):
            await self.language().serve(call, device.peer.fingerprint)

    @contextlib.contextmanager
    def _counted(self, device: Device, stream: bool = False) -> Iterator[None]:
        """Notes in the figures how a request ended and how long it took. Who leaves a `stream` has what it wanted;
        what else is cancelled has failed. A stream's time is no latency."""
        loop, counter = asyncio.get_running_loop(), device.requests
        began = loop.time()
        counter.running += 1
        try:
            yield
        except LateError:
            counter.late += 1
            raise
        except BusyError:
            counter.busy += 1
            raise
        except BaseException as error:
            if stream and isinstance(error, asyncio.CancelledError):
                counter.done += 1
            else:
                counter.failed += 1
            raise
        else:
            counter.done += 1
            if not stream:
                for timings in (device.timings, self.timings):
                    timings.add(loop.time() - began, loop.time())
        finally:
            counter.running -= 1

    def open(self, digest: str) -> Bundle:
        """The bundle of that digest. Raises UsageError without saying where the edge keeps it."""
        if self.store.get(digest) is None:
            raise UsageError(f"The edge has no model {digest[:12]!r}.", "It was removed, or never added.", "List them.")
        return self.store.open(digest)

    def language(self) -> "Language":
        """What continues language models, made when it is first asked for: it needs tokenizers, an edge need not."""
        if self._language is None:
            from .language import Language

            self._language = Language(self.store, memory=self._language_memory, name=self.name)
        return self._language

    def language_models(self) -> list[dict[str, Any]]:
        """The open ones, as Language.snapshot says."""
        return self._language.snapshot() if self._language is not None else []

    def forget(self, fingerprint: str) -> None:
        """Drops what is kept for a device that is trusted no more."""
        if self._language is not None:
            self._language.forget(fingerprint)

    async def close(self, timeout: float) -> None:
        """Lets what runs end within `timeout` seconds, and frees all."""
        await self.tails.close(timeout)
        if self._language is not None:
            await self._language.close()


_Method = Callable[[Answers, Device, Call], Awaitable[None]]
_KINDS: dict[type, tuple[str, _Method]] = {
    messages.State: ("", Answers._state),
    messages.Health: ("", Answers._health),
    messages.ListModels: ("", Answers._list),
    messages.Infer: ("infer", Answers._infer),
    messages.InferCoded: ("infer", Answers._infer_coded),
    messages.Fetch: ("", Answers._fetch),
    messages.Updates: ("update", Answers._updates),
    messages.Generate: ("infer", Answers._continue_language),
    messages.Continue: ("infer", Answers._continue_language),
}


def _due(asked: messages.Infer | messages.InferCoded, began: float) -> float | None:
    """Until when an answer is of use."""
    return began + asked.deadline_ms / 1000 if asked.deadline_ms > 0 else None


def _raw(array: np.ndarray) -> bytes:
    """Row-major, little-endian."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
