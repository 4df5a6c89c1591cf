"""The devices that tests run on, real or simulated; where there is none a test is skipped and says what it lacks."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.runtime import backends
from shoal.runtime.errors import BackendError

F, MICROSOFT = TensorProto.FLOAT, "com.microsoft"
SWIFTSHADER = ("/usr/lib/chromium/vk_swiftshader_icd.json", "/usr/lib/chromium-browser/vk_swiftshader_icd.json")


def value(name, dims, kind=F):
    return helper.make_tensor_value_info(name, kind, dims)


def build(nodes, inputs, outputs, weights=(), elsewhere=()):
    """ModelProto bytes; `weights` are name -> array, `elsewhere` further TensorProtos."""
    tensors = [numpy_helper.from_array(array, name) for name, array in dict(weights).items()] + list(elsewhere)
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _chosen(name):
    try:
        return backends.choose(name)
    except BackendError as error:
        pytest.skip(f"{error.why} {error.fix}")


@pytest.fixture(scope="session")
def qnn():
    """A Hexagon, or QNN's emulator of one: pip install onnxruntime-qnn."""
    return _chosen("npu:qnn")


@pytest.fixture(scope="session")
def webgpu():
    """A card, or SwiftShader: pip install onnxruntime-ep-webgpu; on Debian libvulkan1 and chromium-common."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux" and (icd := next(filter(lambda path: Path(path).exists(), SWIFTSHADER), None)):
            try:
                ctypes.CDLL("libvulkan.so.1")
            except OSError:
                pytest.skip("there is no Vulkan loader: apt-get install libvulkan1")
            patch.setenv("VK_ICD_FILENAMES", icd)
            patch.setenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
        yield _chosen("gpu:webgpu")


def external(name, array, location, offset):
    """A TensorProto of int8 whose bytes are elsewhere."""
    tensor = TensorProto(name=name, data_type=TensorProto.INT8, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", str(offset)), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=text)
    return tensor


def block(rows, hidden=64, inner=128, rng=None, location=None):
    """(graph, bytes of its weights) of a gated feed-forward block, W8A8 by QuantizeLinear and DequantizeLinear:
    activations uint8, weights int8, a scale a tensor. With `location` the matrices are external data there."""
    rng = rng or np.random.default_rng(0)
    nodes, weights, elsewhere, blob = [], {}, [], bytearray()

    def scale(name, number, zero, kind):
        weights[f"{name}.scale"] = np.array(number, np.float32)
        weights[f"{name}.zero"] = np.array(zero, kind)

    def quantized(name, kind=np.uint8, number=0.06, zero=128):
        """The values of `name` as they are after 8 bits."""
        scale(name, number, zero, kind)
        ends = [f"{name}.scale", f"{name}.zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *ends], [f"{name}.q"], name=f"{name}.q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", *ends], [f"{name}.d"], name=f"{name}.d"))
        return f"{name}.d"

    def linear(name, x, inputs, outputs):
        matrix = rng.integers(-127, 128, (inputs, outputs), np.int8)
        if location is None:
            weights[name] = matrix
        else:
            elsewhere.append(external(name, matrix, location, len(blob)))
            blob.extend(matrix.tobytes())
        scale(name, 0.02 / np.sqrt(inputs), 0, np.int8)
        ends = [f"{name}.scale", f"{name}.zero"]
        nodes.append(helper.make_node("DequantizeLinear", [name, *ends], [f"{name}.w"], name=f"{name}.w"))
        nodes.append(helper.make_node("MatMul", [x, f"{name}.w"], [f"{name}.y"], name=f"{name}.y"))
        return quantized(f"{name}.y")

    x = quantized("x")
    gate, up = linear("gate", x, hidden, inner), linear("up", x, hidden, inner)
    nodes.append(helper.make_node("Sigmoid", [gate], ["s"], name="s"))
    nodes.append(helper.make_node("Mul", [gate, quantized("s", number=1 / 255, zero=0)], ["silu"], name="silu"))
    nodes.append(helper.make_node("Mul", [quantized("silu"), up], ["h"], name="h"))
    down = linear("down", quantized("h"), inner, hidden)
    nodes.append(helper.make_node("Add", [x, down], ["sum"], name="sum"))
    y = quantized("sum", number=0.1)
    ports = [value("x", [rows, hidden])], [value(y, [rows, hidden])]
    return build(nodes, *ports, weights, elsewhere), bytes(blob)


@pytest.fixture(scope="session")
def feed_forward():
    """(graph, feeds) of such a block of 32 rows."""
    rng = np.random.default_rng(0)
    return block(32, rng=rng)[0], {"x": rng.standard_normal((32, 64)).astype(np.float32)}
