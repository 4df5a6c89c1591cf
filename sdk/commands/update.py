"""Signed model updates: for who signs them, for the edge that hands them out, and for a device.

  shoal update keygen FOLDER             new keys, and the root that devices are to trust
  shoal update sign FOLDER NAME=BUNDLE…  a new release; without bundles, the same one with later dates
  shoal update rotate FOLDER ROLE        dismiss the key of root, targets or timestamp for a new one
  shoal update publish FOLDER [--to DIR] to this machine's edge, or into a folder such as a memory stick's

  shoal update trust ROOT.json           on a device: believe this signer
  shoal update apply DIR                 on a device: take a release from a folder
  shoal update back                      on a device: the release before
  shoal update status                    on a device: what is believed, running, on trial

An edge hands releases to its devices by itself. Dates matter: sign again before the manifest expires.
"""

import argparse

from .. import options

NAME = "update"
HELP = "sign model updates, hand them out, take them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(name: str, folder: str = "") -> argparse.ArgumentParser:
        command = verbs.add_parser(name)
        if folder:
            command.add_argument("folder", metavar=folder)
        options.add_json(command)
        return command

    add("keygen", "FOLDER")
    sign = add("sign", "FOLDER")
    sign.add_argument("bundles", metavar="NAME=BUNDLE", nargs="*")
    sign.add_argument("--remove", action="append", default=[], metavar="NAME", help="leave this model out from now on")
    rotate = add("rotate", "FOLDER")
    rotate.add_argument("role", metavar="ROLE", help="root, targets or timestamp")
    for command in (sign, rotate):
        command.add_argument("--days", type=int, metavar="N", help="until it must be signed anew (default: 365)")
        command.add_argument("--fresh", type=int, metavar="N", help="until its date must be renewed (default: 30)")
    add("publish", "FOLDER").add_argument("--to", metavar="DIR", help="a folder instead of this machine's edge")
    trust = add("trust", "ROOT.json")
    trust.add_argument("--only", action="append", metavar="NAME", help="take only this model; may be repeated")
    apply = add("apply", "DIR")
    apply.add_argument("--now", action="store_true", help="keep it at once, without a window of health")
    add("back")
    add("status")


def run(arguments: argparse.Namespace, show) -> int:
    return {
        "keygen": _keygen, "sign": _sign, "rotate": _rotate, "publish": _publish, "trust": _trust, "apply": _apply,
        "back": _back, "status": _status,
    }[arguments.verb](arguments, show)  # fmt: skip


# Who signs


def _keygen(arguments: argparse.Namespace, show) -> int:
    import time
    from pathlib import Path

    from ..device_agents.vendor import Vendor

    vendor = Vendor.create(Path(arguments.folder), time.time())
    show.json({"fingerprint": vendor.fingerprint, "root": str(vendor.folder / "root.json")})
    show.line(f"root         {vendor.folder / 'root.json'}: hand it to devices (shoal update trust root.json)")
    show.line(f"fingerprint  {vendor.fingerprint}: a device shows the same")
    show.line(f"keys         {vendor.folder / 'keys'}: keep a copy; take root.key off this machine until you rotate")
    return 0


def _sign(arguments: argparse.Namespace, show) -> int:
    import time
    from pathlib import Path

    from shoal.runtime.errors import UsageError

    from ..device_agents.vendor import Vendor

    bundles = {}
    for pair in arguments.bundles:
        name, separator, path = pair.partition("=")
        if not (separator and name and path):
            raise UsageError(f"{pair!r:.100} is no NAME=BUNDLE.", "Both are needed.", "Write camera=camera.shoal.")
        bundles[name] = Path(path)
    vendor = Vendor(Path(arguments.folder))
    vendor.sign(bundles, arguments.remove, now=time.time(), days=_days(arguments), progress=show.progress)
    return _release(vendor, show)


def _rotate(arguments: argparse.Namespace, show) -> int:
    import time
    from pathlib import Path

    from ..device_agents.vendor import Vendor

    vendor = Vendor(Path(arguments.folder))
    vendor.rotate(arguments.role, time.time(), _days(arguments))
    show.note(f"Root {vendor.root.version} has a new {arguments.role} key. Publish, so that devices hear of it.")
    return _release(vendor, show)


def _days(arguments: argparse.Namespace) -> dict[str, int]:
    from ..device_agents.vendor import DAYS

    given = {"targets": arguments.days, "timestamp": arguments.fresh}
    return DAYS | {role: days for role, days in given.items() if days is not None}


