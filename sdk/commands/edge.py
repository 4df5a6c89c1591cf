"""The edge: a daemon that pairs with devices and computes the rest of their models.

  shoal edge                 run it, until Ctrl-C or SIGTERM (the same as: shoal edge run)
  shoal edge pair            let one device pair: shows a code and a QR code, and waits
  shoal edge status          devices, links and models of the edge that runs
  shoal edge add BUNDLE…     put bundles into its store; one that runs sees them within a second
  shoal edge token           the dashboard's token
  shoal edge unit            print a systemd unit

It keeps everything in $SHOAL_HOME/edge (by default ~/.local/state/shoal/edge). See docs/security.md.
"""

import argparse
from typing import Any

from .. import options

NAME = "edge"
HELP = "run an edge that devices pair with; let one pair; see what it does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_running(parser, argparse.SUPPRESS)
    actions = parser.add_subparsers(dest="action", metavar="run|pair|status|add|token|unit")
    _add_running(actions.add_parser("run"), argparse.SUPPRESS)
    pair = actions.add_parser("pair")
    pair.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="how long the code holds (default: 120)"
    )
    pair.add_argument("--no-qr", action="store_true", help="show no QR code")
    status = actions.add_parser("status")
    add = actions.add_parser("add")
    add.add_argument("bundles", metavar="BUNDLE", nargs="+")
    add.add_argument("--name", metavar="TEXT", default="", help="what devices find it by (default: as the bundle says)")
    for command in (pair, status, add):
        options.add_json(command)
    actions.add_parser("token")
    unit = actions.add_parser("unit")
    unit.add_argument("--system", action="store_true", help="for the whole machine instead of this user's session")
    _add_running(unit, argparse.SUPPRESS)


def _add_running(parser: argparse.ArgumentParser, default: Any) -> None:
    """Options of the daemon. They have no defaults, so that said before `run` or `unit` they are not undone by it."""

    def add(name: str, **more) -> None:
        parser.add_argument(name, default=default, **more)

    add("--listen", action="append", metavar="ADDRESS",
        help="host:port or serial:/dev/…; may be repeated (default: port 4707 of every interface)")  # fmt: skip
    add("--name", metavar="TEXT", help="what devices call this edge (default: the host's name)")
    add("--web", metavar="HOST:PORT", help="serve the dashboard there")
    add("--web-name", action="append", metavar="NAME", help="another host name that browsers use for it")
    add("--web-certificate", metavar="FILE", help="PEM certificate of the dashboard (default: the edge's own)")
    add("--web-key", metavar="FILE", help="PEM private key of that certificate")
    add("--memory", metavar="SIZE", help="what open models may hold, such as 2GB (default: no limit)")
    add("--disk", metavar="SIZE", help="what the store may hold; the longest unused models go first")
    add("--max-batch", type=int, metavar="N", help="rows that run together (default: 8)")
    add("--max-wait", type=float, metavar="MS", help="how long a latent may wait for others (default: 3)")
    add("--inflight", type=int, metavar="N", help="requests one device may have on the way (default: 4)")
    add("--threads", type=int, metavar="N", help="of the engine (default: every core)")
    add("--drain", type=float, metavar="S", help="seconds that requests have at the end (default: 10)")
    add("--server", action="append", metavar="NAME=URL",
        help="run the tail NAME on an inference server (Triton, KServe, OVMS, MLServer)")  # fmt: skip
    add("--no-discovery", action="store_true", help="do not announce the edge on the local network")


def run(arguments: argparse.Namespace, show) -> int:
    return {
        "run": _run, "pair": _pair, "status": _status, "add": _add, "token": _token, "unit": _unit,
    }[arguments.action or "run"](arguments, show)  # fmt: skip


# The daemon


def _run(arguments: argparse.Namespace, show) -> int:
    import asyncio
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    limits, drain = _limits(arguments)
    asyncio.run(_serve(arguments, show, limits, drain))
    return 0


