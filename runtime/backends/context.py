"""Graphs compiled ahead for a neural processor: context binaries, which ONNX Runtime opens as EPContext nodes.

`compile_contexts` makes them, in a child: graphs of several chunk lengths in one binary, their weights in it once.
`open_contexts` opens them, with fallback off as session.py does. `refusal` says whether they are for a device: QNN's
library compares neither the processor nor the bytes (damaged ones were opened here and computed something else), so
both are compared here, and the digest of a binary is taken of the very bytes that the library gets.

A compiled graph names its binary by a path, and the path has to lead to the binary and nothing else. A binary lies
inside a bundle or a cache file, so while its graphs are opened it is in memory under a path of its own (memfd): no
second copy on the disk. This module knows nothing about bundles, caches or what a graph computes.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from .. import onnx_texts, onnx_wire, providers, session
from ..deadline import Worker
from ..errors import BackendError, BundleError
from ..events import Event, Progress, silent
from ..session import Place, Session, Target
from . import probe, soc
from .placement import Node, Placement
from .provider import Device

COMPILERS = frozenset({"qnn"})  # the providers whose context binaries were tried
SECONDS = 3600.0  # for all graphs of one processor
VERSION = 1
MAX_INDEX = 64 << 20  # bytes
_STEP = 1 << 20
_NODE, _CACHE, _SHARE = "EPContext", "ep_cache_context", "ep.share_ep_contexts"
_INFORMATION = "ep_compatibility_info."
# An attribute may name a file; these are the ones that do not, and the one that is replaced
_ATTRIBUTES = {
    _CACHE, "main_context", "embed_mode", "ep_sdk_version", "source", "partition_name", "max_size",
    "is_multi_soc_ep_context", "io_name_overrides", "hardware_architecture", "notes",
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What context binaries were made of, and by whom.

    `soc` is the processor's name (sm8650), "" where it was the one at hand; `information` what the provider wrote about
    itself and the processor, which it can read again; `sdk` its version in words. `source` is the digest of the graphs
    and weights. `graphs` are models of one EPContext node by the graphs' names, each with the number of its binary;
    `binaries` are the lengths in bytes and SHA-256 in hex of these.
    """

    provider: str
    soc: str
    version: str
    sdk: str
    information: str
    chunks: tuple[int, ...]
    source: str
    graphs: Mapping[str, tuple[bytes, int]]
    binaries: tuple[tuple[int, str], ...]

    @property
    def title(self) -> str:
        """In a line: what for, by what."""
        return f"{self.provider}:{self.soc or 'this device'} by {self.sdk or 'an unknown version'}"

    @property
    def shared(self) -> bool:
        """Whether a binary holds more than one graph."""
        return len(self.graphs) > len(self.binaries)

    def to_json(self) -> bytes:
        graphs = {name: [base64.b64encode(data).decode(), number] for name, (data, number) in self.graphs.items()}
        return json.dumps({"format": VERSION, **vars(self), "graphs": graphs}, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Made":
        """Reads untrusted bytes; unknown keys are ignored. Raises BundleError naming the field that is wrong."""
        try:
            raw = json.loads(data) if len(data) <= MAX_INDEX else None
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict) or raw.get("format") != VERSION:
            raise _refuse(f"index is not JSON of format {VERSION}")
        words = [raw.get(key) for key in ("provider", "soc", "version", "sdk", "information", "source")]
        if not all(isinstance(word, str) and len(word) <= 1000 and word.isprintable() for word in words):
            raise _refuse("provider, soc, version, sdk, information or source is not text")
        chunks, listed, graphs = raw.get("chunks"), raw.get("graphs"), {}
        if not isinstance(chunks, list) or not all(type(chunk) is int and 0 <= chunk < 1 << 31 for chunk in chunks):
            raise _refuse("chunks are not lengths")
        if not isinstance(listed, dict) or not listed:
            raise _refuse("graphs are not by name")
        binaries = raw.get("binaries")
        if not isinstance(binaries, list) or not all(map(_is_binary, binaries)):
            raise _refuse("binaries are not lengths and digests")
        for name, entry in listed.items():
            try:
                text, number = entry
                graphs[name] = base64.b64decode(text, validate=True), number
            except (TypeError, ValueError):
                raise _refuse(f"graph {name!r:.60} is not base64 and a number") from None
            if type(number) is not int or not 0 <= number < len(binaries):
                raise _refuse(f"graph {name!r:.60} is in binary {number!r:.40}")
        if {number for _, number in graphs.values()} != set(range(len(binaries))):
            raise _refuse("binaries are not all of a graph")
        provider, name, version, sdk, information, source = map(str, words)
        sizes = tuple((length, digest) for length, digest in binaries)
        return cls(provider, name, version, sdk, information, tuple(chunks), source, graphs, sizes)


