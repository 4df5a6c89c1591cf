"""The door to ONNX Runtime: open a graph whose weights stay mapped where they are, run it, say who ran what.

A graph names its weights by section; `open_graph` checks that it reaches nothing else (see onnx_wire.py), points it at
the real files and opens it with every silent fallback off. Every failure leaves as a ShoalError. This module knows
nothing about bundles, models or tokens.
"""

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime

from . import kernels, mapped, onnx_wire, providers
from .deadline import Late, Worker, within
from .errors import BackendError, BundleError, ShoalError, StorageError, UsageError
from .kernels.layout import PANEL
from .mapped import ALWAYS, Mapped, Table
from .providers import CPU, Assigned, Listed

PATIENCE = 120.0  # seconds that another device than the CPU may take to open a graph, or to run it once
LIBRARIES = [
    os.path.dirname(str(package.__file__)) for package in (onnxruntime, np, kernels)
]  # whose code a model runs
_OPENING = threading.Lock()
_ARENA: list = []  # of graphs that share one, once it is there
_LOST: list = []  # sessions whose device hangs: freeing them would hang as well
_LINEAR, _ROWS = "QuantizedLinear", "QuantizedRows"
_VECTOR = 256 << 10  # bytes of the longest weight that is a norm's or a bias
_DTYPES = {
    "float": np.float32, "double": np.float64, "float16": np.float16, "int8": np.int8, "uint8": np.uint8,
    "int16": np.int16, "uint16": np.uint16, "int32": np.int32, "uint32": np.uint32, "int64": np.int64,
    "uint64": np.uint64, "bool": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a section is: `length` bytes from `offset` of the file at `path`.

    `fd`, where given, is an open descriptor of that file; on Linux ORT then opens exactly what it refers to, and
    refuses once the path leads elsewhere. `prepared` marks the cache that prepack.py wrote: only its tensors may carry
    repacked weights, and a graph that uses it is already optimised.
    """

    path: str
    offset: int
    length: int
    fd: int = -1
    prepared: bool = False

    @property
    def location(self) -> str:
        """The file as ONNX external data names it, relative to the root folder."""
        if self.fd >= 0 and sys.platform == "linux":
            return f"proc/self/fd/{self.fd}"
        return os.path.splitdrive(os.path.abspath(self.path))[1].lstrip("/\\")


@dataclass(frozen=True)
class Value:
    """An input or output of a graph; a dim is a length, or the name of one that is open, or None."""

    name: str
    dtype: np.dtype
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Target:
    """Where else than on the CPU a graph is opened: a listed device, how its provider is set, and whether it must take
    every node (`whole`) or may leave some to the CPU. `patience` is how many seconds opening, or one run, may take.
    Sessions that share a `worker` run one at a time, and are lost together once the device hangs; its maker closes it.
    `entries` are ORT's settings of a session that its provider needs."""

    device: Listed
    settings: Mapping[str, str]
    whole: bool = True
    patience: float = PATIENCE
    worker: Worker | None = None
    entries: Mapping[str, str] = field(default_factory=dict)


def open_graph(
    graph: bytes, places: Mapping[str, Place], *, threads: int = 0, spinning: bool = False,
    target: Target | None = None, dims: Mapping[str, int] | None = None, repack: bool = True,
    profile: str | None = None, shared: bool = False,
) -> "Session":  # fmt: skip
    """Opens ModelProto bytes whose external data is in `places`, on the CPU or on `target`.

    `threads` (0: one a core) includes the caller's; with `spinning` they burn the time between two operators. `dims`
    gives open dimensions a length, by their names: a device that knows static shapes only then takes the graph.
    `profile` is the prefix of a file of ORT's timings, written by close(). Without `repack` weights are used where they
    lie, which saves a copy and is as fast only in fp32. Graphs that are `shared` keep what lies between their operators
    in one arena of the process, for many that run in turn: an arena each would hold a step of every one.
    Raises BundleError for a graph that is not one, and BackendError where ORT or the device cannot take it, is gone, or
    does not come back.
    """
    model = read(graph, places)
    with door(f"The model's graph cannot be opened on {target.device.provider if target else CPU}.", opening=True):
        options = options_for(places, threads=threads, spinning=spinning, target=target, dims=dims)
        if not repack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if shared:
            _share_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        # Of a prepared graph a step reads the prepared file whole; what lies elsewhere is read once, or a row at a time
        paths = {os.path.realpath(place.path) for place in places.values() if not place.prepared}
        with _OPENING:  # so that what is mapped meanwhile is this session's
            before = mapped.regions(paths)
            located = locate(model, places)
            if target is None:
                session = start(located, options)
            else:
                with _in_time(target.device.provider, "open the graph", target.patience):
                    session = within(target.patience, lambda: start(located, options, target), target.device.provider)
            weights = mapped.appeared(mapped.regions(paths), before, tables(model, places))
        weights.release()  # opening read every weight once, running reads few of those pages
        return Session(session, target, weights, profile=profile is not None)


def _share_arena() -> None:
    """Makes the process's arena, once; it stays for as long as the process does."""
    with _OPENING:
        if not _ARENA:
            kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
            info = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
            onnxruntime.create_and_register_allocator(info, None)
            _ARENA.append(info)


def survey(
    graph: bytes, places: Mapping[str, Place], target: Target, dims: Mapping[str, int] | None = None
) -> tuple[list[Assigned], list[str]]:
    """Where each node would run, were the graph opened on `target` with the rest left to the CPU, and what the engine
    logged meanwhile. For a process of its own (backends/probe.py): nothing here has a deadline, and the device's code
    may take the process with it."""
    messages: list[str] = []
    with door(f"The model's graph cannot be opened on {target.device.provider}.", opening=True):
        options = options_for(places, target=Target(target.device, target.settings, whole=False), dims=dims)
        options.log_severity_level = 0
        with providers.overheard(messages):
            session = start(locate(read(graph, places), places), options, target)
        return providers.assigned(session), messages


def options_for(
    places: Mapping[str, Place], *, threads: int = 0, spinning: bool = False, target: Target | None = None,
    dims: Mapping[str, int] | None = None,
) -> "onnxruntime.SessionOptions":  # fmt: skip
    options = session_options(threads=threads, spinning=spinning)
    if any(place.prepared for place in places.values()):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if target is not None and target.whole and target.device.provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in (target.entries if target else {}).items():
        options.add_session_config_entry(key, value)
    for name, length in (dims or {}).items():
        options.add_free_dimension_override_by_name(name, length)
    return options


def tables(model: onnx_wire.Model, places: Mapping[str, Place]) -> dict[str, list[Table]]:
    """The mapped tables of which a step reads single rows, by the name of the value that picks them; under ALWAYS the
    vectors (norms, biases) that every step reads, each as a table of one row."""
    tensors = {tensor.name: tensor for tensor in model.tensors if tensor.external}
    # What the engine repacks it reads from its copies; our product reads its weights where they lie, all of them
    whole = {name for node in model.nodes if node.op == _LINEAR for name in node.inputs[1:2]}
    found: dict[str, dict[str, Table]] = {ALWAYS: {}}
    for node in model.nodes:
        axis = {"Gather": "axis", "GatherBlockQuantized": "gather_axis"}.get(node.op)
        # A node that lacks the input is left for the engine to refuse
        picks = next(iter(node.inputs[1 if axis else 0 :]), ALWAYS) if axis or node.op == _ROWS else ALWAYS
        if "MatMul" in node.op or "Gemm" in node.op or (axis and node.integers.get(axis, 0)):
            continue
        for tensor in (tensors[name] for name in node.inputs if name in tensors and name not in whole):
            assert tensor.external is not None
            place, rows, together = places[tensor.external.location], 1, 1
            if axis:
                rows = tensor.dims[0] if tensor.dims else 1
            elif node.op == _ROWS:
                together = PANEL
                rows = -(-node.integers.get("outputs", 0) // PANEL)
            if place.prepared or rows < 1 or not (picks or tensor.nbytes <= _VECTOR):
                continue
            table = Table(place.path, place.offset + tensor.external.offset, tensor.nbytes // rows, rows, together)
            found.setdefault(picks, {})[tensor.name] = table
    return {name: list(named.values()) for name, named in found.items()}


def products(model: onnx_wire.Model, places: Mapping[str, Place]) -> list[tuple[Place, int, int]]:
    """(place, offset in its file, bytes) of the weights of each QuantizedLinear, once each."""
    names = dict.fromkeys(node.inputs[1] for node in model.nodes if node.op == _LINEAR)
    tensors = {tensor.name: tensor.external for tensor in model.tensors if tensor.external and tensor.name in names}
    return [
        (place, place.offset + external.offset, external.length)
        for external in tensors.values()
        for place in [places[external.location]]
    ]


def read(graph: bytes, places: Mapping[str, Place]) -> onnx_wire.Model:
    """The checked model, its external data inside `places`, which are whole. Raises BundleError."""
    for place in places.values():
        try:
            size = os.stat(place.fd if place.fd >= 0 else place.path).st_size
        except OSError as error:
            raise BundleError(f"{place.path} cannot be read.", f"{error.strerror}.", "Check the path.") from None
        if size < place.offset + place.length:
            why = f"It has {size} bytes; its weights end at {place.offset + place.length}."
            raise BundleError(f"{place.path} is shorter than it was.", why, "Copy or convert it again.")
    prepared = next((name for name, place in places.items() if place.prepared), None)
    model = onnx_wire.read(graph, {name: place.length for name, place in places.items()}, prepared)
    if unknown := {node.op for node in model.nodes if node.domain == kernels.DOMAIN} - kernels.OPERATORS:
        why = f"It has an operator {min(unknown)!r:.40}, which this version does not know."
        raise BundleError("The model's graph cannot be used.", why, "Install a newer shoal, or convert it again.")
    return model


def locate(model: onnx_wire.Model, places: Mapping[str, Place]) -> bytes:
    """The model's bytes with section names replaced by files below the root folder, as `session_options` expects."""

    def move(tensor: onnx_wire.Tensor) -> onnx_wire.External | None:
        if tensor.external is None:
            return None
        place, old = places[tensor.external.location], tensor.external
        packed = []
        for entry in old.prepacked:
            key, ranges = onnx_wire.blobs(entry)
            packed.append(onnx_wire.entry(key, [(place.offset + offset, length) for offset, length in ranges]))
        return onnx_wire.External(place.location, place.offset + old.offset, old.length, tuple(packed))

    return onnx_wire.relocate(model, move)


def session_options(*, threads: int = 0, spinning: bool = False) -> "onnxruntime.SessionOptions":
    """ORT options for a graph from `locate`: quiet, one thread pool a session, memory that can be predicted."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters arrives as an exception
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # A memory pattern keeps one block for each shape seen. The arena alone grows to one prefill chunk, 1.15 times
    # what is live, and every shorter step then fits into it.
    options.enable_mem_pattern = False
    for key, value in (
        ("session.intra_op.allow_spinning", "1"),
        # Within a step the next operator comes in microseconds, sooner than a sleeping thread wakes; between steps, and
        # beside another busy process, threads must not burn what they do not use
        ("session.intra_op.spin_duration_us", "2000" if spinning else "50"),
        ("session.model_external_initializers_file_folder_path", "/"),
        ("session.load_model_format", "ONNX"),  # what onnx_wire checked must not be read as another format
        ("session.record_ep_graph_assignment_info", "1"),
    ):
        options.add_session_config_entry(key, value)
    if kernels.available():
        options.register_custom_ops_library(str(kernels.LIBRARY))
    return options


def start(
    graph: bytes | str, options: "onnxruntime.SessionOptions", target: Target | None = None
) -> "onnxruntime.InferenceSession":
    """A raw ORT session with the wrapper's own fallback off; for this package's two doors only."""
    chosen = providers.attach(options, target.device, target.settings) if target else [CPU]
    session = onnxruntime.InferenceSession(
        graph, options, providers=chosen or None, enable_fallback=0, read_config_from_model=0
    )
    release_freed_memory()
    return session


def versions() -> dict[str, str]:
    """Versions of what computes: ORT, how it was built, numpy."""
    return {"onnxruntime": onnxruntime.__version__, "build": onnxruntime.get_build_info(), "numpy": np.__version__}


def release_freed_memory() -> None:
    """Gives freed heap back to the system: glibc keeps what repacking used (10 MB of a 200 MB model) otherwise."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


class Session:
    """An open graph. Several threads may `run` at once; a `Binding` belongs to one thread at a time."""

    def __init__(
        self,
        session: "onnxruntime.InferenceSession",
        target: Target | None = None,
        weights: Mapped | None = None,
        profile: bool = False,
    ):
        self._session: onnxruntime.InferenceSession | None = session
        self._weights, self._profile = weights or Mapped(), profile
        self._closing = threading.Lock()
        self._patience = target.patience if target else None
        self.provider = target.device.provider if target else CPU
        self._worker = (target.worker or Worker(self.provider)) if target else None
        self._shares = target is not None and target.worker is not None
        self.inputs = {value.name: value for value in map(_value, session.get_inputs())}
        self.outputs = {value.name: value for value in map(_value, session.get_outputs())}

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Runs once and returns the named outputs (all by default) in new arrays."""
        names = list(self.outputs) if outputs is None else list(outputs)
        if missing := [name for name in self.inputs if name not in feeds]:
            raise UsageError(f"Input {missing[0]!r} is missing.", "The graph needs every input.", "Pass it.")
        arrays = {name: _checked(self.inputs, name, array) for name, array in feeds.items()}
        with door("The model could not be run."), self._reading(arrays):
            session = self._open()
            return dict(zip(names, self._timed(lambda: session.run(names, arrays)), strict=True))

    def bind(self) -> "Binding":
        """A new set of buffers to run with; nothing is copied or allocated by a bound run."""
        return Binding(self)

    def assigned(self) -> list[Assigned]:
        """Each node and the execution provider that took it."""
        with door("ONNX Runtime does not say where nodes run."):
            return providers.assigned(self._open())

    def placement(self) -> dict[str, int]:
        """Execution provider -> how many nodes it took, fused ones counted as one."""
        return dict(Counter(node.provider for node in self.assigned()))

    def close(self) -> None:
        """Frees the session and its threads; arrays stay. A second call does nothing."""
        with self._closing:
            self._weights.forget()
            session, self._session = self._session, None
        if self._worker is not None:
            if self._worker.lost:
                _LOST.append(session)
                return
            if not self._shares:
                self._worker.close()
        if session is not None and self._profile:
            session.end_profiling()
        del session
        release_freed_memory()

    @contextlib.contextmanager
    def _reading(self, inputs: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Around a run: of the mapped tables the rows that it picks, and no others, become resident."""
        for name in self._weights.tables:
            if name in inputs:
                self._weights.fetch(name, inputs[name])
        yield
        if self._weights.settle():
            release_freed_memory()

    def _timed(self, work: Callable[[], Any]) -> Any:
        """What a run gives: on the CPU at once, on another device within its patience."""
        if self._worker is None or self._patience is None:
            return work()
        with _in_time(self.provider, "run the graph", self._patience):
            return self._worker.call(work, self._patience)

    def _open(self) -> "onnxruntime.InferenceSession":
        if self._session is None:
            raise BackendError("The graph is closed.", "close() was called.", "Open it again.")
        return self._session

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Binding:
    """Arrays bound to a session's inputs and outputs by address, kept alive for as long as they are bound.

    The same array may be an input and an output: GroupQueryAttention then updates the cache in place.
    """

    def __init__(self, session: Session):
        self._owner = session
        self._arrays: dict[tuple[str, str], np.ndarray] = {}
        with door("The model's buffers could not be bound."):
            self._binding = session._open().io_binding()

    def input(self, name: str, array: np.ndarray) -> None:
        """Binds a C-contiguous array of the input's dtype; later writes to it are seen by the next run."""
        array = _checked(self._owner.inputs, name, array, exact=True)
        with door(f"Input {name!r} could not be bound."):
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._arrays["in", name] = array

    def output(self, name: str, array: np.ndarray) -> None:
        """Binds a writable C-contiguous array that a run fills; its shape must be the one that comes out."""
        array = _checked(self._owner.outputs, name, array, exact=True)
        if not array.flags.writeable:
            raise UsageError(f"The array for output {name!r} is read-only.", "A run writes it.", "Pass another one.")
        with door(f"Output {name!r} could not be bound."):
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._arrays["out", name] = array

    def run(self) -> None:
        """Runs once on the bound arrays."""
        session = self._owner._open()
        arrays = {name: array for (side, name), array in self._arrays.items() if side == "in"}
        with door("The model could not be run."), self._owner._reading(arrays):
            self._owner._timed(lambda: session.run_with_iobinding(self._binding))


def _value(argument) -> Value:
    kind = argument.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _DTYPES:
        raise BundleError(
            "The model's graph cannot be used.", f"{argument.name!r} is a {argument.type}.", "Convert it again."
        )
    return Value(argument.name, np.dtype(_DTYPES[kind]), tuple(argument.shape))


def _checked(values: Mapping[str, Value], name: str, array: np.ndarray, exact: bool = False) -> np.ndarray:
    """The array, if it fits; ORT would read a wrong one as if it did, or convert it on every call."""
    value = values.get(name)
    if value is None:
        raise UsageError(f"The graph has no {name!r}.", f"It has {', '.join(values)}.", "Use one of these.")
    if not isinstance(array, np.ndarray) or array.dtype != value.dtype:
        found = getattr(array, "dtype", type(array).__name__)
        raise UsageError(f"{name!r} is {found}.", f"The graph takes {value.dtype}.", "Convert the array.")
    fits = len(array.shape) == len(value.dims) and all(
        want == have for want, have in zip(value.dims, array.shape, strict=True) if isinstance(want, int)
    )
    if not fits:
        raise UsageError(f"{name!r} has shape {array.shape}.", f"The graph takes {value.dims}.", "Reshape the array.")
    if not array.flags.c_contiguous:
        if exact:
            raise UsageError(f"{name!r} is not C-contiguous.", "It is bound by address.", "Pass a contiguous array.")
        return np.ascontiguousarray(array)
    return array


@contextlib.contextmanager
def _in_time(provider: str, what: str, seconds: float) -> Iterator[None]:
    try:
        yield
    except Late as late:
        raise BackendError(
            f"{provider} did not {what} within {seconds:g} s.", f"{late}.",
            "Its driver hangs: start the program again, without it (backend cpu) or with a newer driver.",
        ) from None  # fmt: skip


_EXPERT = re.compile(r"Expert \d+ of layer \d+ cannot be read: [^.]*\.")


@contextlib.contextmanager
def door(what: str, opening: bool = False) -> Iterator[None]:
    """Turns whatever ORT raises (its own classes, RuntimeError, UnicodeDecodeError, ...) into a ShoalError."""
    try:
        yield
    except ShoalError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:400] or type(error).__name__
        lowered = why.lower()
        if "failed to allocate" in lowered or "bad_alloc" in lowered or isinstance(error, MemoryError):
            raise BackendError(what, f"Memory ran out: {why}", "Allow a smaller chunk, context or slots.") from None
        if found := _EXPERT.search(why):  # in the kernels' words (experts.cpp, ops_experts.cpp)
            if "damaged" in found[0]:
                raise BundleError("The model cannot go on.", found[0], "Convert the checkpoint again.") from None
            fix = "Try again; if it stays so, check the disk and convert the checkpoint again."
            raise StorageError("The model cannot go on.", found[0], fix) from None
        if opening and "pre-packed weights" in lowered:
            fix = "Remove the cache folder ($SHOAL_CACHE, else ~/.cache/shoal); what it had is made again."
            raise StorageError("The prepared weights are damaged.", why, fix) from None
        refused = ("InvalidProtobuf", "InvalidGraph", "InvalidArgument", "NoSuchFile", "NoModel", "UnicodeDecodeError")
        if opening and (type(error).__name__ in refused or "external" in lowered):
            raise BundleError(what, why, "Verify the bundle, or convert the checkpoint again.") from None
        fix = "Run shoal doctor; it lists the engine's version and what this machine offers."
        raise BackendError(what, why, fix) from None
