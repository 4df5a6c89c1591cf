"""Static graphs compiled ahead into a bundle. What compiles is QNN's library: pip install onnxruntime-qnn."""

import dataclasses

import numpy as np
import pytest
from onnx import TensorProto, helper

from shoal.converters import contexts
from shoal.converters.convert import convert
from shoal.converters.recipe import NAMED
from shoal.runtime import backends
from shoal.runtime.backends import context
from shoal.runtime.backends.context import Made
from shoal.runtime.bundle import Bundle, Graph, create
from shoal.runtime.errors import BackendError, ConvertError, MissingPackageError, UsageError
from shoal.runtime.static import contexts as held

NPU = NAMED["npu"]


@pytest.fixture(scope="module")
def qnn():
    try:
        return backends.choose("npu:qnn")
    except BackendError as error:
        pytest.skip(f"{error.why} {error.fix}")


def test_what_cannot_be_compiled_is_refused_before_anything_is_read(tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "out.shoal"
    with pytest.raises(UsageError, match="qnn:sm9999"):
        convert(tmp_path / "nothing", out, NPU, npu=["qnn:sm9999"])
    with pytest.raises(UsageError, match="'auto' takes neither"):
        convert(tiny_folder, out, "auto", memory=1 << 30, npu=["qnn:sm8650"])

    def absent(name):
        raise BackendError("There is no npu:qnn here.", "qnn: onnxruntime-qnn is not installed.", "pip install it")

    monkeypatch.setattr(contexts.backends, "choose", absent)
    with pytest.raises(MissingPackageError) as missing:
        convert(tiny_folder, out, NPU, npu=["qnn:sm8650"])
    assert "qnn" in missing.value.why and missing.value.code == 11
    monkeypatch.setattr(contexts.backends, "choose", lambda name: "a device")
    with pytest.raises(UsageError, match="no static graphs"):
        convert(tiny_folder, out, "int8", npu=["qnn:sm8650"])
    assert not out.exists()


def product(path):
    """A bundle of one static graph: x fp32 [4, 16] times a matrix in the section `static`."""
    matrix = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(16, 8), data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "static"), ("offset", "0"), ("length", str(matrix.nbytes))):
        tensor.external_data.add(key=key, value=text)
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", [4, 16]), ("y", [4, 8]))
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "p")], "g", ports[:1], ports[1:], [tensor])
    with create(path) as writer:
        writer.add("weights", "static", matrix, alignment=4096, required=True)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        writer.add("graph", "static.4.p", model.SerializeToString())
        writer.graph(Graph("static.4.p", "static", "npu", 4, 0, 1, "static.4.p"))
        writer.commit()
    return path, matrix


def test_a_bundle_is_extended_and_opens_on_the_processor_that_it_names(qnn, tmp_path):
    path, matrix = product(tmp_path / "plain.shoal")
    out, again = tmp_path / "out.shoal", tmp_path / "again.shoal"
    contexts.extend(path, out, ["qnn:sm8650", "qnn:sm8450"])
    contexts.extend(out, again, ["qnn:sm8450"])  # in place of what it had
    with Bundle.open(path) as plain, Bundle.open(out) as one, Bundle.open(again) as two:
        two.verify()
        kept = [(section.kind, section.name, section.sha256) for section in plain.sections]
        assert [(s.kind, s.name, s.sha256) for s in one.sections if s.kind != held.KIND] == kept
        mades = [found.made for found in held.held(two)]
        assert sorted(made.soc for made in mades) == ["sm8450", "sm8650"]
        assert {(s.name, s.sha256) for s in one.sections} == {(s.name, s.sha256) for s in two.sections}
        assert {made.source for made in mades} == {held.source(one.sections, one.graphs)}
        if qnn.settings.get("soc_model") != "57":
            pytest.skip("this device is no SM8650")
        found = held.find(two, qnn, two.graphs, {}, strict=True)
        assert found is not None and found.contexts.made.soc == "sm8650" and found.contexts.made.chunks == (4,)
        opened, placement = context.open_contexts(qnn, found.contexts)
        with opened["static.4.p"] as session:
            x = np.ones((4, 16), np.float32)
            np.testing.assert_allclose(session.run({"x": x})["y"], x @ matrix, atol=0.02)
        assert placement.share == 1


def test_what_has_no_static_graphs_cannot_be_extended(qnn, tiny_bundle, tmp_path):
    for npu in (["qnn:sm8650"], []):
        with pytest.raises(ConvertError, match="static graphs|No processor"):
            contexts.extend(tiny_bundle, tmp_path / "out.shoal", npu)
    assert not (tmp_path / "out.shoal").exists()


@pytest.mark.deep
def test_a_conversion_compiles_every_static_graph_for_each_processor(qnn, tiny_folder, tmp_path):
    assert NPU.static is not None
    recipe = dataclasses.replace(NPU, static=dataclasses.replace(NPU.static, chunks=(4, 8), shadow=0.0))
    out = tmp_path / "out.shoal"
    report = convert(tiny_folder, out, recipe, npu=["qnn:sm8750", "qnn:sm8550"], check_parity=False)
    assert report.seconds["compile"] > 0
    with Bundle.open(out) as bundle:
        static = [graph for graph in bundle.graphs if graph.role == "static"]
        found = {one.made.soc: one for one in held.held(bundle)}
        assert list(found) == ["sm8750", "sm8550"] and len(static) >= 4
        for one in found.values():
            assert set(one.made.graphs) == {graph.name for graph in static} and one.made.chunks == (4, 8)
            assert one.made.source == held.source(bundle.sections, static) and one.made.shared
            assert len(one.binaries) == len({graph.first_block for graph in static}) > 1
            assert Made.from_json(one.made.to_json()) == one.made
