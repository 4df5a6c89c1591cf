"""From an address to a running server: bind, check that it is safe to listen there, serve, drain, stop.

It promises that a port is taken or refused before a model is loaded, that a server which others can reach has a key,
and that stopping waits for running requests, but never longer than it was told to. It knows nothing about requests.
"""

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from shoal.runtime.errors import ShoalError, UsageError

from .server_gate import LOOPBACK_NAMES, Gate, is_loopback

if TYPE_CHECKING:
    from .server import Service

_HEAD_SECONDS = 10.0  # for a request's head to arrive; uvicorn itself would wait for ever
_CONNECTIONS = 256  # beside those that the slots and queues account for
_TCP = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}  # s, s, probes, ms


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket bound to `host`:`port` (0: any free port), not listening yet. Raises UsageError."""
    if not 0 <= port <= 65535:
        raise UsageError(f"Cannot listen on port {port}.", "Ports are 0 to 65535.", "Choose one.")
    name = "127.0.0.1" if host == "localhost" else host  # not ::1, which half of all clients would not try
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A peer that vanished without a word, or takes nothing, is dropped after 30 s; connections inherit this
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _TCP.items():
                if hasattr(socket, option):
                    bound.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            bound.bind(address)
            stack.pop_all()
        return bound
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        fix = "Choose another port, or stop what uses it." if taken else "Choose another host or port."
        raise UsageError(f"Cannot listen on {host} port {port}.", f"{error.strerror or error}.", fix) from None


def guarded(
    service: "Service", host: str, *, api_key: str = "", allow_hosts: Sequence[str] = (), origins: Sequence[str] = ()
) -> Any:
    """`service` behind its gate, as an ASGI application for a server bound to `host`.

    Raises UsageError where others could reach it without a key.
    """
    local = is_loopback(host)
    if not local and not api_key:
        raise UsageError(f"{host} can be reached from outside.", "There is no API key.", "Give one.")
    if not all(" " < letter <= "~" for letter in api_key):
        raise UsageError("The API key cannot be sent.", "It holds spaces or letters beyond ASCII.", "Choose another.")
    if "*" in origins and not api_key:
        raise UsageError("Any web page could use the models.", "The origin is '*' and there is no key.", "Give a key.")
    names = {name.lower() for name in (*LOOPBACK_NAMES, host, *allow_hosts)} if local or allow_hosts else ()
    app: Any = Gate(service.app, service.metrics, service.paths, api_key=api_key, hosts=names)
    if origins:
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


def listen(
    app: Any, bound: socket.socket, *, connections: int, drain_seconds: float = 30.0, certificate: str | None = None,
    private_key: str | None = None, ready: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Serves `app` until SIGINT or SIGTERM, then lets running requests end, for at most `drain_seconds`.

    `connections` is how many may be open at once, beside a reserve; a further one gets 503. `ready` is called when
    the first request can come. A second SIGINT stops at once. Raises UsageError for an unusable certificate.
    """
    try:
        config = uvicorn.Config(
            app, http=_Impatient, ws="none", lifespan="off", loop="asyncio", log_config=None, log_level="warning",
            access_log=False,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=max(1, round(drain_seconds)),
            limit_concurrency=connections + _CONNECTIONS, ssl_certfile=certificate, ssl_keyfile=private_key,
        )  # fmt: skip
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(
            "The certificate cannot be used.", f"{error}.", "Give the PEM files of one key pair."
        ) from None
    server = _Server(config, ready)
    # uvicorn handles both signals while it runs and raises them again afterwards; by then they have done their work
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not server.started:
        raise ShoalError("The server did not start.", "Its socket was refused; the log says more.", "Try again.")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


class _Impatient(H11Protocol):
    """Closes a connection on which no request's head has become complete for a while."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_HEAD_SECONDS, self._look, self._state())

    def _state(self) -> tuple[bool, Any]:
        return self.conn.their_state is h11.IDLE, self.cycle

    def _look(self, before: tuple[bool, Any]) -> None:
        if self.transport.is_closing():
            return
        if before[0] and before == self._state():
            self.transport.close()
        else:
            self.loop.call_later(_HEAD_SECONDS, self._look, self._state())
