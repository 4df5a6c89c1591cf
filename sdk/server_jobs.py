"""Blocking iterators behind one event loop: each runs in a thread of its own, one coroutine reads what they give.

A thread for each admitted piece of work is the simplest bridge that keeps its promises: cancelling takes effect within
one item, a reader that stalls holds no slot, and the number of threads is bounded by admission. What is admitted is
counted until its thread has ended, so the count never lies about slots. It knows nothing about HTTP or models.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.runtime.errors import BusyError


class Source(Protocol):
    """What a thread iterates; `cancel` may be called from any thread and ends the iteration within one item."""

    def __iter__(self) -> Iterator[Any]: ...

    def cancel(self) -> None: ...


class Admission:
    """How much work is let in: `slots` run, at most `queue` more wait. Used from the event loop's thread only."""

    def __init__(self, slots: int, queue: int):
        self.slots, self.queue, self.used = slots, queue, 0
        self._mean = 1.0  # seconds a piece of work takes, lately

    def enter(self, count: int) -> None:
        """Lets `count` pieces in or raises BusyError."""
        if self.used + count > self.slots + self.queue:
            raise BusyError(
                f"{self.used} requests run or wait already.", "All slots are taken and the queue is full.", "Try later."
            )
        self.used += count

    def leave(self, seconds: float) -> None:
        """One piece has ended."""
        self.used -= 1
        self._mean += 0.2 * (seconds - self._mean)

    @property
    def waiting(self) -> int:
        return max(0, self.used - self.slots)

    def seconds_to_wait(self) -> int:
        """A guess at when the queue has moved on, 1 to 60 s."""
        return min(60, max(1, math.ceil(self._mean * (self.waiting + 1) / self.slots)))


@dataclass(frozen=True)
class Started:
    """A source exists: its arguments were accepted."""


@dataclass(frozen=True)
class Ended:
    """A source gave its last item."""

    source: Any


class Job:
    """The sources of one request. Make it and read it in the event loop."""

    def __init__(self, starts: Sequence[Callable[[], Source]], admission: Admission):
        """Each of `starts` makes a source in that source's thread. Raises BusyError before anything runs."""
        admission.enter(len(starts))
        self._admission = admission
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._lock = threading.Lock()
        self._sources: dict[int, Source] = {}
        self._cancelled = False
        self._open = len(starts)
        self._early: list[tuple[int, Any]] = []
        for index, start in enumerate(starts):
            threading.Thread(target=self._run, args=(index, start), name="shoal-request", daemon=True).start()

    async def started(self) -> None:
        """Returns once every source exists; raises what refused one of them."""
        missing = self._open
        while missing:
            index, item = await self._items.get()
            if isinstance(item, BaseException):
                raise item
            missing -= isinstance(item, Started)
            self._early.append((index, item))
        self._early.reverse()

    async def next(self) -> tuple[int, Any] | None:
        """(index, item or Ended) of whichever source is ready, None after the last; raises what a source raised.

        May be cancelled (by a timeout) without losing an item.
        """
        while self._open:
            index, item = self._early.pop() if self._early else await self._items.get()
            if isinstance(item, BaseException):
                raise item
            self._open -= isinstance(item, Ended)
            if not isinstance(item, Started):
                return index, item
        return None

    def cancel(self, index: int | None = None) -> None:
        """Ends one source, or all, within one item. Harmless when repeated."""
        with self._lock:
            self._cancelled |= index is None
            chosen = [source for key, source in self._sources.items() if index in (None, key)]
        for source in chosen:
            source.cancel()

    def _run(self, index: int, start: Callable[[], Source]) -> None:
        begun = time.monotonic()
        try:
            source = start()
            with self._lock:
                self._sources[index] = source
                cancelled = self._cancelled
            if cancelled:
                source.cancel()
            self._post(index, Started())
            for item in source:
                self._post(index, item)
            last: Any = Ended(source)
        except BaseException as error:  # carried to the reader, whatever it is
            last = error
        with self._lock:
            self._sources.pop(index, None)
        self._call(self._admission.leave, time.monotonic() - begun)
        self._post(index, last)

    def _post(self, index: int, item: Any) -> None:
        self._call(self._items.put_nowait, (index, item))

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has closed: nobody is left to tell
            pass
