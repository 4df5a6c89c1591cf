"""A bundle's static graphs as context binaries for the device at hand: those that it holds, or else the device's own,
compiled once and cached.

Binaries that are not for this device, its provider's version or these graphs are never used: by default the device
compiles its own, and an Event says why; asked to be `strict`, it is refused. docs/format.md has the sections. This
module knows nothing about steps or tokens.
"""

import contextlib
import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import device_cache, providers
from ..backends import context
from ..backends.context import Binary, Contexts, Made
from ..backends.provider import Device
from ..bundle import Bundle
from ..bundle.layout import Graph, Section
from ..device_cache import CacheFile
from ..errors import BackendError, BundleError, StorageError
from ..events import Event, Progress, silent
from ..prepack import LIMIT
from ..session import Place

KIND, ALIGNMENT = "context_binary", 4096
_VERSION = 1  # of what a cache file's index holds


@dataclass(frozen=True)
class Ready:
    """Compiled graphs that fit. `rehearsed`: they have been opened on this device before. While `file` is open the
    cache keeps it; keep it until they are opened."""

    contexts: Contexts
    rehearsed: bool = False
    file: CacheFile | None = None

    def close(self) -> None:
        """Lets the file go; a second call does nothing."""
        if self.file is not None:
            self.file.close()


def index_name(provider: str, soc: str) -> str:
    """The name of the section that says what was compiled for a processor."""
    return f"{provider}:{soc}"


def binaries_name(provider: str, soc: str) -> str:
    """The name of the section of its binaries, each from a multiple of ALIGNMENT on."""
    return f"{provider}:{soc}/binaries"


def source(sections: Iterable[Section], graphs: Iterable[Graph]) -> str:
    """What identifies static graphs and all weights among the `sections` of a bundle."""
    digests = {(one.kind, one.name): one.sha256.hex() for one in sections}
    weights = {name: digest for (kind, name), digest in digests.items() if kind == "weights"}
    return context.source_digest({one.name: digests["graph", one.section] for one in graphs}, weights)


def groups(graphs: Iterable[Graph]) -> dict[str, int]:
    """Which graphs share a binary, and their weights in it: those of a block, of every chunk length. A binary of all
    blocks would hold everything in memory at once while it is made."""
    return {one.name: one.first_block for one in graphs}


