"""Builds ONNX graphs whose weights stay in a bundle's section: the only file that knows onnx-ir.

An architecture calls `op` for the field's standard operators and `linear`, `embed` and `plain` for everything that
has weights; those go through a `Weights` store, which decides the format and says where the bytes lie. A graph knows
nothing about checkpoints or files: its big initializers carry the name of a section, an offset and a length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from shoal.runtime.kernels import DOMAIN as KERNELS
from shoal.runtime.kernels.layout import BLOCK

from .weights import Matrix, Stored, Weights

MICROSOFT = "com.microsoft"
OPSET = {"": 21, "com.microsoft": 1, KERNELS: 1}
_TYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "int32": ir.DataType.INT32,
          "uint8": ir.DataType.UINT8, "int8": ir.DataType.INT8, "float16": ir.DataType.FLOAT16}  # fmt: skip
ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}  # as the kernels number them
_UNTAPPED = ("router", "experts")  # roles of matrices whose inputs no method looks at


@dataclass(frozen=True)
class Norm:
    """An RMS norm that waits for the product that takes its rows: x / sqrt(mean(x^2) + epsilon) * weight."""

    weight: ir.Value
    epsilon: float


class GraphBuilder:
    """One graph in the making. `taps` makes the input of every product an output as well, for calibration. `cache` is
    the key-value cache's type; int8 has the static `cache_scales` fp32 [blocks, 2, kv_heads * head_dim]."""

    def __init__(
        self, name: str, weights: Weights, *, taps: bool = False, cache: str = "float32",
        cache_scales: np.ndarray | None = None,
    ):  # fmt: skip
        self.name, self.weights, self.taps, self.cache_scales = name, weights, taps, cache_scales
        self.cache = cache if cache_scales is None else "int8"
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._handles: dict[str, ir.Value] = {}
        self._scope = ""
        self._counts: dict[str, int] = {}
        self.tapped: dict[tuple[str, ...], str] = {}
        self.producers: dict[tuple[str, ...], str] = {}
        self.mixed: dict[tuple[str, ...], str] = {}
        self.kept: dict[str, str] = {}

    def scope(self, name: str) -> None:
        """Prefixes the names of the nodes that follow, so that a profile reads like the model."""
        self._scope = name

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(_TYPES[dtype]))
        self._inputs.append(value)
        return value

    def handle(self, name: str) -> ir.Value:
        """The input that names what lies outside of the graph, a `stack` or a store of `experts`: a number that the
        kernels know."""
        if name not in self._handles:
            self._handles[name] = self.input(name, "int64", [1])
        return self._handles[name]

    def output(self, value: ir.Value, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Makes `value` an output called `name`."""
        value.name = name
        value.type, value.shape = ir.TensorType(_TYPES[dtype]), ir.Shape(shape)
        self._outputs.append(value)

    def keep(self, key: str, value: ir.Value, width: int) -> None:
        """Makes `value` [batch, tokens, width] an output, to be found under `key`, if the graph is for calibration."""
        if self.taps:
            self.kept[key] = f"kept.{key}"
            self.output(self.op("Identity", value), self.kept[key], "float32", ["batch", f"tokens.{key}", width])

    def op(self, kind: str, *inputs: ir.Value | None, count: int = 1, domain: str = "", **attributes):
        """Adds a node; returns its output, or a list of them when `count` is more than one."""
        label = f"{self._scope}/{kind}" if self._scope else kind
        used = self._counts[label] = self._counts.get(label, -1) + 1
        name = f"{label}.{used}" if used else label
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        node = ir.Node(
            domain, kind, given,
            [ir.convenience.convert_attribute(key, value) for key, value in attributes.items() if value is not None],
            num_outputs=count, name=name,
        )  # fmt: skip
        for index, value in enumerate(node.outputs):
            value.name = f"{name}:{index}"
        self._nodes.append(node)
        return node.outputs[0] if count == 1 else list(node.outputs)

    def again(self, node: ir.Node, values: dict[ir.Value, ir.Value]) -> None:
        """Adds what another graph over the same weights has as `node`, its inputs as `values` have them: other graph's
        value -> this one's. Its outputs are added to these."""
        given = []
        for value in node.inputs:
            if value is not None and value not in values:
                values[value] = self.initializer(value)
            given.append(None if value is None else values[value])
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        self.scope(str(node.name).rpartition("/")[0])
        made = self.op(node.op_type, *given, count=len(node.outputs), domain=node.domain, **attributes)
        values.update(zip(node.outputs, made if len(node.outputs) > 1 else [made], strict=True))

    def initializer(self, value: ir.Value) -> ir.Value:
        """What another graph has as an initializer."""
        if value.name not in self._initializers:
            self._add(value.const_value)
        return self._initializers[str(value.name)]

    def constant(self, array, dtype=np.int64) -> ir.Value:
        """An inline constant of at most a few KiB; equal small ones are one initializer."""
        array = np.asarray(array, dtype)
        if array.nbytes > 256:
            name = f"const.{len(self._initializers)}"
            self._add(ir.tensor(array, name=name))
            return self._initializers[name]
        name = f"const.{array.dtype}.{list(array.shape)}.{array.tobytes().hex()}".replace(" ", "")
        if name not in self._initializers:
            self._add(ir.tensor(array, name=name))
        return self._initializers[name]

    def plain(self, name: str, transform=None) -> ir.Value:
        """A vector of the checkpoint (norm, bias) in fp32; `transform` (array -> array) as the model defines it."""
        return self.external(self.weights.plain(name, transform))

    def linear(
        self, names: str | tuple[str, ...], x: ir.Value, bias: bool = False, role: str = "linear", after: str = "",
        norm: Norm | None = None, residual: ir.Value | None = None, mixes: str = "",
    ) -> ir.Value:  # fmt: skip
        """x [.., inputs] times the transposed matrices `names` [outputs, inputs] stacked by rows: [.., sum of outputs].

        Tensor names are without `.weight`; with `bias` their `.bias` vectors are stacked and added, and so is
        `residual`. `norm` is applied to x first. `after` names a norm, or a matrix without bias, whose rows each make
        one channel of x in proportion, so that a factor may move between that row and these columns. `mixes` names V,
        each of whose rows makes that channel of all heads that share it.
        """
        names = (names,) if isinstance(names, str) else names
        matrix = self.weights.matrix(tuple(f"{name}.weight" for name in names), role)
        offset = self.external(self.weights.stacked(tuple(f"{name}.bias" for name in names))) if bias else None
        if role not in _UNTAPPED:
            x, norm = self._tap(names, x, norm, after, matrix)
        if mixes:
            self.mixed[names] = mixes
        return self._product(matrix, x, norm, offset, residual)

    def gated(
        self, names: tuple[str, str], x: ir.Value, activation: str, after: str, norm: Norm | None, role: str = "linear"
    ) -> ir.Value:
        """activation(gate(x)) * up(x) for the matrices `names` = (gate, up): one product. The rest as in `linear`."""
        matrix = self.weights.matrix((f"{names[0]}.weight", f"{names[1]}.weight"), role, gated=True)
        if role not in _UNTAPPED:
            x, norm = self._tap(names, x, norm, after, matrix)
        if matrix.gated:
            return self._product(matrix, x, norm, activation=ACTIVATIONS[activation])
        return self.gate(self._product(matrix, x, norm), activation)

    def gate(self, y: ir.Value, activation: str) -> ir.Value:
        """activation(the first half of y's channels) times the second."""
        gate, up = self.op("Split", y, count=2, axis=-1, num_outputs=2)
        if activation == "silu":
            gate = self.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)  # x * sigmoid(x) in one operator
        elif activation == "relu":
            gate = self.op("Relu", gate)
        else:
            gate = self.op("Gelu", gate, approximate="tanh" if activation == "gelu_tanh" else "none")
        return self.op("Mul", gate, up)

    def head(self, name: str, x: ir.Value, norm: Norm | None = None) -> ir.Value:
        """Logits: x [rows, hidden] times the transposed head or, when it is tied, the embedding."""
        matrix = self.weights.matrix((name,), "head")
        x, norm = self._tap((name.removesuffix(".weight"),), x, norm, "", matrix)
        return self._product(matrix, x, norm)

    def embed(self, name: str, tokens: ir.Value, scale: float = 1.0, tied: bool = False) -> ir.Value:
        """Rows of the table `name` [vocab, hidden] at `tokens`, times `scale`; `tied` says that it is the head too."""
        table = self.weights.matrix((name,), "head" if tied else "embedding")
        assert table.values is not None  # no table is stacked
        if table.layout is not None:
            return self.op(
                "QuantizedRows", tokens, self.external(table.values), domain=KERNELS, factor=float(scale),
                **vars(table.layout),
            )  # fmt: skip
        rows = self.op("Gather", self.external(table.values), tokens, axis=0)
        return rows if scale == 1.0 else self.op("Mul", rows, self.constant(scale, "float32"))

    def rms(self, x: ir.Value, norm: Norm) -> ir.Value:
        """The norm of x over its last axis."""
        return self.op("SimplifiedLayerNormalization", x, norm.weight, axis=-1, epsilon=norm.epsilon, stash_type=1)

    def serialize(self) -> bytes:
        """The ONNX model, deterministic for the same calls."""
        graph = ir.Graph(
            self._inputs, self._outputs, nodes=self._nodes, initializers=list(self._initializers.values()),
            opset_imports=OPSET, name=self.name,
        )  # fmt: skip
        model = ir.Model(graph, ir_version=10, producer_name="shoal")
        return ir.serde.serialize_model(model).SerializeToString(deterministic=True)

    def _tap(self, names: tuple[str, ...], x: ir.Value, norm: Norm | None, after: str, matrix: Matrix):
        """Notes who made x, and makes it, normed, an output if the graph is for calibration."""
        if after:
            self.producers[names] = f"{after}.weight"
        if not self.taps or names in self.tapped:
            return x, norm
        x = self.rms(x, norm) if norm else x
        self.tapped[names] = f"tap.{names[0]}"
        shape: list[int | str] = ["batch", f"tokens.{names[0]}", matrix.inputs]
        self.output(self.op("Identity", x), self.tapped[names], "float32", shape)
        return x, None

    def _product(
        self, matrix: Matrix, x: ir.Value, norm: Norm | None = None, bias: ir.Value | None = None,
        residual: ir.Value | None = None, activation: int = 0,
    ) -> ir.Value:  # fmt: skip
        if matrix.stacked is not None:
            return self.op(
                "StackedLinear", x, self.handle("stack"), norm.weight if norm else None, bias, residual, domain=KERNELS,
                epsilon=norm.epsilon if norm else 0.0, activation=activation, inputs=matrix.inputs,
                outputs=matrix.outputs, matrix=matrix.stacked, rank=matrix.rank,
                rotated=int(matrix.inputs % BLOCK == 0),
            )  # fmt: skip
        assert matrix.values is not None
        values = self.external(matrix.values)
        if matrix.layout is not None:
            return self.op(
                "QuantizedLinear", x, values, norm.weight if norm else None, bias, residual, domain=KERNELS,
                epsilon=norm.epsilon if norm else 0.0, activation=activation, **vars(matrix.layout),
            )  # fmt: skip
        y = self.op("FusedMatMul", self.rms(x, norm) if norm else x, values, domain=MICROSOFT, transB=1)
        for term in (bias, residual):
            y = y if term is None else self.op("Add", y, term)
        return y

    def external(self, stored: Stored) -> ir.Value:
        """An initializer whose bytes are in a section."""
        if stored.name not in self._initializers:
            self._add(ir.ExternalTensor(
                stored.section, stored.offset, stored.length, _TYPES[stored.dtype],
                shape=ir.Shape(stored.shape), name=stored.name, base_dir="",
            ))  # fmt: skip
        return self._initializers[stored.name]

    def _add(self, tensor) -> None:
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._initializers[tensor.name] = value
