"""List where a graph can run on this machine: the devices of each backend, and of every provider without one why, and
what would change that. A plugin's library is tried in a process of its own; nothing is fetched.
"""

import argparse

from .. import options

NAME = "devices"
HELP = "list the npu, gpu and cpu that shoal can use here, and why others are missing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backend", metavar="NAME", nargs="*", help="npu, gpu or cpu (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="that a provider's library may take (default: 60)"
    )
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime import backends
    from shoal.runtime.errors import UsageError

    names = tuple(dict.fromkeys(arguments.backend)) or backends.NAMES
    if unknown := set(names) - set(backends.NAMES):
        why = f"There are {', '.join(backends.NAMES)}."
        raise UsageError(f"There is no backend {min(unknown)!r:.60}.", why, "Name some of these, or none.")
    if not 0 < arguments.seconds <= 3600:
        raise UsageError(f"--seconds is {arguments.seconds:g}.", "It must be from 0 to 3600.", "Correct it.")
    found = backends.discover(names, arguments.seconds)
    show.table(rows(found), ("backend", "provider", "device"))
    if missing := [(one.name, gap.provider, gap.why, gap.fix) for one in found for gap in one.absent]:
        show.line("\nnot here:")
        for backend, provider, why, fix in missing:
            show.line(f"{backend}:{provider}: {why}.\n  fix: {fix}")
    show.json([as_json(one) for one in found])
    return 0


def rows(found) -> list[tuple[str, str, str]]:
    """A row for each device."""
    return [(one.name, device.provider, device.title) for one in found for device in one.devices]


def as_json(backend) -> dict:
    """A backend with its devices and gaps as JSON."""
    devices = [
        {
            "name": device.name, "title": device.title, "provider": device.listed.provider,
            "version": device.listed.version, "hardware": device.listed.kind, "vendor": device.listed.vendor,
            "simulated": device.simulated or None, "settings": dict(device.settings), "library": device.library or None,
        }
        for device in backend.devices
    ]  # fmt: skip
    return {"backend": backend.name, "devices": devices, "absent": [vars(gap) for gap in backend.absent]}
