"""Who may ask: names, keys and web origins, checked before a request is read, and every answer counted.

A server on loopback answers only to its own names: a page whose DNS name was re-pointed at 127.0.0.1 sends its own
name in the Host header. A key is compared in constant time. Web pages of other origins get no CORS headers unless
their origin is listed. It knows nothing about models; it wraps any ASGI application.
"""

import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .server_metrics import Metrics

log = logging.getLogger("shoal.server")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_OPEN = "/health"  # asks for no key: it says only that the server lives


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """Wraps `app`. `api_key` "" asks for none, `hosts` () takes any Host header; `paths` are what metrics may name."""

    def __init__(
        self, app: Any, metrics: Metrics, paths: Collection[str], *, api_key: str = "", hosts: Collection[str] = ()
    ):
        self.app, self.metrics, self.paths, self.hosts = app, metrics, paths, hosts
        self._key = _digest(api_key.encode()) if api_key else b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":  # the server's own start and stop; web sockets are off
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def sending(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            refused = self._refuse(scope)
            await (refused or self.app)(scope, receive, sending)
        except TimeoutError:  # leaving before the response is complete closes its connection
            log.warning("%r: closed, the client stopped reading", scope["path"])
        except Exception as error:  # it was answered with 500; the connection's next request shall not pay for it
            log.error("%s %r failed", scope["method"], scope["path"], exc_info=error)
        finally:
            seconds = time.monotonic() - begun
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.count("shoal_requests_total", endpoint=path, status=str(status or 500))
            self.metrics.observe("shoal_request_seconds", seconds, endpoint=path)
            log.info("%s %s %d %.3fs", scope["method"], path, status, seconds)

    def _refuse(self, scope: Any) -> JSONResponse | None:
        headers = Headers(scope=scope)
        named = headers.getlist("host")
        if self.hosts and (len(named) != 1 or _hostname(named[0]) not in self.hosts):
            return _error(403, "host_not_allowed", "This server does not answer to the name in the Host header.")
        if self._key and scope["path"] != _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Digests have one length, so the comparison tells nothing about the key's
            right = hmac.compare_digest(_digest(given.strip().encode("latin-1", "replace")), self._key)
            if scheme.lower() != "bearer" or not right:
                why = "Send the API key of this server: 'Authorization: Bearer KEY'."
                return _error(401, "invalid_api_key", why, {"www-authenticate": "Bearer"})
        return None


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _hostname(host: str) -> str:
    """The name in a Host header, without its port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = "authentication_error" if status == 401 else "permission_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)
