"""The edge over HTTP: the dashboard's page, a live stream of snapshots, five buttons, and Prometheus' metrics.

It promises that nothing but the page itself (which holds no secret) and /health is given away without the token; that
no other web page can press a button; that the browser runs no script but the page's own; and that a slow, hostile or
vanished client costs at most one of a few streams. It knows an edge only as `snapshot.Watched`.

    GET  /          the page            GET  /metrics   Prometheus' text (cookie, or the token as bearer)
    GET  /session   signed in or not    GET  /events    server-sent events: a whole snapshot each (likewise)
    GET  /health    200                 GET  /snapshot  one snapshot (likewise)
    POST /session   {"token"}           POST /pairing   {"open": true | false}
    POST /devices   {"fingerprint", "name"} renames it, {"fingerprint", "revoke": true} ends its trust
    POST /session   {"token": ""} signs out
"""

import asyncio
import base64
import contextlib
import functools
import hashlib
import importlib.resources
import json
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.runtime.errors import BusyError, MissingPackageError, ShoalError, UsageError

from . import metrics
from .home import write_atomically
from .snapshot import Watched
from .web_gate import COOKIE, SESSION_SECONDS, Gate

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger("shoal.edge.web")

DEFAULT_PORT = 4780
STREAMS = 16  # at once, each a page that somebody looks at
_FASTEST, _SLOWEST = 0.25, 2.0  # seconds between two snapshots of a stream
_BODY_BYTES, _BODY_SECONDS = 4096, 10.0
_STATUS = {UsageError: 400, BusyError: 429}  # of what an edge raises; else 409
_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Refused(UsageError):
    """Becomes an HTTP answer of this status."""

    def __init__(self, status: int, what: str, why: str, fix: str):
        super().__init__(what, why, fix)
        self.status = status


def token_in(folder: Path) -> str:
    """The dashboard's token, kept in `folder` for this user alone, made on first use. Raises StorageError."""
    path = folder / "web.token"
    if not path.exists():
        write_atomically(path, (secrets.token_urlsafe(18) + "\n").encode())
    return path.read_text().strip()


