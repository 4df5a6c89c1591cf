"""An edge's tails: latents of several devices in one run, each device gets its own rows.

Requests for one tail whose rows have one shape are joined on axis 0, never padded, and run in a thread of their own,
so that the event loop stays free. A request waits at most `max_wait`, and only while a device that has lately asked
for the same may still join; alone it does not wait. What is too much is refused with BusyError at once, and what is
late is refused and not computed: a device then answers by itself. It knows nothing about links and messages.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from shoal.runtime import measure
from shoal.runtime.bundle import Bundle, Graph
from shoal.runtime.errors import BackendError, BudgetError, BundleError, BusyError, RemoteError, ShoalError, UsageError
from shoal.runtime.session import Place, Value, open_graph
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.link import coder, coders

from .batching import Job, Waiting

MAX_BODY = 64 << 20  # bytes of one request's tensors
MAX_WAITING = 256 << 20  # bytes of all that wait
_SMOOTH = 5.0  # seconds over which the load is averaged

_log = logging.getLogger("shoal.edge")


class Engine(Protocol):
    """What computes: runtime.session.Session here, oip.RemoteSession elsewhere."""

    inputs: dict[str, Value]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
    def close(self) -> None: ...


class LateError(BusyError):
    """The deadline of a request has passed."""


@dataclass(frozen=True)
class Answer:
    """A request's rows of every output; seconds it waited and the run took, and how many rows that had."""

    outputs: dict[str, np.ndarray]
    queued: float
    computed: float
    batch: int


