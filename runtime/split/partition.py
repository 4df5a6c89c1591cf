"""Where to cut a network that was not trained to be cut: measured by prefixes, scanned on a chain, min-cut on a graph.

A network is `Piece`s in the order in which they are computed: seconds here and there, bytes of what each gives, which
others it needs. All cuts are judged by one cost model (Neurosurgeon, Kang et al., ASPLOS 2017), in seconds or joules:
what is computed here, what crosses once, what is computed there, and what any use of the edge costs. `scan` tries every
place of a chain; `cut` solves any graph as a minimum cut (DADS, Hu et al., INFOCOM 2019), where a value with several
consumers is paid for once and nothing comes back from the edge but the answer. Costs are whole nano-units inside, so
both agree exactly. Nothing here knows a link.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import onnx_wire
from ..errors import UsageError
from ..events import Event, Progress, silent
from ..session import Place, open_graph

INPUT = -1  # in Piece.needs: the network's input
_NANO = 10**9
_CONTROL = frozenset({"If", "Loop", "Scan", "SequenceMap"})  # their bodies use values that the node does not name


@dataclass(frozen=True)
class Piece:
    """A step of a network: seconds `here`, on the device, and `there`, on the edge; `nbytes` of what it gives;
    `needs` the places of the pieces whose values it takes, INPUT for the network's own. `gives` are the names of its
    values, by which converters/split/partition.py finds it again."""

    name: str
    here: float
    there: float
    nbytes: int
    needs: tuple[int, ...]
    gives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A link and an edge: bytes/s up and down (0: as up), seconds of a round trip and of the edge's queue, `load` by
    which the edge is slower than measured, bytes of the answer."""

    up: float
    rtt: float = 0.0
    down: float = 0.0
    queue: float = 0.0
    load: float = 1.0
    answer: int = 256


@dataclass(frozen=True)
class Powers:
    """Watts of the device while it computes, sends, waits and receives, and the joules that a radio's tail costs after
    each use. Another board has others: measure them (energy.py)."""

    cpu: float
    tx: float
    idle: float = 0.0
    rx: float = 0.0
    tail: float = 0.0


@dataclass(frozen=True)
class Cut:
    """The pieces `here`, the rest is there; seconds, joules (0 without powers), bytes that go up. `objective` is what
    was minimised, in its unit."""

    here: frozenset[int]
    seconds: float
    joules: float
    sent: int
    objective: float


def scan(pieces: Sequence[Piece], nbytes: int, line: Line, powers: Powers | None = None) -> Cut:
    """The best place in a chain whose input has `nbytes`, by joules where `powers` are given, else by seconds; of equal
    ones the earliest. Raises UsageError where the pieces are no chain."""
    for place, piece in enumerate(pieces):
        if piece.needs != (place - 1,):
            raise UsageError("This network is no chain.", f"{piece.name!r} takes {piece.needs}.", "Use cut().")
    places = range(len(pieces) + 1)
    return min((judge(pieces, nbytes, range(place), line, powers) for place in places), key=lambda one: one.objective)


def judge(
    pieces: Sequence[Piece], nbytes: int, here: Sequence[int] | frozenset[int], line: Line, powers: Powers | None = None
) -> Cut:
    """What it costs to compute just these pieces here. Raises UsageError where one of them needs one that is there."""
    mine = frozenset(here)
    if any(need != INPUT and need not in mine for place in mine for need in pieces[place].needs):
        raise UsageError(
            "These pieces cannot be computed here.", "One needs a value from the edge.", "Take all before."
        )
    crossing = {need for place, piece in enumerate(pieces) if place not in mine for need in piece.needs
                if need == INPUT or need in mine}  # fmt: skip
    sent = sum(_size(pieces, nbytes, one) for one in crossing)
    both = []
    for cost in (_Cost.of(line, None), _Cost.of(line, powers)) if powers else (_Cost.of(line, None),):
        total = sum(cost.here(piece) if place in mine else cost.there(piece) for place, piece in enumerate(pieces))
        total += sum(cost.send(_size(pieces, nbytes, one)) for one in crossing)
        both.append((total + (cost.fixed if len(mine) < len(pieces) else 0)) / _NANO)
    return Cut(mine, both[0], both[1] if powers else 0.0, sent, both[-1])