class Site:
    """`edge` behind `token`: what each address answers, as Starlette calls it."""

    def __init__(self, edge: Watched, token: str, names: Collection[str], secure: bool, page: bytes):
        self.edge, self.gate, self.secure, self.page = edge, Gate(token, names), secure, page
        self._closing = False
        self._queues: set[asyncio.Queue[object]] = set()  # one a stream
        self._latest = (-math.inf, "")
        self._page_headers = {
            "cache-control": "no-cache",
            "content-security-policy": policy(page),
            "etag": f'"{hashlib.sha256(page).hexdigest()[:32]}"',
        }

    # Who asks

    def check_host(self, request: "Request") -> None:
        if not self.gate.answers_to(request.headers.getlist("host")):
            why = "The Host header holds a name that this edge does not go by."
            raise Refused(403, "The request was refused.", why, "Use its address, or start it with --web-name NAME.")

    def signed_in(self, request: "Request") -> bool:
        return self.gate.session(request.cookies.get(COOKIE, ""), time.time())

    def try_token(self, request: "Request", token: str) -> None:
        address = request.client.host if request.client else ""
        if not self.gate.check(token, address, time.monotonic()):
            log.warning("a wrong token came from %s", address)
            raise Refused(
                401, "The token is wrong.", "It is not this edge's.", "`shoal edge token` on the edge prints it."
            )

    def admit(self, request: "Request") -> None:
        """Passes a session's cookie, or the token as bearer."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            self.try_token(request, token.strip())
        elif not self.signed_in(request):
            raise Refused(401, "Nobody is signed in.", "The session ended, or none was opened.", "Sign in.")

    async def command(self, request: "Request") -> dict[str, Any]:
        """The JSON object that the edge's own page, or somebody with the token, posted."""
        headers = request.headers
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "The request was refused.", "It is not JSON.", "Send application/json.")
        if "authorization" not in headers and not self.gate.own_page(
            headers["host"], headers.get("origin"), headers.get("sec-fetch-site")
        ):
            raise Refused(403, "The request was refused.", "Another web page sent it.", "Use the edge's own page.")
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    if len(body) + len(part) > _BODY_BYTES:
                        raise Refused(413, "The request was refused.", f"It is over {_BODY_BYTES} bytes.", "Send less.")
                    body += part
            value = json.loads(body)
        except TimeoutError:
            raise Refused(408, "The request was refused.", "It did not arrive.", "Send it again.") from None
        except (ValueError, RecursionError):
            raise Refused(400, "The request was refused.", "It is not JSON.", "Send a JSON object.") from None
        if not isinstance(value, dict):
            raise Refused(400, "The request was refused.", "It is not a JSON object.", "Send one.")
        return value

    # What is answered

    async def get_page(self, request: "Request") -> "Response":
        from starlette.responses import Response

        if request.headers.get("if-none-match") == self._page_headers["etag"]:
            return Response(status_code=304, headers=self._page_headers)
        return Response(self.page, media_type="text/html; charset=utf-8", headers=self._page_headers)

    async def get_health(self, request: "Request") -> "Response":
        return _json({"status": "ok"})

    async def get_session(self, request: "Request") -> "Response":
        return _json({"signed_in": self.signed_in(request)})

    async def post_session(self, request: "Request") -> "Response":
        token = (await self.command(request)).get("token")
        if not isinstance(token, str):
            raise Refused(400, "The request was refused.", "It holds no token.", "Send one.")
        if not token:
            self.gate.close_session(request.cookies.get(COOKIE, ""), time.time())
            answer = _json({"signed_in": False})
            answer.delete_cookie(COOKIE, secure=self.secure, httponly=True, samesite="strict")
            return answer
        self.try_token(request, token.strip())
        answer = _json({"signed_in": True})
        cookie = self.gate.open_session(time.time())
        answer.set_cookie(COOKIE, cookie, SESSION_SECONDS, secure=self.secure, httponly=True, samesite="strict")
        return answer

    async def get_snapshot(self, request: "Request") -> "Response":
        from starlette.responses import Response

        self.admit(request)
        return Response(self.snapshot(), media_type="application/json")

    async def get_metrics(self, request: "Request") -> "Response":
        from starlette.responses import Response

        self.admit(request)
        return Response(metrics.render(self.edge.snapshot()), headers={"content-type": metrics.CONTENT_TYPE})

    async def get_events(self, request: "Request") -> "Response":
        from starlette.responses import StreamingResponse

        self.admit(request)
        if len(self._queues) >= STREAMS:
            raise Refused(503, "No more pages can watch.", f"{STREAMS} do already.", "Close one.")
        cookie = "" if "authorization" in request.headers else request.cookies.get(COOKIE, "")
        return StreamingResponse(self._events(cookie), media_type="text/event-stream")

    async def post_pairing(self, request: "Request") -> "Response":
        wanted = (await self._asked(request)).get("open")
        if not isinstance(wanted, bool):
            raise Refused(400, "The request was refused.", "`open` is not true or false.", "Send one.")
        if wanted:
            self.edge.open_window()
        else:
            self.edge.close_window()
        return self._changed()

    async def post_devices(self, request: "Request") -> "Response":
        asked = await self._asked(request)
        fingerprint, name = asked.get("fingerprint"), asked.get("name")
        if not isinstance(fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise Refused(400, "The request was refused.", "It names no device.", "Send a fingerprint.")
        if asked.get("revoke") is True:
            self.edge.revoke(fingerprint)
        elif isinstance(name, str) and 0 < len(name.strip()) <= 64 and name.isprintable():
            self.edge.rename(fingerprint, name.strip())
        else:
            raise Refused(400, "The name cannot be used.", "A name has 1 to 64 visible letters.", "Choose another.")
        return self._changed()

    async def _asked(self, request: "Request") -> dict[str, Any]:
        self.admit(request)
        return await self.command(request)

    def _changed(self) -> "Response":
        self._latest = (-math.inf, "")
        return _json({"ok": True})

    # Snapshots

    def snapshot(self) -> str:
        """The edge's snapshot as JSON, with the pairing's QR code as rows of 0 and 1."""
        made, text = self._latest
        if time.monotonic() - made >= _FASTEST / 2:
            plain: Any = self.edge.snapshot()
            if plain["pairing"]:
                plain = plain | {"pairing": plain["pairing"] | {"qr": qr_rows(plain["pairing"]["text"])}}
            text = json.dumps(_finite(plain), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
            self._latest = (time.monotonic(), text)
        return text

    async def _events(self, cookie: str) -> AsyncIterator[str]:
        queue = self.edge.subscribe()
        self._queues.add(queue)
        try:
            yield "retry: 1000\n\n"
            while not self._closing and (not cookie or self.gate.session(cookie, time.time())):
                yield f"data: {self.snapshot()}\n\n"
                await asyncio.sleep(_FASTEST)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SLOWEST - _FASTEST):
                        await queue.get()
                while not queue.empty():
                    queue.get_nowait()
        finally:
            self._queues.discard(queue)
            self.edge.unsubscribe(queue)

    def close(self) -> None:
        """Ends all streams within a fraction of a second."""
        self._closing = True
        for queue in self._queues:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)


