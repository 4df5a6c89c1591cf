"""A split network becomes bundles: from ONNX files to what an edge serves and what a device has.

A tail takes and gives tensors whose first axis is the batch, and treats every row by itself, because an edge runs the
rows of several devices at once. A graph is held to that by running it, and one whose rows meet is refused. Weights go
to the bundle's section of that name, where they stay mapped, and graphs share those that are equal: initializers, and
the tensors of Constant nodes, as which some exporters write all of them. The graph of a branch or a loop keeps its own:
only an initializer of the whole graph may lie elsewhere. A head may have several encoders, which its input `encoder`
chooses by number; each that a mode names is run as well, and codecs are held to the latent that comes out. It knows
nothing about training.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from shoal.runtime.bundle import Bundle, Graph, create
from shoal.runtime.bundle.write import SectionWriter
from shoal.runtime.errors import BackendError, BundleError, ConvertError, UsageError
from shoal.runtime.session import Place, Session, Value, open_graph
from shoal.runtime.split.modes import ENCODER, SCORE, ModeTable, dump, parse, scored
from shoal.runtime.split.tables import Tables

INLINE = 1024  # bytes of the largest tensor that stays in the graph
ROLES = ("head", "tail", "local")
_WEIGHTS, _ALIGNMENT = "weights", 64
_WIDEST = 16  # bytes of an element of the widest type
_ROWS = 3  # of the trial: more than two, so that an exchange shows
_OPEN = 16  # length of an open axis that is not the batch, in the trial
_ENCODERS = "Have each mode name an encoder where the head has several, and none where it has not."
_TOLERANCE = 1e-3  # relative: a product of one row and one of three rows round differently


def pack_tail(
    onnx_model: bytes | str | os.PathLike, out: str | os.PathLike, name: str = "", *, encoder: str = "",
    tables: str = "", modes: Iterable[Mapping[str, float | str]] = (), codecs: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> str:  # fmt: skip
    """Writes what an edge serves, a bundle of one tail: `pack` for that role alone."""
    return pack({"tail": onnx_model}, out, name, encoder=encoder, tables=tables, modes=modes, codecs=codecs,
                overwrite=overwrite)  # fmt: skip


def pack(
    graphs: Mapping[str, bytes | str | os.PathLike], out: str | os.PathLike, name: str = "", *, encoder: str = "",
    tables: str = "", modes: Iterable[Mapping[str, float | str]] = (), codecs: Mapping[str, bytes] | None = None,
    local: Mapping[str, float] | None = None, threshold: float | None = None, overwrite: bool = False,
) -> str:  # fmt: skip
    """Writes ONNX models (bytes, or files with their external data beside them), by role, as `out`; its digest.

    A "head" makes the inputs of a "tail", "local" is a network by itself: a device has a head, and a tail or a local
    one if it is to answer without an edge. A head with several encoders has a further input `encoder`, int64 [].
    `encoder` and `tables` are the digests of the device's part and of the codec's tables that the tail was trained
    with, "" where `name` (by default the first file's) says enough; of several codecs `tables` is by default the digest
    of all. `modes` are the operating points: {id, encoder, codec, bits, bytes, device_ms, accuracy, tail_ms}, the same
    in a device's bundle and in its edge's; `codecs` are the tables that they name (Tables.to_bytes()), `local` is
    {device_ms, accuracy} of the answer that a device computes alone. A head with a filter has a second output `score`,
    fp32 [n], and a `threshold` below which nothing is sent. They go to the sections "modes", as JSON, and "codec".
    Raises ConvertError, StorageError and UsageError; `out` then is as it was.
    """
    if not graphs or not set(graphs) <= set(ROLES):
        why = f"The graphs' roles are {', '.join(graphs) or 'none'}."
        raise UsageError("The bundle cannot be packed.", why, f"Give graphs of roles out of {', '.join(ROLES)}.")
    role, first = next(iter(graphs.items()))
    carried = _codecs(codecs or {})
    about: dict[str, object] = {
        "name": name or (role if isinstance(first, bytes) else Path(os.fspath(first)).stem),
        "encoder": encoder,
        "tables": tables or _digest(carried),
        "modes": [dict(mode) for mode in modes],
    }
    if local:
        about["local"] = dict(local)
    if threshold is not None:
        about["threshold"] = threshold
    try:
        said = dump(about)
    except BundleError as error:
        raise UsageError("The modes cannot be packed.", error.why, "Correct them.") from None
    table = parse(said)
    for mode in table.modes:
        if mode.codec and (mode.codec not in carried or mode.bits not in (0, carried[mode.codec].bits)):
            why = f"Mode {mode.id} has {mode.bits} bits and names the codec {mode.codec!r}."
            raise UsageError("The modes cannot be packed.", why, "Give the codec, with tables of so many bits.")
    with create(out, overwrite=overwrite) as writer:
        made: dict[str, bytes] = {}
        with writer.scratch() as folder, writer.section("weights", _WEIGHTS, required=True) as section:
            written: dict[bytes, int] = {}
            for role, source in graphs.items():
                model = _read(role, source, folder)
                for value in model.graph.initializers.values():
                    _move(role, value, section, written)
                made[role] = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        _try(made, {_WEIGHTS: Place(str(writer.path), section.offset, section.tell())}, table, carried)
        for role, graph in made.items():
            writer.add("graph", role, graph, required=True)
            writer.graph(Graph(role, role, "cpu", 0, 0, 0, role))
        writer.add("modes", "", said)
        for key, one in carried.items():
            writer.add("codec", key, one.to_bytes())
        writer.commit()
    with Bundle.open(out) as bundle:
        return bundle.digest


def _codecs(codecs: Mapping[str, bytes]) -> dict[str, Tables]:
    """The tables, read as a device will; in the order of their ids, so that a bundle's bytes do not hang on another."""
    found = {}
    for key in sorted(codecs):
        try:
            found[key] = Tables.from_bytes(codecs[key])
        except BundleError as error:
            raise UsageError(f"The codec {key!r} cannot be packed.", error.why, "Give Tables.to_bytes().") from None
    return found


def _digest(codecs: Mapping[str, Tables]) -> str:
    """SHA-256 over every codec's id and tables, "" where there is none: what both sides of a link must have alike."""
    if not codecs:
        return ""
    found = hashlib.sha256()
    for key, tables in codecs.items():
        found.update(hashlib.sha256(key.encode()).digest() + tables.digest)
    return found.hexdigest()


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


def _try(
    graphs: Mapping[str, bytes], places: Mapping[str, Place], table: ModeTable, codecs: Mapping[str, Tables]
) -> None:
    """Raises ConvertError unless every graph opens, the tail treats its rows one by one, it takes what the head gives,
    and the head's encoders and the codecs are what the modes say."""
    ports: dict[str, tuple[dict[str, np.dtype], dict[str, np.dtype]]] = {}
    for role, graph in graphs.items():
        try:
            with open_graph(graph, places) as session:
                inputs, outputs = session.inputs.values(), session.outputs.values()
                ports[role] = {v.name: v.dtype for v in inputs}, {v.name: v.dtype for v in outputs}
                if role == "tail":
                    _try_rows(session)
                    _try_codecs(role, session.inputs, codecs)
                if role == "head":
                    _try_encoders(session, table)
                    ports[role][1].pop(SCORE, None)
                    _try_codecs(role, scored(session.outputs, table), codecs)
        except (BackendError, BundleError) as error:
            raise _refuse(role, error.why, "Export it for ONNX Runtime, opset 21 or older.") from None
    if {"head", "tail"} <= graphs.keys() and ports["head"][1] != ports["tail"][0]:
        gives, takes = (", ".join(f"{name} {dtype}" for name, dtype in found.items())
                        for found in (ports["head"][1], ports["tail"][0]))  # fmt: skip
        raise _refuse("tail", f"It takes {takes}; the head gives {gives}.", "Cut both at the same values.")


def _try_codecs(role: str, latents: Mapping[str, Value], codecs: Mapping[str, Tables]) -> None:
    """Raises ConvertError unless there is one latent, of as many channels as each codec."""
    for key, tables in codecs.items():
        dims = [value.dims for value in latents.values()]
        if len(dims) != 1 or len(dims[0]) < 2 or dims[0][1] != tables.channels:
            why = f"The codec {key!r} is for one latent of {tables.channels} channels, not for {dims}."
            raise _refuse(role, why, "Fit the tables to this head's latents.")


def _try_encoders(session: Session, table: ModeTable) -> None:
    """Raises ConvertError unless each encoder that a mode names runs, and gives a latent of the same shape."""
    value, named = session.inputs.get(ENCODER), sorted({mode.encoder for mode in table.modes})
    if value is None:
        if any(named):
            raise _refuse("head", f"Its modes name the encoder {named[-1]}; it has no input 'encoder'.", _ENCODERS)
        return
    if value.dtype != np.int64 or value.dims:
        raise _refuse("head", f"Its input 'encoder' is {value.dtype} {list(value.dims)}.", "Make it an int64 scalar.")
    if not all(named):
        raise _refuse("head", "It has an input 'encoder'; a mode names none.", _ENCODERS)
    feeds, shapes = trial(session, 1), None
    for number in named:
        outputs = session.run(feeds | {ENCODER: np.array(number)})
        found = {name: array.shape for name, array in outputs.items()}
        shapes = shapes or found
        if found != shapes:
            raise _refuse("head", f"Its encoder {number} gives {found}, another {shapes}.", "Give them one shape.")


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
        shape = (rows, *(dim if isinstance(dim, int) else _OPEN for dim in value.dims[1:])) if value.dims else ()
        if value.dtype.kind == "f":
            array: np.ndarray = rng.standard_normal(shape, np.float32)
        else:
            array = rng.integers(0, 256 if value.dtype.itemsize == 1 and value.dtype.kind != "b" else 2, shape)
        feeds[name] = np.asarray(array).astype(value.dtype)
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
