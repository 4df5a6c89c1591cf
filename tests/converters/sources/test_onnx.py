"""ONNX files as networks: real ones of others as ONNX Runtime runs them, damaged ones refused."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from shoal.converters.sources.onnx import card, cuts, graph
from shoal.converters.split.write import write
from shoal.runtime.errors import ConvertError, ShoalError, SourceError
from shoal.runtime.session import open_graph


def small(batch=1, **extra):
    """An exporter's network of a fixed batch: convolution, flattened by a constant shape."""
    w = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["y"]),
    ]
    inner = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", 1, [batch, 144])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array([batch, -1]), "shape")],
    )  # fmt: skip
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 13)], ir_version=8, **extra)


def test_a_card_is_read_without_weights(reader_onnx):
    said = card(reader_onnx)
    assert said.opset == 12 and said.inputs[0].name == "x" and said.inputs[0].dims[1] == 3
    assert said.outputs[0].dims[-1] == 6625
    assert said.nodes["Conv"] == 38 and "Constant" not in said.nodes
    assert 2_600_000 < said.parameters < 2_800_000


@pytest.mark.parametrize(("name", "row", "least"), [
    ("reader", (3, 48, 320), 150), ("ch_PP-OCRv4_det_infer", (3, 96, 128), 40),
    ("ch_ppocr_mobile_v2.0_cls_infer", (3, 48, 192), 50),
])  # fmt: skip
def test_a_real_network_is_what_onnx_runtime_runs(name, row, least, request):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'shoal[train]'")
    from shoal.converters.split.network import Network, export, split

    path = request.getfixturevalue("reader_onnx") if name == "reader" else None
    path = path or request.getfixturevalue("ocr_folder") / f"{name}.onnx"
    network = Network(graph(path)).eval()
    x = np.random.default_rng(0).uniform(-1, 1, (2, *row)).astype(np.float32)
    # Before the last sigmoid or softmax, which hide differences
    logits = network.graph.nodes[-1].inputs[0]
    with open_graph(path.read_bytes(), {}) as session:
        (expected,) = session.run({"x": x}).values()
    with torch.no_grad():
        np.testing.assert_allclose(network(torch.from_numpy(x)).numpy(), expected, atol=1e-5)
        seen = network.features([logits], torch.from_numpy(x))[logits].numpy()
    with open_graph(write(replace(network.graph, outputs=(logits,))), {}) as session:
        expected = session.run({"x": x})[logits]
        np.testing.assert_allclose(seen, expected, atol=1e-4 * np.abs(expected).max())
    found = cuts(path, {"x": row})
    assert len(found) >= least
    cut = found[len(found) // 2]
    head, tail = split(network, cut.value)
    with torch.no_grad():
        latent = head(torch.from_numpy(x))
        assert tuple(latent.shape[1:]) == cut.shape
        assert torch.equal(tail(latent), network(torch.from_numpy(x)))
    halves = (export(head, torch.from_numpy(x), outputs=["latent"]), export(tail, latent, inputs=["latent"]))
    with open_graph(halves[0], {}) as device, open_graph(halves[1], {}) as edge:
        (answer,) = edge.run({"latent": device.run({"x": x})["latent"]}).values()
    with torch.no_grad():
        np.testing.assert_allclose(answer, network(torch.from_numpy(x)).numpy(), atol=1e-5)


def test_a_fixed_batch_is_opened():
    model = small()
    network = graph(model.SerializeToString())
    assert network.inputs[0].dims == (None, 3, 8, 8)
    x = np.random.default_rng(0).random((5, 3, 8, 8), np.float32)
    with open_graph(model.SerializeToString(), {}) as fixed, open_graph(write(network), {}) as opened:
        expected = np.concatenate([fixed.run({"x": x[i : i + 1]})["y"] for i in range(5)])
        np.testing.assert_allclose(opened.run({"x": x})["y"], expected, atol=1e-6)


def test_a_batch_that_cannot_be_opened_is_refused():
    model = small()
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array([4, -1]), "shape"))  # mixes rows
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ConvertError, match="batches of 1"):
        graph(model.SerializeToString())


def test_weights_beside_the_file_are_read_and_only_those(tmp_path):
    model = small()
    onnx.save(model, tmp_path / "n.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    np.testing.assert_array_equal(
        graph(tmp_path / "n.onnx").tensors["w"], graph(small().SerializeToString()).tensors["w"]
    )
    size = (tmp_path / "w.bin").stat().st_size
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[: size // 2])
    with pytest.raises(SourceError):
        graph(tmp_path / "n.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(SourceError):
        graph(tmp_path / "n.onnx")


def changed(change):
    model = small()
    change(model.graph)
    return model.SerializeToString()


@pytest.mark.parametrize(("data", "error", "why"), [
    (b"", SourceError, "no network"), (b"\xff" * 99, SourceError, "cannot be read"),
    (changed(lambda g: g.initializer[0].dims.__setitem__(0, 1 << 40)), SourceError, "'w' has 432 bytes instead"),
    (changed(lambda g: g.initializer[0].ClearField("raw_data")), SourceError, "'w' has 0 bytes"),
    (changed(lambda g: g.node[1].input.__setitem__(0, "gone")), ConvertError, "Nothing gives the value 'gone'"),
    (changed(lambda g: g.node[0].input.__setitem__(0, "r")), ConvertError, "needs its own output"),
    (changed(lambda g: g.node[1].output.__setitem__(0, "c")), ShoalError, "."),
    (changed(lambda g: setattr(g.node[1], "domain", "com.other")), ConvertError, "of the domain 'com.other'"),
    (changed(lambda g: g.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float16), "w"))),
     ConvertError, "needs fp32"),
    (changed(lambda g: g.node[1].attribute.append(helper.make_attribute("body", helper.make_graph([], "b", [], [])))),
     ConvertError, "branch or a loop"),
])  # fmt: skip
def test_what_is_damaged_or_not_known_is_refused(data, error, why):
    with pytest.raises(error, match=why):
        graph(data)


def test_an_old_opset_is_refused():
    model = small()
    model.opset_import[0].version = 6
    with pytest.raises(ConvertError, match="opset is 6"):
        graph(model.SerializeToString())


def test_damage_anywhere_is_an_error_of_ours():
    """Bytes of a real file changed at random places: read, or refused as a ShoalError."""
    data, rng = small().SerializeToString(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        for at in rng.integers(0, len(broken), 3):
            broken[at] = rng.integers(0, 256)
        try:
            graph(bytes(broken[: rng.integers(len(broken) // 2, len(broken) + 1)]))
        except ShoalError:
            refused += 1
    assert refused > 50


def test_an_operator_that_is_not_known_is_named_where_it_is_needed():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'shoal[train]'")
    from shoal.converters.split.network import Network

    model = small()
    model.graph.node[2].CopyFrom(helper.make_node("Det", ["r"], ["y"], name="last"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"
    network, x = Network(graph(model.SerializeToString())), torch.zeros(2, 3, 8, 8)
    assert network.features(["r"], x)["r"].shape == (2, 4, 6, 6)
    with pytest.raises(ConvertError, match=r"Det node 'last'(.|\n)*reads 'r'"):
        network(x)