def create_app(
    edge: Watched, token: str, *, names: Collection[str] = (), secure: bool = False, page: bytes | None = None
) -> Any:
    """An ASGI application; its `.state.site` is the Site.

    `names` are DNS names that the edge goes by, `secure` says that it is served over TLS, `page` replaces the page.
    Raises UsageError for a token that cannot be used, MissingPackageError without starlette.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.routing import Route
    except ImportError:
        raise MissingPackageError(
            "The dashboard cannot be served.", "starlette and uvicorn are missing.", "pip install 'shoal[edge]'"
        ) from None
    if page is None:
        page = importlib.resources.files("shoal.pages").joinpath("dashboard.html").read_bytes()
    site = Site(edge, token, names, secure, page)

    async def refused(request: "Request", error: Exception) -> "Response":
        if isinstance(error, HTTPException):  # no such address, or not by that method
            return _json({"what": "There is nothing here.", "why": error.detail, "fix": ""}, error.status_code)
        assert isinstance(error, ShoalError)
        status = getattr(error, "status", _STATUS.get(type(error), 409))
        headers = {"www-authenticate": "Bearer"} if status == 401 else {}
        return _json({"what": error.what, "why": error.why, "fix": error.fix}, status, headers)

    class Doors:
        """The Host check before anything, and the headers of every answer."""

        def __init__(self, app: Any):
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            from starlette.datastructures import MutableHeaders
            from starlette.requests import Request

            async def sending(message: Any) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    for name, value in (_HEADERS | {"content-security-policy": "default-src 'none'"}).items():
                        headers.setdefault(name, value)
                await send(message)

            answer: Any = self.app
            if scope["type"] == "http":
                request = Request(scope)
                try:
                    site.check_host(request)
                except Refused as error:
                    answer = await refused(request, error)
            await answer(scope, receive, sending)

    app = Starlette(
        routes=[
            Route("/", site.get_page, methods=["GET"]),
            Route("/health", site.get_health, methods=["GET"]),
            Route("/session", site.get_session, methods=["GET"]),
            Route("/session", site.post_session, methods=["POST"]),
            Route("/snapshot", site.get_snapshot, methods=["GET"]),
            Route("/metrics", site.get_metrics, methods=["GET"]),
            Route("/events", site.get_events, methods=["GET"]),
            Route("/pairing", site.post_pairing, methods=["POST"]),
            Route("/devices", site.post_devices, methods=["POST"]),
        ],
        middleware=[Middleware(Doors)],
        exception_handlers={ShoalError: refused, HTTPException: refused},
    )
    app.state.site = site
    return app


def policy(page: bytes) -> str:
    """The Content-Security-Policy under which `page` works and nothing else does: its own script and style, by hash."""

    def own(tag: bytes) -> str:
        blocks = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"

    return (
        f"default-src 'none'; script-src {own(b'script')}; style-src {own(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


@functools.lru_cache(maxsize=4)
def qr_rows(text: str) -> list[str] | None:
    """The modules of `text`'s QR code, dark as 1; None without a text or without segno."""
    try:
        import segno
    except ImportError:
        return None
    return ["".join(map(str, row)) for row in segno.make(text, error="m", micro=False).matrix] if text else None


def _finite(value: Any) -> Any:
    """`value` with null for what JSON has no number for: a device's sensor may say anything."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(value, status, headers)
