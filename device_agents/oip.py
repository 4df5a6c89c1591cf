"""A tail that an inference server runs: a client of the Open Inference Protocol v2 over HTTP.

Triton, KServe, OpenVINO Model Server and MLServer all speak it, so an edge may forward a tail to any of them: a
`RemoteSession` has the face of `runtime.session.Session` (inputs, outputs, run, close). Tensors travel as raw
little-endian bytes where the server lists the extension "binary_tensor_data", else as JSON. Connections are kept alive;
every call ends within its time-out, however slowly the server drips; and an answer is checked before it is believed.
"""

import contextlib
import http.client
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from shoal.runtime.errors import BusyError, LinkError, RemoteError, ShoalError, UsageError
from shoal.runtime.session import Value

from .oip_body import DATATYPES, DIMS, JSON_LENGTH, TENSORS, decode, encode, shown, split, wrong

MAX_BYTES = 64 << 20  # of an answer
_IDLE = 8  # connections kept
_PIECE = 1 << 18


class RemoteSession:
    """A model on an inference server. Several threads may `run` at once.

    `inputs` and `outputs` are what the server says of the model, empty where it says nothing. It is asked once, when
    the session is opened: LinkError when it cannot be reached, RemoteError when it has no such model.
    """

    def __init__(
        self, url: str, model: str, version: str = "", *, timeout: float = 10.0, binary: bool | None = None,
        headers: Mapping[str, str] | None = None, max_bytes: int = MAX_BYTES, tls: ssl.SSLContext | None = None,
    ):  # fmt: skip
        """`timeout` in seconds holds for a call from begin to end; `binary` None: as the server says of itself."""
        parts = urlsplit(url)
        try:
            self._host, self._port = parts.hostname, parts.port
        except ValueError:
            self._host = None
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.username is not None:
            raise UsageError(f"{url!r} is no server's address.", "It is not http(s)://HOST[:PORT].", "Mend it.")
        self.url, self.model, self.timeout, self.max_bytes = url, model, timeout, max_bytes
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._headers = {"Accept-Encoding": "identity", **(headers or {})}
        self._root = parts.path.rstrip("/") + "/v2"
        self._path = f"{self._root}/models/{quote(model, safe='')}"
        if version:
            self._path += f"/versions/{quote(version, safe='')}"
        self._idle: list[http.client.HTTPConnection] = []
        self._closed = False
        with self._or_close():
            if binary is None:
                extensions = self._get(self._root).get("extensions")
                binary = isinstance(extensions, list) and "binary_tensor_data" in extensions
            self.binary = binary
            about = self._get(self._path)
            self.inputs, self.outputs = _values(about.get("inputs")), _values(about.get("outputs"))

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None, *, timeout: float | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """The named outputs (all by default). Raises LinkError, RemoteError, BusyError; an answer is checked first.

        A failed call may have been computed; it may be made again, for a tail keeps no state.
        """
        told = dict(parameters or {}) | ({"binary_data_output": True} if self.binary else {})
        about: dict[str, Any] = {"parameters": told} if told else {}
        if outputs:
            raw = {"parameters": {"binary_data": True}} if self.binary else {}
            about["outputs"] = [{"name": name, **raw} for name in outputs]
        headers, parts = encode("inputs", feeds, about, binary=self.binary)
        answer, body = self._ask("POST", self._path + "/infer", headers, parts, timeout)
        found, _ = decode("outputs", body, answer.get(JSON_LENGTH))
        if outputs and (missing := [name for name in outputs if name not in found]):
            raise wrong(f"Output {shown(missing[0])} is missing.")
        return {name: found[name] for name in outputs} if outputs else found

    def ready(self) -> bool:
        """Whether the server would run the model now. Raises LinkError when it cannot be reached."""
        try:
            self._ask("GET", self._path + "/ready")
        except (RemoteError, BusyError):
            return False
        return True

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> "RemoteSession":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _or_close(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _get(self, path: str) -> dict[str, Any]:
        return split(self._ask("GET", path)[1], None)[0]

    def _ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, parts: Sequence[bytes] = (),
        timeout: float | None = None,
    ) -> tuple[http.client.HTTPMessage, bytes]:  # fmt: skip
        """An answer of status 200 and its whole body."""
        if self._closed:
            raise UsageError(f"The session with {self.url} is closed.", "close() was called.", "Open another.")
        timeout = self.timeout if timeout is None else timeout
        end = time.monotonic() + timeout
        length = {"Content-Length": str(sum(map(len, parts)))} if parts else {}
        sent = {**self._headers, **(headers or {}), **length}
        while True:
            connection, fresh = self._connection(end)
            expired = threading.Event()
            watch = threading.Timer(max(0.0, end - time.monotonic()), _cut, (connection, expired))
            watch.daemon = True
            watch.start()
            kept = False
            try:
                connection.request(method, path, iter(parts) if parts else None, sent)
                response = connection.getresponse()
                body = self._body(response)
                kept = not response.will_close and not expired.is_set() and not self._closed
                if expired.is_set():
                    raise TimeoutError
                return self._judged(response, body)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
                if fresh or expired.is_set():
                    raise self._broken(error, expired, timeout) from None
                # The server had closed it while it was idle: the request was not read
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self._broken(error, expired, timeout) from None
            finally:
                watch.cancel()
                if kept and not expired.is_set() and len(self._idle) < _IDLE:
                    self._idle.append(connection)
                else:
                    connection.close()

    def _connection(self, end: float) -> tuple[http.client.HTTPConnection, bool]:
        """One that is idle, or a new one that is not connected yet; and whether it is new."""
        left = max(0.001, end - time.monotonic())
        with contextlib.suppress(IndexError):
            connection = self._idle.pop()
            if connection.sock is not None:
                connection.sock.settimeout(left)
            return connection, False
        assert self._host is not None
        if self._tls is not None:
            return http.client.HTTPSConnection(self._host, self._port, timeout=left, context=self._tls), True
        return http.client.HTTPConnection(self._host, self._port, timeout=left), True

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        expected = response.length
        if expected is not None and expected > self.max_bytes:
            raise wrong(f"It has {expected:,} bytes; at most {self.max_bytes:,} are taken.")
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise wrong("It is compressed, which was not asked for.")
        body = bytearray()
        while piece := response.read(_PIECE):
            body += piece
            if len(body) > self.max_bytes:
                raise wrong(f"It has more than {self.max_bytes:,} bytes.")
        if expected is not None and len(body) != expected:
            raise http.client.IncompleteRead(bytes(body), expected - len(body))
        return bytes(body)

    def _judged(self, response: http.client.HTTPResponse, body: bytes) -> tuple[http.client.HTTPMessage, bytes]:
        if response.status == 200:
            return response.headers, body
        why = f"HTTP {response.status}"
        with contextlib.suppress(ShoalError):
            said = split(body, None)[0].get("error")
            why += f": {shown(said, 300)}" if isinstance(said, str) and said else ""
        if response.status in (429, 503):
            raise BusyError(f"{self.url} takes no request for {self.model!r} now.", f"{why}.", "Compute elsewhere.")
        raise RemoteError(f"{self.url} did not run {self.model!r}.", f"{why}.", "Look at that server's log.")

    def _broken(self, error: Exception, expired: threading.Event, timeout: float) -> LinkError:
        if expired.is_set() or isinstance(error, TimeoutError):
            why = f"It took longer than {timeout:g} s."
        else:
            why = f"{type(error).__name__}: {shown(str(error), 200)}."
        return LinkError(f"{self.url} did not answer for {self.model!r}.", why, "See that it runs, and the network.")


def _cut(connection: http.client.HTTPConnection, expired: threading.Event) -> None:
    """Ends whatever waits on the connection: a socket's own time-out begins anew with every byte."""
    expired.set()
    sock = connection.sock
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(2)


def _values(tensors: Any) -> dict[str, Value]:
    """A model's inputs or outputs, as its metadata lists them."""
    if not isinstance(tensors or [], list) or len(tensors or []) > TENSORS:
        raise wrong("The model's metadata are no list of tensors.")
    found: dict[str, Value] = {}
    for tensor in tensors or []:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        if not isinstance(name, str) or str(tensor.get("datatype")) not in DATATYPES or not isinstance(shape, list):
            raise wrong("A tensor in the model's metadata has no name, type or shape.")
        if len(shape) > DIMS or not all(type(length) is int and -1 <= length < 1 << 31 for length in shape):
            raise wrong(f"Tensor {shown(name)} in the model's metadata has no shape.")
        dims = tuple(None if length < 0 else length for length in shape)
        found[name] = Value(name, np.dtype(DATATYPES[tensor["datatype"]]).newbyteorder("="), dims)
    return found