class Tail:
    """An open tail. `resident` are bytes in memory, `seconds` a smoothed run; `alone`: its rows cannot be joined.
    `where` is "" for one that runs here."""

    def __init__(self, bundle: Bundle, threads: int = 0, remote: Engine | None = None, where: str = ""):
        """Opens the graph of role "tail", or runs it by `remote`. Takes the bundle over. Raises BundleError,
        BackendError."""
        self.bundle, self.digest = bundle, bundle.digest
        graph = next((graph for graph in bundle.graphs if graph.role == "tail"), None)
        if graph is None:
            raise BundleError(f"{bundle.path} is no tail.", "It has no graph of that role.", "Pack it as a tail.")
        self.where, self.resident = where, 0
        self.session: Engine = remote or self._open(graph, threads)
        if not self.session.inputs or any(
            not value.dims or isinstance(value.dims[0], int) for value in self.session.inputs.values()
        ):
            self.session.close()
            raise BundleError(f"{bundle.path} is no tail.", "The first axis of an input is no batch.", "Pack it anew.")
        try:
            self._codecs = coders(bundle, dict(self.session.inputs), "tail")
        except BundleError as error:  # tensors can be sent all the same
            _log.warning("latents of %s must come without a codec: %s", bundle.path, error.why)
            self._codecs = {}
        self.seconds, self.alone = 0.0, False
        self.served = self.batches = self.users = 0
        self.used = 0.0

    def _open(self, graph: Graph, threads: int) -> Engine:
        before, bundle = measure.anonymous_bytes() or 0, self.bundle
        weights = [section for section in bundle.sections if section.kind == "weights"]
        places = {s.name: Place(str(bundle.path), s.offset, s.length, bundle.fileno()) for s in weights}
        session = open_graph(bundle.bytes(bundle.section("graph", graph.section)), places, threads=threads)
        self.resident = sum(s.length for s in weights) + max(0, (measure.anonymous_bytes() or 0) - before)
        return session

    def layout(self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> "Layout":
        """What such tensors need, checked against the graph before any of it is read. Raises UsageError."""
        inputs = self.session.inputs
        if sorted(names) != sorted(inputs) or not len(names) == len(dtypes) == len(shapes):
            raise _misfit(f"It takes {', '.join(inputs)}, not {', '.join(names)[:200] or 'nothing'}.")
        rows = shapes[0][0] if shapes and shapes[0] else 0
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            value = inputs[name]
            fits = len(shape) == len(value.dims) and all(
                0 < have < 1 << 31 and (not isinstance(want, int) or want == have)
                for want, have in zip(value.dims, shape, strict=True)
            )
            if dtype != value.dtype.name or not fits or shape[0] != rows:
                said = f"{dtype:.20} {list(shape)[:8]}"
                raise _misfit(f"{name!r} is {said}; it takes {value.dtype.name} {list(value.dims)} of one batch.")
        arrays = tuple(
            (name, inputs[name].dtype, tuple(shape)) for name, shape in zip(names, shapes, strict=True)
        )  # fmt: skip
        layout = Layout(rows, arrays)
        if layout.nbytes > MAX_BODY:
            raise _misfit(f"It has {layout.nbytes:,} bytes; at most {MAX_BODY:,} are taken.")
        return layout

    def codec(self, mode: int) -> Codec:
        """What reads the messages of that mode. Raises LinkError."""
        return coder(self._codecs, mode)

    def coded(self, codec: Codec, rows: int) -> "Layout":
        """What so many latents of a codec take, once they are decoded. Raises UsageError."""
        return self.layout(tuple(self.session.inputs), ("float32",), ((rows, *codec.shape),))

    def run(self, jobs: Sequence[Job]) -> list[dict[str, np.ndarray] | ShoalError]:
        """Each job's own rows, or why there are none. One that fails takes no other along."""
        if len(jobs) > 1 and not self.alone:
            rows = sum(job.rows for job in jobs)
            feeds = {name: np.concatenate([job.feeds[name] for job in jobs]) for name in self.session.inputs}
            with contextlib.suppress(BackendError, RemoteError, UsageError):  # one is to blame: alone each shows
                outputs = self.session.run(feeds)
                if all(array.shape[:1] == (rows,) for array in outputs.values()):
                    found: list[dict[str, np.ndarray] | ShoalError] = []
                    start = 0
                    for job in jobs:
                        stop = start + job.rows
                        found.append({name: array[start:stop] for name, array in outputs.items()})
                        start = stop
                    return found
                self.alone = True  # an output without the batch: nobody could tell whose it is
        return [self._single(job) for job in jobs]

    def _single(self, job: Job) -> dict[str, np.ndarray] | ShoalError:
        try:
            return self.session.run(job.feeds)
        except ShoalError as error:
            return error

    def close(self) -> None:
        self.session.close()
        self.bundle.close()


@dataclass(frozen=True)
class Layout:
    """Tensors in the order of a request's body: (name, dtype, shape)."""

    rows: int
    arrays: tuple[tuple[str, np.dtype, tuple[int, ...]], ...]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.arrays)

    def read(self, body: bytes) -> dict[str, np.ndarray]:
        """The arrays, row-major and little-endian in `body`, without a copy. Raises UsageError."""
        if len(body) != self.nbytes:
            raise _misfit(f"The body has {len(body):,} bytes; its tensors take {self.nbytes:,}.")
        found, at = {}, 0
        for name, dtype, shape in self.arrays:
            array = np.frombuffer(body, dtype.newbyteorder("<"), math.prod(shape), at)
            found[name] = array.astype(dtype, copy=False).reshape(shape)
            at += array.nbytes
        return found


@dataclass
class Slot:
    """An admitted request, until its block is left."""

    tails: "Tails"
    device: str
    deadline: float | None
    nbytes: int = 0
    tail: Tail | None = None

    async def open(self, digest: str) -> Tail:
        """The tail, opened where it is not, and kept for as long as the slot is. Raises BundleError, BudgetError."""
        self.tail = await self.tails._opened(digest)
        return self.tail

    def reserve(self, nbytes: int) -> None:
        """Says how many bytes come, before they do. Raises BusyError."""
        if self.tails._bytes + nbytes > MAX_WAITING:
            raise self.tails._busy("Too much waits to be computed.")
        self.tails._bytes += nbytes
        self.nbytes += nbytes

    async def run(self, layout: Layout, feeds: Mapping[str, np.ndarray]) -> Answer:
        """Waits for its batch and returns its rows. Raises LateError, BackendError, UsageError."""
        if self.tail is None:
            raise UsageError("No tail is open.", "Slot.open was not called.", "Call it first.")
        if layout.rows > self.tails.waiting.max_batch:
            raise _misfit(f"It has {layout.rows} rows; at most {self.tails.waiting.max_batch} are taken.")
        return await self.tails._run(self, layout, feeds)


