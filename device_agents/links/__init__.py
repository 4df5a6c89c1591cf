"""Links: reliable, ordered bytes between a device and an edge, over TCP or over a serial line.

An `Address` says where, `connect` and `listen` give a `Transport`, and what is above need not know which kind it is.
Nothing here is secret or authentic: pairing and TLS stand above. This module knows nothing of messages.
"""

import abc
import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl

from shoal.runtime.errors import ShoalError, UsageError

DEFAULT_PORT = 4707
DEFAULT_BAUD = 115_200
_FORMS = "Write host:port, [address]:port, or serial:/dev/ttyUSB0?baud=115200."
_UNTIMED = re.compile(r"/dev/(ttyACM|ttyGS|cu\.usbmodem|tty\.usbmodem|rfcomm)|socket://")  # the baud rate says nothing


@dataclass(frozen=True)
class Address:
    """Where a peer is: a TCP host and port, or a serial device and its line rate.

    `device` is a path (/dev/ttyUSB0, COM3) or a URL that pyserial opens (socket://host:port, rfc2217://host:port).
    `baud` is None where a number would say nothing about how fast bytes leave (USB-CDC, Bluetooth, socket://).
    `flow` is "" or "rtscts" (hardware flow control; XON/XOFF cannot carry binary data).
    """

    kind: str  # "tcp" | "serial"
    host: str = ""  # "" = every interface (to listen) or this machine (to connect)
    port: int = DEFAULT_PORT
    device: str = ""
    baud: int | None = None
    flow: str = ""

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address that a person wrote; `str()` of it parses to the same again. Raises UsageError."""
        if not text.isprintable() or not text.strip() or " " in text or len(text) > 500:
            raise _unreadable(text, "it is empty, very long, or has spaces in it")
        if text.startswith("serial:"):
            return _serial(text)
        rest = text.removeprefix("tcp:").removeprefix("//")
        match = re.fullmatch(r"\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\](?::(\d+))?", rest) or re.fullmatch(
            r"([\w.-]*)(?::(\d+))?", rest
        )
        if match is None:
            many = rest.count(":") > 1
            raise _unreadable(text, "an IPv6 address stands in brackets" if many else "it is neither a host nor a port")
        host, port = match[1], match[2]
        if host.isdecimal() or not (host or port):
            raise _unreadable(text, "it names no host")
        number = DEFAULT_PORT if port is None else int(port) if len(port) < 6 else 65_536
        if number > 65_535:
            raise _unreadable(text, "a port is at most 65535")
        return cls("tcp", host=host, port=number)

    def __str__(self) -> str:
        if self.kind == "serial":
            options = [f"baud={self.baud}"] if self.baud else []
            options += [f"flow={self.flow}"] if self.flow else []
            return f"serial:{self.device}" + ("?" + "&".join(options) if options else "")
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def name(self) -> str:
        """For people: "tcp 10.0.0.2:4707", "serial /dev/ttyUSB0 at 115200 baud"."""
        if self.kind == "serial":
            return f"serial {self.device}" + (f" at {self.baud} baud" if self.baud else "")
        return f"tcp {self}"

    @property
    def rate(self) -> float | None:
        """Bytes a second that the line carries where that is known: a byte is ten bits (8N1)."""
        return self.baud / 10 if self.baud else None


def _serial(text: str) -> Address:
    device, _, query = text.removeprefix("serial:").partition("?")
    if not device or ("://" in device and not device.startswith(("socket://", "rfc2217://"))):
        raise _unreadable(text, "a serial line is a device, socket://host:port or rfc2217://host:port")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - {"baud", "flow"})
    if unknown:
        raise _unreadable(text, f"it knows baud and flow, not {', '.join(unknown)}")
    baud, flow = options.get("baud"), options.get("flow", "")
    if flow not in ("", "rtscts"):
        raise _unreadable(text, "flow is rtscts or left out; XON/XOFF cannot carry binary data")
    if baud is None:
        return Address("serial", device=device, baud=None if _UNTIMED.match(device) else DEFAULT_BAUD, flow=flow)
    if not (baud.isdecimal() and len(baud) < 9 and 300 <= int(baud) <= 20_000_000):
        raise _unreadable(text, "baud is a number from 300 to 20000000")
    return Address("serial", device=device, baud=int(baud), flow=flow)


def _unreadable(text: str, why: str) -> UsageError:
    return UsageError(f"{text[:100]!r} is no address.", f"Read as one, {why}.", _FORMS)


class Transport(abc.ABC):
    """Reliable, ordered bytes, whatever is below. One task reads and one writes at a time.

    `name` is for people, `rate` the line's bytes a second where known, `sent` and `received` count bytes on the wire
    with the link's own framing.
    """

    name: str
    rate: float | None
    sent: int
    received: int

    @abc.abstractmethod
    async def read(self) -> bytes:
        """What has arrived, at least a byte; b"" after a clean end. Raises LinkError where the link broke."""

    @abc.abstractmethod
    async def write(self, data: bytes) -> None:
        """Sends `data`; returns when little more than nothing is still ahead of the next byte, so that who holds
        chunks by priority decides late. Raises LinkError."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the link; what was written is still delivered if the peer takes it soon. Never raises; may repeat."""

    @abc.abstractmethod
    async def closed(self) -> None:
        """Returns when the link is over and holds nothing any more."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Ends the link at once, whatever has not been sent."""


Accept = Callable[[Transport], Awaitable[None]]


class Listener(abc.ABC):
    """Waits for peers; each becomes a Transport and a task of the caller's `accept`. `address` has the real port."""

    def __init__(self, address: Address, accept: Accept):
        self.address, self._accept = address, accept
        self._tasks: set[asyncio.Task] = set()  # the loop itself holds tasks only weakly

    @abc.abstractmethod
    def close(self) -> None:
        """Takes nobody any more. Transports that it gave live on."""

    @abc.abstractmethod
    async def closed(self) -> None:
        """Returns when the port is free again: a serial one once its last transport is over."""

    def serve(self, transport: Transport) -> None:
        """Starts `accept` for a new peer and closes its transport after it. A ShoalError is that link's own end."""
        task = asyncio.get_running_loop().create_task(self._serve(transport))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, transport: Transport) -> None:
        try:
            await self._accept(transport)
        except ShoalError:
            pass
        except Exception as error:
            context = {"message": f"accepting {transport.name} failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
        finally:
            transport.close()


async def connect(address: Address, timeout: float = 10.0) -> Transport:
    """A link to the peer that listens at `address`. Raises LinkError after `timeout` seconds or sooner."""
    if address.kind == "serial":
        from . import serial

        return await serial.connect(address, timeout)
    from . import tcp

    return await tcp.connect(address, timeout)


async def listen(address: Address, accept: Accept) -> Listener:
    """Gives each peer that dials to `accept`, each in its own task. A serial line holds one peer at a time: one that
    starts anew ends its earlier Transport with a LinkError. Raises LinkError where the address cannot be had."""
    if address.kind == "serial":
        from . import serial

        return await serial.listen(address, accept)
    from . import tcp

    return await tcp.listen(address, accept)
