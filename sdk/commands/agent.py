"""The device's agent: a daemon that keeps the link to an edge, answers apps, and updates models.

  shoal agent [ADDRESS]      run it, until Ctrl-C or SIGTERM (the same as: shoal agent run)
  shoal agent status         link, health, models and updates of the agent that runs
  shoal agent unit           print a systemd unit

ADDRESS is the edge's: host:port or serial:/dev/…; by default where the two were paired (see shoal pair). Apps use
shoal.device_agents.agent.App. It keeps everything in $SHOAL_HOME/device (by default ~/.local/state/shoal/device).
"""

import argparse
from typing import Any

from .. import options

NAME = "agent"
HELP = "run a device's agent; see what it does"
_ACTIONS = ("run", "status", "unit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", metavar="run|status|unit|ADDRESS", nargs="*", help="what to do; the edge's address")
    parser.add_argument("--name", metavar="TEXT", help="what the edge calls this device (default: the host's name)")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=BUNDLE", help="a model of this device; may be repeated"
    )
    parser.add_argument("--memory", metavar="SIZE", help="what a language model here may use, such as 500MB")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the engine (default: every core)")
    parser.add_argument(
        "--window", type=float, default=60.0, metavar="S", help="seconds of health an update must survive (default: 60)"
    )
    parser.add_argument("--system", action="store_true", help="unit: for the whole machine, not this user's session")
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.errors import UsageError

    words = list(arguments.words)
    action = words.pop(0) if words and words[0] in _ACTIONS else "run"
    if len(words) > (action != "status"):
        raise UsageError("The command line is not understood.", f"{words[-1]!r:.60} is one too many.", "See --help.")
    address = words[0] if words else None
    return {"run": _run, "status": _status, "unit": _unit}[action](arguments, address, show)


def _run(arguments: argparse.Namespace, address: str | None, show) -> int:
    import asyncio
    import logging

    from shoal.runtime.bundle import Bundle

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    given = _options(arguments, address)
    for path in given["models"].values():
        Bundle.open(path).close()  # a model that is named has to be there; one that was fetched may be damaged
    asyncio.run(_serve(given, show))
    return 0


def _options(arguments: argparse.Namespace, address: str | None) -> dict[str, Any]:
    """The keywords of Agent, checked. Raises UsageError."""
    from pathlib import Path

    from shoal.runtime.budget import parse_size
    from shoal.runtime.errors import UsageError

    from ..device_agents.links import Address

    models = {}
    for pair in arguments.model:
        name, separator, path = pair.partition("=")
        if not (separator and name and path):
            raise UsageError(f"--model is {pair!r:.100}.", "It is no NAME=BUNDLE.", "Write camera=camera.shoal.")
        models[name] = Path(path).absolute()
    if not 1 <= arguments.window <= 86400:
        raise UsageError(f"--window is {arguments.window:g}.", "It must be 1 to 86400 seconds.", "Correct it.")
    if not 0 <= arguments.threads <= 1024:
        raise UsageError(f"--threads is {arguments.threads}.", "It must be 0 to 1024.", "Correct it.")
    return {
        "address": Address.parse(address) if address else None, "models": models, "name": arguments.name,
        "memory": parse_size(arguments.memory) if arguments.memory else None, "threads": arguments.threads,
        "window": arguments.window,
    }  # fmt: skip


async def _serve(given: dict[str, Any], show) -> None:
    import asyncio
    import signal

    from ..device_agents.agent import Agent
    from ..device_agents.home import home
    from ..systemd import notify

    agent, loop = Agent(home() / "device", **given), asyncio.get_running_loop()
    stop = asyncio.Event()

    def ask_to_stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one does not wait
            loop.remove_signal_handler(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask_to_stop)
    async with agent:
        show.line(f"Device {agent.identity.name} ({agent.identity.id}), ready for apps (Ctrl-C stops)")
        notify("READY=1")
        ended = asyncio.ensure_future(agent.closed())
        waiting = asyncio.ensure_future(stop.wait())
        await asyncio.wait([ended, waiting], return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        waiting.cancel()
        if ended.done():
            ended.result()
        ended.cancel()
        show.note("Stopping…")


def _status(arguments: argparse.Namespace, address: str | None, show) -> int:
    from ..device_agents.apps import App
    from ..show import size

    with App() as app:
        found = app.status()
    show.json(found)
    health, agreed, updates = found["health"], found["agreement"], found["updates"]
    show.table([
        ("device", f"{found['name']} ({found['id']})"),
        ("edge", f"{found['edge']} by {found['link']}" if found["link"] else f"none: {found['trouble']}"),
        ("round trip", f"{1000 * found['rtt']:.1f} ms" if found["rtt"] is not None else "unknown"),
        ("agreed", (agreed["why"] or "nothing") if agreed else "nothing yet"),
        ("battery", _shown(health["battery_percent"], "%.0f %%") + (", on power" if health["on_power"] else "")),
        ("temperature", _shown(health["temperature_c"], "%.0f °C")),
        ("memory", _shown(health["memory_available"], "%s available", size)),
        ("pressure", _shown(health["memory_pressure"], "%.1f %%")),
        ("processor", _shown(health["cpu_percent"], "%.0f %%")),
        ("updates", updates["doing"] or ("on trial: " + ", ".join(updates["trial"]) if updates["trial"] else
                                         "up to date" if updates["signer"] else "no signer is trusted")),
    ])  # fmt: skip
    show.line()
    show.table([(m["name"], m["role"], m["digest"][:12], size(m["bytes"])) for m in found["models"]],
               heading=("model", "role", "digest", "size"))  # fmt: skip
    for why in updates["refused"]:
        show.line(f"refused: {why}")
    return 0


def _shown(value, form: str, convert=lambda value: value) -> str:
    return "unavailable" if value is None else form % convert(value)


_UNIT = """\
# {where}/shoal-agent.service; then: {start} enable --now shoal-agent
[Unit]
Description=shoal agent
After=network.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
Environment=SHOAL_HOME={home}
Restart=always
RestartSec=1
KillSignal=SIGTERM
TimeoutStopSec=15
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
UMask=0077

[Install]
WantedBy={target}
"""


def _unit(arguments: argparse.Namespace, address: str | None, show) -> int:
    import sys

    from ..device_agents.home import home
    from ..systemd import quoted

    given = _options(arguments, address)
    words = [sys.executable, "-m", "shoal", "agent", "run", *([address] if address else [])]
    for name, path in given["models"].items():
        words += ["--model", f"{name}={path}"]
    for name in ("name", "memory"):
        if getattr(arguments, name):
            words += [f"--{name}", getattr(arguments, name)]
    if arguments.threads:
        words += ["--threads", str(arguments.threads)]
    if arguments.window != 60.0:
        words += ["--window", f"{arguments.window:g}"]
    show.text(
        _UNIT.format(
            where="/etc/systemd/system" if arguments.system else "~/.config/systemd/user",
            start="systemctl" if arguments.system else "systemctl --user",
            command=" ".join(map(quoted, words)),
            home=quoted(str(home())),
            target="multi-user.target" if arguments.system else "default.target",
        )  # fmt: skip
    )
    return 0
