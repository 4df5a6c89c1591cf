"""Builds ONNX graphs whose weights stay in a bundle's section: the only file that knows onnx-ir.

An architecture calls `op` for the field's standard operators and `linear`, `embed` and `plain` for everything that
has weights; those go through a `Weights` store, which decides the format and says where the bytes lie. A graph knows
nothing about checkpoints or files: its big initializers carry the name of a section, an offset and a length.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .weights import Matrix, Stored, Weights

OPSET = {"": 21, "com.microsoft": 1}
_SECTION = "weights"
_TYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "int32": ir.DataType.INT32,
          "uint8": ir.DataType.UINT8, "int8": ir.DataType.INT8}  # fmt: skip
MICROSOFT = "com.microsoft"
PIECE = 48 << 20  # bytes of one product's weights: repacking one for a device takes as much again for a moment


class GraphBuilder:
    """One graph in the making. `taps` makes the input of every linear an output as well, for calibration;
    `cache_scales` fp32 [blocks, 2, kv_heads * head_dim] makes the key-value cache int8 with these static scales."""

    def __init__(self, name: str, weights: Weights, *, taps: bool = False, cache_scales: np.ndarray | None = None):
        self.name, self.weights, self.taps, self.cache_scales = name, weights, taps, cache_scales
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._scope = ""
        self._counts: dict[str, int] = {}
        self.tapped: dict[tuple[str, ...], str] = {}
        self.producers: dict[tuple[str, ...], str] = {}

    def scope(self, name: str) -> None:
        """Prefixes the names of the nodes that follow, so that a profile reads like the model."""
        self._scope = name

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(_TYPES[dtype]))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Makes `value` an output called `name`."""
        value.name = name
        value.type, value.shape = ir.TensorType(_TYPES[dtype]), ir.Shape(shape)
        self._outputs.append(value)

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes):
        """Adds a node; returns its output, or a list of them when `outputs` is more than one."""
        label = f"{self._scope}/{kind}" if self._scope else kind
        count = self._counts[label] = self._counts.get(label, -1) + 1
        name = f"{label}.{count}" if count else label
        node = ir.Node(
            domain, kind, list(inputs),
            [ir.convenience.convert_attribute(key, value) for key, value in attributes.items() if value is not None],
            num_outputs=outputs, name=name,
        )  # fmt: skip
        for index, value in enumerate(node.outputs):
            value.name = f"{name}:{index}"
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

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
        return self._external(self.weights.plain(name, transform))

    def linear(
        self, names: str | tuple[str, ...], x: ir.Value, bias: bool = False, role: str = "linear", after: str = ""
    ) -> ir.Value:
        """x [.., inputs] times the transposed matrices `names` [outputs, inputs] stacked by rows: [.., sum of outputs].

        Tensor names are without `.weight`; with `bias` their `.bias` vectors are stacked and added. `after` names a
        norm, or a matrix without bias, whose rows each make one channel of x in proportion, so that a factor may move
        between that row and these columns.
        """
        names = (names,) if isinstance(names, str) else names
        matrix = self.weights.matrix(tuple(f"{name}.weight" for name in names), role)
        if after:
            self.producers[names] = f"{after}.weight"
        offset = self._external(self.weights.stacked(tuple(f"{name}.bias" for name in names))) if bias else None
        if self.taps and names not in self.tapped:
            self.tapped[names] = f"tap.{names[0]}"
            self.output(
                self.op("Identity", x), self.tapped[names], "float32", ["batch", f"tokens.{names[0]}", matrix.inputs]
            )
        return self._product(matrix, x, offset)

    def head(self, name: str, x: ir.Value) -> ir.Value:
        """Logits: x [rows, hidden] times the transposed head or, when it is tied, the embedding."""
        return self._product(
            self.weights.matrix((name,), "embedding" if name.endswith("embed_tokens.weight") else "head"), x
        )

    def embed(self, name: str, tokens: ir.Value) -> ir.Value:
        """Rows of the table `name` [vocab, hidden] at `tokens`."""
        table = self.weights.matrix((name,), "embedding")
        if table.format.bits == 32:
            return self.op("Gather", self._external(table.values), tokens, axis=0)
        # The same bytes as the head's [outputs, groups, blob], seen as rows
        rows = table.values.reshaped(f"{table.values.name}.rows", (table.outputs, table.values.length // table.outputs))
        zeros = None if table.zeros is None else self._external(table.zeros)
        found = self.op(
            "GatherBlockQuantized", self._external(rows), tokens, self._external(table.scales), zeros,
            domain=MICROSOFT, bits=table.format.bits, block_size=table.format.group, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if table.inputs % table.format.group:  # the last group's padding
            found = self.op("Slice", found, self.constant([0]), self.constant([table.inputs]), self.constant([-1]))
        return found

    def serialize(self) -> bytes:
        """The ONNX model, deterministic for the same calls."""
        graph = ir.Graph(
            self._inputs, self._outputs, nodes=self._nodes, initializers=list(self._initializers.values()),
            opset_imports=OPSET, name=self.name,
        )  # fmt: skip
        model = ir.Model(graph, ir_version=10, producer_name="shoal")
        return ir.serde.serialize_model(model).SerializeToString(deterministic=True)

    def _product(self, matrix: Matrix, x: ir.Value, bias: ir.Value | None = None) -> ir.Value:
        pieces = [self._piece(piece, x) for piece in matrix.split(PIECE)]
        y = pieces[0] if len(pieces) == 1 else self.op("Concat", *pieces, axis=-1)
        return y if bias is None else self.op("Add", y, bias)

    def _piece(self, matrix: Matrix, x: ir.Value) -> ir.Value:
        if matrix.format.bits == 32:
            return self.op("FusedMatMul", x, self._external(matrix.values), domain=MICROSOFT, transB=1)
        zeros = None if matrix.zeros is None else self._external(matrix.zeros.flat())
        return self.op(
            "MatMulNBits", x, self._external(matrix.values), self._external(matrix.scales.flat()), zeros,
            domain=MICROSOFT, K=matrix.inputs, N=matrix.outputs, bits=matrix.format.bits,
            block_size=matrix.format.group, accuracy_level=4,
        )  # fmt: skip

    def _external(self, stored: Stored) -> ir.Value:
        if stored.name not in self._initializers:
            self._add(ir.ExternalTensor(
                _SECTION, stored.offset, stored.length, _TYPES[stored.dtype],
                shape=ir.Shape(stored.shape), name=stored.name, base_dir="",
            ))  # fmt: skip
        return self._initializers[stored.name]

    def _add(self, tensor) -> None:
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._initializers[tensor.name] = value
