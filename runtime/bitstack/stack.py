"""The stack of an open model: which of its bundle's entries are resident, and which of them the kernels see.

With the first n entries those of them are resident that nothing later of these n replaces. New ones are read and
verified beside whatever runs; only then the kernels are told, between two runs, and what was replaced is given up. The
stack has a mapping of its own, so that its pages can be counted and given up; what is resident is the page cache's,
shared with whoever maps the file too, and what the system takes back under pressure returns with the next touch. It
knows nothing about graphs or budgets.
"""

import contextlib
import ctypes
import errno
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .. import kernels, measure
from ..bundle import Bundle
from ..errors import BackendError, BundleError, ShoalError, UsageError
from ..kernels.layout import LinearFormat
from .layout import HEADER, Entry, Index, check

MAX_INDEX = 8 << 20  # bytes; 65,536 entries of 16,384 matrices are fewer
_ALIGNMENT = 64  # of a payload: what the kernels read with
_PIECE = 2 << 20  # bytes that are made resident and verified at a time
# Seconds between two pieces. A checksum lets the interpreter's lock go for some microseconds only: who answers then
# would find it taken again each time, and wait 5 ms until it is given
_BREATH = 2e-4
_OVERLAP = 0.01  # of the larger size, how far beyond it what is replaced and what replaces it may be together
_POPULATE_READ = 22  # of madvise, linux/mman.h; Linux 5.14

Between = Callable[[Callable[[], None]], object]


def read_index(bundle: Bundle) -> Index:
    """The index of a bundle's stack, checked against its entries' section. Raises BundleError."""
    index = Index.from_json(bundle.bytes(bundle.section("stack", "index"), MAX_INDEX))
    blocks, expected = bundle.section("stack", "blocks"), sum(entry.length for entry in index.entries())
    if blocks.length != expected:
        raise _refuse(bundle, f"stack has {blocks.length} bytes, not {expected} in {len(index.order)} entries")
    if blocks.offset % _ALIGNMENT:
        raise _refuse(bundle, f"stack begins at byte {blocks.offset}, not at a multiple of {_ALIGNMENT}")
    return index


