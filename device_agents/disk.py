"""The few file operations that an update is made of.

Each public method is one operation, so that a test can cut the power before any of them and lose or tear what was not
synced. `replace` and `folder` are made of others. Reading returns None where there is nothing; every other failure of
the system leaves as a StorageError. It knows nothing about models.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from shoal.runtime.errors import StorageError

from .home import sync_folder


class Disk:
    """The real one. Files are made for this user alone and never through a symbolic link."""

    def read(self, path: Path, most: int) -> bytes | None:
        """At most `most` bytes; a longer file is refused."""
        with _named(path, "read"):
            try:
                with _open(path, os.O_RDONLY) as descriptor:
                    data = bytearray()
                    while len(data) <= most and (piece := os.read(descriptor, most + 1 - len(data))):
                        data += piece
            except FileNotFoundError:
                return None
            if len(data) > most:
                raise OSError(f"It is longer than {most} bytes")
            return bytes(data)

    def size(self, path: Path) -> int | None:
        """Bytes of a regular file, None where there is none."""
        with _named(path, "read"):
            try:
                return path.lstat().st_size if path.is_file() and not path.is_symlink() else None
            except FileNotFoundError:
                return None

    def names(self, folder: Path) -> list[str]:
        with _named(folder, "read"):
            return sorted(os.listdir(folder))

    def free(self, folder: Path) -> int:
        """Bytes that this user may still write there."""
        with _named(folder, "read"):
            status = os.statvfs(folder)
            return status.f_bavail * status.f_frsize

    def sha256(self, path: Path) -> str:
        with _named(path, "read"), open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def make_folder(self, path: Path) -> None:
        with _named(path, "written"):
            path.mkdir(mode=0o700, exist_ok=True)

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """`path` holds `data` and nothing else, until the power fails: not synced."""
        with _named(path, "written"), _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            _put(descriptor, data, 0)

    def put(self, path: Path, offset: int, data: bytes | memoryview) -> None:
        """Writes into `path` (made where it is missing) at `offset`: not synced."""
        with _named(path, "written"), _open(path, os.O_WRONLY | os.O_CREAT) as descriptor:
            _put(descriptor, data, offset)

    def cut(self, path: Path, length: int) -> None:
        with _named(path, "written"):
            os.truncate(path, length)

    def sync(self, path: Path) -> None:
        with _named(path, "written"), _open(path, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        with _named(new, "written"):
            os.replace(old, new)

    def remove(self, path: Path) -> None:
        with _named(path, "removed"), contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def sync_folder(self, path: Path) -> None:
        with _named(path, "written"):
            sync_folder(path)

    def replace(self, path: Path, data: bytes) -> None:
        """`path` holds `data` afterwards, or what it held before, whatever happens. One writer at a time."""
        new = path.with_name(f".{path.name}.new")
        self.write(new, data)
        self.sync(new)
        self.rename(new, path)
        self.sync_folder(path.parent)

    def folder(self, path: Path) -> None:
        """`path` exists and outlives a power cut; the folder above it is there."""
        if not path.is_dir():
            self.make_folder(path)
            self.sync_folder(path.parent)


@contextlib.contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _put(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


@contextlib.contextmanager
def _named(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} could not be {done}.", f"{error}.", "Free space, or mend the folder.") from None
