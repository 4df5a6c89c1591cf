"""Protocol v2's tensors: what is written is read back, and of hostile bodies nothing is believed."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shoal.device_agents.oip_body import DATATYPES, JSON_LENGTH, decode, encode
from shoal.runtime.errors import LinkError, UsageError

NUMBERS = [np.dtype(code) for name, code in DATATYPES.items() if name != "BYTES"]
shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
number_arrays = st.sampled_from(NUMBERS).flatmap(lambda dtype: arrays.arrays(dtype, shapes))
byte_arrays = arrays.arrays(object, shapes, elements=st.binary(max_size=9), fill=st.nothing())


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.one_of(number_arrays, byte_arrays), max_size=4))
def test_raw_tensors_come_back_bit_for_bit(tensors):
    headers, parts = encode("inputs", tensors)
    found, value = decode("inputs", b"".join(parts), headers[JSON_LENGTH])
    assert list(found) == list(tensors) and list(value) == ["inputs"]
    for name, array in tensors.items():
        same = found[name]
        assert same.dtype == array.dtype and same.shape == array.shape
        assert same.tolist() == array.tolist() if array.dtype == object else same.tobytes() == array.tobytes()


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=5), number_arrays, max_size=3))
def test_json_says_the_same_or_is_refused(tensors):
    if any(a.dtype == np.float16 or (a.dtype.kind == "f" and not np.isfinite(a).all()) for a in tensors.values()):
        with pytest.raises(UsageError):
            encode("outputs", tensors, binary=False)
        return
    headers, parts = encode("outputs", tensors, {"id": "7"}, binary=False)
    found, value = decode("outputs", b"".join(parts), headers.get(JSON_LENGTH))
    assert value["id"] == "7"
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_a_big_endian_array_travels_as_what_it_means():
    headers, parts = encode("inputs", {"x": np.arange(3, dtype=">i4")})
    assert decode("inputs", b"".join(parts), headers[JSON_LENGTH])[0]["x"].tolist() == [0, 1, 2]


def test_nested_json_lists_are_read():
    body = {"outputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2], [3, 4.5]]},
                        {"name": "s", "datatype": "BYTES", "shape": [1, 2], "data": [["a", "ü"]]}]}  # fmt: skip
    found, _ = decode("outputs", json.dumps(body).encode())
    assert found["x"].tolist() == [[1, 2], [3, 4.5]] and found["s"].tolist() == [[b"a", "ü".encode()]]


def tensor(**changed):
    return {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]} | changed


@pytest.mark.parametrize("value", [[], {}, {"outputs": None}, {"outputs": {"x": 1}}, {"outputs": [1]}], ids=repr)
def test_what_lists_no_tensors_is_refused(value):
    with pytest.raises(LinkError):
        decode("outputs", json.dumps(value).encode())


@pytest.mark.parametrize(
    "changed",
    [
        {"name": 3}, {"datatype": "FP12"}, {"datatype": ["FP32"]},
        {"shape": [-1]}, {"shape": [True]}, {"shape": [2.0]}, {"shape": [1] * 9}, {"shape": 2}, {"shape": [3]},
        {"shape": [1 << 40]}, {"shape": [(1 << 31) - 1] * 8},
        {"data": ["1", "2"]}, {"data": [1, None]}, {"data": [[1], [2, 3]]}, {"data": {"0": 1}}, {"data": None},
        {"datatype": "INT8", "data": [1, 300]}, {"datatype": "UINT8", "data": [1, -1]},
        {"datatype": "INT32", "data": [1, 2.5]}, {"datatype": "INT64", "data": [1, 1 << 70]},
        {"datatype": "BOOL", "data": [0, 1]}, {"datatype": "BYTES", "data": [1, 2]},
        *({"parameters": {"binary_data_size": size}} for size in (8, -8, True, "8")),
    ],
    ids=repr,
)  # fmt: skip
def test_a_tensor_that_does_not_agree_with_itself_is_refused(changed):
    with pytest.raises(LinkError):
        decode("outputs", json.dumps({"outputs": [tensor(**changed)]}).encode())


def test_two_tensors_of_one_name_and_too_many_are_refused():
    for listed in ([tensor(), tensor()], [tensor(name=str(i)) for i in range(65)]):
        with pytest.raises(LinkError):
            decode("outputs", json.dumps({"outputs": listed}).encode())


@pytest.mark.parametrize("length", ["", "-1", "9" * 30, "1e1", "0x10", "٣", " 5", "100000"])
def test_a_header_that_is_no_length_is_refused(length):
    with pytest.raises(LinkError):
        decode("outputs", b'{"outputs":[]}', length)


def test_deep_json_and_bytes_that_nobody_claims_are_refused():
    for body in (b"[" * 100_000, b'{"outputs":[]', b"\xff\xfe", b"", b'{"outputs":' + b"9" * 5000 + b"}"):
        with pytest.raises(LinkError):
            decode("outputs", body)
    with pytest.raises(LinkError, match="no tensor"):
        decode("outputs", b'{"outputs":[]}x', "14")


@pytest.mark.parametrize("count", [3000, pytest.param(200_000, marks=pytest.mark.deep)])
def test_mutated_bodies_are_read_or_refused(count):
    rng = random.Random(8)
    tensors = {"x": np.arange(6, dtype="f4").reshape(2, 3), "s": np.array([b"ab", b""], object), "k": np.ones(3, bool)}
    headers, parts = encode("outputs", tensors)
    whole = b"".join(parts)
    for _ in range(count):
        body = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body))
            body[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3)) if rng.random() < 0.5 else b"9"
        try:
            found, _ = decode("outputs", bytes(body), rng.choice([headers[JSON_LENGTH], str(rng.randrange(400)), None]))
        except LinkError:
            continue
        assert sum(array.size for array in found.values()) <= len(body)


@pytest.mark.parametrize("array", [np.zeros(2, "c8"), np.zeros(2, "U3"), np.zeros(2, "M8[s]")], ids=str)
def test_a_type_that_the_protocol_does_not_have_is_refused(array):
    with pytest.raises(UsageError):
        encode("inputs", {"x": array})
