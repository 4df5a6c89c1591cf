"""Between a device's head and an edge's tail: what a link is, the edge behind it, and the link of one process.

A message is Codec.encode's, and beside it goes the number of its mode. A link answers within the time it was given or
raises: LinkError where the other side is gone or makes no sense, BusyError where it has no time. What an edge is sent
is hostile: a mode that it does not have and a message that its codec would not make are refused before anything is
computed. How bytes travel is another module's (shaped.py simulates it, a paired link does it).
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..bundle import Bundle
from ..errors import BundleError, BusyError, LinkError, UsageError
from ..session import Place, Session, Value, open_graph
from . import modes
from .codec import Codec

MAX_IMAGES = 64  # of one message, unless an edge says otherwise


@dataclass(frozen=True)
class Reply:
    """What the tail gives, and seconds that it took there, decoding included. The rest of the wait was the link's."""

    outputs: dict[str, np.ndarray]
    tail_seconds: float


class Link(Protocol):
    """The way to an edge. Several threads may ask at once. One over which not every mode may be sent may have `modes`,
    a collection of those that may: a client then chooses among these."""

    def ask(self, mode: int, message: bytes, timeout: float) -> Reply:
        """The answer to `message` of that mode. Raises LinkError (gone) or BusyError (late, or no room), at the latest
        after `timeout` seconds."""
        ...


class Edge:
    """A tail bundle, open: the modes of its table whose codecs it has. Several threads may answer at once."""

    def __init__(self, bundle: str | os.PathLike, *, threads: int = 0, most: int = MAX_IMAGES):
        """Takes at most `most` images in a message. Raises BundleError, StorageError, BackendError."""
        with Bundle.open(bundle) as opened:
            self.table = modes.read(opened)
            self.session = open_role(opened, "tail", threads)
            try:
                self._codecs = coders(opened, self.session.inputs, "tail")
            except BaseException:
                self.session.close()
                raise
        self._input, self._most = next(iter(self.session.inputs)), most

    def answer(self, mode: int, message: bytes) -> Reply:
        """Decodes and runs the tail. Raises LinkError for what no device of this model sends, BackendError."""
        began = time.perf_counter()
        codec = coder(self._codecs, mode)
        outputs = self.session.run({self._input: codec.decode(message, most=self._most)})
        return Reply(outputs, time.perf_counter() - began)

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> "Edge":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Direct:
    """The link of one process: the edge is called. It cannot be interrupted, so it is late rather than cut short."""

    def __init__(self, edge: Edge):
        self.edge = edge

    def ask(self, mode: int, message: bytes, timeout: float) -> Reply:
        if timeout <= 0:
            raise late(timeout)
        return self.edge.answer(mode, message)


def late(timeout: float) -> BusyError:
    """Nothing came in time."""
    why = f"Nothing came within {max(0.0, timeout) * 1000:.0f} ms."
    return BusyError("The edge did not answer in time.", why, "Wait longer, or answer locally.")


def coders(bundle: Bundle, values: Mapping[str, Value], role: str) -> dict[int, Codec]:
    """For each mode of an open bundle that names a codec, that codec for the one latent among a graph's inputs or
    outputs; none where the bundle has no modes. Raises BundleError."""
    if bundle.find("modes") is None:
        return {}
    table = modes.read(bundle)
    if not (tables := modes.codecs(bundle, table)):
        return {}
    shape = latent_shape(values, role)
    try:
        made = {key: Codec(one, shape) for key, one in tables.items()}
    except UsageError as error:
        raise BundleError("The bundle's codec cannot be used.", error.why, "Pack the network again.") from None
    return {mode.id: made[mode.codec] for mode in table.modes if mode.codec}


def coder(codecs: Mapping[int, Codec], mode: int) -> Codec:
    """The codec of a message's mode. Raises LinkError where there is none: a peer may say any number."""
    if (codec := codecs.get(mode)) is None:
        why = f"It is of mode {mode!r:.20}; there are {', '.join(map(str, codecs)) or 'none'}."
        raise LinkError("A peer's latent cannot be decoded.", why, "Give both sides the same version of the model.")
    return codec


def open_role(bundle: Bundle, role: str, threads: int = 0) -> Session:
    """The graph of that role, its weights mapped from the bundle, which may be closed afterwards. Raises BundleError
    where there is none, BackendError."""
    graph = next((graph for graph in bundle.graphs if graph.role == role), None)
    if graph is None:
        why = f"It has no graph of the role {role!r}."
        raise BundleError(f"The bundle {bundle.path} cannot be used for this.", why, "Pack it with one.")
    weights = [section for section in bundle.sections if section.kind == "weights"]
    places = {s.name: Place(str(bundle.path), s.offset, s.length, bundle.fileno()) for s in weights}
    return open_graph(bundle.bytes(bundle.section("graph", graph.section)), places, threads=threads)


def latent_shape(values: Mapping[str, Value], role: str) -> tuple[int, ...]:
    """(channels, ...) of the one latent among a graph's inputs or outputs. Raises BundleError where there is none."""
    found = list(values.values())
    if len(found) == 1 and found[0].dtype == np.float32 and len(found[0].dims) > 1:
        inner = found[0].dims[1:]
        lengths = tuple(dim for dim in inner if isinstance(dim, int) and dim > 0)
        if len(lengths) == len(inner):
            return lengths
    what = ", ".join(f"{value.name} {value.dtype} {list(value.dims)}" for value in found)
    why = f"Its {role} has {what or 'nothing'}; a codec needs one float32 latent whose lengths are all known."
    raise BundleError("The split network cannot be used.", why, "Export it for images of one size.")