def held(bundle: Bundle) -> list[Contexts]:
    """The context binaries in a bundle, unchecked against any device. Raises BundleError."""
    found = []
    for section in bundle.sections:
        if section.kind != KIND or "/" in section.name:
            continue
        made = Made.from_json(bundle.bytes(section))
        if section.name != index_name(made.provider, made.soc):
            raise _refuse(f"Those called {section.name!r} are for {made.title:.60}.")
        whole, at, binaries = bundle.section(KIND, binaries_name(made.provider, made.soc)), 0, []
        for length, digest in made.binaries:
            at = -(-at // ALIGNMENT) * ALIGNMENT
            binaries.append(Binary(Place(str(bundle.path), whole.offset + at, length, bundle.fileno()), digest))
            at += length
        if at != whole.length:
            raise _refuse(f"Those for {section.name!r} are {whole.length} bytes, and should be {at}.")
        found.append(Contexts(made, tuple(binaries)))
    return found


def find(
    bundle: Bundle, device: Device | None, graphs: Sequence[Graph], places: Mapping[str, Place], *,
    strict: bool = False, folder: str | Path | None = None, seconds: float = context.SECONDS,
    progress: Progress = silent,
) -> Ready | None:  # fmt: skip
    """The static `graphs` of a bundle compiled for `device`: the bundle's where they fit it, else those in the cache
    folder, which are made now where they are not there yet.

    None where the device's provider compiles nothing ahead, and where it cannot compile these, which an Event says: the
    graphs are then opened as they are. With `strict` only the bundle's will do, and BackendError says why they do not.
    Raises BundleError for sections that are wrong.
    """
    if device is None or device.provider not in context.COMPILERS:
        return None
    stamp, why = source(bundle.sections, graphs), []
    try:
        here = context.identity(device)
    except BackendError as error:
        if strict:
            raise
        _as_they_are(error, len(graphs), progress)
        return None
    names = {one.name for one in graphs}
    if device.library:
        providers.register(device.listed.provider, device.library)
    for one in held(bundle):
        verdict = "" if device.simulated else providers.compatible(device.listed, one.made.information)
        refused = context.refusal(one.made, device, stamp, here, verdict)
        if not refused and set(one.made.graphs) != names:
            refused = "they are not of all graphs"
        if not refused:
            return Ready(one)
        why.append(f"those for {index_name(one.made.provider, one.made.soc)} do not fit: {refused}")
    reason = "; ".join(why) or "it has none"
    if strict:
        raise BackendError(
            f"The bundle has no compiled graphs for {device.title}.", f"{reason[0].upper()}{reason[1:]}.",
            "Convert it again with --npu for this device and this version, or let the device compile its own.",
        )  # fmt: skip
    folder = Path(folder) if folder is not None else device_cache.cache_folder()
    key = [_VERSION, bundle.digest, stamp, *here, device.name, sorted(device.settings.items()), device.listed.version]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]

    def make() -> None:
        said = f"{device.title} compiles its own" + (f"; of the bundle's, {reason}" if why else "")
        progress(Event("compile", 0, len(graphs), said, "graphs"))
        _make(folder, name, bundle, device, graphs, places, stamp, seconds, progress)

    try:
        return device_cache.found_or_made(folder, lambda: _reuse(folder, name, names), make, progress)
    except (BackendError, StorageError) as error:
        _as_they_are(error, len(graphs), progress)
        return None


def _as_they_are(error: BackendError | StorageError, graphs: int, progress: Progress) -> None:
    progress(Event("compile", 0, graphs, f"opened as they are: {error.what} {error.why}", "graphs"))


def _make(
    folder: Path, name: str, bundle: Bundle, device: Device, graphs: Sequence[Graph], places: Mapping[str, Place],
    stamp: str, seconds: float, progress: Progress,
) -> None:  # fmt: skip
    chunks = sorted({one.chunk for one in graphs})
    # A binary as it is made and as it is kept; on a simulated device there is one for each graph
    needed = 2 * sum(place.length for place in places.values()) * (len(chunks) if device.simulated else 1)
    device_cache.make_room(folder, needed + (16 << 20), LIMIT)
    index: dict = {}
    data = {one.name: bundle.bytes(bundle.section("graph", one.section)) for one in graphs}
    with device_cache.create(folder, name, index) as writer:
        made = context.compile_contexts(
            device, data, places, None, writer.scratch, source=stamp, chunks=chunks, groups=groups(graphs),
            seconds=seconds, progress=progress,
        )  # fmt: skip
        context.rehearse(device, made, progress=progress)
        index["contexts"], index["binaries"] = writer.add(made.made.to_json()), []
        for binary in made.binaries:
            with open(binary.place.path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as whole:
                index["binaries"].append(writer.add(memoryview(whole)))
            Path(binary.place.path).unlink()


def _reuse(folder: Path, name: str, graphs: set[str]) -> Ready | None:
    file = device_cache.find(folder, name)
    if file is None:
        return None
    with contextlib.suppress(BundleError, OSError, ValueError, LookupError, TypeError):
        made = Made.from_json(file.read(file.index["contexts"]))
        binaries = tuple(
            Binary(Place(str(file.path), *file.at(piece), file.fd), digest)
            for piece, (_, digest) in zip(file.index["binaries"], made.binaries, strict=True)
        )
        if set(made.graphs) == graphs and file.verify():
            return Ready(Contexts(made, binaries), rehearsed=True, file=file)
    file.close()
    return None


def _refuse(why: str) -> BundleError:
    return BundleError("Compiled graphs cannot be used.", why, "Convert the checkpoint again.")
