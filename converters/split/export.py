"""Heads as ONNX graphs: an encoder with a choice inside, which an integer input sets at every run.

One graph holds every choice and one set of weights: a choice is a branch of nested `If`s that reads initializers of the
whole graph. Members of an ensemble are added branch by branch; a width reads the first channels of the shared weights
through `Slice`s with constant bounds, and has its own statistics. What stands before the encoder (the first layers of
the teacher) and what follows a decoder comes as a `Network`, whose nodes are written as they are; encoders and decoders
are traced by torch.fx and written operator by operator. All of it is of the opset of the networks in it.
"""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn
from torch.nn import functional as F

from shoal.runtime.errors import ConvertError
from shoal.runtime.split.modes import SCORE

from .bottleneck import Crop, Gdn1
from .graph import Graph
from .network import Network
from .slimmable import Ensemble, Slim, SlimConv2d, SlimNorm, first
from .write import attribute, fold, version

OPSET = 17
_TYPES = {"Shape": ir.DataType.INT64, "Less": ir.DataType.BOOL}  # of what operators give; others fp32


class Writer:
    """A graph in the making: `op` adds a node to the innermost branch, `weight` an initializer to the whole graph."""

    def __init__(self, opset: int = OPSET):
        self.opset = opset
        self.weights: dict[str, ir.Value] = {}
        self._bodies: list[list[ir.Node]] = [[]]
        self._count = 0

    def value(self, name: str = "") -> ir.Value:
        self._count += 1
        return ir.Value(name=name or f"v{self._count}", type=ir.TensorType(ir.DataType.FLOAT))

    def op(self, kind: str, *inputs: ir.Value | None, name: str = "", **attributes) -> ir.Value:
        made = [attribute(key, value) for key, value in attributes.items()]
        found = self.value(name)
        found.type = ir.TensorType(_TYPES.get(kind, ir.DataType.FLOAT))
        node = ir.Node("", kind, inputs, made, outputs=[found], name=f"{kind}.{self._count}")
        self._bodies[-1].append(node)
        return found

    def graph(self, graph: Graph, x: ir.Value, name: str) -> ir.Value:
        """Adds the nodes of a network of one input and one output; its weights begin with `name`."""
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise _refuse(f"{name} has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, not one of each")
        found = {graph.inputs[0].name: x}
        for node in graph.nodes:
            for one in node.inputs:
                if one and one not in found:
                    found[one] = self.weight(f"{name}.{one}", graph.tensors[one])
            made = [ir.Value(name=f"{name}.{one}" if one else "") for one in node.outputs]
            taken = [found[one] if one else None for one in node.inputs]
            held = [attribute(key, value) for key, value in node.attributes.items()]
            self._bodies[-1].append(ir.Node("", node.op, taken, held, outputs=made, name=f"{name}.{node.name}"))
            found.update(zip(node.outputs, made, strict=True))
        return found[graph.outputs[0]]

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        """The initializer `name`, made at its first use."""
        if name not in self.weights:
            array = np.asarray(array, order="C")  # of no axes too
            tensor = ir.tensor(array, name=name)
            self.weights[name] = ir.Value(
                name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
            )
        return self.weights[name]

    @contextlib.contextmanager
    def branch(self) -> Iterator[list[ir.Node]]:
        """Nodes that are made meanwhile are a branch's."""
        body: list[ir.Node] = []
        self._bodies.append(body)
        try:
            yield body
        finally:
            self._bodies.pop()

    def choose(self, condition: ir.Value, then, otherwise) -> ir.Value:
        """`If`: `then` and `otherwise` are called to make a branch each and return what it gives."""
        graphs = []
        for label, make in (("then", then), ("else", otherwise)):
            with self.branch() as body:
                result = self.op("Identity", make())
            graphs.append(ir.Graph([], [result], nodes=body, name=f"{label}.{self._count}"))
        branches = [
            ir.AttrGraph(f"{label}_branch", graph) for label, graph in zip(("then", "else"), graphs, strict=True)
        ]
        node = ir.Node("", "If", [condition], branches, outputs=[self.value()], name=f"If.{self._count}")
        self._bodies[-1].append(node)
        return node.outputs[0]

    def less(self, value: ir.Value, bound: int) -> ir.Value:
        """Whether an int64 is."""
        return self.op("Less", value, self.weight(f"least.{bound}", np.array(bound, np.int64)))

    @property
    def nodes(self) -> list[ir.Node]:
        return self._bodies[0]


