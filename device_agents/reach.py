"""How this machine is reached from others: an address for people to type, out of one to listen on.

It sends nothing and knows nothing about pairing.
"""

import contextlib
import socket
from collections.abc import Iterable
from dataclasses import replace

from .links import Address

_ANYWHERE = ("", "0.0.0.0", "::")
_OTHER_END = "/dev/YOUR-PORT"
_OUTSIDE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # RFC 5737, 3849: nobody's; only routed to


def reachable(listening: Iterable[Address]) -> str:
    """The best of the addresses that an edge listens on: one on the network before loopback, that before a cable, of
    which the device's own end has another name."""
    found = sorted(map(outward, listening), key=lambda address: (address.kind != "tcp", is_loopback(address)))
    return str(found[0]) if found else ""


def outward(address: Address) -> Address:
    """`address` with this machine's own host in place of "every interface", and a port to fill in for a cable's."""
    if address.kind == "serial":
        return address if "://" in address.device else replace(address, device=_OTHER_END)
    if address.host not in _ANYWHERE:
        return address
    family = socket.AF_INET6 if address.host == "::" else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((_OUTSIDE[family], 9))  # a datagram socket that is connected has sent nothing
        return replace(address, host=probe.getsockname()[0])
    return replace(address, host=socket.gethostname())


def is_loopback(address: Address) -> bool:
    """Whether only this machine can reach it."""
    return address.host.startswith("127.") or address.host in ("::1", "localhost")
