"""The layout of weights: every code lies where linear.h says, comes back as it was, and is the same for MatMulNBits."""

import dataclasses
import tracemalloc

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from shoal.runtime.errors import BundleError
from shoal.runtime.kernels import layout
from shoal.runtime.kernels.layout import Codes, LinearFormat

# inputs, outputs, bits, group, span: whole blocks and padded ones, spans and groups that end within a row, and not
FORMATS = [
    LinearFormat(128, 32, 4, 32, 128),
    LinearFormat(300, 37, 4, 32, 320),
    LinearFormat(300, 5, 3, 64, 64),
    LinearFormat(576, 20, 4, 128, 256),
    LinearFormat(192, 16, 2, 96, 192),
    LinearFormat(100, 33, 3, 128, 128),
    LinearFormat(448, 17, 2, 64, 448),
    LinearFormat(64, 16, 8, 64, 64),
    LinearFormat(300, 37, 8, 320, 320),
    LinearFormat(300, 18, 8, 128, 128),
]
IDS = ["-".join(map(str, dataclasses.astuple(format))) for format in FORMATS]


def random_codes(format: LinearFormat, rows: int, seed: int = 1) -> Codes:
    random = np.random.default_rng(seed)
    scales = random.standard_normal((rows, format.spans)).astype(np.float32)
    scales = (scales.view(np.uint32) & ~np.uint32(15)).view(np.float32)  # as the converter's
    groups = (rows, format.groups)
    if format.bits == 8:
        values, zeros = random.integers(-128, 128, (rows, format.padded)), random.integers(-128, 128, groups)
        return Codes(values.astype(np.int8), np.ones(groups, np.uint8), zeros.astype(np.int8), scales)
    values = random.integers(0, 1 << format.bits, (rows, format.padded), np.uint8)
    multipliers = random.integers(1, 16, groups, np.uint8)
    return Codes(values, multipliers, random.integers(0, 16, groups, np.uint8), scales)


