"""A tail becomes a bundle: the rest of a split network, from an ONNX file to what an edge serves.

A tail takes and gives tensors whose first axis is the batch, and treats every row by itself, because an edge runs the
rows of several devices at once. `pack_tail` holds a graph to that by running it, and refuses one whose rows meet.
Weights move to the bundle's section of that name, where they stay mapped. It knows nothing about encoders or training.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from shoal.runtime.bundle import Bundle, Graph, create
from shoal.runtime.bundle.write import SectionWriter
from shoal.runtime.errors import BackendError, BundleError, ConvertError
from shoal.runtime.session import Place, Session, open_graph

INLINE = 1024  # bytes of the largest tensor that stays in the graph
_WEIGHTS, _ALIGNMENT = "weights", 64
_ROWS = 3  # of the trial: more than two, so that an exchange shows
_OPEN = 16  # length of an open axis that is not the batch, in the trial
_TOLERANCE = 1e-3  # relative: a product of one row and one of three rows round differently


def pack_tail(
    onnx_model: bytes | str | os.PathLike, out: str | os.PathLike, name: str = "", *, encoder: str = "",
    tables: str = "", modes: Iterable[Mapping[str, float]] = (), overwrite: bool = False,
) -> str:  # fmt: skip
    """Writes the ONNX model (bytes, or a file with its external data beside it) as the bundle `out`; its digest.

    `encoder` and `tables` are the digests of the device's part and of the codec's tables that the tail was trained
    with, "" where its `name` says enough; `modes` are its operating points: {id, bits, bytes, device_ms, accuracy}.
    They go to the section "modes" as JSON. Raises ConvertError, StorageError and UsageError; `out` then is as it was.
    """
    with create(out, overwrite=overwrite) as writer:
        with writer.scratch() as folder:
            model = _read(onnx_model, folder)
            file = "tail" if isinstance(onnx_model, bytes) else Path(os.fspath(onnx_model)).stem
            about = {
                "name": name or file,
                "encoder": encoder,
                "tables": tables,
                "modes": [dict(mode) for mode in modes],
            }
            with writer.section("weights", _WEIGHTS, required=True) as section:
                for value in model.graph.initializers.values():
                    _move(value, section)
        graph = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        _try(graph, {_WEIGHTS: Place(str(writer.path), section.offset, section.tell())})
        writer.add("graph", "tail", graph, required=True)
        writer.graph(Graph("tail", "tail", "cpu", 0, 0, 0, "tail"))
        writer.add("modes", "", json.dumps(about, sort_keys=True).encode())
        writer.commit()
    with Bundle.open(out) as bundle:
        return bundle.digest


def _read(source: bytes | str | os.PathLike, folder: Path) -> ir.Model:
    """The model with its weights where they are. onnx-ir keeps external data inside the file's own folder."""
    path = Path(os.path.abspath(source)) if not isinstance(source, bytes) else folder / "model.onnx"
    try:
        if isinstance(source, bytes):
            path.write_bytes(source)
        model = ir.load(path)
    except Exception as error:  # protobuf's and onnx-ir's own, of many kinds
        raise _refuse(f"It cannot be read: {_short(error)}", "Give an ONNX model.") from None
    for value in model.graph.inputs:
        if value.shape is None or not len(value.shape) or isinstance(value.shape[0], int):
            why = f"The first axis of its input {value.name!r} is not an open batch."
            raise _refuse(why, "Export it with a dynamic first axis in every input and output.")
    return model


def _move(value: ir.Value, section: SectionWriter) -> None:
    """Moves an initializer's bytes to the section, but for small ones, which only come into the graph."""
    tensor = value.const_value
    if tensor is None:
        raise _refuse(f"Its initializer {value.name!r} has no value.", "Export it again.")
    try:
        data = tensor.tobytes()
    except Exception as error:
        raise _refuse(f"Its initializer {value.name!r} cannot be read: {_short(error)}", "Export it again.") from None
    if len(data) <= INLINE or tensor.dtype == ir.DataType.STRING:
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        return
    section.write(bytes(-section.tell() % _ALIGNMENT))
    value.const_value = ir.ExternalTensor(
        _WEIGHTS,
        section.tell(),
        len(data),
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=str(value.name),
        base_dir="",
    )
    section.write(data)


def _try(graph: bytes, places: Mapping[str, Place]) -> None:
    """Raises ConvertError unless each of several rows gives what it gives alone."""
    try:
        with open_graph(graph, places) as session:
            feeds = trial(session, _ROWS)
            together = session.run(feeds)
            for row in range(_ROWS):
                alone = session.run({name: array[row : row + 1] for name, array in feeds.items()})
                for name, array in together.items():
                    _same(name, alone[name], array[row : row + 1] if array.ndim else array)
    except (BackendError, BundleError) as error:
        raise _refuse(error.why, "Export it for ONNX Runtime, opset 21 or older.") from None


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
    raise _refuse(why, "Remove what crosses the batch, such as a norm in training mode.")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _refuse(why: str, fix: str) -> ConvertError:
    return ConvertError("The tail cannot be packed.", why, fix)
