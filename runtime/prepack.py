"""Weights repacked for this device once, kept in a file and mapped from then on.

ORT copies most weights into a layout of its own when it opens a graph: private memory, anew at every start. It can
also take such copies from a file. `prepare` makes that file: it freezes the graph as ORT optimises it, lets ORT repack
one node at a time (so the largest weight bounds its memory), and caches the copies with the frozen graph. The
originals stay in the bundle. ORT still reads them when it opens a graph: it repacks each weight into a temporary, takes
the cached copy only where both hash alike, and refuses one whose bytes differ all the same, so a copy of other weights
costs memory and a damaged one fails, and neither gives a wrong answer.

All copies hang on one small weight, the carrier, which is moved into the cache: ORT finds them by hash, not by name.
The cache key is the bundle's digest, the graph, ORT's build and the processor's features. This module knows nothing
about cards, models or budgets.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from . import device_cache, onnx_wire
from .device_cache import CacheFile, CacheWriter, cache_folder
from .errors import BackendError, StorageError
from .events import Event, Progress, silent
from .onnx_wire import External, Model, Node, Tensor
from .session import Place, door, locate, read, session_options, start, versions

__all__ = ["Estimate", "Prepared", "cache_folder", "estimate", "prepare"]

LIMIT = 16 << 30  # bytes of the cache folder
_VERSION = 1  # of what an index holds

# Operators whose second input the CPU provider repacks. Their first input is float32, whatever the weight is.
_PACKING = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", "DynamicQuantizeMatMul"}


@dataclass(frozen=True)
class Estimate:
    """What preparing a graph would give, in bytes, before it is done.

    `repacked` will be mapped from the cache (or is private where nothing is prepared) and read by every step; `cold`
    are the originals of these, read when the graph is opened and not afterwards; `direct` are the weights that a step
    reads from the bundle itself (norms, embeddings: of those only the gathered rows); `largest` is the biggest copy:
    opening holds that much private memory for a moment, preparing twice that.
    """

    repacked: int
    cold: int
    direct: int
    largest: int


@dataclass(frozen=True)
class Prepared:
    """A graph for `session.open_graph(prepared.graph, prepared.places)`.

    `repacked` and `cold` as in Estimate, counted; `private` is what will be copied all the same (a node that ORT did
    not repack alone, or whose copy equals another node's: ORT hands each out once). While `file` is open the cache
    keeps it; keep it until the session is closed.
    """

    graph: bytes
    places: dict[str, Place]
    repacked: int
    cold: int
    private: int
    file: CacheFile

    @property
    def path(self) -> Path:
        """The mapped file of the repacked weights."""
        return self.file.path

    def close(self) -> None:
        """Lets the file go; a second call does nothing."""
        self.file.close()


def prepare(
    graph: bytes, places: Mapping[str, Place], folder: str | Path | None = None, key: str = "",
    progress: Progress = silent, *, limit: int = LIMIT,
) -> Prepared:  # fmt: skip
    """The graph with its repacked weights mapped from `folder`; they are made now if they are not there yet.

    `key` says what the external data is: the bundle's digest. Raises StorageError where the disk is full, the folder
    cannot be used or is not on this system (the graph still opens as it is, with `estimate`d bytes of
    private memory), and BundleError or BackendError as opening would.
    """
    if os.name != "posix":
        raise StorageError("Weights cannot be prepared here.", "It needs POSIX file locks.", "Pass prepare=False.")
    folder = Path(folder) if folder is not None else cache_folder()
    name = _digest([_VERSION, key, hashlib.sha256(graph).hexdigest(), sorted(places), *device()])[:40]

    def make() -> None:
        model = read(graph, places)
        expected = estimate(model)
        # Beside the file itself: one node's weights and their copy, as ORT writes them
        device_cache.make_room(folder, expected.repacked + 3 * expected.largest + (1 << 20), limit)
        index: dict = {}
        with device_cache.create(folder, name, index) as writer:
            _fill(writer, index, model, places, expected.repacked, progress)

    return device_cache.found_or_made(folder, lambda: _reuse(folder, name, places), make, progress)


def device() -> tuple[str, ...]:
    """What repacked bytes depend on besides the weights: ORT's build and the processor's features."""
    wanted = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    features = {platform.machine(), platform.processor()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                features.add(f"{name.strip()}={' '.join(sorted(value.split()))}")
    engine = versions()
    return engine["onnxruntime"], engine["build"], _digest(sorted(features))


def _reuse(folder: Path, name: str, places: Mapping[str, Place]) -> Prepared | None:
    file = device_cache.find(folder, name)
    if file is None:
        return None
    try:
        index = file.index
        section = str(index["section"])
        place = Place(str(file.path), 0, file.size, file.fd, prepared=True)
        return Prepared(
            file.read(index["graph"]), {**places, section: place},
            int(index["repacked"]), int(index["cold"]), int(index["private"]), file,
        )  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError):
        file.close()
        return None


def _fill(
    writer: CacheWriter, index: dict, model: Model, places: Mapping[str, Place], total: int, progress: Progress
) -> None:
    section = next(name for name in ("prepared", "prepared.", "prepared..") if name not in places)
    frozen = _freeze(model, places, writer)
    constants = {tensor.name: tensor for tensor in frozen.tensors}
    weights = {name: tensor for name, tensor in constants.items() if tensor.external}
    entries: dict[str, str] = {}
    cold, direct = set[str](), set[str]()
    repacked = private = 0
    for node in frozen.nodes:
        if not _packs(node, constants):
            direct.update(node.inputs)
            continue
        progress(Event("prepare", repacked, max(total, repacked), node.name or node.op, "bytes"))
        found = _repack(writer, frozen, node, places)
        if found is None:
            private += _packed_bytes(node, weights[node.inputs[1]])
            continue
        (cold if found else direct).update(node.inputs)
        for key, blobs in found:
            if key in entries:
                private += sum(map(len, blobs))
                continue
            entries[key] = onnx_wire.entry(key, [writer.at(writer.add(blob)) for blob in blobs])
            repacked += sum(map(len, blobs))
    graph = frozen.data
    if entries:
        carrier = min((t for t in weights.values() if t.nbytes), key=lambda tensor: tensor.nbytes)
        at, length = writer.at(writer.add(_bytes_of(carrier, places)))
        moved = External(section, at, length, tuple(entries.values()))
        graph = onnx_wire.relocate(frozen, lambda tensor: moved if tensor.name == carrier.name else None)
    index |= {
        "graph": writer.add(graph), "section": section, "repacked": repacked, "private": private,
        "cold": sum(weights[name].nbytes for name in (cold - direct) & weights.keys()),
    }  # fmt: skip
    progress(Event("prepare", repacked, repacked, unit="bytes"))


def _freeze(model: Model, places: Mapping[str, Place], writer: CacheWriter) -> Model:
    """The graph as ORT optimises it on this device; its external data still names sections, and no weight is read."""
    writer.reserve(2 * len(model.data) + (1 << 20))  # else ORT fails in its own words
    path = writer.scratch / "frozen.onnx"
    options = session_options(threads=1)
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.optimized_model_filepath = str(path)
    with door("The model's graph cannot be opened.", opening=True):
        start(locate(model, places), options)
    files: dict[str, list[tuple[int, int, str]]] = {}
    for section, place in places.items():
        files.setdefault(place.location, []).append((place.offset, place.offset + place.length, section))
    moved = onnx_wire.read(path.read_bytes(), {file: max(end for _, end, _ in found) for file, found in files.items()})

    def back(tensor: Tensor) -> External | None:
        old = tensor.external
        if old is None:
            return None
        at, section = next(
            (at, name) for at, end, name in files[old.location] if at <= old.offset and old.offset + old.length <= end
        )
        return External(section, old.offset - at, old.length)

    return read(onnx_wire.relocate(moved, back), places)


def _repack(
    writer: CacheWriter, frozen: Model, node: Node, places: Mapping[str, Place]
) -> list[tuple[str, list[memoryview]]] | None:
    """What ORT repacks for one node, alone in a model, as (key, blobs); None where it does not take the node alone.

    What ORT saved is opened again and has to compute, bit by bit, what the fresh copy computed.
    """
    tensors = [tensor for tensor in frozen.tensors if tensor.name in node.inputs]
    writer.reserve(3 * sum(tensor.nbytes for tensor in tensors) + (1 << 20))
    path, data = writer.scratch / "one.onnx", writer.scratch / "one.data"
    options = session_options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", data.name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "0"),
    ):
        options.add_session_config_entry(key, value)
    options.optimized_model_filepath = str(path)
    feeds = {node.inputs[0]: _probe(node, tensors)}
    again = session_options(threads=1)
    again.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        alone = read(onnx_wire.single(frozen, node, tensors, {node.inputs[0]: 1}), places)
        expected = start(locate(alone, places), options).run(None, feeds)
        size = data.stat().st_size
        saved = onnx_wire.read(path.read_bytes(), {data.name: size}, data.name)
        entries = [value for tensor in saved.tensors if tensor.external for value in tensor.external.prepacked]
        place = {data.name: Place(str(data), 0, size)}
        found = start(locate(saved, place), again).run(None, feeds) if entries else expected
    except Exception:
        return None
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(expected, found, strict=True)):
        return None
    content = memoryview(np.memmap(data, mode="r") if entries else b"")  # type: ignore[arg-type]
    data.unlink()  # the mapping stays; the next node's file is another one
    return [
        (key, [content[at : at + length] for at, length in ranges]) for key, ranges in map(onnx_wire.blobs, entries)
    ]


def _packs(node: Node, constants: Mapping[str, Tensor]) -> bool:
    second = constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    return (
        node.op in _PACKING
        and second is not None
        and second.external is not None
        and len(second.dims) >= 2
        and [name for name in node.inputs if name and name not in constants] == [node.inputs[0]]
    )


def estimate(model: Model) -> Estimate:
    """By shapes alone, as ORT repacks on x86-64 (1.32); on other processors a few per cent off."""
    constants = {tensor.name: tensor for tensor in model.tensors}
    weights = {name: tensor for name, tensor in constants.items() if tensor.external}
    cold, direct = set[str](), set[str]()
    repacked = largest = 0
    for node in model.nodes:
        size = _packed_bytes(node, weights[node.inputs[1]]) if _packs(node, constants) else 0
        repacked, largest = repacked + size, max(largest, size)
        (cold if size else direct).update(node.inputs)
    cold_bytes = sum(weights[name].nbytes for name in (cold - direct) & weights.keys())
    return Estimate(repacked, cold_bytes, sum(tensor.nbytes for tensor in weights.values()) - cold_bytes, largest)


def _packed_bytes(node: Node, weight: Tensor) -> int:
    """Bytes that ORT's x86-64 kernels make of a weight; 0 where they use it as it is."""
    if node.op != "MatMulNBits":
        return weight.nbytes
    if node.integers.get("accuracy_level", 0) == 4:
        return weight.nbytes + 8 * weight.dims[0] * weight.dims[1] + 126  # a scale and a sum for each block
    return weight.nbytes if node.integers.get("bits", 4) == 4 else 0


def _probe(node: Node, tensors: list[Tensor]) -> np.ndarray:
    """One random row for the node's first input, fp32 [1, K]."""
    dims = next(tensor.dims for tensor in tensors if tensor.name == node.inputs[1])
    width = node.integers.get("K") or dims[-1 if node.integers.get("transB") else -2]
    return np.random.default_rng(0).standard_normal((1, width), np.float32)


def _bytes_of(tensor: Tensor, places: Mapping[str, Place]) -> bytes:
    assert tensor.external is not None
    place = places[tensor.external.location]
    with open(place.fd if place.fd >= 0 else place.path, "rb", closefd=place.fd < 0) as file:
        data = os.pread(file.fileno(), tensor.nbytes, place.offset + tensor.external.offset)
    if len(data) != tensor.nbytes:
        raise BackendError("A weight cannot be read.", "The bundle is shorter than it was.", "Convert it again.")
    return data


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
