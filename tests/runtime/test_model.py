"""Loading: a bundle that changes meanwhile is refused, whoever changed it, and a refusal leaves nothing open."""

import gc
import os
import shutil

import pytest

import shoal
from shoal.runtime import prepack, session
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BundleError, StorageError
from shoal.runtime.model import plan


def swap(path):
    shutil.copy(path, path.with_name("other"))
    os.replace(path.with_name("other"), path)


def grow(path):
    with open(path, "ab") as file:
        file.write(b"more")


CHANGES = {
    "swapped": swap, "linked": lambda path: os.link(path, path.with_name("second")), "grown": grow,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1), "gone": os.unlink,
}  # fmt: skip


@pytest.fixture
def own(tiny_bundle, tmp_path):
    """A bundle that may be spoilt; what it needs is prepared already."""
    shoal.load(tiny_bundle, context=64).close()
    return shutil.copy(tiny_bundle, tmp_path / "m.shoal")


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("module, name, after", [(prepack, "prepare", False), (session, "open_graph", True)])
def test_a_bundle_that_changes_while_it_is_loaded(own, monkeypatch, module, name, after, change):
    real = getattr(module, name)

    def meanwhile(*arguments, **options):
        if after:  # mapped, and used only once it proved to be what was verified
            opened = real(*arguments, **options)
        CHANGES[change](own)
        return opened if after else real(*arguments, **options)

    monkeypatch.setattr(module, name, meanwhile)
    gc.collect()  # files that tests before this one left to it
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BundleError) as refused:
        shoal.load(own, context=64)
    assert str(own) in str(refused.value) and len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("kernels", ["auto", "ort"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "another's"])
def test_a_spoilt_cache_is_made_again(own, tiny_folder, tmp_path, monkeypatch, damage, kernels):
    """Repacked weights of an fp32 model; of one in integers those in another layout as well."""
    if kernels == "ort":
        shoal.convert(tiny_folder, own, "int4", overwrite=True, check_parity=False)
    stages = {"prepare"} if kernels == "auto" else {"prepare", "transcode"}
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))

    def answer(path=own):
        events = []
        with shoal.load(path, context=64, kernels=kernels, progress=events.append) as model:
            found = [token.id for token in model.generate([5, 6, 7], max_tokens=12, ignore_end=True)]
        return found, stages & {event.stage for event in events}

    expected, made = answer()
    assert made == stages and answer() == (expected, set())
    paths = sorted((tmp_path / "cache").glob("*.cache"))
    assert len(paths) == len(stages)
    if damage == "another's":
        other = tmp_path / "other.shoal"
        shoal.convert(tiny_folder.parent / "llama3", other, "fp32" if kernels == "auto" else "int4", check_parity=False)
        answer(other)
        strangers = sorted({*paths[0].parent.glob("*.cache")} - {*paths})
        for path, stranger in zip(paths, strangers, strict=True):
            shutil.copy2(stranger, path)
    else:
        for path in paths:
            data = bytearray(path.read_bytes())
            data[4096] ^= 0x40  # a weight, which no digest is compared with when it is mapped
            path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    assert answer() == (expected, stages) and answer() == (expected, set())


def test_without_a_cache_and_without_room_for_private_weights(own, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "file" / "cache"))
    prepared, private = (plan(own, context=64, prepare=prepare) for prepare in (True, False))
    assert prepared.anonymous < private.anonymous and abs(prepared.total - private.total) < 1 << 20
    original = shoal.runtime.model._sizes

    def cold(*arguments, **options):  # as of a model whose originals do not fit beside their copies
        sizes = original(*arguments, **options)
        return sizes if sizes.repacked else type(sizes)(**vars(sizes) | {"cold": 1 << 30})

    monkeypatch.setattr(shoal.runtime.model, "_sizes", cold)
    with pytest.raises(StorageError, match="SHOAL_CACHE"):
        shoal.load(own, context=64, memory=prepared.total + (1 << 20))


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_of_a_table_that_is_the_head_too_no_byte_is_planned_twice(tiny_folder, tmp_path, recipe):
    """In fp32 the head is a repacked copy and the bundle's table is read by rows; in integers it is read whole."""
    out = tmp_path / "tied.shoal"
    shoal.convert(tiny_folder.parent / "qwen2", out, recipe, check_parity=False)
    rows = {row.name: row.bytes for row in plan(out, context=64).rows}
    with Bundle.open(out) as bundle:
        stored = bundle.section("weights", "weights").length
    if recipe == "fp32":
        assert rows["weights"] < 16 << 10 < 260 * 48 * 4 < rows["repacked weights"]
    else:
        assert stored * 0.95 < rows["weights"] <= stored
