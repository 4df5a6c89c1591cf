"""Every refusal of the verifier, one forged file each: the digest is right, so the named field is what is refused."""

import struct

import pytest

from shoal.runtime.bundle import Bundle, Graph, layout, schema, verify
from shoal.runtime.bundle.read import parse
from shoal.runtime.errors import BundleError

GRAPH = Graph("decode", "decode", "cpu", 0, 0, 5, "g")


def refusal(forged) -> BundleError:
    data = forged.file()
    found = verify.header(data[:64], len(data))
    with pytest.raises(BundleError) as caught:
        parse(found, data[:64], forged.index)
    return caught.value


@pytest.mark.parametrize(
    "at, form, value, why",
    [
        (0, "B", 0x88, "magic"),
        (6, "B", 0, "version is 0.0, which never existed"),
        (8, "I", 1, "flags 0x1, unknown here"),
        (12, "I", layout.MAX_INDEX + 8, "index length is 16777224 bytes, over the limit"),
        (12, "I", 16, "index ends at byte"),
        (16, "Q", 1 << 63, "file length is 9223372036854775808 bytes"),
        (24, "Q", 56, "index offset is 56"),
        (24, "Q", 65, "index offset is 65"),
        (24, "Q", (1 << 64) - 8, "index ends at byte"),
    ],
)
def test_header(forge, at, form, value, why):
    data = bytearray(forge([forge.section()]).file())
    struct.pack_into("<" + form, data, at, value)
    with pytest.raises(BundleError, match=why):
        verify.header(bytes(data[:64]), len(data))


def test_a_file_shorter_than_a_header():
    with pytest.raises(BundleError, match="header is cut short: the file has 3 bytes"):
        verify.header(b"abc", 3)


@pytest.mark.parametrize("at", [7, 40, -1])  # minor version, digest, index: what no other rule looks at
def test_a_wrong_digest(forge, at):
    data = bytearray(forge([forge.section()]).file())
    data[at] ^= 1
    header, index = bytes(data[:64]), bytes(data[72:])
    with pytest.raises(BundleError, match="it is damaged"):
        parse(verify.header(header, len(data)), header, index)


@pytest.mark.parametrize("major, minor, needs", [(2, 0, "2.0"), (255, 7, "255.7")])
def test_a_newer_major_version_says_what_it_needs(forge, tmp_path, major, minor, needs):
    (tmp_path / "new.shoal").write_bytes(forge([forge.section()], major=major, minor=minor).file())
    with pytest.raises(BundleError, match=f"needs >= {needs}, this shoal reads 1.0") as caught:
        Bundle.open(tmp_path / "new.shoal")
    assert "Upgrade shoal" in caught.value.fix


def test_a_newer_minor_version_opens_unless_it_requires_something(forge, tmp_path):
    path = tmp_path / "new.shoal"
    path.write_bytes(forge([forge.section("adapter")], minor=9).file())
    assert Bundle.open(path).version == (1, 9)  # unknown, optional: ignored
    for extra in ({"flags": 4}, {"required": True}):
        entry = forge.section("adapter", required=extra.pop("required", False))
        path.write_bytes(forge([entry], minor=9, **extra).file())
        with pytest.raises(BundleError, match=r"needs >= 1\.9"):
            Bundle.open(path)


def test_a_required_kind_of_this_version_that_nobody_knows(forge):
    why = refusal(forge([forge.section("org.example.thing", required=True)])).why
    assert "sections[0] is required and of the kind 'org.example.thing', unknown here" in why


@pytest.mark.parametrize("kind", sorted(layout.KINDS))
def test_required_kinds_that_are_known(forge, tmp_path, kind):
    (tmp_path / "a.shoal").write_bytes(forge([forge.section(kind, required=True)]).file())
    assert Bundle.open(tmp_path / "a.shoal").section(kind).required


def second(forge, **fields):
    return [forge.section(), forge.section(**{"kind": "recipe", "offset": 72, **fields})]


