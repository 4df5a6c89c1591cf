"""Whatever the bytes are, a BundleError or a bundle whose every section can be read: nothing else, in bounded memory.

Three ways to be hostile: bytes that were damaged (the digest is wrong), an index that was forged (the digest is right,
the FlatBuffer is not) and entries that were forged (the FlatBuffer is right, what it says is not).
"""

import random
import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from shoal.runtime.bundle import Bundle, layout, verify
from shoal.runtime.bundle.read import parse
from shoal.runtime.errors import BundleError

MUTANTS = [100_000, pytest.param(2_000_000, marks=pytest.mark.deep)]


def survives(path, data: bytes) -> bool:
    """Writes `data`, opens it and reads everything it names; False if it was refused where it may be."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        assert error.why.startswith("Its ") and error.fix
        return False
    with bundle:
        read = 0
        for section in bundle.sections:
            assert len(bundle.view(section)) == section.length
            read += section.length
        assert read <= len(data)
        try:
            bundle.verify()
        except BundleError as error:
            assert "digest" in error.why
            return False
    return True


def judge(forged) -> bool:
    """As `survives`, without a file: may a bundle with this index be opened?"""
    header, size = forged.header(), layout.HEADER.size + len(forged.body) + len(forged.index)
    try:
        sections, graphs, gaps = parse(verify.header(header, size), header, forged.index)
    except BundleError as error:
        assert error.why.startswith("Its ") and error.fix
        return False
    end = layout.HEADER.size
    for section in sections:
        assert end <= section.offset < end + section.alignment and not section.offset % section.alignment
        assert len(section.sha256) == 32 and len(section.name.encode()) <= 255
        end = section.offset + section.length
    assert end <= size - len(forged.index) and sum(stop - start for start, stop in gaps) <= layout.MAX_GAPS
    assert len({(section.kind, section.name) for section in sections}) == len(sections)
    assert {("graph", graph.section) for graph in graphs} <= {(section.kind, section.name) for section in sections}
    return True


@pytest.fixture
def good(minimal):
    return minimal.read_bytes()


@pytest.fixture
def sealed(good, forge):
    """The minimal bundle in parts, to be changed and sealed again."""
    header = layout.Header(*layout.HEADER.unpack(good[:64]))
    forged = forge(body=good[64 : header.index_offset])
    return forge.replace(forged, index=good[header.index_offset :])


def test_every_byte_changed(good, minimal):
    """Each byte 0, 255 and one more; each bit of the header and the index flipped: found by the header, a gap or a
    digest, all of it."""
    index = layout.Header(*layout.HEADER.unpack(good[:64])).index_offset
    for at, byte in enumerate(good):
        values = {0, 255, (byte + 1) % 256}
        if at < 64 or at >= index:
            values |= {byte ^ (1 << bit) for bit in range(8)}
        for value in values - {byte}:
            assert not survives(minimal, good[:at] + bytes([value]) + good[at + 1 :]), (at, value)
    assert survives(minimal, good)


def test_headers_of_extreme_numbers():
    chosen, accepted = random.Random(3), 0
    for _ in range(20_000):
        size = chosen.choice([72, 80, 4096, 1 << 40])
        index = chosen.choice([0, 8, 16, layout.MAX_INDEX, layout.MAX_INDEX + 8, (1 << 32) - 1])
        offset = chosen.choice([0, 56, 64, 65, 72, size, abs(size - index), (1 << 64) - 8, (1 << 64) - index & ~7])
        length = chosen.choice([0, size, size - 1, 1 << 63, (1 << 64) - 1])
        try:
            found = verify.header(
                layout.HEADER.pack(layout.MAGIC, 1, 0, 0, index, length, offset % (1 << 64), b""), size
            )
        except BundleError:
            continue
        accepted += 1
        assert 64 <= found.index_offset and found.index_offset + found.index_length == found.file_length == size
    assert accepted


def test_every_prefix_and_every_extension(good, minimal):
    for length in range(len(good)):
        assert not survives(minimal, good[:length])
    for extra in (b"\0", b"\0" * 8, b"PK\5\6" + bytes(18)):  # the last makes a file that is a zip archive as well
        assert not survives(minimal, good + extra) and not survives(minimal, extra + good)


def test_every_byte_of_the_index_forged(sealed, forge, good, minimal):
    """As above with the digest made right again, so that the verifier sees each of them."""
    opened = 0
    for at, byte in enumerate(sealed.index):
        for value in {0, 255, (byte + 1) % 256, *(byte ^ (1 << bit) for bit in range(8))} - {byte}:
            index = sealed.index[:at] + bytes([value]) + sealed.index[at + 1 :]
            forged = forge.replace(sealed, index=index)
            if judge(forged):  # another name or digest, padding
                opened += 1
                survives(minimal, forged.file())
    assert 0 < opened < 11 * len(sealed.index) / 2  # most of it is digests, names and blocks, free to differ
    for length in range(len(sealed.index)):
        cut = forge.replace(sealed, index=sealed.index[:length])
        assert judge(cut) == (length > len(sealed.index) - 4)  # the last three bytes are padding


def mutate(random: random.Random, index: bytes) -> bytes:
    """One to eight changes of the kind that break parsers: lengths and offsets at their ends, runs moved or lost."""
    data = bytearray(index)
    for _ in range(1 + int(random.expovariate(1)) % 8):
        at = random.randrange(len(data) or 1)
        match random.randrange(6):
            case 0:
                data[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                form = random.choice(["<H", "<I", "<Q"])
                size = struct.calcsize(form)
                at = at // size * size
                if at + size <= len(data):
                    most = (1 << 8 * size) - 1
                    value = random.choice([0, 1, 2, 4, 8, len(data), most, most // 2, most - at, most - at - 4])
                    now = struct.unpack_from(form, data, at)[0]
                    struct.pack_into(form, data, at, random.choice([value, now + 1, now - 1, now + 4, now * 2]) & most)
            case 2:
                del data[at : at + random.randrange(16)]
            case 3:
                data[at:at] = random.randbytes(random.randrange(16))
            case 4:
                start = random.randrange(len(data) or 1)
                data[at : at + 8] = data[start : start + 8]
            case 5:
                data[at : at + 4] = struct.pack("<i", random.randrange(-len(data) - 8, len(data) + 8))
    return bytes(data)


@pytest.mark.parametrize("cases", MUTANTS)
def test_mutated_indexes(sealed, forge, cases):
    chosen = random.Random(cases)
    opened = sum(judge(forge.replace(sealed, index=mutate(chosen, sealed.index))) for _ in range(cases))
    assert 0 < opened < cases / 2


@pytest.mark.parametrize("cases", [500, pytest.param(20_000, marks=pytest.mark.deep)])
def test_mutated_indexes_in_a_file_and_in_bounded_memory(sealed, forge, minimal, cases):
    chosen = random.Random(cases + 1)
    tracemalloc.start()
    try:
        for _ in range(cases):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            survives(minimal, forge.replace(sealed, index=mutate(chosen, sealed.index)).file())
            assert tracemalloc.get_traced_memory()[1] - before < 2 << 20
    finally:
        tracemalloc.stop()


SIZES = some.one_of(
    some.integers(0, 600),
    some.sampled_from([1 << 20, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, (1 << 64) - 64]),
)
U32 = some.one_of(some.integers(0, 8), some.sampled_from([1 << 20, 1 << 21, (1 << 32) - 1]))
TEXT = some.one_of(
    some.sampled_from(["", "card", "weights", "graph", "decode", "stack", "org.x", "é" * 127, "é" * 128]),
    some.text(some.characters(exclude_categories=["Cs"]), max_size=4),
)
FIELDS = {
    "sections": {"kind": TEXT, "name": TEXT, "offset": SIZES, "length": SIZES, "alignment": U32,
                 "required": some.booleans(), "sha256": some.binary(max_size=40)},
    "graphs": {"name": TEXT, "role": TEXT, "backend": TEXT, "section": TEXT, "chunk": U32, "first_block": U32,
               "last_block": U32},
}  # fmt: skip
CHANGES = some.lists(
    some.one_of(
        some.tuples(some.just(table), some.integers(0, 3), some.just(field), values)
        for table, fields in FIELDS.items()
        for field, values in fields.items()
    ),
    max_size=6,
)


@pytest.fixture
def tables(minimal):
    with Bundle.open(minimal) as bundle:
        return {"sections": bundle.sections, "graphs": bundle.graphs}


def forge_entries(forge, tables, changes):
    """The minimal bundle, said to be otherwise: some fields of some entries, or (a number out of range) one more."""
    tables = {table: list(rows) for table, rows in tables.items()}
    for table, number, field, value in changes:
        rows = tables[table]
        if number >= len(rows):
            rows.append(rows[-1])
        rows[min(number, len(rows) - 1)] = forge.replace(rows[min(number, len(rows) - 1)], **{field: value})
    ends = [section.offset + section.length for section in tables["sections"]]
    for end in {ends[-1] % (1 << 20), max(ends) % (1 << 20), 384}:
        judge(forge(**tables, end=max(end, 64)))


def explore(examples: int):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


@explore(1_000)
@given(changes=CHANGES)
def test_forged_entries(forge, tables, changes):
    forge_entries(forge, tables, changes)


@pytest.mark.deep
@explore(20_000)
@given(changes=CHANGES)
def test_forged_entries_deep(forge, tables, changes):
    forge_entries(forge, tables, changes)
