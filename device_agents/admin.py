"""The edge's owner speaks to its daemon: a Unix socket in the edge's own folder, JSON lines both ways.

    -> {"verb": "pair", "seconds": 120}
    <- {"state": "open", "code": "1234-5678", ...}      one line whenever it changes, the last one final
    <- {"state": "used", "paired": "kitchen", ...}

    -> {"verb": "status"}      <- one line, the snapshot
    -> anything else           <- {"error": {"code": 2, "what": ..., "why": ..., "fix": ...}}

Who hangs up during `pair` closes the window. It knows nothing about devices or messages.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.runtime import errors
from shoal.runtime.errors import LinkError, ShoalError, TrustError, UsageError

from .local_socket import LocalServer, connect

if TYPE_CHECKING:
    from .edge import Edge

_LINE = 1 << 16  # bytes of a request
_ANSWER = 16 << 20  # bytes of a snapshot at most
_IDLE = 30.0  # seconds that a request may take to come
_CLIENTS = 16


def socket_path(folder: Path) -> Path:
    """Where the daemon of the edge in `folder` listens."""
    return folder / "admin.sock"


class Admin:
    """The daemon's side."""

    def __init__(self, edge: "Edge"):
        self._edge, self._server = edge, LocalServer(socket_path(edge.folder), self._serve, _LINE)

    async def start(self) -> None:
        """Raises UsageError where another daemon has the folder, StorageError."""
        if is_running(self._edge.folder):
            raise UsageError("The edge cannot start.", "Another one runs in its folder.", "Stop that one first.")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._server.clients > _CLIENTS:
                return
            async with asyncio.timeout(_IDLE):
                line = await reader.readline()
            if not line:
                return
            try:
                async for answer in self._answers(line, reader):
                    await _say(writer, answer)
            except ShoalError as error:
                said = {"code": error.code, "what": error.what, "why": error.why, "fix": error.fix}
                await _say(writer, {"error": said})
        except (TimeoutError, ValueError, OSError):  # too slow, too long, or gone
            pass

    async def _answers(self, line: bytes, reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
        try:
            asked = json.loads(line)
            verb = asked["verb"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                "The request is not understood.", "It is no JSON object with a verb.", "See admin.py."
            ) from None
        if verb == "status":
            yield dict(self._edge.snapshot())
        elif verb == "pair":
            async for state in self._pair(asked.get("seconds", 120), reader):
                yield state
        else:
            raise UsageError(f"There is no verb {verb!r:.40}.", "The daemon knows pair and status.", "Upgrade shoal.")

    async def _pair(self, seconds: Any, reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
        """Opens a window and says how it goes, until it is over or nobody listens."""
        if type(seconds) not in (int, float) or not 1 <= seconds <= 3600:
            raise UsageError(
                "The window cannot be opened.", f"{seconds!r:.40} is no time of 1 to 3600 s.", "Correct it."
            )
        edge, gone = self._edge, asyncio.ensure_future(reader.read(1))
        queue = edge.subscribe()
        window = edge.open_window(float(seconds))
        said: dict[str, Any] | None = None
        try:
            while edge.window is window or said is None:
                now = dict(edge.pairing() or {})
                if now != said:
                    said = now
                    yield now
                if now["state"] != "open":
                    return
                look = asyncio.ensure_future(queue.get())
                await asyncio.wait({look, gone}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                look.cancel()
                if gone.done():
                    return
            yield {"state": "closed", "code": "", "text": ""}
        finally:
            gone.cancel()
            edge.unsubscribe(queue)
            if edge.window is window:
                edge.close_window()


async def _say(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    writer.write(json.dumps(value).encode() + b"\n")
    await writer.drain()


# The other side: blocking, for a command line


def is_running(folder: Path) -> bool:
    """Whether a daemon answers in `folder`."""
    try:
        connect(socket_path(folder)).close()
    except OSError:
        return False
    return True


def ask(folder: Path, verb: str, **more: Any) -> Iterator[dict[str, Any]]:
    """What the daemon of the edge in `folder` says to `verb`, line by line. Raises what it raised, and LinkError."""
    try:
        connection = connect(socket_path(folder))
    except OSError as error:
        why = (
            "No daemon listens there." if isinstance(error, FileNotFoundError | ConnectionRefusedError) else f"{error}."
        )
        raise LinkError(f"The edge in {folder} does not run.", why, "Start it: shoal edge.") from None
    with connection, connection.makefile("rb") as lines:
        connection.sendall(json.dumps({"verb": verb, **more}).encode() + b"\n")
        while line := lines.readline(_ANSWER):
            try:
                value = json.loads(line)
            except ValueError:
                raise LinkError("The edge's answer is cut short.", "It stopped.", "Look at its log.") from None
            if "error" in value:
                raise _error(value["error"])
            yield value


def _error(said: dict[str, Any]) -> ShoalError:
    families = {family.code: family for family in vars(errors).values() if isinstance(family, type)
                and issubclass(family, ShoalError)}  # fmt: skip
    return families.get(said["code"], TrustError)(said["what"], said["why"], said["fix"])
