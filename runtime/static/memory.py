"""What prefill in chunks adds to a plan: rows by shapes alone, before anything is opened.

Of L blocks with q static graphs each there are L * q for every chunk length, shared by all chunks, and on the CPU one
of attention a block, or fewer where blocks are alike, for any length of the cache (llm.npu has one more for each chunk:
L * (q - a) + C * L * a). It knows nothing about devices.
"""

from collections.abc import Mapping

from .. import session
from ..budget import Row
from ..bundle import Bundle
from ..session import Place
from . import graphs
from .layout import Shadow, Static
from .prefill import FLIGHT, lane_bytes

_GRAPH = 220 << 10  # what an open graph holds, and for each of its nodes:
_NODE = 4 << 10


def rows(bundle: Bundle, static: Static, places: Mapping[str, Place], kv: str, on_cpu: bool) -> tuple[Row, ...]:
    """`on_cpu`: the static graphs run there, whose engine copies their weights for each chunk length; elsewhere the
    device holds them, in memory that is in no plan."""
    named, others = graphs.device_names(static), graphs.cpu_names(static, kv)
    held = copied = 0
    static_sections = {graphs.section_of(bundle, name) for name in named}
    for section in sorted(static_sections | {graphs.section_of(bundle, name) for name in others}):
        model = session.read(bundle.bytes(bundle.section("graph", section)), places)
        held += _GRAPH + _NODE * len(model.nodes)
        if section in static_sections:
            copied += sum(tensor.nbytes for tensor in model.tensors if tensor.external)
    shadows = [step for step in static.steps if isinstance(step, Shadow)]
    mapped = sum(step.inputs * step.outputs + 4 * step.outputs for step in shadows)
    hot = sum(len(step.hot) * step.outputs + 4 * step.inputs + 8 * step.outputs for step in shadows)
    lengths = ", ".join(map(str, static.chunks))
    count = f"{len(static.names)} for each chunk of {lengths}, {len(others)} for any length"
    found = [
        Row("static graphs", held + copied * on_cpu, "anonymous", note=count),
        Row("chunk buffers", FLIGHT * lane_bytes(static), "anonymous", note=f"{FLIGHT} chunks of {static.chunks[-1]} tokens"),
    ]
    if shadows:
        kept = sum(len(step.hot) for step in shadows)
        found.append(Row("hot shadow rows", hot, "anonymous", note=f"{kept} channels of {len(shadows)} products"))
        found.append(Row("shadow weights", mapped, "mapped", note="at most: rows are read when one is needed"))
    return tuple(found)