def code_at(format: LinearFormat, data: np.ndarray, output: int, k: int) -> int:
    """linear.h, read out: the code of one weight."""
    panel = data[output // 16 * format.panel_bytes :][: format.panel_bytes]
    block, r, at = panel[format.codes_at + k // 64 * format.block_bytes :], output % 16, k % 64
    if format.bits == 8:
        return int(block[at // 4 * 64 + 4 * r + at % 4].view(np.int8))
    if format.bits == 4:
        return int(block[at // 8 * 64 + 4 * r + at % 4] >> (at // 4 % 2 * 4) & 15)
    low = int(block[at // 16 * 64 + 4 * r + at % 4] >> (at // 4 % 4 * 2) & 3)
    if format.bits == 2:
        return low
    return low | int(block[256 + at // 32 * 64 + 4 * r + at % 4] >> (at // 4 % 8) & 1) << 2


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_everything_lies_where_the_header_says(format):
    assert not format.problem()
    codes = random_codes(format, format.outputs)
    data = layout.pack(format, codes)
    assert data.dtype == np.uint8 and data.shape == (format.bytes,) and format.panel_bytes % 64 == 0
    weights = layout.dequantize(format, codes)
    assert weights.shape == (format.outputs, format.inputs) and weights.dtype == np.float32
    for output in range(format.outputs):
        panel, r = data[output // 16 * format.panel_bytes :][: format.panel_bytes], output % 16
        scales = panel[: format.groups_at].view(np.float32).reshape(format.spans, 16)[:, r]
        assert (scales == codes.scales[output]).all()
        for k in range(0, format.inputs, 7):
            code = code_at(format, data, output, k)
            assert code == codes.values[output, k]
            group = panel[format.groups_at + k // format.group * 16 + r]
            if format.bits == 8:
                integer = code - int(group.view(np.int8))
            else:
                integer = int(group & 15) * ((2 if format.bits < 4 else 1) * code - int(group >> 4))
            assert weights[output, k] == np.float32(integer) * scales[k // format.span]


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_what_is_packed_comes_back_whole_or_in_slices(format):
    codes = random_codes(format, format.outputs)
    data = layout.pack(format, codes)
    for part, same in zip(layout.unpack(format, data.tobytes()), codes, strict=True):
        assert part.dtype == same.dtype and (part == same).all()
    slices = [slice(start, start + 16) for start in range(0, format.outputs, 16)]
    packed = [layout.pack(format, Codes(*(part[rows] for part in codes))) for rows in slices]
    assert (np.concatenate(packed) == data).all()
    for rows, piece in zip(slices, packed, strict=True):
        for part, same in zip(layout.unpack(format, piece, rows.start), codes, strict=True):
            assert (part == same[rows]).all()


def test_what_pads_a_panel_is_zero():
    """So that the kernels' padding gives zeros, and the same matrix the same bytes."""
    format = LinearFormat(100, 3, 4, 32, 128)
    codes = random_codes(format, 3)
    padded = Codes(*(np.pad(part, ((0, 13), (0, 0))) for part in codes))
    assert (layout.pack(format, codes) == layout.pack(dataclasses.replace(format, outputs=16), padded)).all()


def product(format: LinearFormat, matrix: layout.NBits) -> np.ndarray:
    """The matrix as ONNX Runtime has it: the unit matrix times it."""
    values = {"x": None, "codes": matrix.codes, "scales": matrix.scales.reshape(-1), "zeros": matrix.zeros.reshape(-1)}
    inputs = [
        ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, format.inputs])),
        *(ir.Value(name=name, const_value=ir.tensor(array)) for name, array in values.items() if array is not None),
    ]
    sizes = {"K": format.inputs, "N": format.outputs, "bits": matrix.bits, "block_size": matrix.block}
    attributes = [ir.convenience.convert_attribute(key, value) for key, value in sizes.items()]
    node = ir.Node("com.microsoft", "MatMulNBits", inputs, attributes, num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs[:1], node.outputs, nodes=[node], initializers=inputs[1:], opset_imports={"": 21, "com.microsoft": 1}
    )
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(format.inputs, dtype=np.float32)})[0].T


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_matmulnbits_has_the_same_weights_to_the_bit(format, monkeypatch):
    codes = random_codes(format, format.outputs)
    data = layout.pack(format, codes)
    matrix = layout.to_matmulnbits(format, data)
    assert matrix.bits == (8 if format.bits == 8 else 4) and matrix.block <= 256 and format.group % matrix.block == 0
    assert (product(format, matrix) == layout.dequantize(format, codes)).all()
    monkeypatch.setattr(layout, "_AT_ONCE", 1)  # a panel at a time
    for part, same in zip(layout.to_matmulnbits(format, data), matrix, strict=True):
        assert np.array_equal(part, same)


def test_another_layout_takes_little_memory_beside_itself(monkeypatch):
    monkeypatch.setattr(layout, "_AT_ONCE", 1 << 16)
    format = LinearFormat(2048, 4096, 4, 32, 2048)
    data = layout.pack(format, random_codes(format, format.outputs))
    tracemalloc.start()
    try:
        matrix = layout.to_matmulnbits(format, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < matrix.codes.nbytes + matrix.scales.nbytes + matrix.zeros.nbytes + (1 << 20)


@pytest.mark.parametrize("scale", [1 + 2**-23, -(1 + 2**-21), 3e38, np.inf, np.nan, 1e-45 * 3])
def test_a_scale_that_is_not_exact_any_more_is_refused(scale):
    format = LinearFormat(64, 16, 4, 32, 64)
    codes = random_codes(format, 16)
    codes.multipliers[7, 1], codes.scales[7, 0] = 15, scale
    data = layout.pack(format, codes)
    if abs(scale) == np.float32(1e-45 * 3):  # denormal, but exact
        assert layout.to_matmulnbits(format, data).scales[7, 1] == np.float32(scale) * 15
        return
    with pytest.raises(BundleError, match="not exact"):
        layout.to_matmulnbits(format, data)


@pytest.mark.parametrize("change", [-1, 1, 64])
def test_bytes_that_are_not_the_matrix_are_refused(change):
    format = LinearFormat(128, 40, 4, 32, 128)
    data = layout.pack(format, random_codes(format, 40)).tobytes()
    data = data[:change] if change < 0 else data + bytes(change)
    for read in (layout.unpack, layout.to_matmulnbits):
        with pytest.raises(BundleError):
            read(format, data)
    whole = layout.pack(format, random_codes(format, 40)).tobytes()
    for start in (8, 16, 48, -16):  # not a panel's, or panels that are not there
        with pytest.raises(BundleError):
            layout.unpack(format, whole, start)
    with pytest.raises(BundleError):
        layout.unpack(format, b"")


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": 0}, {"inputs": (1 << 20) + 1}, {"inputs": -64}, {"inputs": 1024.0}, {"outputs": 0},
        {"outputs": (1 << 26) + 1}, {"outputs": True}, {"bits": 0}, {"bits": 1}, {"bits": 5}, {"bits": 16},
        {"group": 0}, {"group": 16}, {"group": 48}, {"group": -32}, {"group": 2048}, {"group": 1 << 70},
        {"span": 0}, {"span": 32}, {"span": 96}, {"span": 1088}, {"span": -64}, {"span": None}, {"bits": 8},
        {"inputs": 1 << 18, "span": 1 << 17}, {"rotated": 1}, {"rotated": 2}, {"rotated": -1}, {"rotated": True},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_cannot_be_a_matrix(wrong):
    format = LinearFormat(1000, 100, 4, 32, 1024)
    assert format.check() is format
    bad = dataclasses.replace(format, **wrong)
    assert bad.problem()
    with pytest.raises(BundleError):
        bad.check()
    with pytest.raises(BundleError):
        layout.to_matmulnbits(bad, b"")
