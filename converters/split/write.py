"""A graph becomes ONNX: bytes of a model, batch norms folded into the convolutions before them; and is tried."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from shoal.runtime.session import Place, Session, open_graph

from .graph import Graph, Node, types

_IR = 8  # of the file format: the one of opset 15, which every runtime of today reads; newer opsets need newer ones
_IRS = {19: 9, 21: 10}
_INLINE = 16 << 20  # bytes of a model that is opened as it is
_SMALL, _ALIGNMENT = 1024, 64  # bytes of the largest tensor that stays in a larger one, and between those that do not


def write(
    graph: Graph, *, dims: Mapping[str, Sequence[int | str | None]] | None = None,
    names: Mapping[str, str] | None = None,
) -> bytes:  # fmt: skip
    """ModelProto bytes of `graph`.

    `dims` are of inputs and outputs (None: an open axis), instead of the graph's own; of an output that is not there
    ONNX Runtime finds them. `names` are new names of values. The same graph gives the same bytes.
    """
    graph = _renamed(graph, names or {})
    dims = {(names or {}).get(name, name): row for name, row in (dims or {}).items()}
    kinds = types(graph)
    values: dict[str, ir.Value] = {}
    for port in graph.inputs:
        row = dims.get(port.name, port.dims)
        shape = ir.Shape([dim if isinstance(dim, int) or i else "n" for i, dim in enumerate(row)]) if row else None
        dtype = ir.DataType.from_numpy(np.dtype(port.dtype))
        values[port.name] = ir.Value(name=port.name, shape=shape, type=ir.TensorType(dtype))
    for name, array in graph.tensors.items():
        values[name] = ir.Value(name=name, const_value=ir.tensor(np.asarray(array, order="C"), name=name))
    nodes = []
    for node in graph.nodes:
        made = [values.setdefault(name, ir.Value(name=name)) if name else ir.Value(name="") for name in node.outputs]
        taken = [values[name] if name else None for name in node.inputs]
        attributes = [attribute(key, value) for key, value in node.attributes.items()]
        nodes.append(ir.Node("", node.op, taken, attributes, outputs=made, name=node.name))
    outputs = [values[name] for name in graph.outputs]
    for value in outputs:
        value.type = ir.TensorType(ir.DataType.from_numpy(kinds[str(value.name)]))
        if str(value.name) in dims:
            row = dims[str(value.name)]
            value.shape = ir.Shape(["n" if dim is None and i == 0 else dim for i, dim in enumerate(row)])
    inner = ir.Graph([values[port.name] for port in graph.inputs], outputs, nodes=nodes, name="network",
                     initializers=[values[name] for name in graph.tensors],
                     opset_imports={"": graph.opset})  # fmt: skip
    return ir.serde.serialize_model(ir.Model(inner, ir_version=version(graph.opset))).SerializeToString(
        deterministic=True
    )


@contextlib.contextmanager
def external(model: bytes) -> Iterator[tuple[bytes, dict[str, Place]]]:
    """A ModelProto as a bundle has it, and where its weights lie meanwhile: a graph by itself is taken up to 64 MiB.
    A small one stays as it is."""
    if len(model) <= _INLINE:
        yield model, {}
        return
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        path, weights = Path(folder, "model.onnx"), Path(folder, "weights")
        path.write_bytes(model)
        loaded = ir.load(path)
        with open(weights, "wb") as file:
            for value in loaded.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes <= _SMALL:
                    continue
                file.write(bytes(-file.tell() % _ALIGNMENT))
                at = file.tell()
                file.write(tensor.tobytes())
                value.const_value = ir.ExternalTensor(
                    "weights", at, file.tell() - at, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()),
                    name=str(value.name), base_dir="",
                )  # fmt: skip
            size = file.tell()
        yield ir.serde.serialize_model(loaded).SerializeToString(), {"weights": Place(str(weights), 0, size)}


@contextlib.contextmanager
def opened(model: bytes, threads: int = 0) -> Iterator[Session]:
    """A ModelProto in ONNX Runtime, whatever its weights weigh. Raises BundleError, BackendError."""
    with external(model) as (graph, places), open_graph(graph, places, threads=threads) as session:
        yield session


def version(opset: int) -> int:
    """Of the file format, for this opset."""
    return max([_IR, *(need for least, need in _IRS.items() if opset >= least)])


def fold(graph: Graph) -> Graph:
    """`graph` with each batch norm whose input is a convolution that nothing else reads in that convolution: the same
    function in fewer steps. Computed in fp64."""
    readers: dict[str, int] = {}
    for name in [*graph.outputs, *(value for node in graph.nodes for value in node.inputs)]:
        readers[name] = readers.get(name, 0) + 1
    tensors, nodes = dict(graph.tensors), {node.outputs[0]: node for node in graph.nodes}
    for norm in graph.nodes:
        conv = nodes.get(norm.inputs[0]) if norm.op == "BatchNormalization" else None
        if conv is None or conv.op not in ("Conv", "ConvTranspose") or readers[norm.inputs[0]] > 1:
            continue
        if not {*conv.inputs[1:], *norm.inputs[1:]} <= tensors.keys():  # weights that are computed
            continue
        weight = tensors[conv.inputs[1]].astype(np.float64)
        scale, shift, mean, variance = (tensors[name].astype(np.float64) for name in norm.inputs[1:5])
        factor = scale / np.sqrt(variance + norm.attributes.get("epsilon", 1e-5))
        bias = tensors[conv.inputs[2]].astype(np.float64) if len(conv.inputs) > 2 else 0.0
        if conv.op == "Conv":  # [out, in / group, ...]
            weight *= factor.reshape(-1, *[1] * (weight.ndim - 1))
        else:  # [in, out / group, ...], the inputs of a group beside each other
            groups = conv.attributes.get("group", 1)
            parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
            weight = (parts * factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
        # Names of the norm's output, for the weights may be shared with other convolutions
        names = (f"{norm.outputs[0]}.weight", f"{norm.outputs[0]}.bias")
        tensors[names[0]] = weight.astype(np.float32)
        tensors[names[1]] = ((bias - mean) * factor + shift).astype(np.float32)
        made = replace(conv, inputs=(conv.inputs[0], *names), outputs=norm.outputs[:1])
        del nodes[conv.outputs[0]]
        nodes[norm.outputs[0]] = made
    left = tuple(nodes.values())
    used = {name for node in left for name in node.inputs} | set(graph.outputs)
    return replace(graph, nodes=left, tensors={name: array for name, array in tensors.items() if name in used})


def attribute(name: str, value: Any) -> ir.Attr:
    """An attribute as `Node` has it."""
    if isinstance(value, np.ndarray):
        return ir.AttrTensor(name, ir.tensor(value))
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(one, float) for one in value):
            return ir.AttrFloat32s(name, list(value))
        return ir.AttrStrings(name, list(value)) if value and isinstance(value[0], str) else ir.AttrInt64s(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    return ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, int(value))


def _renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    def of(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(names.get(value, value) for value in values)

    nodes = tuple(Node(n.name, n.op, of(n.inputs), of(n.outputs), n.attributes) for n in graph.nodes)
    inputs = tuple(replace(port, name=names.get(port.name, port.name)) for port in graph.inputs)
    return replace(graph, nodes=nodes, inputs=inputs, outputs=of(graph.outputs))
