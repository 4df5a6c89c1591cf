"""Random matrices in the kernels' layout, graphs of single operators, and models in one format."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.converters.convert import convert
from shoal.converters.recipe import Format, Recipe
from shoal.runtime import kernels
from shoal.runtime.kernels import layout
from shoal.runtime.kernels.layout import Codes, LinearFormat
from shoal.runtime.session import Place, Session, open_graph


def random_codes(format: LinearFormat, seed: int = 1) -> Codes:
    """Codes as the converter chooses them: any, but a multiplier times what lies between code and zero fits int8."""
    random = np.random.default_rng(seed)
    rows, groups = format.outputs, (format.outputs, format.groups)
    scales = (random.random((rows, format.spans)) + 0.1).astype(np.float32)
    scales = (scales.view(np.uint32) & ~np.uint32(15)).view(np.float32)
    if format.bits == 8:
        values, zeros = random.integers(-128, 128, (rows, format.padded)), random.integers(-9, 10, groups)
        return Codes(values.astype(np.int8), np.ones(groups, np.uint8), zeros.astype(np.int8), scales)
    reach = format.step * ((1 << format.bits) - 1)
    zeros = random.integers(0, min(reach, 15) + 1, groups, np.uint8)
    most = np.minimum(127 // np.maximum(zeros, reach - zeros), 15)
    multipliers = random.integers(1, most + 1).astype(np.uint8)
    values = random.integers(0, 1 << format.bits, (rows, format.padded), np.uint8)
    return Codes(values, multipliers, zeros, scales)


def random_matrix(format: LinearFormat, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Bytes as stored, and the weights that they are."""
    codes = random_codes(format.check(), seed)
    return layout.pack(format, codes), layout.dequantize(format, codes)


@pytest.fixture(scope="session")
def matrix() -> Callable:
    """matrix(format, seed=1): (bytes as stored, fp32 weights that they are) of random codes."""
    return random_matrix


@pytest.fixture(scope="session")
def operator() -> Callable:
    """operator(name, inputs, outputs, attributes, tensors): a graph of one of our operators.

    Inputs and outputs are (name, numpy type, dims), an input may also be a name alone: of a tensor, or "" for none;
    tensors are name -> array, which is inside, or (array, offset), whose bytes are in the section.
    """

    def make(name, inputs, outputs, attributes, tensors=()) -> bytes:
        def value(of):
            return helper.make_tensor_value_info(of[0], helper.np_dtype_to_tensor_dtype(np.dtype(of[1])), of[2])

        def tensor(key, of):
            if not isinstance(of, tuple):
                return numpy_helper.from_array(of, key)
            made = TensorProto(name=key, data_type=helper.np_dtype_to_tensor_dtype(of[0].dtype), dims=of[0].shape)
            made.data_location = TensorProto.EXTERNAL
            for entry in (("location", "weights"), ("offset", str(of[1])), ("length", str(of[0].nbytes))):
                made.external_data.add(key=entry[0], value=entry[1])
            return made

        names = [of if isinstance(of, str) else of[0] for of in inputs]
        node = helper.make_node(name, names, [of[0] for of in outputs], "node", domain="shoal")
        node.attribute.extend(helper.make_attribute(key, number) for key, number in attributes.items())
        given = [value(of) for of in inputs if not isinstance(of, str)]
        stored = [tensor(*of) for of in dict(tensors).items()]
        graph = helper.make_graph([node], "g", given, [value(of) for of in outputs], stored)
        opsets = [helper.make_opsetid(key, version) for key, version in (("", 21), ("com.microsoft", 1), ("shoal", 1))]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    return make


@pytest.fixture
def opened(tmp_path):
    """opened(graph, weights=b"") -> Session; `weights` are the bytes of its section."""
    sessions: list[Session] = []

    def open_(graph: bytes, weights: bytes = b"", **options) -> Session:
        path = tmp_path / f"weights{len(sessions)}"
        path.write_bytes(weights or b"none")
        places = {"weights": Place(str(path), 0, path.stat().st_size)}
        sessions.append(open_graph(graph, places, **options))
        return sessions[-1]

    yield open_
    for session in sessions:
        session.close()


@pytest.fixture(scope="session")
def bundle(wide, tmp_path_factory) -> Callable[[str, Format], Path]:
    """bundle(family, format): that model with all its matrices in one format."""
    made: dict[tuple[str, Format], Path] = {}

    def make(family: str, format: Format) -> Path:
        if (family, format) not in made:
            out = made[family, format] = tmp_path_factory.mktemp("bundle") / "m.shoal"
            convert(wide(family), out, Recipe("t", linear=format, embedding=format, head=format), check_parity=False)
        return made[family, format]

    return make


@pytest.fixture(scope="session")
def built() -> None:
    """For tests that need the library."""
    if not kernels.available():
        pytest.skip(f"the kernels' library is missing: {kernels.missing()}")
