"""The wire reader against the protobuf library: the same tensors, and no external data that it did not see."""

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper

from shoal.runtime import onnx_wire
from shoal.runtime.errors import BundleError

SECTIONS = {"weights": 1 << 20}


def tensor(name="t", location="weights", offset="0", length="16", dims=(4,), **more) -> TensorProto:
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL, **more)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            made.external_data.add(key=key, value=value)
    return made


def model(*tensors, nodes=None) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    nodes = nodes or [helper.make_node("Gemm", ["x", "t"], ["y"], "one", transB=1, alpha=0.5, ints=[1, -2], k=-7)]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def inline(name="c", **more) -> TensorProto:
    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], raw_data=b"\0\0\0\0", **more)


def read(data: bytes, prepacked=None) -> onnx_wire.Model:
    return onnx_wire.read(data, SECTIONS, prepacked)


def all_tensors(message, path=()):
    """Every TensorProto anywhere in a parsed message, with where it is."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                if isinstance(item, TensorProto):
                    yield (*path, field.name), item
                yield from all_tensors(item, (*path, field.name))


def test_reads_what_protobuf_reads():
    made = model(tensor(), tensor("u", offset="64", length="0", dims=(2, 0)), inline())
    found = read(made.SerializeToString())
    names = [(t.name, t.dims, t.external and (t.external.offset, t.external.length)) for t in found.tensors]
    assert names == [("t", (4,), (0, 16)), ("u", (2, 0), (64, 0)), ("c", (1,), None)]
    [node] = found.nodes
    assert (node.op, node.name, node.inputs, node.outputs) == ("Gemm", "one", ("x", "t"), ("y",))
    assert node.integers == {"transB": 1, "k": -7}


def test_relocate_changes_external_data_and_nothing_else():
    made = model(tensor(), inline(), tensor("u", offset="64"))
    found = read(made.SerializeToString())
    moved = onnx_wire.External("a/b", 7, 16, ("MatMul+1|8;9;0",))
    data = onnx_wire.relocate(found, lambda t: moved if t.name != "u" else None)
    parsed = onnx.ModelProto.FromString(data)
    first = {entry.key: entry.value for entry in parsed.graph.initializer[0].external_data}
    assert first == {"location": "a/b", "offset": "7", "length": "16", "prepacked_0": "MatMul+1|8;9;0"}
    for got, want in zip(parsed.graph.initializer, made.graph.initializer, strict=True):
        if got.name in ("t", "c"):
            got.CopyFrom(want)
    assert parsed.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)
    assert onnx_wire.relocate(found, lambda t: t.external and None) == made.SerializeToString()


def test_single_is_a_model_of_that_node():
    found = read(model(tensor(), inline()).SerializeToString())
    parsed = onnx.ModelProto.FromString(onnx_wire.single(found, found.nodes[0], found.tensors, {"x": 1}))
    assert [n.op_type for n in parsed.graph.node] == ["Gemm"] and parsed.ir_version == 10
    assert [t.name for t in parsed.graph.initializer] == ["t", "c"]
    assert [i.name for i in parsed.graph.input] == ["x"] and parsed.opset_import[0].version == 21


def _attribute(**fields) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(AttributeProto(name="value", **fields))
    return model(nodes=[node])


def _sparse() -> onnx.ModelProto:
    made = model()
    made.graph.sparse_initializer.add(values=tensor(), indices=inline())
    return made


def _function() -> onnx.ModelProto:
    made = model()
    function = made.functions.add(name="f", domain="d")
    function.node.add(op_type="Constant").attribute.append(AttributeProto(name="value", t=tensor()))
    return made


def _training() -> onnx.ModelProto:
    made = model()
    made.training_info.add().initialization.initializer.append(tensor())
    return made


def _location_only() -> onnx.ModelProto:
    """External by its flag alone: no entries."""
    return _attribute(t=TensorProto(name="t", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL))


def _extra_entry(key, value="1") -> onnx.ModelProto:
    made = model(tensor())
    made.graph.initializer[0].external_data.add(key=key, value=value)
    return made


def _renamed(**entry) -> onnx.ModelProto:
    return model(tensor(**entry))


HOSTILE = {
    "attribute": lambda: _attribute(t=tensor()),
    "attribute list": lambda: _attribute(tensors=[inline(), tensor()]),
    "attribute flag": _location_only,
    "sparse attribute": lambda: _attribute(sparse_tensor=onnx.SparseTensorProto(values=tensor())),
    "subgraph": lambda: _attribute(g=model(tensor()).graph),
    "subgraphs": lambda: _attribute(graphs=[model(tensor()).graph]),
    "sparse initializer": _sparse,
    "function": _function,
    "training": _training,
    "no section": lambda: _renamed(location="other"),
    "parent": lambda: _renamed(location="../weights"),
    "absolute": lambda: _renamed(location="/etc/passwd"),
    "empty": lambda: _renamed(location=""),
    "no location": lambda: _renamed(location=None),
    "no length": lambda: _renamed(length=None),
    "beyond": lambda: _renamed(offset=str((1 << 20) - 15)),
    "far beyond": lambda: _renamed(offset=str(1 << 63)),
    "negative": lambda: _renamed(offset="-1"),
    "signed": lambda: _renamed(offset="+1"),
    "other digits": lambda: _renamed(offset="\u0661"),
    "blank": lambda: _renamed(offset=" 1"),
    "short": lambda: _renamed(length="15"),
    "long": lambda: _renamed(length="17"),
    "negative dim": lambda: _renamed(dims=(-4,), length="16"),
    "huge dim": lambda: _renamed(dims=(1 << 62, 1 << 62)),
    "many dims": lambda: _renamed(dims=(1,) * 17, length="4"),
    "both": lambda: model(tensor(raw_data=b"0123456789abcdef")),
    "both, typed": lambda: model(tensor(float_data=[1, 2, 3, 4])),
    "twice": lambda: _extra_entry("location", "weights"),
    "unknown entry": lambda: _extra_entry("checksum"),
    "prepacked": lambda: _extra_entry("prepacked_0", "MatMul+1|0;16;0"),
    "no flag": lambda: model(TensorProto(name="t", data_type=1, external_data=tensor().external_data)),
    "same name": lambda: model(tensor(), tensor()),
    "no name": lambda: model(tensor(name="")),
    "string": lambda: model(TensorProto(name="t", data_type=8, data_location=1,
                                        external_data=tensor(length="0").external_data)),
    "no graph": lambda: onnx.ModelProto(ir_version=10),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_to_reach_what_the_bundle_did_not_name(name):
    with pytest.raises(BundleError):
        read(HOSTILE[name]().SerializeToString())


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "k",
        "k|",
        "|0;1;0",
        "k|0;1",
        "k|0;1;0;0",
        "k|-1;1;0",
        "k|0;x;0",
        "k|0;1048577;0",
        "k|1048576;1;0",
        "k|0;1;0|5",
    ],
)
def test_refuses_broken_prepacked_entries_even_from_the_cache(entry):
    with pytest.raises(BundleError):
        read(_extra_entry("prepacked_0", entry).SerializeToString(), prepacked="weights")


def test_takes_prepacked_entries_from_the_cache():
    data = _extra_entry("prepacked_0", "MatMul+1|0;16;0|32;1;0").SerializeToString()
    [found] = read(data, prepacked="weights").tensors
    assert onnx_wire.blobs(found.external.prepacked[0]) == ("MatMul+1", [(0, 16), (32, 1)])


WIRE = {
    "two graphs": lambda good: good + b"\x3a\x00",
    "unknown field": lambda good: good + b"\xf8\x07\x01",
    "unknown field of a graph": lambda good: b"\x3a\x03\xf8\x07\x01",
    "group": lambda good: good + b"\x3b\x3c",
    "graph as a number": lambda good: b"\x38\x01",
    "endless number": lambda good: b"\x08" + b"\x80" * 20,
    "length beyond the end": lambda good: b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "name is not text": lambda good: b"\x3a\x07\x2a\x05\x42\x01\xff\x10\x01",
    "two names": lambda good: b"\x3a\x0a\x2a\x08\x42\x01a\x42\x01b\x10\x01",
}


@pytest.mark.parametrize("name", WIRE)
def test_refuses_bytes_that_parsers_could_read_differently(name):
    with pytest.raises(BundleError):
        read(WIRE[name](model(tensor()).SerializeToString()))


def test_nesting_and_fields_are_bounded(monkeypatch):
    graph = model().graph
    for _ in range(20):
        graph = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=graph)], "g", [], [])
    with pytest.raises(BundleError, match="deeper"):
        read(helper.make_model(graph).SerializeToString())
    with pytest.raises(BundleError, match="more than"):
        read(b"\x3a\x80\x80\x80\x01" + b"\x0a\x00" * (1 << 20))
    monkeypatch.setattr(onnx_wire, "MAX_MODEL", 100)
    with pytest.raises(BundleError, match="limit"):
        read(model(tensor()).SerializeToString())


def _seeds() -> list[bytes]:
    nested = _attribute(g=model(inline()).graph)
    made = [model(tensor(), inline(), tensor("u", offset="64")), nested, _sparse(), _function(), _training()]
    return [item.SerializeToString() for item in made]


def _check(data: bytes) -> None:
    """Either refused, or protobuf finds exactly the external data that was found here."""
    try:
        found = read(data)
    except BundleError:
        return
    try:
        parsed = onnx.ModelProto.FromString(data)
    except Exception:
        return  # then ORT refuses it too
    named = {t.name: (t.external.location, t.external.offset, t.external.length) for t in found.tensors if t.external}
    for path, item in all_tensors(parsed):
        if item.data_location == TensorProto.EXTERNAL:
            assert path == ("graph", "initializer")
            entries = {entry.key: entry.value for entry in item.external_data}
            want = (entries["location"], int(entries.get("offset", 0)), int(entries["length"]))
            assert named.pop(item.name) == want
    assert not named


@pytest.mark.parametrize("seed", range(5))
def test_every_prefix_and_every_byte(seed):
    data = _seeds()[seed]
    for at in range(len(data)):
        _check(data[:at])
        for value in (0, 255, data[at] ^ 1, data[at] ^ 128, (data[at] + 1) % 256):
            _check(data[:at] + bytes([value]) + data[at + 1 :])


SPLICES = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 12), st.one_of(
        st.binary(max_size=12),
        st.sampled_from([b"\x6a\x00", b"\x70\x01", b"\x70\x00", b"\x3a", b"\x2a", b"\x0a", b"\x42\x01t"]),
    )), min_size=1, max_size=6,
)  # fmt: skip


@given(st.integers(0, 4), SPLICES)
@settings(max_examples=1500, deadline=None)
def test_spliced_bytes(seed, splices):
    data = _seeds()[seed]
    for at, count, new in splices:
        data = data[:at] + new + data[at + count :]
    _check(data)
