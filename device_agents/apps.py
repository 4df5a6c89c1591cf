"""What an app and the agent of its device say to each other, over a Unix socket that only their user can open.

A frame is a length (u32, little-endian), that many bytes of JSON, and then the tensors that its "tensors" describe
({name, dtype, shape}), raw and little-endian, in that order. A request names its "op" and its "deadline" in seconds;
an answer has "ok", or an "error" with the three sentences of a ShoalError. One request at a time on a connection.

`App` is the app's side. It blocks, never past its deadline, and needs no event loop. Both sides take the other's
bytes for hostile: every length is compared with a cap before anything is allocated.
"""

import contextlib
import json
import math
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.runtime.errors import LinkError, ShoalError, UsageError
from shoal.runtime.split.link import Reply

from .home import home
from .local_socket import connect
from .messages import Failure

LENGTH = struct.Struct("<I")
MOST_HEADER = 64 << 10
MOST_TENSORS = 64
MOST_BYTES = 64 << 20  # of the tensors of one frame
LONGEST = 600.0  # seconds that a request may ask for
_GRACE = 1.0  # seconds after its deadline in which the agent's own refusal may still come
_DTYPES = frozenset(
    "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split()
)  # fmt: skip

Layout = list[tuple[str, np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Answer:
    """`where` it was computed: "edge" or "local"; `seconds` from the request to the answer, as the agent saw it;
    `why` says what kept the edge from answering, "" where nothing did."""

    outputs: dict[str, np.ndarray]
    where: str
    seconds: float
    why: str = ""


@dataclass(frozen=True)
class Piece:
    """A piece of a generated text. `finish` is "" until the last one."""

    text: str
    id: int
    where: str
    finish: str = ""


def socket_path() -> Path:
    """Where a device's agent listens for apps."""
    return home() / "device" / "agent.sock"


def describe(tensors: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The "tensors" of a header. Raises UsageError for what cannot travel."""
    found = []
    for name, array in tensors.items():
        if not isinstance(array, np.ndarray) or array.dtype.name not in _DTYPES:
            said = getattr(array, "dtype", type(array).__name__)
            raise UsageError(f"{name!r} is {said}.", "It is no array of numbers.", "Convert it with numpy.")
        found.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape)})
    layout(found)
    return found


def raw(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Their bytes, in order."""
    return b"".join(
        np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes() for array in tensors.values()
    )  # fmt: skip


def layout(said: object) -> Layout:
    """The tensors that a peer or an app describes, checked; what they need is at most MOST_BYTES. Raises LinkError."""
    if not isinstance(said, list) or len(said) > MOST_TENSORS:
        raise _unreadable(f"tensors is not a list of at most {MOST_TENSORS}")
    found: Layout = []
    for entry in said:
        name, dtype, shape = (
            (entry.get(key) for key in ("name", "dtype", "shape")) if isinstance(entry, dict) else [0] * 3
        )
        if not isinstance(name, str) or len(name) > 255 or not isinstance(dtype, str) or dtype not in _DTYPES:
            raise _unreadable("a tensor has no name, or a dtype that is none")
        if not isinstance(shape, list) or len(shape) > 8 or not all(type(d) is int and 0 <= d < 1 << 31 for d in shape):
            raise _unreadable(f"the shape of {name!r} is none")
        found.append((name, np.dtype(dtype).newbyteorder("<"), tuple(shape)))
    if len({name for name, *_ in found}) != len(found):
        raise _unreadable("a tensor comes twice")
    if nbytes(found) > MOST_BYTES:
        raise _unreadable(f"its tensors have more than {MOST_BYTES:,} bytes")
    return found


def nbytes(found: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in found)


def unpack(found: Layout, data: bytes) -> dict[str, np.ndarray]:
    """The arrays, read-only views of `data`. Raises LinkError where the lengths differ."""
    if len(data) != nbytes(found):
        raise _unreadable(f"{len(data)} bytes of tensors came, {nbytes(found)} were due")
    arrays, offset = {}, 0
    for name, dtype, shape in found:
        size = math.prod(shape)
        arrays[name] = np.frombuffer(data, dtype, size, offset).reshape(shape)
        offset += size * dtype.itemsize
    return arrays


def frame(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> bytes:
    """The bytes of a frame. Raises UsageError where it is too long."""
    tensors = tensors or {}
    head = json.dumps({**header, "tensors": describe(tensors)}).encode()
    if len(head) > MOST_HEADER:
        raise UsageError("The request is too long.", f"Its header has {len(head)} bytes.", f"{MOST_HEADER} are taken.")
    return LENGTH.pack(len(head)) + head + raw(tensors)


def header_length(data: bytes) -> int:
    (length,) = LENGTH.unpack(data)
    if not 2 <= length <= MOST_HEADER:
        raise _unreadable(f"a header has {length} bytes, not at most {MOST_HEADER}")
    return length


def header(data: bytes) -> dict[str, Any]:
    """The JSON object of a frame. Raises LinkError."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        raise _unreadable("a header is not JSON") from None
    if not isinstance(said, dict):
        raise _unreadable("a header is not an object")
    return said


def refusal(error: ShoalError) -> dict[str, Any]:
    """The header that tells an app of an error."""
    return {"error": {"code": error.code, "what": error.what, "why": error.why, "fix": error.fix}}


class App:
    """The agent of this device, for an app: `with App() as app: app.infer({"image": array}, deadline=0.2)`.

    Not for several threads at once; make one each. A connection that broke is opened again by the next request.
    """

    def __init__(self, path: Path | str | None = None):
        self._path = Path(path) if path else socket_path()
        self._socket: socket.socket | None = None

    def infer(self, tensors: Mapping[str, np.ndarray], deadline: float = 1.0, model: str = "") -> Answer:
        """Runs `model` (the only one if "") on the edge or here, whichever answers within `deadline` seconds.

        Raises what the model or the agent refused, BusyError and LinkError where nobody could answer in time.
        """
        until = self._begin({"op": "infer", "model": model, "deadline": deadline}, tensors, deadline)
        said, outputs = self._frame(until)
        return Answer(outputs, said.get("where", ""), said.get("seconds", 0.0), said.get("why", ""))

    def ask(
        self, mode: int, message: bytes, deadline: float, model: str = ""
    ) -> tuple[Reply | ShoalError, tuple[int, ...]]:
        """The edge's answer, or refusal, to a message that the codec of `mode` wrote, and the modes that are agreed;
        within `deadline` seconds and no later. For paired_link.PairedLink. Raises as `infer`."""
        request = {"op": "ask", "model": model, "mode": mode, "deadline": deadline}
        until = self._begin(request, {"message": np.frombuffer(message, np.uint8)}, deadline, grace=0.0)
        said, outputs = self._frame(until)
        took, agreed = said.get("tail_seconds", 0.0), said.get("modes")
        if type(took) not in (int, float) or not isinstance(agreed, list):
            self.close()
            raise _unreadable("an answer does not say what it took")
        found = _told(said["refused"]) if "refused" in said else Reply(outputs, float(took))
        return found, tuple(one for one in agreed if type(one) is int)

    def generate(
        self, text: str, model: str = "", *, max_tokens: int = 256, stop: Sequence[str] = (), temperature: float = 0.0,
        top_p: float = 1.0, seed: int = -1, deadline: float = 120.0,
    ) -> Iterator[Piece]:  # fmt: skip
        """Answers `text`, piece by piece; where the link breaks in the middle, the device goes on by itself."""
        request = {"op": "generate", "model": model, "text": text, "max_tokens": max_tokens, "stop": list(stop),
                   "temperature": temperature, "top_p": top_p, "seed": seed, "deadline": deadline}  # fmt: skip
        until = self._begin(request, {}, deadline)
        finished = False
        try:
            while not finished:
                said, _ = self._frame(until)
                piece = Piece(said.get("text", ""), said.get("id", -1), said.get("where", ""), said.get("finish", ""))
                finished = bool(piece.finish)
                yield piece
        finally:
            if not finished:
                self.close()  # the agent stops generating when nobody listens

    def status(self) -> dict[str, Any]:
        """Link, agreement, health, models and updates, as `shoal agent status` shows them."""
        said, _ = self._frame(self._begin({"op": "status", "deadline": 5.0}, {}, 5.0))
        return said["status"]

    def update(self, folder: Path, deadline: float = 300.0) -> str:
        """Lets the agent take a release from a folder; returns what came of it. Raises what it refused."""
        until = self._begin({"op": "update", "folder": os.path.abspath(folder), "deadline": deadline}, {}, deadline)
        return self._frame(until)[0].get("result", "")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> "App":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(
        self, request: Mapping[str, Any], tensors: Mapping[str, np.ndarray], deadline: float, grace: float = _GRACE
    ) -> float:
        """Sends a request, over a new connection if the agent was restarted; returns when its answer must be there."""
        if not 0 < deadline <= LONGEST:
            raise UsageError(f"The deadline is {deadline}.", f"It is above 0, at most {LONGEST:g} s.", "Correct it.")
        data, until = frame(request, tensors), time.monotonic() + deadline + grace
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self.close()  # nothing is due: this is the end of an agent that went
        with self._talking(until) as connection:
            connection.sendall(data)
        return until

    def _frame(self, until: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        with self._talking(until):
            said = header(self._exactly(header_length(self._exactly(LENGTH.size, until)), until))
            if "error" in said:
                raise _told(said["error"])
            found = layout(said.get("tensors", []))
            return said, unpack(found, self._exactly(nbytes(found), until))

    def _exactly(self, size: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            assert self._socket is not None
            self._socket.settimeout(_left(until))
            piece = self._socket.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise ConnectionError("the agent closed the connection")
            data += piece
        return bytes(data)

    @contextlib.contextmanager
    def _talking(self, until: float) -> Iterator[socket.socket]:
        """The open socket, around a piece of work: failures are told, and a connection that broke is closed."""
        what, fix = "No agent answers on this device.", "Start it: shoal agent run."
        try:
            if self._socket is None:
                self._socket = connect(self._path, _left(until))
            what, fix = "The agent went away.", "Try again; see: shoal agent status."
            self._socket.settimeout(_left(until))
            yield self._socket
        except TimeoutError:
            self.close()
            raise LinkError("The agent did not answer in time.", "The deadline has passed.", "Try again.") from None
        except OSError as error:
            self.close()
            raise LinkError(what, f"{self._path}: {error.strerror or error}.", fix) from None


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _told(said: object) -> ShoalError:
    """The error that the agent tells of, in its family."""
    fields = said if isinstance(said, dict) else {}
    code = fields.get("code")
    what, why, fix = (str(fields.get(name, "")) for name in ("what", "why", "fix"))
    return Failure(code if isinstance(code, int) else 0, what, why, fix).error()


def _unreadable(why: str) -> LinkError:
    return LinkError("A frame between app and agent cannot be read.", f"{why[:1].upper()}{why[1:]}.", "Upgrade shoal.")
