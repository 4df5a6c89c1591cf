"""What a long conversion has made so far, in a folder beside its target, so that it goes on where it was ended.

Every matrix is a file that appears when it is whole. The folder belongs to one source, recipe and version, which its
key says; another's is emptied. It goes when the bundle is there. It knows nothing about what its matrices are.
"""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shoal.runtime.errors import BusyError, StorageError

_VERSION = 2


class Work:
    """The folder `.NAME.stack` beside `out`, made if need be. Raises BusyError where another conversion to the same
    target is under way, and StorageError where the folder cannot be written."""

    def __init__(self, out: Path, key: dict):
        self.folder = out.absolute().with_name(f".{out.name}.stack")
        digest = hashlib.sha256(json.dumps([_VERSION, key], sort_keys=True, default=str).encode()).hexdigest()
        self._maps: dict[int, np.ndarray] = {}
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = open(self.folder / "key", "a+")  # noqa: SIM115 (held for as long as this lives)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BusyError(
                    f"{out} is being converted already.", "Another conversion holds its folder of finished matrices.",
                    "Wait for it, end it, or choose another name.",
                ) from None  # fmt: skip
            self._lock.seek(0)
            if self._lock.read() != digest:
                for path in self.folder.iterdir():
                    if path.name != "key":
                        path.unlink()
                self._lock.truncate(0)
                self._lock.write(digest)
                self._lock.flush()
        except OSError as error:
            raise _failed(self.folder, error) from None

    def load(self, matrix: int) -> dict | None:
        """What was saved beside this matrix's payloads; None where it is not there, or not whole."""
        path = self._path(matrix)
        try:
            with path.open("rb") as file:
                lengths, kept, crc = json.loads(file.readline(1 << 20))
                if path.stat().st_size != file.tell() + sum(lengths):
                    return None
                found = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)[file.tell() :]
        except (OSError, ValueError, TypeError):
            return None
        if zlib.crc32(found.data) != crc:
            return None
        self._maps[matrix] = found
        return {**kept, "lengths": lengths}

    def has(self, matrix: int) -> bool:
        return self._path(matrix).exists()

    def save(self, matrix: int, payloads: Sequence[bytearray | np.ndarray], kept: dict) -> None:
        """Puts a matrix's payloads away, with `kept`, JSON, beside them."""
        path, crc = self._path(matrix), 0
        views = [one.data if isinstance(one, np.ndarray) else memoryview(one) for one in payloads]
        for view in views:
            crc = zlib.crc32(view, crc)
        fresh = path.with_suffix(".part")
        try:
            with fresh.open("wb") as file:
                lengths = [view.nbytes for view in views]
                head = json.dumps([lengths, kept, crc]).encode()
                file.write(head + b" " * (-(len(head) + 1) % 64) + b"\n")  # so that what follows is aligned
                for view in views:
                    file.write(view)
            os.replace(fresh, path)
        except OSError as error:
            raise _failed(path, error) from None

    def payloads(self, matrix: int, lengths: Sequence[int]) -> list[np.ndarray]:
        """The payloads of a matrix that was loaded, uint8, mapped from its file; at multiples of 64 bytes in memory."""
        found, start = [], 0
        for length in lengths:
            found.append(self._maps[matrix][start : start + length])
            start += length
        return found

    def remove(self) -> None:
        """The bundle is there: nothing of this is needed any more."""
        self._maps.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Leaves the folder for the next try."""
        self._maps.clear()
        self._lock.close()

    def _path(self, matrix: int) -> Path:
        return self.folder / f"{matrix}.matrix"


def _failed(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written.", f"{error.strerror}.", "Make room, or choose another folder.")
