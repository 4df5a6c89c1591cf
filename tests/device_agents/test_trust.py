"""Whom a machine trusts: kept whole, seen by every process, gone for good when revoked. And the verbs that say so."""

import asyncio
import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from shoal import cli
from shoal.device_agents import trust
from shoal.device_agents.endpoint import Listener
from shoal.device_agents.identity import Identity
from shoal.device_agents.pairing import Code, Window
from shoal.device_agents.trust import FIRST_RIGHTS, RIGHTS, Peer, Peers
from shoal.runtime.errors import StorageError, TrustError, UsageError


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
    return [Identity.open(tmp_path_factory.mktemp("identity")) for _ in range(4)]


@pytest.fixture
def many(identities):
    return [Peer.of(identity.certificate, f"pi {number}", "device") for number, identity in enumerate(identities)]


@pytest.fixture
def peers(tmp_path):
    return Peers.open(tmp_path / "peers")


def names(peers: Peers) -> list[str]:
    return [peer.name for peer in peers.list()]


def file_of(tmp_path, peer: Peer):
    return tmp_path / "peers" / f"{peer.fingerprint}.json"


def test_what_is_added_is_there_for_everybody(tmp_path, peers, many):
    kept = peers.add(replace(many[0], address="tcp:10.0.0.2:4707"))
    assert kept.paired_at.endswith("+00:00") and kept.rights == FIRST_RIGHTS and "federate" not in kept.rights
    assert kept.may("infer") and not kept.may("federate")
    other = Peers.open(tmp_path / "peers")
    assert other.list() == peers.list() == [kept]
    assert other.get(kept.fingerprint) == kept and other.certificates() == [kept.certificate]
    assert other.get("0" * 64) is None and other.get("nothing") is None
    assert stat.S_IMODE(file_of(tmp_path, kept).stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "peers").iterdir()] == [f"{kept.fingerprint}.json"]


def test_a_revoked_peer_is_gone_at_once_and_nothing_brings_it_back(tmp_path, peers, many):
    first, second = (peers.add(peer) for peer in many[:2])
    other = Peers.open(tmp_path / "peers")
    assert names(other) == ["pi 0", "pi 1"]
    peers.revoke(first)
    assert other.get(first.fingerprint) is None and other.certificates() == [second.certificate]
    for change in (lambda: other.saw(first), lambda: other.rename(first, "x"), lambda: other.allow(first, RIGHTS)):
        with pytest.raises(TrustError, match="revoked"):
            change()
    other.revoke(first)
    assert names(peers) == ["pi 1"]
    peers.add(first)  # paired again
    assert names(other) == ["pi 0", "pi 1"]


