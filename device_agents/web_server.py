"""`web.create_app` on a port, inside the event loop that the edge runs in.

It promises that a page others can reach is served over TLS only, that clients who hold connections open cannot take the
edge's file descriptors, and that `stop` ends in seconds. It handles no signals: the daemon does.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

from shoal.runtime.errors import MissingPackageError, UsageError

from .snapshot import Watched
from .web import DEFAULT_PORT, create_app

_CONNECTIONS = 64  # at once; a page takes one for its events and one or two for the rest
_HEAD_SECONDS = 10.0  # for a request's head to arrive
_STOP_SECONDS = 2


class WebServer:
    """`async with WebServer(...) as server:` or start() and stop(). `url` is set once it listens."""

    def __init__(
        self, edge: Watched, token: str, host: str = "127.0.0.1", port: int = DEFAULT_PORT, *,
        names: Collection[str] = (), certificate: Path | None = None, key: Path | None = None,
    ):  # fmt: skip
        """`certificate` and `key` are PEM files; without them it is plain HTTP, on loopback only. Raises UsageError."""
        if certificate is None and not _is_loopback(host):
            raise UsageError(f"{host} can be reached from outside.", "There is no certificate for TLS.", "Give one.")
        self.host, self.port, self.url = host, port, ""
        self._app = create_app(edge, token, names=names, secure=certificate is not None)
        self._certificate, self._key = certificate, key
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once it listens. Raises UsageError for an address that is taken or a certificate that is not one."""
        bound = _bind(self.host, self.port)
        try:
            self._server = _server(self._app, self._certificate, self._key)
        except OSError as error:  # ssl.SSLError is one
            bound.close()
            raise UsageError("The certificate cannot be used.", f"{error}.", "Give one pair of PEM files.") from None
        except BaseException:
            bound.close()
            raise
        name, self.port = bound.getsockname()[:2]
        self.url = f"http{'s' if self._certificate else ''}://{f'[{name}]' if ':' in name else name}:{self.port}/"
        self._task = asyncio.create_task(self._server.serve([bound]), name="web")
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        if self._task is not None:
            self._app.state.site.close()
            self._server.should_exit = True
            await self._task
            self._task = None

    async def __aenter__(self) -> "WebServer":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def _bind(host: str, port: int) -> socket.socket:
    try:
        name = "127.0.0.1" if host == "localhost" else host
        family, kind, protocol, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            bound.bind(address)
            stack.pop_all()
        return bound
    except (OSError, OverflowError) as error:
        raise UsageError(f"Cannot listen on {host} port {port}.", f"{error}.", "Choose another port or host.") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server(app: Any, certificate: Path | None, key: Path | None) -> Any:
    try:
        import uvicorn
        from uvicorn.protocols.http import h11_impl
    except ImportError:
        raise MissingPackageError(
            "The dashboard cannot be served.", "uvicorn is missing.", "pip install 'shoal[edge]'"
        ) from None

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            return contextlib.nullcontext()

    class Bounded(h11_impl.H11Protocol):
        """Too many connections, or one on which no request's head becomes complete, are closed unheard."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.server_state.connections) > _CONNECTIONS:
                transport.close()
            else:
                self.loop.call_later(_HEAD_SECONDS, self._look, self._state())

        def _state(self) -> tuple[bool, object]:
            return self.conn.their_state is h11_impl.h11.IDLE, self.cycle

        def _look(self, before: tuple[bool, object]) -> None:
            if before[0] and before == self._state():
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(_HEAD_SECONDS, self._look, self._state())

    config = uvicorn.Config(
        app, http=Bounded, ws="none", lifespan="off", log_config=None, log_level="warning", access_log=False,
        server_header=False, date_header=False, proxy_headers=False, timeout_keep_alive=15,
        timeout_graceful_shutdown=_STOP_SECONDS, h11_max_incomplete_event_size=16 << 10,
        ssl_certfile=certificate, ssl_keyfile=key,
    )  # fmt: skip
    config.load()
    return Server(config)
