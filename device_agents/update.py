"""Model updates on a device: staged, verified, switched, watched, and kept or rolled back.

    offer(manifest)  what is signed is believed, and what is missing is wanted
    stage, finish    bytes into DIGEST.part, synced every MiB; verified, then renamed to DIGEST.shoal
    switch           all models of a release at once, on trial: one small file is replaced, so it happens or it does not
    confirm          the health window passed: the release is kept, and the one before it too
    fail             back to the release before; this one is not tried again

A power cut or a kill at any file operation leaves the old release or the new one, whole. A trial that never reaches
`confirm` ends: whoever opens the updater inside the window counts as a strike unless the journal expects him, and the
second strike fails the release. The journal holds the boot that the window belongs to, so neither a random restart nor
a clock that began anew can pass for a window survived. It knows nothing about links; a boot id and the time come in.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal.runtime.errors import BundleError, BusyError, StorageError, TrustError, UsageError

from .disk import Disk
from .home import private_folder
from .manifest import Manifest, ManifestError, Target, Trusted, canonical

SYNC_EVERY = 1 << 20  # bytes staged between two syncs: what a power cut costs at most
STRIKES = 2  # starts inside a health window that nobody expected, until the release has failed
MOST_STATE = 1 << 20
_MOST_REFUSED = 16
_SPARE = 16 << 20  # bytes that staging leaves free on the disk
_FILE = re.compile(r"([0-9a-f]{64})\.(shoal|part)")


@dataclass(frozen=True)
class Trial:
    """A release in its health window. `boot` is the one the window began in; `expected`: the next start is ours."""

    models: Mapping[str, str]
    boot: str
    strikes: int = 0
    expected: bool = False


@dataclass(frozen=True)
class State:
    """The journal. Models are name -> bundle digest; `refused`: (release, why it failed here), the latest last."""

    active: Mapping[str, str] = field(default_factory=dict)
    previous: Mapping[str, str] = field(default_factory=dict)
    trial: Trial | None = None
    refused: tuple[tuple[str, str], ...] = ()
    only: tuple[str, ...] = ()  # models that this device takes of a release; none: all

    def encode(self) -> bytes:
        return canonical({"format": 1, **asdict(self)})

    @classmethod
    def decode(cls, data: bytes) -> "State":
        """What `encode` wrote. Raises StorageError when the disk damaged it."""
        try:
            value = json.loads(data)
            trial = Trial(**value["trial"]) if value["trial"] else None
            refused = tuple((release, why) for release, why in value["refused"])
            state = cls(value["active"], value["previous"], trial, refused, tuple(value["only"]))
            same = state.encode() == data
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            same = False
        releases = [state.active, state.previous, state.trial.models if state.trial else {}] if same else []
        if not same or not all(
            isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
            for release in releases
            for digest in release.values()
        ):
            raise StorageError("The update journal is damaged.", "It is not what was written.", "It is begun anew.")
        return state


class Updater:
    """The updates in `folder`. One process at a time holds it open (BusyError).

    `boot` identifies this boot of the machine. `check(path, target)` opens a verified file and raises ShoalError where
    it cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        boot: str,
        *,
        disk: Disk | None = None,
        check: Callable[[Path, Target], None] | None = None,
    ):
        self.folder, self._disk, self._boot = private_folder(Path(folder)), disk or Disk(), boot
        self._check = check or check_bundle
        self._journal, self._trust, self._store = (folder / name for name in ("journal.json", "trusted.json", "models"))
        self._lock = _alone(folder)
        try:
            self._disk.folder(self._store)
            self.trusted = self._load_trusted()
            self.state, self.note = State(), ""
            self._begin()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "Updater":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What is believed

    def pin(self, root: bytes) -> Trusted:
        """Believes the signer of `root`, handed over by a person. Raises TrustError where another is pinned."""
        new = Trusted.pin(root)
        if self.trusted and self.trusted.pinned != new.pinned:
            raise TrustError(
                "Another signer is trusted already.",
                f"Its root has the fingerprint {self.trusted.pinned}.",
                f"To dismiss it, remove {self._trust}.",
            )
        if not self.trusted:
            self._believe(new)
        return new

    def take_only(self, names: Iterable[str]) -> None:
        """Of a release this device takes these models from now on; of none named, all."""
        self._write(replace(self.state, only=tuple(sorted(set(names)))))

    def offer(self, data: bytes, now: float) -> list[Target]:
        """Judges a manifest at `now` (seconds since 1970); returns what of it has to be staged. Raises TrustError."""
        if self.trusted is None:
            raise TrustError(
                "The update is refused.",
                "This device trusts no signer of models yet.",
                "Hand it the signer's root: shoal update trust ROOT.json.",
            )
        offered = Manifest.decode(data)
        self._believe(self.trusted.follow(offered))  # kept even if the rest is refused: a dismissed key stays so
        self._believe(self.trusted.accept(offered, now))
        self._collect()
        return self.wanted()

    @property
    def targets(self) -> dict[str, Target]:
        """What the newest believed release holds for this device."""
        models = self.trusted.models if self.trusted else {}
        only = self.state.only
        return {name: target for name, target in models.items() if not only or name in only}

    @property
    def release(self) -> dict[str, str]:
        return {name: target.digest for name, target in self.targets.items()}

    def wanted(self) -> list[Target]:
        """What has to be staged before `switch`; nothing while a trial runs or when the release failed here before."""
        if self.state.trial or not self._is_new():
            return []
        missing = {target.digest: target for target in self.targets.values()}
        return [target for digest, target in sorted(missing.items()) if self._disk.size(self._file(digest)) is None]

    @property
    def ready(self) -> bool:
        """Whether `switch` would change something."""
        return self.state.trial is None and self._is_new() and not self.wanted()

    # Staging

    def staged(self, target: Target) -> int:
        """Bytes that are there of it: where a transfer goes on."""
        return min(self._disk.size(self._part(target)) or 0, target.length)

    def stage(self, target: Target, offset: int, data: bytes) -> int:
        """Adds `data`, which begins at byte `offset`, and returns the new count. Raises UsageError for a gap."""
        have = self.staged(target)
        if offset != have or len(data) > target.length - have:
            why = f"{len(data)} bytes came for byte {offset}; {have} of {target.length} are there."
            raise UsageError(f"{target.name} cannot go on so.", why, "Send what follows, and no more than was signed.")
        if have == 0 and self._disk.free(self._store) < target.length + _SPARE:
            why = f"It has {target.length} bytes and the disk too few."
            raise StorageError(f"There is no room for {target.name}.", why, "Free space.")
        view = memoryview(data)
        while view:
            step = view[: SYNC_EVERY - have % SYNC_EVERY]
            self._disk.put(self._part(target), have, step)
            view, have = view[len(step) :], have + len(step)
            if have % SYNC_EVERY == 0:
                self._disk.sync(self._part(target))
        return have

    def finish(self, target: Target) -> Path:
        """Verifies what was staged and gives it its name. What does not hold is removed, to be fetched again."""
        part, path = self._part(target), self._file(target.digest)
        if self.staged(target) != target.length:
            raise UsageError(f"{target.name} is not whole.", f"{self.staged(target)} bytes are there.", "Stage it.")
        self._disk.sync(part)
        try:
            if self._disk.sha256(part) != target.sha256:
                why = "What came is not what was signed."
                raise TrustError(f"The update {target.name} is refused.", why, "Fetch it again.")
            self._check(part, target)
        except (TrustError, BundleError):
            self._disk.remove(part)
            raise
        self._disk.rename(part, path)
        self._disk.sync_folder(self._store)
        return path

    # The trial

    def switch(self) -> Mapping[str, Path]:
        """Puts the newest release on trial: `models` leads to it from now on."""
        if not self.ready:
            raise UsageError("There is nothing to switch to.", "No whole new release is here.", "Stage it first.")
        self._write(replace(self.state, trial=Trial(self.release, self._boot)))
        return self.models

    def confirm(self) -> None:
        """The health window passed, in this boot. The release is kept; of those before it, one."""
        trial = self._on_trial()
        if trial.boot != self._boot:
            raise UsageError("The trial cannot be confirmed.", "Its window began in another boot.", "Begin it anew.")
        previous = self.state.active if self.state.active != trial.models else self.state.previous
        self._write(replace(self.state, active=trial.models, previous=previous, trial=None))
        self._collect()

    def fail(self, why: str) -> None:
        """The release on trial does not work: the one before it is back, and this one is not tried again."""
        self._write(_failed(self.state, self._on_trial(), why))
        self._collect()

    def pause(self) -> None:
        """Whoever opens the updater next is expected: a restart that this device does itself is no strike."""
        if self.state.trial and not self.state.trial.expected:
            self._write(replace(self.state, trial=replace(self.state.trial, expected=True)))

    def roll_back(self) -> None:
        """A person prefers the release before: it is back, and the present one is not tried again."""
        if self.state.trial:
            return self.fail("A person went back.")
        if not self.state.previous:
            raise UsageError("There is nothing to go back to.", "This device kept no release before.", "Publish one.")
        refused = _refuse(self.state, self.state.active, "A person went back.")
        active, previous = self.state.previous, self.state.active
        return self._write(replace(self.state, active=active, previous=previous, refused=refused))

    @property
    def models(self) -> Mapping[str, Path]:
        """Name -> file of what to run now. Every file was verified; one that the disk lost since is left out."""
        current = self.state.trial.models if self.state.trial else self.state.active
        found = {name: self._file(digest) for name, digest in current.items()}
        return {name: path for name, path in found.items() if self._disk.size(path) is not None}

    # Inside

    def _begin(self) -> None:
        """After a start: reads the journal, judges an unfinished trial, and forgets what nobody needs."""
        for name in self._disk.names(self.folder):
            if name.endswith(".new"):
                self._disk.remove(self.folder / name)
        data = self._disk.read(self._journal, MOST_STATE)
        if data is not None:
            try:
                self.state = State.decode(data)
            except StorageError as error:
                self.note = error.what
                return  # nothing is removed: what is whole here is used when the release is wanted again
        trial = self.state.trial
        if trial and any(self._disk.size(self._file(digest)) is None for digest in trial.models.values()):
            self._write(_failed(self.state, trial, "A file of it was lost."))
        elif trial:
            strikes = trial.strikes + (not trial.expected)
            if strikes >= STRIKES:
                how = "the agent died" if trial.boot == self._boot else "the machine restarted"
                why = f"It was cut off {strikes} times before it was confirmed; the last time {how}."
                self._write(_failed(self.state, trial, why))
            else:
                self._write(replace(self.state, trial=Trial(trial.models, self._boot, strikes)))
        self._collect()
        for target in self.wanted():  # beyond the last whole step nothing was synced: it may be torn
            have = self.staged(target)
            if have and (kept := (have - 1) // SYNC_EVERY * SYNC_EVERY) != have:
                self._disk.cut(self._part(target), kept)

    def _collect(self) -> None:
        """Removes every file of the store that no release here needs."""
        state = self.state
        needed = {*state.active.values(), *state.previous.values()}
        if state.trial:
            needed |= set(state.trial.models.values())
        if self._is_new():
            needed |= set(self.release.values())
        names = self._disk.names(self._store)
        for name in names:
            found = _FILE.fullmatch(name)
            if not found or found[1] not in needed or (found[2] == "part" and f"{found[1]}.shoal" in names):
                self._disk.remove(self._store / name)

    def _is_new(self) -> bool:
        release = self.release
        current = self.state.trial.models if self.state.trial else self.state.active
        return bool(release) and release != current and release_id(release) not in dict(self.state.refused)

    def _on_trial(self) -> Trial:
        if self.state.trial is None:
            raise UsageError("No release is on trial.", "It was confirmed or failed before.", "Nothing is to be done.")
        return self.state.trial

    def _load_trusted(self) -> Trusted | None:
        data = self._disk.read(self._trust, MOST_STATE)
        try:
            return None if data is None else Trusted.decode(data)
        except ManifestError as error:
            # Not begun anew by itself: who forgets what he saw can be rolled back
            raise TrustError(
                f"{self._trust} is damaged.", error.why, "Remove it, and hand over the signer's root again."
            ) from None

    def _believe(self, trusted: Trusted) -> None:
        if trusted != self.trusted:
            self._disk.replace(self._trust, trusted.encode())
            self.trusted = trusted

    def _write(self, state: State) -> None:
        self._disk.replace(self._journal, state.encode())
        self.state = state

    def _file(self, digest: str) -> Path:
        return self._store / f"{digest}.shoal"

    def _part(self, target: Target) -> Path:
        return self._store / f"{target.digest}.part"


def release_id(models: Mapping[str, str]) -> str:
    """Identifies a set of models (name -> digest)."""
    return hashlib.sha256(canonical(dict(models))).hexdigest()


def check_bundle(path: Path, target: Target) -> None:
    """`path` is the bundle that was signed and every section of it is whole. Raises ShoalError."""
    from shoal.runtime.bundle import Bundle

    with Bundle.open(path) as bundle:
        if bundle.digest != target.digest:
            why = "Its bundle has another digest than was signed."
            raise TrustError(f"The update {target.name} is refused.", why, "Sign the bundle again.")
        bundle.verify()


def read_status(folder: Path) -> dict[str, Any]:
    """What a folder of updates says, for a person, beside whoever holds it open. Raises StorageError, TrustError."""
    disk = Disk()
    journal, trust = (disk.read(folder / name, MOST_STATE) for name in ("journal.json", "trusted.json"))
    state = State.decode(journal) if journal else State()
    trusted = Trusted.decode(trust) if trust else None
    return {
        "signer": trusted.pinned if trusted else None,
        "release": trusted.targets.content.version if trusted and trusted.targets else None,
        "current until": trusted.expires() if trusted else None,
        "offered": {name: target.digest for name, target in trusted.models.items()} if trusted else {},
        **asdict(state),
    }


def boot_id(root: Path = Path("/")) -> str:
    """Different after every start of the machine; "" where the system does not say."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text()[:64].strip()
    except OSError:
        return ""


def _failed(state: State, trial: Trial, why: str) -> State:
    return replace(state, trial=None, refused=_refuse(state, trial.models, why))


def _refuse(state: State, models: Mapping[str, str], why: str) -> tuple[tuple[str, str], ...]:
    return (*state.refused[-(_MOST_REFUSED - 1) :], (release_id(models), why[:200]))


def _alone(folder: Path) -> int:
    """A lock that ends with this process. Raises BusyError."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{folder} cannot be used.", f"{error}.", "Mend the folder.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise BusyError(
            f"The updates in {folder} are in use.", "The agent holds them.", "Let it update, or stop it first."
        ) from None
    return descriptor
