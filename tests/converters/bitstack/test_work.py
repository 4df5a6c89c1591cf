"""The folder of finished matrices: what is whole is found again, and nothing else."""

import numpy as np
import pytest

from shoal.converters.bitstack.work import Work
from shoal.runtime.errors import BusyError, StorageError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "model.shoal"


def payloads() -> list[np.ndarray]:
    return [np.arange(size, dtype=np.uint8) for size in (64, 128)]


def made(out, key) -> None:
    work = Work(out, key)
    work.save(0, payloads(), {"inputs": 3})
    work.close()


def test_what_was_saved_is_found_by_the_next(out):
    made(out, {"recipe": 1})
    work = Work(out, {"recipe": 1})
    found = work.load(0)
    assert found is not None and found["inputs"] == 3 and work.has(0) and not work.has(1)
    read = work.payloads(0, found["lengths"])
    assert all(np.array_equal(a, b) for a, b in zip(read, payloads(), strict=True))
    assert read[0].ctypes.data % 64 == 0, "kernels read it where it lies"
    work.remove()
    assert not list(out.parent.iterdir())


def test_another_key_finds_nothing(out):
    made(out, {"recipe": 1})
    work = Work(out, {"recipe": 2})
    assert work.load(0) is None and not work.has(0)
    work.close()


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\xff", lambda data: b"[]\n",
                                    lambda data: b"", lambda data: b"\xff" * 100])  # fmt: skip
def test_a_damaged_matrix_is_made_again(out, damage):
    made(out, {})
    path = out.with_name(".model.shoal.stack") / "0.matrix"
    path.write_bytes(damage(path.read_bytes()))
    work = Work(out, {})
    assert work.load(0) is None
    work.close()


def test_two_at_once_are_refused(out):
    work = Work(out, {})
    with pytest.raises(BusyError, match="already"):
        Work(out, {})
    work.close()
    Work(out, {}).remove()


def test_a_folder_that_cannot_be_written_says_so(out):
    out.with_name(".model.shoal.stack").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be written"):
        Work(out, {})
