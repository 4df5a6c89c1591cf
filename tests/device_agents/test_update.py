"""The power is cut before every file operation of an update, under three kinds of disk; then the rules of a trial."""

import errno
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.device_agents import manifest, update
from shoal.device_agents.disk import Disk
from shoal.device_agents.manifest import Manifest, Role, Root, Target, Targets, Timestamp
from shoal.device_agents.update import State, Updater, read_status, release_id
from shoal.runtime.bundle import Bundle, create
from shoal.runtime.errors import BusyError, StorageError, TrustError, UsageError

NOW = 1_900_000_000
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
STEP = 2048


class Cut(BaseException):
    """The power fails: no handler of the program may catch it, and nothing may be done to the disk after it."""


class QuickDisk(Disk):
    """The real one, but nobody waits for the platter."""

    def sync(self, path):
        pass

    def sync_folder(self, path):
        pass


class FailingDisk(QuickDisk):
    """The real disk, beside a model of what of it would outlive a power cut. Fails before operation number `at`.

    A folder maps names to inodes; an inode has what was written (`now`) and what was synced (`safe`). Operations on a
    folder are pending until it is synced.
    """

    def __init__(self, at: int = -1, error: BaseException | None = None):
        self.at, self.error, self.count = at, error or Cut(), 0
        self.names_now: dict[Path, dict[str, int]] = {}
        self.names_safe: dict[Path, dict[str, int]] = {}
        self.pending: dict[Path, list[tuple[str | None, str | None, int]]] = {}  # (name that goes, that comes, inode)
        self.now: dict[int, bytes] = {}
        self.safe: dict[int, bytes] = {}

    def adopt(self, root: Path) -> "FailingDisk":
        """Takes what lies in `root` for synced."""
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            self._folder(folder)
            for path in folder.iterdir():
                if path.is_file():
                    inode = self._inode(path.read_bytes(), synced=True)
                    self.names_now[folder][path.name] = self.names_safe[folder][path.name] = inode
        return self

    def _folder(self, path: Path):
        self.names_now[path], self.names_safe[path], self.pending[path] = {}, {}, []

    def _inode(self, data: bytes, synced=False) -> int:
        inode = len(self.now)
        self.now[inode], self.safe[inode] = data, data if synced else b""
        return inode

    def _step(self):
        self.count += 1
        if self.count - 1 == self.at:
            self.at = -1 if isinstance(self.error, OSError) else self.count  # a dead program touches nothing more
            raise self.error

    def _change(self, path: Path, edit):
        names = self.names_now[path.parent]
        if path.name not in names:
            names[path.name] = self._inode(b"")
            self.pending[path.parent].append((None, path.name, names[path.name]))
        self.now[names[path.name]] = edit(self.now[names[path.name]])

    def _os(self, path: Path, run, *arguments):
        try:
            self._step()
        except OSError as error:
            raise StorageError(f"{path} could not be written.", f"{error}.", "Free space.") from None
        run(*arguments)

    def make_folder(self, path):
        self._os(path, super().make_folder, path)
        self._folder(path)

    def write(self, path, data):
        self._os(path, super().write, path, data)
        self._change(path, lambda old: bytes(data))

    def put(self, path, offset, data):
        self._os(path, super().put, path, offset, data)
        self._change(path, lambda old: old[:offset].ljust(offset, b"\0") + bytes(data) + old[offset + len(data) :])

    def cut(self, path, length):
        self._os(path, super().cut, path, length)
        self._change(path, lambda old: old[:length].ljust(length, b"\0"))

    def sync(self, path):
        self._os(path, super().sync, path)
        inode = self.names_now[path.parent][path.name]
        self.safe[inode] = self.now[inode]

    def rename(self, old, new):
        self._os(new, super().rename, old, new)
        names = self.names_now[new.parent]
        names[new.name] = names.pop(old.name)
        self.pending[new.parent].append((old.name, new.name, names[new.name]))

    def remove(self, path):
        self._os(path, super().remove, path)
        if self.names_now[path.parent].pop(path.name, None) is not None:
            self.pending[path.parent].append((path.name, None, -1))

    def sync_folder(self, path):
        self._os(path, super().sync_folder, path)
        self.names_safe[path], self.pending[path] = dict(self.names_now[path]), []

    def after_cut(self, model: str, source: Path, target: Path, seed: int = 0):
        """Makes `target` what `source` is after the cut: what was done ("synced"), only what was synced ("lost"), or
        any part of what was not ("torn")."""
        if model == "synced":
            shutil.copytree(source, target)
            return
        chance = random.Random(seed)
        for folder, safe in self.names_safe.items():
            names = dict(safe)
            for gone, come, inode in self.pending[folder] if model == "torn" else ():
                if chance.random() < 0.5:
                    names.pop(gone, None)
                    if come is not None:
                        names[come] = inode
            where = target / folder.relative_to(source)
            where.mkdir(mode=0o700, parents=True)
            for name, inode in names.items():
                data = self.safe[inode] if model == "lost" else self._torn(inode, chance)
                (where / name).write_bytes(data)

    def _torn(self, inode: int, chance: random.Random) -> bytes:
        now, safe = self.now[inode], self.safe[inode]
        if now == safe:
            return now
        length = chance.choice([len(now), len(safe), chance.randint(0, len(now))])
        pieces = []
        for start in range(0, length, 512):
            new, old = now[start : start + 512], safe[start : start + 512]
            block = old if new == old else chance.choice([new, old, b""])
            pieces.append(block.ljust(512, b"\0"))
        return b"".join(pieces)[:length]


