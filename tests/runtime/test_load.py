"""Loading where the cache of repacked weights cannot be: the model runs all the same, and says what it costs."""

import json
import os
import subprocess
import sys

import pytest

import shoal
from shoal.converters.convert import convert

PROMPT = list(range(10, 30))


@pytest.fixture(scope="module")
def bundle(tiny_folder, tmp_path_factory):
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


@pytest.mark.parametrize("kind", ["a file", "a link", "no folder may be made", "read-only"])
def test_a_cache_that_cannot_be_used(bundle, tmp_path, monkeypatch, kind):
    with shoal.load(bundle, context=64) as model:
        expected, prepared = answer(model), {row.name: row for row in model.plan.rows}
    cache = tmp_path / "cache"
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
    rows, found, said = unprepared(bundle)
    assert found == expected and str(cache) in said and "private" in said
    # As many bytes as a plan with the cache has, so what fitted still fits
    assert rows["private weights"].bytes == prepared["repacked weights"].bytes
    total = sum(row.bytes for row in rows.values())
    assert total == sum(row.bytes for row in prepared.values())
    assert unprepared(bundle, memory=total)[1] == expected


FULL = """
import json, resource, sys
import shoal
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
said = []
with shoal.load(sys.argv[1], context=64, progress=said.append) as model:
    ids = [token.id for token in model.generate(json.loads(sys.argv[3]), max_tokens=12, ignore_end=True)]
    print(json.dumps([ids, [row.name for row in model.plan.rows], [e.detail for e in said if e.stage == "prepare"]]))
"""


@pytest.mark.parametrize("limit", [0, 100, 30_000, 100_000])
def test_a_cache_on_a_full_disk(bundle, tmp_path, monkeypatch, limit):
    with shoal.load(bundle, context=64) as model:
        expected = answer(model)
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", FULL, str(bundle), str(limit), json.dumps(PROMPT)]
    done = subprocess.run(command, env=os.environ | {"SHOAL_CACHE": str(cache)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids, rows, said = json.loads(done.stdout)
    assert ids == expected and "private weights" in rows and str(cache) in said[-1]
    assert [path.name for path in cache.iterdir()] == ["lock"], "nothing half made stays"
