"""ONNX files as networks: what one holds, where it can be cut, and a torch module that can be trained.

A file is untrusted: what a tensor says that it has is compared with what is there before anything is made of it, and
external data stays in the file's own folder. A batch that an exporter fixed is opened. It knows nothing about cuts
themselves (split/graph.py) nor how operators are computed (split/network.py).
"""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
)

from shoal.runtime.errors import ConvertError, ShoalError, SourceError
from shoal.runtime.session import Value

from ..split.graph import Cut, Graph, Node, tidy
from ..split.graph import cuts as _cuts
from ..split.opset import OLDEST, raised
from ..split.write import opened, write

if TYPE_CHECKING:
    from ..split.network import Network

Model = bytes | str | os.PathLike
_OPSETS = (OLDEST, 21)
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Card:
    """`inputs` and `outputs` with their shapes, an open axis as its name or None; `parameters` are the numbers in fp
    tensors of the file, `nodes` counts each operator."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    opset: int
    parameters: int
    nodes: Mapping[str, int]


def card(source: Model) -> Card:
    """What the file at `source` (or ModelProto bytes) says about itself. Reads no weight. Raises SourceError."""
    model = _load(source)
    nodes: dict[str, int] = {}
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    for node in model.graph:
        if node.op_type != "Constant":
            nodes[node.op_type] = nodes.get(node.op_type, 0) + 1
        if node.op_type == "Constant" and "value" in node.attributes:
            tensors.append(node.attributes["value"].value)
    count = sum(math.prod(tensor.shape.numpy()) for tensor in tensors if tensor.dtype.is_floating_point())
    inputs = tuple(_port(value) for value in model.graph.inputs if value.name not in model.graph.initializers)
    outputs = tuple(_port(value) for value in model.graph.outputs)
    return Card(inputs, outputs, model.graph.opset_imports.get("", 0), count, nodes)


def cuts(source: Model, shapes: Mapping[str, Sequence[int]] | None = None) -> list[Cut]:
    """Where the network can be cut (see split/graph.py). `shapes` are of one row of each input, without the batch;
    by default the file's own."""
    return _cuts(graph(source), shapes)


def network(source: Model) -> "Network":
    """The network as a torch module whose parameters are the file's weights (see split/network.py)."""
    from ..split.network import Network

    return Network(graph(source))


