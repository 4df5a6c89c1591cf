"""Calls that must come back in time: foreign code (a driver, a backend's library) may hang, and who called it may not.

A `Worker` runs calls in a thread of its own, one after another. A call that is late is given up: its thread cannot be
killed, so it is left behind, and the worker is lost with it. This module knows nothing about what is called.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any


class Late(Exception):
    """A call did not come back in time; it may still be running, in a thread that nobody waits for."""


class Worker:
    """A thread that runs calls in their order. `lost` once one was late: then every further call is `Late` at once."""

    def __init__(self, name: str):
        self.name, self.lost = name, False
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()

    def call(self, work: Callable[[], Any], seconds: float) -> Any:
        """What `work()` returns or raises. Raises Late after `seconds`."""
        with self._turn:
            if self.lost:
                raise Late(f"{self.name} did not come back from an earlier call")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)
                self._thread.start()
            call = _Call(work)
            self._calls.put(call)
            if not call.done.wait(seconds):
                self.lost = True
                raise Late(f"{self.name} did not come back within {seconds:g} s")
        if call.error is not None:
            raise call.error
        return call.value

    def close(self) -> None:
        """Lets the thread end after what it is at."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()
            del call  # what it holds must not live until the next one


class _Call:
    def __init__(self, work: Callable[[], Any]):
        self.work, self.done = work, threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:
            self.error = error
        self.done.set()


def within(seconds: float, work: Callable[[], Any], name: str) -> Any:
    """What `work()` returns or raises, run in a thread of its own. Raises Late after `seconds`."""
    worker = Worker(name)
    try:
        return worker.call(work, seconds)
    finally:
        worker.close()