def model(writer: Writer, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> bytes:
    """The serialised ModelProto."""
    graph = ir.Graph(inputs, outputs, nodes=writer.nodes, initializers=list(writer.weights.values()),
                     opset_imports={"": writer.opset}, name=name)  # fmt: skip
    made = ir.Model(graph, ir_version=version(writer.opset))
    return ir.serde.serialize_model(made).SerializeToString(deterministic=True)


def head(
    encoder: nn.Module,
    image: Sequence[int],
    latent: Sequence[int],
    *,
    stem: nn.Module | None = None,
    name: str = "image",
    gate: nn.Module | None = None,
) -> bytes:
    """ModelProto of a head: `name` fp32 [n, *image], and `encoder` int64 [] where there are choices, from 1 (beyond the
    last, the last; below 1, the first), to `latent` fp32 [n, *latent]. With a filter as its `gate` also to `score` fp32
    [n], the chance that there is something in a row. Raises ConvertError for a module that cannot be written."""
    writer, inputs = Writer(_opset(stem)), [_port(name, image)]
    x = emit(writer, stem, inputs[0], "stem") if stem is not None else inputs[0]
    choices = getattr(encoder, "choices", 1)
    if choices == 1 and isinstance(encoder, Ensemble):
        encoder = encoder.members[0]
    if choices > 1:
        choice = ir.Value(name="encoder", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        inputs.append(choice)
        if isinstance(encoder, Ensemble):
            y = _ensemble(writer, encoder, x, choice)
        elif isinstance(encoder, Slim):
            y = _slim(writer, encoder, x, choice)
        else:
            raise _refuse(f"{type(encoder).__name__} has choices that are neither members nor widths")
    else:
        y = emit(writer, encoder, x, "encoder")
    outputs = [_shaped(writer.op("Identity", y, name="latent"), latent)]
    if gate is not None:
        chances = writer.op("Softmax", emit(writer, gate, x, "filter"), axis=1)
        something = writer.weight("something", np.array(1, np.int64))
        outputs.append(_shaped(writer.op("Gather", chances, something, axis=1, name=SCORE), ()))
    return model(writer, inputs, outputs, "head")


def network(
    parts: nn.Module | Sequence[nn.Module], inputs: dict[str, Sequence[int]], output: str, shape: Sequence[int]
) -> bytes:
    """ModelProto of a module of one input, by name fp32 [n, ...], or of several one after the other, and one output
    fp32 [n, *shape]."""
    parts = [parts] if isinstance(parts, nn.Module) else list(parts)
    (name, dims), writer = next(iter(inputs.items())), Writer(_opset(*parts))
    x = port = _port(name, dims)
    for at, part in enumerate(parts):
        x = emit(writer, part, x, f"part{at}")
    y = writer.op("Identity", x, name=output)
    return model(writer, [port], [_shaped(y, shape)], output)


def _opset(*parts: nn.Module | None) -> int:
    found = {part.graph.opset for part in parts if isinstance(part, Network)}
    if len(found) > 1:
        raise _refuse(f"Its parts are of opsets {sorted(found)}")
    return found.pop() if found else OPSET


def _port(name: str, dims: Sequence[int]) -> ir.Value:
    return _shaped(ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)), dims)


def _shaped(value: ir.Value, dims: Sequence[int]) -> ir.Value:
    value.shape = ir.Shape(["n", *dims])
    return value


