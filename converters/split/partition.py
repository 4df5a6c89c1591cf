"""A network that was not trained to be cut, in two where runtime/split/partition.py found that it should be.

    pieces = elsewhere(profile("network.onnx", {"image": image}), there=8.0)
    head, tail = part("network.onnx", pieces, cut(pieces, image.nbytes, Line(up=1e6, rtt=0.02)))
    pack({"head": head, "tail": tail}, "network.device.shoal", "network")

The head gives every value that crosses, and the tail takes them all, so such a cut need not be one of a single value.
What depends on no input is in the half that needs it, or in both. It knows nothing about training, codecs or links.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from shoal.runtime.errors import ConvertError, UsageError
from shoal.runtime.events import Progress, silent
from shoal.runtime.session import Value
from shoal.runtime.split import partition
from shoal.runtime.split.partition import Cut, Piece

from ..sources.onnx import Model, graph
from .graph import Graph, Node, depending, sizes, tidy, types
from .write import external, write

_SENT = " sent"  # behind the name of a value that is an input or an output of the network and crosses


def profile(
    source: Model, feeds: Mapping[str, np.ndarray], *, runs: int = 5, threads: int = 1, progress: Progress = silent
) -> tuple[Piece, ...]:
    """runtime.split.partition.profile of an ONNX file (or ModelProto bytes), as `part` will see it, of any size."""
    with external(write(graph(source))) as (model, places):
        return partition.profile(model, feeds, places, runs=runs, threads=threads, progress=progress)


def part(
    source: Model, pieces: Sequence[Piece], found: Cut, shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[bytes, bytes]:
    """(head, tail) as ModelProto bytes of the network whose profile is `pieces`: those `found.here`, and the rest.

    The batch is open; other lengths are the file's own, or of `shapes` (one row of each input) where it leaves them
    open. Raises UsageError where one of the halves would be empty, and ConvertError for a value that crosses and has no
    batch, naming the node that gives it.
    """
    if not 0 < len(found.here) < len(pieces):
        side = "device" if found.here else "edge"
        raise UsageError("There is nothing to part.", f"The cut leaves all to the {side}.", "Run it there whole.")
    whole = graph(source)
    if not {name for piece in pieces for name in piece.gives} <= set(_order(whole)):
        raise UsageError("The pieces are of another network.", "It has no such values.", "Profile this one.")
    mine = _before(whole, {name for place in found.here for name in pieces[place].gives})
    given = depending(whole, (port.name for port in whole.inputs))
    here = [node for node in whole.nodes if not mine.isdisjoint(node.outputs)]
    there = [node for node in whole.nodes if mine.isdisjoint(node.outputs)]
    made = {port.name for port in whole.inputs} | {name for node in here for name in node.outputs}
    needed = {name for node in there for name in node.inputs} | {name for name in whole.outputs if name in mine}
    crossing = [name for name in _order(whole) if name in made & needed & given]
    rows = _rows(whole, crossing, shapes)
    ends = {*whole.outputs, *(port.name for port in whole.inputs)}
    names = {name: name + _SENT if name in ends else name for name in crossing}
    kinds = types(whole)
    sending = tuple(_identity(name, sent) for name, sent in names.items() if sent != name)
    taking = tuple(_identity(sent, name) for name, sent in names.items() if sent != name)
    head = tidy(replace(whole, nodes=(*whole.nodes, *sending), outputs=tuple(names.values())))
    ports = tuple(Value(sent, kinds[name], (None, *rows[name])) for name, sent in names.items())
    # What depends on no input stays, whichever half it was found in
    rest = tuple(node for node in whole.nodes if mine.isdisjoint(node.outputs) or given.isdisjoint(node.outputs))
    tail = tidy(replace(whole, nodes=(*taking, *rest), inputs=ports))
    dims = {sent: (None, *rows[name]) for name, sent in names.items()}
    stated = {port.name: (None, *(shapes or {}).get(port.name, port.dims[1:])) for port in whole.inputs}
    return write(head, dims={**stated, **dims}), write(tail)


def _identity(source: str, name: str) -> Node:
    return Node(f"{name} by itself", "Identity", (source,), (name,))


def _before(whole: Graph, values: Iterable[str]) -> set[str]:
    """All values of the nodes that give one of `values`, or something that these need."""
    found = set(values)
    for node in reversed(whole.nodes):
        if not found.isdisjoint(node.outputs):
            found.update(name for name in (*node.inputs, *node.outputs) if name)
    return found & {name for node in whole.nodes for name in node.outputs}


def _order(whole: Graph) -> list[str]:
    return [port.name for port in whole.inputs] + [name for node in whole.nodes for name in node.outputs if name]


def _rows(
    whole: Graph, crossing: Sequence[str], shapes: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    """The shape of one row of each value that crosses. Raises ConvertError where one has no batch as its first axis."""
    one, two = sizes(whole, shapes, batches=(1, 2))
    for name in crossing:
        if one[name][:1] != (1,) or two[name] != (2, *one[name][1:]):
            node = next((node for node in whole.nodes if name in node.outputs), None)
            why = f"The {node or 'input'} gives {name!r:.80}, which crosses, and the batch is not its first axis."
            raise ConvertError("The network cannot be parted there.", why, "Choose another cut, before or behind it.")
    return {name: tuple(one[name][1:]) for name in crossing}
