"""A tail from an ONNX file: the same numbers from a bundle, and a refusal where an edge could not serve it."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from shoal.converters.split.tail import pack_tail, trial
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import ConvertError, UsageError
from shoal.runtime.session import Place, open_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from make_split import build, split  # noqa: E402


def opened(bundle):
    weights = bundle.section("weights", "weights")
    place = Place(str(bundle.path), weights.offset, weights.length, bundle.fileno())
    return open_graph(bundle.bytes(bundle.section("graph", "tail")), {"weights": place}, threads=1)


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
