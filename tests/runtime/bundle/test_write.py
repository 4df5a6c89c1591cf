"""Writing: the same bytes every time, and a name that never leads to half a bundle, whatever happens on the way."""

import errno
import hashlib
import mmap
import os
import resource
import signal
import stat
import threading
from contextlib import suppress

import numpy
import pytest

from shoal.runtime.bundle import Bundle, Graph, create, write
from shoal.runtime.errors import BundleError, ShoalError, StorageError, UsageError

GRAPH = Graph("decode", "decode", "cpu", 0, 0, 5, "decode")


def fill(writer, times=1):
    writer.add("card", "", b"{}" * times)
    with writer.section("weights", "weights") as weights:
        for _ in range(3):
            weights.write(bytes(1000))
    writer.add("graph", "decode", b"onnx")
    writer.graph(GRAPH)
    writer.commit()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "a.shoal"


def test_the_same_sections_give_the_same_bytes(target):
    with create(target) as writer:
        fill(writer)
    first = target.read_bytes()
    with create(target, overwrite=True) as writer:
        fill(writer)
    assert target.read_bytes() == first


def test_a_section_is_the_bytes_it_was_given(target):
    data = numpy.random.default_rng(1).integers(0, 256, 3 << 20, dtype=numpy.uint8)
    with create(target) as writer:
        with writer.section("weights", "pieces", alignment=1 << 20) as pieces:
            for start in range(0, len(data), 700_001):
                assert pieces.tell() == start
                pieces.write(data[start : start + 700_001])
        with writer.section("weights", "whole") as whole:
            whole.write(data.view(numpy.float64).reshape(3, -1))
            whole.write(numpy.zeros((0, 5)))
        assert writer.sections[0].offset == 1 << 20 and writer.sections[0].sha256 == writer.sections[1].sha256
        with open(writer.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[1 << 20 :][: len(data)] == data.tobytes()  # before the commit
        writer.commit()
    with Bundle.open(target) as bundle:
        bundle.verify()
        assert bundle.sections[0].sha256 == hashlib.sha256(data).digest()
        assert bundle.view(bundle.sections[1]) == data.tobytes()


def test_an_empty_bundle(target):
    with create(target) as writer:
        writer.commit()
    with Bundle.open(target) as bundle:
        bundle.verify()
        assert bundle.sections == bundle.graphs == ()


def test_the_file_has_the_mode_that_the_umask_leaves(target):
    before = os.umask(0o027)
    try:
        with create(target) as writer:
            fill(writer)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.parametrize("leave", [None, ValueError, KeyboardInterrupt])
def test_leaving_without_commit_leaves_nothing(target, leave):
    with suppress(ValueError, KeyboardInterrupt):
        with create(target) as writer:
            writer.add("card", "", b"{}")
            assert os.listdir(target.parent) == [writer.path.name] and writer.path.name.startswith(".a.shoal.")
            with pytest.raises(BundleError):
                Bundle.open(writer.path)
            if leave:
                raise leave
    assert os.listdir(target.parent) == []


MISUSE = {
    "kind": (lambda w: w.add("Card", "", b""), "kind is 'Card'"),
    "name": (lambda w: w.add("card", "x" * 256, b""), "name is"),
    "surrogate": (lambda w: w.add("card", "\udc80", b""), "name is"),
    "alignment": (lambda w: w.add("card", "", b"", alignment=48), "alignment is 48"),
    "alignment 0": (lambda w: w.add("card", "", b"", alignment=0), "alignment is 0"),
    "twice": (lambda w: [w.add("card", "", b"") for _ in range(2)], "already"),
    "not contiguous": (lambda w: w.add("card", "", numpy.zeros((4, 4))[:, 1]), "not contiguous"),
    "nested": (lambda w: nested(w), "is not finished"),
    "after": (lambda w: after(w), "block was left"),
    "graph without a section": (lambda w: [w.graph(GRAPH), w.commit()], "no graph section has that name"),
    "graph": (lambda w: w.graph(Graph("", "decode", "cpu", 0, 6, 5, "g")), "first_block is 6"),
    "chunk": (lambda w: w.graph(Graph("", "decode", "cpu", -1, 0, 0, "g")), "chunk is -1"),
    "unknown and required": (lambda w: [w.add("x", "", b"", required=True), w.commit()], "unknown here"),
    "committed twice": (lambda w: [w.commit(), w.commit()], "committed"),
    "after commit": (lambda w: [w.commit(), w.add("card", "", b"")], "committed"),
}


def nested(writer):
    with writer.section("card"):
        writer.commit()


def after(writer):
    with writer.section("card") as card:
        pass
    card.write(b"late")


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(target, name):
    act, why = MISUSE[name]
    with pytest.raises(UsageError, match=why), create(target) as writer:
        act(writer)


def test_a_section_left_by_an_exception_cannot_be_committed(target):
    with create(target) as writer:
        with suppress(ValueError), writer.section("weights") as weights:
            weights.write(b"half")
            raise ValueError
        with pytest.raises(UsageError, match="not finished"):
            writer.commit()
    assert os.listdir(target.parent) == []


# Existing names


def test_an_existing_file_is_refused_before_any_work(target):
    target.write_bytes(b"precious")
    with pytest.raises(UsageError, match="A file of that name exists"), create(target):
        pytest.fail("not reached")
    (target.parent / "link").symlink_to("absent")
    with pytest.raises(UsageError, match="exists"), create(target.parent / "link"):
        pytest.fail("not reached")
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_refused(target, overwrite):
    with pytest.raises(UsageError, match="folder"), create(target.parent, overwrite=overwrite):
        pytest.fail("not reached")


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.EINVAL])  # the real call, and systems without it
def test_a_file_that_comes_to_exist_meanwhile_is_not_replaced(target, monkeypatch, code):
    if code:
        monkeypatch.setattr(write.ctypes, "CDLL", lambda *_, **__: without_renameat2(code))
    with pytest.raises(UsageError, match="exists"), create(target) as writer:
        target.write_bytes(b"precious")
        fill(writer)
    assert target.read_bytes() == b"precious" and os.listdir(target.parent) == ["a.shoal"]
    target.unlink()
    with create(target) as writer:
        fill(writer)
    with Bundle.open(target) as bundle:
        bundle.verify()