def _limits(arguments: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """The keywords of Edge and the seconds to drain, checked. Raises UsageError."""
    from shoal.runtime.budget import parse_size
    from shoal.runtime.errors import UsageError

    given, found = vars(arguments), {}
    for option, least, most, unit in (
        ("max_batch", 1, 1024, 1), ("max_wait", 0, 1000, 0.001), ("inflight", 1, 256, 1), ("threads", 0, 1024, 1),
        ("drain", 0, 3600, 1),
    ):  # fmt: skip
        if option in given:
            if not least <= given[option] <= most:
                name = option.replace("_", "-")
                raise UsageError(f"--{name} is {given[option]}.", f"It must be {least} to {most}.", "Correct it.")
            found[option] = given[option] * unit
    found |= {option: parse_size(given[option]) for option in ("memory", "disk") if option in given}
    for pair in given.get("server", ()):
        name, separator, url = pair.partition("=")
        if not (separator and name and url.startswith(("http://", "https://"))):
            raise UsageError(f"--server is {pair!r:.100}.", "It is no NAME=URL.", "Write cats=http://10.0.0.3:8000.")
        found.setdefault("servers", {})[name] = url
    if "name" in given:
        found["name"] = given["name"]
    return found, float(found.pop("drain", 10.0))


async def _serve(arguments: argparse.Namespace, show, limits: dict[str, Any], drain: float) -> None:
    import asyncio
    import contextlib
    import signal

    from ..device_agents.edge import LISTEN, Edge
    from ..device_agents.home import home
    from ..systemd import notify

    given, stop = vars(arguments), asyncio.Event()
    edge = Edge(home() / "edge", given.get("listen") or LISTEN, announce="no_discovery" not in given, **limits)
    loop = asyncio.get_running_loop()

    def ask_to_stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one does not wait
            loop.remove_signal_handler(number)
        stop.set()

    async with contextlib.AsyncExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ask_to_stop)
        await edge.start()
        stack.push_async_callback(edge.stop, drain)
        if "web" in given:
            server = await stack.enter_async_context(_web(edge, given))
            show.line(f"Dashboard at {server.url} (its token: shoal edge token)")
        show.line(f"Edge {edge.identity.name} ({edge.identity.id})")
        show.line(f"listens at {', '.join(map(str, edge.addresses))} (Ctrl-C stops; shoal edge pair lets a device in)")
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")
        show.note("Stopping…")


def _web(edge, given: dict[str, Any]):
    from pathlib import Path

    from shoal.runtime.errors import UsageError

    from ..device_agents.links import Address
    from ..device_agents.web import DEFAULT_PORT, token_in
    from ..device_agents.web_server import WebServer

    host, _, port = given["web"].rpartition(":") if not given["web"].endswith("]") else (given["web"], "", "")
    if not host:
        host, port = (port, "") if not port.isdecimal() else ("127.0.0.1", port)
    if port and not (port.isdecimal() and int(port) < 1 << 16):
        raise UsageError(f"--web is {given['web']!r:.80}.", "It is no host and port.", "Write 127.0.0.1:4780.")
    host = Address.parse(f"{host}:1").host
    files = {"certificate": given.get("web_certificate"), "key": given.get("web_key")}
    if (files["certificate"] is None) != (files["key"] is None):
        raise UsageError("The dashboard cannot start.", "A certificate needs its key.", "Give both, or neither.")
    if files["certificate"] is None and host not in ("127.0.0.1", "::1", "localhost"):
        files = {"certificate": edge.identity.certificate_path, "key": edge.identity.key_path}
    return WebServer(
        edge, token_in(edge.folder), host, int(port) if port else DEFAULT_PORT, names=given.get("web_name", ()),
        **{name: Path(file) for name, file in files.items() if file is not None},
    )  # fmt: skip


# Its owner


