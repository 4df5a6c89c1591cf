"""The resident stack: what is there is what counts and nothing else, verified before the kernels see it; bytes that are
damaged, cut off, reordered or that lie are refused, and nothing has changed then."""

import gc
import json
import os
import random
import shutil
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal
from shoal.runtime import kernels
from shoal.runtime.bitstack import stack as stacks
from shoal.runtime.bitstack.layout import HEADER, Index
from shoal.runtime.bitstack.stack import Stack
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BackendError, BundleError, UsageError

pytestmark = pytest.mark.skipif(not kernels.available(), reason="needs the kernels")
PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture
def seen(monkeypatch):
    """What the kernels were last told of each matrix: (format of the rung or None, bytes of rung and blocks)."""
    found: dict[int, tuple] = {}
    told = kernels.Stack.set

    def tell(self, matrix, payloads, rung=None):
        told(self, matrix, payloads, rung)
        found[matrix] = (rung and rung[0], [bytes(one) for one in ([rung[1]] if rung else []) + list(payloads)])

    monkeypatch.setattr(kernels.Stack, "set", tell)
    return found


@pytest.fixture
def opened(tiny_stack):
    with Bundle.open(tiny_stack) as bundle, Stack(bundle) as stack:
        yield stack


def blocks_of(path) -> bytes:
    with Bundle.open(path) as bundle:
        return bytes(bundle.view(bundle.section("stack", "blocks")))


def expected(stack: Stack, path) -> dict[int, tuple]:
    """What the kernels should see, said anew from the file's bytes."""
    data, counts, found = blocks_of(path), stack.index.counts(stack.entries), {}
    for entry in stack.index.entries():
        one = stack.index.matrices[entry.matrix]
        if entry.step in one.live(counts[entry.matrix]):
            step = one.steps[entry.step]
            rung, payloads = found.setdefault(entry.matrix, (None, []))
            payloads.append(data[entry.offset : entry.offset + entry.length][HEADER.size :])
            if isinstance(step, stacks.LinearFormat):
                found[entry.matrix] = (step, payloads)
    return found


