"""The kernel's accounting: parsers on its text, and the functions on what this process really does."""

import mmap
import sys
import time

import numpy as np
import pytest

from shoal.runtime import measure

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

SMAPS = """\
7f0000000000-7f0000400000 r--s 00001000 fe:00 77                         /models/a b (1).shoal
Size:               4096 kB
Rss:                1024 kB
Anonymous:             4 kB
VmFlags: rd mr mw me ms
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
Size:               1024 kB
Rss:                 512 kB
Anonymous:           512 kB
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0                          [stack]
Rss:                  16 kB
Anonymous:            16 kB
"""


def test_smaps():
    mapped, heap, stack = measure.parse_smaps(SMAPS)
    assert mapped == measure.Mapping(
        0x7F0000000000, 0x7F0000400000, "r--s", 0x1000, "fe:00", 77, "/models/a b (1).shoal", 1 << 20, 4096
    )
    assert (heap.inode, heap.path, heap.anonymous) == (0, "", 512 << 10)
    assert stack.path == "[stack]"


@pytest.mark.parametrize("text", ["", "\n\n", "Rss: 3 kB\n", "VmFlags: rd\n"])
def test_smaps_without_mappings(text):
    assert list(measure.parse_smaps(text)) == []


def test_maps_have_no_counts():
    head = SMAPS.splitlines()[0]
    [found] = measure.parse_smaps(head)
    assert (found.rss, found.anonymous, found.inode) == (0, 0, 77)


def test_status():
    text = "Name:\tpy 1 kB\nVmHWM:\t    100 kB\nRssAnon:\t      64 kB\nThreads:\t1\nVmSwap:\t x kB\n"
    assert measure.parse_status(text) == {"VmHWM": 100 << 10, "RssAnon": 64 << 10}


def test_pagemap():
    present, swapped, absent, shared = 1 << 63, 1 << 62, 0, (1 << 61) | (1 << 55)
    entries = np.array([present, swapped, absent, shared], "<u8").tobytes()
    assert measure.parse_pagemap(entries, 4096) == 2 * 4096


@linux
def test_anonymous_memory_and_its_peak():
    before = measure.anonymous_bytes()
    with measure.PeakAnonymous(0.001) as peak:
        block = np.ones(64 << 20, np.uint8)
        held = measure.anonymous_bytes() - before
        for _ in range(500):  # on a busy machine the sampler waits for its turn
            if peak.bytes >= before + held - (4 << 20):
                break
            time.sleep(0.01)
        del block
    assert 60 << 20 < held < 72 << 20
    assert peak.bytes - before >= held - (4 << 20)
    assert measure.resident_bytes() >= measure.anonymous_bytes() and measure.peak_resident_bytes() >= peak.bytes


@linux
def test_a_range_counts_touched_pages_only():
    block = mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = np.frombuffer(block, np.uint8).ctypes.data
    block[0:1] = b"x"
    block[10 * mmap.PAGESIZE : 12 * mmap.PAGESIZE] = b"x" * (2 * mmap.PAGESIZE)
    assert measure.range_rss(address, len(block)) == 3 * mmap.PAGESIZE
    assert measure.range_rss(address + 11 * mmap.PAGESIZE, mmap.PAGESIZE) == mmap.PAGESIZE


@linux
def test_mapped_pages_of_a_file_by_whatever_name(tmp_path):
    path, link = tmp_path / "w", tmp_path / "link"
    path.write_bytes(bytes(8 << 20))
    link.symlink_to(path)
    assert measure.mapped_rss(path) == 0
    mapped = np.memmap(path, mode="r")
    mapped.sum()
    path.rename(tmp_path / "moved")
    link.unlink()
    link.symlink_to(tmp_path / "moved")
    assert measure.mapped_rss(link) == 8 << 20
    assert measure.mapped_rss(tmp_path / "absent") is None or measure.mapped_rss(tmp_path / "absent") == 0


def test_where_the_kernel_does_not_tell(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert measure.anonymous_bytes() is None and measure.mapped_rss(__file__) is None
    assert measure.mappings() == []
    with measure.PeakAnonymous() as peak:
        pass
    assert peak.bytes is None


@linux
def test_of_a_file_mapped_in_parts_those_within_a_range_count(tmp_path):
    path, page = tmp_path / "file", mmap.ALLOCATIONGRANULARITY
    path.write_bytes(bytes(64 * page))
    with open(path, "rb") as file:
        parts = [
            mmap.mmap(file.fileno(), count * page, prot=mmap.PROT_READ, offset=first * page)
            for first, count in ((0, 8), (16, 8), (40, 4))
        ]
    for part in parts:
        assert sum(part[at] for at in range(0, len(part), page)) == 0  # touched
    assert measure.mapped_rss(path) == 20 * page
    assert measure.mapped_rss(path, (16 * page, 8 * page)) == 8 * page
    assert measure.mapped_rss(path, (16 * page, 48 * page)) == 12 * page
    assert measure.mapped_rss(path, (24 * page, 8 * page)) == 0
