"""Each ONNX operator in torch against ONNX Runtime, on seeded numbers, and that gradients reach its weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'shoal[train]'")

from onnx import numpy_helper, parser  # noqa: E402

from shoal.converters.sources.onnx import graph  # noqa: E402
from shoal.converters.split.network import Network  # noqa: E402
from shoal.converters.split.write import write  # noqa: E402
from shoal.runtime.errors import ConvertError  # noqa: E402
from shoal.runtime.session import open_graph  # noqa: E402

IMAGE, FLAT, THREE = (2, 4, 9, 11), (2, 12), (2, 5, 8)
CASES = [
    # opset, shape of x, other inputs and constants, nodes that make y
    (9, IMAGE, "float[6, 4, 3, 3] w, float[6] b", "y = Conv <pads = [1, 0, 2, 1], strides = [2, 1]> (x, w, b)"),
    (11, IMAGE, "float[8, 2, 3, 3] w", "y = Conv <group = 2, strides = [3, 2], auto_pad = 'SAME_UPPER'> (x, w)"),
    (11, IMAGE, "float[4, 1, 3, 2] w", "y = Conv <group = 4, strides = [2, 2], auto_pad = 'SAME_LOWER'> (x, w)"),
    (11, THREE, "float[6, 5, 3] w", "y = Conv <auto_pad = 'VALID'> (x, w)"),
    (11, IMAGE, "float[4, 3, 3, 3] w, float[6] b",
     "y = ConvTranspose <group = 2, strides = [2, 3], pads = [1, 0, 0, 1], output_padding = [1, 0]> (x, w, b)"),
    (11, IMAGE, "float[4, 3, 3, 3] w", "y = ConvTranspose <strides = [2, 2], auto_pad = 'SAME_UPPER'> (x, w)"),
    (11, IMAGE, "float[4, 3, 2, 2] w", "y = ConvTranspose <strides = [2, 2], output_shape = [18, 23]> (x, w)"),
    (9, IMAGE, "float[4] s, float[4] b, float[4] m, float[4] v",
     "p = Exp (v) y = BatchNormalization <epsilon = 0.01> (x, s, b, m, p)"),
    (11, IMAGE, "float[4] s, float[4] b", "y = InstanceNormalization (x, s, b)"),
    (17, THREE, "float[8] s, float[8] b", "y = LayerNormalization <epsilon = 0.001> (x, s, b)"),
    (17, THREE, "float[5, 8] s", "y = LayerNormalization <axis = 1> (x, s)"),
    (21, IMAGE, "float[4] s, float[4] b", "y = GroupNormalization <num_groups = 2> (x, s, b)"),
    (18, IMAGE, "float[2] s, float[2] b", "y = GroupNormalization <num_groups = 2> (x, s, b)"),
    (11, IMAGE, "", "y = LRN <size = 3, alpha = 0.1, beta = 0.6, bias = 2.0> (x)"),
    (11, IMAGE, "", "y = LpNormalization <axis = 1, p = 1> (x)"),
    (9, IMAGE, "", "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)"),
    (11, IMAGE, "", "y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 0, 1], ceil_mode = 1> (x)"),
    (11, IMAGE, "", "y = MaxPool <kernel_shape = [2, 2], strides = [3, 3], ceil_mode = 1, pads = [0, 0, 1, 1]> (x)"),
    (11, IMAGE, "", "y = MaxPool <kernel_shape = [3, 3], dilations = [2, 2]> (x)"),
    (11, IMAGE, "", "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], auto_pad = 'SAME_LOWER'> (x)"),
    (11, IMAGE, "", "y = AveragePool <kernel_shape = [3, 2], strides = [2, 2]> (x)"),
    (11, IMAGE, "", "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 0, 1]> (x)"),
    (11, IMAGE, "", "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], "
                    "count_include_pad = 1> (x)"),
    (11, IMAGE, "", "y = AveragePool <kernel_shape = [2, 4], strides = [2, 3], ceil_mode = 1> (x)"),
    (19, IMAGE, "", "y = AveragePool <kernel_shape = [2, 4], strides = [2, 3], ceil_mode = 1, pads = [1, 1, 1, 1], "
                    "count_include_pad = 1> (x)"),
    (11, IMAGE, "", "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], auto_pad = 'SAME_UPPER'> (x)"),
    (11, IMAGE, "", "y = GlobalAveragePool (x)"),
    (11, IMAGE, "", "y = GlobalMaxPool (x)"),
    (11, FLAT, "float[7, 12] w, float[7] b", "y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)"),
    (11, FLAT, "float[2, 7] w", "y = Gemm <transA = 1> (x, w)"),
    (9, IMAGE, "float[11, 3] w", "y = MatMul (x, w)"),
    (11, IMAGE, "", "y = Softmax <axis = 2> (x)"),
    (13, IMAGE, "", "y = Softmax <axis = 2> (x)"),
    (11, FLAT, "", "y = LogSoftmax (x)"),
    (13, FLAT, "", "y = LogSoftmax (x)"),
    (11, IMAGE, "", "y = Dropout <ratio = 0.3> (x)"),
    (13, IMAGE, "", "r = Constant <value_float = 0.5> () y = Dropout (x, r)"),
    # Activations
    *((20, FLAT, "", f"y = {node} (x)") for node in (
        "Relu", "Sigmoid", "Tanh", "HardSigmoid <alpha = 0.3, beta = 0.4>", "HardSwish", "LeakyRelu <alpha = 0.2>",
        "Elu <alpha = 1.5>", "Selu", "Celu <alpha = 2.0>", "Softplus", "Softsign", "Gelu",
        "Gelu <approximate = 'tanh'>", "Mish",
        "Abs", "Neg", "Ceil", "Floor", "Round", "Sign", "Reciprocal", "Exp", "Erf", "Sin", "Cos", "Identity")),
    (11, FLAT, "", "a = Abs (x) y = Sqrt (a)"),
    (11, FLAT, "", "a = Abs (x) y = Log (a)"),
    (9, IMAGE, "float[4, 1, 1] s", "y = PRelu (x, s)"),
    (10, FLAT, "", "y = Clip <min = -0.5, max = 0.7> (x)"),
    (11, FLAT, "", "l = Constant <value_float = 0.1> () y = Clip (x, l)"),
    (13, FLAT, "", "h = Constant <value_float = 0.3> () y = Clip (x, , h)"),
    # Two by two
    *((13, FLAT, "float[12] w", f"y = {op} (x, w)") for op in (
        "Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")),
    (13, FLAT, "float[12] w", "y = Mod <fmod = 1> (x, w)"),
    (13, FLAT, "", "e = Constant <value_float = 2.0> () y = Pow (x, e)"),
    (13, FLAT, "float[12] w", "a = Abs (x) y = Pow (a, w)"),
    *((16, FLAT, "float[12] w", f"c = {op} (x, w) y = Where (c, x, w)") for op in (
        "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")),
    (13, FLAT, "float[12] w", "a = Greater (x, w) b = Not (a) c = Less (x, w) d = Or (a, b) e = And (d, c) "
                               "y = Where (e, x, w)"),
    # Reductions
    *((13, IMAGE, "", f"y = {op} <axes = [1, -1], keepdims = 0> (x)") for op in (
        "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSumSquare",
        "ReduceLogSumExp")),
    (11, IMAGE, "", "y = ReduceSum <axes = [2]> (x)"),
    (18, IMAGE, "", "a = Constant <value_ints = [2, 3]> () y = ReduceMean <keepdims = 0> (x, a)"),
    (13, IMAGE, "", "a = Constant <value_ints = [1]> () y = ReduceSum (x, a)"),
    (18, IMAGE, "", "y = ReduceMax <noop_with_empty_axes = 1> (x)"),
    (13, IMAGE, "", "a = ArgMax <axis = 2> (x) y = Cast <to = 1> (a)"),
    (13, IMAGE, "", "a = ArgMin <axis = 1, keepdims = 0> (x) y = Cast <to = 1> (a)"),
    (11, FLAT, "", "k = Constant <value_ints = [3]> () y, i = TopK (x, k)"),
    (11, FLAT, "", "k = Constant <value_ints = [1]> () a = Squeeze <axes = [0]> (k) y = CumSum <exclusive = 1> (x, a)"),
    # Shapes
    (9, IMAGE, "", "s = Constant <value = int64[3] {0, -1, 11}> () y = Reshape (x, s)"),
    (13, IMAGE, "", "y = Flatten <axis = 2> (x)"),
    (13, IMAGE, "", "y = Flatten <axis = -1> (x)"),
    (13, IMAGE, "", "y = Transpose <perm = [0, 2, 3, 1]> (x)"),
    (11, IMAGE, "", "a = Unsqueeze <axes = [0, 2]> (x) y = Squeeze <axes = [0]> (a)"),
    (13, IMAGE, "", "n = Constant <value_ints = [-1, 2]> () a = Unsqueeze (x, n) m = Constant <value_ints = [2]> () "
                    "y = Squeeze (a, m)"),
    (11, IMAGE, "", "a, b = Split <axis = 1, split = [1, 3]> (x) c = ReduceMax <axes = [1]> (b) y = Add (a, c)"),
    (13, IMAGE, "", "s = Constant <value_ints = [3, 1]> () a, y = Split <axis = 1> (x, s)"),
    (18, IMAGE, "", "a, b, y = Split <axis = 3, num_outputs = 3> (x)"),
    (9, IMAGE, "", "y = Slice <starts = [1, -5], ends = [3, 100], axes = [1, 3]> (x)"),
    (13, IMAGE, "", "s = Constant <value_ints = [-1, 7]> () e = Constant <value_ints = [-99, 0]> () "
                    "a = Constant <value_ints = [2, -1]> () p = Constant <value_ints = [-2, -1]> () "
                    "y = Slice (x, s, e, a, p)"),
    (11, IMAGE, "", "i = Constant <value = int64[2, 2] {0, -1, 2, 1}> () y = Gather <axis = 1> (x, i)"),
    (11, FLAT, "", "i = Constant <value = int64[2, 3] {0, -1, 2, 1, 1, 5}> () y = GatherElements <axis = 1> (x, i)"),
    (11, FLAT, "float[2, 3] w", "y = Concat <axis = -1> (x, w, x)"),
    (13, IMAGE, "", "s = Shape (x) a = Constant <value_ints = [0]> () b = Constant <value_ints = [2]> () "
                    "n = Slice (s, a, b) m = Constant <value_ints = [-1]> () t = Concat <axis = 0> (n, m) "
                    "y = Reshape (x, t)"),
    (15, IMAGE, "", "s = Shape <start = 1, end = -1> (x) y = Cast <to = 1> (s)"),
    (13, FLAT, "", "s = Constant <value_ints = [3, 1, 12]> () y = Expand (x, s)"),
    (13, FLAT, "", "s = Constant <value_ints = [1, 3]> () y = Tile (x, s)"),
    (13, FLAT, "", "s = Shape (x) c = ConstantOfShape <value = float[1] {2.5}> (s) y = Mul (x, c)"),
    (13, FLAT, "", "a = Constant <value_int = 0> () b = Constant <value_int = 12> () d = Constant <value_int = 1> () "
                   "r = Range (a, b, d) f = Cast <to = 1> (r) y = Add (x, f)"),
    (13, FLAT, "", "a = ArgMax <axis = 1, keepdims = 0> (x) d = Constant <value_int = 12> () "
                   "v = Constant <value = float[2] {-1.0, 3.0}> () y = OneHot (a, d, v)"),
    (14, IMAGE, "", "k = Constant <value_int = 1> () y = Trilu <upper = 0> (x, k)"),
    (12, FLAT, "float[12, 3] w", "y = Einsum <equation = 'bi,ij->bj'> (x, w)"),
    (11, IMAGE, "", "y = DepthToSpace <blocksize = 2> (x)"),
    (11, IMAGE, "", "y = DepthToSpace <blocksize = 2, mode = 'CRD'> (x)"),
    (11, (1, 2, 4, 6), "", "y = SpaceToDepth <blocksize = 2> (x)"),
    (10, IMAGE, "", "y = Pad <pads = [0, 0, 1, 2, 0, 0, 3, 0], value = 0.5> (x)"),
    (13, IMAGE, "", "p = Constant <value_ints = [0, 1, -1, 2, 0, 0, 1, -2]> () v = Constant <value_float = 2.0> () "
                    "y = Pad (x, p, v)"),
    *((13, IMAGE, "", f"p = Constant <value_ints = [0, 1, 1, 2, 0, 0, 3, 0]> () y = Pad <mode = '{mode}'> (x, p)")
      for mode in ("reflect", "edge")),
    (19, IMAGE, "", "p = Constant <value_ints = [1, 2, 0, 1]> () a = Constant <value_ints = [2, 3]> () "
                    "y = Pad <mode = 'wrap'> (x, p, , a)"),
    # Resizing
    (9, IMAGE, "", "s = Constant <value = float[4] {1.0, 1.0, 2.0, 2.5}> () y = Upsample (x, s)"),
    (9, IMAGE, "", "s = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> () y = Upsample <mode = 'linear'> (x, s)"),
    (10, IMAGE, "", "s = Constant <value = float[4] {1.0, 1.0, 0.5, 3.0}> () y = Resize (x, s)"),
    *((13, IMAGE, "", "s = Constant <value = float[4] {1.0, 1.0, 1.7, 0.6}> () "
       f"y = Resize <mode = '{mode}', coordinate_transformation_mode = '{way}'> (x, , s)")
      for mode in ("nearest", "linear", "cubic") for way in ("half_pixel", "asymmetric", "align_corners",
                                                             "pytorch_half_pixel")),
    *((13, IMAGE, "", "s = Constant <value = int64[4] {2, 4, 13, 5}> () "
       f"y = Resize <mode = 'nearest', nearest_mode = '{how}'> (x, , , s)")
      for how in ("floor", "ceil", "round_prefer_ceil", "round_prefer_floor")),
    (13, IMAGE, "", "s = Constant <value = int64[4] {2, 4, 13, 5}> () "
                    "y = Resize <mode = 'cubic', cubic_coeff_a = -0.5, exclude_outside = 1> (x, , , s)"),
    (18, IMAGE, "", "s = Constant <value_ints = [13, 20]> () y = Resize <mode = 'linear', axes = [2, 3]> (x, , , s)"),
]  # fmt: skip


def model(opset, shape, weights, body):
    dims = ", ".join(["n", *map(str, shape[1:])])
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[{dims}] x{", " + weights if weights else ""}) => '
    made = parser.parse_model(text + "(float y) {" + body.replace("'", '"') + "}")
    made.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(len(body))
    for value in list(made.graph.input)[1:]:
        size = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        made.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), value.name))
        made.graph.input.remove(value)
    return made.SerializeToString(), rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3][:60]}")
def test_an_operator_is_what_onnx_runtime_does(case):
    data, x = model(*case)
    with open_graph(data, {}, threads=1) as session:
        expected = session.run({"x": x})["y"]
    network = Network(graph(data)).eval()
    made = network(torch.from_numpy(x).requires_grad_())
    assert made.shape == expected.shape
    np.testing.assert_allclose(made.detach().numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    if weights := list(network.parameters()):
        made.sum().backward()
        assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights) or "Where" in case[3]


# What opsets before 11 say in another way: (opset, shape of x, nodes that make y)
OLD = [
    (7, IMAGE, "y = Upsample <mode = 'nearest', scales = [1.0, 1.0, 2.0, 2.0]> (x)"),
    (7, IMAGE, "y = Upsample <mode = 'linear', scales = [1.0, 1.0, 3.0, 2.0]> (x)"),
    (9, IMAGE, "s = Constant <value = float[4] {1.0, 1.0, 2.0, 3.0}> () y = Upsample <mode = 'linear'> (x, s)"),
    (9, IMAGE, "s = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> () y = Upsample (x, s)"),
    (10, IMAGE, "s = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> () y = Resize (x, s)"),
    (10, IMAGE, "s = Constant <value = float[4] {1.0, 1.0, 1.5, 0.6}> () y = Resize <mode = 'linear'> (x, s)"),
    (10, IMAGE, "s = Constant <value = float[4] {1.0, 1.0, 0.5, 0.5}> () y = Resize (x, s)"),
    (7, FLAT, "y = Clip <min = -0.5> (x)"),
    (8, FLAT, "y = Clip <max = 0.2> (x)"),
    (9, FLAT, "y = Clip (x)"),
    (7, IMAGE, "y = Pad <pads = [0, 0, 1, 2, 0, 0, 0, 1], value = 1.5> (x)"),
    (10, IMAGE, "y = Pad <pads = [0, 0, 1, 2, 0, 0, 0, 1], mode = 'reflect'> (x)"),
    (8, IMAGE, "y = Slice <starts = [0, 2], ends = [9, -1]> (x)"),
    (8, IMAGE, "y = Slice <starts = [-3], ends = [9], axes = [3]> (x)"),
    (10, IMAGE, "s = Constant <value = int64[1] {2}> () e = Constant <value = int64[1] {9}> () y = Slice (x, s, e)"),
    (9, FLAT, "y, i = TopK <k = 3> (x)"),
    (10, FLAT, "k = Constant <value = int64[1] {4}> () y, i = TopK (x, k)"),
    (9, FLAT, "i = Constant <value = int64[2, 1] {3, 7}> () u = Constant <value = float[2, 1] {5.0, 6.0}> () "
              "y = Scatter <axis = 1> (x, i, u)"),
    (8, IMAGE, "s = Constant <value = float[4] {1.0, 2.0, 0.5, 1.0}> () y = BatchNormalization (x, s, s, s, s)"),
    (7, IMAGE, "s = Constant <value = float[4] {1.0, 2.0, 0.5, 1.0}> () "
               "y = BatchNormalization <spatial = 1> (x, s, s, s, s)"),
    (7, FLAT, "y = Softmax (x)"),
    (8, IMAGE, "a = MaxPool <kernel_shape = [2, 2]> (x) y = Dropout <ratio = 0.4> (a)"),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "shape", "body"), OLD, ids=[f"{case[0]}-{case[2][:40]}" for case in OLD])
def test_older_opsets_are_raised_to_one_that_can_be_added_to(opset, shape, body):
    """The raised graph is of opset 11, in ONNX Runtime what the old one is there, and what torch makes of it."""
    text = f"""<ir_version: 4, opset_import: ["" : {opset}]>
        g (float[n, {", ".join(map(str, shape[1:]))}] x) => (float[] y) {{ {body} }}"""
    model = parser.parse_model(text.replace("'", '"'))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with open_graph(model.SerializeToString(), {}) as session:
        expected = session.run({"x": x})["y"]
    raised = graph(model.SerializeToString())
    assert raised.opset == 11
    with open_graph(write(raised), {}) as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], expected, atol=1e-6)
    if "Scatter" not in body:  # it is not trained
        with torch.no_grad():
            np.testing.assert_allclose(Network(raised).eval()(torch.from_numpy(x)).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("opset", "body", "said"), [
    (6, "y = Relu (x)", "opset is 6"),
    (7, "s = Constant <value = float[4] {1.0, 2.0, 0.5, 1.0}> () y = BatchNormalization <spatial = 0> (x, s, s, s, s)",
     "BatchNormalization node .* opset 11"),
    (9, "y = Upsample (x)", "Upsample node .* opset 11"),
    (9, "y = Pad (x)", "Pad node .* opset 11"),
    (8, "y = Slice (x)", "Slice node .* opset 11"),
    (8, "y, i = TopK (x)", "TopK node .* opset 11"),
])  # fmt: skip
def test_what_cannot_be_raised_is_named(opset, body, said):
    model = parser.parse_model(f'<ir_version: 4, opset_import: ["" : {opset}]> g (float[n, 4, 9, 11] x) => (float[] y) '
                               f"{{ {body} }}")  # fmt: skip
    with pytest.raises(ConvertError, match=said):
        graph(model.SerializeToString())
