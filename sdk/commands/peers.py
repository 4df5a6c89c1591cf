"""The machines that this one is paired with, and what they may do.

  shoal peers list                     everyone, with rights and when they were last here
  shoal peers show PEER                one, with its certificate's fingerprint
  shoal peers revoke PEER              trust it no more, at once
  shoal peers rename PEER NAME
  shoal peers allow PEER infer update  these rights and no others; without any, none

PEER is a name, or the beginning of an id or fingerprint. A machine that is both an edge and a device has two lists:
--edge or --device says which. See docs/security.md.
"""

import argparse

from .. import options

NAME = "peers"
HELP = "list, revoke, rename or limit paired machines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    role = parser.add_mutually_exclusive_group()
    role.add_argument("--edge", dest="role", action="store_const", const="edge", help="the devices of this edge")
    role.add_argument("--device", dest="role", action="store_const", const="device", help="the edges of this device")
    options.add_json(parser)
    verbs = parser.add_subparsers(dest="verb", metavar="list|show|revoke|rename|allow", required=True)
    for verb in ("list", "show", "revoke", "rename", "allow"):
        command = verbs.add_parser(verb)
        if verb != "list":
            command.add_argument("peer", metavar="PEER", help="its name, or the beginning of its id or fingerprint")
        if verb == "rename":
            command.add_argument("name", metavar="NAME")
        if verb == "allow":
            command.add_argument("rights", metavar="RIGHT", nargs="*", help="infer, update, federate")
        # Said after the verb they mean the same, and must not undo what was said before it
        for option, key, value in (
            ("--edge", "role", "edge"),
            ("--device", "role", "device"),
            ("--json", "json", True),
        ):
            command.add_argument(
                option, dest=key, action="store_const", const=value, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


def run(arguments: argparse.Namespace, show) -> int:
    from ..device_agents.home import home
    from ..device_agents.trust import Peers

    peers = Peers.open(home() / (arguments.role or _role(home())) / "peers")
    if arguments.verb == "list":
        found = peers.list()
        show.json([as_json(peer) for peer in found])
        if not found:
            show.note("No peers. An edge opens a pairing window with: shoal edge pair")
            return 0
        show.table(
            [(p.name, p.role, p.id, ", ".join(sorted(p.rights)) or "nothing", p.address or "", p.seen_at or "never")
             for p in found],
            heading=("name", "role", "id", "may", "address", "seen"),
        )  # fmt: skip
        return 0
    peer = peers.find(arguments.peer)
    if arguments.verb == "revoke":
        peers.revoke(peer)
        show.note(f"{peer.name} is trusted no more.")
    elif arguments.verb == "rename":
        peer = peers.rename(peer, arguments.name)
    elif arguments.verb == "allow":
        peer = peers.allow(peer, arguments.rights)
    fields = as_json(peer) | {"revoked": arguments.verb == "revoke"}
    show.json(fields)
    if not fields["revoked"]:
        show.table([(label.replace("_", " "), ", ".join(value) if isinstance(value, list) else value or "")
                    for label, value in fields.items() if label != "revoked"])  # fmt: skip
    return 0


def as_json(peer) -> dict:
    """A peer for a program."""
    return {
        "name": peer.name, "role": peer.role, "id": peer.id, "rights": sorted(peer.rights), "address": peer.address,
        "paired_at": peer.paired_at, "seen_at": peer.seen_at, "fingerprint": peer.fingerprint,
    }  # fmt: skip


def _role(home) -> str:
    """The role that this machine has. Raises UsageError where it has both."""
    from shoal.runtime.errors import UsageError

    roles = [role for role in ("edge", "device") if (home / role / "identity.key").exists()]
    if len(roles) == 2:
        raise UsageError(
            "Which peers are meant?", "This machine is both an edge and a device.", "Add --edge or --device."
        )
    return roles[0] if roles else "device"