RULES = {
    "empty kind": (lambda f: [f.section("")], "sections[0].kind is ''"),
    "kind in capitals": (lambda f: [f.section("Card")], "sections[0].kind is 'Card'"),
    "kind with an escape": (lambda f: [f.section("a\x1b[2J")], "sections[0].kind is"),
    "name with an escape": (lambda f: [f.section(name="a\x1b[2J")], "sections[0].name is"),
    "name that turns text around": (lambda f: [f.section(name="a\u202eb")], "sections[0].name is"),
    "alignment 0": (lambda f: [f.section(alignment=0)], "sections[0].alignment is 0"),
    "alignment 3": (lambda f: [f.section(alignment=3)], "sections[0].alignment is 3"),
    "alignment 2 MiB": (lambda f: [f.section(alignment=2 << 20)], "sections[0].alignment is 2097152"),
    "same kind and name": (lambda f: [*second(f, kind="card")], "sections[1] is a second 'card'"),
    "inside the header": (lambda f: [f.section(offset=56)], "sections[0].offset is 56, not 64"),
    "not aligned": (lambda f: [f.section(alignment=128)], "sections[0].offset is 64, not 128"),
    "overlap": (lambda f: second(f, offset=64), "sections[1].offset is 64, not 72"),
    "not sorted": (lambda f: second(f)[::-1], "sections[0].offset is 72, not 64"),
    "gap as wide as an alignment": (lambda f: second(f, offset=80), "sections[1].offset is 80, not 72"),
    "offset that would wrap": (lambda f: second(f, offset=(1 << 64) - 8), "sections[1].offset is"),
    "length that would wrap": (lambda f: second(f, length=(1 << 64) - 64), "sections[1].length is"),
    "into the index": (lambda f: second(f, length=16), "it ends at byte 88, inside the index"),
    "hole before the index": (lambda f: [f.section()], "index offset is 80, but the sections end at byte 72"),
    "nothing before the index": (lambda f: [], "index offset is 80, but the sections end at byte 64"),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_sections(forge, name):
    sections, why = RULES[name]
    assert why in refusal(forge(sections(forge), end=80)).why


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"name": "\n"}, "graphs[0].name is"),
        ({"section": "\x7f"}, "graphs[0].section is"),
        ({"role": ""}, "graphs[0].role is ''"),
        ({"backend": "CPU"}, "graphs[0].backend is 'CPU'"),
        ({"first_block": 6}, "graphs[0].first_block is 6, after last_block 5"),
        ({"section": "absent"}, "graphs[0].section is 'absent', and no graph section has that name"),
    ],
)
def test_rules_of_graphs(forge, fields, why):
    sections = [forge.section("graph", "g")]
    assert why in refusal(forge(sections, [forge.replace(GRAPH, **fields)])).why


def test_two_graphs_of_a_name_and_a_graph_in_a_section_of_another_kind(forge):
    assert (
        "graphs[1].name is 'decode', a second time" in refusal(forge([forge.section("graph", "g")], [GRAPH, GRAPH])).why
    )
    assert "graphs[0].section is 'g'" in refusal(forge([forge.section("card", "g")], [GRAPH])).why


def test_gaps_are_bounded_together(forge):
    """Each is under 1 MiB, so a sparse file of 1024 of them would make a reader go through 1 GiB of zeros."""
    sections = [
        forge.section("weights", str(n), offset=(n + 1) << 20, length=1, alignment=1 << 20, data=b"\0")
        for n in range(70)
    ]
    forged = forge(sections, body=b"")  # the rules see sizes only
    header = layout.Header(layout.MAGIC, 1, 0, 0, len(forged.index), 0, layout.align((70 << 20) + 1, 8), b"")
    with pytest.raises(BundleError, match="gaps of more than"):
        verify.rules(header, sections, [])


def test_counts_are_bounded(forge):
    many = [
        forge.section("weights", str(n), offset=64 + n, length=1, alignment=1, data=b"\0")
        for n in range(layout.MAX_SECTIONS + 1)
    ]
    assert "index.sections has 1025 elements, over the limit" in refusal(forge(many)).why
    graphs = [forge.replace(GRAPH, name=str(n)) for n in range(layout.MAX_GRAPHS + 1)]
    assert "index.graphs has 1025 elements, over the limit" in refusal(forge([forge.section("graph", "g")], graphs)).why
    verify.structure(forge(many[:-1]).index)


def test_names_are_bounded_in_bytes(forge):
    longest = "é" * 127 + "x"
    forged = forge([forge.section(name=longest)])
    assert parse(verify.header(forged.header(), len(forged.file())), forged.header(), forged.index)
    assert (
        "sections[0].name has 256 elements, over the limit of 255"
        in refusal(forge([forge.section(name=longest + "x")])).why
    )


# Structure: bytes of a good index, changed where the schema's accessors say a thing lies.


def where(index: bytes):
    """Positions of the first section's table: its start, its vtable, and of each field by slot."""
    tab = schema.Index.GetRootAs(index).Sections(0)._tab
    vtable = tab.Pos - struct.unpack_from("<i", index, tab.Pos)[0]
    return tab.Pos, vtable, {slot: tab.Pos + tab.Offset(4 + 2 * slot) for slot in range(7)}


def leads_to(index: bytes, position: int) -> int:
    return position + struct.unpack_from("<I", index, position)[0]


def sections_vector(index: bytes) -> int:
    return schema.Index.GetRootAs(index)._tab.Vector(schema.Index.GetRootAs(index)._tab.Offset(4)) - 4


