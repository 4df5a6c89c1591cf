"""Graphs whose weights stay in a section: what they compute, what they store, and that they name nothing else."""

import io

import numpy as np
import pytest

from shoal.converters.graph import GraphBuilder
from shoal.converters.quantize import rtn
from shoal.converters.recipe import NAMED, Format, Recipe
from shoal.converters.sources import TensorInfo
from shoal.converters.weights import Weights
from shoal.runtime.kernels import layout
from shoal.runtime.session import Place, open_graph, read

FORMATS = [Format(32), Format(8), Format(4), Format(4, 64), Format(3), Format(8, 64, symmetric=True)]


class Arrays:
    """A source over arrays."""

    def __init__(self, **arrays):
        self.arrays = {name.replace("__", "."): np.asarray(value, np.float32) for name, value in arrays.items()}
        self.reads: list[tuple[str, int]] = []

    def tensors(self):
        return {name: TensorInfo(array.shape, "F32", array.nbytes) for name, array in self.arrays.items()}

    def read(self, name, start=0, stop=None):
        part = self.arrays[name][start:stop]
        self.reads.append((name, len(part)))
        return part


@pytest.fixture
def source():
    random = np.random.default_rng(5)
    return Arrays(
        a__weight=random.standard_normal((24, 48)), b__weight=random.standard_normal((9, 48)),
        a__bias=random.standard_normal(24), b__bias=random.standard_normal(9),
        embed_tokens__weight=random.standard_normal((100, 48)), norm__weight=random.standard_normal(300),
    )  # fmt: skip


def one_format(format: Format) -> Recipe:
    return Recipe("test", linear=format, embedding=format, head=format)


def opened(g: GraphBuilder, sink: io.BytesIO, tmp_path):
    (tmp_path / "weights").write_bytes(sink.getvalue())
    return open_graph(g.serialize(), {"weights": Place(str(tmp_path / "weights"), 0, sink.tell())})


def rounded(array: np.ndarray, format: Format) -> np.ndarray:
    """What a matrix is once it is stored."""
    if format.bits == 32:
        return array
    return layout.dequantize(format.layout(array.shape[1], len(array)), rtn.quantize(array, format))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_linear_multiplies_by_the_stored_matrices(source, tmp_path, format):
    """Stacked by rows, with biases; integers are multiplied with activations of eight bits."""
    sink = io.BytesIO()
    g = GraphBuilder("test", Weights(source, one_format(format), sink))
    x = g.input("x", "float32", ["n", 48])
    g.output(g.linear(("a", "b"), x, bias=True), "y", "float32", ["n", 33])
    x = np.random.default_rng(1).standard_normal((7, 48)).astype(np.float32)
    found = opened(g, sink, tmp_path).run({"x": x})["y"]
    matrix = np.concatenate([rounded(source.arrays[f"{name}.weight"], format) for name in "ab"])
    expected = x @ matrix.T + np.concatenate([source.arrays["a.bias"], source.arrays["b.bias"]])
    tolerance = 1e-5 if format.bits == 32 else 0.03
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_an_embedding_gives_rows_and_is_the_head_as_well(source, tmp_path, format):
    sink = io.BytesIO()
    g = GraphBuilder("test", Weights(source, one_format(format), sink))
    rows = g.embed("embed_tokens.weight", g.input("tokens", "int64", ["n"]))
    size = sink.tell()
    logits = g.head("embed_tokens.weight", rows)
    assert sink.tell() == size  # the same bytes
    g.output(rows, "rows", "float32", ["n", 48])
    g.output(logits, "logits", "float32", ["n", 100])
    tokens = np.array([3, 99, 0, 3])
    found = opened(g, sink, tmp_path).run({"tokens": tokens})
    table = rounded(source.arrays["embed_tokens.weight"], format)
    np.testing.assert_allclose(found["rows"], table[tokens], atol=1e-6)
    expected = table[tokens] @ table.T
    tolerance = 1e-5 if format.bits == 32 else 0.03
    assert np.linalg.norm(found["logits"] - expected) < tolerance * np.linalg.norm(expected)


def test_a_second_graph_reads_and_stores_nothing(source):
    sink = io.BytesIO()
    weights = Weights(source, NAMED["int4"], sink)

    def build() -> bytes:
        g = GraphBuilder("test", weights)
        y = g.linear(("a", "b"), g.input("x", "float32", ["n", 48]), bias=True)
        g.output(g.op("Add", y, g.plain("b.bias")), "y", "float32", ["n", 33])
        return g.serialize()

    first, size, reads = build(), sink.tell(), list(source.reads)
    assert build() == first  # and the bytes are the same
    assert (sink.tell(), source.reads) == (size, reads)


def test_every_weight_is_external_and_aligned(source, tmp_path):
    sink = io.BytesIO()
    g = GraphBuilder("test", Weights(source, NAMED["int4"], sink))
    tokens = g.input("tokens", "int64", ["n"])
    y = g.linear(("a", "b"), g.embed("embed_tokens.weight", tokens), bias=True)
    g.output(y, "y", "float32", ["n", 33])
    g.output(g.op("Mul", g.plain("norm.weight"), g.constant(2, "float32")), "z", "float32", [300])
    (tmp_path / "weights").write_bytes(sink.getvalue())
    place = Place(str(tmp_path / "weights"), 0, sink.tell())
    model = read(g.serialize(), {"weights": place})  # refuses what lies outside the section
    external = {tensor.name: tensor.external for tensor in model.tensors if tensor.external}
    assert {entry.location for entry in external.values()} == {"weights"}
    assert all(entry.offset % 64 == 0 for entry in external.values())
    inline = [tensor for tensor in model.tensors if not tensor.external]
    assert all(tensor.nbytes < 1024 for tensor in inline)
    assert "norm.weight" in external


def test_taps_are_the_inputs_of_linears(source, tmp_path):
    sink = io.BytesIO()
    g = GraphBuilder("test", Weights(source, NAMED["fp32"], sink), taps=True)
    x = g.input("x", "float32", ["batch", "n", 48])
    y = g.op("Relu", x)
    g.output(g.op("Add", g.linear("a", x), g.linear("a", y)), "sum", "float32", ["batch", "n", 24])
    g.output(g.linear("b", y), "y", "float32", ["batch", "n", 9])
    x = np.random.default_rng(2).standard_normal((1, 5, 48)).astype(np.float32)
    found = opened(g, sink, tmp_path).run({"x": x})
    np.testing.assert_array_equal(found[g.tapped["a",]], x)  # of a matrix that is used twice, the first input
    np.testing.assert_array_equal(found[g.tapped["b",]], np.maximum(x, 0))


def test_constants_are_told_apart(tmp_path):
    """Equal bytes of another type, shape or sign are other constants."""
    sink = io.BytesIO()
    g = GraphBuilder("test", Weights(Arrays(), NAMED["fp32"], sink))
    kinds = [
        ([0], "int64"), (0, "int64"), ([0, 0], "int32"), (0.0, "float32"), (-0.0, "float32"),
        (np.arange(200), "float32"), (np.arange(200) + 1, "float32"),
    ]  # fmt: skip
    for index, (value, kind) in enumerate(kinds):
        g.output(g.op("Identity", g.constant(value, kind)), f"y{index}", kind, np.shape(value))
    found = opened(g, io.BytesIO(b"unused"), tmp_path).run({})
    for index, (value, kind) in enumerate(kinds):
        expected = np.asarray(value, kind)
        assert found[f"y{index}"].dtype == kind
        assert found[f"y{index}"].tobytes() == expected.tobytes()