def pages(stack: Stack) -> int:
    """Bytes of the pages that hold something that counts."""
    counts, kept = stack.index.counts(stack.entries), set()
    for entry in stack.index.entries():
        if entry.step in stack.index.matrices[entry.matrix].live(counts[entry.matrix]):
            kept.update(range(entry.offset // PAGE, -(-(entry.offset + entry.length) // PAGE)))
    return len(kept) * PAGE


def test_a_walk_over_all_sizes_holds_and_shows_what_counts(opened, tiny_stack, seen):
    assert opened.entries == 0 and opened.resident() in (0, None)
    draw, most = random.Random(3), len(opened.index.order)
    for entries in [most, opened.index.floor, *(draw.randint(opened.index.floor, most) for _ in range(40))]:
        opened.set_entries(entries)
        assert opened.entries == entries and opened.bytes == opened.index.sizes()[entries]
        assert seen == expected(opened, tiny_stack)
        if sys.platform == "linux":
            assert opened.resident() == pages(opened)
    opened.close()
    opened.close()
    with pytest.raises(BackendError):
        opened.set_entries(most)


def test_hardly_more_than_before_or_after_is_ever_there(opened):
    """Where rungs replace rungs it goes in batches."""
    floor, most = opened.index.floor, len(opened.index.order)
    largest = max(entry.length for entry in opened.index.entries())
    for start, stop in ((floor, most), (most, floor), (floor, most // 2), (most // 2, most)):
        opened.set_entries(start)
        held: list[int | None] = []
        opened.set_entries(stop, lambda work, held=held: (held.append(opened.resident()), work()))
        room = max(opened.sizes[start], opened.sizes[stop]) + 2 * largest
        assert None in held or (len(held) > 1 and max(held) <= room + PAGE * len(opened.index.matrices) * 2)


@pytest.mark.parametrize("entries", [-1, 1.0, True, None, "7", 10**9])
def test_a_number_of_entries_that_is_none(opened, entries):
    opened.set_entries(opened.index.floor)
    with pytest.raises(UsageError):
        opened.set_entries(entries)
    with pytest.raises(UsageError):
        opened.set_entries(opened.index.floor - 1)
    assert opened.entries == opened.index.floor


def test_two_threads_take_turns(opened, tiny_stack, seen):
    most, floor = len(opened.index.order), opened.index.floor

    def walk(seed):
        draw = random.Random(seed)
        for _ in range(30):
            opened.set_entries(draw.randint(floor, most))

    threads = [threading.Thread(target=walk, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == expected(opened, tiny_stack)


def test_what_between_raises_leaves_everything_as_it_was(opened, tiny_stack, seen):
    floor, most = opened.index.floor, len(opened.index.order)
    opened.set_entries(floor + 5)
    before, calls = dict(seen), []

    def fails(work):
        calls.append(None)
        if len(calls) == 2:  # of what is done in batches
            raise RuntimeError("stop")
        work()

    with pytest.raises(RuntimeError):
        opened.set_entries(most, fails)
    assert opened.entries == floor + 5 and seen == before == expected(opened, tiny_stack)
    assert opened.resident() in (pages(opened), None)


# Hostile bytes --------------------------------------------------------------------------------------------------------


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def swapped(index: Index, data: bytes) -> bytes:
    """Two entries of one length in each other's place."""
    entries = index.entries()
    for a in entries:
        for b in entries:
            if a.length == b.length and a.matrix != b.matrix and a.offset < b.offset:
                first, second = (data[e.offset : e.offset + e.length] for e in (a, b))
                between = data[a.offset + a.length : b.offset]
                return data[: a.offset] + second + between + first + data[b.offset + b.length :]
    raise AssertionError


ENTRIES = {
    "magic": lambda index, data: flipped(data, 0),
    "matrix": lambda index, data: flipped(data, 8),
    "step": lambda index, data: flipped(data, 12),
    "rank": lambda index, data: flipped(data, 16),
    "checksum": lambda index, data: flipped(data, 20),
    "length": lambda index, data: flipped(data, 24),
    "payload": lambda index, data: flipped(data, index.entries()[1].offset - 1),
    "last payload": lambda index, data: flipped(data, len(data) - 1),
    "last header": lambda index, data: flipped(data, index.entries()[-1].offset + 8),
    "swapped": swapped,
    "reversed": lambda index, data: b"".join(data[e.offset : e.offset + e.length] for e in index.entries()[::-1]),
    "zeros": lambda index, data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", ENTRIES)
def test_an_entry_that_is_not_the_one_meant_is_refused(make_stack, int8_bundle, mixed, tmp_path, damage):
    def change(index, data):
        return index.to_json(), ENTRIES[damage](index, data)

    path = make_stack(int8_bundle, tmp_path / "m.shoal", mixed, change=change)
    with Bundle.open(path) as bundle, Stack(bundle) as stack:
        # What is replaced is not looked at, until it is wanted
        wanted = len(stack.index.order) if damage.startswith("last") else stack.index.floor
        with pytest.raises(BundleError):
            stack.set_entries(wanted)
        assert stack.entries == 0 and stack.resident() in (0, None)
    with pytest.raises(BundleError), shoal.load(path, context=64) as model:
        model.set_entries(wanted)
    if damage.startswith("last"):  # a smaller prefix is whole, and growing on is refused without harm
        with shoal.load(path, context=64, memory=shoal.runtime.model.plan(path, context=64).total - 1) as model:
            ids = [token.id for token in model.generate([5, 6, 7], max_tokens=4, ignore_end=True)]
            before = model.plan
            with pytest.raises(BundleError):
                model.set_memory("1GB")
            assert model.plan is before and model.stack.entries == before.entries
            model.set_entries(model.stack.index.floor)
            model.set_entries(before.entries)
            assert [token.id for token in model.generate([5, 6, 7], max_tokens=4, ignore_end=True)] == ids


def changed(**fields):
    def change(index, data):
        raw = json.loads(index.to_json())
        for key, value in fields.items():
            raw[key] = value(raw) if callable(value) else value
        return json.dumps(raw).encode(), data

    return change


INDEXES = {
    "not json": lambda index, data: (b"\xff{", data),
    "deep": lambda index, data: (b"[" * 100_000, data),
    "another version": changed(version=2),
    "no matrices": changed(matrices=[]),
    "a matrix that is not there": changed(order=lambda raw: [99, *raw["order"][1:]]),
    "an order that lies": changed(order=lambda raw: [raw["order"][1], raw["order"][0], *raw["order"][2:]]),
    "an order too short": changed(order=lambda raw: raw["order"][:-1]),
    "an order too long": changed(order=lambda raw: [*raw["order"], 0]),
    "a floor that lies": changed(floor=0),
    "a floor that lies a little": changed(floor=lambda raw: raw["floor"] - 1),
    "a floor beyond": changed(floor=10**6),
    "no floor": changed(floor=None),
    "another shape": changed(matrices=lambda raw: [{**raw["matrices"][0], "outputs": 512}, *raw["matrices"][1:]]),
    "another rank": changed(
        matrices=lambda raw: [*raw["matrices"][:-1], {**raw["matrices"][-1], "steps": [{"rank": 2}] * 5}]
    ),
    "a shape beyond all": changed(matrices=lambda raw: [{**raw["matrices"][0], "inputs": 1 << 62}]),
    "truncated": lambda index, data: (index.to_json(), data[:-64]),
    "empty": lambda index, data: (index.to_json(), b""),
    "longer": lambda index, data: (index.to_json(), data + bytes(64)),
    "too long": lambda index, data: (index.to_json() + b" " * stacks.MAX_INDEX, data),
}


@pytest.mark.parametrize("damage", INDEXES)
def test_an_index_that_lies_is_refused(make_stack, int8_bundle, mixed, tmp_path, damage):
    path = make_stack(int8_bundle, tmp_path / "m.shoal", mixed, change=INDEXES[damage])
    gc.collect()  # files that tests before this one left to it
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    with pytest.raises(BundleError), shoal.load(path, context=64) as model:
        model.set_entries(model.stack.index.floor)
    assert not before or len(os.listdir("/proc/self/fd")) == len(before)


def test_a_stack_that_is_not_where_it_should_be(make_stack, int8_bundle, mixed, tmp_path):
    for length in (0, 64):  # one of them ends within a page
        pad = bytes([32]) * length
        path = make_stack(int8_bundle, tmp_path / "a.shoal", mixed, alignment=64, change=lambda index, data, pad=pad: (
            index.to_json() + pad, data))  # fmt: skip
        with Bundle.open(path) as bundle:
            if bundle.section("stack", "blocks").offset % PAGE:
                break
    with Bundle.open(path) as bundle:
        assert bundle.section("stack", "blocks").offset % PAGE, "the pages are shared with what lies before"
        with Stack(bundle) as stack:
            for entries in (len(stack.index.order), stack.index.floor):
                stack.set_entries(entries)
                assert stack.resident() is None or stack.bytes <= stack.resident() < stack.bytes + 40 * PAGE
    with Bundle.open(make_stack(int8_bundle, tmp_path / "b.shoal", mixed, alignment=8)) as bundle:
        if bundle.section("stack", "blocks").offset % 64:
            with pytest.raises(BundleError, match="multiple of 64"):
                Stack(bundle)


def test_a_file_that_is_cut_while_it_is_used(tiny_stack, tmp_path):
    path = shutil.copy(tiny_stack, tmp_path / "m.shoal")
    with Bundle.open(path) as bundle, Stack(bundle) as stack:
        stack.set_entries(stack.index.floor)
        os.truncate(path, bundle.section("stack", "blocks").offset + stack.index.entries()[-1].offset)
        with pytest.raises(BundleError, match="cut"):
            stack.set_entries(len(stack.index.order))
        assert stack.entries == stack.index.floor


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_of_an_index_is_read_or_refused(tiny_stack, data):
    with Bundle.open(tiny_stack) as bundle:
        raw = bundle.bytes(bundle.section("stack", "index"))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw = raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + data.draw(st.integers(0, 3)) :]
    else:
        found = json.loads(raw)
        key = data.draw(st.sampled_from(sorted(found)))
        plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
        junk = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=6), plain, max_size=3)
        value = found[key]
        if isinstance(value, list) and value and data.draw(st.booleans()):
            value[data.draw(st.integers(0, len(value) - 1))] = data.draw(junk)
        else:
            found[key] = data.draw(junk)
        raw = json.dumps(found).encode()
    try:
        index = Index.from_json(raw)
    except BundleError:
        return
    assert np.all(np.diff(index.sizes()) > 0) and len(index.sizes()) == len(index.order) + 1
    assert all(index.counts(index.floor))


# Without the kernels --------------------------------------------------------------------------------------------------


def test_a_stack_without_the_kernels_is_refused_with_a_way_out(tiny_stack, without_kernels):
    for ask in (shoal.load, shoal.runtime.model.plan):
        with pytest.raises(BackendError, match="not built") as refused:
            ask(tiny_stack, context=64)
        assert "compiler" in refused.value.fix


def test_other_kernels_cannot_run_a_stack(tiny_stack):
    with pytest.raises(BackendError, match="kernels='ort'"):
        shoal.load(tiny_stack, context=64, kernels="ort")
