"""A folder of files that this device made for itself: each whole or absent, bounded in all, never removed in use.

A file is a header (magic, lengths, sha256 of the index), data, and an index (JSON) at its end. It is written under
another name, flushed to the disk and renamed, so a crash leaves the old state. Who reads one holds a shared lock on
it; who writes one holds the folder's lock, so two processes never make the same file at once. A file that is damaged,
of another version or name, written to since it was made, or that somebody else could have written counts as absent.
When it was made is in its index and is the file's time; when it was used last, which decides who goes first, is its
access time. It knows nothing about what is cached.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import struct
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from .errors import ShoalError, StorageError
from .events import Event, Progress

T = TypeVar("T")

MAGIC = b"SHOALDEV"
VERSION = 1
PAGE = 4096  # data begins at a page, so that mapping one piece does not touch another
SUFFIX = ".cache"
_HEADER = struct.Struct("<8sIIQQ32s")  # magic, version, 0, offset and length of the index, its sha256
_INDEX_LIMIT = 16 << 20
_SCRATCH = ".making-"
_LOCK_S = 900.0  # another process that makes a file needs minutes at most


def cache_folder() -> Path:
    """$SHOAL_CACHE, else shoal in $XDG_CACHE_HOME, else ~/.cache/shoal."""
    own = os.environ.get("SHOAL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal"


class CacheFile:
    """An open, locked file of the cache with its `path`, `size`, `fd` and `index`; it closes when collected, too."""

    def __init__(self, path: Path, fd: int):
        """Takes over `fd`. Raises ValueError or OSError when it is not a file that this user made whole."""
        self.path, self.fd = path, fd
        self.close = weakref.finalize(self, os.close, fd)
        try:
            status = os.fstat(fd)
            self.size = status.st_size
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise ValueError("somebody else may write it")
            magic, version, _, at, length, digest = _HEADER.unpack(_whole(fd, 0, _HEADER.size))
            if magic != MAGIC or version != VERSION or at + length != self.size or length > _INDEX_LIMIT:
                raise ValueError("its header is not ours")
            text = _whole(fd, at, length)
            if hashlib.sha256(text).digest() != digest:
                raise ValueError("its index is damaged")
            self.index: dict = json.loads(text)
            if (self.index["name"], self.index["made"]) != (path.name, status.st_mtime_ns):
                raise ValueError("it was made as another file, or written to since")
            self._pieces = [(int(at), int(length), str(digest)) for at, length, digest in self.index["pieces"]]
        except BaseException:
            self.close()
            raise

    def at(self, piece: int) -> tuple[int, int]:
        """Offset and length of a piece. Raises ValueError where it is not inside the file."""
        at, length, _ = self._pieces[piece]
        if not 0 <= at <= at + length <= self.size:
            raise ValueError("it has a piece outside itself")
        return at, length

    def read(self, piece: int) -> bytes:
        """The bytes of a piece. Raises ValueError when they are damaged."""
        data = _whole(self.fd, *self.at(piece))
        if hashlib.sha256(data).hexdigest() != self._pieces[piece][2]:
            raise ValueError("it has a damaged piece")
        return data

    def verify(self) -> bool:
        """Whether every piece has its digest: reads the whole file."""
        with mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ) as data, memoryview(data) as view:
            return all(hashlib.sha256(view[at : at + n]).hexdigest() == digest for at, n, digest in self._pieces)


class CacheWriter:
    """A file being made. `scratch` is a folder for what is needed on the way; both vanish if the block fails."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self._file = open(scratch / "making", "xb")  # noqa: SIM115 - closed by _made
        os.fchmod(self._file.fileno(), 0o600)
        self._file.seek(PAGE)
        self._pieces: list[tuple[int, int, str]] = []

    def add(self, data: bytes | memoryview) -> int:
        """Writes a piece at the next page; returns its number."""
        at = self._file.seek(-(-self._file.tell() // PAGE) * PAGE)
        self._file.write(data)
        self._pieces.append((at, len(data), hashlib.sha256(data).hexdigest()))
        return len(self._pieces) - 1

    def at(self, piece: int) -> tuple[int, int]:
        """Offset and length of a piece."""
        return self._pieces[piece][:2]

    def reserve(self, count: int) -> None:
        """Raises OSError now if the disk has no room for `count` more bytes."""
        path = self.scratch / "room"
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(count, 1))
        path.unlink()

    def _made(self, index: dict) -> Path:
        made = int(time.time()) // 2 * 2 * 10**9  # every file system keeps two seconds
        text = json.dumps({**index, "made": made, "pieces": self._pieces}).encode()
        with self._file as file:
            at = file.seek(-(-file.tell() // PAGE) * PAGE)
            file.write(text)
            file.seek(0)
            file.write(_HEADER.pack(MAGIC, VERSION, 0, at, len(text), hashlib.sha256(text).digest()))
            file.flush()
            os.utime(file.fileno(), ns=(time.time_ns(), made))
            os.fsync(file.fileno())
        return Path(file.name)


def find(folder: Path, name: str) -> CacheFile | None:
    """The file called `name`, locked against removal; None if there is none that can be used."""
    import fcntl

    path = folder / (name + SUFFIX)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, struct.error):
        found = CacheFile(path, os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK))
        fcntl.flock(found.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(found.fd)):  # not removed before we had the lock
            os.utime(found.fd, ns=(time.time_ns(), found.index["made"]))  # used just now: the last to go
            return found
    return None


def found_or_made(folder: Path, find: Callable[[], T | None], make: Callable[[], None], progress: Progress) -> T:
    """What `find` gives, after `make` where it gives nothing: by one process at a time. Raises StorageError."""
    found = find()
    if found is None:
        with making(folder, progress):
            found = find()  # another process may have been faster
            if found is None:
                make()
                found = find()
    if found is None:
        raise StorageError(
            f"What was prepared in {folder} cannot be read back.",
            "The file is not what was written.",
            "Check the disk, or set SHOAL_CACHE to a folder elsewhere.",
        )
    return found


@contextlib.contextmanager
def making(folder: Path, progress: Progress) -> Iterator[None]:
    """Holds the folder's lock: one process at a time makes files. OSErrors leave as StorageError."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + _LOCK_S
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"Another process has held {folder / 'lock'} for {_LOCK_S / 60:.0f} minutes.",
                        "It prepares a model, or hangs.", "Wait for it, end it, or set SHOAL_CACHE to another folder.",
                    )  # fmt: skip
                progress(Event("prepare", detail="waiting for another process"))
                time.sleep(0.1)
            for stale in folder.glob(_SCRATCH + "*"):  # its maker died: nobody else holds the lock
                shutil.rmtree(stale, ignore_errors=True)
            yield
        finally:
            os.close(lock)  # releases the lock
    except ShoalError:
        raise
    except OSError as error:
        raise StorageError(
            f"The cache folder {folder} cannot be used.", f"{error.strerror or error}.",
            "Free some space or make it writable; or set SHOAL_CACHE to another folder.",
        ) from None  # fmt: skip


@contextlib.contextmanager
def create(folder: Path, name: str, index: dict) -> Iterator[CacheWriter]:
    """Makes the file `name` under `making`; it exists, whole, once the block ends. `index` may be filled meanwhile."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
        writer = CacheWriter(Path(scratch))
        with contextlib.closing(writer._file):
            yield writer
            path = folder / (name + SUFFIX)
            os.replace(writer._made({**index, "name": path.name}), path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_room(folder: Path, needed: int, limit: int) -> None:
    """Under `making`: removes files that nobody uses, longest unused first, until `needed` bytes more keep to `limit`.

    Raises StorageError where that, or the disk's free space, is not enough.
    """
    import fcntl

    files = sorted((path.stat().st_atime_ns, path.stat().st_size, path) for path in folder.glob("*" + SUFFIX))
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total + needed <= limit and shutil.disk_usage(folder).free >= needed:
            return
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while somebody maps it
                path.unlink()
                total -= size
            finally:
                os.close(fd)
    free = shutil.disk_usage(folder).free
    if total + needed > limit or free < needed:
        why = f"It has {free >> 20} MiB free and holds {total >> 20} of at most {limit >> 20} MiB."
        raise StorageError(
            f"The cache folder {folder} has no room for {needed >> 20} MiB.", why,
            "Free some space, or set SHOAL_CACHE to a folder elsewhere.",
        )  # fmt: skip


def _whole(fd: int, at: int, length: int) -> bytes:
    parts, left = [], length
    while left:
        part = os.pread(fd, left, at + length - left)
        if not part:
            raise ValueError("it is too short")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
