"""The agent's side of the socket for apps: frames in, answers out, as apps.py lays them down.

It promises that an app which is slow, broken or gone costs one place of a bounded number and nobody else's answer,
and that every request is answered, or refused, by its deadline. It knows nothing about models or links.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shoal.runtime.errors import BusyError, LinkError, ShoalError, UsageError
from shoal.runtime.split.link import Reply

from . import apps
from .apps import Answer, Piece
from .local_socket import LocalServer

MOST_APPS = 32
_SLOW = 30.0  # seconds that the rest of a frame may take


class Answers(Protocol):
    """Who answers."""

    async def infer(self, tensors: Mapping[str, np.ndarray], deadline: float, model: str) -> Answer: ...
    async def ask(self, message: bytes, mode: int, deadline: float, model: str) -> Reply: ...
    def modes(self) -> tuple[int, ...]: ...
    def generate(self, text: str, model: str, **options: Any) -> AsyncGenerator[Piece, None]: ...
    async def update(self, folder: Path) -> str: ...
    def status(self) -> dict[str, Any]: ...


class AppServer:
    """Listens at `path` (0600, in a folder of this user) once started."""

    def __init__(self, path: Path, answers: Answers):
        self._answers, self._server = answers, LocalServer(path, self._serve)
        self._kinds: dict[str, Callable[..., Awaitable[None]]] = {
            "infer": self._infer, "generate": self._generate, "status": self._status, "update": self._update,
            "ask": self._ask,
        }  # fmt: skip

    async def start(self) -> None:
        """The caller holds the agent's lock. Raises StorageError."""
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._server.clients > MOST_APPS:
                busy = BusyError("The agent takes no more apps.", f"{MOST_APPS} are connected.", "Close one.")
                return await _say(writer, apps.refusal(busy))
            while head := await reader.read(1):  # an app may be silent for as long as it likes, between two frames
                async with asyncio.timeout(_SLOW):
                    request, tensors = await _frame(reader, head)
                await self._request(writer, request, tensors)
        except LinkError as error:  # what comes next could not be told apart from what came
            with contextlib.suppress(OSError, TimeoutError):
                await _say(writer, apps.refusal(error))
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass

    async def _request(self, writer: asyncio.StreamWriter, request: dict[str, Any], tensors: dict) -> None:
        try:
            until = time.monotonic() + _seconds(request)
            kind = self._kinds.get(str(request.get("op")))
            if kind is None:
                raise UsageError(f"There is no {request.get('op')!r:.40}.", "Agent and app differ.", "Upgrade shoal.")
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await kind(writer, request, tensors)
            except TimeoutError:
                raise LinkError("There is no answer in time.", "The deadline has passed.", "Allow more.") from None
        except ShoalError as error:
            await _say(writer, apps.refusal(error))

    async def _infer(self, writer: asyncio.StreamWriter, request: dict[str, Any], tensors: dict) -> None:
        answer = await self._answers.infer(tensors, _seconds(request), _text(request, "model"))
        said = {"ok": True, "where": answer.where, "seconds": answer.seconds, "why": answer.why}
        await _say(writer, said, answer.outputs)

    async def _ask(self, writer: asyncio.StreamWriter, request: dict[str, Any], tensors: dict) -> None:
        message = tensors.get("message")
        if len(tensors) != 1 or message is None or message.dtype != np.uint8 or message.ndim != 1:
            raise UsageError("The message cannot be read.", "It is not the bytes of one.", "Send what a codec wrote.")
        mode = _number(request, "mode", 0)
        if type(mode) is not int or not 0 <= mode < 1 << 31:
            raise UsageError(f"mode is {mode!r:.40}.", "It is no number of a mode.", "Correct it.")
        seconds, model = _seconds(request), _text(request, "model")
        said: dict[str, Any] = {}
        outputs: Mapping[str, np.ndarray] = {}
        try:
            reply = await self._answers.ask(message.tobytes(), mode, seconds, model)
            said, outputs = {"tail_seconds": reply.tail_seconds}, reply.outputs
        except ShoalError as error:
            said = {"refused": apps.refusal(error)["error"]}
        await _say(writer, {"ok": True, "modes": list(self._answers.modes()), **said}, outputs)

    async def _generate(self, writer: asyncio.StreamWriter, request: dict[str, Any], tensors: dict) -> None:
        stop = request.get("stop", [])
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            raise UsageError("stop cannot be read.", "It is not a list of texts.", "Correct it.")
        options = {
            "max_tokens": int(_number(request, "max_tokens", 256)), "stop": tuple(stop),
            "temperature": _number(request, "temperature", 0.0), "top_p": _number(request, "top_p", 1.0),
            "seed": int(_number(request, "seed", -1)),
        }  # fmt: skip
        pieces = self._answers.generate(_text(request, "text"), _text(request, "model"), **options)
        async with contextlib.aclosing(pieces) as answer:
            async for piece in answer:
                await _say(writer, {"ok": True, **vars(piece)})

    async def _update(self, writer: asyncio.StreamWriter, request: dict[str, Any], tensors: dict) -> None:
        await _say(writer, {"ok": True, "result": await self._answers.update(Path(_text(request, "folder")))})

    async def _status(self, writer: asyncio.StreamWriter, request: dict[str, Any], tensors: dict) -> None:
        await _say(writer, {"ok": True, "status": self._answers.status()})


async def _frame(reader: asyncio.StreamReader, head: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    length = apps.header_length(head + await reader.readexactly(apps.LENGTH.size - len(head)))
    request = apps.header(await reader.readexactly(length))
    layout = apps.layout(request.get("tensors", []))
    return request, apps.unpack(layout, await reader.readexactly(apps.nbytes(layout)))


async def _say(writer: asyncio.StreamWriter, said: dict[str, Any], tensors: Mapping[str, np.ndarray] | None = None):
    writer.write(apps.frame(said, tensors))
    async with asyncio.timeout(_SLOW):
        await writer.drain()


def _seconds(request: dict[str, Any]) -> float:
    seconds = _number(request, "deadline", 1.0)
    if not 0 < seconds <= apps.LONGEST:
        raise UsageError(f"The deadline is {seconds:g}.", f"It is above 0, at most {apps.LONGEST:g} s.", "Correct it.")
    return seconds


def _number(request: dict[str, Any], name: str, default: float) -> float:
    value = request.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1 << 62:
        raise UsageError(f"{name} is {value!r:.40}.", "It is not a number.", "Correct it.")
    return value


def _text(request: dict[str, Any], name: str) -> str:
    value = request.get(name, "")
    if not isinstance(value, str):
        raise UsageError(f"{name} is {value!r:.40}.", "It is not a text.", "Correct it.")
    return value