def _ensemble(writer: Writer, encoder: Ensemble, x: ir.Value, choice: ir.Value) -> ir.Value:
    """f_1 always; every further member in the branch of the one before it."""

    def more(so_far: ir.Value, member: int) -> ir.Value:
        def then() -> ir.Value:
            scale = writer.weight(f"scale.{member}", np.array(encoder.scale(member), np.float32))
            found = emit(writer, encoder.members[member - 1], x, f"member.{member}")
            y = writer.op("Add", so_far, writer.op("Mul", scale, found))
            return more(y, member + 1) if member < encoder.choices else y

        return writer.choose(writer.less(choice, member), lambda: so_far, then)

    return more(emit(writer, encoder.members[0], x, "member.1"), 2)


def _slim(writer: Writer, encoder: Slim, x: ir.Value, choice: ir.Value) -> ir.Value:
    """A branch for each width, from the widest; each reads its part of the shared weights."""

    def at(width: int) -> ir.Value:
        if width == 1:
            return _width(writer, encoder, x, 0)
        return writer.choose(
            writer.less(choice, width), lambda: at(width - 1), lambda: _width(writer, encoder, x, width - 1)
        )

    return at(encoder.choices)


def _width(writer: Writer, encoder: Slim, x: ir.Value, at: int) -> ir.Value:
    channels = 0  # of what comes; 0 before the first layer: all
    for index, layer in enumerate(encoder.layers):
        name = f"encoder.{index}"
        if isinstance(layer, SlimConv2d):
            outputs = (
                channels or layer.out_channels if layer.groups > 1 else first(layer.out_channels, encoder.widths[at])
            )
            inputs = 1 if layer.groups > 1 else channels or layer.in_channels
            weight = _part(writer, f"{name}.weight", layer.weight, (outputs, inputs))
            bias = None if layer.bias is None else _part(writer, f"{name}.bias", layer.bias, (outputs,))
            x = _conv(writer, layer, x, weight, bias, outputs if layer.groups > 1 else 1)
            channels = outputs
        elif isinstance(layer, SlimNorm):
            channels = channels or layer.weight.shape[0]
            scale = _part(writer, f"{name}.weight", layer.weight, (channels,))
            shift = _part(writer, f"{name}.bias", layer.bias, (channels,))
            mean = writer.weight(f"{name}.mean.{at}", _array(layer.running_mean[at, :channels]))
            var = writer.weight(f"{name}.var.{at}", _array(layer.running_var[at, :channels]))
            x = writer.op("BatchNormalization", x, scale, shift, mean, var, epsilon=layer.eps)
        else:
            x = _module(writer, layer, x, name)
    missing = encoder.latent - channels
    if missing:
        pads = writer.weight(f"pads.{missing}", np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64))
        x = writer.op("Pad", x, pads)
    return x


def _part(writer: Writer, name: str, weight: torch.Tensor, size: Sequence[int]) -> ir.Value:
    """The first elements along the leading axes."""
    whole = writer.weight(name, _array(weight))
    if tuple(size) == tuple(weight.shape[: len(size)]):
        return whole
    starts = writer.weight(f"zeros.{len(size)}", np.zeros(len(size), np.int64))
    ends = writer.weight("ends." + ".".join(map(str, size)), np.array(size, np.int64))
    axes = writer.weight(f"axes.{len(size)}", np.arange(len(size)))
    return writer.op("Slice", whole, starts, ends, axes)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Gdn1 | Crop) or super().is_leaf_module(m, module_qualified_name)


