"""Where a graph may run: one file a backend (npu, gpu, cpu), each by execution providers of ONNX Runtime.

A backend's file has NAME, PROVIDERS (the best first), `settings` and `simulated` of a device, and `supports`: what is
known of an operator before a provider is asked. What asking costs (a library that may die or hang) is done in a child
process (probe.py). Nothing falls back in silence: a graph that is opened here runs on its device, or at least as much
of it as was asked for does, or BackendError says of every node why not. Plugin libraries are used where their wheel is
installed or $SHOAL_PLUGINS names them; nothing is fetched.
"""

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from .. import providers, session
from ..deadline import Worker
from ..errors import BackendError, UsageError
from ..events import Event, Progress, silent
from ..onnx_ports import ports
from ..onnx_wire import Model
from ..providers import CPU, Assigned
from . import placement, probe
from .placement import Placement
from .provider import Absent, Device, Operator, Provider, Verdict

PLUGINS = "SHOAL_PLUGINS"  # name=path pairs, as PATH joins them; "none" leaves installed wheels alone as well
NAMES = ("npu", "gpu", "cpu")


@dataclass(frozen=True)
class Backend:
    """What was found of a backend: its devices, those that are what they say before simulated ones, and of each
    provider without one why."""

    name: str
    devices: tuple[Device, ...]
    absent: tuple[Absent, ...]


def discover(names: tuple[str, ...] = NAMES, seconds: float = probe.SECONDS) -> list[Backend]:
    """Looks for the devices of these backends, all providers at once, each at most `seconds`. A library that dies or
    hangs is a provider without a device. Raises UsageError for a $SHOAL_PLUGINS that is none."""
    chosen = plugins()
    asked = [(module, provider) for module in map(_module, names) for provider in module.PROVIDERS]
    with ThreadPoolExecutor(len(asked) or 1) as pool:
        found = list(pool.map(lambda one: _look(one[0], one[1], chosen, seconds), asked))
    backends = []
    for name in names:
        here = [found for (module, _), found in zip(asked, found, strict=True) if module.NAME == name]
        devices = [device for devices, _ in here for device in devices]
        devices.sort(key=lambda device: bool(device.simulated))
        backends.append(Backend(name, tuple(devices), tuple(absent for _, absent in here if absent)))
    return backends


def check(name: str) -> None:
    """Raises UsageError for a `name` that `choose` does not know; looks for no device."""
    backend, _, provider = name.partition(":") if isinstance(name, str) else ("", "", "")
    known = [one.name for one in _module(backend).PROVIDERS] if backend in NAMES else []
    if name not in ("auto", "cpu") and (not known or backend == "cpu" or (":" in name and provider not in known)):
        why = f"Of {backend} there is {', '.join(known)}." if known else "It is one of auto, cpu, gpu and npu."
        raise UsageError(f"There is no backend {name!r:.60}.", why, "Name one, or a provider with it: npu:qnn.")


def choose(name: str, seconds: float = probe.SECONDS) -> Device | None:
    """The device for `name`: auto, cpu (None), gpu, npu, or one provider's, as npu:qnn.

    A simulated device is taken only where its provider is named. Raises UsageError for another word, BackendError
    where there is no device, which says what each provider lacks.
    """
    check(name)
    if name in ("auto", "cpu"):
        return None
    backend, _, provider = name.partition(":")
    (found,) = discover((backend,), seconds)
    devices = [device for device in found.devices if provider in ("", device.provider)]
    absent = [one for one in found.absent if provider in ("", one.provider)]
    if devices and (provider or not devices[0].simulated):
        return devices[0]
    if devices:
        raise BackendError(
            f"The only {backend} here is simulated: {devices[0].title}.",
            "It gives a device's numbers, hundreds of times slower.", f"Name it to use it: {devices[0].name}.",
        )  # fmt: skip
    raise BackendError(
        f"There is no {name} here.", "; ".join(f"{one.provider}: {one.why}" for one in absent) + ".",
        " Or: ".join(one.fix for one in absent),
    )  # fmt: skip


def supports(device: Device | str, operator: Operator) -> Verdict:
    """What is known of an operator on a device, or on a provider by its name (npu:qnn), without asking it: a rule's yes
    or no, or None where only `survey` can tell. Pure."""
    backend, _, provider = (device if isinstance(device, str) else device.name).partition(":")
    return _module(backend).supports(provider, operator)


def survey(
    device: Device, graph: bytes, places: Mapping[str, session.Place], dims: Mapping[str, int] | None = None,
    seconds: float = probe.SURVEY_SECONDS,
) -> Placement:  # fmt: skip
    """Which nodes of a graph `device` takes, and why not the others, by its provider's own word; in a child process,
    within `seconds`. The arguments are those of session.open_graph. Raises BackendError where the provider refuses the
    graph as a whole, dies of it or hangs, BundleError for a graph that is not one."""
    return _survey(device, [graph], places, dims, seconds)[0]


