"""A graph of our own operators said in ONNX Runtime's, and its weights in the layout that these read: for a device
without the kernels' library, for another execution provider, and for comparison.

The weights are the same numbers to the bit. What differs is how activations are rounded on the way: MatMulNBits does
it for each block of inputs. The graph is checked like any other (onnx_wire.py); bytes are written where the caller
says. It knows nothing about sessions, caches or bundles.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from .. import onnx_wire
from ..errors import BundleError
from ..onnx_wire import External, Model, Node, Tensor
from . import DOMAIN
from .layout import BLOCK, PANEL, LinearFormat, nbits_shape, rotate, to_matmulnbits

LOCATION = "transcoded"  # of the weights in their other layout
PIECE = 48 << 20  # bytes of one product's codes: ORT's repacking takes as much again for a moment
_MICROSOFT = "com.microsoft"
_ALIGNMENT = 64
_SLICE = 4 << 20  # weights that are transcoded at once
_FLOAT, _UINT8, _FLOAT16 = 1, 2, 10
_ROTATION = "lowered.rotation"


@dataclass(frozen=True)
class Transcoded:
    """A matrix in both layouts: where it is now, and from which byte on its codes, scales and zeros will be."""

    name: str
    format: LinearFormat
    source: External
    gated: bool
    codes: int
    scales: int
    zeros: int
    end: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Bits, inputs of a block, blocks of a row."""
        return nbits_shape(self.format)

    @property
    def row(self) -> tuple[int, int, int]:
        """Bytes of a row's codes, scales and zeros."""
        bits, block, blocks = self.shape
        return blocks * block * bits // 8, 4 * blocks, -(-blocks * bits // 8)


@dataclass(frozen=True)
class Lowered:
    """`graph` in ORT's operators; its weights are in LOCATION, `matrices` of `length` bytes in all."""

    graph: bytes
    matrices: tuple[Transcoded, ...]
    length: int


def is_ours(model: Model) -> bool:
    """Whether the graph has operators that only the kernels' library computes."""
    return any(node.domain == DOMAIN for node in model.nodes)


def lower(model: Model) -> Lowered:
    """The same graph in ONNX Runtime's operators. Raises BundleError for operators or formats that are not ours."""
    work = _Lowering(model)
    nodes = {node: work.node(node) for node in model.nodes if node.domain == DOMAIN}
    graph = onnx_wire.rewrite(model, nodes, work.tensors, work.matrices)
    return Lowered(graph, tuple(work.matrices.values()), work.length)


