"""Files of the cache: whole or absent, bounded, never removed in use, never a stranger's."""

import json
import os

import pytest

from shoal.runtime import device_cache
from shoal.runtime.errors import StorageError
from shoal.runtime.events import silent

PIECES = [b"first" * 1000, b"", b"third"]


def make(folder, name="a", pieces=PIECES, **index):
    with device_cache.making(folder, silent), device_cache.create(folder, name, index) as writer:
        for piece in pieces:
            writer.add(piece)
    return folder / (name + device_cache.SUFFIX)


def test_what_was_written_is_found(tmp_path):
    folder = tmp_path / "deep" / "cache"
    path = make(folder, note="n")
    file = device_cache.find(folder, "a")
    assert [file.read(index) for index in range(3)] == PIECES and file.index["note"] == "n" and file.verify()
    assert path.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    assert all(at % device_cache.PAGE == 0 for at, _, _ in file.index["pieces"])
    file.close()
    file.close()
    assert device_cache.find(folder, "b") is None


def test_a_failure_leaves_what_was_there(tmp_path):
    path = make(tmp_path)
    old = path.read_bytes()
    with pytest.raises(ZeroDivisionError), device_cache.making(tmp_path, silent):
        with device_cache.create(tmp_path, "a", {}) as writer:
            writer.add(b"new")
            raise ZeroDivisionError
    assert path.read_bytes() == old and sorted(item.name for item in tmp_path.iterdir()) == ["a.cache", "lock"]


def test_leftovers_of_a_maker_that_died_go_and_nothing_else(tmp_path):
    (tmp_path / ".making-dead").mkdir()
    (tmp_path / ".making-dead" / "making").write_bytes(b"x")
    (tmp_path / ".profile").write_bytes(b"mine")
    make(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".profile", "a.cache", "lock"]


def test_every_damaged_byte_and_length_is_absent_or_noticed(tmp_path):
    path = make(tmp_path, pieces=[b"piece"])
    good, made = path.read_bytes(), path.stat().st_mtime_ns
    path.write_bytes(good)
    assert device_cache.find(tmp_path, "a") is None, "written to after it was made, even if it is the same"
    index = len(good) - int.from_bytes(good[24:32], "little")
    for at in [*range(64), 4096, 4100, *range(index, len(good))]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        os.utime(path, ns=(made, made))
        file = device_cache.find(tmp_path, "a")
        if file is not None and not 12 <= at < 16:  # these four say nothing
            assert 4096 <= at < 4101 and not file.verify()
            with pytest.raises(ValueError):
                file.read(0)
    for length in (0, 1, 63, 64, 4096, len(good) - 1):
        path.write_bytes(good[:length])
        os.utime(path, ns=(made, made))
        assert device_cache.find(tmp_path, "a") is None
    path.write_bytes(good + b"x")
    os.utime(path, ns=(made, made))
    assert device_cache.find(tmp_path, "a") is None


@pytest.mark.parametrize("index", [[], {}, {"pieces": 1}, {"pieces": [[1]]}, {"pieces": [["a", 1, ""]]}])
def test_an_index_of_another_shape_is_absent(tmp_path, index):
    path = make(tmp_path)
    text = json.dumps(index).encode()
    digest = device_cache.hashlib.sha256(text).digest()
    header = device_cache._HEADER.pack(device_cache.MAGIC, device_cache.VERSION, 0, 4096, len(text), digest)
    path.write_bytes(header.ljust(4096, b"\0") + text)
    assert device_cache.find(tmp_path, "a") is None


def test_pieces_outside_the_file_are_damaged(tmp_path):
    make(tmp_path)
    file = device_cache.find(tmp_path, "a")
    for piece in ((-1, 4, ""), (0, 1 << 40, ""), (1 << 40, 1, "")):
        file._pieces = [piece]
        with pytest.raises(ValueError):
            file.read(0)


def test_strangers_links_and_devices_are_absent(tmp_path):
    path = make(tmp_path)
    path.chmod(0o620)
    assert device_cache.find(tmp_path, "a") is None
    path.chmod(0o600)
    (tmp_path / "b.cache").symlink_to(path)
    assert device_cache.find(tmp_path, "b") is None
    os.mkfifo(tmp_path / "c.cache")
    assert device_cache.find(tmp_path, "c") is None
    (tmp_path / "d.cache").mkdir()
    assert device_cache.find(tmp_path, "d") is None


def test_the_oldest_unused_go_first(tmp_path):
    for age, name in enumerate("cabd"):
        path = make(tmp_path, name, [bytes(10_000)])
        os.utime(path, (1000 + age, path.stat().st_mtime))
    used = device_cache.find(tmp_path, "c")  # the oldest, but in use; and now the youngest
    os.utime(used.path, (1, 1))  # what its times say does not matter while it is used
    size = used.size
    with device_cache.making(tmp_path, silent):
        device_cache.make_room(tmp_path, size, 3 * size)
    assert sorted(path.stem for path in tmp_path.glob("*.cache")) == ["c", "d"]
    with pytest.raises(StorageError), device_cache.making(tmp_path, silent):
        device_cache.make_room(tmp_path, size, size)
    assert used.path.exists() and used.verify()
    with pytest.raises(StorageError), device_cache.making(tmp_path, silent):
        device_cache.make_room(tmp_path, 1 << 60, 1 << 62)


def test_a_file_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError), device_cache.making(tmp_path / "file" / "cache", silent):
        pass
    (tmp_path / "lock").symlink_to(tmp_path / "file")
    with pytest.raises(StorageError), device_cache.making(tmp_path, silent):
        pass


def test_one_maker_at_a_time_and_no_endless_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(device_cache, "_LOCK_S", 0.25)
    events = []
    with device_cache.making(tmp_path, silent):
        with pytest.raises(StorageError, match="Another process"), device_cache.making(tmp_path, events.append):
            pass
    assert events and events[0].detail == "waiting for another process"
    with device_cache.making(tmp_path, silent):
        pass


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "own"))
    assert device_cache.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SHOAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert device_cache.cache_folder() == tmp_path / "shoal"
