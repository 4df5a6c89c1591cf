"""A graph of our operators made ready for a device without the kernels' library: the same graph in ONNX Runtime's
operators, its weights written once in their layout, to a file that is kept and mapped from then on.

Like prepack.py, whose work comes after it: what is made here is repacked there like any other graph's weights. It knows
nothing about cards, models or budgets.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import device_cache
from .device_cache import CacheFile, CacheWriter, cache_folder
from .errors import BackendError
from .events import Event, Progress, silent
from .kernels import lower
from .onnx_wire import External
from .session import Place, read

LIMIT = 16 << 30  # bytes of the cache folder
_VERSION = 1


@dataclass(frozen=True)
class Portable:
    """A graph for `session.open_graph(portable.graph, portable.places)`. While `file` is open the cache keeps it."""

    graph: bytes
    places: dict[str, Place]
    file: CacheFile

    @property
    def path(self) -> Path:
        """The mapped file of the weights."""
        return self.file.path

    def close(self) -> None:
        """Lets the file go; a second call does nothing."""
        self.file.close()


def portable(
    graph: bytes, places: Mapping[str, Place], folder: str | Path | None = None, key: str = "",
    progress: Progress = silent,
) -> Portable:  # fmt: skip
    """The graph in ONNX Runtime's operators, its weights mapped from `folder`; they are written now if they are not
    there yet. `key` says what the external data is: the bundle's digest.

    Raises StorageError where the disk is full or the folder cannot be used, BundleError for a graph that is not one.
    """
    folder = Path(folder) if folder is not None else cache_folder()
    lowered = lower.lower(read(graph, places))
    layout = [(m.name, vars(m.format), m.source.location, m.source.offset, m.gated) for m in lowered.matrices]
    name = hashlib.sha256(json.dumps([_VERSION, key, layout]).encode()).hexdigest()[:40]

    def make() -> None:
        device_cache.make_room(folder, 2 * lowered.length + (1 << 20), LIMIT)
        with device_cache.create(folder, name, {}) as writer:
            _fill(writer, lowered, places, progress)

    file = device_cache.found_or_made(folder, lambda: device_cache.find(folder, name), make, progress)
    place = Place(str(file.path), device_cache.PAGE, lowered.length, file.fd)
    return Portable(lowered.graph, {**places, lower.LOCATION: place}, file)


def _fill(writer: CacheWriter, lowered: lower.Lowered, places: Mapping[str, Place], progress: Progress) -> None:
    def bytes_of(source: External) -> memoryview:
        place = places[source.location]
        path = f"/proc/self/fd/{place.fd}" if place.fd >= 0 and Path("/proc/self/fd").exists() else place.path
        data = np.memmap(path, np.uint8, "r", place.offset + source.offset, source.length)
        return memoryview(data)  # type: ignore[arg-type]

    def step(done: int) -> None:
        progress(Event("transcode", done, lowered.length, "", "B"))

    try:
        with open(writer.scratch / "transcoded", "w+b") as file:
            lower.transcode(lowered, bytes_of, file, step)
            file.flush()
            if lowered.length:
                with memoryview(np.memmap(file.name, np.uint8, "r")) as data:  # type: ignore[arg-type]
                    writer.add(data)
            Path(file.name).unlink()
    except ValueError as error:
        raise BackendError("A weight cannot be read.", str(error), "The bundle is shorter than it was.") from None
