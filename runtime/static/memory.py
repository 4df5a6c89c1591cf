"""What prefill in chunks adds to a plan: rows by shapes alone, before anything is opened.

Of L blocks with q subgraphs each, of which a are attention, there are L * (q - a) static graphs for every chunk length,
shared by all chunks, and on the CPU L * a for any length of the cache, or fewer where blocks are alike (llm.npu, Xu et
al., ASPLOS 2025, has one for each chunk: C * L * a). It knows nothing about devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .. import onnx_wire, session
from ..budget import Row
from ..bundle import Bundle
from ..session import Place
from . import graphs
from .layout import SECTION, Shadow, Static
from .prefill import FLIGHT, lane_bytes

_GRAPH = 290 << 10  # what an open graph holds, and for each of its nodes:
_NODE = 6 << 10
_THREAD = 64 << 10  # of its pool
# Operators whose weights the CPU provider copies into a layout of its own, for each chunk length anew
_COPIED = {"MatMul", "Gemm", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}


@dataclass(frozen=True)
class Beside:
    """Rows of a plan, and what the static graphs keep between two operators."""

    rows: tuple[Row, ...] = ()
    arena: int = 0


def beside(bundle: Bundle, static: Static, places: Mapping[str, Place], kv: str, on_cpu: bool) -> Beside:
    """`on_cpu`: the static graphs run there, and their weights count; elsewhere the device holds them, in memory that
    is in no plan."""
    named, others = graphs.device_names(static), graphs.cpu_names(static, kv)
    own = {graphs.section_of(bundle, name) for name in named}
    held = copied = widest = 0
    read: dict[int, int] = {}  # of the section: offset -> bytes
    for section in sorted(own | {graphs.section_of(bundle, name) for name in others}):
        model = session.read(bundle.bytes(bundle.section("graph", section)), places)
        held += _GRAPH + _NODE * len(model.nodes) + (_THREAD if on_cpu or section not in own else 0)
        if section in own and on_cpu:
            for tensor, copy in _weights(model):
                assert tensor.external is not None
                widest = max(widest, tensor.external.length)
                if copy:
                    copied += tensor.external.length
                elif tensor.external.location == SECTION:
                    read[tensor.external.offset] = tensor.external.length
    shadows = [step for step in static.steps if isinstance(step, Shadow)]
    hot = sum(len(step.hot) * step.outputs + 4 * step.inputs + 8 * step.outputs for step in shadows)
    read |= {step.weights: step.inputs * step.outputs for step in shadows}
    lengths = ", ".join(map(str, static.chunks))
    count = f"{len(static.names)} for each chunk of {lengths}; {len(others)} for any length"
    rows = [
        Row("static graphs", held + copied, "anonymous", note=count),
        Row("static weights", sum(read.values()), "mapped",
            note="read by every chunk" if on_cpu else "at most: rows for shadows, when one is needed"),
        Row("chunk buffers", FLIGHT * lane_bytes(static), "anonymous", note=f"{FLIGHT} chunks of {static.chunks[-1]}"),
    ]  # fmt: skip
    if shadows:
        kept = sum(len(step.hot) for step in shadows)
        rows.append(Row("hot shadow rows", hot, "anonymous", note=f"{kept} channels of {len(shadows)} products"))
    # A weight in floats, as the engine says codes where it has no product for them, and values of the widest graph
    widths = 4 * static.chunks[-1] * max(static.widths.values())
    return Beside(tuple(rows), 8 * widest + 4 * widths if on_cpu else 0)


def _weights(model: onnx_wire.Model) -> list[tuple[onnx_wire.Tensor, bool]]:
    """The external tensors of a graph, and whether the engine copies each."""
    packed = {name for node in model.nodes if node.op in _COPIED for name in node.inputs}
    return [(tensor, tensor.name in packed) for tensor in model.tensors if tensor.external]
