"""A head with a filter: nothing is sent where nothing is, and a bundle that says otherwise is refused."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.converters.split.tail import pack
from shoal.device_agents.local import Local
from shoal.runtime.bundle import Bundle, create
from shoal.runtime.errors import BundleError, ConvertError, UsageError
from shoal.runtime.split import modes
from shoal.runtime.split.client import Client
from shoal.runtime.split.link import Direct, Edge
from shoal.runtime.split.policy import Estimate, fixed

LONG = 20.0


def scoring(head: bytes, dims: tuple = ("n",)) -> bytes:
    """The head with the largest number of an image as its score."""
    model = onnx.load_from_string(head)
    model.graph.initializer.append(numpy_helper.from_array(np.arange(len(dims), 4), "axes"))
    model.graph.node.append(helper.make_node("ReduceMax", ["image", "axes"], ["score"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("score", TensorProto.FLOAT, dims))
    return model.SerializeToString()


@pytest.fixture(scope="module")
def filtered(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("filtered") / "d.shoal"
    graphs = {"head": scoring(network.split.head), "local": network.split.whole}
    pack(graphs, path, "cats", modes=network.modes, codecs=network.codecs, threshold=0.6)
    return path


def test_nothing_is_sent_where_nothing_is(network, filtered):
    images = network.images.copy()
    images[:4] *= 0.5  # no number of these is 0.6
    asked = []

    class Counted(Direct):
        def ask(self, mode, message, timeout):
            asked.append(mode)
            return super().ask(mode, message, timeout)

    options = {"threads": 1, "prior": Estimate(1e7, 0.001, 0.001), "choose": fixed(2)}
    with Edge(network.edge, threads=1) as edge, Client(filtered, Counted(edge), **options) as device:
        plain = Client(network.device, Direct(edge), **options)
        for rows in (slice(0, 1), slice(0, 4)):
            result = device.run(images[rows], deadline=LONG)
            assert (result.where, result.mode, result.bytes, result.outputs) == ("filtered", 0, 0, {})
            assert "0.6" in result.why and result.seconds.head > 0 == result.seconds.link
        assert not asked
        for rows in (slice(4, 5), slice(2, 6)):  # of several images one is enough
            result = device.run(images[rows], deadline=LONG)
            assert (result.where, result.mode, result.why) == ("edge", 2, "")
            other = plain.run(images[rows], deadline=LONG)
            assert result.bytes == other.bytes
            np.testing.assert_array_equal(result.outputs["logits"], other.outputs["logits"])
        assert asked == [2, 2]
        plain.close()


def test_an_agent_sends_no_score(network, filtered):
    feeds, plain, scored = {"image": network.images[:2]}, Local(network.device), Local(filtered)
    with plain.bundle, scored.bundle:
        assert scored.prepare(feeds, 2) == plain.prepare(feeds, 2)
        assert set(scored.prepare(feeds)) == {"latent"}
        scored.probe()


def test_a_score_without_a_threshold_and_a_threshold_without_a_score_are_refused(network, filtered, tmp_path):
    head, said = network.split.head, {"modes": network.modes, "codecs": network.codecs}
    for graph, threshold, problem in (
        (scoring(head), None, "no threshold"), (head, 0.5, "without a score"),
        (scoring(head, ("n", 3)), 0.5, r"score float32 \['n', 3\]"),
    ):  # fmt: skip
        with pytest.raises(ConvertError, match=problem):
            pack({"head": graph}, tmp_path / "d.shoal", threshold=threshold, **said)
    for threshold in (-0.1, 1.5, float("nan"), "0.5", True):
        with pytest.raises(UsageError, match="threshold is"):
            pack({"head": scoring(head)}, tmp_path / "d.shoal", threshold=threshold, **said)
    with Bundle.open(filtered) as made:
        table = made.bytes(made.section("modes"))
        for changed in (table.replace(b'"threshold"', b'"treshold"'), table.replace(b"0.6}", b"NaN}")):
            assert changed != table
            path = tmp_path / "changed.shoal"
            with create(path, overwrite=True) as writer:
                for one in made.sections:
                    data = changed if one.kind == "modes" else made.bytes(one)
                    writer.add(one.kind, one.name, data, required=one.kind in ("weights", "graph"))
                for graph in made.graphs:
                    writer.graph(graph)
                writer.commit()
            with pytest.raises(BundleError, match="threshold"):
                Client(path, None)


def test_a_table_says_the_threshold_or_none():
    assert modes.parse(b'{"modes": [], "threshold": 0}').threshold == 0
    assert np.isnan(modes.parse(b'{"modes": []}').threshold)
    for said in (b"null", b"[0.5]", b"true", b"1e999", b"-1"):
        with pytest.raises(BundleError, match="threshold"):
            modes.parse(b'{"modes": [], "threshold": ' + said + b"}")