@dataclass(frozen=True)
class Binary:
    """A context binary: where its bytes are, and their SHA-256 in hex. Several may be in a file."""

    place: Place
    sha256: str


@dataclass(frozen=True)
class Contexts:
    """Compiled graphs: what they are, and their binaries by number."""

    made: Made
    binaries: tuple[Binary, ...]


def source_digest(graphs: Mapping[str, str], weights: Mapping[str, str]) -> str:
    """What identifies graphs and their weights, from the SHA-256 of each in hex, by name."""
    return hashlib.sha256(json.dumps([sorted(graphs.items()), sorted(weights.items())]).encode()).hexdigest()


def compile_contexts(
    device: Device, graphs: Mapping[str, bytes], places: Mapping[str, Place], target: soc.Soc | None, folder: Path, *,
    source: str, chunks: Iterable[int] = (), groups: Mapping[str, int] | None = None, seconds: float = SECONDS,
    progress: Progress = silent,
) -> Contexts:  # fmt: skip
    """Compiles graphs of static shapes, every node of them, for the processor `target` (None: for `device` itself), by
    the library of `device`. The binaries are files in `folder`.

    There is one for each of the `groups` (of all graphs, by their names; None: one group), with its weights once, but
    on a simulated device for itself one a graph: QNN's emulator dies of a context of several. Raises BackendError where
    a graph cannot be compiled whole, and where the library dies or takes longer than `seconds`; BundleError for a graph
    that is not one.
    """
    for graph in graphs.values():
        session.read(graph, places)
    graphs = dict(sorted(graphs.items(), key=lambda one: groups[one[0]])) if groups else graphs
    settings = {**device.settings, **(target.settings if target else {})}
    shared = target is not None or not device.simulated
    title = f"{device.provider}:{target.name}" if target else device.title
    if shared:
        settings["enable_htp_weight_sharing"] = "1"
    question = _question("compile", device, settings) | {
        "graphs": [
            (name, groups[name] if groups else 0, base64.b64encode(graph).decode()) for name, graph in graphs.items()
        ],
        "places": probe.by_path(places), "folder": str(folder), "shared": shared, "key": source,
    }  # fmt: skip

    done = -1

    def tick() -> None:
        nonlocal done
        if (now := len(list(folder.glob("*.ctx")))) != done:
            done = now
            progress(Event("compile", done, len(graphs), title, "graphs"))

    tick()
    answer = probe.ask(question, seconds, device.listed.provider, tick)
    tick()
    try:
        names = [str(Path(str(name)).name) for name in answer["binaries"]]
        wrappers = [(folder / f"{number}.ctx").read_bytes() for number in range(len(graphs))]
        files = list(dict.fromkeys(names))
        compiled = {name: (data, files.index(file)) for name, data, file in zip(graphs, wrappers, names, strict=True)}
        binaries = tuple(_file(folder / file) for file in files)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise BackendError(
            f"{device.provider} compiled nothing that can be used.", f"{error}.", "Update or reinstall its package."
        ) from None
    said = information(wrappers[0], device.listed.provider)
    name = target.name if target else soc.named(settings)
    return Contexts(
        Made(
            device.provider, name, device.listed.version, *said, tuple(chunks), source, compiled,
            tuple((binary.place.length, binary.sha256) for binary in binaries),
        ),
        binaries,
    )  # fmt: skip


