"""The store of weights: what lies in the section is what the recipe says of the source, once, and a slice at a time."""

import io
import tracemalloc

import numpy as np
import pytest

from shoal.converters import weights
from shoal.converters.quantize import rtn
from shoal.converters.recipe import Format, Recipe
from shoal.converters.sources import TensorInfo
from shoal.runtime.errors import ConvertError
from shoal.runtime.kernels import layout

FORMATS = [Format(), Format(8), Format(4), Format(4, 64, symmetric=True), Format(3, rotated=False), Format(2)]


class Arrays:
    """A source of arrays that remembers what was read of it."""

    def __init__(self, **arrays):
        self.arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
        self.read_rows: list[tuple[str, int]] = []

    def tensors(self):
        return {name: TensorInfo(array.shape, "F32", array.nbytes) for name, array in self.arrays.items()}

    def read(self, name, start=0, stop=None):
        rows = self.arrays[name][start:stop].copy()
        self.read_rows.append((name, len(rows)))
        return rows


def make(format: Format, **arrays):
    rng = np.random.default_rng(2)
    source = Arrays(**(arrays or {"a.x.weight": rng.standard_normal((30, 72)), "a.y.weight": rng.random((11, 72)),
                                  "norm": rng.random(72)}))  # fmt: skip
    sink = io.BytesIO()
    return source, sink, weights.Weights(source, Recipe("t", linear=format), sink)


def stored(sink, part: weights.Stored) -> np.ndarray:
    data = np.frombuffer(sink.getvalue(), np.uint8)[part.offset : part.offset + part.length]
    return data.view(part.dtype).reshape(part.shape)


def dequantized(sink, matrix: weights.Matrix) -> np.ndarray:
    """The matrix as a device reads it."""
    values = stored(sink, matrix.values)
    if matrix.layout is None:
        return values
    return layout.dequantize(matrix.layout, layout.unpack(matrix.layout, values))


def rounded(rows: np.ndarray, format: Format) -> np.ndarray:
    """What these rows are once they are stored."""
    if format.bits == 32:
        return rows
    return layout.dequantize(format.layout(rows.shape[1], len(rows)), rtn.quantize(rows, format))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stacked_matrices_are_stored_as_rounded_and_once(format, monkeypatch):
    monkeypatch.setattr(weights, "SLICE_BYTES", 16 * 4 * 72)  # rows of the two do not fill whole slices, nor panels
    source, sink, store = make(format)
    names = ("a.x.weight", "a.y.weight")
    matrix = store.matrix(names)
    rows = np.concatenate([source.arrays[name] for name in names])
    assert (dequantized(sink, matrix) == rounded(rows, format)).all()
    assert max(count for _, count in source.read_rows) == 16
    assert matrix.values.offset % weights.ALIGNMENT == 0 and not matrix.gated
    size, read = sink.tell(), len(source.read_rows)
    assert store.matrix(names) is matrix and store.exact == (format.bits == 32)
    assert (sink.tell(), len(source.read_rows)) == (size, read)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_panels_of_a_gate_and_its_up_alternate(format, monkeypatch):
    monkeypatch.setattr(weights, "SLICE_BYTES", 16 * 4 * 128)
    names = ("mlp.gate.weight", "mlp.up.weight")
    source, sink, store = make(format, **dict(zip(names, np.random.default_rng(3).random((2, 48, 128)), strict=True)))
    matrix = store.matrix(names, gated=True)
    gate, up = (rounded(source.arrays[name], format) for name in names)
    assert matrix.gated == (format.bits < 32)
    expected = np.concatenate([gate, up])
    if matrix.gated:
        expected = np.concatenate([part[start : start + 16] for start in range(0, 48, 16) for part in (gate, up)])
    assert (dequantized(sink, matrix) == expected).all()


def test_a_gate_that_is_not_whole_panels_lies_before_its_up():
    names = ("mlp.gate.weight", "mlp.up.weight")
    source, sink, store = make(Format(4), **dict(zip(names, np.random.default_rng(3).random((2, 40, 64)), strict=True)))
    matrix = store.matrix(names, gated=True)
    rows = np.concatenate([source.arrays[name] for name in names])
    assert not matrix.gated and (dequantized(sink, matrix) == rounded(rows, Format(4))).all()


def test_vectors_stay_in_fp32():
    source, sink, store = make(Format(4), a=np.arange(5), b=np.arange(3))
    assert stored(sink, store.plain("a", lambda x: x + 1)).tolist() == [1, 2, 3, 4, 5]
    assert stored(sink, store.stacked(("a", "b"))).tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert store.plain("a") is store.plain("a") and len(source.read_rows) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", FORMATS[:3], ids=str)
def test_what_is_not_a_number_is_refused_by_name(format, value):
    matrix = np.ones((40, 64), np.float32)
    matrix[-1, -1] = value
    _, _, store = make(format, **{"good.weight": np.ones((3, 64)), "bad.weight": matrix, "norm": matrix[-1]})
    with pytest.raises(ConvertError, match="The tensor bad.weight cannot be converted"):
        store.matrix(("good.weight", "bad.weight"))
    with pytest.raises(ConvertError, match="The tensor norm"):
        store.plain("norm")


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_slice_is_what_is_in_memory(format, monkeypatch, tmp_path):
    """64 MB of weights pass through slices of 1 MB."""
    monkeypatch.setattr(weights, "SLICE_BYTES", 1 << 20)

    class Endless(Arrays):
        def read(self, name, start=0, stop=None):
            return np.full((stop - start, 1024), start % 7 - 3.3, np.float32)

    source = Endless()
    source.tensors = lambda: {f"{i}.w.weight": TensorInfo((4096, 1024), "F32", 1 << 24) for i in range(4)}
    with open(tmp_path / "sink", "wb") as sink:
        store = weights.Weights(source, Recipe("t", linear=format), sink)
        tracemalloc.start()
        try:
            for index in range(4):
                store.matrix((f"{index}.w.weight",))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < (8 << 20)
