"""Split networks from ONNX files: the same numbers from a bundle, and a refusal where an edge could not serve one."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from shoal.converters.split.tail import INLINE, pack, pack_tail, trial
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import ConvertError, UsageError
from shoal.runtime.session import Place, open_graph
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import Tables

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from make_split import build, slimmable, split  # noqa: E402


def opened(bundle, role="tail"):
    weights = bundle.section("weights", "weights")
    place = Place(str(bundle.path), weights.offset, weights.length, bundle.fileno())
    return open_graph(bundle.bytes(bundle.section("graph", role)), {"weights": place}, threads=1)


def with_constants(data: bytes) -> bytes:
    """The model as some exporters write it: no initializers, a Constant node for each."""
    model = onnx.ModelProto.FromString(data)
    nodes = [helper.make_node("Constant", [], [one.name], value=one) for one in model.graph.initializer]
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def assert_same(path, role, source: bytes, feeds=None):
    """The bundle's graph gives what the source does, bit for bit."""
    with open_graph(source, {}, threads=1) as plain, Bundle.open(path) as bundle, opened(bundle, role) as packed:
        feeds = feeds or trial(plain, 5)
        for name, array in plain.run(feeds).items():
            np.testing.assert_array_equal(packed.run(feeds)[name], array)


def test_a_bundle_computes_what_the_file_did(tmp_path):
    model = split().tail
    modes = [{"id": 1, "bits": 8, "bytes": 1024, "device_ms": 2.5, "accuracy": 0.7}]
    digest = pack_tail(model, tmp_path / "t.shoal", "cats", encoder="ab" * 32, modes=modes)
    with open_graph(model, {}, threads=1) as source, Bundle.open(tmp_path / "t.shoal") as bundle:
        bundle.verify()
        assert bundle.digest == digest
        assert [(graph.name, graph.role) for graph in bundle.graphs] == [("tail", "tail")]
        about = json.loads(bundle.bytes(bundle.section("modes")))
        assert about == {"name": "cats", "encoder": "ab" * 32, "tables": "", "modes": modes}
        assert bundle.section("weights", "weights").length >= 16 * 16 * 9 * 4  # w2; the rest is small
        feeds = trial(source, 5)
        with opened(bundle) as tail:
            for name, array in source.run(feeds).items():
                np.testing.assert_allclose(tail.run(feeds)[name], array, atol=1e-5)


