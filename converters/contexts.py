"""Context binaries in a bundle: its static graphs compiled ahead for named processors (`--npu qnn:sm8650`).

`add` writes them while a bundle is made, `extend` beside everything that a finished one holds. What compiles is the
provider's library on this machine, which need not have the processor. docs/format.md has the sections.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from shoal.runtime import backends, session
from shoal.runtime.backends import context, soc
from shoal.runtime.backends.provider import Device
from shoal.runtime.backends.soc import Soc
from shoal.runtime.bundle import Bundle, create
from shoal.runtime.bundle.write import Writer
from shoal.runtime.errors import BackendError, ConvertError, MissingPackageError
from shoal.runtime.events import Progress, silent
from shoal.runtime.static.contexts import ALIGNMENT, KIND, binaries_name, groups, index_name, source
from shoal.runtime.static.layout import STATIC

_STEP = 16 << 20


def compiler(npu: Iterable[str]) -> tuple[Device | None, list[Soc]]:
    """Who compiles for the processors named in `npu`, such as qnn:sm8650, and these; None where none is named. Raises
    UsageError for one that is not known, MissingPackageError where the library is not here."""
    socs = soc.parse(npu)
    if not socs:
        return None, []
    try:
        return backends.choose("npu:qnn"), socs
    except BackendError as error:
        raise MissingPackageError("Nothing can be compiled for an npu here.", error.why, error.fix) from None


def add(
    writer: Writer,
    device: Device,
    socs: Sequence[Soc],
    folder: Path,
    progress: Progress = silent,
    seconds: float = context.SECONDS,
) -> None:
    """Compiles the static graphs for each of `socs`, with the library of `device`, and writes what comes out. Their
    sections, and those of all weights, are finished.

    `folder` is for files on the way. Raises BackendError where a graph cannot be compiled whole, or takes too long.
    """
    static = [graph for graph in writer.graphs if graph.role == STATIC]
    sections = {(one.kind, one.name): one for one in writer.sections}
    stamp = source(writer.sections, static)
    places = {
        name: session.Place(str(writer.path), one.offset, one.length)
        for (kind, name), one in sections.items() if kind == "weights"
    }  # fmt: skip
    data = {}
    with open(writer.path, "rb") as file:
        for graph in static:
            file.seek(sections["graph", graph.section].offset)
            data[graph.name] = file.read(sections["graph", graph.section].length)
    chunks = sorted({graph.chunk for graph in static})
    for one in socs:
        with TemporaryDirectory(prefix=one.name, dir=folder) as scratch:
            found = context.compile_contexts(
                device, data, places, one, Path(scratch), source=stamp, chunks=chunks, groups=groups(static),
                seconds=seconds, progress=progress,
            )  # fmt: skip
            with writer.section(KIND, binaries_name(device.provider, one.name), ALIGNMENT) as sink:
                for binary in found.binaries:
                    sink.write(bytes(-sink.tell() % ALIGNMENT))
                    with open(binary.place.path, "rb") as made:
                        while part := made.read(_STEP):
                            sink.write(part)
        writer.add(KIND, index_name(device.provider, one.name), found.made.to_json())


def extend(
    path: str | Path, out: str | Path, npu: Iterable[str], *, overwrite: bool = False, progress: Progress = silent
) -> None:
    """Writes the bundle at `path` again, as `out`, with its static graphs compiled for the processors in `npu`.

    What was compiled for one of these before is left out. Raises as `compiler` and `add` do, ConvertError for a bundle
    without static graphs; `out` then is as it was.
    """
    device, socs = compiler(npu)
    with Bundle.open(path) as bundle, create(out, overwrite=overwrite) as writer:
        static = any(graph.role == STATIC for graph in bundle.graphs)
        if device is None or not static:
            why = "It has no static graphs." if device else "No processor is named."
            raise ConvertError(
                f"Nothing can be compiled of {path}.", why, "Convert its checkpoint with the recipe npu, and --npu."
            )
        bundle.verify(progress)
        again = tuple(index_name(device.provider, one.name) for one in socs)
        for section in bundle.sections:
            if section.kind == KIND and section.name.partition("/")[0] in again:
                continue
            view = bundle.view(section)
            with writer.section(section.kind, section.name, section.alignment, section.required) as sink:
                sink.write(view)
        for graph in bundle.graphs:
            writer.graph(graph)
        with writer.scratch() as folder:
            add(writer, device, socs, folder, progress)
        writer.commit()
