"""What the kernel says this process holds: the other side of the plan's promise.

Parsers are pure functions of the text of /proc, so they are tested without a process; the functions that read return
None where the kernel does not tell (anything but Linux, or a locked-down /proc). Sizes are bytes.
"""

import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mapping:
    """One mapping of /proc/self/smaps, or of maps and then without counts; `device` is "major:minor" in hex, `inode` 0
    is no file."""

    start: int
    end: int
    permissions: str
    offset: int  # of the file, at `start`
    device: str
    inode: int
    path: str
    rss: int
    anonymous: int


def parse_smaps(text: str) -> Iterator[Mapping]:
    """The mappings of /proc/<pid>/smaps or maps."""
    head: list[str] | None = None
    counts: dict[str, int] = {}
    for line in [*text.splitlines(), "0-0 end"]:
        words = line.split(None, 5)
        if not words:
            continue
        if not words[0].endswith(":"):
            if head is not None:
                start, end = (int(part, 16) for part in head[0].split("-"))
                path = head[5].rstrip("\n") if len(head) > 5 else ""
                yield Mapping(
                    start, end, head[1], int(head[2], 16), head[3], int(head[4]), path,
                    counts.get("Rss", 0), counts.get("Anonymous", 0),
                )  # fmt: skip
            head, counts = (words if len(words) >= 5 else None), {}
        elif len(words) >= 3 and words[2] == "kB":
            counts[words[0][:-1]] = int(words[1]) << 10


def parse_status(text: str) -> dict[str, int]:
    """The sizes of /proc/<pid>/status by name: RssAnon, RssFile, VmHWM, VmRSS, ..."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB" and words[1].isdigit():
            found[words[0].rstrip(":")] = int(words[1]) << 10
    return found


def parse_pagemap(entries: bytes, page: int) -> int:
    """Bytes of the pages that 8-byte /proc/<pid>/pagemap entries show in memory or in swap (bits 63 and 62)."""
    return page * sum(1 for top in entries[7::8] if top & 0xC0)


def mappings() -> list[Mapping]:
    """What this process has mapped, without counts; empty where the kernel does not tell."""
    return list(parse_smaps(_read("/proc/self/maps") or ""))


def anonymous_bytes() -> int | None:
    """Private memory of this process: heap, stacks, what was written to private mappings."""
    return _status("RssAnon")


def resident_bytes() -> int | None:
    """Everything resident: anonymous, files and shared memory."""
    return _status("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most that was ever resident, or since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Starts `peak_resident_bytes` anew; False where the kernel does not allow it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def mapped_rss(path: str | os.PathLike, within: tuple[int, int] | None = None) -> int | None:
    """Resident bytes of this process's mappings of a file: by device and inode, or by path where an overlay file
    system shows others. Pages that were written privately are anonymous and not counted; a page mapped twice is. With
    `within`, (offset, bytes) of the file, only of the mappings that lie there.
    """
    text = _read("/proc/self/smaps")
    if text is None:
        return None
    found = _of_file(text, path)
    if within is not None:
        low, high = within[0] // mmap.PAGESIZE * mmap.PAGESIZE, sum(within) + mmap.PAGESIZE
        found = [one for one in found if low <= one.offset <= one.offset + one.end - one.start <= high]
    return sum(one.rss - one.anonymous for one in found)


def folder_rss(folders: Iterable[str]) -> int | None:
    """Resident bytes of this process's mappings of files below these folders, such as a package's shared libraries."""
    text, below = _read("/proc/self/smaps"), tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
    if text is None:
        return None
    return sum(found.rss - found.anonymous for found in parse_smaps(text) if found.path.startswith(below))


def range_rss(address: int, length: int) -> int | None:
    """Bytes in memory of an address range, page by page, so that the rest of its mapping does not count."""
    first, last = address // mmap.PAGESIZE, -(-(address + length) // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * 8)
            wanted, entries = (last - first) * 8, b""
            while len(entries) < wanted:
                part = file.read(min(wanted - len(entries), 1 << 20))
                if not part:
                    return None
                entries += part
    except OSError:
        return None
    return parse_pagemap(entries, mmap.PAGESIZE)


class PeakAnonymous:
    """The most anonymous memory seen while the block runs, sampled every `every` seconds: `bytes`, None if unknown.

    The kernel keeps no such peak (VmHWM counts mapped files too), so a spike shorter than a sample may be missed.
    """

    def __init__(self, every: float = 0.005):
        self.every = every
        self.bytes: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-anonymous", daemon=True)

    def _sample(self) -> None:
        while True:
            now = anonymous_bytes()
            if now is None:
                return
            self.bytes = max(self.bytes or 0, now)
            if self._stop.wait(self.every):
                return

    def __enter__(self) -> "PeakAnonymous":
        self.bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        now = anonymous_bytes()
        if now is not None:
            self.bytes = max(self.bytes or 0, now)


def _of_file(text: str, path: str | os.PathLike) -> list[Mapping]:
    try:
        status = os.stat(path)
    except OSError:
        return []
    device, real = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", os.path.realpath(path)
    return [
        found
        for found in parse_smaps(text)
        if found.inode and ((found.device, found.inode) == (device, status.st_ino) or found.path == real)
    ]


def _status(name: str) -> int | None:
    text = _read("/proc/self/status")
    return None if text is None else parse_status(text).get(name)


def _read(path: str) -> str | None:
    if sys.platform != "linux":
        return None
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None