def _survey(
    device: Device, graphs: Sequence[bytes], places: Mapping[str, session.Place], dims: Mapping[str, int] | None,
    seconds: float,
) -> list[Placement]:  # fmt: skip
    models = [session.read(graph, places) for graph in graphs]
    found = probe.survey(graphs, places, device.listed, device.library, device.settings, dims, seconds)
    return [_judged(device, model, dims, *one) for model, one in zip(models, found, strict=True)]


def _judged(
    device: Device, model: Model, dims: Mapping[str, int] | None, assigned: list[Assigned], messages: list[str]
) -> Placement:
    given = {dim for port in ports(model)[0] for dim in port.dims if not isinstance(dim, int)}
    static = not given - set(dims or {})
    inputs = {(node.op, node.name): node.inputs for node in model.nodes}

    def judge(node: Assigned) -> Verdict:
        return supports(device, Operator(node.op, node.domain, inputs.get((node.op, node.name), ()), static))

    return placement.place(device.backend, device.listed.provider, assigned, messages, judge)


def open_graph(
    device: Device | None, graph: bytes, places: Mapping[str, session.Place], *, share: float = 1.0,
    dims: Mapping[str, int] | None = None, threads: int = 0, patience: float = session.PATIENCE,
    profile: str | None = None,
) -> tuple[session.Session, Placement]:  # fmt: skip
    """Opens a graph on `device` (None: the CPU), of which at least `share` of the nodes must run there: with 1, the
    default, the engine's fallback is off altogether.

    It is surveyed in a child first, so that a library which dies of it does not take this process along. Opening, and
    then each run, must come back within `patience` seconds. Raises BackendError, with `placement` where nodes fell
    back, and BundleError for a graph that is not one.
    """
    if device is None:
        opened = session.open_graph(graph, places, dims=dims, threads=threads, profile=profile)
        nodes = tuple(placement.Node(one.name, one.op, one.domain, one.provider) for one in opened.assigned())
        return opened, Placement("cpu", CPU, nodes)
    before = survey(device, graph, places, dims, max(patience, 1.0))
    before.check(share)
    if device.library:
        providers.register(device.listed.provider, device.library)
    target = session.Target(device.listed, device.settings, share >= 1, patience)
    opened = session.open_graph(graph, places, threads=threads, target=target, dims=dims, profile=profile)
    try:
        found = Placement(device.backend, device.listed.provider, _nodes(opened, before))
        found.check(share)
    except BaseException:
        opened.close()
        raise
    return opened, found


def open_graphs(
    device: Device | None, graphs: Mapping[str, bytes], places: Mapping[str, session.Place], *, share: float = 1.0,
    threads: int = 0, patience: float = session.PATIENCE, worker: Worker | None = None, surveyed: bool = False,
    progress: Progress = silent,
) -> tuple[dict[str, session.Session], Placement]:  # fmt: skip
    """Opens many graphs of static shapes on one device, which run one at a time; `share` is of the nodes of all.

    One of each kind is surveyed, all in one child, unless they were `surveyed` before: graphs of blocks differ in their
    weights alone, and a child that opens all of them takes as long as opening them does. They share `worker`, which
    the caller closes after them; the rest is as in open_graph.
    """
    opened: dict[str, session.Session] = {}
    nodes: list[placement.Node] = []
    before: dict[str, Placement] = {}
    target, provider = None, CPU
    if device is not None:
        provider = device.listed.provider
        if not surveyed:
            kinds = {name: _kind(session.read(graph, places)) for name, graph in graphs.items()}
            first = {kind: name for name, kind in reversed(kinds.items())}
            progress(Event("survey", 0, len(first), device.title, "graphs"))
            tried = [graphs[name] for name in first.values()]
            found = dict(zip(first, _survey(device, tried, places, None, patience + 10.0 * len(tried)), strict=True))
            before = {name: found[kind] for name, kind in kinds.items()}
            every = tuple(node for one in before.values() for node in one.nodes)
            Placement(device.backend, provider, every).check(share)
        if device.library:
            providers.register(provider, device.library)
        target = session.Target(device.listed, device.settings, share >= 1, patience, worker)
    try:
        for name, graph in graphs.items():
            progress(Event("open", len(opened), len(graphs), name, "graphs"))
            opened[name] = session.open_graph(graph, places, threads=threads, target=target, shared=True)
            nodes += _nodes(opened[name], before.get(name))
        placed = Placement(device.backend if device else "cpu", provider, tuple(nodes))
        placed.check(share)
    except BaseException:
        for one in opened.values():
            one.close()
        raise
    return opened, placed