def cut(pieces: Sequence[Piece], nbytes: int, line: Line, powers: Powers | None = None) -> Cut:
    """The best set of pieces to compute here, of any graph; as `scan` on a chain but for which of equal ones it takes.
    Raises UsageError where a piece needs a later one."""
    if any(not INPUT <= need < place for place, piece in enumerate(pieces) for need in piece.needs):
        raise UsageError("This is no order of computation.", "A piece needs a later one.", "Sort them.")
    cost, count = _Cost.of(line, powers), len(pieces)
    # Of node 0 is the device and 1 the edge, then the input, whether the edge is used, each piece, what pieces give
    net, device, edge, entry, used = _Flow(4 + count), 0, 1, 2, 3
    net.add(device, entry, _Flow.ENDLESS)
    net.add(device, used, cost.fixed)
    consumers: dict[int, list[int]] = {}
    for place, piece in enumerate(pieces):
        node = 4 + place
        net.add(node, edge, cost.here(piece))  # cut where the piece stays here
        net.add(device, node, cost.there(piece))  # cut where it goes there
        net.add(used, node, _Flow.ENDLESS)  # a piece there, and the edge is used
        for need in set(piece.needs):
            consumers.setdefault(need, []).append(node)
            net.add(node, entry if need == INPUT else 4 + need, _Flow.ENDLESS)  # nothing comes back
    for need, nodes in consumers.items():
        given, price = entry if need == INPUT else 4 + need, cost.send(_size(pieces, nbytes, need))
        once = given if len(nodes) == 1 else net.node()
        if once != given:
            net.add(given, once, price)
        for node in nodes:
            net.add(once, node, price if once == given else _Flow.ENDLESS)
    near = net.cut(device, edge)
    return judge(pieces, nbytes, frozenset(place for place in range(count) if 4 + place in near), line, powers)


def elsewhere(pieces: Sequence[Piece], there: float | Sequence[Piece]) -> tuple[Piece, ...]:
    """The pieces with the edge's times: `there` times as fast as here, or as the same network's profile from there."""
    if isinstance(there, int | float):
        return tuple(replace(piece, there=piece.here / there) for piece in pieces)
    return tuple(replace(piece, there=other.here) for piece, other in zip(pieces, there, strict=True))


def profile(
    graph: bytes, feeds: Mapping[str, np.ndarray], places: Mapping[str, Place] | None = None, *, runs: int = 5,
    threads: int = 1, progress: Progress = silent,
) -> tuple[Piece, ...]:  # fmt: skip
    """The pieces of an ONNX graph, one a node, whose seconds here are what each adds to the prefix that ends with it.

    Every prefix is opened and run by itself, the median of `runs`: the sum of single nodes would count what fusing
    saves. What depends on weights only is no piece, both sides have it. `there` is as here: see `elsewhere`. Progress
    has the stage "profile". Raises UsageError for a graph with branches or loops, BundleError, BackendError.
    """
    places = dict(places or {})
    model = onnx_wire.read(graph, {name: place.length for name, place in places.items()})
    if found := next((node for node in model.nodes if node.op in _CONTROL), None):
        raise UsageError("This network cannot be profiled.", f"It has an operator {found.op}.", "Cut it by hand.")
    constant = {tensor.name for tensor in model.tensors} | {""}
    free: list[onnx_wire.Node] = []
    steps: list[onnx_wire.Node] = []
    for node in model.nodes:
        if constant.issuperset(node.inputs):
            free.append(node)
            constant.update(node.outputs)
        else:
            steps.append(node)
    with open_graph(graph, places, threads=threads) as session:
        ends = set(session.outputs)
    maker = {name: place for place, node in enumerate(steps) for name in node.outputs if name}
    last = {name: place for place, node in enumerate(steps) for name in node.inputs}  # the last that needs it
    sizes: dict[str, int] = {}
    outputs: dict[str, np.ndarray] = {}
    times: list[float] = []
    for place in range(len(steps)):
        progress(Event("profile", place, len(steps), steps[place].name or steps[place].op, "nodes"))
        crossing = [name for name, made in maker.items()
                    if made <= place and (last.get(name, -1) > place or name in ends)]  # fmt: skip
        if not crossing:  # what it gives is never used
            times.append(times[-1] if times else 0.0)
            continue
        # With all that crosses as outputs nothing is fused over the cut, as it would not be if it were cut there
        prefix = onnx_wire.part(model, _with_free(steps[: place + 1], free), crossing)
        with open_graph(prefix, places, threads=threads) as session:
            taken = []
            for _ in range(runs + 1):
                began = time.perf_counter()
                outputs = session.run(feeds)
                taken.append(time.perf_counter() - began)
        sizes |= {name: array.nbytes for name, array in outputs.items()}
        times.append(float(np.median(taken[1:])))
    progress(Event("profile", len(steps), len(steps), "", "nodes"))
    alone = np.diff(rising(times), prepend=0.0)
    return tuple(
        Piece(
            node.name or f"{node.op}:{node.outputs[0]}", float(alone[place]), float(alone[place]),
            sum(sizes.get(name, 0) for name in node.outputs if name),
            tuple(sorted({maker.get(name, INPUT) for name in node.inputs if name not in constant})),
            tuple(name for name in node.outputs if name),
        )
        for place, node in enumerate(steps)
    )  # fmt: skip


