"""The safetensors reader against the reference implementation and against files that lie."""

import json
import os
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.converters.sources.safetensors import SafetensorsFile
from shoal.runtime.errors import SourceError, UsageError


def file(header, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def opened(tmp_path):
    def read(data: bytes) -> SafetensorsFile:
        path = tmp_path / "x.safetensors"
        path.write_bytes(data)
        return SafetensorsFile(path)

    return read


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_rows_of_what_the_reference_writes(dtype, opened):
    random = np.random.default_rng(3)
    values = {"a.weight": random.normal(size=(11, 5, 2)), "b": random.normal(size=7), "c": np.array(2.5)}
    values = {name: value.astype(dtype) for name, value in values.items()}
    read = opened(safetensors.numpy.save(values, {"format": "pt"}))
    for name, value in values.items():
        assert read.tensors[name].shape == value.shape and read.tensors[name].bytes == value.nbytes
        assert read.read(name).dtype == np.float32 and np.array_equal(read.read(name), value.astype("f4"))
    assert np.array_equal(read.read("a.weight", 3, 9), values["a.weight"][3:9].astype("f4"))
    assert read.read("a.weight", 11, 11).shape == (0, 5, 2)
    with pytest.raises(UsageError):
        read.read("a.weight", 0, 12)


def test_bfloat16_is_the_upper_half_of_a_float32(opened):
    values = np.array([[1.0, -2.5, 0.0], [2.0**127, 2.0**-130, np.inf]], "f4")  # exact, a subnormal too
    stored = (values.view("u4") >> 16).astype("<u2")
    read = opened(file({"a": entry("BF16", (2, 3), (0, 12))}, stored.tobytes()))
    assert np.array_equal(read.read("a"), values) and np.array_equal(read.read("a", 1, 2), values[1:])


def test_an_odd_header_is_not_aligned(opened):
    header = json.dumps({"a": entry()}).encode()
    values = np.arange(4, dtype="<f4")
    for pad in range(4):
        read = opened(file(header + b" " * pad, values.tobytes()))
        assert np.array_equal(read.read("a", 1, 3), values[1:3])


def test_empty_tensors(opened):
    read = opened(file({"a": entry("F32", (0, 4), (0, 0)), "b": entry("F32", (3, 0), (0, 0))}, b""))
    assert read.read("a").shape == (0, 4) and read.read("b").shape == (3, 0)


HOSTILE = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "header longer than the file": file({}, b"", 1 << 20),
    "header of 2^63 bytes": file({}, b"", 1 << 63),
    "no JSON": file(b"{,}"),
    "a list": file(b"[]"),
    "spaces before it": file(b" {}", b""),
    "not UTF-8": file(b'{"\xff": 1}'),
    "NaN": file(b'{"a": NaN}'),
    "nested 100,000 deep": file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a number of 10,000 digits": file(b'{"a": ' + b"9" * 10_000 + b"}"),
    "a name twice": file(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
    "a hole in front": file({"a": entry("F32", (3,), (4, 16))}),
    "a hole between": file({"a": entry("F32", (1,), (0, 4)), "b": entry("F32", (2,), (8, 16))}),
    "a hole behind": file({"a": entry("F32", (3,), (0, 12))}),
    "an overlap": file({"a": entry("F32", (3,), (0, 12)), "b": entry("F32", (2,), (8, 16))}),
    "the same bytes twice": file({"a": entry(), "b": entry()}),
    "beyond the end": file({"a": entry("F32", (5,), (0, 20))}),
    "end before begin": file({"a": entry("F32", (4,), (16, 0))}),
    "negative offset": file({"a": entry("F32", (4,), (-16, 0))}),
    "shape too small": file({"a": entry("F32", (3,))}),
    "shape whose product is 2^64+4": file({"a": entry("F32", (4, (1 << 62) + 1))}),
    "shape with -1": file({"a": entry("F32", (-4, -1))}),
    "shape with true": file({"a": {"dtype": "U8", "shape": [True] * 2, "data_offsets": [0, 16]}}),
    "shape of floats": file({"a": entry("F32", (4.0,))}),
    "shape as a string": file({"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}),
    "10,000 dimensions": file({"a": entry("F32", (1,) * 9999 + (4,))}),
    "three offsets": file({"a": entry("F32", (4,), (0, 8, 16))}),
    "unknown dtype": file({"a": entry("F31")}),
    "dtype as a list": file({"a": entry([])}),
    "half a byte": file({"a": entry("F4", (31,), (0, 16))}),
    "a missing key": file({"a": {"dtype": "F32", "shape": [4]}}),
    "an extra key": file({"a": entry() | {"x": 1}}),
    "an entry that is null": file({"a": None}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, opened, refused):
    with refused():
        opened(HOSTILE[case])


def test_a_header_beyond_the_cap(tmp_path, refused):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file(b"{", b"", 100_000_001))
    os.truncate(path, 1 << 30)  # sparse
    with refused():
        SafetensorsFile(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U8", "BOOL", "F4"])
def test_formats_that_are_not_weights(dtype, opened, refused):
    bits = 4 if dtype == "F4" else 8
    read = opened(file({"a": entry(dtype, (16 * 8 // bits,))}))
    with refused() as failure:
        read.read("a")
    assert dtype in failure.value.why and "precision" in failure.value.fix


def small() -> bytes:
    return safetensors.numpy.save({"a": np.ones((2, 3), "f4"), "b": np.ones(4, "f2")})


def test_every_prefix_is_refused(opened):
    data = small()
    opened(data)
    for length in range(len(data)):
        with pytest.raises(SourceError):
            opened(data[:length])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bits(opened, data):
    content = bytearray(small())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = opened(bytes(content))
        for name in read.tensors:
            read.read(name)
    except SourceError as error:
        assert error.what and error.why and error.fix
