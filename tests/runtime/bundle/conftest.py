"""Bundles to test with: a minimal one, and ones that a hostile hand sealed with the right digest."""

import hashlib
from dataclasses import dataclass, replace

import pytest

from shoal.runtime.bundle import Graph, Section, create, layout, verify, write


@dataclass(frozen=True)
class Forged:
    """A bundle as parts. `file` seals them with a true digest, so that only what was forged can be refused."""

    body: bytes  # from the end of the header to the index
    index: bytes
    major: int = layout.MAJOR
    minor: int = layout.MINOR
    flags: int = 0

    def header(self) -> bytes:
        offset = layout.HEADER.size + len(self.body)
        length = len(self.index)
        fields = (layout.MAGIC, self.major, self.minor, self.flags, length, offset + length, offset)
        return layout.HEADER.pack(*fields, verify.digest(layout.HEADER.pack(*fields, b""), self.index))

    def file(self) -> bytes:
        return self.header() + self.body + self.index


def section(kind="card", name="", offset=64, length=8, alignment=8, required=False, data=bytes(8)) -> Section:
    return Section(kind, name, offset, length, alignment, required, hashlib.sha256(data).digest())


@pytest.fixture(scope="session")
def forge():
    """forge(sections, graphs, body=None, **header fields) -> Forged; forge.section(**fields) -> Section."""

    def make(sections=(), graphs=(), body=None, end=None, **fields) -> Forged:
        if end is None:
            end = max((entry.offset + entry.length for entry in sections), default=layout.HEADER.size)
        header, index = write.seal(sections, graphs, end)
        size = layout.Header(*layout.HEADER.unpack(header)).index_offset - layout.HEADER.size
        return Forged(bytes(size) if body is None else body, index, **fields)

    make.section, make.replace = section, replace
    return make


@pytest.fixture
def minimal(tmp_path):
    """A small bundle with a section of every shape: required, empty, aligned, a graph and its weights."""
    path = tmp_path / "minimal.shoal"
    with create(path) as writer:
        writer.add("card", "", b'{"name": "minimal"}', alignment=1, required=True)
        writer.add("chat_template", "", b"")
        with writer.section("weights", "weights", alignment=256) as weights:
            weights.write(bytes(range(100)))
        writer.add("graph", "decode", b"not really a graph", alignment=8)
        writer.graph(Graph("decode", "decode", "cpu", 0, 0, 5, "decode"))
        writer.commit()
    return path
