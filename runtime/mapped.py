"""The mapped weights of one open graph: which pages of them are resident, and how to keep those few.

A step reads some weights whole and of a table only the rows of its tokens. The kernel answers such a read with the
page's neighbours too, 64 KiB and more for half a KiB, so that a long prompt would soon hold the whole table. `fetch`
therefore asks for the pages of just those rows beforehand, as private copies, which the kernel makes one by one;
`settle` gives them up when they are many, and the next touch brings them back from the page cache. The few vectors
that every step reads (norms, biases) are copied likewise, for good. Linux 5.14 and newer; elsewhere all of this does
nothing and the weights are read as the system pleases. It knows nothing about graphs or the engine.
"""

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from . import measure

RELEASED = 32  # rows after which all pages are given up: what past tokens touched would else pile up
ALWAYS = ""  # in place of an input's name: what every step reads
_POPULATE_WRITE = 23  # of madvise, linux/mman.h


@dataclass(frozen=True)
class Table:
    """Rows of a table at `offset` of the file at `path`: `rows` pieces of `stride` bytes, each of which holds
    `together` rows that can be picked."""

    path: str
    offset: int
    stride: int
    rows: int
    together: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of the pages that one row touches, on average."""
        return mmap.PAGESIZE + self.stride - 1


class Mapped:
    """Address ranges (start, end) of the weights, and the tables in them by the name of the input that picks rows."""

    def __init__(
        self, ranges: Iterable[tuple[int, int]] = (), tables: Mapping[str, list[tuple[int, Table]]] | None = None
    ):
        self.ranges, self.tables = list(ranges), dict(tables or {})  # a table begins at its address
        self._lock = threading.Lock()
        self._fetched = 0

    def fetch(self, name: str, rows: np.ndarray) -> None:
        """Makes the pages of these rows resident, and no others. Ids outside a table are left to the engine."""
        if name not in self.tables:
            return
        wanted = np.unique(rows)
        with self._lock:
            for address, table in self.tables.get(name, ()):
                pieces = np.unique(wanted // table.together) if table.together > 1 else wanted
                starts = address + pieces[(pieces >= 0) & (pieces < table.rows)].astype(np.int64) * table.stride
                for start in starts.tolist():
                    first = start // mmap.PAGESIZE * mmap.PAGESIZE
                    _madvise(first, start + table.stride - first, _POPULATE_WRITE)
            self._fetched += rows.size if name else 0

    def settle(self) -> bool:
        """After a step: gives up the pages of the tables if it, and those before it, fetched many rows, and says so."""
        with self._lock:
            if self._fetched < RELEASED:
                return False
            self._fetched = 0
            for address, table in (found for name, tables in self.tables.items() if name for found in tables):
                first = address // mmap.PAGESIZE * mmap.PAGESIZE  # the engine maps each tensor's pages for itself
                _madvise(first, address + table.stride * table.rows - first, mmap.MADV_DONTNEED)
            return True

    def release(self) -> None:
        """Gives up every page, but for those that each step reads: opening read them all once."""
        with self._lock:
            for start, end in self.ranges:
                _madvise(start, end - start, mmap.MADV_DONTNEED)
        self.fetch(ALWAYS, np.zeros(1, np.int64))

    def forget(self) -> None:
        """The mapping is about to go: its addresses may soon be somebody else's."""
        with self._lock:
            self.ranges, self.tables = [], {}


def regions(paths: Iterable[str]) -> list[measure.Mapping]:
    """Where the engine has mapped files: private, writable and never written. A bundle's own mapping is read-only."""
    paths = set(paths)
    return [found for found in measure.mappings() if found.path in paths and found.permissions == "rw-p"]


def appeared(now: list[measure.Mapping], before: list[measure.Mapping], tables: dict[str, list[Table]]) -> Mapped:
    """What of `now` was not there `before`, with the tables that lie in it."""
    ranges = without([(found.start, found.end) for found in now], [(found.start, found.end) for found in before])
    files: dict[str, list[measure.Mapping]] = {}
    for found in now:
        files.setdefault(found.path, []).append(found)
    paths = {table.path: os.path.realpath(table.path) for entries in tables.values() for table in entries}
    located: dict[str, list[tuple[int, Table]]] = {}
    for name, entries in tables.items():
        for table in entries:
            size = table.stride * table.rows
            for found in files.get(paths[table.path], ()):
                # A page may be in its neighbour's mapping too; which of them the engine reads does not show
                address = found.start + table.offset - found.offset
                if found.start <= address and address + size <= found.end:
                    if any(start <= address and address + size <= stop for start, stop in ranges):
                        located.setdefault(name, []).append((address, table))
    return Mapped(ranges, located)


def without(ranges: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of `ranges` outside `others`: the kernel joins neighbouring mappings of one file into one."""
    same = set(ranges) & set(others)
    left = [found for found in ranges if found not in same]
    for low, high in (found for found in others if found not in same):
        cut = [((start, min(end, low)), (max(start, high), end)) for start, end in left]
        left = [part for pair in cut for part in pair if part[0] < part[1]]
    return left


def _madvise(address: int, length: int, advice: int) -> None:
    if _LIBC is not None:
        _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice))


_LIBC = None
if sys.platform == "linux":
    with contextlib.suppress(OSError):
        _LIBC = ctypes.CDLL(None)
