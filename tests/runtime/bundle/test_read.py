"""Opening: which paths are refused, what the views are, and what happens when the file changes under an open bundle."""

import gc
import hashlib
import os
import socket
import threading
import tracemalloc

import numpy
import pytest

from shoal.runtime.bundle import Bundle, create, write
from shoal.runtime.errors import BundleError, StorageError, UsageError


def link(path, minimal):
    path.symlink_to(minimal)


def hard_link(path, minimal):
    path.hardlink_to(minimal)


def fifo(path, minimal):
    os.mkfifo(path)


def unix_socket(path, minimal):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is at most 108 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


REFUSED = {
    "nothing": (lambda path, minimal: None, "leads to no file"),
    "file as folder": (lambda path, minimal: path.parent.touch(), "leads to no file"),
    "empty file": (lambda path, minimal: path.touch(), "header is cut short: the file has 0 bytes"),
    "text": (lambda path, minimal: path.write_text("GGUF" * 50), "magic is b'GGUFGG'"),
    "folder": (lambda path, minimal: path.mkdir(), "folder or a device"),
    "fifo": (fifo, "not lead to a regular file"),  # and does not wait for somebody to write to it
    "socket": (unix_socket, "folder or a device"),
    "symbolic link": (link, "path is a symbolic link"),
    "dangling link": (lambda path, minimal: path.symlink_to("absent"), "path is a symbolic link"),
    "link to itself": (lambda path, minimal: path.symlink_to(path.name), "path is a symbolic link"),
    "link to a device": (lambda path, minimal: path.symlink_to("/dev/zero"), "path is a symbolic link"),
    "hard link": (hard_link, "file has 2 names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_paths_that_are_refused(tmp_path, minimal, name):
    make, why = REFUSED[name]
    path = tmp_path / ("file/a.shoal" if name == "file as folder" else "a.shoal")
    make(path, minimal)
    gc.collect()  # files that tests before this one left to it
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert why in caught.value.why and str(path) in caught.value.what and caught.value.fix
    assert not before or len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/", "", "a\0b", b"\xff.shoal"])
def test_paths_that_are_no_path_of_a_bundle(path):
    with pytest.raises(BundleError):
        Bundle.open(path)


def test_a_hard_link_says_how_to_copy(tmp_path, minimal):
    hard_link(tmp_path / "second", minimal)
    with pytest.raises(BundleError, match="cp FILE COPY"):
        Bundle.open(minimal)
    (tmp_path / "second").unlink()
    Bundle.open(minimal).close()


def test_what_the_system_refuses_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="too long"):
        Bundle.open(tmp_path / ("x" * 300))


def test_folders_above_may_be_links_and_the_path_is_absolute(tmp_path, minimal, monkeypatch):
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    with Bundle.open("folder/minimal.shoal") as bundle:
        monkeypatch.chdir("/")
        assert bundle.path == tmp_path / "folder" / "minimal.shoal"
        bundle.check_unchanged()


def test_sections(minimal):
    with Bundle.open(os.fsencode(minimal)) as bundle:
        card = bundle.section("card")
        assert bundle.bytes(card) == bundle.view(card) == b'{"name": "minimal"}'
        assert bundle.bytes(bundle.section("chat_template")) == b""
        assert bundle.find("weights") is None and bundle.find("weights", "weights").length == 100
        assert len(bundle.digest) == 64 and bundle.digest[:12] in repr(bundle)
        with pytest.raises(BundleError, match="no section of the kind 'tokenizer'"):
            bundle.section("tokenizer")
        with pytest.raises(BundleError, match="with the name 'prefill'"):
            bundle.section("graph", "prefill")


def test_views_are_mapped_read_only_and_outlive_the_bundle(minimal):
    bundle = Bundle.open(minimal)
    weights = bundle.section("weights", "weights")
    array = numpy.frombuffer(bundle.view(weights), numpy.uint8)
    assert array.ctypes.data % weights.alignment == 0 and not array.flags.writeable
    assert numpy.shares_memory(array, numpy.frombuffer(bundle.view(weights), numpy.uint8))
    bundle.close()
    bundle.close()
    assert array.sum() == sum(range(100))
    for use in (bundle.view, bundle.bytes, lambda _: bundle.verify()):
        with pytest.raises(UsageError, match="closed"):
            use(weights)


def test_a_section_of_another_bundle(minimal, forge, tmp_path):
    with Bundle.open(minimal) as bundle, pytest.raises(UsageError, match="not of this bundle"):
        bundle.view(forge.section(offset=1 << 40))


@pytest.mark.parametrize("kind, name", [("card", ""), ("weights", "weights"), ("graph", "decode")])
def test_damage_inside_a_section_is_found_and_named(minimal, kind, name):
    with Bundle.open(minimal) as bundle:
        section = bundle.section(kind, name)
    data = bytearray(minimal.read_bytes())
    data[section.offset + section.length - 1] ^= 0x10
    minimal.write_bytes(data)
    with Bundle.open(minimal) as bundle:  # opening reads no section
        with pytest.raises(BundleError, match=f"section {kind} '{name}' does not have the digest"):
            bundle.verify()
        with pytest.raises(BundleError, match="it is damaged"):
            bundle.bytes(section)


def test_every_byte_of_every_gap_has_to_be_zero(minimal):
    good = minimal.read_bytes()
    with Bundle.open(minimal) as bundle:
        covered = bytearray(len(good))
        for section in bundle.sections:
            covered[section.offset : section.offset + section.length] = b"\1" * section.length
        index = int.from_bytes(good[24:32], "little")
    gaps = [at for at in range(64, index) if not covered[at]]
    assert len(gaps) > 150
    for at in gaps:
        with open(minimal, "r+b") as file:
            os.pwrite(file.fileno(), b"\1", at)
            with pytest.raises(BundleError, match="is not zero"):
                Bundle.open(minimal)
            os.pwrite(file.fileno(), b"\0", at)


def test_progress_adds_up(minimal):
    events = []
    with Bundle.open(minimal) as bundle:
        bundle.verify(events.append)
        total = sum(section.length for section in bundle.sections)
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert {event.total for event in events} == {total} and events[-1].done == total
    assert [event.detail for event in events[:-1]] == ["card", "weights weights", "graph decode"]


def test_an_error_of_the_progress_callback_is_its_own(minimal):
    def broken_pipe(event):
        raise BrokenPipeError

    with Bundle.open(minimal) as bundle, pytest.raises(BrokenPipeError):
        bundle.verify(broken_pipe)


def edit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def swap(path):
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def swap_for_link(path):
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


@pytest.mark.parametrize(
    "change, why",
    [
        (edit, "changed after it was opened"),
        (lambda path: os.truncate(path, 100), "changed after it was opened"),
        (lambda path: os.utime(path, ns=(5, 5)), "changed after it was opened"),
        (swap, "another file"),
        (swap_for_link, "another file"),
        (lambda path: path.unlink(), "no longer leads to it"),
        (lambda path: path.with_name("second").hardlink_to(path), "has 2 names"),
    ],
)
def test_a_file_that_changes_while_it_is_open(minimal, change, why):
    with Bundle.open(minimal) as bundle:
        bundle.check_unchanged()
        change(minimal)
        with pytest.raises(BundleError, match=why):
            bundle.check_unchanged()


def test_a_file_that_is_cut_while_it_is_open(minimal):
    with Bundle.open(minimal) as bundle:
        os.truncate(minimal, 200)
        with pytest.raises(BundleError, match="was cut while it was open"):
            bundle.bytes(bundle.section("weights", "weights"))
        with pytest.raises(BundleError, match="was cut while it was open"):
            bundle.verify()


def test_an_old_bundle_goes_on_after_it_is_replaced(minimal):
    with Bundle.open(minimal) as old:
        with create(minimal, overwrite=True) as writer:
            writer.add("card", "", b"new")
            writer.commit()
        old.verify()
        assert bytes(old.view(old.section("card"))) == b'{"name": "minimal"}'
        with Bundle.open(minimal) as new:
            assert new.bytes(new.section("card")) == b"new" and new.digest != old.digest


def test_a_terabyte_costs_nothing_until_it_is_read(forge, tmp_path):
    """A sparse file: every length in it is true, and none of them is allocated."""
    huge = forge.section(length=1 << 40)
    header, index = write.seal([huge], [], 64 + huge.length)
    path = tmp_path / "huge.shoal"
    try:
        with open(path, "wb") as file:
            file.write(header)
            file.seek(64 + huge.length)
            file.write(index)
    except OSError:
        pytest.skip("this file system has no such files")
    tracemalloc.start()
    with Bundle.open(path) as bundle:
        assert len(bundle.view(bundle.section("card"))) == 1 << 40
        with pytest.raises(BundleError, match="over 268435456"):
            bundle.bytes(bundle.section("card"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_verifying_takes_a_few_megabytes_whatever_the_size(tmp_path):
    with create(tmp_path / "a.shoal") as writer:
        with writer.section("weights", "weights") as weights:
            for _ in range(48):
                weights.write(bytes(1 << 20))
        writer.commit()
    with Bundle.open(tmp_path / "a.shoal") as bundle:
        tracemalloc.start()
        bundle.verify()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


def test_threads_share_a_bundle(minimal):
    wrong = []
    with Bundle.open(minimal) as bundle:

        def read():
            for section in bundle.sections * 20:
                if hashlib.sha256(bundle.bytes(section)).digest() != section.sha256:
                    wrong.append(section)
                if bundle.view(section) != bundle.bytes(section):
                    wrong.append(section)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("rounds", [200, pytest.param(10_000, marks=pytest.mark.deep)])
def test_a_link_swapped_in_while_opening_is_never_followed(tmp_path, minimal, rounds):
    outside = tmp_path / "outside"
    outside.mkdir()
    with create(outside / "secret.shoal") as writer:
        writer.add("card", "", b"secret")
        writer.commit()
    link, path, stop = tmp_path / "link", tmp_path / "a.shoal", threading.Event()
    path.write_bytes(minimal.read_bytes())

    def swap():
        while not stop.is_set():
            link.symlink_to(outside / "secret.shoal")
            os.replace(link, path)
            link.write_bytes(minimal.read_bytes())
            os.replace(link, path)

    swapper = threading.Thread(target=swap)
    swapper.start()
    opened = refused = 0
    try:
        for _ in range(rounds):
            try:
                with Bundle.open(path) as bundle:
                    assert bundle.bytes(bundle.section("card")) == b'{"name": "minimal"}'
                opened += 1
            except BundleError as error:
                assert "symbolic link" in error.why, error
                refused += 1
    finally:
        stop.set()
        swapper.join()
    assert opened + refused == rounds