@dataclass
class Tails:
    """The tails of an edge. `open_tail` opens one by digest, in a thread; limits as the module says.

    `memory` is what tails may hold together, in bytes (mapped weights and what the engine adds); the one longest
    unused goes first. `queue` requests are admitted at a time, `inflight` of one device.
    """

    open_tail: Callable[[str], Tail]
    max_batch: int = 8
    max_wait: float = 0.003
    queue: int = 128
    inflight: int = 4
    memory: int | None = None
    waiting: Waiting = field(init=False)
    open_tails: dict[str, Tail] = field(init=False, default_factory=dict)
    wait: float = field(init=False, default=0.0)  # smoothed seconds in the queue

    def __post_init__(self):
        self.waiting = Waiting(self.max_batch, self.max_wait)
        self._opening: dict[str, asyncio.Task[Tail]] = {}
        self._admitted: dict[str, int] = {}
        self._bytes = 0
        self._busy_share, self._full, self._measured = 0.0, 0.0, 0.0
        self._wake = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None
        self._worker: asyncio.Task | None = None
        self._away: set[asyncio.Task] = set()
        self._closed = False

    @contextmanager
    def admit(self, device: str, deadline: float | None = None) -> Iterator[Slot]:
        """A place in the queue for a request of `device`, which is of use until `deadline` (the loop's time).

        Raises BusyError when the queue or the device's share of it is full, LateError when it is late already.
        """
        now = asyncio.get_running_loop().time()
        if self._closed:
            raise self._busy("The edge is shutting down.")
        if deadline is not None and deadline <= now:
            raise late()
        if self._admitted.get(device, 0) >= self.inflight:
            raise self._busy(f"This device has {self.inflight} requests on the way already.")
        if self.running >= self.queue:
            raise self._busy(f"{self.queue} requests wait already.")
        self._admitted[device] = self._admitted.get(device, 0) + 1
        slot = Slot(self, device, deadline)
        try:
            yield slot
        finally:
            self._bytes -= slot.nbytes
            if slot.tail is not None:
                slot.tail.users -= 1
            self._admitted[device] -= 1
            if not self._admitted[device]:
                del self._admitted[device]

    @property
    def running(self) -> int:
        """Requests that are admitted."""
        return sum(self._admitted.values())

    def load(self, now: float) -> float:
        """0 to 1: how much of what the edge could compute it does, or how full its queue is."""
        fade = math.exp(-max(0.0, now - self._measured) / _SMOOTH)
        return min(1.0, max(self.running / self.queue, fade * self._busy_share * self._full))

    def seconds(self) -> dict[str, float]:
        """A run of each open tail, smoothed, by digest."""
        return {digest: tail.seconds for digest, tail in self.open_tails.items() if tail.batches}

    async def close(self, timeout: float = 0.0) -> None:
        """Lets what is admitted end for `timeout` seconds, takes nothing new, and frees all."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.running:
                    await asyncio.sleep(0.01)
        for task in (self._worker, *self._opening.values(), *self._away):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.shutdown)
        for tail in self.open_tails.values():
            await asyncio.to_thread(tail.close)
        self.open_tails.clear()

    async def _opened(self, digest: str) -> Tail:
        while (tail := self.open_tails.get(digest)) is None:  # again, where another tail took its place meanwhile
            task = self._opening.get(digest)
            if task is None:
                task = self._opening[digest] = asyncio.create_task(self._open(digest))
                task.add_done_callback(lambda done: self._is_open(digest, done))
            await asyncio.shield(task)  # who gives up waiting stops it for nobody else
        tail.users += 1
        tail.used = asyncio.get_running_loop().time()
        return tail

    def _is_open(self, digest: str, task: "asyncio.Task[Tail]") -> None:
        self._opening.pop(digest, None)
        if not task.cancelled():
            task.exception()  # seen, even if who asked has left

    async def _open(self, digest: str) -> Tail:
        tail = await asyncio.to_thread(self.open_tail, digest)
        try:
            await self._make_room(tail.resident)
        except BaseException:
            tail.close()
            raise
        self.open_tails[digest] = tail
        return tail

    async def _make_room(self, size: int) -> None:
        """Closes tails that nobody uses, the one longest unused first, until `size` bytes fit."""
        if self.memory is None:
            return
        if size > self.memory:
            why = f"It takes {size:,} bytes; tails may have {self.memory:,}."
            raise BudgetError("The tail does not fit the memory.", why, "Give the edge more with --memory.")
        while sum(tail.resident for tail in self.open_tails.values()) + size > self.memory:
            idle = [tail for tail in self.open_tails.values() if not tail.users]
            if not idle:
                raise self._busy("Other tails have the memory now.")
            oldest = min(idle, key=lambda tail: tail.used)
            del self.open_tails[oldest.digest]
            await asyncio.to_thread(oldest.close)

    async def _run(self, slot: Slot, layout: Layout, feeds: Mapping[str, np.ndarray]) -> Answer:
        loop = asyncio.get_running_loop()
        assert slot.tail is not None
        if slot.deadline is not None and slot.deadline <= loop.time():
            raise late()
        key = (slot.tail.digest, *sorted((name, shape[1:]) for name, _, shape in layout.arrays))
        job = Job(slot.device, key, layout.rows, feeds, slot.deadline, loop.time(), loop.create_future(), slot.tail)
        self.waiting.add(job)
        self._wake.set()
        if self._worker is None:
            self._thread = ThreadPoolExecutor(1, "shoal-tail")
            self._worker = asyncio.create_task(self._work())
        assert job.done is not None
        try:
            return await job.done
        finally:
            self.waiting.drop(job)

    async def _work(self) -> None:
        """Runs batch after batch, for as long as the edge does."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            due = self.waiting.due(loop.time())
            if due is None or due > loop.time():
                if due is None:
                    self.waiting.forget()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._wake.wait()
                continue
            batch, late_ones = self.waiting.take(loop.time())
            for job in late_ones:
                _settle(job, late())
            if not batch:
                continue
            if batch[0].tail.where:  # a server elsewhere takes many at a time; here one run has every core
                task = asyncio.create_task(self._compute(batch, None))
                self._away.add(task)
                task.add_done_callback(self._away.discard)
            else:
                await self._compute(batch, self._thread)

    async def _compute(self, batch: list[Job], thread: ThreadPoolExecutor | None) -> None:
        loop, tail = asyncio.get_running_loop(), batch[0].tail
        started = loop.time()
        try:
            found = await loop.run_in_executor(thread, tail.run, batch)
        except Exception as error:  # not foreseen: it must not stop what others wait for
            why = f"{type(error).__name__}: {error}"
            found = [ShoalError("The tail could not be run.", why[:300], "Look at the edge's log.")] * len(batch)
        took, rows = loop.time() - started, sum(job.rows for job in batch)
        self._measure(tail, started, took, rows, started - batch[0].arrived, len(batch))
        for job, outputs in zip(batch, found, strict=True):
            if isinstance(outputs, ShoalError):
                _settle(job, outputs)
            else:
                _settle(job, Answer(outputs, started - job.arrived, took, rows))

    def _measure(self, tail: Tail, started: float, took: float, rows: int, waited: float, served: int) -> None:
        tail.served += served
        tail.batches += 1
        tail.seconds = took if tail.batches == 1 else 0.8 * tail.seconds + 0.2 * took
        self.wait = 0.8 * self.wait + 0.2 * waited
        now = started + took
        fade, share = math.exp(-max(0.0, now - self._measured) / _SMOOTH), 1 - math.exp(-took / _SMOOTH)
        self._busy_share, self._measured = min(1.0, fade * self._busy_share + share), now
        self._full = 0.9 * self._full + 0.1 * min(1.0, rows / self.max_batch)

    def _busy(self, why: str) -> BusyError:
        error = BusyError("The edge is busy.", why, "Compute here, or try again soon.")
        error.retry_ms = max(10, math.ceil(1000 * 2 * self.wait))  # type: ignore[attr-defined]
        return error


def late() -> LateError:
    """What a request hears whose deadline has passed."""
    return LateError("The answer would come too late.", "The deadline has passed.", "Compute here.")


def _settle(job: Job, result: Answer | ShoalError) -> None:
    if job.done is None or job.done.done():  # nobody waits any more
        return
    if isinstance(result, ShoalError):
        job.done.set_exception(result)
    else:
        job.done.set_result(result)


def _misfit(why: str) -> UsageError:
    return UsageError("The tensors do not fit the tail.", why, "Send what the tail's model takes.")
