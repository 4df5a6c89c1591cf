"""Loading where the device's cache cannot be: a model whose fp32 products would be repacked there runs all the same and
says what it costs; one that would have to be said in ONNX Runtime's operators there is refused; and our own kernels
need none."""

import gc
import json
import os
import subprocess
import sys

import pytest

import shoal
from shoal.converters.convert import convert
from shoal.runtime.errors import StorageError

PROMPT = list(range(10, 30))


@pytest.fixture
def bundle(tiny_bundle):
    return tiny_bundle


@pytest.fixture(scope="module")
def int4(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("load") / "a.shoal"
    convert(tiny_folder, out, "int4", check_parity=False)
    return out


def answer(model) -> list[int]:
    return [token.id for token in model.generate(PROMPT, max_tokens=12, ignore_end=True)]


def unprepared(bundle, **options):
    """Loads where preparing fails: the rows of the plan, the answer, and what was said."""
    events = []
    with shoal.load(bundle, context=64, progress=events.append, **options) as model:
        rows = {row.name: row for row in model.plan.rows}
        assert "repacked weights" not in rows and rows["private weights"].where == "anonymous"
        assert "repacked weights" not in model.measure()
        return rows, answer(model), [event.detail for event in events if event.stage == "prepare"][-1]


@pytest.fixture(params=["a file", "a link", "no folder may be made", "read-only"])
def unusable(request, tmp_path, monkeypatch):
    """The path of a cache that cannot be."""
    kind, cache = request.param, tmp_path / "cache"
    if kind == "a file":
        cache.write_bytes(b"")
    elif kind == "a link":
        cache.symlink_to("/proc/self/absent")
    elif kind == "no folder may be made":
        cache = tmp_path / "parent" / "cache"
        cache.parent.write_bytes(b"")
    else:
        if os.geteuid() == 0:
            cache = "/proc/shoal"  # where not even root makes folders
        else:
            cache.mkdir(mode=0o500)
    monkeypatch.setenv("SHOAL_CACHE", str(cache))
    return str(cache)


def test_a_cache_that_cannot_be_used(bundle, unusable, tmp_path, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SHOAL_CACHE", str(tmp_path / "usable"))
        with shoal.load(bundle, context=64) as model:
            expected, prepared = answer(model), {row.name: row for row in model.plan.rows}
    rows, found, said = unprepared(bundle)
    assert found == expected and unusable in said and "private" in said
    # As many bytes as a plan with the cache has, so what fitted still fits
    assert rows["private weights"].bytes == prepared["repacked weights"].bytes
    total = sum(row.bytes for row in rows.values())
    assert total == sum(row.bytes for row in prepared.values())
    assert unprepared(bundle, memory=total)[1] == expected


def test_our_kernels_need_no_cache_and_others_cannot_do_without(int4, unusable):
    gc.collect()  # files that tests before this one left to it
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    with shoal.load(int4, context=64) as model:
        names = [row.name for row in model.plan.rows]
        assert answer(model) and not {"repacked weights", "private weights"} & set(names)
        assert model.parts.prepared is None and not model.parts.kept
    with pytest.raises(StorageError, match="SHOAL_CACHE") as refused:
        shoal.load(int4, context=64, kernels="ort")
    assert unusable in str(refused.value)
    assert not before or os.listdir("/proc/self/fd") == before


FULL = """
import json, resource, sys
import shoal
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
said = []
with shoal.load(sys.argv[1], context=64, progress=said.append, **json.loads(sys.argv[4])) as model:
    ids = [token.id for token in model.generate(json.loads(sys.argv[3]), max_tokens=12, ignore_end=True)]
    print(json.dumps([ids, [row.name for row in model.plan.rows], [e.detail for e in said if e.stage == "prepare"]]))
"""


@pytest.mark.parametrize("limit", [0, 100, 30_000, 100_000])
def test_a_cache_on_a_full_disk(bundle, tmp_path, monkeypatch, limit):
    with shoal.load(bundle, context=64) as model:
        expected = answer(model)
    cache = tmp_path / "cache"
    done = full(bundle, limit, cache)
    assert done.returncode == 0, done.stderr
    ids, rows, said = json.loads(done.stdout)
    assert ids == expected and "private weights" in rows and str(cache) in said[-1]
    assert [path.name for path in cache.iterdir()] == ["lock"], "nothing half made stays"


@pytest.mark.parametrize("limit", [0, 100, 30_000])
def test_other_kernels_on_a_full_disk(int4, tmp_path, limit):
    cache = tmp_path / "cache"
    done = full(int4, limit, cache, kernels="ort")
    assert done.returncode and "StorageError" in done.stderr and str(cache) in done.stderr
    assert [path.name for path in cache.iterdir()] == ["lock"]


def full(bundle, limit: int, cache, **options) -> subprocess.CompletedProcess:
    """Loads and answers where no file may be longer than `limit` bytes."""
    command = [sys.executable, "-c", FULL, str(bundle), str(limit), json.dumps(PROMPT), json.dumps(options)]
    return subprocess.run(command, env=os.environ | {"SHOAL_CACHE": str(cache)}, capture_output=True, text=True)
