"""A bundle's static graphs, found, checked and opened: those for chunks on the device, those for any number of rows on
the CPU, and the shadows between them.

What a bundle says is compared with its card and with what the opened graphs take and give, before anything runs. It
knows nothing about prompts or about who runs when.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .. import backends, session
from ..backends import context
from ..backends.placement import Placement
from ..backends.provider import Device
from ..bundle import Bundle
from ..card import Card
from ..deadline import Worker
from ..errors import BundleError
from ..events import Progress, silent
from ..portable import portable
from ..session import Place, Session
from . import contexts
from .layout import KIND, PREFILL, SECTION, STATIC, TOKENS, Attend, Call, Shadow, Static, graph_name
from .shadow import Outliers

HEAD = "x", "logits"  # what the head's graph takes and gives
_ATTEND = ("qkv", "past_key", "past_value", "last", "total", "cos", "sin"), ("y", "present_key", "present_value")


@dataclass
class Graphs:
    """Everything that the steps run. `calls[name, chunk]` are the device's graphs, `cpu[name]` the others, `shadows`
    by the number of their step; `placement` is that of the device's graphs, all of them."""

    calls: dict[tuple[str, int], Session]
    cpu: dict[str, Session]
    shadows: dict[int, Outliers]
    placement: Placement
    worker: Worker | None = None  # runs the device's graphs, one after another
    kept: list = field(default_factory=list)  # what else is closed with them
    section: tuple[str, tuple[int, int]] | None = None  # of their weights: the file, and (offset, bytes) in it

    def nodes(self) -> dict[str, int]:
        """Execution provider -> how many nodes of all these graphs it took."""
        found = Counter(node.provider for node in self.placement.nodes)
        for opened in {id(one): one for one in self.cpu.values()}.values():
            found.update(opened.placement())
        return dict(found)

    def close(self) -> None:
        """Frees all of them; a second call does nothing."""
        for opened in (*self.calls.values(), *self.cpu.values()):  # some of the latter are one under several names
            opened.close()
        if self.worker is not None and not self.worker.lost:
            self.worker.close()
        for one in self.kept:
            one.close()


def read(bundle: Bundle, card: Card) -> Static | None:
    """What the bundle holds for prefill in chunks; None where it holds nothing. Raises BundleError for an index that is
    wrong by itself, or that does not fit the card or the graphs that are there."""
    section = bundle.find(KIND, "index")
    if section is None:
        return None
    static = Static.from_json(bundle.bytes(section))
    attended = [step.block for step in static.steps if isinstance(step, Attend)]
    if attended != list(card.span):
        raise _refuse(f"index attends in blocks {attended!r:.60}, where {card.span.start}:{card.span.stop} are")
    qkv, y = (card.heads + 2 * card.kv_heads) * card.head_dim, card.heads * card.head_dim
    for step in static.steps:
        if isinstance(step, Attend) and ({static.widths[name] for name in step.takes}, static.widths[step.gives]) != (
            {qkv}, y
        ):  # fmt: skip
            raise _refuse(f"attention of block {step.block} has other widths than {qkv} and {y}")
    both = [step for step in static.steps if isinstance(step, Call) and set(step.takes) & set(step.gives)]
    if both:  # an engine may write it before it has read it
        raise _refuse(f"step {both[0].name!r:.60} gives what it takes")
    there = {graph.name for graph in bundle.graphs if graph.role in (STATIC, PREFILL)}
    if missing := [name for name in (*device_names(static), *cpu_names(static, "")) if name not in there]:
        raise _refuse(f"graph {missing[0]!r:.60} is missing")
    return static


def device_names(static: Static) -> dict[str, tuple[str, int]]:
    """The device's graphs: each one's name -> the call's and its chunk."""
    return {graph_name(name, chunk): (name, chunk) for chunk in static.chunks for name in static.names}


def cpu_names(static: Static, kv: str) -> list[str]:
    """The CPU's graphs for a cache of this kind; "" is fp32."""
    suffix = "" if kv in ("", "fp32") else f".{kv}"
    names = [
        step.name + suffix if isinstance(step, Attend) else step.name
        for step in static.steps
        if isinstance(step, Attend) or (isinstance(step, Call) and not step.device)
    ]
    return list(dict.fromkeys([*names, static.head]))


def graph_bytes(bundle: Bundle, name: str) -> bytes:
    """A static or prefill graph by its name. Raises BundleError."""
    return bundle.bytes(bundle.section("graph", section_of(bundle, name)))


def section_of(bundle: Bundle, name: str) -> str:
    """The section that holds a static or prefill graph; several graphs may be in one. Raises BundleError."""
    for graph in bundle.graphs:
        if graph.name == name and graph.role in (STATIC, PREFILL):
            return graph.section
    raise _refuse(f"graph {name!r:.60} is missing")


