"""The way of a split network's client to the edge that this device is paired with, by its agent.

    link = PairedLink("cats")                              # shoal agent --model cats=cats.device.shoal
    with Client("cats.device.shoal", link) as client:
        result = client.run(image, deadline=0.1)

A request is a message that the codec of a mode wrote, and the mode's number. The agent sends both over the connection
that it keeps, TCP or a serial cable, under what was agreed: an edge whose tail has other tables is never asked, and one
that is sent what its own codec would not make refuses it before anything is computed. It knows nothing about encoders,
and nothing about TLS.
"""

import threading
import time
from pathlib import Path

from shoal.runtime.errors import BusyError, LinkError, ShoalError
from shoal.runtime.split.link import Reply, late

from .apps import LONGEST, App

_KEPT = 8  # connections to the agent that wait for the next request


class PairedLink:
    """A link (runtime.split.link) for `model`, as this device's agent calls it; the only one if "". Several threads may
    ask at once. `modes` are those that were agreed with the edge when the agent last said, None before."""

    def __init__(self, model: str = "", path: Path | str | None = None):
        """`path` is the agent's socket, by default where it is. Opens nothing yet: a link may come later."""
        self.modes: tuple[int, ...] | None = None
        self._model, self._path = model, path
        self._lock, self._idle, self._closed = threading.Lock(), list[App](), False

    def ask(self, mode: int, message: bytes, timeout: float) -> Reply:
        """The edge's answer. Raises BusyError where it does not come within `timeout` seconds or the edge is not to be
        asked now, LinkError where there is no agent, no link, or where the edge makes nothing of the message."""
        if timeout <= 0:
            raise late(timeout)
        until = time.monotonic() + timeout
        with self._lock:
            if self._closed:
                raise LinkError("The link is closed.", "close() was called.", "Open another.")
            app = self._idle.pop() if self._idle else App(self._path)
        found: Reply | ShoalError
        try:
            found, self.modes = app.ask(mode, message, min(timeout, LONGEST), self._model)
        except ShoalError as error:
            found = error if time.monotonic() < until else late(timeout)
        finally:
            self._keep(app)
        if isinstance(found, ShoalError):
            raise found if isinstance(found, BusyError | LinkError) else LinkError(found.what, found.why, found.fix)
        return found

    def close(self) -> None:
        """Ends the connections to the agent that nobody waits on."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for app in idle:
            app.close()

    def _keep(self, app: App) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _KEPT:
                return self._idle.append(app)
        app.close()

    def __enter__(self) -> "PairedLink":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