def rising(times: Sequence[float]) -> np.ndarray:
    """The nearest times, by least squares, of which none is less than the one before: a prefix takes no less than a
    shorter one, and what says otherwise was measured beside other work. By pooling neighbours (Ayer et al. 1955)."""
    pools: list[tuple[float, int]] = []  # mean, how many
    for moment in times:
        mean, count = float(moment), 1
        while pools and pools[-1][0] > mean:
            before, more = pools.pop()
            mean, count = (mean * count + before * more) / (count + more), count + more
        pools.append((mean, count))
    return np.array([mean for mean, count in pools for _ in range(count)], np.float64)


def _with_free(steps: Sequence[onnx_wire.Node], free: Sequence[onnx_wire.Node]) -> list[onnx_wire.Node]:
    """The steps, and before them what they take of nodes that depend on weights only."""
    needed, found = {name for node in steps for name in node.inputs}, []
    for node in reversed(free):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            found.append(node)
    return [*reversed(found), *steps]


def _size(pieces: Sequence[Piece], nbytes: int, place: int) -> int:
    return nbytes if place == INPUT else pieces[place].nbytes


@dataclass(frozen=True)
class _Cost:
    """The one cost model, linear in seconds and bytes, in whole nanoseconds or nanojoules."""

    near: float
    far: float
    byte: float
    fixed: int

    @classmethod
    def of(cls, line: Line, powers: Powers | None) -> "_Cost":
        down = line.answer / (line.down or line.up)
        if powers is None:
            return cls(1.0, line.load, 1 / line.up, round(_NANO * (line.rtt + line.queue + down)))
        fixed = powers.idle * (line.rtt + line.queue) + powers.rx * down + powers.tail
        return cls(powers.cpu, powers.idle * line.load, powers.tx / line.up, round(_NANO * fixed))

    def here(self, piece: Piece) -> int:
        return round(_NANO * self.near * piece.here)

    def there(self, piece: Piece) -> int:
        return round(_NANO * self.far * piece.there)

    def send(self, nbytes: int) -> int:
        return round(_NANO * self.byte * nbytes)


class _Flow:
    """A network of flows, and Dinic's way (1970) to its minimum cut: shortest paths, all of a length at once."""

    ENDLESS = 1 << 80

    def __init__(self, nodes: int):
        self._out: list[list[int]] = [[] for _ in range(nodes)]  # edges by number; edge ^ 1 goes the other way
        self._to: list[int] = []
        self._room: list[int] = []

    def node(self) -> int:
        self._out.append([])
        return len(self._out) - 1

    def add(self, start: int, stop: int, room: int) -> None:
        for one, other, free in ((start, stop, room), (stop, start, 0)):
            self._out[one].append(len(self._to))
            self._to.append(other)
            self._room.append(free)

    def cut(self, source: int, sink: int) -> set[int]:
        """The nodes on the source's side of a minimum cut."""
        while (levels := self._levels(source))[sink] >= 0:
            tried = [0] * len(self._out)
            path: list[int] = []  # edges from the source
            at = source
            while True:
                if at == sink:
                    flow = min(self._room[edge] for edge in path)
                    for edge in path:
                        self._room[edge] -= flow
                        self._room[edge ^ 1] += flow
                    path, at = [], source
                    continue
                edges = self._out[at]
                while tried[at] < len(edges):
                    edge = edges[tried[at]]
                    if self._room[edge] and levels[self._to[edge]] == levels[at] + 1:
                        break
                    tried[at] += 1
                else:
                    if not path:
                        break
                    at = self._to[path.pop() ^ 1]
                    tried[at] += 1
                    continue
                path.append(edge)
                at = self._to[edge]
        return {node for node, level in enumerate(levels) if level >= 0}

    def _levels(self, source: int) -> list[int]:
        levels = [-1] * len(self._out)
        levels[source], reached = 0, [source]
        for node in reached:
            for edge in self._out[node]:
                if self._room[edge] and levels[self._to[edge]] < 0:
                    levels[self._to[edge]] = levels[node] + 1
                    reached.append(self._to[edge])
        return levels
