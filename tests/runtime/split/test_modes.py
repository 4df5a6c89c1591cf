"""Mode tables: what a bundle carries is what was packed, and what is not one is refused by the name of its field."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.bundle import Bundle, create
from shoal.runtime.errors import BundleError
from shoal.runtime.split import modes
from shoal.runtime.split.modes import Mode, ModeTable, parse

MODE = {"id": 1, "bits": 4, "bytes": 900, "device_ms": 1.5, "accuracy": 0.5}


def section(*entries, **fields) -> bytes:
    return json.dumps({"name": "", "encoder": "", "tables": "", "modes": entries} | fields).encode()


def test_a_bundle_s_table_and_codecs_are_what_was_packed(network):
    for path in (network.device, network.edge):
        with Bundle.open(path) as bundle:
            table = modes.read(bundle)
            tables = modes.codecs(bundle, table)
        assert [(mode.id, mode.encoder, mode.codec, mode.bytes) for mode in table.modes] == [
            (one["id"], one["encoder"], one["codec"], one["bytes"]) for one in network.modes
        ]
        assert {key: one.to_bytes() for key, one in tables.items()} == network.codecs
        assert table.mode(3).accuracy == 0.65 and table.mode(99) is None and math.isnan(table.mode(1).tail_ms)
        assert len(table.tables) == 64  # of all codecs, so that sides with others do not come together
    assert (table.name, table.local.id) == ("cats", 0)


def test_tables_without_codecs_stay_valid():
    table = parse(section(MODE, name="cats", org="ours"))
    assert table == ModeTable(
        "cats", modes=(Mode(1, 0, "", 4, 900, 1.5, 0.5, table.modes[0].tail_ms),), local=table.local
    )
    assert parse(section({"id": 3})).modes[0].bytes == 0
    assert parse(section(local={"device_ms": 3, "accuracy": 1})).local.device_ms == 3.0


WRONG = {
    "modes is no list": section().replace(b"[]", b"{}"),
    "modes is no list of": section(*[MODE] * 300),
    "modes[1].id is 1 again": section(MODE, MODE),
    "modes[0].id is 0": section(MODE | {"id": 0}),
    "modes[0].id is True": section(MODE | {"id": True}),
    "modes[0].id is 1.0": section(MODE | {"id": 1.0}),
    "modes[0].bytes is -1": section(MODE | {"bytes": -1}),
    "modes[0].bits is 2147483648": section(MODE | {"bits": 1 << 31}),
    "modes[0].encoder is '1'": section(MODE | {"encoder": "1"}),
    "modes[0].codec is '../x'": section(MODE | {"codec": "../x"}),
    "modes[0].codec is 7": section(MODE | {"codec": 7}),
    "modes[0].accuracy is 1.5": section(MODE | {"accuracy": 1.5}),
    "modes[0].device_ms is nan": section(MODE | {"device_ms": math.nan}),
    "modes[0].tail_ms is None": section(MODE | {"tail_ms": None}),
    "modes[0] is no JSON object": section(1),
    "local is no JSON object": section(local=[]),
    "local.accuracy is 'all'": section(local={"accuracy": "all"}),
    "encoder is 'AB'": section(encoder="AB"),
    "name is 1": section(name=1),
    "they are no JSON": b"[" * 100_000,
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_is_no_table_is_refused_by_name(problem):
    with pytest.raises(BundleError) as caught:
        parse(WRONG[problem])
    assert problem in caught.value.why


def test_codecs_that_are_missing_damaged_or_of_other_bits_are_refused(tmp_path, network):
    codec = network.codecs["e1b2"]
    for name, data, bits, problem in (("other", codec, 2, "no section"), ("mine", codec[:-1], 2, "bytes, not"),
                                      ("mine", codec, 3, "its tables have 2")):  # fmt: skip
        path = tmp_path / f"{problem}.shoal"
        with create(path) as writer:
            writer.add("modes", "", section(MODE | {"codec": "mine", "bits": bits}))
            writer.add("codec", name, data)
            writer.commit()
        with Bundle.open(path) as bundle, pytest.raises(BundleError, match=problem):
            modes.codecs(bundle, modes.read(bundle))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(MODE) + ["codec", "modes"]), inner)
    ),
    max_leaves=12,
)


@given(values, st.binary(max_size=40))
def test_anything_is_a_table_or_refused(value, junk):
    for data in (json.dumps(value).encode(), section(value, value), junk):
        try:
            assert all(mode.id >= 1 for mode in parse(data).modes)
        except BundleError:
            pass
