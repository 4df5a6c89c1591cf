"""A decoder cut into steps: graphs for a device that knows fixed lengths only, and for the CPU what rows share.

An architecture builds the model once over a `Recorder`, which keeps products whole. `cut` then puts what lies between
two attentions into as few static graphs as it can: a product with a shadow is one by itself, so that device and CPU
multiply at the same time, and whoever takes its value adds the two. It knows nothing about scales or files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from shoal.runtime.card import Card
from shoal.runtime.kernels import DOMAIN as KERNELS
from shoal.runtime.kernels.layout import BLOCK
from shoal.runtime.static.layout import TOKENS

from ..graph import GraphBuilder, Norm
from ..weights import Stored, Weights
from .scales import LEAST_SIZE

Names = tuple[str, ...]
Emit = Callable[[GraphBuilder, Names, ir.Value, ir.Value | None], ir.Value]  # (graph, matrices, x, bias) -> product
_ATTENTION, _PARTS = "CachedAttention", ("key", "value")
ANY = "rows"  # of the CPU's graphs


@dataclass(frozen=True)
class Part:
    """A static graph: nodes of `block` and, behind its last product, maybe of the next. Values with the names that
    steps know them by."""

    name: str
    block: int
    last: int
    nodes: tuple[ir.Node, ...]
    takes: dict[ir.Value, str]
    gives: dict[ir.Value, str]


@dataclass(frozen=True)
class Attention:
    """An attention of `block`."""

    node: ir.Node
    block: int
    takes: str
    gives: str


@dataclass
class Cut:
    """The steps in order, and every value's width by its name. `stream` is what the head takes."""

    steps: list[Part | Attention] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    first: str = ""
    stream: str = ""


class Recorder(GraphBuilder):
    """Takes down what an architecture builds: a product is one node, of which `products` has the matrices' names.
    Embedding and head are graphs of their own, for the CPU. With `even`, the product behind a gate, before which there
    is no norm, takes rows that were made even (`scales.even`), and what it gives is multiplied by their sizes; its
    names are in `evened`. With `turn`, a rotation fp32 [64, 64], products whose inputs are
    whole blocks of 64 take them rotated; their names are in `turned`."""

    def __init__(self, card: Card, weights: Weights, even: bool, turn: Stored | None = None):
        super().__init__(card.name, weights)
        self.card, self.even, self.turn = card, even, turn
        self.evened: set[Names] = set()
        self.turned: set[Names] = set()
        self._gates: set[ir.Value] = set()
        self.products: dict[ir.Node, Names] = {}
        self.ends: dict[str, GraphBuilder] = {}
        self.first: ir.Value | None = None
        self.stream: ir.Value | None = None

    @property
    def nodes(self) -> list[ir.Node]:
        return self._nodes

    def linear(
        self, names: str | Names, x: ir.Value, bias: bool = False, role: str = "linear", after: str = "",
        norm: Norm | None = None, residual: ir.Value | None = None, mixes: str = "",
    ) -> ir.Value:  # fmt: skip
        names = (names,) if isinstance(names, str) else names
        offset = self.external(self.weights.stacked(tuple(f"{name}.bias" for name in names))) if bias else None
        inputs, size = self.weights.shapes[f"{names[0]}.weight"][1], None
        if self.even and x in self._gates:
            x, size = even(self, x)
            self.evened.add(names)
        x = self.rms(x, norm) if norm else x
        if self.turn and inputs % BLOCK == 0:
            blocks = self.op("Reshape", x, self.constant([-1, BLOCK]))
            blocks = self.op("MatMul", blocks, self.external(self.turn))
            x = self.op("Reshape", blocks, self.constant([-1, inputs]))
            self.turned.add(names)
        y = self.op("Product", x, offset if size is None else None)
        self.products[y.producer()] = names
        if size is not None:
            y = self.op("Mul", y, size)
            y = y if offset is None else self.op("Add", y, offset)
        return y if residual is None else self.op("Add", y, residual)

    def gated(
        self, names: tuple[str, str], x: ir.Value, activation: str, after: str, norm: Norm | None, role: str = "linear"
    ) -> ir.Value:
        gated = self.gate(self.linear(names, x, role=role, after=after, norm=norm), activation)
        self._gates.add(gated)
        return gated

    def embed(self, name: str, tokens: ir.Value, scale: float = 1.0, tied: bool = False) -> ir.Value:
        g = self.ends["embed"] = GraphBuilder("embed", self.weights)
        g.scope("embed")
        rows = g.embed(name, g.input(TOKENS, "int64", [1, ANY]), scale, tied)
        g.output(g.op("Squeeze", rows, g.constant([0])), "embed", "float32", [ANY, self.card.hidden])
        self.first = self.op("Embed", tokens)
        return self.first

    def head(self, name: str, x: ir.Value, norm: Norm | None = None) -> ir.Value:
        g = self.ends["head"] = GraphBuilder("head", self.weights)
        g.scope("head")
        own = None if norm is None else Norm(g.initializer(norm.weight), norm.epsilon)
        rows = g.input("x", "float32", [ANY, self.card.hidden])
        g.output(g.head(name, rows, own), "logits", "float32", [ANY, self.card.vocab])
        # Rows are chosen outside
        while (node := x.producer()) is not None and node.op_type in ("Gather", "Reshape") and node.inputs[0]:
            self._nodes.remove(node)
            x = node.inputs[0]
        self.stream = x
        return x


