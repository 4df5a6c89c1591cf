"""The kernels as Python calls them: what they compute, on every path and from several threads, and what they refuse."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal.runtime import kernels
from shoal.runtime.errors import BackendError, BundleError, UsageError
from shoal.runtime.kernels import layout
from shoal.runtime.kernels.layout import LinearFormat

pytestmark = pytest.mark.usefixtures("built")

# inputs, outputs, bits, group, span, rotated
FORMATS = [
    LinearFormat(128, 32, 4, 32, 128, 1),
    LinearFormat(300, 37, 4, 32, 320),
    LinearFormat(576, 50, 4, 64, 192, 1),
    LinearFormat(192, 16, 2, 96, 192, 1),
    LinearFormat(100, 33, 3, 128, 128),
    LinearFormat(300, 37, 8, 320, 320),
    LinearFormat(256, 18, 8, 128, 128, 1),
]
PATHS = ("scalar", "avx2", "avx512", "amx", "neon", "i8mm")


def expected(format: LinearFormat, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The product of the stored weights and of activations rounded to 8 bits for each row and span, in double."""
    if format.rotated:
        weights, x = layout.rotate(weights), layout.rotate(x)
    y = np.zeros((len(x), len(weights)))
    for start in range(0, format.inputs, format.span):
        part = x[:, start : start + format.span]
        scales = np.abs(part).max(1, keepdims=True) / np.float32(127)
        codes = np.rint(part * np.divide(1, scales, where=scales > 0, out=np.zeros_like(scales)))
        y += codes * scales.astype(np.float64) @ weights[:, start : start + format.span].T.astype(np.float64)
    return y


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 33, 70])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_product_rounds_activations_and_nothing_else(matrix, format, rows):
    data, weights = matrix(format)
    random = np.random.default_rng(rows)
    x = (random.standard_normal((rows, format.inputs)) * random.lognormal(0, 2, (rows, 1))).astype(np.float32)
    x[rows // 2] = 0
    bias = random.standard_normal(format.outputs).astype(np.float32)
    reference = expected(format, weights, x)
    found = kernels.linear(format, data, x, bias=bias, threads=2)
    np.testing.assert_allclose(found, reference + bias, atol=3e-3 * np.abs(reference).max(1, keepdims=True).max())
    error = np.linalg.norm(found - bias - reference, axis=1) / (np.linalg.norm(reference, axis=1) + 1e-9)
    assert error.max() < 1e-3  # a code at a boundary may differ by one
    # A row is the same whatever is computed with it, and however many threads do it
    for start, stop in ((0, 1), (rows // 2, rows)):
        np.testing.assert_array_equal(kernels.linear(format, data, x[start:stop], bias=bias), found[start:stop])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_are_the_weights(matrix, format):
    data, weights = matrix(format)
    ids = np.array([0, format.outputs - 1, 5, 5, 15])
    found = kernels.rows(format, data, ids)
    if format.rotated:  # summed in another order
        np.testing.assert_allclose(found, weights[ids], atol=1e-6 * np.abs(weights).max())
    else:
        np.testing.assert_array_equal(found, weights[ids])
    for wrong in (-1, format.outputs, 1 << 62):
        with pytest.raises(BackendError, match="out of range"):
            kernels.rows(format, data, np.array([0, wrong]))


CHILD = """
import hashlib, json, sys
import numpy as np
from shoal.runtime import kernels
from shoal.runtime.kernels.layout import LinearFormat
digest = hashlib.sha256()
with np.load(sys.argv[1]) as stored:
    for index, numbers in enumerate(json.loads(sys.argv[2])):
        for rows in (1, 4, 7, 16, 35):
            x = stored[f"x{index}"][:rows]
            digest.update(kernels.linear(LinearFormat(*numbers), stored[f"w{index}"], x, threads=2).tobytes())
print(kernels.isa(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits(matrix, tmp_path):
    """SHOAL_ISA says how far a process may go."""
    random, arrays = np.random.default_rng(4), {}
    for index, format in enumerate(FORMATS):
        arrays[f"w{index}"] = matrix(format)[0]
        arrays[f"x{index}"] = random.standard_normal((35, format.inputs)).astype(np.float32)
    np.savez(tmp_path / "arrays.npz", **arrays)
    command = [sys.executable, "-c", CHILD, tmp_path / "arrays.npz", json.dumps([[*vars(f).values()] for f in FORMATS])]
    found = {}
    for path in [*filter(kernels.has, PATHS), "nonsense"]:
        done = subprocess.run(command, env=os.environ | {"SHOAL_ISA": path}, capture_output=True, text=True, check=True)
        isa, found[path] = done.stdout.split()
        assert isa == path or path == "nonsense"
    assert len(set(found.values())) == 1 and len(found) >= 2


def test_several_threads_get_what_one_gets(matrix):
    format = LinearFormat(512, 256, 4, 32, 512, 1)
    data, _ = matrix(format)
    x = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    wanted = kernels.linear(format, data, x)
    found: list[np.ndarray] = []

    def work():
        for _ in range(20):
            found.append(kernels.linear(format, data, x, threads=2))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(np.array_equal(y, wanted) for y in found)


def test_what_is_no_number_stays_in_its_row(matrix):
    format = LinearFormat(128, 32, 4, 32, 128)
    data, _ = matrix(format)
    x = np.random.default_rng(1).standard_normal((6, 128)).astype(np.float32)
    clean = kernels.linear(format, data, x)
    x[1, 5], x[4, 0] = np.nan, np.inf
    found = kernels.linear(format, data, x)
    assert np.isnan(found[[1, 4]]).all()
    np.testing.assert_array_equal(found[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


@pytest.mark.parametrize("shift", [1, 4, 32])
def test_weights_may_lie_anywhere(matrix, shift):
    format = LinearFormat(128, 48, 3, 32, 64, 1)
    data, _ = matrix(format)
    elsewhere = np.empty(len(data) + 64, np.uint8)[shift:][: len(data)]
    elsewhere[:] = data
    random = np.random.default_rng(2)
    for path in filter(kernels.has, PATHS):
        for rows in (2, 20):
            x = random.standard_normal((rows, 128)).astype(np.float32)
            wanted = kernels.linear(format, data, x, path=path)
            np.testing.assert_array_equal(kernels.linear(format, elsewhere, x, path=path), wanted)
    np.testing.assert_array_equal(kernels.rows(format, elsewhere, [3]), kernels.rows(format, data, [3]))


def test_what_cannot_be_is_refused(matrix):
    format = LinearFormat(128, 32, 4, 32, 128)
    data, _ = matrix(format)
    x = np.zeros((2, 128), np.float32)
    for wrong in (np.zeros((2, 127)), np.zeros(128), np.zeros((2, 2, 128))):
        with pytest.raises(UsageError, match="shape"):
            kernels.linear(format, data, wrong)
    with pytest.raises(UsageError, match="bias"):
        kernels.linear(format, data, x, bias=np.zeros(33, np.float32))
    for call in (lambda: kernels.linear(format, data[:-1], x), lambda: kernels.rows(format, data[:-1], [0])):
        with pytest.raises(BackendError, match="size of an array"):
            call()
    with pytest.raises(BackendError, match="lacks that path"):
        kernels.linear(format, data, x, path="abacus")
    with pytest.raises(BundleError, match="group is 48"):
        kernels.linear(LinearFormat(128, 32, 4, 48, 128), data, x)
    assert kernels.linear(format, data, x[:0]).shape == (0, 32) and kernels.rows(format, data, []).shape == (0, 128)
    assert not kernels.has("abacus") and kernels.has(kernels.isa())


WITHOUT = """
import sys
import shoal
from shoal.runtime import kernels, session
from shoal.runtime.errors import BackendError
if sys.argv[2]:
    kernels.LIBRARY = type(kernels.LIBRARY)(sys.argv[2])
try:
    print(kernels.isa())
except BackendError as error:
    print(error.what, error.why, error.fix, sep="|")
events = []
with shoal.load(sys.argv[1], context=64, progress=events.append) as model:
    print(kernels.available(), "transcode" in {event.stage for event in events})
    print(*(token.id for token in model.generate([5, 6, 7], max_tokens=8, ignore_end=True)))
"""


def test_without_the_library_a_model_is_lowered(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    shoal.convert(tiny_folder, tmp_path / "m.shoal", "int4", check_parity=False)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    other = next(path for path in Path("/proc/self/maps").read_text().split() if "libc.so" in path)
    said = {}
    for library in ("", str(tmp_path / "absent.so"), str(broken), other):
        command = [sys.executable, "-c", WITHOUT, str(tmp_path / "m.shoal"), library]
        said[library] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    with_it, *without = said.values()
    assert with_it[:2] == [kernels.isa(), "True False"]
    for lines, why in zip(without, ("It was not built", "It cannot be loaded", "It cannot be loaded"), strict=True):
        assert lines[0].startswith(f"The kernels cannot be used.|{why}") and "Install a C++ compiler" in lines[0]
        assert lines[1].startswith("False") and lines[2] == without[0][2]
    assert without[0][1] == "False True" and without[1][1] == "False False", "the second time it is there"
    with shoal.load(tmp_path / "m.shoal", context=64, kernels="ort") as model:
        found = [token.id for token in model.generate([5, 6, 7], max_tokens=8, ignore_end=True)]
    assert " ".join(map(str, found)) == without[0][2]


def test_a_model_in_integers_keeps_its_weights_in_the_bundle_alone(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    shoal.convert(tiny_folder, tmp_path / "m.shoal", "int4", check_parity=False)
    with shoal.load(tmp_path / "m.shoal", context=64) as model:
        assert not {"repacked weights", "private weights"} & {row.name for row in model.plan.rows}
        assert model.parts.prepared is None and not model.parts.kept
        assert model.generate([5, 6, 7], max_tokens=4).finish() is not None
    assert not (tmp_path / "cache").exists()
