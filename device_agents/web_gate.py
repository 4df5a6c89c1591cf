"""Who may look at an edge over HTTP: names, origins, the token, sessions, and how often one may try. No IO, no clock.

Three doors, each closed by itself. A Host header must be an address or a name that the edge goes by: a web page whose
DNS name was re-pointed at the edge (DNS rebinding) sends its own name. A request that changes something must come from
the edge's own page: browsers send Origin with every POST, and cookies do not tell ports of one host apart. And the
token, compared in constant time, opens a session: a cookie that holds an expiry and its HMAC under a key made of the
token, so that it outlives a restart of the edge and ends when the token changes.
"""

import hashlib
import hmac
import ipaddress
import secrets
from collections import OrderedDict
from collections.abc import Collection

from shoal.runtime.errors import BusyError, UsageError

COOKIE = "shoal-edge"
SESSION_SECONDS = 12 * 3600
SHORTEST_TOKEN = 16  # letters

_TRIES, _SPAN = 5, 60.0  # wrong tokens that an address may send in so many seconds
_ALL_TRIES = 50  # and all addresses together
_ADDRESSES = 1024  # remembered at once
_SIGNED_OUT = 1024


class Gate:
    """`now` is in Unix seconds for sessions and in seconds of any clock that only goes forward for tries."""

    def __init__(self, token: str, names: Collection[str] = ()):
        """Raises UsageError for a token that is short or cannot be typed."""
        if len(token) < SHORTEST_TOKEN or not all(" " < letter <= "~" for letter in token):
            why = f"It needs at least {SHORTEST_TOKEN} visible ASCII letters without a space."
            raise UsageError("The dashboard's token cannot be used.", why, "Choose another.")
        self._digest = _digest(token)
        self._key = hmac.digest(token.encode(), b"shoal edge dashboard session", "sha256")
        self._names = {"localhost", *(name.lower().removesuffix(".") for name in names)}
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()  # address -> (wrong tokens, until when)
        self._signed_out: OrderedDict[str, None] = OrderedDict()

    def answers_to(self, hosts: list[str]) -> bool:
        """Whether the Host headers (there must be one) name this edge: an IP address, localhost or one of its names."""
        if len(hosts) != 1:
            return False
        name = hostname(hosts[0])
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name in self._names

    def own_page(self, host: str, origin: str | None, site: str | None) -> bool:
        """Whether a request with these Host, Origin and Sec-Fetch-Site headers was sent by a page from `host`."""
        return origin in (f"http://{host}", f"https://{host}") and site in (None, "same-origin")

    def check(self, token: str, address: str, now: float) -> bool:
        """Whether `token` is right. BusyError: too many wrong ones came from there; it was not even looked at."""
        address = _neighbourhood(address)
        for key, limit in ((address, _TRIES), ("", _ALL_TRIES)):
            count, until = self._wrong.get(key, (0, now))
            if count >= limit and now < until:
                fix = f"Try again in {until - now:.0f} seconds."
                raise BusyError("No more tokens are tried for now.", "Too many wrong ones were sent.", fix)
        if hmac.compare_digest(_digest(token), self._digest):
            self._wrong.pop(address, None)
            return True
        for key in (address, ""):
            count, until = self._wrong.pop(key, (0, 0.0))
            self._wrong[key] = (count + 1, until) if now < until else (1, now + _SPAN)
        if len(self._wrong) > _ADDRESSES:
            self._wrong.popitem(last=False)
        return False

    def open_session(self, now: float) -> str:
        """A cookie's value."""
        claim = f"{int(now) + SESSION_SECONDS}.{secrets.token_hex(8)}"
        return f"{claim}.{self._sign(claim)}"

    def session(self, cookie: str, now: float) -> bool:
        """Whether `cookie` opens a session that has not ended."""
        claim, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(claim).encode()):
            return False
        return now < int(claim.partition(".")[0]) <= now + SESSION_SECONDS and claim not in self._signed_out

    def close_session(self, cookie: str, now: float) -> None:
        """The cookie is worth nothing from now on, until the edge restarts."""
        if self.session(cookie, now):
            self._signed_out[cookie.rpartition(".")[0]] = None
            if len(self._signed_out) > _SIGNED_OUT:
                self._signed_out.popitem(last=False)

    def _sign(self, claim: str) -> str:
        return hmac.digest(self._key, claim.encode(), "sha256").hex()


def hostname(host: str) -> str:
    """The name or address in a Host header, without its port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()  # of one length, whatever was sent


def _neighbourhood(address: str) -> str:
    """What one person has: an IPv4 address, or the 64-bit network of an IPv6 one."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address or "?"
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