class Stack:
    """The first `entries` of the stack are there, registered under `handle`; at first none are.

    `between` runs a piece of work between two runs of the graphs that use the stack; whoever has such graphs sets it.
    Any thread may call anything here; who grows or shrinks takes turns.
    """

    def __init__(self, bundle: Bundle):
        """Maps the stack and reads none of it. Raises BundleError, and BackendError without the kernels."""
        self.index, self._bundle = read_index(bundle), bundle
        self.sizes = self.index.sizes()
        self.entries = 0
        self.between: Between = lambda work: work()
        self._counts = self.index.counts(0)  # steps of each matrix that are there, also on the way to others
        self._file = self.index.entries()
        self._places: list[list[Entry]] = [[] for _ in self.index.matrices]  # of each matrix's steps
        for entry in self._file:
            self._places[entry.matrix].append(entry)
        section = bundle.section("stack", "blocks")
        first = section.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self._skip = section.offset - first  # bytes before the first entry, none where the section is aligned
        length = self._skip + section.length
        try:
            self._map = mmap.mmap(bundle.fileno(), length, access=mmap.ACCESS_READ, offset=first)
        except (OSError, ValueError) as error:
            raise _refuse(bundle, f"stack cannot be mapped ({error})") from None
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._size, self._closing = self._map.size(), False
        self._moving = threading.RLock()
        self._registered = kernels.Stack(len(self.index.matrices))

    @property
    def handle(self) -> int:
        """What a graph's input `stack` is given."""
        return self._registered.handle

    @property
    def bytes(self) -> int:
        """Of what must be resident now, headers included."""
        return self.sizes[self.entries]

    def resident(self) -> int | None:
        """Bytes of the mapping that are in memory, by the kernel's own accounting."""
        data = self._bytes  # stays mapped as long as this does
        return measure.range_rss(data.ctypes.data, len(data)) if len(data) else None

    def set_entries(self, entries: int, between: Between | None = None) -> None:
        """Grows or shrinks to the first `entries`; `between` in place of the stack's own.

        What is long happens in the calling thread, what `between` runs takes a few milliseconds. Where matrices are
        replaced it may run several times, so that hardly more than what is there before or after is ever resident.
        Raises BundleError for an entry that is damaged, cut off or not the one that belongs there, and whatever
        `between` raises; nothing has changed then.
        """
        if type(entries) is not int or not self.index.floor <= entries <= len(self._file):
            raise UsageError(
                f"A stack of {entries!r} entries is asked for.",
                f"This one can have {self.index.floor} to {len(self._file)}.", "Ask for as many as that.",
            )  # fmt: skip
        with self._moving:
            before = list(self._counts)
            try:
                self._move(self.index.counts(entries), between or self.between)
            except BaseException:
                with contextlib.suppress(ShoalError):
                    self._move(before, between or self.between)
                raise
            self.entries = entries

    def set_counts(self, counts: Sequence[int]) -> None:
        """Makes each matrix have as many of its steps as `counts` says, whatever the stack's order: to measure others.
        `entries` and `bytes` stay those of the last set_entries, and the next one ends this."""
        with self._moving:
            self._move(list(counts), self.between)

    def close(self) -> None:
        """Frees everything; whoever is growing it is refused, a graph that still uses it as well."""
        self._closing = True
        with self._moving:
            self._registered.close()
            self._bytes = np.zeros(0, np.uint8)
            with contextlib.suppress(BufferError):  # somebody still looks at an entry
                self._map.close()

    def _move(self, counts: list[int], between: Between) -> None:
        """Makes it so that each matrix has as many steps as `counts` says."""
        try:
            for batch in self._batches(counts):
                self._open()
                self._fetch([entry for matrix in batch for entry in self._new(matrix, counts[matrix])])
                between(self._switch({matrix: counts[matrix] for matrix in batch}))
                self._release()
        except BaseException:
            self._release()
            raise

    def _batches(self, counts: list[int]) -> Iterator[list[int]]:
        """The matrices that change, in the order in which they do: first who only loses, then who has something
        replaced, as many at a time as there is room for, then who only gains."""
        losing: list[int] = []
        replaced: list[int] = []
        gaining: list[int] = []
        for matrix, (have, want) in enumerate(zip(self._counts, counts, strict=True)):
            if have != want:
                new, old = self._new(matrix, want), self._new(matrix, have, want)
                (replaced if new and old else gaining if new else losing).append(matrix)
        room = max(self._held(self._counts), self._held(counts)) * (1 + _OVERLAP)
        if losing:
            yield losing
        batch: list[int] = []
        left = room - self._held(self._counts)
        for matrix in replaced:
            more = sum(entry.length for entry in self._new(matrix, counts[matrix]))
            if batch and more > left:
                yield batch
                batch, left = [], room - self._held(self._counts)
            batch.append(matrix)
            left -= more
        if batch:
            yield batch
        if gaining:
            yield gaining

    def _held(self, counts: list[int]) -> int:
        """Bytes of what counts with so many steps of each matrix."""
        return sum(
            places[step].length
            for one, places, count in zip(self.index.matrices, self._places, counts, strict=True)
            for step in one.live(count)
        )

    def _new(self, matrix: int, count: int, other: int | None = None) -> list[Entry]:
        """What counts of the matrix with `count` steps, and with `other`, as now, does not."""
        live = self.index.matrices[matrix].live
        there = live(self._counts[matrix] if other is None else other)
        return [self._places[matrix][step] for step in live(count) if step not in there]

    def _switch(self, counts: dict[int, int]) -> Callable[[], None]:
        """What tells the kernels how many steps of these matrices count from now on; they are resident and verified."""
        told = []
        for matrix, count in counts.items():
            one = self.index.matrices[matrix]
            payloads = [self._entry(self._places[matrix][step])[HEADER.size :] for step in one.live(count)]
            first = one.steps[one.live(count).start] if payloads else None
            rung = (first, payloads.pop(0)) if isinstance(first, LinearFormat) else None
            told.append((matrix, count, payloads, rung))

        def switch() -> None:
            self._open()
            for matrix, count, payloads, rung in told:
                self._registered.set(matrix, payloads, rung)
                self._counts[matrix] = count

        return switch

    def _release(self) -> None:
        """Gives up every page that holds no part of what counts, the neighbours that the system mapped unasked too."""
        if self._closing:
            return
        live = [one.live(count) for one, count in zip(self.index.matrices, self._counts, strict=True)]
        page, base, end = mmap.PAGESIZE, self._bytes.ctypes.data, 0  # of the pages that stay, so far
        for entry in self._file:
            if entry.step in live[entry.matrix]:
                start = (self._skip + entry.offset) // page * page
                if start > end:
                    _madvise(base + end, start - end, _DONTNEED)
                end = -(-(self._skip + entry.offset + entry.length) // page) * page
        if end < len(self._bytes):
            _madvise(base + end, len(self._bytes) - end, _DONTNEED)

    def _fetch(self, entries: list[Entry]) -> None:
        """Makes these entries resident and verifies each, in the file's order, a piece at a time."""
        entries = sorted(entries, key=lambda entry: entry.offset)
        while entries:
            self._open()
            count, stop = 1, entries[0].offset + entries[0].length
            while count < len(entries) and entries[count].offset == stop and stop - entries[0].offset < _PIECE:
                stop += entries[count].length
                count += 1
            self._populate(entries[0].offset, stop)
            for entry in entries[:count]:
                stacked = self.index.matrices[entry.matrix]
                format = stacked.steps[entry.step]
                with memoryview(self._entry(entry)) as data:  # type: ignore[arg-type]  # gone before an error is
                    check(data, entry.matrix, entry.step, format, stacked.name)
            entries = entries[count:]
            if self.entries:  # somebody may run
                time.sleep(_BREATH)

    def _populate(self, start: int, stop: int) -> None:
        # A touch of a page that is no longer in the file would kill the process; asked beforehand, the system says so
        if self._map.size() < self._size:
            raise _refuse(self._bundle, "file was cut while it was used")
        start = (self._skip + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if _madvise(self._bytes.ctypes.data + start, self._skip + stop - start, _POPULATE_READ) == errno.EFAULT:
            raise _refuse(self._bundle, "stack ends before its last entry: the file was cut or cannot be read")

    def _entry(self, entry: Entry) -> np.ndarray:
        return self._bytes[self._skip + entry.offset :][: entry.length]

    def _open(self) -> None:
        if self._closing:
            raise BackendError("The model is closed.", "close() was called.", "Load it again.")

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _refuse(bundle: Bundle, problem: str) -> BundleError:
    return BundleError(f"The bundle {bundle.path} cannot be used.", f"Its {problem}.", "Convert the checkpoint again.")


def _madvise(address: int, length: int, advice: int) -> int:
    """0, or the error's number; without the GIL."""
    if _LIBC is None:
        return errno.ENOSYS
    done = _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice))
    return ctypes.get_errno() if done else 0


_DONTNEED = getattr(mmap, "MADV_DONTNEED", 4)
_LIBC = None
if sys.platform == "linux":
    with contextlib.suppress(OSError):
        _LIBC = ctypes.CDLL(None, use_errno=True)