class Vendor:
    """Two models of 4 and 8 KB for each release, real bundles; they belong together."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.version = folder, {}, 0
        role = Role(frozenset({manifest.public_hex(KEY)}), 1)
        self.root = manifest.sign(Root(1, NOW + 1000, {name: role for name in manifest.ROLES}), [KEY])

    def release(self, number: int) -> bytes:
        targets = {}
        for name, size in (("camera", 3), ("voice", 7)):
            path = self.folder / f"{name}{number}.shoal"
            if not path.exists():
                with create(path) as writer:
                    writer.add("card", "", f"{name} {number}".encode() * size * 160, alignment=64)
                    writer.commit()
            with Bundle.open(path) as bundle:
                targets[name] = Target(name, bundle.digest, path.stat().st_size, Disk().sha256(path))
            self.files[targets[name].digest] = path.read_bytes()
        self.version += 1
        content = manifest.sign(Targets(self.version, NOW + 1000, targets), [KEY])
        stamp = manifest.sign(Timestamp(self.version, NOW + 1000, self.version, content.sha256), [KEY])
        return Manifest((self.root,), stamp, content).encode()


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    monkeypatch.setattr(update, "SYNC_EVERY", STEP)


@pytest.fixture
def vendor(tmp_path) -> Vendor:
    (tmp_path / "vendor").mkdir()
    return Vendor(tmp_path / "vendor")


def begin(updater: Updater, vendor: Vendor, release: bytes):
    """An update up to the switch, resumed where it was cut."""
    updater.pin(manifest.encode_root(vendor.root))
    updater.offer(release, NOW)
    for target in updater.wanted():
        data, have = vendor.files[target.digest], updater.staged(target)
        while have < len(data):
            have = updater.stage(target, have, data[have : have + 1500])
        updater.finish(target)
    updater.switch()


def install(folder: Path, vendor: Vendor, release: bytes, disk: Disk | None = None, boot: str = "one"):
    with Updater(folder, boot, disk=disk) as updater:
        begin(updater, vendor, release)
        updater.confirm()


def running(updater: Updater, vendor: Vendor, releases: dict[str, bytes]) -> str:
    """Which release the device runs; both of its models are whole and of that one."""
    found = {name: path.read_bytes() for name, path in updater.models.items()}
    for label, release in releases.items():
        models = Manifest.decode(release).targets.content.models
        if found == {name: vendor.files[target.digest] for name, target in models.items()}:
            return label
    assert found == {}
    return "nothing"


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "models").iterdir()}


def digests(release: bytes) -> set[str]:
    return {f"{target.digest}.shoal" for target in Manifest.decode(release).targets.content.models.values()}


def operations(run) -> int:
    disk = FailingDisk()
    run(disk)
    return disk.count


def sweep(tmp_path: Path, before: Path, run, check, seeds: int):
    """`run(disk, folder)` cut before each of its operations; `check(folder)` on what each kind of disk holds then."""
    total, number = None, 0
    while total is None or number < total:
        folder = tmp_path / f"cut{number}"
        shutil.copytree(before, folder)
        disk = FailingDisk(at=number).adopt(folder)
        try:
            run(disk, folder)
            total = disk.count
        except Cut:
            for model, seed in [("synced", 0), ("lost", 0), *(("torn", seed) for seed in range(seeds))]:
                after = tmp_path / f"cut{number}-{model}{seed}"
                disk.after_cut(model, folder, after, seed=1000 * number + seed)
                check(after)
                shutil.rmtree(after)
        shutil.rmtree(folder)
        number += 1
    return number


@pytest.mark.parametrize("seeds", [3, pytest.param(40, marks=pytest.mark.deep)])
def test_a_power_cut_at_any_operation_leaves_the_old_release_or_the_new(tmp_path, vendor, seeds):
    releases = {"old": vendor.release(1), "new": vendor.release(2)}
    before = tmp_path / "before"
    before.mkdir()
    install(before, vendor, releases["old"])
    seen = set()

    def check(after: Path):
        with Updater(after, "two", disk=QuickDisk()) as updater:
            seen.add(running(updater, vendor, releases))
            assert seen <= {"old", "new"}
            if not updater.state.trial and running(updater, vendor, releases) == "old":
                begin(updater, vendor, releases["new"])
            if updater.state.trial:
                updater.confirm()
            assert running(updater, vendor, releases) == "new"
        assert files(after) == digests(releases["old"]) | digests(releases["new"])
        assert {path.name for path in after.iterdir()} == {"journal.json", "trusted.json", "models", "lock"}

    count = sweep(tmp_path, before, lambda disk, folder: install(folder, vendor, releases["new"], disk), check, seeds)
    assert count > 30 and seen == {"old", "new"}


def test_a_power_cut_in_the_first_installation_leaves_nothing_or_the_whole(tmp_path, vendor):
    releases = {"new": vendor.release(1)}
    before = tmp_path / "before"
    before.mkdir()
    seen = set()

    def check(after: Path):
        with Updater(after, "two", disk=QuickDisk()) as updater:
            seen.add(running(updater, vendor, releases))
            if not updater.state.active and not updater.state.trial:
                begin(updater, vendor, releases["new"])
            if updater.state.trial:
                updater.confirm()
            assert running(updater, vendor, releases) == "new"
        assert files(after) == digests(releases["new"])

    sweep(tmp_path, before, lambda disk, folder: install(folder, vendor, releases["new"], disk), check, 3)
    assert seen == {"nothing", "new"}


def test_a_power_cut_while_a_release_is_rolled_back(tmp_path, vendor):
    releases = {"old": vendor.release(1), "new": vendor.release(2)}
    before = tmp_path / "before"
    before.mkdir()
    install(before, vendor, releases["old"])
    with Updater(before, "one") as updater:
        begin(updater, vendor, releases["new"])
        updater.pause()

    def run(disk, folder):
        with Updater(folder, "one", disk=disk) as updater:
            updater.fail("It answers nonsense.")

    def check(after: Path):
        with Updater(after, "two", disk=QuickDisk()) as updater:
            if updater.state.trial:
                assert running(updater, vendor, releases) == "new"
                updater.fail("It answers nonsense.")
            assert running(updater, vendor, releases) == "old"
            assert not updater.wanted() and not updater.ready
        assert files(after) == digests(releases["old"])

    sweep(tmp_path, before, run, check, 3)


def test_recovery_may_be_cut_too(tmp_path, vendor):
    releases = {"old": vendor.release(1), "new": vendor.release(2)}
    before = tmp_path / "before"
    before.mkdir()
    install(before, vendor, releases["old"])
    with Updater(before, "one") as updater:
        begin(updater, vendor, releases["new"])
    third = vendor.release(3)
    with Updater(before, "one") as updater:  # the first strike
        updater.confirm()
        target = updater.offer(third, NOW)[0]
        updater.stage(target, 0, vendor.files[target.digest][:3000])

    def run(disk, folder):
        Updater(folder, "two", disk=disk).close()

    def check(after: Path):
        with Updater(after, "three", disk=QuickDisk()) as updater:
            assert running(updater, vendor, releases) == "new"
            begin(updater, vendor, third)

    assert sweep(tmp_path, before, run, check, 3) > 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_operation_that_fails_is_told_and_nothing_is_lost(tmp_path, vendor, code):
    releases = {"old": vendor.release(1), "new": vendor.release(2)}
    before = tmp_path / "before"
    before.mkdir()
    install(before, vendor, releases["old"])
    for number in range(operations(lambda disk: _on_copy(before, tmp_path / "count", vendor, releases["new"], disk))):
        folder = tmp_path / f"fail{number}"
        shutil.copytree(before, folder)
        disk = FailingDisk(at=number, error=OSError(code, "no")).adopt(folder)
        with pytest.raises(StorageError):
            install(folder, vendor, releases["new"], disk)
        with Updater(folder, "one", disk=QuickDisk()) as updater:
            assert running(updater, vendor, releases) in ("old", "new")
            if not updater.state.trial and updater.wanted():
                begin(updater, vendor, releases["new"])


def _on_copy(before: Path, folder: Path, vendor: Vendor, release: bytes, disk: FailingDisk):
    shutil.copytree(before, folder)
    install(folder, vendor, release, disk.adopt(folder))


# The rules of a trial


@pytest.fixture
def device(tmp_path, vendor):
    folder = tmp_path / "device"
    folder.mkdir()
    install(folder, vendor, vendor.release(1))
    return folder


def trial(folder: Path, vendor: Vendor, boot: str = "one") -> bytes:
    release = vendor.release(2)
    with Updater(folder, boot) as updater:
        begin(updater, vendor, release)
    return release


@pytest.mark.parametrize("boots", [("two", "three"), ("one", "one")])
def test_two_starts_that_nobody_expected_end_a_trial(device, vendor, boots):
    trial(device, vendor)
    with Updater(device, boots[0]) as updater:
        assert updater.state.trial and updater.state.trial.strikes == 1
    with Updater(device, boots[1]) as updater:
        assert updater.state.trial is None and not updater.ready
        ((_, why),) = updater.state.refused
        assert ("machine" in why) == (boots[0] != boots[1])


def test_a_restart_that_the_device_does_itself_is_no_strike(device, vendor):
    trial(device, vendor)
    for boot in ("one", "two", "two", "three"):
        with Updater(device, boot) as updater:
            updater.pause()
    with Updater(device, "four") as updater:
        assert updater.state.trial and updater.state.trial.strikes == 1
        assert updater.state.trial.boot == "four"


def test_a_random_restart_after_a_planned_one_counts(device, vendor):
    """The hole of updaters that remember only that they wanted a restart: this one forgets it when it has happened."""
    trial(device, vendor)
    with Updater(device, "one") as updater:
        updater.pause()
    Updater(device, "two").close()
    with Updater(device, "three") as updater:
        assert updater.state.trial is None or updater.state.trial.strikes == 2
        assert release_id(updater.release) in dict(updater.state.refused)


def test_a_release_that_failed_here_is_not_tried_again_but_the_next_is(device, vendor):
    release = trial(device, vendor)
    with Updater(device, "one") as updater:
        updater.fail("It answers nonsense.")
        assert updater.offer(release, NOW) == [] and not updater.ready
        vendor.version += 1
        assert updater.offer(vendor.release(2), NOW) == []  # signed again: still the same models
        begin(updater, vendor, vendor.release(3))
        updater.confirm()


def test_a_person_goes_back_and_stays_there(device, vendor):
    releases = {"old": Manifest.decode(vendor.release(1)).encode(), "new": trial(device, vendor)}
    with Updater(device, "one") as updater:
        updater.confirm()
        updater.roll_back()
        assert running(updater, vendor, releases) == "old" and not updater.ready
    with Updater(device, "two") as updater:
        assert running(updater, vendor, releases) == "old"


def test_there_is_nothing_to_go_back_to_before_the_second_release(device):
    with Updater(device, "one") as updater, pytest.raises(UsageError):
        updater.roll_back()


def test_a_newer_release_waits_until_the_trial_is_over(device, vendor):
    trial(device, vendor)
    with Updater(device, "one") as updater:
        assert updater.offer(vendor.release(3), NOW) == []
        updater.confirm()
        assert {target.name for target in updater.wanted()} == {"camera", "voice"}


def test_a_trial_whose_file_was_lost_fails(device, vendor):
    trial(device, vendor)
    with Updater(device, "one") as updater:
        lost = updater.models["camera"]
        updater.pause()
    lost.unlink()
    with Updater(device, "one") as updater:
        assert updater.state.trial is None and set(updater.models) == {"camera", "voice"}


# Staging


def test_bytes_that_were_not_signed_are_removed(device, vendor):
    release = vendor.release(2)
    with Updater(device, "one") as updater:
        target = updater.offer(release, NOW)[0]
        data = bytearray(vendor.files[target.digest])
        data[-1] ^= 1
        updater.stage(target, 0, bytes(data))
        with pytest.raises(TrustError, match="not what was signed"):
            updater.finish(target)
        assert updater.staged(target) == 0
        begin(updater, vendor, release)


def test_more_than_was_signed_is_not_written(device, vendor):
    with Updater(device, "one") as updater:
        target = updater.offer(vendor.release(2), NOW)[0]
        with pytest.raises(UsageError):
            updater.stage(target, 0, bytes(target.length + 1))
        with pytest.raises(UsageError):
            updater.stage(target, 5, b"late")
        with pytest.raises(UsageError):
            updater.finish(target)
        assert updater.staged(target) == 0


def test_a_bundle_under_the_digest_of_another(tmp_path, device, vendor):
    """Signed by mistake: the file's hash holds, what is in it is not the bundle that the manifest names."""
    offered = Manifest.decode(vendor.release(2))
    models = dict(offered.targets.content.models)
    wrong = replace(models["camera"], digest="ab" * 32)
    vendor.files[wrong.digest] = vendor.files[models["camera"].digest]
    content = manifest.sign(replace(offered.targets.content, models=models | {"camera": wrong}), [KEY])
    stamp = manifest.sign(replace(offered.timestamp.content, targets_sha256=content.sha256), [KEY])
    with Updater(device, "one") as updater, pytest.raises(TrustError, match="another digest"):
        begin(updater, vendor, Manifest(offered.roots, stamp, content).encode())