def emit(writer: Writer, module: nn.Module, x: ir.Value, name: str) -> ir.Value:
    """Writes `module`, in eval, of the value `x`; its weights begin with `name`. Norms that follow a convolution are
    folded into it. Raises ConvertError that names what cannot be written."""
    if isinstance(module, Network):
        return writer.graph(fold(module.trained()), x, name)
    try:
        traced = _Tracer().trace(module)
    except Exception as error:  # of whatever the module's code does with a proxy
        raise _refuse(f"{type(module).__name__} cannot be traced: {' '.join(str(error).split())[:200]}") from None
    modules = dict(module.named_modules())
    found: dict[fx.Node, ir.Value] = {}
    skipped: set[fx.Node] = set()
    for node in traced.nodes:
        source_node: Any = node.args[0] if node.args else None
        if node in skipped:
            continue
        here = f"{name}.{node.target}" if name else str(node.target)
        if node.op == "placeholder":
            found[node] = x
        elif node.op == "output":
            return found[source_node]
        elif node.op == "call_module":
            layer, after = modules[str(node.target)], next(iter(node.users), None)
            source = found[source_node]
            norm = modules.get(str(after.target)) if after is not None and after.op == "call_module" else None
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and len(node.users) == 1:
                assert after is not None
                arrays = zip(("weight", "bias"), _folded(layer, norm), strict=True)
                weight, bias = (writer.weight(f"{here}.{key}", array) for key, array in arrays)
                found[node] = found[after] = _conv(writer, layer, source, weight, bias, layer.groups)
                skipped.add(after)
            else:
                found[node] = _module(writer, layer, source, here)
        else:
            args: list[Any] = [found.get(arg, arg) for arg in node.args]  # type: ignore[call-overload, arg-type]
            found[node] = _function(writer, node, args)
    raise _refuse(f"{type(module).__name__} gives nothing")


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.double() * scale
    weight = conv.weight.double() * scale[:, None, None, None]
    return _array(weight), _array(bias)


def _conv(writer, layer, x, weight, bias, groups) -> ir.Value:
    pads = [*layer.padding, *layer.padding]
    return writer.op("Conv", x, weight, *[bias] * (bias is not None), group=groups, pads=pads,
                     strides=list(layer.stride), dilations=list(layer.dilation))  # fmt: skip


def _module(writer: Writer, layer: nn.Module, x: ir.Value, name: str) -> ir.Value:
    def weight(key: str, value: torch.Tensor) -> ir.Value:
        return writer.weight(f"{name}.{key}", _array(value))

    match layer:
        case nn.Conv2d() if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            bias = None if layer.bias is None else weight("bias", layer.bias)
            return _conv(writer, layer, x, weight("weight", layer.weight), bias, layer.groups)
        case nn.BatchNorm2d() if layer.running_mean is not None and layer.running_var is not None:
            held = {"weight": layer.weight, "bias": layer.bias, "mean": layer.running_mean, "var": layer.running_var}
            return writer.op("BatchNormalization", x, *[weight(*one) for one in held.items()], epsilon=layer.eps)
        case nn.GroupNorm():
            return _group_norm(writer, layer, x, name)
        case nn.Linear():
            biases = [] if layer.bias is None else [weight("bias", layer.bias)]
            return writer.op("Gemm", x, weight("weight", layer.weight), *biases, transB=1)
        case nn.ReLU():
            return writer.op("Relu", x)
        case nn.ReLU6():
            return _relu6(writer, x)
        case nn.Identity() | nn.Dropout():
            return x
        case nn.MaxPool2d() | nn.AvgPool2d() if not layer.ceil_mode:
            kernel, stride, padding = (
                list(v) if isinstance(v, tuple) else [v, v] for v in (layer.kernel_size, layer.stride, layer.padding)
            )
            pads = [*padding, *padding]
            if isinstance(layer, nn.MaxPool2d):
                return writer.op("MaxPool", x, kernel_shape=kernel, strides=stride, pads=pads)
            return writer.op("AveragePool", x, kernel_shape=kernel, strides=stride, pads=pads, count_include_pad=1)
        case nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)):
            return writer.op("GlobalAveragePool", x)
        case nn.AdaptiveMaxPool2d(output_size=1 | (1, 1)):
            return writer.op("GlobalMaxPool", x)
        case nn.Flatten(start_dim=1, end_dim=-1):
            return writer.op("Flatten", x)
        case nn.Upsample(mode="nearest", scale_factor=float(factor)):
            scales = writer.weight(f"scales.{factor}", np.array([1, 1, factor, factor], np.float32))
            region = writer.weight("region", np.zeros(0, np.float32))  # without a use here, but before opset 13 needed
            return writer.op("Resize", x, region, scales, mode="nearest", nearest_mode="floor",
                             coordinate_transformation_mode="asymmetric")  # fmt: skip
        case nn.ReplicationPad2d():
            left, right, top, bottom = layer.padding
            sides = writer.weight(f"{name}.pads", np.array([0, 0, top, left, 0, 0, bottom, right], np.int64))
            return writer.op("Pad", x, sides, mode="edge")
        case Crop():
            bounds = {
                "starts": np.zeros(2, np.int64),
                "ends": np.array([layer.height, layer.width]),
                "axes": np.array([2, 3]),
            }
            return writer.op("Slice", x, *[writer.weight(f"{name}.{key}", value) for key, value in bounds.items()])
        case Gdn1():
            beta, gamma = layer.factors()
            norm = writer.op(
                "Conv", writer.op("Abs", x), weight("gamma", gamma[:, :, None, None]), weight("beta", beta)
            )
            return writer.op("Mul" if layer.inverse else "Div", x, norm)
    raise _refuse(f"{name} is a {layer}")