KIND, NAME, OFFSET, LENGTH, ALIGNMENT, REQUIRED, SHA256 = range(7)
STRUCTURE = {
    # what: (position, form, value) from the index; part of the reason
    "root after the end": (lambda i: (0, "I", len(i)), "index lies at byte"),
    "root near 2^32": (lambda i: (0, "I", 0xFFFFFFFC), "index lies at byte 4294967292"),
    "root on itself": (lambda i: (0, "I", 0), "index lies at byte 0"),
    "root not aligned": (lambda i: (0, "I", 5), "index lies at byte 5"),
    "vtable before the start": (lambda i: (where(i)[0], "i", where(i)[0] + 2), "has its vtable at byte -2"),
    "vtable on the root": (lambda i: (where(i)[0], "i", where(i)[0]), "has its vtable at byte 0"),
    "vtable after the end": (lambda i: (where(i)[0], "i", where(i)[0] - len(i)), "has its vtable at byte"),
    "vtable not aligned": (lambda i: (where(i)[0], "i", where(i)[0] - where(i)[1] + 1), "has its vtable at byte"),
    "vtable that is odd": (lambda i: (where(i)[1], "H", 5), "has a vtable of 5 bytes"),
    "vtable that is short": (lambda i: (where(i)[1], "H", 2), "has a vtable of 2 bytes"),
    "vtable beyond the end": (lambda i: (where(i)[1], "H", 0xFFFE), "has a vtable of 65534 bytes"),
    "table that is short": (lambda i: (where(i)[1] + 2, "H", 3), "has a size of 3 bytes"),
    "table beyond the end": (lambda i: (where(i)[1] + 2, "H", 0xFFFF), "has a size of 65535 bytes"),
    "field before its table": (lambda i: (where(i)[1] + 4 + 2 * OFFSET, "H", 2), "offset lies at byte 2"),
    "field after its table": (lambda i: (where(i)[1] + 4 + 2 * LENGTH, "H", 0x1000), "sections[0].length lies at"),
    "field not aligned": (lambda i: (where(i)[1] + 4 + 2 * ALIGNMENT, "H", 5), "sections[0].alignment lies at byte 5"),
    "required string absent": (lambda i: (where(i)[1] + 4 + 2 * NAME, "H", 0), "sections[0].name is missing"),
    "digest absent": (lambda i: (where(i)[1] + 4 + 2 * SHA256, "H", 0), "sections[0].sha256 is missing"),
    "vtable cut before the digest": (lambda i: (where(i)[1], "H", 4 + 2 * SHA256), "sections[0].sha256 is missing"),
    "bool of 2": (lambda i: (where(i)[2][REQUIRED], "B", 2), "sections[0].required is 2"),
    "string after the end": (lambda i: (where(i)[2][KIND], "I", 0xFFFFFFF0), "sections[0].kind leads to byte"),
    "string on itself": (lambda i: (where(i)[2][KIND], "I", 0), "sections[0].kind leads to byte"),
    "string not aligned": (lambda i: (where(i)[2][KIND], "I", 9), "sections[0].kind leads to byte"),
    "string of 2^32-1": (lambda i: (leads_to(i, where(i)[2][KIND]), "I", 0xFFFFFFFF), "has 4294967295 elements"),
    "string past the end": (lambda i: (leads_to(i, where(i)[2][KIND]), "I", 255), "has 255 elements and"),
    "string with no end": (lambda i: (leads_to(i, where(i)[2][KIND]), "I", 3), "kind does not end in a zero byte"),
    "string not UTF-8": (lambda i: (leads_to(i, where(i)[2][KIND]) + 4, "B", 0xFF), "kind is not UTF-8"),
    "digest of 31 bytes": (lambda i: (leads_to(i, where(i)[2][SHA256]), "I", 31), "sha256 has 31 bytes, not 32"),
    "sections beyond the end": (lambda i: (sections_vector(i), "I", 1000), "sections has 1000 elements and"),
    "table after the end": (lambda i: (sections_vector(i) + 4, "I", len(i)), "index.sections[0] lies at byte"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure(forge, name):
    forged = forge([forge.section(required=True)])
    change, why = STRUCTURE[name]
    position, form, value = change(forged.index)
    index = bytearray(forged.index)
    struct.pack_into("<" + form, index, position, value)
    assert why in refusal(forge.replace(forged, index=bytes(index))).why


@pytest.mark.parametrize("length", range(0, 8))
def test_an_index_too_short_for_a_root(forge, length):
    assert "too short" in refusal(forge.replace(forge(), index=bytes(length))).why


def test_slots_of_a_later_minor_version_are_left_alone(forge):
    """A table with an eighth field that today's schema does not have, as a writer of 1.1 would make it."""
    from flatbuffers.builder import Builder

    builder = Builder(256)
    kind, name, more = builder.CreateString("card"), builder.CreateString(""), builder.CreateString("later")
    sha256 = builder.CreateByteVector(bytes(32))
    builder.StartObject(8)
    for slot, offset in ((0, kind), (1, name), (6, sha256), (7, more)):
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    builder.PrependUint64Slot(2, 64, 0)
    builder.PrependUint32Slot(4, 1, 0)
    entry = builder.EndObject()
    vectors = []
    for entries in ([entry], []):
        builder.StartVector(4, len(entries), 4)
        for each in entries:
            builder.PrependUOffsetTRelative(each)
        vectors.append(builder.EndVector())
    schema.IndexStart(builder)
    schema.IndexAddSections(builder, vectors[0])
    schema.IndexAddGraphs(builder, vectors[1])
    builder.Finish(schema.IndexEnd(builder))
    forged = forge.replace(forge(), index=bytes(builder.Output()), minor=1)
    sections, graphs, gaps = parse(verify.header(forged.header(), len(forged.file())), forged.header(), forged.index)
    assert sections[0].kind == "card" and sections[0].length == 0 and not graphs and not gaps
