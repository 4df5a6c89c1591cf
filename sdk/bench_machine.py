"""What a machine tells beside speed: how fast memory is read, what the page cache holds, temperature and energy.

Everything here answers None where the system does not tell. It knows nothing about models or engines.
"""

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shoal.runtime import kernels

_GAP = 64 << 10  # bytes: of what a step reads, norms and biases lie between matrices
_PASSES = 3  # of a stream read: a limit is what can be reached, not what a disturbed pass did
_SENSIBLE = (-50.0, 200.0)  # degrees: absent sensors show 0 K or the largest number there is


class Stream:
    """Reads ranges (path, offset, bytes) of files as fast as `threads` threads can: the limit of a decode step that
    reads the same bytes. The pages are mapped and brought in when it is made."""

    def __init__(self, ranges: Sequence[tuple[str, int, int]], threads: int):
        joined = [(path, offset, length) for path, offset, length in _joined(ranges) if length >= 64]
        maps = [np.memmap(path, np.uint8, "r", offset, (length,)) for path, offset, length in joined]
        self._maps, self._threads = maps, threads
        words = [part[: len(part) // 8 * 8].view(np.int32) for part in maps]
        self._parts = [part for word in words for part in np.array_split(word, threads) if len(part)]
        self._pool = ThreadPoolExecutor(threads)
        self.bytes = sum(part.nbytes for part in self._parts)
        self.run()

    def run(self) -> float:
        """Bytes a second of the best of a few passes."""
        best = float("inf")
        for _ in range(_PASSES):
            started = time.perf_counter()
            if kernels.available():
                for part in self._maps:
                    kernels.read(part, self._threads)
            else:
                # A sum is a few instructions a cache line: memory is what it waits for
                list(self._pool.map(lambda part: part.sum(dtype=np.int32), self._parts))
            best = min(best, time.perf_counter() - started)
        return self.bytes / best

    def close(self) -> None:
        self._pool.shutdown()
        self._parts.clear()
        self._maps.clear()


def _joined(ranges: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The ranges, those with less than _GAP between them as one: a pass over each starts threads."""
    found: list[tuple[str, int, int]] = []
    for path, offset, length in sorted(ranges):
        if found and found[-1][0] == path and offset - sum(found[-1][1:]) < _GAP:
            found[-1] = (path, found[-1][1], max(found[-1][2], offset + length - found[-1][1]))
        else:
            found.append((path, offset, length))
    return found


def drop_cached(path: str | os.PathLike) -> int | None:
    """Asks the kernel to forget a file's cached pages; returns the bytes that stayed all the same (another process has
    them mapped, or the file system has no other place), None where that cannot be asked or told."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with open(path, "rb") as file:
        with contextlib.suppress(OSError):  # read-only file systems have nothing to flush
            os.fsync(file.fileno())  # what is not written yet would stay
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_bytes(path)


def cached_bytes(path: str | os.PathLike) -> int | None:
    """Bytes of a file in the page cache (mincore). The kernel says "all" about files that this user may not write."""
    size = os.path.getsize(path)
    if not size:
        return 0
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        address, vector = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(pages.ctypes.data)
        failed = mincore(address, ctypes.c_size_t(size), vector)
        del view  # else the mapping could not be closed
    return None if failed else min(size, int((pages & 1).sum()) * mmap.PAGESIZE)


def celsius(root: str = "/sys/class/thermal") -> float | None:
    """Degrees of the hottest thermal zone."""
    found = [value / 1000 for path in Path(root).glob("thermal_zone*/temp") if (value := _number(path)) is not None]
    return max((value for value in found if _SENSIBLE[0] < value < _SENSIBLE[1] and value), default=None)


class Energy:
    """Joules that the processor packages have used since this was made (RAPL, which only root may read by default)."""

    def __init__(self, root: str = "/sys/class/powercap"):
        self._last: dict[Path, float] = {}
        self._joules = 0.0
        for path in sorted(Path(root).glob("*-rapl:*/energy_uj")):
            # Zones below a package, and the whole board where it is counted, would be counted twice
            if _text(path.with_name("name")).startswith("package") and (value := _number(path)) is not None:
                self._last[path] = value

    def joules(self) -> float | None:
        for path, last in self._last.items():
            now = _number(path)
            if now is None:
                return None
            around = (_number(path.with_name("max_energy_range_uj")) or 0.0) if now < last else 0.0
            self._joules += max(0.0, now - last + around) / 1e6
            self._last[path] = now
        return self._joules if self._last else None


class Others:
    """How many cores other processes kept busy since this was made; this one's children are none of them."""

    def __init__(self, root: str = "/proc"):
        self._root = Path(root)
        self._began, self._started = self._busy(), time.monotonic()

    def cores(self) -> float | None:
        now = self._busy()
        elapsed = time.monotonic() - self._started
        return None if now is None or self._began is None else max(0.0, now - self._began) / elapsed

    def _busy(self) -> float | None:
        """Seconds that all processors worked, less those of this process and its children."""
        counts = _text(self._root / "stat").split("\n", 1)[0].split()[1:9]
        if len(counts) < 8:
            return None
        user, nice, system, _, _, irq, soft, stolen = map(int, counts)
        ticks = user + nice + system + irq + soft + stolen
        for path in self._root.glob("[0-9]*/stat"):
            fields = _text(path).rpartition(")")[2].split()  # a process's name may have anything in it
            if len(fields) > 14 and (int(fields[1]) == os.getpid() or path.parent.name == str(os.getpid())):
                ticks -= int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    """The processor's name, as far as it is known."""
    import platform

    for line in _text(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
