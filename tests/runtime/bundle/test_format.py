"""The format on disk: the fixture of 1.0 and the three descriptions of the index hold still and agree."""

import hashlib
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from shoal.runtime.bundle import Bundle, Graph, Section, create, layout, schema, verify

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "bundles" / "format-1.0.shoal"
SCHEMA = Path(schema.__file__).with_name("schema.fbs")


def noise(length: int) -> bytes:
    """The same bytes on every machine."""
    return b"".join(hashlib.sha256(bytes([n])).digest() for n in range(length // 32 + 1))[:length]


def write_golden(path: Path) -> None:
    """What format-1.0.shoal was written with, on the day that 1.0 was fixed. Never change it: a new version of the
    format gets a function and a file of its own, and this file must go on opening."""
    with create(path) as writer:
        writer.add("card", "", b'{"name": "golden", "blocks": 2}\n', required=True)
        writer.add("recipe", "", b'{"name": "int8", "version": 1}\n', alignment=1)
        with writer.section("weights", "weights", required=True) as weights:
            weights.write(noise(3000))
            weights.write(bytes(-weights.tell() % 64))
            weights.write(noise(1001))
        for name in ("decode", "prefill-256"):
            writer.add("graph", name, noise(200 + len(name)), required=True)
        writer.add("chat_template", "", b"")
        writer.add("tokenizer", "", noise(77), alignment=16)
        writer.add("org.example.note", "Grüße, 世界", "läuft".encode(), alignment=1)
        writer.graph(Graph("decode", "decode", "cpu", 0, 0, 2, "decode"))
        writer.graph(Graph("prefill-256", "decode", "npu", 256, 1, 2, "prefill-256"))
        writer.commit()


def test_todays_reader_opens_format_1_0():
    with Bundle.open(GOLDEN) as bundle:
        bundle.verify()
        assert bundle.version == (1, 0)
        assert bundle.digest == "51580bf7a7b24531a43f9608036e9da758669a7ce0a169d824a0652f4c0be173"
        assert [(s.kind, s.name, s.offset, s.length, s.alignment, s.required) for s in bundle.sections] == [
            ("card", "", 64, 32, 64, True),
            ("recipe", "", 96, 31, 1, False),
            ("weights", "weights", 4096, 4009, 4096, True),
            ("graph", "decode", 8128, 206, 64, True),
            ("graph", "prefill-256", 8384, 211, 64, True),
            ("chat_template", "", 8640, 0, 64, False),
            ("tokenizer", "", 8640, 77, 16, False),
            ("org.example.note", "Grüße, 世界", 8717, 6, 1, False),
        ]
        assert bundle.graphs == (
            Graph("decode", "decode", "cpu", 0, 0, 2, "decode"),
            Graph("prefill-256", "decode", "npu", 256, 1, 2, "prefill-256"),
        )
        assert bundle.bytes(bundle.section("card")) == b'{"name": "golden", "blocks": 2}\n'
        weights = bundle.view(bundle.section("weights", "weights"))
        assert weights[:3000] == noise(3000) and weights[3008:] == noise(1001) and not any(weights[3000:3008])
        assert bundle.bytes(bundle.section("org.example.note", "Grüße, 世界")).decode() == "läuft"


def test_todays_writer_makes_exactly_these_bytes(tmp_path):
    write_golden(tmp_path / "again.shoal")
    assert (tmp_path / "again.shoal").read_bytes() == GOLDEN.read_bytes()


def test_the_header_byte_by_byte():
    """docs/format.md's table, read without the code's struct."""
    data = GOLDEN.read_bytes()
    magic, major, minor, flags, index_length, file_length, index_offset = (
        data[:6], data[6], data[7], *struct.unpack("<II", data[8:16]), *struct.unpack("<QQ", data[16:32])
    )  # fmt: skip
    assert (magic, major, minor, flags) == (b"\x89shoal", 1, 0, 0)
    assert file_length == len(data) == index_offset + index_length
    assert data[32:64] == hashlib.sha256(data[:32] + data[index_offset:]).digest()


TABLE = re.compile(r"^table (\w+) \{(.*?)^\}", re.S | re.M)
FIELD = re.compile(r"^  (\w+): (\[?\w+\]?)( \(required\))?;", re.M)


def test_schema_verifier_and_accessors_agree():
    tables = {name: FIELD.findall(body) for name, body in TABLE.findall(SCHEMA.read_text())}
    in_verifier = {"Section": verify._SECTION, "Graph": verify._GRAPH, "Index": verify._INDEX}
    names = {"[ubyte]": "sha256", "[Section]": "tables", "[Graph]": "tables"}
    assert tables.keys() == in_verifier.keys()
    for table, fields in tables.items():
        assert [(name, names.get(type, type)) for name, type, _ in fields] == [
            (field.name, field.type) for field in in_verifier[table]
        ]
        assert [bool(required) for *_, required in fields] == [
            field.type not in verify._WIDTH for field in in_verifier[table]
        ]
        for name, *_ in fields:
            assert hasattr(schema, f"{table}Add{name.title().replace('_', '')}")
    for table, entry in (("Section", Section), ("Graph", Graph)):
        assert [name for name, *_ in tables[table]] == list(entry.__dataclass_fields__)


@pytest.mark.skipif(not shutil.which("flatc"), reason="flatc is not installed")
def test_the_flatbuffers_compiler_reads_our_index(tmp_path):
    """The index is what another FlatBuffers implementation takes it for, given schema.fbs alone."""
    data = GOLDEN.read_bytes()
    header = layout.Header(*layout.HEADER.unpack(data[:64]))
    (tmp_path / "index.bin").write_bytes(data[header.index_offset :])
    command = ["flatc", "--json", "--strict-json", "--raw-binary", "--defaults-json", "-o", tmp_path, SCHEMA, "--"]
    subprocess.run([*command, tmp_path / "index.bin"], check=True)
    read = json.loads((tmp_path / "index.json").read_text())
    with Bundle.open(GOLDEN) as bundle:
        sections = [Section(**{**entry, "sha256": bytes(entry["sha256"])}) for entry in read["sections"]]
        assert tuple(sections) == bundle.sections
        assert tuple(Graph(**entry) for entry in read["graphs"]) == bundle.graphs
