"""Finding an edge on the local network by multicast DNS (zeroconf): a hint, never more.

What is found is what somebody on the network claims. Nothing is trusted for it: pairing needs the code and a session
the pinned certificate, and an address that a person wrote always works without any of this. An announcement says the
edge's name, the beginning of its id, the protocol's version and whether a pairing window is open; never the code.
"""

import asyncio
import contextlib
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.runtime.errors import LinkError, MissingPackageError, UsageError

from .links import Address

SERVICE = "_shoal._tcp.local."
VERSION = 1
_MOST = 64  # edges that a search lists
_ID = re.compile(r"[A-Z2-7-]{0,16}")


@dataclass(frozen=True)
class Found:
    """An edge that says it is here. All of it is a claim."""

    name: str
    addresses: tuple[Address, ...]
    id: str  # the beginning of its id, "" where it says none
    version: int
    pairing: bool


class Announcement:
    """An edge's presence on the network, until `close`."""

    def __init__(self, zeroconf: Any, info: Any, properties: dict[str, str]):
        self._zeroconf, self._info, self._properties = zeroconf, info, properties

    async def pairing(self, is_open: bool) -> None:
        """Says whether a pairing window is open."""
        self._properties["pairing"] = "1" if is_open else "0"
        self._info = _info(self._info.name, self._info.server, self._info.port, self._info.addresses, self._properties)
        await self._zeroconf.async_update_service(self._info)

    async def close(self) -> None:
        """Says good-bye and is silent from then on."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await self._zeroconf.async_unregister_service(self._info)
        await self._zeroconf.async_close()


async def announce(name: str, port: int, id: str, *, interfaces: Sequence[str] | None = None) -> Announcement:
    """Tells the local network that an edge listens on `port`; `id` is cut to a prefix.

    `interfaces` are addresses of this machine (default: all). Raises LinkError where the network does not allow it.
    """
    if not 0 < port < 65_536:
        raise UsageError(f"{port} is no port.", "A port is from 1 to 65535.", "Announce the port that is listened to.")
    label = _label(name)
    properties = {"v": str(VERSION), "id": id[:9], "pairing": "0"}
    zeroconf = await _zeroconf(interfaces)
    addresses = [socket.inet_aton(each) for each in interfaces] if interfaces else _own_addresses()
    info = _info(f"{label}.{SERVICE}", f"{_label(socket.gethostname())}.local.", port, addresses, properties)
    try:
        await (await zeroconf.async_register_service(info, allow_name_change=True))
    except Exception as error:  # zeroconf has families of its own for a name that is taken and for a dead network
        await zeroconf.async_close()
        raise LinkError(
            "This edge cannot be announced on the network.",
            f"{error or type(error).__name__}.",
            "Give devices its address instead.",
        ) from None
    return Announcement(zeroconf, info, properties)


async def search(seconds: float = 2.0, *, interfaces: Sequence[str] | None = None) -> list[Found]:
    """The edges that answer within `seconds`, by name. An empty list says nothing: many networks drop multicast."""
    from_network: dict[str, Found] = {}
    zeroconf = await _zeroconf(interfaces)
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

    names: asyncio.Queue[str] = asyncio.Queue(_MOST)

    def changed(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            names.put_nowait(name)

    browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[changed])
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(from_network) < _MOST:
                    name = await names.get()
                    info = AsyncServiceInfo(SERVICE, name)
                    if await info.async_request(zeroconf.zeroconf, 1000) and (found := _read(name, info)):
                        from_network[name] = found
    finally:
        await browser.async_cancel()
        await zeroconf.async_close()
    return sorted(from_network.values(), key=lambda each: each.name)


def _read(name: str, info: Any) -> Found | None:
    """What an announcement says, as far as it can be shown to a person; None where it says nothing of use."""
    label = "".join(each for each in name.removesuffix("." + SERVICE) if each.isprintable())[:63]
    if not label or not info.port:
        return None
    told = {key: value or b"" for key, value in info.properties.items()}
    id = _ID.match(told.get(b"id", b"").decode("ascii", "replace"))
    version = told.get(b"v", b"")
    return Found(
        label,
        tuple(Address("tcp", host, info.port) for host in info.parsed_scoped_addresses()[:8]),
        id[0] if id else "",
        int(version) if version.isdigit() and len(version) < 4 else 0,
        told.get(b"pairing") == b"1",
    )


def _info(name: str, server: str, port: int, addresses: list[bytes], properties: dict[str, str]) -> Any:
    from zeroconf.asyncio import AsyncServiceInfo

    return AsyncServiceInfo(SERVICE, name, port=port, addresses=addresses, properties=dict(properties), server=server)


async def _zeroconf(interfaces: Sequence[str] | None) -> Any:
    try:
        from zeroconf import InterfaceChoice
        from zeroconf.asyncio import AsyncZeroconf
    except ImportError as error:
        raise MissingPackageError(
            "Finding an edge by itself needs a package that is not here.",
            str(error),
            "Run: pip install 'shoal[agent]', or give the edge's address.",
        ) from None
    try:
        return AsyncZeroconf(interfaces=list(interfaces) if interfaces else InterfaceChoice.All)
    except (OSError, RuntimeError) as error:
        raise LinkError("The local network cannot be asked.", f"{error}.", "Give the edge's address instead.") from None


def _own_addresses() -> list[bytes]:
    from zeroconf import get_all_addresses

    every = [each for each in get_all_addresses() if isinstance(each, str) and "." in each]
    return [socket.inet_aton(each) for each in every if not each.startswith("127.")] or [socket.inet_aton("127.0.0.1")]


def _label(name: str) -> str:
    """`name` as one DNS label: no dots, at most 63 bytes."""
    text = "".join(each if each.isprintable() and each != "." else "-" for each in name).strip() or "edge"
    return text.encode()[:60].decode("utf-8", "ignore")