def test_a_disk_without_room_is_found_out_before_the_first_byte(device, vendor):
    class Full(Disk):
        def free(self, folder):
            return 1000

    release = vendor.release(2)
    with Updater(device, "one", disk=Full()) as updater, pytest.raises(StorageError, match="room"):
        begin(updater, vendor, release)
    assert files(device) == digests(vendor.release(1))


def test_a_device_takes_only_the_models_that_it_wants(tmp_path, vendor):
    (tmp_path / "small").mkdir()
    with Updater(tmp_path / "small", "one") as updater:
        updater.take_only(["camera"])
        begin(updater, vendor, vendor.release(1))
        updater.confirm()
        assert set(updater.models) == {"camera"} and len(files(tmp_path / "small")) == 1


# Trust, and the folder


def test_nothing_is_believed_before_a_root_was_handed_over(tmp_path, vendor):
    (tmp_path / "fresh").mkdir()
    with Updater(tmp_path / "fresh", "one") as updater, pytest.raises(TrustError, match="trusts no signer"):
        updater.offer(vendor.release(1), NOW)


def test_another_root_does_not_replace_the_pinned_one(device):
    other = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
    role = Role(frozenset({manifest.public_hex(other)}), 1)
    root = manifest.sign(Root(1, NOW + 9, {name: role for name in manifest.ROLES}), [other])
    with Updater(device, "one") as updater, pytest.raises(TrustError, match="Another signer"):
        updater.pin(manifest.encode_root(root))


