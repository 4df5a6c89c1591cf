"""Files from outside: mapped, or read whole under a limit; JSON that means one thing.

Promises that nothing but a regular file is opened, that no more is read than the limit says, and that every failure is
a `SourceError`. Knows nothing about formats.
"""

import json
import math
import mmap
import os
import stat
from pathlib import Path

from shoal.runtime.errors import SourceError


def map_file(path: Path) -> mmap.mmap:
    """The whole of a regular file, read-only, in memory only where it is touched. Symbolic links are followed: a cache
    of downloads keeps its files behind them."""
    descriptor = _open(path)
    try:
        if os.fstat(descriptor).st_size == 0:
            raise _unreadable(path, "It is empty.")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise _unreadable(path, str(error)) from None
    finally:
        os.close(descriptor)


def read_file(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes."""
    with open(_open(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise _unreadable(path, f"It has {size} bytes; {limit} is the limit.")
        try:
            return file.read(size)
        except OSError as error:
            raise _unreadable(path, str(error)) from None


def parse_json(data: bytes, origin: object, kind: type = dict):
    """A JSON object, or a list where `kind` is that; `origin` names the data for a person.

    Refused, beyond what is not JSON: a key given twice, a number that is not finite, nesting too deep for the parser.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("an object has the same key twice")
        return result

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text:.20} is not a finite number")
        return value

    try:
        value = json.loads(data, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise _unreadable(origin, f"It is not sound JSON: {error}") from None
    if not isinstance(value, kind):
        raise _unreadable(origin, f"It holds a JSON {type(value).__name__}, not a {kind.__name__}.")
    return value


def _open(path: Path) -> int:
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait forever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _unreadable(path, "It is not a regular file.")
    return descriptor


def _unreadable(origin: object, why: str) -> SourceError:
    return SourceError(
        f"{origin} cannot be read.", why, "Download the checkpoint again, and check the rights of its files."
    )