def even(g: GraphBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """`scales.even` as nodes: the rows, and their sizes [.., 1]. A row is divided by its largest value first, since a
    device of 16-bit floats has no room for squares of what a gate gives; and no row is divided by zero."""
    largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
    largest = g.op("Max", largest, g.constant(LEAST_SIZE, "float32"))
    x = g.op("Div", x, largest)
    size = g.op("Sqrt", g.op("ReduceMean", g.op("Mul", x, x), g.constant([-1]), keepdims=1))
    size = g.op("Max", size, g.constant(2.0**-10, "float32"))  # a single channel of a million has that
    return g.op("Div", x, size), g.op("Mul", largest, size)


def cut(recorder: Recorder, shadowed: set[Names]) -> Cut:
    """The recorded model in steps; products of `shadowed` are alone."""
    found, names = Cut(), _Names(recorder)
    found.first = names.give(recorder.first, "embed")
    waiting: list[ir.Node] = []
    count = 0

    def flush() -> None:
        nonlocal count
        if not waiting:
            return
        nodes = tuple(waiting)
        waiting.clear()
        block, last = _block(nodes[0]), _block(nodes[-1])
        count = count + 1 if found.steps and found.steps[-1].block == block else 0
        takes = {value: names.of[value] for node in nodes for value in node.inputs if value and value in names.of}
        parts = [_part(recorder.products[node]) for node in nodes if node in recorder.products]
        label = "-".join([f"{block}.{count}", *parts])
        names.done(nodes)
        gives: dict[ir.Value, str] = {}
        for node in nodes:
            known = recorder.products.get(node)
            wanted = _part(known) if known else str(node.name).partition("/")[2]
            for value in node.outputs:
                if names.readers(value) or value is recorder.stream:
                    gives[value] = names.give(value, wanted, {*takes.values(), *gives.values()})
        found.steps.append(Part(label, block, last, nodes, takes, gives))

    for node in recorder.nodes:
        if node.op_type == "Embed":
            continue
        alone = recorder.products.get(node) in shadowed
        if node.op_type == _ATTENTION or alone:
            flush()
        if node.op_type == _ATTENTION:
            qkv, y = node.inputs[0], node.outputs[0]
            assert qkv is not None
            taken = names.of[qkv]
            names.done((node,))
            found.steps.append(Attention(node, _block(node), taken, names.give(y, "attended", {taken})))
        else:
            waiting.append(node)
            if alone:
                flush()
    flush()
    assert recorder.stream is not None
    found.stream = names.of[recorder.stream]
    found.widths = names.widths
    return found


def part(
    recorder: Recorder, one: Part, chunk: int, shadows: Mapping[str, str], widths: Mapping[str, int], emit: Emit
) -> bytes:  # fmt: skip
    """The graph of a part for `chunk` rows; `shadows` has values to be added, by names; `emit` makes products."""
    g, values = GraphBuilder(one.name, recorder.weights), {}
    for value, name in one.takes.items():
        values[value] = g.input(name, "float32", [chunk, widths[name]])
        if name in shadows:
            beside = g.input(shadows[name], "float32", [chunk, widths[name]])
            g.scope(name)
            values[value] = g.op("Add", values[value], beside)
    for node in one.nodes:
        if node not in recorder.products:
            g.again(node, values)
            continue
        names, (x, *bias) = recorder.products[node], filter(None, node.inputs)
        g.scope(f"{_block(node)}/{_part(names)}")
        values[node.outputs[0]] = emit(g, names, values[x], g.initializer(bias[0]) if bias else None)
    for value, name in one.gives.items():
        g.output(values[value], name, "float32", [chunk, widths[name]])
    return g.serialize()


def attention(recorder: Recorder, one: Attention, width: int, kind: str, scales: np.ndarray) -> bytes:
    """The CPU's graph of an attention over a cache of `kind` (fp32, fp16, int8), any number of rows of one sequence.
    `scales` fp32 [blocks, 2, kv_heads * head_dim] are an int8 cache's."""
    card, node = recorder.card, one.node
    cache = {"fp32": "float32", "fp16": "float16", "int8": "int8"}[kind]
    g = GraphBuilder("attention", recorder.weights, cache=cache)
    g.scope("attention")
    pairs = len(card.ropes[card.rope_of[one.block]].inverse_frequencies)
    shape: list[int | str] = [1, card.kv_heads, "context", card.head_dim]
    given = [
        g.input("qkv", "float32", [1, ANY, width]), *(g.input(f"past_{part}", cache, shape) for part in _PARTS),
        g.input("last", "int32", [1]), g.input("total", "int32", [1]),
        *(g.input(part, "float32", ["context", pairs]) for part in ("cos", "sin")),
        *(None if norm is None else g.initializer(norm) for norm in (*node.inputs[7:9], None, None)[:2]),
        *(g.constant(row, "float32") for row in (scales[one.block] if kind == "int8" else ())),
    ]  # fmt: skip
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes["half"] = int(kind == "fp16")
    y, *present = g.op(_ATTENTION, *given, count=3, domain=KERNELS, **attributes)
    g.output(y, "y", "float32", [1, ANY, card.heads * card.head_dim])
    for name, value in zip(_PARTS, present, strict=True):
        g.output(value, f"present_{name}", cache, shape)
    return g.serialize()


class _Names:
    """What values are called: after their part in a block, and otherwise only where that one is still to be read."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.of: dict[ir.Value, str] = {}
        self.widths: dict[str, int] = {}
        self._left: dict[ir.Value, set[ir.Node]] = {}
        for node in recorder.nodes:
            for value in filter(None, node.inputs):
                self._left.setdefault(value, set()).add(node)

    def readers(self, value: ir.Value | None) -> set[ir.Node]:
        """The nodes that still have to read a value."""
        return self._left.get(value, set())  # type: ignore[arg-type]

    def done(self, nodes: tuple[ir.Node, ...]) -> None:
        """These nodes have read what they read."""
        for node in nodes:
            for value in filter(None, node.inputs):
                self._left[value].discard(node)

    def give(self, value: ir.Value | None, wanted: str, beside: set[str] = frozenset()) -> str:  # type: ignore[assignment]
        """A name for `value`, which none has that is still read, nor any `beside`."""
        assert value is not None
        held = {name for other, name in self.of.items() if self.readers(other)} | beside
        while wanted in held:
            wanted += "'"
        width = _width(self.recorder, value)
        assert self.widths.setdefault(wanted, width) == width
        self.of = {other: name for other, name in self.of.items() if name != wanted} | {value: wanted}
        return wanted


def _width(recorder: Recorder, value: ir.Value) -> int:
    """How many channels a value has."""
    node, card = value.producer(), recorder.card
    assert node is not None
    if node.op_type == "Embed":
        return card.hidden
    if node.op_type == _ATTENTION:
        return card.heads * card.head_dim
    if node in recorder.products:
        return sum(recorder.weights.shapes[f"{name}.weight"][0] for name in recorder.products[node])
    if node.op_type in ("ReduceMax", "ReduceMean"):
        return 1
    halves = 2 if node.op_type == "Split" else 1
    return _width(recorder, next(one for one in node.inputs if one is not None and one.producer())) // halves


def _block(node: ir.Node) -> int:
    return int(str(node.name).partition("/")[0])


def _part(names: Names) -> str:
    """What a product is called: qkv, o, gate_up, down."""
    words = [name.rsplit(".", 1)[-1].removesuffix("_proj") for name in names]
    return "".join(words) if all(len(word) == 1 for word in words) else "_".join(words)