def without_renameat2(code):
    class Library:
        if code != errno.ENOSYS:  # there, but the file system says no

            def renameat2(self, *_):
                write.ctypes.set_errno(code)
                return -1

    return Library()


def test_of_many_writers_one_wins_and_no_file_is_mixed(target):
    for _ in range(15):
        outcomes, barrier = [], threading.Barrier(4)

        def run(times, outcomes=outcomes, barrier=barrier):
            try:
                with create(target) as writer:
                    barrier.wait()
                    fill(writer, times)
                outcomes.append(times)
            except UsageError:
                outcomes.append(0)

        threads = [threading.Thread(target=run, args=(times,)) for times in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = filter(None, outcomes)
        with Bundle.open(target) as bundle:
            bundle.verify()
            assert bundle.bytes(bundle.section("card")) == b"{}" * winner
        assert os.listdir(target.parent) == ["a.shoal"]
        target.unlink()


# The disk


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StorageError) as caught, create(tmp_path / "absent" / "a.shoal"):
        pytest.fail("not reached")
    assert "Create the folder" in caught.value.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError) as caught, create(tmp_path / "a.shoal"):
        pytest.fail("not reached")
    assert "may change" in caught.value.fix


def operations(monkeypatch, at, act):
    """Calls `act` in place of file system operation number `at` of the writer; returns how many there were."""
    count = [0]

    def intercept(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            count[0] += 1
            return act(real, args, kwargs) if count[0] - 1 == at else real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("open", "pwrite", "fsync", "replace"):
        intercept(write.os, name)
    intercept(write, "_rename_new")
    return count


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_operation(target, code, overwrite):
    def fail(real, args, kwargs):
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        count = operations(patch, -1, fail)
        with create(target) as writer:
            fill(writer)
    target.unlink()
    assert count[0] > 10
    for at in range(count[0]):
        if overwrite:
            target.write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            operations(patch, at, fail)
            with pytest.raises(StorageError) as caught, create(target, overwrite) as writer:
                fill(writer)
        assert code == errno.EIO or "Free some space" in caught.value.fix
        left = os.listdir(target.parent)
        if left and target.read_bytes() != b"old":  # the folder could not be flushed: the new file is there, whole
            with Bundle.open(target) as bundle:
                bundle.verify()
        assert left == (["a.shoal"] if overwrite or at >= count[0] - 2 else [])
        for name in left:
            (target.parent / name).unlink()


def test_a_failed_write_cannot_be_committed(target, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with create(target) as writer:
        with writer.section("weights") as weights:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError):
                patch.setattr(write.os, "pwrite", full)
                weights.write(b"lost")
            weights.write(b"kept")  # somebody made room, but the section is not what it was to be
        with pytest.raises(UsageError, match="write to it failed"):
            writer.commit()
    assert os.listdir(target.parent) == []


def test_writes_may_be_short(target, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(write.os, "pwrite", lambda fd, data, at: real(fd, data[:7] if at >= 64 else data, at))
    with create(target) as writer:
        fill(writer)
    with Bundle.open(target) as bundle:
        bundle.verify()


def in_child(body) -> int:
    """Runs `body` in a forked process; returns how it ended, as waitpid says it."""
    child = os.fork()
    if not child:
        try:
            body()
        finally:
            os._exit(7)
    return os.waitpid(child, 0)[1]


def test_a_real_limit_of_the_system(target):
    def body():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with create(target) as writer, writer.section("weights") as weights:
                weights.write(bytes(1 << 20))
        except StorageError as error:
            os._exit(3 if "Free some space" in error.fix and not os.listdir(target.parent) else 4)

    assert os.waitstatus_to_exitcode(in_child(body)) == 3


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_being_killed_at_any_operation(target, overwrite, after):
    """Either the old file, the new one or none; and the next writer of the same target clears what is left."""

    def kill(real, args, kwargs):
        if after:
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    partials = 0
    for at in range(60):
        if overwrite:
            target.write_bytes(b"old")

        def body(at=at):
            operations(pytest.MonkeyPatch(), at, kill)
            with create(target, overwrite) as writer:
                fill(writer)
            os._exit(0)

        status = in_child(body)
        if target.exists() and target.read_bytes() != b"old":
            with Bundle.open(target) as bundle:
                bundle.verify()
        partials += any(name.endswith(".partial") for name in os.listdir(target.parent))
        target.unlink(missing_ok=True)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        with create(target) as writer:
            fill(writer)
        assert os.listdir(target.parent) == ["a.shoal"]
        target.unlink()
    assert 10 < at < 59 and partials > 8


def test_a_living_writer_and_other_targets_are_left_alone(target):
    folder = target.parent
    others = [".a.shoal.partial", ".a.shoal.0123456.partial", ".b.shoal.01234567.partial", "a.shoal.01234567.partial"]
    stale = folder / ".a.shoal.01234567.partial"
    (folder / ".a.shoal.89abcdef.partial").symlink_to("b")
    for name in [*others, stale.name, "b"]:
        (folder / name).touch()
    with create(target) as living:
        living.add("card", "", b"living")
        assert not stale.exists()
        with create(target) as second:
            assert living.path.exists() and second.path != living.path
        living.commit()
    assert sorted(os.listdir(folder)) == sorted([*others, ".a.shoal.89abcdef.partial", "a.shoal", "b"])


def test_a_file_system_without_locks(target, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (target.parent / ".a.shoal.01234567.partial").touch()
    monkeypatch.setattr(write.fcntl, "flock", flock)
    with create(target) as writer:
        fill(writer)
    assert len(os.listdir(target.parent)) == 2  # nobody can tell whether that writer lives


@pytest.mark.parametrize("when", ["locked", "removed"])
def test_a_sweep_between_opening_and_locking(target, monkeypatch, when):
    """The window in which another writer takes the new file for stale: the writer takes the next name."""
    real, calls = write.fcntl.flock, []

    def flock(fd, how):
        calls.append(fd)
        if len(calls) == 1:
            (partial,) = target.parent.iterdir()
            partial.unlink()
            if when == "locked":
                raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
        return real(fd, how)

    monkeypatch.setattr(write.fcntl, "flock", flock)
    with create(target) as writer:
        fill(writer)
    assert len(calls) == 2 and os.listdir(target.parent) == ["a.shoal"]


def test_a_path_with_a_zero_byte():
    with pytest.raises(ShoalError, match="zero byte"), create("a\0b"):
        pytest.fail("not reached")


# The scratch folder


def test_scratch_files_go_with_the_block(target):
    with create(target) as writer:
        with suppress(ValueError), writer.scratch() as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_bytes(b"x")
            raise ValueError
        assert os.listdir(target.parent) == [writer.path.name]
        with writer.scratch() as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        fill(writer)
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError()])
def test_a_full_disk_in_the_scratch_folder(target, failure):
    """Whoever reports to a reader that has left is told so, as without a scratch folder."""
    with pytest.raises((StorageError, BrokenPipeError)) as caught, create(target) as writer, writer.scratch():
        raise failure
    assert isinstance(caught.value, BrokenPipeError) == isinstance(failure, BrokenPipeError)
    assert os.listdir(target.parent) == []


def test_the_next_writer_removes_a_dead_one_s_scratch_folder_and_no_living_one_s(target):
    def body():
        with create(target) as writer, writer.scratch() as folder:
            (folder / "file").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)

    in_child(body)
    assert sorted(path.suffix for path in target.parent.iterdir()) == [".partial", ".scratch"]
    (target.parent / ".b.shoal.01234567.scratch").mkdir()
    with create(target) as living, living.scratch() as folder:
        assert len(os.listdir(target.parent)) == 3
        with create(target):
            assert folder.is_dir()
    assert os.listdir(target.parent) == [".b.shoal.01234567.scratch"]