def _pair(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.errors import MissingPackageError, TrustError

    from ..device_agents.admin import ask
    from ..device_agents.home import home
    from ..device_agents.pairing import qr

    state: dict[str, Any] = {"state": "closed"}
    shown = False
    for state in ask(home() / "edge", "pair", seconds=arguments.seconds):
        if state["state"] == "open" and not shown:
            shown = True
            show.json(state)
            if not arguments.no_qr:
                try:
                    show.text(qr(state["text"]))
                except MissingPackageError:
                    pass
            show.line(f"code     {state['code']}")
            show.line(f"type it  {state['text']}")
            show.line(f"It holds for {arguments.seconds:.0f} seconds and pairs one device. Ctrl-C ends it.")
        elif state["state"] == "open":
            show.note(f"A wrong code came; {state['tries_left']} tries are left.")
    if state["state"] != "used":
        why = {"expired": "The time is over.", "locked": "Too many wrong codes came."}.get(
            state["state"], "It was ended."
        )
        raise TrustError("No device has paired.", why, "Run shoal edge pair again.")
    show.json(state)
    show.line(f"paired with {state['paired']}")
    return 0


def _status(arguments: argparse.Namespace, show) -> int:
    from ..device_agents.admin import ask
    from ..device_agents.home import home
    from ..show import size

    found = next(iter(ask(home() / "edge", "status")))
    show.json(found)
    requests = found["requests"]
    show.table([
        ("edge", f"{found['name']} ({found['id']})"), ("listens at", ", ".join(found["addresses"])),
        ("requests", f"{requests['done']} done, {requests['busy']} refused busy, {requests['late']} late, "
                     f"{requests['failed']} failed"),
        ("latency", f"{_ms(found['latency']['p50'])} median, {_ms(found['latency']['p95'])} p95"
                    if found["latency"]["p50"] is not None else "no tail was asked lately"),
    ])  # fmt: skip
    show.line()
    show.table(
        [(d["name"], d["link"]["name"] if d["link"] else "not connected", _ms(d["link"] and d["link"]["rtt"]),
          f"{d['chosen']['model']}, mode {d['chosen']['mode']}" if d["chosen"] else "", d["requests"]["done"],
          _ms(d["latency"]["p50"]), size(d["received"]), size(d["sent"])) for d in found["devices"]],
        heading=("device", "link", "rtt", "runs", "requests", "median", "received", "sent"),
    )  # fmt: skip
    show.line()
    show.table(
        [(m["name"], m["role"], m["digest"][:12], size(m["bytes"]), size(m["resident"]) if m["resident"] else "",
          m["served"]) for m in found["models"]],
        heading=("model", "role", "digest", "size", "in memory", "served"),
    )  # fmt: skip
    return 0


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f} ms"


def _add(arguments: argparse.Namespace, show) -> int:
    from dataclasses import asdict

    from shoal.runtime.errors import UsageError

    from ..device_agents.home import home
    from ..device_agents.store import Store

    if arguments.name and len(arguments.bundles) > 1:
        raise UsageError("Several bundles cannot have one name.", "--name names one.", "Add them one by one.")
    store = Store(home() / "edge" / "models")
    entries = [store.add(bundle, arguments.name, show.progress) for bundle in arguments.bundles]
    show.json([asdict(entry) for entry in entries])
    show.table([(entry.name, entry.role, entry.digest, entry.bytes) for entry in entries],
               heading=("name", "role", "digest", "bytes"))  # fmt: skip
    return 0


def _token(arguments: argparse.Namespace, show) -> int:
    from ..device_agents.home import home, private_folder
    from ..device_agents.web import token_in

    show.line(token_in(private_folder(home() / "edge")))
    return 0


_UNIT = """\
# {where}
[Unit]
Description=shoal edge
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
Environment=SHOAL_HOME={home}
{user}Restart=on-failure
RestartSec=1
KillSignal=SIGTERM
TimeoutStopSec={stop}
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
UMask=0077
{system}
[Install]
WantedBy={target}
"""
_SYSTEM = """\
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={home}
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
CapabilityBoundingSet=
"""


def _unit(arguments: argparse.Namespace, show) -> int:
    import getpass
    import sys

    from ..device_agents.home import home
    from ..systemd import quoted

    _, drain = _limits(arguments)
    words = [sys.executable, "-m", "shoal", "edge", "run", *_given(arguments)]
    command, folder = " ".join(map(quoted, words)), str(home())
    serial = any(address.startswith("serial:") for address in getattr(arguments, "listen", ()))
    where = "/etc/systemd/system" if arguments.system else "~/.config/systemd/user"
    start = "systemctl" if arguments.system else "systemctl --user"
    notes = [f"{where}/shoal-edge.service; then: {start} enable --now shoal-edge"]
    if not arguments.system:
        notes.append("# and, to have it run while nobody is logged in: loginctl enable-linger")
    show.text(_UNIT.format(
        where="\n".join(notes), command=command, home=quoted(folder), stop=int(drain) + 10,
        user=("SupplementaryGroups=dialout\n" if serial else "") + f"User={getpass.getuser()}\n"
        if arguments.system
        else "",
        system=_SYSTEM.format(home=quoted(folder)) if arguments.system else "",
        target="multi-user.target" if arguments.system else "default.target",
    ))  # fmt: skip
    return 0


def _given(arguments: argparse.Namespace) -> list[str]:
    """The daemon's options as they were given."""
    words: list[str] = []
    for name, value in vars(arguments).items():
        if name in ("action", "system", "run", "debug", "json"):
            continue
        option = "--" + name.replace("_", "-")
        for one in value if isinstance(value, list) else [value]:
            words += [option] if one is True else [option, str(one)]
    return words