def graph(source: Model) -> Graph:
    """The network with its weights, its batch open, of opset 11 or later. Raises SourceError for a file that is
    damaged, and ConvertError for a network that cannot be trained: other opsets than 7 to 21, other types than fp32,
    branches and loops."""
    model = _load(source)
    opset = model.graph.opset_imports.get("", 0)
    if not _OPSETS[0] <= opset <= _OPSETS[1]:
        why = f"Its opset is {opset}; {_OPSETS[0]} to {_OPSETS[1]} are known."
        fix = "Export it for opset 17, or convert it (onnx.version_converter)."
        raise ConvertError("The ONNX network cannot be used.", why, fix)
    try:
        if model.functions:
            InlinePass()(model)
        RemoveInitializersFromInputsPass()(model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    except Exception as error:  # onnx-ir's own, of many kinds
        raise _damaged(f"It cannot be read: {_short(error)}") from None
    inner = model.graph
    tensors = {str(name): _array(str(name), value.const_value) for name, value in inner.initializers.items()}
    nodes = []
    for node in inner:
        made = tuple(value.name or "" for value in node.outputs)
        name = node.name or f"the one that gives {made[0] if made else 'nothing'}"
        if node.domain not in ("", "ai.onnx"):
            why = f"The {node.op_type} node {name!r:.120} is of the domain {node.domain!r:.60}."
            raise ConvertError("The ONNX network cannot be used.", why, "Export it with standard operators only.")
        taken = tuple(value.name or "" if value else "" for value in node.inputs)
        attributes = {key: _plain(held, node.op_type, name) for key, held in node.attributes.items()}
        nodes.append(Node(name, node.op_type, taken, made, attributes))
    ports = tuple(_port(value) for value in inner.inputs)
    if not ports or not inner.outputs:
        raise ConvertError("The ONNX network cannot be used.", "It has no inputs or no outputs.", "Export it again.")
    if len({value for node in nodes for value in node.outputs if value}) != sum(
        bool(value) for node in nodes for value in node.outputs
    ):
        raise _damaged("Two nodes give the same value.")
    made_of = Graph(tuple(nodes), ports, tuple(str(value.name) for value in inner.outputs), tensors, opset)
    return _opened(tidy(raised(made_of)))


def _load(source: Model) -> ir.Model:
    try:
        if isinstance(source, bytes):
            with tempfile.TemporaryDirectory(prefix="shoal-") as folder:  # where no external data is
                path = Path(folder) / "network.onnx"
                path.write_bytes(source)
                model = ir.load(path)
        else:
            model = ir.load(Path(os.path.abspath(source)))
    except OSError as error:
        raise SourceError("The ONNX file cannot be read.", f"{error.strerror or error}.", "Check the path.") from None
    except Exception as error:  # protobuf's and onnx-ir's own, of many kinds
        raise _damaged(f"It cannot be read: {_short(error)}") from None
    if not len(model.graph) and not len(model.graph.inputs):
        raise _damaged("It holds no network.")
    return model


def _port(value: ir.Value) -> Value:
    try:
        dtype = value.dtype.numpy() if value.dtype else np.dtype(np.float32)
    except TypeError:
        dtype = np.dtype(object)
    dims: list[int | str | None] = []
    for dim in value.shape or ():
        length = dim if isinstance(dim, int) else dim.value
        dims.append(None if isinstance(length, int) and length < 1 else length)  # Paddle writes -1
    return Value(str(value.name), dtype, tuple(dims))


def _array(name: str, tensor: Any) -> np.ndarray:
    """The tensor's numbers, where the file has as many as it says."""
    if tensor is None:
        raise _damaged(f"Its tensor {name!r:.80} has no value.")
    if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        why = f"Its tensor {name!r:.80} is {tensor.dtype}; training needs fp32."
        raise ConvertError("The ONNX network cannot be used.", why, "Export it in fp32.")
    try:
        shape = tensor.shape.numpy()
        expected = math.ceil(math.prod(shape) * tensor.dtype.itemsize)
        if min(shape, default=0) < 0:
            raise _damaged(f"Its tensor {name!r:.80} has the shape {list(shape)}.")
        if isinstance(tensor, ir.ExternalTensor):
            there = os.path.getsize(tensor.path) - (tensor.offset or 0)
            if expected > min(there, tensor.length if tensor.length is not None else there):
                raise _damaged(f"Its tensor {name!r:.80} ends behind its file.")
        elif isinstance(tensor, ir.TensorProtoTensor):
            raw = tensor.raw
            there = len(raw.raw_data)
            if not there:  # in one of the fields for numbers
                kept = (raw.float_data, raw.int32_data, raw.int64_data, raw.double_data, raw.uint64_data)
                there = math.ceil(sum(map(len, kept)) * tensor.dtype.itemsize)
            if there != expected:
                raise _damaged(f"Its tensor {name!r:.80} has {there} bytes instead of {expected}.")
        return tensor.numpy()
    except ShoalError:
        raise
    except Exception as error:
        raise _damaged(f"Its tensor {name!r:.80} cannot be read: {_short(error)}") from None


def _plain(held: ir.Attr, op: str, name: str) -> Any:
    kind = held.type
    if kind == ir.AttributeType.TENSOR:
        return _array(f"{held.name} of {name}", held.value)
    if kind in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
        return held.value
    if kind in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return list(held.value)
    why = f"The {op} node {name!r:.120} has a branch or a loop."
    raise ConvertError("The ONNX network cannot be used.", why, "Export it without: for one mode, and unrolled.")


def _opened(network: Graph) -> Graph:
    """`network` with an open batch. Where an exporter fixed it, constants that repeat it are replaced."""
    fixed = {port.dims[0] for port in network.inputs if port.dims and isinstance(port.dims[0], int)}
    if not fixed:
        return network
    batch = next(iter(fixed))
    dynamic = {port.name for port in network.inputs}
    tensors, nodes = dict(network.tensors), []
    for node in network.nodes:
        if dynamic.isdisjoint(node.inputs):
            nodes.append(node)
            continue
        dynamic.update(node.outputs)
        at = {"Reshape": 1, "Resize": 3}.get(node.op, 0)
        target = tensors.get(node.inputs[at]) if 0 < at < len(node.inputs) else None
        if target is None or not target.size or target.flat[0] != batch:
            nodes.append(node)
            continue
        name = f"{node.outputs[0]} open"
        if node.op == "Reshape":  # 0: as long as that axis was
            tensors[name] = np.concatenate([[0], target[1:]]).astype(np.int64)
            attributes = {key: value for key, value in node.attributes.items() if key != "allowzero"}
            nodes.append(replace(node, inputs=(node.inputs[0], name), attributes=attributes))
        else:
            tensors |= {f"{name} 0": np.array([0]), f"{name} 1": np.array([1]), f"{name} rest": target[1:]}
            nodes += [
                Node(f"{name} shape", "Shape", node.inputs[:1], (f"{name} shape",)),
                Node(f"{name} n", "Slice", (f"{name} shape", f"{name} 0", f"{name} 1"), (f"{name} n",)),
                Node(name, "Concat", (f"{name} n", f"{name} rest"), (name,), {"axis": 0}),
                replace(node, inputs=(*node.inputs[:3], name)),
            ]
    inputs = tuple(replace(port, dims=(None, *port.dims[1:])) for port in network.inputs)
    free = tidy(replace(network, nodes=tuple(nodes), inputs=inputs, tensors=tensors))
    if all(isinstance(dim, int) for port in inputs for dim in port.dims[1:]) and (why := _joined(free, batch)):
        raise ConvertError("The ONNX network cannot be used.", why, "Export it with a dynamic first axis.")
    return free


def _joined(network: Graph, batch: int | str | None) -> str:
    """Why a batch of two rows is not what the rows are alone, "" where it is. `batch` is what an exporter fixed."""
    undone = f"It was exported for batches of {batch}, which cannot be undone"
    rng = np.random.default_rng(0)
    feeds = {p.name: rng.random((2, *p.dims[1:]), np.float32).astype(p.dtype) for p in network.inputs}  # type: ignore
    try:
        with opened(write(network)) as session:
            alone = [session.run({name: array[i : i + 1] for name, array in feeds.items()}) for i in range(2)]
            try:
                both = session.run(feeds)
            except ShoalError as error:
                return f"{undone}: {error.why}"
        for name, array in both.items():
            rows = np.concatenate([one[name] for one in alone])
            scale = float(np.abs(rows).max(initial=0)) or 1.0
            close = rows.shape == array.shape and np.allclose(rows, array, 0, _TOLERANCE * scale, equal_nan=True)
            if not close:
                return f"{undone}: of its output {name!r:.80} a row hangs on the others."
    except ShoalError as error:
        return f"ONNX Runtime cannot run it: {error.why}"
    except ValueError as error:  # outputs of other shapes than rows
        return f"{undone}: {_short(error)}"
    return ""


def _damaged(why: str) -> SourceError:
    return SourceError("The ONNX file is damaged.", why, "Copy or export it again.")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