def _group_norm(writer: Writer, layer: nn.GroupNorm, x: ir.Value, name: str) -> ir.Value:
    """As an instance norm of groups: before opset 21 the operator scales groups, not channels."""
    rows = writer.weight(f"rows.{layer.num_groups}", np.array([0, layer.num_groups, -1], np.int64))
    ones, none = np.ones(layer.num_groups, np.float32), np.zeros(layer.num_groups, np.float32)
    found = writer.op("InstanceNormalization", writer.op("Reshape", x, rows), writer.weight(f"{name}.ones", ones),
                      writer.weight(f"{name}.none", none), epsilon=layer.eps)  # fmt: skip
    found = writer.op("Reshape", found, writer.op("Shape", x))
    scale = writer.weight(f"{name}.weight", _array(layer.weight)[:, None, None])
    shift = writer.weight(f"{name}.bias", _array(layer.bias)[:, None, None])
    return writer.op("Add", writer.op("Mul", found, scale), shift)


def _function(writer: Writer, node: fx.Node, args: list) -> ir.Value:
    target: Any = node.target
    options = node.kwargs
    if node.op == "call_method":
        target = {"mean": torch.mean, "flatten": torch.flatten, "relu": F.relu}.get(str(node.target), node.target)
    if target in (F.relu, torch.relu):
        return writer.op("Relu", args[0])
    if target is F.relu6:
        return _relu6(writer, args[0])
    if target in (operator.add, torch.add) and all(isinstance(arg, ir.Value) for arg in args) and not options:
        return writer.op("Add", *args)
    zeros = options.get("mode", "constant") == "constant" and not options.get("value")
    if target is F.pad and len(args) == 2 and len(args[1]) == 4 and zeros:
        left, right, top, bottom = args[1]
        name = f"pads.{left}.{right}.{top}.{bottom}"
        return writer.op(
            "Pad", args[0], writer.weight(name, np.array([0, 0, top, left, 0, 0, bottom, right], np.int64))
        )
    if target is torch.mean and len(args) == 2 and tuple(args[1]) in ((2, 3), (-2, -1)) and not options:
        return writer.op("Flatten", writer.op("GlobalAveragePool", args[0]))
    if target is torch.flatten and args[1:] == [1] and not options:
        return writer.op("Flatten", args[0])
    raise _refuse(f"{node.name} calls {getattr(target, '__name__', target)} with {node.args[1:]} {dict(options)}")


def _relu6(writer: Writer, x: ir.Value) -> ir.Value:
    bounds = (writer.weight("zero", np.array(0, np.float32)), writer.weight("six", np.array(6, np.float32)))
    return writer.op("Clip", x, *bounds)


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().to(torch.float32).numpy()


def _refuse(why: str) -> ConvertError:
    return ConvertError(
        "A module cannot be written as ONNX.", why + ".", "Export it with torch, and give the ONNX file."
    )