def outliers(bundle: Bundle, static: Static) -> dict[int, Outliers]:
    """The shadows, by the number of their step, their cold rows mapped."""
    steps = {number: step for number, step in enumerate(static.steps) if isinstance(step, Shadow)}
    if not steps:
        return {}
    section = bundle.view(bundle.section("weights", SECTION))
    return {number: Outliers(step, section) for number, step in steps.items()}


def open_all(
    bundle: Bundle, static: Static, places: Mapping[str, Place], device: Device | None, kv: str, *, share: float = 1.0,
    threads: int = 0, ours: bool = True, surveyed: bool = False, compiled: str = "auto",
    patience: float = session.PATIENCE, progress: Progress = silent,
) -> Graphs:  # fmt: skip
    """Opens the static graphs on `device` (None: the CPU) and the others on the CPU, in ONNX Runtime's own operators
    unless they are `ours`. Where the device takes compiled graphs they are opened so; `compiled` "bundle" insists on
    the bundle's, "none" does without any. Errors are those of backends.open_graph, and BundleError for a graph that
    does not take and give what its steps say."""
    named = device_names(static)
    with contextlib.ExitStack() as undo:
        graphs = Graphs({}, {}, outliers(bundle, static), Placement("cpu", "", ()))
        undo.callback(graphs.close)
        if (own := places.get(SECTION)) is not None:
            graphs.section = own.path, (own.offset, own.length)
        same: dict[str, Session] = {}  # blocks that differ in nothing share their attention's graph
        for name in cpu_names(static, kv):
            section = section_of(bundle, name)
            if section not in same:
                data, where = graph_bytes(bundle, name), places
                if not ours:
                    lowered = portable(data, places, key=bundle.digest, progress=progress)
                    graphs.kept.append(lowered)
                    data, where = lowered.graph, lowered.places
                same[section] = session.open_graph(data, where, threads=threads, shared=True)
            graphs.cpu[name] = same[section]
        graphs.worker = Worker(device.name) if device is not None else None
        threads = 1 if device else threads  # it has its own
        if compiled != "none" and (ready := contexts.find(
            bundle, device, [graph for graph in bundle.graphs if graph.name in named], places,
            strict=compiled == "bundle", progress=progress,
        )):  # fmt: skip
            with contextlib.closing(ready):
                assert device is not None
                opened, graphs.placement = context.open_contexts(
                    device, ready.contexts, threads=threads, patience=patience, worker=graphs.worker,
                    rehearsed=surveyed or ready.rehearsed, progress=progress,
                )  # fmt: skip
        else:
            opened, graphs.placement = backends.open_graphs(
                device, {name: graph_bytes(bundle, name) for name in named}, places, share=share, threads=threads,
                patience=patience, worker=graphs.worker, surveyed=surveyed, progress=progress,
            )  # fmt: skip
        graphs.calls = {named[name]: one for name, one in opened.items()}
        _check(static, graphs, kv)
        undo.pop_all()
        return graphs


def _check(static: Static, graphs: Graphs, kv: str) -> None:
    """Compares what the graphs take and give with the steps."""
    for step in static.steps:
        if isinstance(step, Call):
            for chunk in static.chunks if step.device else (0,):
                opened = graphs.calls[step.name, chunk] if chunk else graphs.cpu[step.name]
                shapes: dict[str, tuple] = {
                    name: (chunk or None, static.widths.get(name, 0)) for name in (*step.takes, *step.gives)
                }
                shapes |= {TOKENS: (1, chunk or None)} if TOKENS in step.takes else {}
                _ports(step.name, opened, step.takes, step.gives, shapes)
        elif isinstance(step, Attend):
            name = cpu_names(Static("", (), {}, (step,), "", "head"), kv)[0]
            _ports(step.name, graphs.cpu[name], *_ATTEND, {})
    _ports(static.head, graphs.cpu[static.head], HEAD[:1], HEAD[1:], {"x": (None, static.widths[static.stream])})


def _ports(
    name: str, opened: Session, takes: tuple[str, ...], gives: tuple[str, ...], shapes: Mapping[str, tuple]
) -> None:
    if set(opened.inputs) != set(takes) or set(opened.outputs) != set(gives):
        said = f"{', '.join(opened.inputs)} to {', '.join(opened.outputs)}"
        raise _refuse(f"graph {name!r:.60} goes from {said:.200}, its step from {', '.join(takes)} to {gives[0]}")
    for port, shape in shapes.items():
        dims = (opened.inputs.get(port) or opened.outputs[port]).dims
        fits = len(dims) == len(shape) and all(
            want is None or not isinstance(have, int) or have == want for want, have in zip(shape, dims, strict=True)
        )
        if not fits:
            raise _refuse(f"graph {name!r:.60} has {port!r:.40} of {list(dims)}, its step of {list(shape)}")


def _refuse(why: str) -> BundleError:
    return BundleError("The bundle's static graphs cannot be used.", f"Its {why}.", "Convert the checkpoint again.")
