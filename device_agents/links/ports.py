"""Serial ports as a session sees them: bytes in by a callback, bytes out without waiting, and how many still wait.

A port on a file descriptor (UART, USB-CDC, pseudo-terminal) lives in the event loop; a URL that pyserial opens
(socket://, rfc2217://) has a thread to read and one to write. This module knows nothing of frames.
"""

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from shoal.runtime.errors import LinkError, MissingPackageError

from . import DEFAULT_BAUD, Address

_READ = 64 * 1024


class Sink(Protocol):
    """Who gets what a port reads."""

    def feed(self, data: bytes) -> None: ...
    def ready(self) -> None: ...  # something that waited in the port has left
    def gone(self, why: str) -> None: ...


class Port(Protocol):
    sink: Sink

    def write(self, data: bytes) -> None: ...
    def waiting(self) -> int: ...  # bytes not yet on the line, as far as anybody knows
    def close(self) -> None: ...


class _Descriptor:
    """A port with a file descriptor that the event loop can watch: a UART, USB-CDC, a pseudo-terminal."""

    sink: Sink

    def __init__(self, port: Any):
        self._port, self._descriptor = port, port.fileno()
        self._loop = asyncio.get_running_loop()
        self._left = bytearray()  # what the kernel has not taken yet
        self._loop.add_reader(self._descriptor, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._descriptor, _READ)
        except BlockingIOError:
            return
        except OSError as error:
            return self._lost(error)
        if data:
            self.sink.feed(data)
        else:
            self._lost(None)

    def write(self, data: bytes) -> None:
        self._left += data
        self._writable()

    def _writable(self) -> None:
        if self._descriptor < 0:
            return
        try:
            del self._left[: os.write(self._descriptor, self._left)]
        except BlockingIOError:
            pass
        except OSError as error:
            # Not from here: who writes is in the middle of its own turn
            self._loop.call_soon(self._lost, error)
            return
        if self._left:
            self._loop.add_writer(self._descriptor, self._drained)
        else:
            self._loop.remove_writer(self._descriptor)

    def _drained(self) -> None:
        self._writable()
        if not self._left:
            self.sink.ready()

    def waiting(self) -> int:
        queued = 0
        with contextlib.suppress(OSError, AttributeError, TypeError):  # no TIOCOUTQ here, or unplugged
            queued = self._port.out_waiting
        return queued + len(self._left)

    def _lost(self, error: OSError | None) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            self._loop.remove_writer(self._descriptor)
            self.sink.gone("the port vanished" if error is None else f"the port failed: {error.strerror}")

    def close(self) -> None:
        if self._descriptor < 0:
            return
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        draining = self.waiting() > len(self._left)
        self._descriptor = -1
        if draining:  # the kernel lets go of a UART only when it is empty, and flow control may stop that for long
            threading.Thread(target=self._port.close, daemon=True).start()
        else:
            self._port.close()


class _Threaded:
    """A port that can only be waited for: one thread reads, one writes."""

    sink: Sink

    def __init__(self, port: Any):
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._queued = 0
        self._open = True
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"serial {port.port}", daemon=True).start()

    def _read(self) -> None:
        try:
            while self._open:
                if data := self._port.read(max(1, min(self._port.in_waiting, _READ))):
                    self._tell(partial(self._arrived, data))
        except Exception as error:  # pyserial and what it stands on raise what they like once a port is gone
            self._tell(partial(self._failed, error))

    def _write(self) -> None:
        try:
            while (data := self._queue.get()) is not None:
                self._port.write(data)
                self._tell(partial(self._left, len(data)))
        except Exception as error:
            self._tell(partial(self._failed, error))
            while self._queue.get() is not None:
                pass
        self._port.close()

    def _tell(self, what: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is over, and so is everybody who could want to know
            self._loop.call_soon_threadsafe(lambda: what() if self._open else None)

    def _arrived(self, data: bytes) -> None:
        self.sink.feed(data)

    def _left(self, count: int) -> None:
        self._queued -= count
        self.sink.ready()

    def _failed(self, error: Exception) -> None:
        self.sink.gone(f"the port failed: {error}")

    def write(self, data: bytes) -> None:
        self._queued += len(data)
        self._queue.put(data)

    def waiting(self) -> int:
        return self._queued

    def close(self) -> None:
        self._open = False
        self._queue.put(None)


async def open_port(address: Address) -> Port:
    try:
        import serial
    except ImportError:
        raise MissingPackageError(
            "Serial lines need pyserial.", "It is not installed.", "Install it: pip install 'shoal[agent]'."
        ) from None

    def opened() -> Any:
        path = "://" not in address.device
        port = serial.serial_for_url(
            address.device,
            do_not_open=True,
            baudrate=address.baud or DEFAULT_BAUD,
            timeout=0.2,
            write_timeout=None,
            rtscts=address.flow == "rtscts",
        )
        if path and os.name == "posix":
            port.exclusive = True  # two programs on one line would each get half of what comes
        port.open()
        if path:
            with contextlib.suppress(OSError, ValueError, NotImplementedError, AttributeError):
                port.set_low_latency_mode(True)  # USB adapters otherwise hold bytes back for 16 ms
        return port

    try:
        port = await asyncio.to_thread(opened)
    except (OSError, ValueError) as error:  # a SerialException is an OSError
        raise LinkError(
            f"{address.name} cannot be opened.",
            sentence(_reason(error)),
            "Check the device server's address, and that nobody else is connected to it."
            if "://" in address.device
            else "Check the device's name, that you may use it (group dialout), and that nobody else has it open.",
        ) from None
    if "://" in address.device or os.name != "posix":
        return _Threaded(port)
    _raw(port.fileno())
    return _Descriptor(port)


def _raw(descriptor: int) -> None:
    """pyserial asks the kernel to end a read that finds nothing; here only a line that hangs up reads as nothing."""
    import termios

    attributes = termios.tcgetattr(descriptor)
    attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 1, 0
    termios.tcsetattr(descriptor, termios.TCSANOW, attributes)
    os.set_blocking(descriptor, False)


def _reason(error: Exception) -> str:
    code = getattr(error, "errno", None)
    return os.strerror(code) if isinstance(code, int) else str(error)


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
