"""torch's operators written as ONNX's (opset 17): one function each, of the arguments by name.

Only the batch is open; every other length is a number by the time it comes here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shoal.runtime.errors import ConvertError

from ..split.graph import Node

OPSET = 17
WRITERS: dict[str, Callable[..., Any]] = {}
_TYPES = {torch.float32: 1, torch.int32: 6, torch.int64: 7, torch.bool: 9, torch.float64: 11}
_END = 2**63 - 1


class Builder:
    """Nodes as they are written. `names` has, for each node of torch, its value (a list of several, None for a
    length); `batch` is a value that was made lately and whose first axis is the batch."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.names: dict[Any, Any] = {}
        self.batch = ""
        self._node: Any = None
        self._count = 0

    def call(self, node: Any) -> None:
        """Writes a node of torch's graph."""
        self._node, target = node, node.target
        if not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            self.names[node] = None  # of lengths only torch's own results are used
            return
        if getattr(target, "__name__", "") == "getitem":
            self.names[node] = self.names[node.args[0]][node.args[1]]
            return
        schema = getattr(target, "_schema", None)
        name = schema.name.removeprefix("aten::") if schema else str(target)
        plain = name.removesuffix("_")
        if schema is None or plain not in WRITERS:
            raise self.refuse(f"It calls {name}, which is not known here.")
        arguments = {}
        for i, argument in enumerate(schema.arguments):
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            arguments[argument.name] = self._plain(value)
        shape, first = self.shape(node), len(self.nodes)
        made = WRITERS[plain](self, arguments, node.meta["val"])
        if any(made in one.outputs for one in self.nodes[first:]):  # of several nodes the last has torch's name
            self.nodes[first:] = [_renamed(one, made, node.name) for one in self.nodes[first:]]
            made = node.name
        self.names[node] = made
        if name != plain:  # in place: who reads that tensor later reads this
            self.names[node.args[0]] = self.names[node]
        if isinstance(self.names[node], str) and shape and not isinstance(shape[0], int):
            self.batch = self.names[node]

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """A node; its value, or the list of its values. What it is called tells where in the module it is."""
        stack = [path for path, _ in (self._node.meta.get("nn_module_stack") or {}).values() if path]
        made = [self._fresh() for _ in range(outputs)]
        name = f"{stack[-1]}/{made[0]}" if stack else made[0]
        self.nodes.append(Node(name, op, inputs, tuple(made), attributes))
        return made if outputs > 1 else made[0]

    def tensor(self, array: Any, name: str = "") -> str:
        """A constant or, with a name, a weight."""
        name = name or self._fresh()
        self.tensors[name] = np.asarray(array)
        return name

    def lengths(self, *numbers: int) -> str:
        return self.tensor(np.array(numbers, np.int64))

    def number(self, value: Any) -> str:
        return value if isinstance(value, str) else self.tensor(np.float32(value))

    def shape(self, node: Any) -> Sequence[Any]:
        value = node.meta.get("val")
        return value.shape if isinstance(value, torch.Tensor) else ()

    def input(self, i: int = 0) -> Any:
        """What torch knows of an argument: its shape and type."""
        return self._node.args[i].meta["val"]

    def refuse(self, why: str) -> ConvertError:
        stack = [path for path, _ in (self._node.meta.get("nn_module_stack") or {}).values()]
        what = f"The module's part {stack[-1] if stack and stack[-1] else '(itself)'!r} cannot be written in ONNX."
        return ConvertError(what, why, "Use other layers there, or export it otherwise and give the ONNX file.")

    def _fresh(self) -> str:
        self._count += 1
        name = f"{self._node.name if self._node else 'tensor'}.{self._count}"
        return self._fresh() if name in self.tensors else name

    def _plain(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return self.names[value]
        return [self._plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def writer(*names: str) -> Callable[[Callable], Callable]:
    def known(function: Callable) -> Callable:
        WRITERS.update(dict.fromkeys(names, function))
        return function

    return known


def _same(b, a, out):
    return next(iter(a.values()))


def _simple(op: str, **attributes: Any) -> Callable:
    return lambda b, a, out: b.add(op, next(iter(a.values())), **attributes)


def _pair(op: str) -> Callable:
    def write(b, a, out):
        first, second = list(a.values())[:2]
        if a.get("alpha", 1) != 1:
            second = b.add("Mul", b.number(second), b.number(a["alpha"]))
        return b.add(op, b.number(first), b.number(second))

    return write


WRITERS |= {
    **dict.fromkeys(("alias", "contiguous", "clone", "detach", "lift_fresh_copy", "dropout", "feature_dropout"), _same),
    "relu": _simple("Relu"), "sigmoid": _simple("Sigmoid"), "tanh": _simple("Tanh"), "exp": _simple("Exp"),
    "log": _simple("Log"), "sqrt": _simple("Sqrt"), "abs": _simple("Abs"), "neg": _simple("Neg"),
    "round": _simple("Round"), "floor": _simple("Floor"), "ceil": _simple("Ceil"), "sign": _simple("Sign"),
    "erf": _simple("Erf"), "reciprocal": _simple("Reciprocal"), "hardswish": _simple("HardSwish"),
    "sin": _simple("Sin"), "cos": _simple("Cos"), "softsign": _simple("Softsign"),
    "hardsigmoid": _simple("HardSigmoid", alpha=1 / 6, beta=0.5), "logical_not": _simple("Not"),
    "add": _pair("Add"), "sub": _pair("Sub"), "mul": _pair("Mul"), "div": _pair("Div"), "pow": _pair("Pow"),
    "maximum": _pair("Max"), "minimum": _pair("Min"), "matmul": _pair("MatMul"), "mm": _pair("MatMul"),
    "bmm": _pair("MatMul"), "gt": _pair("Greater"), "ge": _pair("GreaterOrEqual"), "lt": _pair("Less"),
    "le": _pair("LessOrEqual"), "eq": _pair("Equal"),
    "square": lambda b, a, out: b.add("Mul", a["self"], a["self"]),
    "rsqrt": lambda b, a, out: b.add("Reciprocal", b.add("Sqrt", a["self"])),
    "silu": lambda b, a, out: b.add("Mul", a["self"], b.add("Sigmoid", a["self"])),
    "mish": lambda b, a, out: b.add("Mul", a["self"], b.add("Tanh", b.add("Softplus", a["self"]))),
    "rsub": lambda b, a, out: b.add("Sub", b.number(a["other"]), a["self"]),
    "leaky_relu": lambda b, a, out: b.add("LeakyRelu", a["self"], alpha=float(a["negative_slope"])),
    "elu": lambda b, a, out: b.add("Elu", a["self"], alpha=float(a["alpha"])),
    "where": lambda b, a, out: b.add("Where", a["condition"], b.number(a["self"]), b.number(a["other"])),
    "permute": lambda b, a, out: b.add("Transpose", a["self"], perm=[axis % out.ndim for axis in a["dims"]]),
    "cat": lambda b, a, out: b.add("Concat", *a["tensors"], axis=a["dim"]),
    "unsqueeze": lambda b, a, out: b.add("Unsqueeze", a["self"], b.lengths(a["dim"] % out.ndim)),
    "pixel_shuffle": lambda b, a, out: b.add("DepthToSpace", a["self"], blocksize=a["upscale_factor"], mode="CRD"),
}  # fmt: skip


@writer("relu6", "hardtanh", "clamp", "clamp_min", "clamp_max")
def _clamp(b, a, out):
    low = 0 if "min" not in a and "min_val" not in a and "max" not in a else a.get("min", a.get("min_val"))
    high = 6 if "min" not in a and "min_val" not in a and "max" not in a else a.get("max", a.get("max_val"))
    return b.add("Clip", a["self"], "" if low is None else b.number(low), *([] if high is None else [b.number(high)]))


@writer("gelu")
def _gelu(b, a, out):
    x = a["self"]
    if a["approximate"] == "tanh":
        cube = b.add("Mul", b.add("Mul", x, b.add("Mul", x, x)), b.number(0.044715))
        inner = b.add("Tanh", b.add("Mul", b.add("Add", x, cube), b.number(math.sqrt(2 / math.pi))))
    else:
        inner = b.add("Erf", b.add("Div", x, b.number(math.sqrt(2))))
    return b.add("Mul", b.add("Mul", x, b.add("Add", inner, b.number(1))), b.number(0.5))


@writer("prelu")
def _prelu(b, a, out):
    slope = a["weight"] if out.ndim < 3 else b.add("Reshape", a["weight"], b.lengths(-1, *[1] * (out.ndim - 2)))
    return b.add("PRelu", a["self"], slope)


@writer("softplus")
def _softplus(b, a, out):
    if a["beta"] != 1:
        raise b.refuse("Its softplus has a beta.")
    return b.add("Softplus", a["self"])


@writer("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(b, a, out):
    return b.add("LogSoftmax" if "log" in str(b._node.target) else "Softmax", a["self"], axis=a["dim"])


@writer("conv1d", "conv2d", "conv3d")
def _conv(b, a, out):
    n = out.ndim - 2
    weight = b.input(1).shape
    padding = a["padding"]
    if padding == "valid":
        padding = [0] * n
    if padding == "same":  # of an odd number of zeros the last side gets one more
        whole = [d * (k - 1) for d, k in zip(_each(a["dilation"], n), weight[2:], strict=True)]
        pads = [one // 2 for one in whole] + [one - one // 2 for one in whole]
    else:
        pads = _each(padding, n) * 2
    bias = [] if a["bias"] is None else [a["bias"]]
    return b.add("Conv", a["input"], a["weight"], *bias, kernel_shape=[int(k) for k in weight[2:]], pads=pads,
                 strides=_each(a["stride"], n), dilations=_each(a["dilation"], n), group=a["groups"])  # fmt: skip


@writer("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(b, a, out):
    n = out.ndim - 2
    bias = [] if a["bias"] is None else [a["bias"]]
    return b.add("ConvTranspose", a["input"], a["weight"], *bias, kernel_shape=[int(k) for k in b.input(1).shape[2:]],
                 pads=_each(a["padding"], n) * 2, strides=_each(a["stride"], n), dilations=_each(a["dilation"], n),
                 group=a["groups"], output_padding=_each(a["output_padding"], n))  # fmt: skip


@writer("batch_norm")
def _batch_norm(b, a, out):
    if a["running_mean"] is None or a["training"]:
        raise b.refuse("Its batch norm keeps no running means: what it gives depends on the whole batch.")
    channels = out.shape[1]
    scale = a["weight"] or b.tensor(np.ones(channels, np.float32))
    shift = a["bias"] or b.tensor(np.zeros(channels, np.float32))
    return b.add("BatchNormalization", a["input"], scale, shift, a["running_mean"], a["running_var"],
                 epsilon=float(a["eps"]), momentum=1 - float(a["momentum"]))  # fmt: skip


@writer("layer_norm")
def _layer_norm(b, a, out):
    shape = a["normalized_shape"]
    scale = a["weight"] or b.tensor(np.ones(shape, np.float32))
    shift = [] if a["bias"] is None else [a["bias"]]
    return b.add("LayerNormalization", a["input"], scale, *shift, axis=-len(shape), epsilon=float(a["eps"]))


@writer("group_norm")
def _group_norm(b, a, out):
    groups, one = a["num_groups"], [1] * (out.ndim - 2)
    flat = b.add("Reshape", a["input"], b.lengths(0, groups, -1))
    scale, shift = b.tensor(np.ones(groups, np.float32)), b.tensor(np.zeros(groups, np.float32))
    normed = b.add("InstanceNormalization", flat, scale, shift, epsilon=float(a["eps"]))
    x = b.add("Reshape", normed, b.lengths(-1, *out.shape[1:]))
    for op, key in (("Mul", "weight"), ("Add", "bias")):
        if a[key] is not None:
            x = b.add(op, x, b.add("Reshape", a[key], b.lengths(-1, *one)))
    return x


@writer("linear")
def _linear(b, a, out):
    if out.ndim == 2:
        bias = [] if a["bias"] is None else [a["bias"]]
        return b.add("Gemm", a["input"], a["weight"], *bias, transB=1)
    y = b.add("MatMul", a["input"], b.add("Transpose", a["weight"], perm=[1, 0]))
    return y if a["bias"] is None else b.add("Add", y, a["bias"])


@writer("addmm")
def _addmm(b, a, out):
    return b.add("Gemm", a["mat1"], a["mat2"], a["self"], alpha=float(a["alpha"]), beta=float(a["beta"]))


@writer("scaled_dot_product_attention")
def _attention(b, a, out):
    query, key, value, width = a["query"], a["key"], a["value"], b.input(0).shape[-1]
    if a["is_causal"] or a.get("enable_gqa") or (a["attn_mask"] and b.input(3).dtype == torch.bool):
        raise b.refuse("Its attention is causal, grouped or masked by truths.")
    axes = list(range(out.ndim))
    scaled = b.add("Mul", query, b.number(a["scale"] or 1 / math.sqrt(width)))
    scores = b.add("MatMul", scaled, b.add("Transpose", key, perm=[*axes[:-2], axes[-1], axes[-2]]))
    if a["attn_mask"]:
        scores = b.add("Add", scores, a["attn_mask"])
    return b.add("MatMul", b.add("Softmax", scores, axis=-1), value)


@writer("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pool(b, a, out):
    n = out.ndim - 2
    kernel = _each(a["kernel_size"], n)
    said = {"kernel_shape": kernel, "strides": _each(a["stride"] or kernel, n), "pads": _each(a["padding"], n) * 2,
            "ceil_mode": int(a["ceil_mode"])}  # fmt: skip
    if "dilation" in a:
        return b.add("MaxPool", a["self"], dilations=_each(a["dilation"], n), **said)
    if a.get("divisor_override"):
        raise b.refuse("Its pool has a divisor of its own.")
    return b.add("AveragePool", a["self"], count_include_pad=int(a["count_include_pad"]), **said)


@writer("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive_pool(b, a, out):
    before, after = b.input().shape[2:], out.shape[2:]
    if all(length == 1 for length in after):
        return b.add("GlobalAveragePool", a["self"])
    if any(one % other for one, other in zip(before, after, strict=True)):
        raise b.refuse(f"Its pool makes {tuple(after)} of {tuple(before)}, in parts that are not equal.")
    kernel = [one // other for one, other in zip(before, after, strict=True)]
    return b.add("AveragePool", a["self"], kernel_shape=kernel, strides=kernel)


@writer("mean", "amax", "amin")
def _reduce(b, a, out):
    op = {"mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin"}[b._node.target._schema.name[6:]]
    axes = {"axes": list(a["dim"])} if a.get("dim") else {}
    return b.add(op, a["self"], keepdims=int(a.get("keepdim", False)), **axes)


@writer("sum")
def _sum(b, a, out):
    axes = [b.lengths(*a["dim"])] if a.get("dim") else []
    return b.add("ReduceSum", a["self"], *axes, keepdims=int(a.get("keepdim", False)))


@writer("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze")
def _reshape(b, a, out):
    return b.add("Reshape", next(iter(a.values())), b.lengths(*_lengths(b, out)))


@writer("expand", "expand_as")
def _expand(b, a, out):
    before = b.input().shape
    wanted = []
    for i, length in enumerate(reversed(out.shape), 1):
        was = before[-i] if i <= len(before) else 1
        grows = not isinstance(length, int) and isinstance(was, int)
        wanted.append(None if grows else length if isinstance(length, int) else 1)
    wanted.reverse()
    if None not in wanted:
        return b.add("Expand", a["self"], b.lengths(*wanted))
    if wanted.count(None) > 1 or wanted[0] is not None:
        raise b.refuse("It expands another axis than the first to the batch.")
    rows = b.add("Shape", b.batch, end=1)
    return b.add("Expand", a["self"], b.add("Concat", rows, b.lengths(*wanted[1:]), axis=0))


@writer("transpose", "t")
def _transpose(b, a, out):
    axes = list(range(out.ndim))
    one, other = a.get("dim0", 0), a.get("dim1", 1)
    axes[one], axes[other] = axes[other], axes[one]
    return b.add("Transpose", a["self"], perm=axes)


@writer("stack")
def _stack(b, a, out):
    axis = b.lengths(a["dim"] % out.ndim)
    return b.add("Concat", *(b.add("Unsqueeze", one, axis) for one in a["tensors"]), axis=a["dim"] % out.ndim)


@writer("split", "split_with_sizes", "chunk")
def _split(b, a, out):
    axis = a["dim"]
    if len(out) == 1:
        return [a["self"]]
    return b.add("Split", a["self"], b.lengths(*(int(one.shape[axis]) for one in out)), axis=axis, outputs=len(out))


@writer("slice")
def _slice(b, a, out):
    start, end = a["start"] or 0, _END if a["end"] is None else a["end"]
    if start == 0 and end == _END and a["step"] == 1:
        return a["self"]
    return b.add("Slice", a["self"], b.lengths(start), b.lengths(end), b.lengths(a["dim"]), b.lengths(a["step"]))


@writer("select")
def _select(b, a, out):
    return b.add("Gather", a["self"], b.tensor(np.int64(a["index"])), axis=a["dim"])


@writer("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def _pad(b, a, out):
    mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}.get(a.get("mode", "constant"), "constant")
    if mode == "wrap":
        raise b.refuse("It pads in a circle.")
    name = b._node.target._schema.name
    mode = "reflect" if "reflection" in name else "edge" if "replication" in name else mode
    given, pads = a.get("pad") or a.get("padding"), [0] * 2 * out.ndim
    for i in range(len(given) // 2):
        pads[out.ndim - 1 - i], pads[2 * out.ndim - 1 - i] = given[2 * i], given[2 * i + 1]
    value = [b.number(a["value"])] if mode == "constant" and a.get("value") else []
    return b.add("Pad", a["self"], b.lengths(*pads), *value, mode=mode)


@writer("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d")
def _upsample(b, a, out):
    name = b._node.target._schema.name
    mode = "nearest" if "nearest" in name else "cubic" if "cubic" in name else "linear"
    if mode == "nearest":
        said = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        way = "align_corners" if a["align_corners"] else "pytorch_half_pixel"
        said = {"coordinate_transformation_mode": way, "cubic_coeff_a": -0.75}
    if a.get("scale_factors"):
        scales = b.tensor(np.array([1, 1, *a["scale_factors"]], np.float32))
        return b.add("Resize", a["input"], "", scales, mode=mode, **said)
    kept = b.add("Shape", a["input"], end=2)
    sizes = b.add("Concat", kept, b.lengths(*(int(length) for length in out.shape[2:])), axis=0)
    return b.add("Resize", a["input"], "", "", sizes, mode=mode, **said)


@writer("to", "_to_copy", "type_as")
def _cast(b, a, out):
    return a["self"] if b.input().dtype == out.dtype else b.add("Cast", a["self"], to=_TYPES[out.dtype])


def _renamed(node: Node, old: str, new: str) -> Node:
    inputs, outputs = (tuple(new if one == old else one for one in names) for names in (node.inputs, node.outputs))
    return replace(node, name=node.name.replace(old, new), inputs=inputs, outputs=outputs)


def _each(value: Any, n: int) -> list[int]:
    """A number for each of n axes."""
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(one) for one in (listed if len(listed) == n else listed * n)]


def _lengths(b: Builder, out: torch.Tensor) -> list[int]:
    """A shape for Reshape; the axis that grows with the batch is -1."""
    lengths = [length if isinstance(length, int) else -1 for length in out.shape]
    if lengths.count(-1) > 1:
        raise b.refuse("Two axes grow with the batch.")
    return lengths