def test_what_was_seen_outlives_the_process_so_it_cannot_be_rolled_back(device, vendor):
    old = vendor.release(1)
    trial(device, vendor)
    with Updater(device, "one") as updater, pytest.raises(manifest.ManifestError) as caught:
        updater.offer(old, NOW)
    assert caught.value.reason == "rollback"


def test_one_process_at_a_time(device):
    with Updater(device, "one"):
        with pytest.raises(BusyError):
            Updater(device, "one")
        assert read_status(device)["release"] == 1
    Updater(device, "one").close()


def test_a_damaged_journal_is_begun_anew_and_what_is_whole_is_used(device, vendor):
    (device / "journal.json").write_bytes(b'{"active":{"camera":"../../etc/passwd"}}')
    with Updater(device, "one") as updater:
        assert updater.note and updater.state == State() and updater.wanted() == [] and updater.ready
        updater.switch()
        updater.confirm()
        assert set(updater.models) == {"camera", "voice"}


def test_damaged_trust_is_not_begun_anew(device):
    (device / "trusted.json").write_bytes(b"{}")
    with pytest.raises(TrustError, match="damaged"):
        Updater(device, "one")


def test_a_link_in_the_place_of_a_file_is_not_followed(device, vendor, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    release = vendor.release(2)
    with Updater(device, "one") as updater:
        target = updater.offer(release, NOW)[0]
        (device / "models" / f"{target.digest}.part").symlink_to(outside)
        with pytest.raises(StorageError):
            updater.stage(target, 0, b"theirs")
    assert outside.read_bytes() == b"mine"