def _release(vendor, show) -> int:
    from dataclasses import asdict

    from ..show import size

    if vendor.current is None:
        show.json({"release": None, "models": []})
        return 0
    release, expires = vendor.current.targets.content.version, vendor.current.timestamp.content.expires
    models = [target for _, target in sorted(vendor.models.items())]
    show.json({"release": release, "expires": expires, "models": [asdict(target) for target in models]})
    show.line(f"release {release}, to be renewed before {_date(expires)}")
    show.table([(target.name, target.digest[:12], size(target.length)) for target in models],
               heading=("model", "digest", "size"))  # fmt: skip
    return 0


def _publish(arguments: argparse.Namespace, show) -> int:
    from pathlib import Path

    from ..device_agents.home import home, private_folder, write_atomically
    from ..device_agents.store import Store
    from ..device_agents.vendor import Vendor

    vendor = Vendor(Path(arguments.folder))
    if arguments.to:
        vendor.publish(Path(arguments.to))
        where = arguments.to
    else:
        folder = private_folder(home() / "edge")
        store = Store(folder / "models")
        data = vendor.encoded()
        for name, target in vendor.models.items():
            store.add(vendor.path(target), name, show.progress)
        write_atomically(folder / "manifest.json", data)  # last: what it names is there
        where = str(folder)
    show.note(f"Published into {where}.")
    return _release(vendor, show)


# A device


def _trust(arguments: argparse.Namespace, show) -> int:
    from pathlib import Path

    from shoal.runtime.errors import UsageError

    from ..device_agents.manifest import MOST_BYTES

    try:
        with open(Path(arguments.folder), "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError("The root cannot be read.", f"{error}.", "Give the root.json of the signer.") from None
    with _updater() as updater:
        trusted = updater.pin(data)
        if arguments.only is not None:
            updater.take_only(arguments.only)
        updater.pause()
    show.json({"fingerprint": trusted.pinned})
    show.line(f"trusted      {arguments.folder}")
    show.line(f"fingerprint  {trusted.pinned}: compare it with the signer's")
    return 0


def _updater():
    """This device's updates. Raises BusyError while its agent runs."""
    from ..device_agents.home import home, private_folder
    from ..device_agents.update import Updater, boot_id

    return Updater(private_folder(home() / "device") / "updates", boot_id())


def _apply(arguments: argparse.Namespace, show) -> int:
    import asyncio
    from pathlib import Path

    from shoal.runtime.errors import BusyError, TrustError

    from ..device_agents.apps import App

    try:
        updater = _updater()
    except BusyError:
        if arguments.now:
            raise
        with App() as app:
            said = app.update(Path(arguments.folder))
    else:
        with updater:
            said = asyncio.run(_alone(updater, Path(arguments.folder), arguments.now))
    show.json({"result": said})
    if said.startswith(("failed", "no signer")):
        raise TrustError("The update was not taken.", f"{said[:1].upper()}{said[1:]}.", "See: shoal update status.")
    show.line(said[:1].upper() + said[1:] + ".")
    return 0


async def _alone(updater, folder, now: bool) -> str:
    """What the agent would do, where none runs; the agent ends the trial when it starts."""
    import asyncio

    from ..device_agents.install import FromFolder, Installer
    from ..device_agents.local import Local

    async def try_out(models) -> None:
        for name, path in models.items():
            local = await asyncio.to_thread(Local, path, name)
            try:
                await asyncio.to_thread(local.probe)
            finally:
                local.close()

    said = await Installer(updater, try_out).look(FromFolder(folder))
    if now and updater.state.trial:
        updater.confirm()
        return "the release is kept"
    updater.pause()
    return said


def _back(arguments: argparse.Namespace, show) -> int:
    with _updater() as updater:
        updater.roll_back()
        models = {name: str(path) for name, path in updater.models.items()}
    show.json({"models": models})
    show.line(f"Back to {', '.join(sorted(models)) or 'no model'}; the release after it is not tried again.")
    return 0


def _status(arguments: argparse.Namespace, show) -> int:
    from ..device_agents.home import home, private_folder
    from ..device_agents.update import read_status

    found = read_status(private_folder(home() / "device") / "updates")
    show.json(found)
    show.table([
        ("signer", found["signer"] or "none is trusted"), ("release", found["release"] or "none"),
        ("current until", _date(found["current until"]) if found["current until"] else ""),
        ("on trial", "yes" if found["trial"] else "no"),
    ])  # fmt: skip
    show.line()
    trial = found["trial"]["models"] if found["trial"] else {}
    names = sorted({*found["active"], *found["previous"], *found["offered"], *trial})
    columns = (found["active"], trial, found["offered"], found["previous"])
    show.table([(name, *(column.get(name, "")[:12] for column in columns)) for name in names],
               heading=("model", "kept", "on trial", "offered", "before"))  # fmt: skip
    for _, why in found["refused"]:
        show.line(f"refused: {why}")
    return 0


def _date(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