def transcode(
    lowered: Lowered, read: Callable[[External], memoryview], out: BinaryIO, step: Callable[[int], object]
) -> None:
    """Writes the weights of `lowered` to `out` from its beginning; `read` gives the bytes of an initializer, `step` is
    told after each slice how many bytes of LOCATION are done."""
    for matrix in lowered.matrices:
        data, panel = read(matrix.source), matrix.format.panel_bytes
        panels = max(2, _SLICE // (PANEL * matrix.format.padded) // 2 * 2)
        half = matrix.format.outputs // 2
        for first in range(0, matrix.format.panels, panels):
            part = data[first * panel : (first + panels) * panel]
            start = first * PANEL
            count = min(panels * PANEL, matrix.format.outputs - start)
            found = to_matmulnbits(dataclasses.replace(matrix.format, outputs=count), part)
            arrays = [
                np.ascontiguousarray(a).reshape(count, -1).view(np.uint8)
                for a in (found.codes, found.scales, found.zeros)
            ]
            for array, at, row in zip(arrays, (matrix.codes, matrix.scales, matrix.zeros), matrix.row, strict=True):
                # Of two matrices whose panels alternate, the first comes whole before the second
                split = (
                    [array.reshape(-1, 2, PANEL, row)[:, i].reshape(-1, row) for i in (0, 1)]
                    if matrix.gated
                    else [array]
                )
                for index, rows in enumerate(split):
                    out.seek(at + (index * half + start // len(split)) * row)
                    out.write(np.ascontiguousarray(rows).data)
        step(matrix.end)
    out.seek(0, os.SEEK_END)
    out.write(bytes(lowered.length - out.tell()))


class _Lowering:
    """One graph on its way; names of what is added begin with the node's own."""

    def __init__(self, model: Model):
        self.initializers = {tensor.name: tensor for tensor in model.tensors}
        self.tensors: list[bytes] = []
        self.matrices: dict[str, Transcoded] = {}
        self.length = 0
        self._added: set[str] = set()

    def node(self, node: Node) -> list[bytes]:
        made = {"QuantizedLinear": self.linear, "QuantizedRows": self.rows, "CachedAttention": self.attention}
        if node.op not in made:
            raise _refuse(f"has an operator {node.op!r:.40}, which this version does not know")
        return made[node.op](node)

    def linear(self, node: Node) -> list[bytes]:
        x, weights, norm, bias, residual = _inputs(node, 2, 5)
        gated = node.integers.get("activation", 0)
        if not 0 <= gated <= 3 or (gated and (bias or residual)):
            raise _refuse(f"has a product with an activation {gated}")
        matrix = self.matrix(node, weights, bool(gated))
        chain = _Chain(node)
        if norm:
            x = chain.rms(x, norm, node.floats.get("epsilon", 0.0))
        if matrix.format.rotated:
            x = self.rotated(chain, x)
        bits, block, blocks = matrix.shape
        count = -(-matrix.format.outputs * matrix.row[0] // PIECE)
        step = -(-matrix.format.outputs // count)
        pieces = []
        for start in range(0, matrix.format.outputs, step):
            rows = min(step, matrix.format.outputs - start)
            suffix = f"[{start}:{start + rows}]" if count > 1 else ""
            arrays = [
                self.external(f"{weights}.{part}{suffix}", dtype, dims, at + start * size, rows * size)
                for part, dtype, dims, at, size in (
                    ("codes", _UINT8, (rows, blocks, block * bits // 8), matrix.codes, matrix.row[0]),
                    ("scales", _FLOAT, (rows * blocks,), matrix.scales, matrix.row[1]),
                    ("zeros", _UINT8, (rows * matrix.row[2],), matrix.zeros, matrix.row[2]),
                )
            ]  # fmt: skip
            pieces.append(chain.add(
                "MatMulNBits", x, *arrays, domain=_MICROSOFT, K=matrix.format.inputs, N=rows, bits=bits,
                block_size=block, accuracy_level=4,
            ))  # fmt: skip
        y = pieces[0] if len(pieces) == 1 else chain.add("Concat", *pieces, axis=-1)
        if gated:
            gate, up = chain.several("Split", 2, y, axis=-1, num_outputs=2)
            if gated == 1:
                gate = chain.add("QuickGelu", gate, domain=_MICROSOFT, alpha=1.0)
            else:
                gate = chain.add("Gelu", gate, approximate="tanh" if gated == 3 else "none")
            y = chain.add("Mul", gate, up)
        for term in (bias, residual):
            y = chain.add("Add", y, term) if term else y
        return chain.end()

    def rows(self, node: Node) -> list[bytes]:
        tokens, weights = _inputs(node, 2, 2)
        matrix = self.matrix(node, weights, False)
        bits, block, blocks = matrix.shape
        chain, (codes, scales, zeros) = _Chain(node), matrix.row
        outputs = matrix.format.outputs
        arrays = [
            self.external(f"{weights}.rows", _UINT8, (outputs, codes), matrix.codes, outputs * codes),
            self.external(f"{weights}.row_scales", _FLOAT, (outputs, blocks), matrix.scales, outputs * scales),
            self.external(f"{weights}.row_zeros", _UINT8, (outputs, zeros), matrix.zeros, outputs * zeros),
        ]
        y = chain.add(
            "GatherBlockQuantized", arrays[0], tokens, *arrays[1:], domain=_MICROSOFT, bits=bits, block_size=block,
            gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if matrix.format.inputs % block:  # the last block's padding
            ends = [self.integers([number]) for number in (0, matrix.format.inputs, -1)]
            y = chain.add("Slice", y, *ends)
        if matrix.format.rotated:
            y = self.rotated(chain, y)
        factor = node.floats.get("factor", 1.0)
        if factor != 1.0:
            y = chain.add("Mul", y, chain.add("Constant", value_float=factor))
        return chain.end()

    def attention(self, node: Node) -> list[bytes]:
        qkv, key, value, last, total, cos, sin, q_norm, k_norm, k_scale, v_scale = _inputs(node, 7, 11, 3)
        heads, kv_heads, width = (node.integers.get(name, 0) for name in ("heads", "kv_heads", "head_dim"))
        window = node.integers.get("window", 0)
        if not (0 < kv_heads <= heads <= 4096 and heads % kv_heads == 0 and 0 < width <= 4096 and window >= 0):
            raise _refuse("has an attention with impossible heads")
        chain = _Chain(node)
        qkv_parts = [qkv, "", ""]
        if q_norm or k_norm:
            widths = [heads * width, kv_heads * width, kv_heads * width]
            qkv_parts = chain.several("Split", 3, qkv, self.integers(widths), axis=-1)
            for index, weight in ((index, weight) for index, weight in enumerate((q_norm, k_norm)) if weight):
                part = chain.add("Reshape", qkv_parts[index], self.integers([0, 0, -1, width]))
                part = chain.rms(part, weight, node.floats.get("epsilon", 0.0))
                qkv_parts[index] = chain.add("Reshape", part, self.integers([0, 0, widths[index]]))
        half, outputs = node.integers.get("half", 0), list(node.outputs)
        if half:  # with a cache of float16 all of it is in float16
            qkv_parts = [part and chain.add("Cast", part, to=_FLOAT16) for part in qkv_parts]
            cos, sin = (chain.add("Cast", part, to=_FLOAT16) for part in (cos, sin))
            outputs[0] = f"{node.name}/attended:0"
        inputs = [*qkv_parts, key, value, last, total, cos, sin]
        if k_scale:  # then come position ids, attention bias and head sink, unused, and the scales
            inputs += ["", "", "", k_scale, v_scale]
        per = "PER_CHANNEL" if k_scale else None
        chain.add(
            "GroupQueryAttention", *inputs, domain=_MICROSOFT, outputs=outputs, num_heads=heads,
            kv_num_heads=kv_heads, scale=node.floats.get("scale", 0.0), do_rotary=1,
            local_window_size=window or -1, kv_cache_bit_width=per and 8, k_quant_type=per,
            v_quant_type=per,
        )  # fmt: skip
        if half:
            chain.add("Cast", outputs[0], outputs=node.outputs[:1], to=_FLOAT)
        return chain.made

    def rotated(self, chain: "_Chain", x: str) -> str:
        """x with each block of 64 values of its rows rotated."""
        if _ROTATION not in self._added:
            self._added.add(_ROTATION)
            self.tensors.append(onnx_wire.array_bytes(_ROTATION, rotate(np.eye(BLOCK, dtype=np.float32))))
        blocks = chain.add("Reshape", x, self.integers([-1, BLOCK]))
        return chain.add("Reshape", chain.add("MatMul", blocks, _ROTATION), chain.add("Shape", x))

    def matrix(self, node: Node, name: str, gated: bool) -> Transcoded:
        if name in self.matrices:
            if self.matrices[name].gated != gated:
                raise _refuse(f"uses {name!r:.80} in two ways")
            return self.matrices[name]
        tensor = self.initializers.get(name)
        if tensor is None or tensor.external is None:
            raise _refuse(f"has weights {name!r:.80} that are not in the bundle")
        numbers = {key: node.integers.get(key, 0) for key in ("inputs", "outputs", "bits", "group", "span", "rotated")}
        format = LinearFormat(**numbers).check()
        if tensor.nbytes != format.bytes or (gated and format.outputs % (2 * PANEL)):
            raise _refuse(f"has weights {name!r:.80} of another size than their format's")
        bits, block, blocks = nbits_shape(format)
        at = [self.length]
        for size in (blocks * block * bits // 8, 4 * blocks, -(-blocks * bits // 8)):
            at.append(-(-(at[-1] + size * format.outputs) // _ALIGNMENT) * _ALIGNMENT)
        self.length = at[-1]
        found = self.matrices[name] = Transcoded(name, format, tensor.external, gated, *at)
        return found

    def external(self, name: str, dtype: int, dims: tuple[int, ...], offset: int, length: int) -> str:
        if name not in self._added:
            self._added.add(name)
            self.tensors.append(
                onnx_wire.tensor_bytes(Tensor(name, dtype, dims, External(LOCATION, offset, length), (0, 0)))
            )
        return name

    def integers(self, values: list[int]) -> str:
        name = "lowered." + ".".join(map(str, values))
        if name not in self._added:
            self._added.add(name)
            self.tensors.append(onnx_wire.array_bytes(name, np.array(values, np.int64)))
        return name


class _Chain:
    """The nodes that one node becomes; the last gives its output."""

    def __init__(self, node: Node):
        self.node, self.made = node, list[bytes]()
        self._last: tuple = ()

    def several(self, op: str, count: int, *inputs: str, **attributes) -> list[str]:
        names = [f"{self.node.name}/{len(self.made)}:{index}" for index in range(count)]
        self.add(op, *inputs, outputs=names, **attributes)
        return names

    def add(self, op: str, *inputs: str, outputs=None, domain: str = "", **attributes) -> str:
        outputs = list(outputs or [f"{self.node.name}/{len(self.made)}:0"])
        name = f"{self.node.name}/{op}.{len(self.made)}"
        self._last = (op, inputs, domain, name, attributes)
        self.made.append(onnx_wire.node_bytes(op, inputs, outputs, domain, name, **attributes))
        return outputs[0]

    def rms(self, x: str, weight: str, epsilon: float) -> str:
        return self.add("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def end(self) -> list[bytes]:
        """All of them, the last one's output under the node's name."""
        op, inputs, domain, name, attributes = self._last
        self.made[-1] = onnx_wire.node_bytes(op, inputs, self.node.outputs[:1], domain, name, **attributes)
        return self.made


def _inputs(node: Node, required: int, most: int, outputs: int = 1) -> list[str]:
    """The names of all inputs, empty where one is absent. Raises BundleError for a node of another form."""
    if not all((*node.inputs, *[""] * required)[:required]) or len(node.inputs) > most or len(node.outputs) != outputs:
        raise _refuse(f"has an operator {node.op!r:.40} whose inputs or outputs are not its own")
    return [*node.inputs, *[""] * (most - len(node.inputs))]


def _refuse(why: str) -> BundleError:
    return BundleError("The model's graph cannot be used.", f"It {why}.", "Convert the checkpoint again.")