def test_the_same_model_gives_the_same_bytes_and_external_weights_come_along(tmp_path):
    model = onnx.ModelProto.FromString(split().tail)
    onnx.save(model, tmp_path / "inside.onnx")
    onnx.save(model, tmp_path / "outside.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    for name in ("inside", "outside"):
        pack_tail(tmp_path / f"{name}.onnx", tmp_path / f"{name}.shoal", "same")
    assert (tmp_path / "inside.shoal").read_bytes() == (tmp_path / "outside.shoal").read_bytes()


def test_tensors_of_constant_nodes_are_weights(tmp_path):
    pack_tail(split().tail, tmp_path / "plain.shoal", "same")
    source = with_constants(split().tail)
    pack_tail(source, tmp_path / "t.shoal", "same")
    assert_same(tmp_path / "t.shoal", "tail", source)
    with Bundle.open(tmp_path / "t.shoal") as bundle, Bundle.open(tmp_path / "plain.shoal") as plain:
        assert bundle.section("weights", "weights").sha256 == plain.section("weights", "weights").sha256


def test_a_branch_keeps_its_constants_and_finds_those_outside(tmp_path):
    rng, many = np.random.default_rng(0), INLINE // 4 + 1
    inner, outer = (numpy_helper.from_array(rng.standard_normal(many, np.float32)) for _ in range(2))
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    branches = [
        helper.make_graph([helper.make_node("Constant", [], ["k"], value=inner),
                           helper.make_node("Add", ["k", "w"], ["z"]), helper.make_node(op, ["x", "z"], ["y"])], op, [],
                          [y])
        for op in ("Add", "Mul")
    ]  # fmt: skip
    model = onnx.ModelProto.FromString(build("tail", f"float[n, {many}] x", f"float[n, {many}] y", "y = Relu (x)"))
    model.graph.node[0].CopyFrom(helper.make_node("Constant", [], ["w"], value=outer))
    model.graph.node.extend([
        helper.make_node("Shape", ["x"], ["width"], start=1), helper.make_node("Constant", [], ["two"], value_ints=[2]),
        helper.make_node("Greater", ["width", "two"], ["wide"]),
        helper.make_node("If", ["wide"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ])  # fmt: skip
    pack_tail(model.SerializeToString(), tmp_path / "t.shoal")
    assert_same(tmp_path / "t.shoal", "tail", model.SerializeToString())
    with Bundle.open(tmp_path / "t.shoal") as bundle:
        assert bundle.section("weights", "weights").length == 4 * many < bundle.section("graph", "tail").length


def test_a_network_from_elsewhere_is_the_same_and_its_weights_are_mapped(reader_onnx, tmp_path):
    from reader import cut_in_two

    cut_in_two(reader_onnx, tmp_path / "device.shoal", tmp_path / "edge.shoal")
    for name, roles, least in (("device", {"head", "tail"}, 10 << 20), ("edge", {"tail"}, 5 << 20)):
        with Bundle.open(tmp_path / f"{name}.shoal") as bundle:
            assert {graph.role for graph in bundle.graphs} == roles
            assert bundle.section("weights", "weights").length > least
            assert all(bundle.section("graph", role).length < 100_000 for role in roles)
    pack({"local": reader_onnx}, tmp_path / "whole.shoal")
    image = np.random.default_rng(0).standard_normal((2, 3, 48, 96), np.float32)
    assert_same(tmp_path / "whole.shoal", "local", reader_onnx.read_bytes(), {"x": image})


def test_a_device_s_graphs_share_their_weights(tmp_path):
    made, modes = split(), [{"id": 1, "bits": 8, "bytes": 1024}]
    graphs = {"head": made.head, "tail": made.tail, "local": made.whole}
    digest = pack(graphs, tmp_path / "d.shoal", "cats", modes=modes)
    for role, source in graphs.items():
        assert_same(tmp_path / "d.shoal", role, source)
    pack({"local": made.whole}, tmp_path / "one.shoal")
    with Bundle.open(tmp_path / "d.shoal") as bundle, Bundle.open(tmp_path / "one.shoal") as one:
        assert bundle.digest == digest and [graph.role for graph in bundle.graphs] == ["head", "tail", "local"]
        about = json.loads(bundle.bytes(bundle.section("modes")))
        assert (about["name"], about["modes"]) == ("cats", modes)
        lengths = [each.section("weights", "weights").length for each in (bundle, one)]
        assert lengths[0] == lengths[1] > 0


def test_graphs_that_make_no_device_are_refused(tmp_path):
    made = split()
    for graphs in ({}, {"decode": made.tail}):
        with pytest.raises(UsageError, match="role"):
            pack(graphs, tmp_path / "d.shoal")
    other = build("head", "float[n, 3] x", "float[n, 3] other", "other = Relu (x)")
    with pytest.raises(ConvertError, match=r"takes latent float32; the head gives other float32"):
        pack({"head": other, "tail": made.tail}, tmp_path / "d.shoal")
    with pytest.raises(ConvertError, match="The head cannot be packed"):
        pack({"tail": made.tail, "head": b"\xff"}, tmp_path / "d.shoal")
    assert not any(tmp_path.iterdir())


def tables(bits=4, channels=16) -> bytes:
    samples = np.random.default_rng(0).standard_normal((8, channels, 8, 8), np.float32)
    return Tables.fit(Quantiser.fit(samples, bits), samples).to_bytes()


def test_codecs_are_sections_and_a_head_s_encoders_are_tried(tmp_path):
    made, carried = slimmable(), {"b4": tables(4), "b2": tables(2)}
    modes = [{"id": 1, "encoder": 1, "codec": "b2", "bits": 2}, {"id": 2, "encoder": 3, "codec": "b4", "bits": 4}]
    pack({"head": made.head, "tail": made.tail}, tmp_path / "d.shoal", modes=modes, codecs=carried)
    pack_tail(made.tail, tmp_path / "t.shoal", modes=modes, codecs=dict(sorted(carried.items())))
    feeds = {"image": np.ones((2, 3, 32, 32), np.float32), "encoder": np.array(2)}
    assert_same(tmp_path / "d.shoal", "head", made.head, feeds)
    with Bundle.open(tmp_path / "d.shoal") as device, Bundle.open(tmp_path / "t.shoal") as edge:
        for bundle in (device, edge):
            bundle.verify()
            found = {each.name: bundle.bytes(each) for each in bundle.sections if each.kind == "codec"}
            assert found == carried
        assert device.bytes(device.section("modes")) == edge.bytes(edge.section("modes")).replace(b"tail", b"head")
        assert device.section("weights", "weights").length > 3 * 8 * 16 * 9 * 4  # each member's are outside the graph


def test_modes_that_graphs_and_codecs_do_not_bear_out_are_refused(tmp_path):
    made, carried, mode = slimmable(), {"b4": tables(4)}, {"id": 1, "encoder": 1, "codec": "b4", "bits": 4}
    for changed, error, problem in (
        ({"id": 0}, UsageError, r"modes\[0\].id is 0"), ({"codec": "b5"}, UsageError, "names the codec 'b5'"),
        ({"bits": 5}, UsageError, "5 bits"), ({"encoder": 0}, ConvertError, "a mode names none"),
    ):  # fmt: skip
        with pytest.raises(error, match=problem):
            pack({"head": made.head}, tmp_path / "d.shoal", modes=[mode | changed], codecs=carried)
    with pytest.raises(ConvertError, match="one latent of 7 channels"):
        pack_tail(made.tail, tmp_path / "d.shoal", codecs={"b4": tables(4, 7)})
    with pytest.raises(UsageError, match="'b4' cannot be packed"):
        pack_tail(made.tail, tmp_path / "d.shoal", codecs={"b4": b"shcodec"})
    with pytest.raises(ConvertError, match="no input 'encoder'"):
        pack({"head": split().head}, tmp_path / "d.shoal", modes=[mode], codecs=carried)
    shapes = "n0 = Constant <value_int = 1> () first = Equal (encoder, n0)" \
             " latent = If (first) <then_branch = a () => (float[n, 16, 8, 8] t) { t = Relu (image) }," \
             " else_branch = b () => (float[n, 16, 8, 4] e) { h = Constant <value_int = 2> ()" \
             " axes = Constant <value_ints = [3]> () k = Constant <value_ints = [4]> ()" \
             " e, rest = Split <axis = 3, num_outputs = 2> (image) }>"  # fmt: skip
    uneven = build("head", "float[n, 16, 8, 8] image, int64 encoder", "float[n, 16, 8, w] latent", shapes)
    with pytest.raises(ConvertError, match="encoder 2 gives"):
        pack({"head": uneven}, tmp_path / "d.shoal", modes=[mode, mode | {"id": 2, "encoder": 2}], codecs=carried)
    assert not any(tmp_path.iterdir())


CROSSING = {
    "mean": ("float[n, 4] x", "float[n, 4] y", "m = ReduceMean <keepdims = 1> (x) y = Sub (x, m)", "other rows"),
    "lost": ("float[n, 4] x", "float[m] y", "y = ReduceSum <keepdims = 0> (x)", "batch"),
    "fixed": ("float[1, 4] x", "float[1, 4] y", "y = Relu (x)", "open batch"),
    "unknown": ("float[n, 4] x", "float[n, 4] y", "y = NoSuchThing (x)", "NoSuchThing"),
}


@pytest.mark.parametrize("case", CROSSING)
def test_what_an_edge_could_not_batch_is_refused(case, tmp_path):
    inputs, outputs, body, reason = CROSSING[case]
    with pytest.raises(ConvertError, match=reason):
        pack_tail(build("tail", inputs, outputs, body), tmp_path / "t.shoal")
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_none_and_weights_outside_its_folder_are_refused(tmp_path):
    with pytest.raises(ConvertError, match="cannot be read"):
        pack_tail(b"\xff\xff not a model", tmp_path / "t.shoal")
    with pytest.raises(ConvertError, match="cannot be read"):
        pack_tail(tmp_path / "absent.onnx", tmp_path / "t.shoal")
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    (tmp_path / "in").mkdir()
    onnx.save(onnx.ModelProto.FromString(split().tail), tmp_path / "in" / "m.onnx", save_as_external_data=True,
              location="w.bin", size_threshold=0)  # fmt: skip
    model = onnx.load(tmp_path / "in" / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "../secret"
    (tmp_path / "in" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ConvertError, match="cannot be read"):
        pack_tail(tmp_path / "in" / "m.onnx", tmp_path / "t.shoal")
    (tmp_path / "taken.shoal").write_bytes(b"")
    with pytest.raises(UsageError):
        pack_tail(split().tail, tmp_path / "taken.shoal")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "secret", "taken.shoal"}
