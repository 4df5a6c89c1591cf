"""The signer's side: keys in one folder, manifests that devices believe, and what an edge or a memory stick carries.

    keys/ROLE.key       Ed25519, PKCS 8, for this user alone; keep root.key off this machine between uses
    root.json           to be carried to devices once; history/N.root.json are all of them
    manifest.json       what is current; made anew by every `sign`
    models/             the bundles that it names, by digest

It keeps the rules of manifest.py from the other side: versions only grow, and what was signed is read back as a device
would read it before it replaces anything. It knows nothing about links.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import StorageError, TrustError, UsageError
from shoal.runtime.events import Event, Progress, silent

from . import manifest
from .disk import Disk
from .home import private_folder, write_atomically
from .manifest import ROLES, Manifest, Role, Root, Signed, Target, Targets, Timestamp, Trusted

DAY = 86400
DAYS = {"root": 1825, "targets": 365, "timestamp": 30}
_STEP = 1 << 20


class Vendor:
    """The folder of someone who signs models."""

    def __init__(self, folder: Path):
        """Opens a folder that `create` made. Raises UsageError, TrustError."""
        self.folder = Path(folder)
        roots = sorted(
            self._roots().glob("*.root.json"), key=lambda path: int(path.name.split(".")[0])
        )  # fmt: skip
        if not roots:
            why = f"{self.folder} has no root."
            raise UsageError("There are no keys to sign with.", why, f"Make them: shoal update keygen {self.folder}")
        first = Trusted.pin(roots[0].read_bytes())
        self.roots = [first.root, *(Trusted.pin(path.read_bytes()).root for path in roots[1:])]
        self.root: Root = self.roots[-1].content
        self.current: Manifest | None = None
        path = self.folder / "manifest.json"
        if path.exists():
            self.current = Manifest.decode(path.read_bytes())

    @classmethod
    def create(cls, folder: Path, now: float, days: Mapping[str, int] = DAYS) -> "Vendor":
        """New keys and the first root. Raises UsageError where there are some already."""
        folder = private_folder(Path(folder))
        if any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty.", "Keys are made in a folder of their own.", "Name another.")
        for path in (folder / "keys", folder / "history", folder / "models"):
            private_folder(path)
        keys = {role: _new_key(folder / "keys" / f"{role}.key") for role in ROLES}
        roles = {role: Role(frozenset({manifest.public_hex(key)}), 1) for role, key in keys.items()}
        root = manifest.sign(Root(1, _moment(now, days["root"]), roles), [keys["root"]])
        _keep_root(folder, root)
        return cls(folder)

    @property
    def fingerprint(self) -> str:
        """Of the first root, as a device shows it when it is pinned."""
        return self.roots[0].sha256

    @property
    def models(self) -> dict[str, Target]:
        return dict(self.current.targets.content.models) if self.current else {}

    def rotate(self, role: str, now: float, days: Mapping[str, int] = DAYS) -> None:
        """Dismisses the key of `role` for a new one; devices follow with the next manifest that they see."""
        if role not in ROLES:
            raise UsageError(f"There is no role {role!r}.", f"They are {', '.join(ROLES)}.", "Name one.")
        old = self._key("root")
        new = _new_key(self.folder / "keys" / f"{role}.next.key")
        roles = {**self.root.roles, role: Role(frozenset({manifest.public_hex(new)}), 1)}
        content = Root(self.root.version + 1, _moment(now, days["root"]), roles)
        root = manifest.sign(content, [old, new] if role == "root" else [old])
        _keep_root(self.folder, root)
        os.replace(self.folder / "keys" / f"{role}.next.key", self.folder / "keys" / f"{role}.key")
        self.roots.append(root)
        self.root = content
        if self.current:
            self.sign({}, now=now, days=days)

    def sign(
        self,
        bundles: Mapping[str, Path],
        remove: Iterable[str] = (),
        *,
        now: float,
        days: Mapping[str, int] = DAYS,
        progress: Progress = silent,
    ) -> Manifest:
        """Signs a release: the one before, with `bundles` (name -> file) put in and `remove` left out. With neither it
        is the same release with later dates. Raises UsageError, BundleError."""
        models = self.models
        for name in remove:
            if models.pop(name, None) is None:
                raise UsageError(f"There is no model {name!r}.", f"There are {', '.join(self.models)}.", "Name one.")
        for name, path in bundles.items():
            models[name] = self._take(name, Path(path), progress)
        if not models:
            raise UsageError("There is nothing to sign.", "A release names a model.", "Give NAME=BUNDLE.")
        before = self.current
        version = before.targets.content.version + 1 if before else 1
        targets = manifest.sign(Targets(version, _moment(now, days["targets"]), models), [self._key("targets")])
        stamp = Timestamp(
            before.timestamp.content.version + 1 if before else 1, _moment(now, days["timestamp"]), version,
            targets.sha256,
        )  # fmt: skip
        signed = manifest.sign(stamp, [self._key("timestamp")])
        made = Manifest(tuple(self.roots[-manifest.MOST_ROOTS :]), signed, targets)
        self._check(made, now)
        write_atomically(self.folder / "manifest.json", made.encode(), 0o644)
        self.current = made
        kept = {f"{target.digest}.shoal" for target in models.values()}
        for path in (self.folder / "models").iterdir():
            if path.name not in kept:
                path.unlink()
        return made

    def encoded(self) -> bytes:
        """What is current. Raises UsageError before the first release."""
        if self.current is None:
            raise UsageError("There is nothing to publish.", "No release was signed.", "Sign one: shoal update sign.")
        return self.current.encode()

    def publish(self, folder: Path) -> None:
        """Everything that an edge or a device needs, into `folder`: models first, so that the manifest never lies."""
        data, folder = self.encoded(), Path(folder)
        try:
            (folder / "models").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder} cannot be written.", f"{error}.", "Choose another folder.") from None
        for target in self.models.values():
            copy(self.path(target), folder / "models" / f"{target.digest}.shoal")
        write_atomically(folder / "root.json", manifest.encode_root(self.roots[0]), 0o644)
        write_atomically(folder / "manifest.json", data, 0o644)

    def path(self, target: Target) -> Path:
        """Where the bundle of a signed model is."""
        return self.folder / "models" / f"{target.digest}.shoal"

    def _take(self, name: str, path: Path, progress: Progress) -> Target:
        with Bundle.open(path) as bundle:
            bundle.verify(progress)
            digest = bundle.digest
        kept = self.folder / "models" / f"{digest}.shoal"
        if not kept.exists():
            copy(path, kept, progress)
        return Target(name, digest, kept.stat().st_size, Disk().sha256(kept))

    def _check(self, made: Manifest, now: float) -> None:
        """What a device that pinned the first root would say."""
        offered = Manifest.decode(made.encode())
        Trusted.pin(manifest.encode_root(made.roots[0])).follow(offered).accept(offered, now)

    def _key(self, role: str) -> Ed25519PrivateKey:
        """The key that the newest root names; of a rotation that was cut off it is the next one."""
        why = "there is none"
        for name in (f"{role}.key", f"{role}.next.key"):
            try:
                key = serialization.load_pem_private_key((self.folder / "keys" / name).read_bytes(), None)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError) as error:
                why = str(error)
                continue
            if isinstance(key, Ed25519PrivateKey) and manifest.public_hex(key) in self.root.roles[role].keys:
                return key
            why = "it is not the one that the root names"
        fix = f"Bring it back into {self.folder / 'keys'}."
        raise TrustError(f"Nothing can be signed as {role}.", f"Its key: {why}.", fix)

    def _roots(self) -> Path:
        return self.folder / "history"


def copy(source: Path, target: Path, progress: Progress = silent) -> None:
    """`target` is `source`, whole, or is not there. Raises StorageError."""
    scratch = target.with_name(f".{target.name}.new")
    try:
        with open(source, "rb") as old, open(scratch, "wb") as new:
            size = os.fstat(old.fileno()).st_size
            while piece := old.read(_STEP):
                new.write(piece)
                progress(Event("copy", new.tell(), size, source.name, "B"))
            new.flush()
            os.fsync(new.fileno())
        os.replace(scratch, target)
        Disk().sync_folder(target.parent)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise StorageError(f"{target} could not be written.", f"{error}.", "Free space, or choose another.") from None


def _new_key(path: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )  # fmt: skip
    write_atomically(path, pem)
    return key


def _keep_root(folder: Path, root: Signed) -> None:
    data = manifest.encode_root(root)
    write_atomically(folder / "history" / f"{root.content.version}.root.json", data, 0o644)
    if root.content.version == 1:
        write_atomically(folder / "root.json", data, 0o644)


def _moment(now: float, days: int) -> int:
    if not 1 <= days <= 36500:
        raise UsageError(f"{days} days cannot be signed for.", "It is 1 to 36500.", "Correct it.")
    return int(now) + days * DAY
