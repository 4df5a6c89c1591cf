"""A split network becomes bundles: from ONNX files to what an edge serves and what a device has.

A tail takes and gives tensors whose first axis is the batch, and treats every row by itself, because an edge runs the
rows of several devices at once. A graph is held to that by running it, and one whose rows meet is refused. Weights go
to the bundle's section of that name, where they stay mapped, and graphs share those that are equal: initializers, and
the tensors of Constant nodes, as which some exporters write all of them. The graph of a branch or a loop keeps its own:
only an initializer of the whole graph may lie elsewhere. It knows nothing about encoders or training.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from shoal.runtime.bundle import Bundle, Graph, create
from shoal.runtime.bundle.write import SectionWriter
from shoal.runtime.errors import BackendError, BundleError, ConvertError, UsageError
from shoal.runtime.session import Place, Session, open_graph

INLINE = 1024  # bytes of the largest tensor that stays in the graph
ROLES = ("head", "tail", "local")
_WEIGHTS, _ALIGNMENT = "weights", 64
_WIDEST = 16  # bytes of an element of the widest type
_ROWS = 3  # of the trial: more than two, so that an exchange shows
_OPEN = 16  # length of an open axis that is not the batch, in the trial
_TOLERANCE = 1e-3  # relative: a product of one row and one of three rows round differently


def pack_tail(
    onnx_model: bytes | str | os.PathLike, out: str | os.PathLike, name: str = "", *, encoder: str = "",
    tables: str = "", modes: Iterable[Mapping[str, float]] = (), overwrite: bool = False,
) -> str:  # fmt: skip
    """Writes what an edge serves, a bundle of one tail: `pack` for that role alone."""
    return pack({"tail": onnx_model}, out, name, encoder=encoder, tables=tables, modes=modes, overwrite=overwrite)


def pack(
    graphs: Mapping[str, bytes | str | os.PathLike], out: str | os.PathLike, name: str = "", *, encoder: str = "",
    tables: str = "", modes: Iterable[Mapping[str, float]] = (), overwrite: bool = False,
) -> str:  # fmt: skip
    """Writes ONNX models (bytes, or files with their external data beside them), by role, as `out`; its digest.

    A "head" makes the inputs of a "tail", "local" is a network by itself: a device has a head, and a tail or a local
    one if it is to answer without an edge. `encoder` and `tables` are the digests of the device's part and of the
    codec's tables that the tail was trained with, "" where `name` (by default the first file's) says enough; `modes`
    are the operating points: {id, bits, bytes, device_ms, accuracy}, the same in a device's bundle and in its edge's.
    They go to the section "modes" as JSON. Raises ConvertError, StorageError and UsageError; `out` then is as it was.
    """
    if not graphs or not set(graphs) <= set(ROLES):
        why = f"The graphs' roles are {', '.join(graphs) or 'none'}."
        raise UsageError("The bundle cannot be packed.", why, f"Give graphs of roles out of {', '.join(ROLES)}.")
    role, first = next(iter(graphs.items()))
    about = {
        "name": name or (role if isinstance(first, bytes) else Path(os.fspath(first)).stem),
        "encoder": encoder,
        "tables": tables,
        "modes": [dict(mode) for mode in modes],
    }
    with create(out, overwrite=overwrite) as writer:
        made: dict[str, bytes] = {}
        with writer.scratch() as folder, writer.section("weights", _WEIGHTS, required=True) as section:
            written: dict[bytes, int] = {}
            for role, source in graphs.items():
                model = _read(role, source, folder)
                for value in model.graph.initializers.values():
                    _move(role, value, section, written)
                made[role] = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        _try(made, {_WEIGHTS: Place(str(writer.path), section.offset, section.tell())})
        for role, graph in made.items():
            writer.add("graph", role, graph, required=True)
            writer.graph(Graph(role, role, "cpu", 0, 0, 0, role))
        writer.add("modes", "", json.dumps(about, sort_keys=True).encode())
        writer.commit()
    with Bundle.open(out) as bundle:
        return bundle.digest


def _read(role: str, source: bytes | str | os.PathLike, folder: Path) -> ir.Model:
    """The model with its weights where they are. onnx-ir keeps external data inside the file's own folder."""
    path = Path(os.path.abspath(source)) if not isinstance(source, bytes) else folder / f"{role}.onnx"
    try:
        if isinstance(source, bytes):
            path.write_bytes(source)
        model = ir.load(path)
        LiftConstantsToInitializersPass(size_limit=INLINE // _WIDEST + 1)(model)
    except Exception as error:  # protobuf's and onnx-ir's own, of many kinds
        raise _refuse(role, f"It cannot be read: {_short(error)}", "Give an ONNX model.") from None
    for value in model.graph.inputs if role == "tail" else ():
        if value.shape is None or not len(value.shape) or isinstance(value.shape[0], int):
            why = f"The first axis of its input {value.name!r} is not an open batch."
            raise _refuse(role, why, "Export it with a dynamic first axis in every input and output.")
    return model


def _move(role: str, value: ir.Value, section: SectionWriter, written: dict[bytes, int]) -> None:
    """Moves an initializer's bytes to the section, but for small ones, which only come into the graph. `written` has
    the digests of what is there, and where."""
    tensor = value.const_value
    if tensor is None:
        raise _refuse(role, f"Its initializer {value.name!r} has no value.", "Export it again.")
    try:
        data = tensor.tobytes()
    except Exception as error:
        why = f"Its initializer {value.name!r} cannot be read: {_short(error)}"
        raise _refuse(role, why, "Export it again.") from None
    if len(data) <= INLINE or tensor.dtype == ir.DataType.STRING:
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        return
    digest = hashlib.sha256(data).digest()
    if digest not in written:
        section.write(bytes(-section.tell() % _ALIGNMENT))
        written[digest] = section.tell()
        section.write(data)
    value.const_value = ir.ExternalTensor(
        _WEIGHTS,
        written[digest],
        len(data),
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=str(value.name),
        base_dir="",
    )


def _try(graphs: Mapping[str, bytes], places: Mapping[str, Place]) -> None:
    """Raises ConvertError unless every graph opens, the tail treats its rows one by one, and it takes what the head
    gives."""
    ports: dict[str, tuple[dict[str, np.dtype], dict[str, np.dtype]]] = {}
    for role, graph in graphs.items():
        try:
            with open_graph(graph, places) as session:
                inputs, outputs = session.inputs.values(), session.outputs.values()
                ports[role] = {v.name: v.dtype for v in inputs}, {v.name: v.dtype for v in outputs}
                if role == "tail":
                    _try_rows(session)
        except (BackendError, BundleError) as error:
            raise _refuse(role, error.why, "Export it for ONNX Runtime, opset 21 or older.") from None
    if {"head", "tail"} <= graphs.keys() and ports["head"][1] != ports["tail"][0]:
        gives, takes = (", ".join(f"{name} {dtype}" for name, dtype in found.items())
                        for found in (ports["head"][1], ports["tail"][0]))  # fmt: skip
        raise _refuse("tail", f"It takes {takes}; the head gives {gives}.", "Cut both at the same values.")


def _try_rows(session: Session) -> None:
    """Raises ConvertError unless each of several rows gives what it gives alone."""
    feeds = trial(session, _ROWS)
    together = session.run(feeds)
    for row in range(_ROWS):
        alone = session.run({name: array[row : row + 1] for name, array in feeds.items()})
        for name, array in together.items():
            _same(name, alone[name], array[row : row + 1] if array.ndim else array)


def trial(session: Session, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs of `rows` rows that a graph takes: normal floats, bytes of all values, indices of 0 and 1."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, value in session.inputs.items():
        shape = (rows, *(dim if isinstance(dim, int) else _OPEN for dim in value.dims[1:]))
        if value.dtype.kind == "f":
            array: np.ndarray = rng.standard_normal(shape, np.float32)
        else:
            array = rng.integers(0, 256 if value.dtype.itemsize == 1 and value.dtype.kind != "b" else 2, shape)
        feeds[name] = array.astype(value.dtype)
    return feeds


def _same(name: str, alone: np.ndarray, together: np.ndarray) -> None:
    if alone.shape != together.shape or alone.shape[:1] != (1,):
        why = f"Its output {name!r} does not have the batch as its first axis: one row gives {alone.shape}."
    elif alone.dtype.kind != "f":
        if np.mean(alone != together) <= _TOLERANCE:
            return
        why = f"Its output {name!r} of a row depends on the other rows."
    else:
        scale = float(np.abs(alone).max(initial=0.0)) or 1.0
        if np.allclose(alone, together, rtol=0, atol=_TOLERANCE * scale, equal_nan=True):
            return
        why = f"Its output {name!r} of a row depends on the other rows."
    raise _refuse("tail", why, "Remove what crosses the batch, such as a norm in training mode.")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _refuse(role: str, why: str, fix: str) -> ConvertError:
    return ConvertError(f"The {role} cannot be packed.", why, fix)