def test_changes_by_another_process_are_seen(tmp_path, peers, many):
    kept = peers.add(many[0])
    assert names(peers) == ["pi 0"]
    code = (
        "import sys; from pathlib import Path; from shoal.device_agents.trust import Peers;"
        "peers = Peers.open(Path(sys.argv[1])); peers.rename(peers.find('pi 0'), 'zz 9')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "peers")], check=True)
    assert names(peers) == ["zz 9"] and peers.get(kept.fingerprint).name == "zz 9"


def test_changes_in_one_tick_of_the_clock_are_seen(tmp_path, peers, many):
    other = Peers.open(tmp_path / "peers")
    kept = peers.add(many[0])
    for number in range(200):
        kept = peers.rename(kept, f"name {number % 10}")
        assert names(other) == [kept.name]


def test_writers_at_once_lose_nothing(tmp_path, peers, many):
    kept = [peers.add(peer) for peer in many]

    def change(number: int) -> None:
        mine = Peers.open(tmp_path / "peers")
        peer = kept[number % 4]
        if number % 3 == 0:
            mine.saw(peer, "tcp:host:1")
        elif number % 3 == 1:
            mine.allow(peer, RIGHTS)
        else:
            mine.rename(peer, f"new {number % 4}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(48)))
    for number, peer in enumerate(peers.list()):
        assert peer == replace(
            kept[number], name=f"new {number}", rights=RIGHTS, address="tcp:host:1", seen_at=peer.seen_at
        )


def test_two_of_one_name_are_told_apart(peers, many):
    for peer in many[:3]:
        peers.add(replace(peer, name="é" * 32))
    assert len(set(names(peers))) == 3 and all(trust.is_name(name) for name in names(peers))
    again = peers.add(peers.list()[0])  # paired a second time, it keeps its own
    assert again.name == peers.list()[0].name and len(peers.list()) == 3


def test_find_takes_a_name_or_a_beginning(peers, many):
    kept = [peers.add(peer) for peer in many]
    for peer in kept:
        for text in (peer.name, peer.id, peer.id.lower().replace("-", ""), peer.id[:11], peer.fingerprint,
                     peer.fingerprint[:16]):  # fmt: skip
            assert peers.find(text) == peer
    for text in ("", "-", "nobody", "pi", "é"):
        with pytest.raises(UsageError, match="no peer"):
            peers.find(text)


def test_find_refuses_what_means_two(peers, many, monkeypatch):
    twins = [replace(peer, id="AAAA-" + peer.id[5:]) for peer in many[:2]]
    monkeypatch.setattr(peers, "list", lambda: twins)
    with pytest.raises(UsageError, match="several"):
        peers.find("aaaa")


@pytest.mark.parametrize("name", ["", " pi", "a\nb", "\x1b[2J", "a" * 65])
def test_a_name_that_cannot_be_shown_is_refused(peers, many, name):
    kept = peers.add(many[0])
    with pytest.raises(UsageError):
        peers.rename(kept, name)
    assert names(peers) == ["pi 0"]


def test_a_taken_name_and_a_right_that_is_none_are_refused(peers, many):
    first, second = (peers.add(peer) for peer in many[:2])
    with pytest.raises(UsageError, match="taken"):
        peers.rename(first, second.name)
    with pytest.raises(UsageError, match="no right root"):
        peers.allow(first, {"infer", "root"})
    assert peers.rename(first, first.name) == first and peers.allow(first, ()).rights == frozenset()


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:100],
    "not UTF-8": lambda data: b"\xff" + data,
    "a list": lambda data: b"[]",
    "deep": lambda data: b"[" * 10_000,
    "too long": lambda data: data + b" " * 20_000,
    "a number that is none": lambda data: data.replace(b'"format": 1', b'"format": ' + b"9" * 5000),
    "another format": lambda data: data.replace(b'"format": 1', b'"format": 2'),
    "another role": lambda data: data.replace(b'"device"', b'"root"'),
    "another right": lambda data: data.replace(b'"infer"', b'"root"'),
    "rights of a wrong type": lambda data: data.replace(b'"infer"', b"[1]"),
    "rights that are a text": lambda data: json.dumps(json.loads(data) | {"rights": "infer"}).encode(),
    "a name that moves the cursor": lambda data: data.replace(b'"pi 0"', b'"\\u001b[2J"'),
    "a name of a wrong type": lambda data: data.replace(b'"pi 0"', b"7"),
    "an address that is a number": lambda data: data.replace(b'"address": null', b'"address": 7'),
    "an address that moves the cursor": lambda data: data.replace(b'"address": null', b'"address": "\\u001b[2J"'),
    "no certificate": lambda data: json.dumps(json.loads(data) | {"certificate": ""}).encode(),
    "certificate not base64": lambda data: data.replace(b'"certificate": "', b'"certificate": "!'),
    "certificate altered": lambda data: data[:-40] + (b"A" if data[-40:-39] != b"A" else b"B") + data[-39:],
    "no rights": lambda data: json.dumps({k: v for k, v in json.loads(data).items() if k != "rights"}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_trusts_nobody(tmp_path, peers, many, damage):
    first, second = (peers.add(peer) for peer in many[:2])
    path = file_of(tmp_path, first)
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    for ask in (peers.list, lambda: peers.get(first.fingerprint), lambda: peers.find(second.name)):
        with pytest.raises(TrustError, match=first.fingerprint):
            ask()
    assert peers.get(second.fingerprint) == second  # no one else is kept out
    assert peers.certificates() == [second.certificate]
    peers.revoke(first)
    assert names(peers) == [second.name]


def test_a_certificate_under_another_s_name_is_refused(tmp_path, peers, many):
    first, second = (peers.add(peer) for peer in many[:2])
    file_of(tmp_path, first).write_bytes(file_of(tmp_path, second).read_bytes())
    with pytest.raises(TrustError, match="another peer's"):
        peers.get(first.fingerprint)


def test_what_could_not_be_read_back_is_not_written(tmp_path, peers, many):
    for wrong in (
        {"role": "root"}, {"certificate": b"0"}, {"address": "\n"}, {"fingerprint": "../../escape"},
        {"fingerprint": many[1].fingerprint},
    ):  # fmt: skip
        with pytest.raises(TrustError):
            peers.add(replace(many[0], **wrong))
    assert not list((tmp_path / "peers").iterdir())


def test_a_full_disk_changes_nothing(tmp_path, peers, many, monkeypatch):
    kept = peers.add(many[0])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        peers.rename(kept, "new")
    monkeypatch.undo()
    assert peers.list() == [kept]
    assert len(list((tmp_path / "peers").iterdir())) == 1


def test_a_folder_that_cannot_be_read_is_said(tmp_path, peers, many, monkeypatch):
    kept = peers.add(many[0])

    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "unlink", broken)
    with pytest.raises(StorageError, match="could not be revoked"):
        peers.revoke(kept)
    monkeypatch.setattr(Path, "stat", broken)
    with pytest.raises(StorageError, match="cannot be read"):
        peers.certificates()  # an empty list would lock everybody out without a word
    monkeypatch.undo()
    assert peers.list() == [kept]


@pytest.mark.parametrize("step", ["mkstemp", "fsync", "replace"])
def test_killed_while_writing_the_old_or_the_new_is_there(tmp_path, peers, many, step):
    kept = peers.add(many[0])
    where = {"mkstemp": "tempfile.mkstemp", "fsync": "os.fsync", "replace": "os.replace"}[step]
    code = (
        "import sys, os, tempfile, signal; from pathlib import Path; from shoal.device_agents.trust import Peers;"
        "peers = Peers.open(Path(sys.argv[1])); peer = peers.list()[0];"
        f"{where} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL);"
        "peers.rename(peer, 'new')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "peers")])
    assert done.returncode == -9
    assert peers.list() == [kept]
    assert names(Peers.open(tmp_path / "peers")) == ["pi 0"]  # and the lock died with its holder
    assert len(list((tmp_path / "peers").iterdir())) == 1
    peers.rename(kept, "new")


@pytest.fixture
def shoal(tmp_path, monkeypatch, capsys):
    """Runs a command line in a home of its own: (status, stdout, stderr)."""
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))

    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(list(argv))
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_the_verb_lists_shows_renames_allows_and_revokes(tmp_path, shoal, many):
    assert shoal("peers", "list", "--json")[:2] == (0, "[]\n")
    Identity.open(tmp_path / "home" / "edge")
    peers = Peers.open(tmp_path / "home" / "edge" / "peers")
    first = peers.add(many[0])
    peers.add(many[1])
    status, out, _ = shoal("peers", "list")
    assert status == 0 and first.id in out and "pi 1" in out and "infer, update" in out
    assert [peer["name"] for peer in json.loads(shoal("peers", "list", "--json")[1])] == ["pi 0", "pi 1"]
    assert first.fingerprint in shoal("peers", "show", "pi 0")[1]
    assert json.loads(shoal("peers", "rename", first.id, "kitchen", "--json")[1])["name"] == "kitchen"
    assert json.loads(shoal("peers", "--json", "allow", "kitchen", "federate", "infer")[1])["rights"] == [
        "federate", "infer"
    ]  # fmt: skip
    assert json.loads(shoal("peers", "allow", "kitchen", "--json")[1])["rights"] == []
    assert shoal("peers", "allow", "kitchen", "root")[0] == 2
    assert shoal("peers", "revoke", "nobody")[0] == 2
    status, out, err = shoal("peers", "revoke", "kitchen")
    assert (status, "trusted no more" in err) == (0, True)
    assert names(peers) == ["pi 1"]


