"""The npu through QNN: a real Hexagon where there is one, else Qualcomm's emulator of its matrix processor."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from shoal.runtime import backends, session
from shoal.runtime.backends.provider import Operator
from shoal.runtime.errors import BackendError
from shoal.runtime.providers import CPU

from .conftest import MICROSOFT, F, build, value


def test_a_block_in_8_bits_runs_whole_and_agrees_within_two_steps(qnn, feed_forward):
    graph, feeds = feed_forward
    with session.open_graph(graph, {}) as cpu:
        expected = next(iter(cpu.run(feeds).values()))
    opened, placement = backends.open_graph(qnn, graph, {})
    with opened:
        assert placement.share == 1 and len(placement.nodes) >= 20 and CPU not in opened.placement()
        found = next(iter(opened.run(feeds).values()))
        again = next(iter(opened.run(feeds).values()))
    steps = np.abs(found - expected) / 0.1
    assert steps.max() <= 2.01 and (steps < 0.01).mean() > 0.5 and np.ptp(expected) > 10 * 0.1
    np.testing.assert_array_equal(found, again)


def mixed(rows):
    """A product that QNN takes and a determinant that it does not."""
    rng = np.random.default_rng(1)
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    nodes = [product, helper.make_node("Det", ["s"], ["d"], name="volume")]
    ports = [value("x", [rows, 16]), value("s", [4, 4])], [value("y", [rows, 8]), value("d", [])]
    return build(nodes, *ports, {"w": rng.standard_normal((16, 8)).astype(np.float32)})


def test_what_falls_back_is_refused_by_name_and_taken_where_that_was_asked_for(qnn):
    with pytest.raises(BackendError) as refused:
        backends.open_graph(qnn, mixed(4), {})
    assert "1 Det (volume): Operators of type `Det` are not supported by QNN EP" in refused.value.why
    opened, placement = backends.open_graph(qnn, mixed(4), {}, share=0.5)
    with opened:
        assert opened.placement() == {"QNNExecutionProvider": 1, CPU: 1} and placement.share == 0.5
        found = opened.run({"x": np.ones((4, 16), np.float32), "s": 2 * np.eye(4, dtype=np.float32)})
        assert found["d"] == 16
    with pytest.raises(BackendError, match="cannot be opened"):  # the engine's own check, were the survey wrong
        session.open_graph(mixed(4), {}, target=session.Target(qnn.listed, qnn.settings))


def test_open_dimensions_are_refused_and_given_a_length(qnn):
    placement = backends.survey(qnn, mixed("rows"), {})
    assert {node.name: "static shapes only" in node.why for node in placement.nodes} == {
        "product": True,
        "volume": False,
    }
    assert backends.survey(qnn, mixed("rows"), {}, {"rows": 4}).share == 0.5


def test_the_rules_agree_with_the_provider(qnn):
    """Of an operator that a rule refuses the provider must be found to refuse it as well."""
    nodes = [
        helper.make_node("MatMulInteger", ["u", "u"], ["0"], name="0"),
        helper.make_node("DynamicQuantizeLinear", ["x"], ["1", "1s", "1z"], name="1"),
        helper.make_node("SkipSimplifiedLayerNormalization", ["x", "x", "one"], ["2"], name="2", domain=MICROSOFT),
        helper.make_node("SkipLayerNormalization", ["x", "x", "one"], ["3"], name="3", domain=MICROSOFT),
        helper.make_node("RotaryEmbedding", ["r", "at", "c", "c"], ["4"], name="4", domain=MICROSOFT),
        helper.make_node("Add", ["double", "double"], ["5"], name="5"),
        helper.make_node("RMSNormalization", ["x", "one"], ["6"], name="6"),
        helper.make_node("Softmax", ["x"], ["7"], name="7"),
    ]
    inputs = [value("x", [1, 4, 8]), value("u", [4, 4], TensorProto.UINT8), value("r", [1, 2, 4, 8])]
    inputs += [value("at", [1, 4], TensorProto.INT64), value("c", [8, 4]), value("double", [4], TensorProto.DOUBLE)]
    kinds = {"0": TensorProto.INT32, "1": TensorProto.UINT8, "5": TensorProto.DOUBLE}
    outputs = [value(node.output[0], None, kinds.get(node.name, F)) for node in nodes]
    graph = build(nodes, inputs, outputs, {"one": np.ones(8, np.float32)})
    taken = {node.name: node.provider != CPU for node in backends.survey(qnn, graph, {}).nodes}
    types = {"5": ("float64",)}
    for node in nodes:
        verdict = backends.supports(qnn, Operator(node.op_type, node.domain, types=types.get(node.name, ())))
        assert verdict.takes is (None if taken[node.name] else False), node.op_type
    assert taken["6"] and taken["7"]


def test_a_device_that_vanished_between_plan_and_load_is_told(qnn, feed_forward):
    import dataclasses

    gone = dataclasses.replace(qnn, listed=dataclasses.replace(qnn.listed, device_id=4711))
    for library in (qnn.library, ""):  # the library still there, or gone with the device
        with pytest.raises(BackendError, match="gone"):
            backends.open_graph(dataclasses.replace(gone, library=library), feed_forward[0], {})


def test_a_graph_that_takes_too_long_is_given_up(qnn, feed_forward):
    with pytest.raises(BackendError, match="does not come back within 0.05 s"):
        backends.survey(qnn, feed_forward[0], {}, seconds=0.05)
