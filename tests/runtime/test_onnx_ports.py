"""What a graph says that it takes and gives, against the protobuf library, and bytes that say nothing."""

import random

import onnx
from onnx import TensorProto, helper, numpy_helper

from shoal.runtime import onnx_wire
from shoal.runtime.errors import BundleError
from shoal.runtime.onnx_ports import Port, ports


def made() -> bytes:
    value, tensor = helper.make_value_info, helper.make_tensor_value_info
    inputs = [tensor("x", TensorProto.FLOAT, ["n", 3, None, -1]), tensor("w", TensorProto.FLOAT, [1])]
    outputs = [tensor("letters", TensorProto.INT64, []), tensor("half", TensorProto.BFLOAT16, [2]),
               tensor("bits", TensorProto.INT4, None), value("many", helper.make_sequence_type_proto(inputs[0].type)),
               value("untyped", onnx.TypeProto())]  # fmt: skip
    weight = numpy_helper.from_array(numpy_helper.to_array(TensorProto(data_type=1, dims=[1], float_data=[2])), "w")
    graph = helper.make_graph([helper.make_node("F", ["x", "w"], ["letters"])], "g", inputs, outputs, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def test_inputs_and_outputs_are_what_the_graph_says():
    inputs, outputs = ports(onnx_wire.read(made(), {}))
    assert inputs == [Port("x", "float32", ("n", 3, None, None))], "a weight is none"
    assert outputs == [Port("letters", "int64", ()), Port("half", "bfloat16", (2,)), Port("bits", "type 22", ()),
                       Port("many", "", ()), Port("untyped", "", ())]  # fmt: skip


def test_bytes_that_say_something_else_are_refused_or_read():
    data, rng, refused = made(), random.Random(0), 0
    for at in range(len(data)):
        try:
            ports(onnx_wire.read(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], {}))
        except BundleError:
            refused += 1
    assert 0 < refused < len(data)
