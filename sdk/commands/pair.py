"""Pair this device with an edge: type the code that `shoal edge pair` shows there. Both keep each other's certificate.

ADDRESS is HOST, HOST:PORT or serial:/dev/ttyUSB0?baud=921600. A code pairs one device, within 120 seconds. See
docs/security.md.
"""

import argparse

from .. import options

NAME = "pair"
HELP = "pair this device with an edge, by a code"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="of the edge: host:port, or serial:/dev/…")
    parser.add_argument("code", metavar="CODE", help="the eight digits that the edge shows")
    parser.add_argument("--name", metavar="TEXT", help="what the edge calls this device (default: its host name)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds it may take (default: 30)")
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    import asyncio

    from shoal.runtime.errors import UsageError

    from ..device_agents import endpoint
    from ..device_agents.home import home
    from ..device_agents.identity import Identity
    from ..device_agents.links import Address
    from ..device_agents.pairing import Code
    from ..device_agents.trust import Peers
    from .peers import as_json

    if not 1 <= arguments.timeout <= 600:
        raise UsageError(f"--timeout is {arguments.timeout}.", "It must be 1 to 600 seconds.", "Correct it.")
    code, address = Code.parse(arguments.code), Address.parse(arguments.address)
    folder = home() / "device"
    identity, peers = Identity.open(folder, arguments.name), Peers.open(folder / "peers")
    edge = asyncio.run(endpoint.pair(address, code, identity, peers, arguments.timeout))
    show.json(as_json(edge) | {"own_id": identity.id})
    show.table([("paired with", f"{edge.name} ({edge.role})"), ("its id", edge.id), ("this device", identity.id),
                ("it may", ", ".join(sorted(edge.rights)))])  # fmt: skip
    return 0
