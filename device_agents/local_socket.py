"""A Unix socket for processes of this machine's user: how a daemon's owner and a device's apps speak to it.

The folder it lies in lets nobody else in, its mode neither, and the system is asked who is at the other end besides.
It knows nothing about what is said.
"""

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from shoal.runtime.errors import StorageError

_MOST_PATH = 100  # bytes; the system takes 108 (104 on macOS)
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class LocalServer:
    """Hands each connection to `serve`, as a task of its own; `clients` are at work. A socket that lies at `path` when
    it starts is of a daemon that died: whoever calls has made sure."""

    def __init__(self, path: Path, serve: Serve, limit: int = 1 << 16):
        """`limit`: bytes that a line may have."""
        self.path, self._serve, self._limit = Path(path), serve, limit
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task] = set()

    @property
    def clients(self) -> int:
        return len(self._tasks)

    async def start(self) -> None:
        """Raises StorageError."""
        old = os.umask(0o177)
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(self.path.lstat().st_mode):
                    self.path.unlink()
            with within(self.path) as name:
                self._server = await asyncio.start_unix_server(self._accept, name, limit=self._limit)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be made.", f"{error}.", "Choose another SHOAL_HOME.") from None
        finally:
            os.umask(old)

    async def stop(self) -> None:
        """Ends what is at work, and removes the socket."""
        if self._server is None:
            return
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._server = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connected(reader, writer))  # one of asyncio's own complains of a cancel
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _is_owner(writer.get_extra_info("socket")):
                await self._serve(reader, writer)
        finally:
            writer.close()


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """A blocking connection to the socket at `path`; each of its waits has `timeout` seconds. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout)
        with within(path) as name:
            connection.connect(name)
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def within(path: Path) -> Iterator[str]:
    """A name for the socket at `path` that is short enough for the system, by way of an open folder if need be."""
    if len(os.fsencode(path)) <= _MOST_PATH or not os.path.isdir("/proc/self/fd"):
        yield str(path)
        return
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def _is_owner(connection: socket.socket) -> bool:
    """Where the system does not say who is at the other end, the folder's mode is the only guard."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user in (os.getuid(), 0)
