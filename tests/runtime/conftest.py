"""A small graph over a weights file, as a bundle would hold them: the section begins at an odd place in the file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from shoal.runtime.session import Place

HEAD = 4999  # bytes before the section


@dataclass
class SmallGraph:
    """tokens int64 [n] -> y fp32 [n, 16] through an embedding, a 4-bit, an fp32 and a Gemm layer."""

    graph: bytes
    path: Path
    weights: dict[str, np.ndarray]
    size: int
    bits: int = 4

    @property
    def places(self) -> dict[str, Place]:
        return {"weights": Place(str(self.path), HEAD, self.size)}

    def expected(self, tokens: np.ndarray) -> np.ndarray:
        """The same in float64."""
        w = self.weights
        low, high = w["q"] & 15, w["q"] >> 4
        q = np.stack([low, high], -1).reshape(48, 2, 32).astype(np.float64)
        z = np.stack([w["z"] & 15, w["z"] >> 4], -1).reshape(48, 2, 1)
        dense = ((q - z) * w["s"][..., None]).reshape(48, 64)
        return w["embed"][tokens].astype(np.float64) @ dense.T @ w["m"] @ w["g"].T + w["b"]


def external(name: str, array: np.ndarray, offset: int, location: str = "weights") -> TensorProto:
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(nodes, inputs, outputs, tensors) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def make_small(folder: Path, seed: int = 0, accuracy: int = 4, name: str = "model.shoal") -> SmallGraph:
    rng = np.random.default_rng(seed)
    weights = {
        "embed": rng.standard_normal((64, 64), np.float32),
        "q": rng.integers(0, 256, (48, 2, 16), np.uint8),
        "s": rng.random((48, 2), np.float32) * 0.1,
        "z": rng.integers(0, 256, (48, 1), np.uint8),
        "m": rng.standard_normal((48, 40), np.float32) * 0.1,
        "g": rng.standard_normal((16, 40), np.float32),
        "b": rng.standard_normal(16).astype(np.float32),
    }
    tensors, data = [], bytearray()
    for key, array in weights.items():
        data += bytes(-len(data) % 64)
        tensors.append(external(key, array, len(data)))
        data += array.tobytes()
    quantized = dict(K=64, N=48, bits=4, block_size=32, accuracy_level=accuracy)
    nodes = [
        helper.make_node("Gather", ["embed", "tokens"], ["h0"]),
        helper.make_node("MatMulNBits", ["h0", "q", "s", "z"], ["h1"], "bits", domain="com.microsoft", **quantized),
        helper.make_node("MatMul", ["h1", "m"], ["h2"], "plain"),
        helper.make_node("Gemm", ["h2", "g", "b"], ["y"], "gemm", transB=1),
    ]
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])
    path = folder / name
    path.write_bytes(bytes(HEAD) + bytes(data) + b"tail")
    return SmallGraph(model(nodes, [tokens], [y], tensors).SerializeToString(), path, weights, len(data))


@pytest.fixture
def small(tmp_path) -> SmallGraph:
    return make_small(tmp_path)