def test_the_verb_asks_which_where_a_machine_is_both(tmp_path, shoal, many):
    for role, peer in (("edge", many[0]), ("device", replace(many[1], role="edge"))):
        Identity.open(tmp_path / "home" / role)
        Peers.open(tmp_path / "home" / role / "peers").add(peer)
    status, _, err = shoal("peers", "list")
    assert status == 2 and "--edge or --device" in err
    for argv, name in ((("--edge", "list"), "pi 0"), (("list", "--device"), "pi 1")):
        assert [peer["name"] for peer in json.loads(shoal("peers", *argv, "--json")[1])] == [name]


def test_the_verb_names_a_damaged_file(tmp_path, shoal, many):
    Identity.open(tmp_path / "home" / "device")
    kept = Peers.open(tmp_path / "home" / "device" / "peers").add(replace(many[0], role="edge"))
    (tmp_path / "home" / "device" / "peers" / f"{kept.fingerprint}.json").write_bytes(b"{")
    status, out, err = shoal("peers", "list", "--json")
    assert (status, out) == (13, "") and kept.fingerprint in err


class Edge:
    """A real listener on loopback, in a thread with a loop of its own; `window` is the one that is open."""

    def __init__(self, folder):
        self.identity = Identity.open(folder, "attic server")
        self.peers = Peers.open(folder / "peers")
        self.window: Window | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

        async def greet(connection):
            pass

        self._listener = Listener(["127.0.0.1:0"], self.identity, self.peers, greet, lambda: self.window)
        self._wait(self._listener.start())
        self.address = str(self._listener.addresses[0])

    def open_window(self) -> str:
        self.window = Window(Code.new(), self._loop.time())
        return str(self.window.code)

    def close(self) -> None:
        self._wait(self._listener.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


def test_the_verb_pairs_over_a_real_link(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    edge = Edge(tmp_path / "edge")
    try:
        assert cli.main(["pair", edge.address, "1234-5678"]) == 2  # a typing error: nobody was asked
        assert cli.main(["pair", edge.address, str(Code.new())]) == 12  # no window is open
        right = edge.open_window()
        wrong = next(code for code in map(str, iter(Code.new, None)) if code != right)
        assert cli.main(["pair", edge.address, wrong]) == 13
        assert "fix: Type the code that the edge shows" in capsys.readouterr().err
        assert not edge.peers.list()
        assert cli.main(["pair", edge.address, right, "--name", "kitchen", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        (device,) = edge.peers.list()
        (known,) = Peers.open(tmp_path / "home" / "device" / "peers").list()
        assert (device.name, device.role, device.id) == ("kitchen", "device", said["own_id"])
        assert (known.certificate, known.role, known.address) == (edge.identity.certificate, "edge", edge.address)
        assert said["fingerprint"] == edge.identity.fingerprint
        assert cli.main(["pair", edge.address, right]) == 12  # the code is used
    finally:
        edge.close()
