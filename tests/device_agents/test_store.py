"""Models by digest: what counts was verified, what was cut off goes on, what is too much goes."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from shoal.device_agents import store as stores
from shoal.device_agents.store import Store
from shoal.runtime.bundle import Graph, create
from shoal.runtime.errors import BundleError, BusyError, StorageError, UsageError


def bundle(path, size=10_000, name="net", seed=0, **about):
    with create(path) as writer:
        writer.add("graph", "tail", b"graph")
        writer.graph(Graph("tail", "tail", "cpu", 0, 0, 0, "tail"))
        writer.add("weights", "weights", bytes([seed]) * size)
        writer.add("modes", "", json.dumps({"name": name, "encoder": "", "tables": "", "modes": []} | about).encode())
        writer.commit()
    return path


def test_a_bundle_is_added_found_and_read(tmp_path):
    modes = [{"id": 1, "bits": 4, "bytes": 900, "device_ms": 1.5, "accuracy": 0.5}]
    path = bundle(tmp_path / "a.shoal", modes=modes, encoder="ab" * 32)
    store = Store(tmp_path / "models")
    entry = store.add(path, "cats")
    assert store.add(path) == entry and store.list() == [entry]
    assert (entry.name, entry.role, entry.encoder, entry.modes[0].bytes) == ("cats", "tail", "ab" * 32, 900)
    assert entry.bytes == path.stat().st_size
    for text in (entry.digest, entry.digest[:8], "cats"):
        assert store.find(text).digest == entry.digest
    with store.open(entry.digest) as opened:
        opened.verify()
    assert store.get(entry.digest).used_at > entry.used_at
    assert store.add(path, "dogs").name == "dogs"
    for text in ("cats", "nothing", entry.digest[:7]):
        with pytest.raises(UsageError):
            store.find(text)
    for hostile in ("../../etc/passwd", "A" * 64, "", "a" * 63 + "/"):
        with pytest.raises(UsageError):
            store.path(hostile)


def test_a_model_in_pieces_goes_on_where_it_was_cut_and_counts_when_verified(tmp_path):
    path = bundle(tmp_path / "a.shoal")
    data = path.read_bytes()
    digest = Store(tmp_path / "other").add(path).digest
    store = Store(tmp_path / "models")
    for end in (0, 1, 4096, 9999, len(data)):
        with store.partial(digest, len(data), "cats") as partial:
            partial.write(data[partial.offset : end])
            assert partial.offset == end
            with pytest.raises(BusyError):
                store.partial(digest, len(data))
            assert store.get(digest) is None
            if end < len(data):
                with pytest.raises(BundleError, match="not complete"):
                    partial.finish()
            else:
                assert partial.finish().name == "cats"
    assert store.path(digest).read_bytes() == data
    assert not list(store.folder.glob("*.partial"))


def test_a_damaged_and_a_swapped_model_never_count(tmp_path):
    data = bytearray(bundle(tmp_path / "a.shoal").read_bytes())
    digest = Store(tmp_path / "other").add(tmp_path / "a.shoal").digest
    other = bundle(tmp_path / "b.shoal", seed=1).read_bytes()
    assert len(other) == len(data)
    store = Store(tmp_path / "models")
    damaged = bytes(data[:5000]) + bytes([data[5000] ^ 1]) + bytes(data[5001:])
    for wrong in (damaged, other, bytes(len(data))):
        with store.partial(digest, len(data)) as partial, pytest.raises(BundleError):
            partial.write(wrong)
            partial.finish()
        assert not store.list() and not list(store.folder.glob("*.partial"))
    with store.partial(digest, len(data)) as partial:
        partial.write(data)
        with pytest.raises(BundleError, match="announced"):
            partial.write(b"x")
    with pytest.raises(BundleError):
        store.add(damage(tmp_path / "c.shoal", damaged))
    with pytest.raises(BundleError):
        store.open("ab" * 32)


def damage(path, data):
    path.write_bytes(data)
    return path


def test_the_least_used_goes_first_and_what_is_kept_stays(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stores.time, "time", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    paths = [bundle(tmp_path / f"{seed}.shoal", seed=seed, name=f"n{seed}") for seed in range(4)]
    size = paths[0].stat().st_size
    store = Store(tmp_path / "models", most=3 * size)
    first, second, third = (store.add(path) for path in paths[:3])
    store.open(first.digest).close()
    fourth = store.add(paths[3])
    assert {entry.name for entry in store.list()} == {"n0", "n2", "n3"}
    with store.open(first.digest) as reader:
        assert [entry.name for entry in store.collect(size, keep={third.digest})] == ["n3", "n0"]
        reader.verify()  # who reads it is not disturbed
    assert fourth.digest not in [entry.digest for entry in store.list()]
    with pytest.raises(StorageError, match="fit the store"):
        store.partial("ab" * 32, 3 * size + 1)
    with store.partial("ab" * 32, size) as partial:
        partial.write(b"abc")
    os.utime(partial.path, (0, 0))
    now[0] += stores.STALE
    store.collect(1 << 40)
    assert not partial.path.exists()


@pytest.mark.parametrize("harm", ["lost", "damaged", "behind", "ahead"])
def test_the_folder_is_the_truth_and_the_database_follows(tmp_path, harm):
    store = Store(tmp_path / "models")
    entry = store.add(bundle(tmp_path / "a.shoal"))
    if harm == "ahead":  # a power cut came after the file was removed
        store.path(entry.digest).unlink()
    elif harm == "behind":  # or before the row was written
        with sqlite3.connect(store.folder / "store.db") as database:
            database.execute("DELETE FROM models")
        database.close()
    else:
        for path in store.folder.glob("store.db*"):
            path.unlink() if harm == "lost" else path.write_bytes(b"no database, of a length that a page has" * 200)
    found = [model.digest for model in Store(tmp_path / "models").list()]
    assert found == ([] if harm == "ahead" else [entry.digest])


def test_threads_share_a_store(tmp_path):
    paths = [bundle(tmp_path / f"{seed}.shoal", seed=seed) for seed in range(4)]
    store, failures = Store(tmp_path / "models"), []

    def work(number: int) -> None:
        for turn in range(4):
            try:
                store.open(store.add(paths[(number + turn) % 4]).digest).close()
            except BusyError:
                pass
            except Exception as error:  # noqa: BLE001
                failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(store.list()) == 4


def test_a_process_killed_while_it_adds_leaves_nothing_that_counts(tmp_path):
    path = bundle(tmp_path / "a.shoal", size=32 << 20)
    code = "import sys; from shoal.device_agents.store import Store; Store(sys.argv[1]).add(sys.argv[2])"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "models", path])
    deadline = time.monotonic() + 10
    while not list((tmp_path / "models").glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    store = Store(tmp_path / "models")
    for entry in store.list():
        with store.open(entry.digest) as opened:
            opened.verify()
    entry = store.add(path)
    with store.open(entry.digest) as opened:
        opened.verify()
