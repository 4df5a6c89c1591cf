"""A network as a graph of ONNX operators: where it can be cut in two, and what lies before and behind each cut.

A cut is one value whose removal separates the inputs from the outputs, so that nothing but it has to go over a link. It
must have the batch as its first axis. Shapes are found by running the graph, in ONNX Runtime, so they hold for
whatever operators there are. Neither where a graph comes from nor how it is trained is known here, and no torch.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shoal.runtime.errors import ConvertError, ShoalError, UsageError
from shoal.runtime.session import Value

# Operators whose outputs are of one type, whatever they take, and those whose second output is
_INTEGERS = {"Shape", "Size", "ArgMax", "ArgMin", "NonZero", "NonMaxSuppression"}
_TRUTHS = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "IsNaN", "IsInf"}
_SECOND = {"TopK": np.int64, "MaxPool": np.int64, "Dropout": np.bool_}
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
         10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64}  # fmt: skip
_CAST = {number: np.dtype(kind) for number, kind in _TYPES.items()}  # of ONNX's numbers of types


@dataclass(frozen=True)
class Node:
    """`op` of the standard operators, from values to values by name ("" where an optional one is left out). Attributes
    are int, float, str, lists of one of these, or arrays."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op} node {self.name!r}"


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they can run, all of them needed. `tensors` are the weights and constants by name.
    `paths` are further names of values: of a torch module, the output of each part by its module path. `weights` are
    the tensors that are trained, where the source says."""

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, np.ndarray]
    opset: int
    paths: Mapping[str, str] = field(default_factory=dict)
    weights: frozenset[str] = frozenset()

    def value(self, name: str) -> str:
        """The value that `name` means: a value's own, a path's, or that of a node with one output. ConvertError."""
        if name in self.paths:
            return self.paths[name]
        made = {value for node in self.nodes for value in node.outputs if value}
        if name in made or name in {port.name for port in self.inputs}:
            return name
        for node in self.nodes:
            if node.name == name and len(node.outputs) == 1:
                return node.outputs[0]
        near = difflib.get_close_matches(name, [*self.paths, *made], 3, 0.4)
        raise ConvertError(
            f"The network has no value {name!r:.120}.",
            f"Near to it are {', '.join(map(repr, near))}." if near else "No name is near to it.",
            "List the names where it can be cut with cuts().",
        )


@dataclass(frozen=True)
class Cut:
    """A place to cut: the value and its module path ("" where it has none), its shape [C, ...] of one row of the batch,
    its bytes in fp32, and the multiply-adds of one row before and behind it."""

    value: str
    path: str
    op: str
    shape: tuple[int, ...]
    bytes: int
    macs_before: int
    macs_after: int


def tidy(graph: Graph) -> Graph:
    """`graph` with what its outputs need and nothing else, sorted. Raises ConvertError where something is missing or
    circular."""
    makers = {value: node for node in graph.nodes for value in node.outputs if value}
    given = {port.name for port in graph.inputs}
    order: list[Node] = []
    state: dict[int, int] = {}  # of a node: 1 while what it needs is visited, 2 afterwards
    stack: list[tuple[str, bool]] = [(name, False) for name in reversed(graph.outputs)]
    while stack:
        name, done = stack.pop()
        if name in given or name in graph.tensors:
            continue
        node = makers.get(name)
        if node is None:
            reader = next((n for n in graph.nodes if name in n.inputs), None)
            why = f"Nothing gives the value {name!r:.80}, which {reader or 'an output'} needs."
            raise ConvertError("The network cannot be used.", why, "Export it again.")
        if done:
            state[id(node)] = 2
            order.append(node)
        elif id(node) not in state:
            state[id(node)] = 1
            stack.append((name, True))
            stack += [(value, False) for value in reversed(node.inputs) if value]
        elif state[id(node)] == 1:  # whatever is on the stack above a node is there because of it
            why = f"The {node} needs its own output."
            raise ConvertError("The network cannot be used.", why, "Export it again.")
    used = {value for node in order for value in node.inputs} | set(graph.outputs)
    left = {value for node in order for value in node.outputs} | used
    return replace(
        graph,
        nodes=tuple(order),
        tensors={name: array for name, array in graph.tensors.items() if name in used},
        paths={path: value for path, value in graph.paths.items() if value in left},
    )


def channels_first(graph: Graph) -> Graph:
    """`graph` with a picture [n, 3, h, w] as its input where it takes [n, h, w, 3], as TensorFlow's networks do: under
    the same name, turned before anything else. Others stay as they are."""
    port = graph.inputs[0]
    if len(graph.inputs) != 1 or len(port.dims) != 4 or port.dims[3] != 3 or port.dims[1] == 3:
        return graph
    turned = f"{port.name} turned"
    nodes = tuple(
        replace(node, inputs=tuple(turned if name == port.name else name for name in node.inputs))
        for node in graph.nodes
    )
    first = Node(turned, "Transpose", (port.name,), (turned,), {"perm": [0, 2, 3, 1]})
    dims = (port.dims[0], 3, *port.dims[1:3])
    return replace(graph, nodes=(first, *nodes), inputs=(Value(port.name, port.dtype, dims),))


def halves(graph: Graph, cut: str) -> tuple[Graph, Graph]:
    """What makes the value `cut` (as `Graph.value` names it), and what goes on from it. What depends on no input goes
    to whichever half needs it, or to both. Raises ConvertError where `cut` does not separate them."""
    name = graph.value(cut)
    _check(graph, name)
    port = Value(name, np.dtype(np.float32), ())
    head = tidy(replace(graph, outputs=(name,)))
    tail = tidy(replace(graph, nodes=tuple(n for n in graph.nodes if name not in n.outputs), inputs=(port,)))
    return head, tail


def cuts(graph: Graph, shapes: Mapping[str, Sequence[int]] | None = None) -> list[Cut]:
    """Every cut of `graph`, from its inputs to its outputs.

    `shapes` are of one row of each input, without the batch; by default the graph's own where it states them. Raises
    UsageError where it does not, and ConvertError, naming the node that prevents it, where there is no cut.
    """
    candidates = _separators(graph)
    if not candidates:
        raise _hopeless(graph)
    one, two = sizes(graph, shapes, batches=(1, 2))
    cost = {id(node): macs(node, one, graph) for node in graph.nodes}
    paths = {value: path for path, value in graph.paths.items()}  # of several the last, which is the outermost
    total, found = sum(cost.values()), []
    for name in candidates:
        shape = one[name]
        if not shape or two[name] != (2 * shape[0], *shape[1:]) or shape[0] != 1:
            continue  # the batch is not its first axis
        head = _before(graph, name)
        before = sum(cost[id(node)] for node in head)
        op = next(node.op for node in head if name in node.outputs)
        size = 4 * math.prod(shape)
        found.append(Cut(name, paths.get(name, ""), op, shape[1:], size, before, total - before))
    if not found:
        why = f"Where it could be cut, as at {candidates[0]!r:.80}, the batch is not the first axis."
        raise ConvertError("The network cannot be cut in two.", why, "Export it with the batch as the first axis.")
    return found


def sizes(
    graph: Graph, shapes: Mapping[str, Sequence[int]] | None, batches: Sequence[int] = (1,)
) -> list[dict[str, tuple[int, ...]]]:
    """For each of `batches` the shape of every value and tensor, as ONNX Runtime finds it on zeros."""
    from .write import opened, write

    rows = {}
    for port in graph.inputs:
        row: Sequence[Any] = (shapes or {}).get(port.name, port.dims[1:])
        if any(not isinstance(dim, int) or dim < 1 for dim in row) or (not row and not port.dims):
            why = f"Its input {port.name!r} leaves {list(row)} open."
            raise UsageError("The network's shapes are unknown.", why, f"Give shapes={{{port.name!r}: (3, 224, 224)}}.")
        rows[port.name] = tuple(row)
    made = [value for node in graph.nodes for value in node.outputs if value]
    # A Shape of each value instead of the values themselves, which then need not all stay in memory
    asked = {value: f"shape {i} of {value}" for i, value in enumerate(made)}
    nodes = tuple(Node(name, "Shape", (value,), (name,)) for value, name in asked.items())
    asking = replace(graph, nodes=graph.nodes + nodes, outputs=tuple(asked.values()))
    fixed = {name: tuple(array.shape) for name, array in graph.tensors.items()}
    found = []
    try:
        with opened(write(asking, dims={name: (None,) * (1 + len(row)) for name, row in rows.items()})) as run:
            for batch in batches:
                feeds = {port.name: np.zeros((batch, *rows[port.name]), port.dtype) for port in graph.inputs}
                answers = run.run(feeds)
                shaped = {value: tuple(map(int, answers[name])) for value, name in asked.items()}
                found.append(fixed | {name: array.shape for name, array in feeds.items()} | shaped)
    except ShoalError as error:
        given = ", ".join(f"{name} {list(row)}" for name, row in rows.items())
        why = f"ONNX Runtime says, for rows of {given}: {error.why}"
        raise ConvertError("The network cannot be run.", why, "Give it the shapes that it was made for.") from None
    return found


def macs(node: Node, shapes: Mapping[str, tuple[int, ...]], graph: Graph) -> int:
    """Multiply-adds of a node: of convolutions and products of matrices; others count as none."""
    taken = [shapes.get(name, ()) for name in node.inputs]
    out = math.prod(shapes.get(node.outputs[0], ()))
    if node.op == "Conv":  # weight [out, in / group, *kernel]
        return out * math.prod(taken[1][1:])
    if node.op == "ConvTranspose":  # weight [in, out / group, *kernel]
        return math.prod(taken[0]) * math.prod(taken[1][1:])
    if node.op == "MatMul":
        return out * taken[0][-1]
    if node.op == "Gemm":
        return out * taken[0][0 if node.attributes.get("transA") else 1]
    return 0


def types(graph: Graph) -> dict[str, np.dtype]:
    """The type of every value and tensor, as the standard says for the operators that are in networks of images."""
    found = {port.name: port.dtype for port in graph.inputs}
    found |= {name: array.dtype for name, array in graph.tensors.items()}
    for node in graph.nodes:
        first = {"Where": 1, "OneHot": 2}.get(node.op, 0)
        source = node.inputs[first] if first < len(node.inputs) else ""
        kind = found.get(source, np.dtype(np.float32))
        if node.op in _INTEGERS:
            kind = np.dtype(np.int64)
        elif node.op in _TRUTHS:
            kind = np.dtype(np.bool_)
        elif node.op == "Cast":
            kind = _CAST.get(node.attributes.get("to", 1), np.dtype(object))
        elif node.op == "ConstantOfShape":
            kind = node.attributes["value"].dtype if "value" in node.attributes else np.dtype(np.float32)
        elif node.op == "QuantizeLinear":
            kind = found.get(node.inputs[2], kind) if len(node.inputs) > 2 else np.dtype(np.uint8)
        elif node.op == "DequantizeLinear":
            kind = np.dtype(np.float32)
        found |= dict.fromkeys(node.outputs, kind)
        if node.op in _SECOND:
            found |= dict.fromkeys(node.outputs[1:], np.dtype(_SECOND[node.op]))
    return found


def depending(graph: Graph, sources: Iterable[str]) -> set[str]:
    """The values that depend on one of `sources`, which are among them."""
    found = set(sources)
    for node in graph.nodes:
        if not found.isdisjoint(node.inputs):
            found.update(value for value in node.outputs if value)
    return found


def _before(graph: Graph, name: str) -> list[Node]:
    needed, found = {name}, []
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            needed.update(node.inputs)
            found.append(node)
    return found[::-1]


def _live(graph: Graph) -> list[tuple[Node, set[str]]]:
    """Each node with the values that are needed after it and depend on an input."""
    dynamic = depending(graph, (port.name for port in graph.inputs))
    last = {value: i for i, node in enumerate(graph.nodes) for value in node.inputs}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    live, found = {port.name for port in graph.inputs if port.name in last}, []
    for i, node in enumerate(graph.nodes):
        live = live | {value for value in node.outputs if value in dynamic and last.get(value, -1) > i}
        live = {value for value in live if last[value] > i}
        found.append((node, live))
    return found


def _separators(graph: Graph) -> list[str]:
    """The fp32 values that separate. Whatever is not before such a value is behind it, so in any order in which the
    graph can run, nothing else is alive when it has just been made."""
    kinds, ends = types(graph), set(graph.outputs)
    return [
        name
        for node, live in _live(graph)
        for name in node.outputs
        if live == {name} and kinds[name] == np.float32 and name not in ends
    ]


def _check(graph: Graph, name: str) -> None:
    """Raises ConvertError unless `name` separates, naming what still needs something from before it."""
    what = f"The network cannot be cut at {name!r:.120}."
    fix = "Cut it at one of the values that cuts() lists."
    if name in {port.name for port in graph.inputs} or name in graph.outputs:
        raise ConvertError(what, "It is an input or an output: one half would be empty.", fix)
    if name in _separators(graph):
        return
    if types(graph).get(name) != np.float32:
        raise ConvertError(what, "It is not fp32.", fix)
    dynamic = depending(graph, (port.name for port in graph.inputs))
    if name not in dynamic:
        raise ConvertError(what, "It depends on no input.", fix)
    behind = depending(graph, (name,))
    for node in graph.nodes:
        if not behind.isdisjoint(node.inputs):
            if other := [value for value in node.inputs if value in dynamic - behind]:
                raise ConvertError(what, f"The {node}, behind it, also reads {other[0]!r:.120} from before it.", fix)
    other = [value for value in graph.outputs if value not in behind]
    raise ConvertError(what, f"The output {other[0]!r:.120} does not depend on it.", fix)


def _hopeless(graph: Graph) -> ConvertError:
    """Why no value separates: what is still alive where least is."""
    what, fix = "The network cannot be cut in two.", "Train a network without it, or run it on one side."
    between = [(node, live) for node, live in _live(graph)[:-1] if live]
    if not between:
        return ConvertError(what, "It has a single node.", fix)
    node, live = min(between, key=lambda pair: len(pair[1]))
    kept = min(live - set(node.outputs), default=node.outputs[0])
    reader = next((str(n) for n in reversed(graph.nodes) if kept in n.inputs), "an output")
    why = f"No single value carries everything: even behind the {node}, the {reader} also reads {kept!r:.120}."
    return ConvertError(what, why, fix)