def identity(device: Device, seconds: float = probe.SECONDS) -> tuple[str, str]:
    """(sdk, information) as Made has them, of what `device` would compile for itself now; asked in a child. Raises
    BackendError."""
    with TemporaryDirectory(prefix="shoal-") as folder:
        question = _question("identify", device, device.settings) | {"folder": folder}
        answer = probe.ask(question, seconds, device.listed.provider)
    return str(answer.get("sdk", "")), str(answer.get("information", ""))


def refusal(made: Made, device: Device, source: str, here: tuple[str, str], verdict: str) -> str:
    """Why context binaries cannot be used on `device`, "" where they can.

    `source` is the digest of the graphs that they should be of, `here` the device's `identity`, `verdict` what its
    provider says of them (providers.compatible). Pure.
    """
    if made.provider != device.provider:
        return f"they are for {made.provider}, this is {device.provider}"
    if made.source != source:
        return "they were made of other graphs or weights"
    if device.simulated:
        sdk, information = here
        if made.sdk != sdk:
            return f"they were compiled by {made.sdk or 'an unknown version'}, {sdk or 'an unknown version'} is here"
        if made.information != information:
            return f"they are for {made.soc or made.information}, this is {soc.named(device.settings) or information}"
        if made.shared:
            return f"their graphs share a context, which {device.simulated} cannot open"
        return ""
    if verdict == "optimal":
        return ""
    said = {
        "prefer_recompilation": "would rather have them compiled anew", "unsupported": "does not support them",
    }.get(verdict, "cannot say whether it supports them")  # fmt: skip
    return f"{device.listed.provider} {said}: they are for {made.title}"


def rehearse(
    device: Device, contexts: Contexts, patience: float = session.PATIENCE, progress: Progress = silent
) -> None:
    """Opens all compiled graphs in a child. Raises BackendError where it dies, refuses one or does not come back."""
    graphs = contexts.made.graphs
    progress(Event("survey", 0, len(graphs), device.title, "graphs"))
    question = _question("rehearse", device, device.settings) | {
        "wrappers": [(name, base64.b64encode(data).decode(), number) for name, (data, number) in graphs.items()],
        "binaries": [{"place": probe.by_path({"": one.place})[""], "sha256": one.sha256} for one in contexts.binaries],
    }
    probe.ask(question, patience + 2.0 * len(graphs), device.listed.provider)


def open_contexts(
    device: Device, contexts: Contexts, *, threads: int = 0, patience: float = session.PATIENCE,
    worker: Worker | None = None, rehearsed: bool = False, progress: Progress = silent,
) -> tuple[dict[str, Session], Placement]:  # fmt: skip
    """Opens all compiled graphs on `device`, each as a session whose one node is its EPContext.

    Unless they were `rehearsed` before, a child opens them first: a library that dies of them takes that along. The
    rest is as in backends.open_graphs. Raises BundleError for a binary that is damaged, BackendError where the device
    does not open one. Whether they are meant for the device is for `refusal` to say before.
    """
    graphs = contexts.made.graphs
    if not rehearsed:
        rehearse(device, contexts, patience, progress)
    if device.library:
        providers.register(device.listed.provider, device.library)
    opened: dict[str, Session] = {}
    nodes = []
    target = Target(device.listed, device.settings, patience=patience, worker=worker)
    with contextlib.ExitStack() as undo:
        for name, one in undo.enter_context(sessions(graphs, contexts.binaries, target, threads)):
            progress(Event("open", len(opened), len(graphs), name, "graphs"))
            opened[name] = one
            nodes += [Node(node.name or name, node.op, node.domain, node.provider) for node in one.assigned()]
        found = Placement(device.backend, device.listed.provider, tuple(nodes))
        try:
            found.check()
        except BaseException:
            for one in opened.values():
                one.close()
            raise
    return opened, found


