"""Links over TCP. Little is allowed to queue in the kernel, and a peer that vanished is noticed there too."""

import asyncio
import contextlib
import socket

from shoal.runtime.errors import LinkError

from . import Accept, Address, Listener, Transport

_UNSENT = 16 * 1024  # bytes that may wait in the kernel before the next priority decision
_READ = 64 * 1024
_GONE = 30  # seconds without a sign of the peer before the kernel gives up


async def connect(address: Address, timeout: float) -> Transport:
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(
                address.host or "localhost", address.port, limit=_READ, happy_eyeballs_delay=0.25
            )
    except TimeoutError:
        raise LinkError(
            f"{address.name} did not answer.",
            f"Nothing came within {timeout:g} seconds.",
            "Check the address, the network and any firewall between.",
        ) from None
    except (OSError, UnicodeError) as error:
        raise LinkError(
            f"{address.name} cannot be reached.",
            f"{_reason(error)}.",
            "Check the address, and that the edge runs there.",
        ) from None
    return TcpTransport(reader, writer, address.name)


async def listen(address: Address, accept: Accept) -> Listener:
    try:
        if address.host:
            server_socket = await _bind(address)
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server_socket = socket.create_server(("", address.port), family=family, dualstack_ipv6=both)
        listener = TcpListener(Address("tcp", address.host, server_socket.getsockname()[1]), accept)
        listener.server = await asyncio.start_server(listener.take, sock=server_socket, limit=_READ)
    except (OSError, UnicodeError) as error:
        raise LinkError(
            f"{address.name} cannot be listened to.",
            f"{_reason(error)}.",
            "Choose another port, or stop the program that has it.",
        ) from None
    return listener


async def _bind(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, *_, place = found[0]
    return socket.create_server(place[:2] if family == socket.AF_INET else place, family=family)


class TcpTransport(Transport):
    rate = None

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str):
        self.name, self.sent, self.received = name, 0, 0
        self._reader, self._writer = reader, writer
        self._closing = False
        writer.transport.set_write_buffer_limits(high=0)  # drain() returns once the kernel has everything
        connection = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):  # a peer that is already gone: the first read will say so
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (
                ("TCP_NOTSENT_LOWAT", _UNSENT),
                ("TCP_USER_TIMEOUT", _GONE * 1000),
                ("TCP_KEEPIDLE", 10),
                ("TCP_KEEPINTVL", 5),
                ("TCP_KEEPCNT", 4),
            ):
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    async def read(self) -> bytes:
        try:
            data = await self._reader.read(_READ)
        except OSError as error:
            if self._closing:
                return b""
            raise self._broken(error) from None
        self.received += len(data)
        return data

    async def write(self, data: bytes) -> None:
        if self._closing:
            raise LinkError(f"The link over {self.name} is closed.", "This side closed it.", "Connect again.")
        try:
            self._writer.write(data)
            self.sent += len(data)
            await self._writer.drain()
        except OSError as error:
            raise self._broken(error) from None

    def close(self) -> None:
        self._closing = True
        self._writer.close()

    async def closed(self) -> None:
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        self._closing = True
        self._writer.transport.abort()

    def _broken(self, error: OSError) -> LinkError:
        return LinkError(f"The link over {self.name} broke.", f"{_reason(error)}.", "Connect again.")


class TcpListener(Listener):
    server: asyncio.Server

    def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = (writer.get_extra_info("peername") or ("an unknown peer", 0))[:2]
        host = host.removeprefix("::ffff:")  # IPv4 by a socket of both
        self.serve(TcpTransport(reader, writer, Address("tcp", host, port).name))

    def close(self) -> None:
        self.server.close()

    async def closed(self) -> None:
        await asyncio.sleep(0)  # the loop lets go of the socket in its next turn


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rstrip(".") or type(error).__name__