def _kind(model: Model) -> tuple:
    """What two graphs have in common that differ in weights and names alone, as far as a device looks at it: operators
    with their attributes, and shapes."""
    values = {tensor.name: ("weight", tensor.dtype, tensor.dims) for tensor in model.tensors}
    wires: dict[str, int] = {}
    nodes = tuple(
        (node.op, node.domain, tuple(sorted(node.integers.items())), tuple(sorted(node.floats)),
         tuple(values.get(name) or wires.setdefault(name, len(wires)) for name in node.inputs), len(node.outputs),
         [wires.setdefault(name, len(wires)) for name in node.outputs][0])
        for node in model.nodes
    )  # fmt: skip
    return nodes, tuple((port.dtype, port.dims) for side in ports(model) for port in side)


def _nodes(opened: session.Session, before: Placement | None) -> tuple[placement.Node, ...]:
    """What counts is this session, not the rehearsal; reasons are the rehearsal's, of the node itself or, where another
    graph of its kind was tried, of one like it."""
    known = before.nodes if before else ()
    said = {(node.provider, node.op, node.domain, node.name): node for node in known}
    like = {(node.provider, node.op, node.domain): node for node in known}
    found = []
    for one in opened.assigned():
        kind = (one.provider, one.op, one.domain)
        node = said.get((*kind, one.name)) or like.get(kind) or placement.Node(one.name, *kind[1:], one.provider)
        found.append(replace(node, name=one.name))
    return tuple(found)


def plugins() -> dict[str, str] | None:
    """$SHOAL_PLUGINS as provider -> library; None for "none". Raises UsageError."""
    text = os.environ.get(PLUGINS, "").strip()
    if text == "none":
        return None
    known = {one.name for name in NAMES for one in _module(name).PROVIDERS if one.module}
    found = {}
    for word in filter(None, text.split(os.pathsep)):
        name, _, path = word.partition("=")
        if name not in known or not path:
            why = f"{word!r:.80} is not NAME=LIBRARY, where NAME is one of {', '.join(sorted(known))}."
            raise UsageError(f"${PLUGINS} cannot be used.", why, f"Write {PLUGINS}=qnn=/path/to/library, or none.")
        found[name] = path
    return found


def _look(
    module, provider: Provider, chosen: Mapping[str, str] | None, seconds: float
) -> tuple[list[Device], Absent | None]:
    """The devices of a provider, or why there is none."""
    if provider.ep == CPU:
        return [Device(module.NAME, provider.name, providers.listed(CPU)[0])], None
    library, wheel = (chosen or {}).get(provider.name, "") or providers.registered(provider.ep), ""
    if library and not Path(library).is_file():
        return [], Absent(provider.name, f"${PLUGINS} names {library}, which is no file", "Correct the path.")
    if not library and provider.ep not in providers.offered():
        if chosen is not None and provider.module and importlib.util.find_spec(provider.module) is not None:
            wheel = provider.module
        else:
            needs = f"It needs {provider.needs}."
            if chosen is None and provider.module:
                return [], Absent(provider.name, f"${PLUGINS} is none", f"Unset it. {needs}")
            why = f"this onnxruntime was built without {provider.ep}"
            why = f"{provider.package} is not installed" if provider.module else why
            install = f"pip install {provider.package}{'' if provider.module else ' in place of onnxruntime'}. "
            return [], Absent(provider.name, why, (install if provider.package else "") + needs)
    asked = {kind: module.settings(provider.name, _of_kind(provider.ep, kind)) for kind in provider.kinds}
    try:
        found, library = probe.devices(provider.ep, wheel, library, asked, provider.kinds, seconds)
    except BackendError as error:
        return [], Absent(provider.name, f"{error.what} {error.why}".rstrip("."), error.fix)
    devices, faults = [], []
    for kind in provider.kinds:
        for listed, fault in found:
            if listed.kind == kind and fault:
                faults.append(fault)
            elif listed.kind == kind:
                said, simulated = module.settings(provider.name, listed), module.simulated(provider.name, listed)
                devices.append(Device(module.NAME, provider.name, listed, said, simulated, library))
        if devices:  # a worse kind is what stands in for a better one
            break
    if devices:
        return devices, None
    why = f"its device does not work: {faults[0]}" if faults else "its library finds no device on this machine"
    return [], Absent(provider.name, why, f"It needs {provider.needs}.")


def _of_kind(ep: str, kind: str) -> providers.Listed:
    return providers.Listed(ep, kind, "", 0, 0, "")


def _module(name: str):
    if name not in (info.name for info in pkgutil.iter_modules(__path__)):
        raise UsageError(f"There is no backend {name!r:.60}.", f"There are {', '.join(NAMES)}.", "Name one.")
    return importlib.import_module(f".{name}", __name__)