@contextlib.contextmanager
def sessions(
    wrappers: Mapping[str, tuple[bytes, int]], binaries: Sequence[Binary], target: Target, threads: int = 0
) -> Iterator[Iterator[tuple[str, Session]]]:
    """The compiled graphs, opened one after another as they are asked for; those that were opened are closed where one
    fails."""
    opened: list[Session] = []

    def each() -> Iterator[tuple[str, Session]]:
        for number, binary in enumerate(binaries):
            names = [name for name, (_, own) in wrappers.items() if own == number]
            # What is in a context together is opened from it once
            entries = {_SHARE: "1"} if len(names) > 1 else {}
            with _held(binary) as path:
                for name in names:
                    graph = _pointed(wrappers[name][0], path, target.device.provider)
                    opened.append(session.open_graph(
                        graph, {}, threads=threads, target=dataclasses.replace(target, entries=entries)
                    ))  # fmt: skip
                    yield name, opened[-1]

    try:
        yield each()
    except BaseException:
        for one in reversed(opened):
            one.close()
        raise


@contextlib.contextmanager
def _held(binary: Binary) -> Iterator[str]:
    """A path, below the root folder, to a binary's bytes alone, which are the ones that have its digest."""
    if not hasattr(os, "memfd_create"):
        why = "It needs files in memory (memfd), which Linux and Android have."
        raise BackendError("Compiled graphs cannot be opened here.", why, "Choose another backend.")
    place, digest = binary.place, hashlib.sha256()
    try:
        fd = os.memfd_create("shoal-context", os.MFD_CLOEXEC)
        try:
            with contextlib.ExitStack() as undo:
                source = place.fd if place.fd >= 0 else undo.enter_context(open(place.path, "rb")).fileno()
                at, end = place.offset, place.offset + place.length
                while at < end and (part := os.pread(source, min(_STEP, end - at), at)):
                    digest.update(part)
                    os.write(fd, part)
                    at += len(part)
            if at != end or digest.hexdigest() != binary.sha256:
                raise _refuse(f"context binary in {place.path} is damaged")
            yield f"proc/self/fd/{fd}"
        finally:
            os.close(fd)
    except OSError as error:
        why = f"{error.strerror}."
        raise BackendError("A compiled graph cannot be opened.", why, "Free some memory, or try again.") from None


def _pointed(wrapper: bytes, path: str, ep: str) -> bytes:
    """A model of one EPContext node of the provider `ep`, and nothing that could name a file but the binary, which is
    at `path`. Raises BundleError for any other model."""
    model = onnx_wire.read(wrapper, {})
    node = model.nodes[0] if len(model.nodes) == 1 and not model.tensors else None
    if node is None or (node.op, node.domain) != (_NODE, "com.microsoft"):
        raise _refuse("graph is not one EPContext node")
    texts = onnx_texts.texts(model, node)
    if unknown := texts.keys() - _ATTRIBUTES:
        raise _refuse(f"EPContext node has an attribute {min(unknown)!r:.40}, which may name a file")
    if texts.get("source") != ep or node.integers.get("embed_mode") != 0:
        raise _refuse(f"EPContext node is not {ep}'s, or holds its binary itself")
    return onnx_texts.with_text(model, node, _CACHE, path)


def _question(do: str, device: Device, settings: Mapping[str, str]) -> dict:
    return {
        "do": do, "ep": device.listed.provider, "library": device.library,
        "listed": dataclasses.asdict(device.listed), "settings": dict(settings),
    }  # fmt: skip


def information(wrapper: bytes, ep: str) -> tuple[str, str]:
    """(sdk, information) in a compiled model."""
    model = onnx_wire.read(wrapper, {})
    sdk = onnx_texts.texts(model, model.nodes[0]).get("ep_sdk_version") if model.nodes else None
    return sdk or "", onnx_texts.metadata(model).get(_INFORMATION + ep, "")


def _is_binary(entry: object) -> bool:
    length, digest = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    return type(length) is int and 0 <= length < 1 << 48 and isinstance(digest, str) and len(digest) == 64


def _file(path: Path) -> Binary:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Binary(Place(str(path), 0, path.stat().st_size), digest)


def _refuse(why: str) -> BundleError:
    return BundleError("Compiled graphs cannot be used.", f"Their {why}.", "Convert the checkpoint again.")
