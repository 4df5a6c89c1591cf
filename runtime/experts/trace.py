"""The routing of a mixture of experts as it was recorded, and its file.

Each token has for each layer the experts that it went to, and where they were recorded the router's scores and the
normed input of the layer's experts. The file is a header and plain arrays, little-endian, in this order:

  magic   8 bytes, length of the description uint32, the description in JSON, zeros up to a multiple of 8
  starts  int64 [sequences], ids int16 [tokens, layers, top_k], and where there are any scores fp16
          [tokens, layers, experts] and inputs fp16 [tokens, layers, hidden]

Whatever wrote it, a file is read as hostile bytes: sizes are compared with the file's before anything is allocated, and
no value is used before it is in range. It knows nothing about models or caches.
"""

import json
import math
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import StorageError, UsageError
from .layout import MAX_EXPERTS, MAX_LAYERS

MAGIC = b"SHOALTR1"
_HEADER = 64 << 10  # bytes of the description at most
_MOST = {"tokens": 1 << 31, "layers": MAX_LAYERS, "experts": MAX_EXPERTS, "top_k": MAX_EXPERTS, "sequences": 1 << 24,
         "hidden": 1 << 20, "record": 1 << 40}  # fmt: skip
_LARGEST = 65504.0  # of fp16
_STEP = 1 << 20  # values checked at a time


@dataclass(frozen=True, eq=False)
class Trace:
    """`ids` int16 [tokens, layers, top_k], the heaviest expert first, -1 for one that is no record in a file (a special
    expert, or none); `starts` int64 [sequences], the first token of each; `scores` fp16 [tokens, layers, experts];
    `inputs` fp16 [tokens, layers, hidden]. Of the model that was recorded: its name, `record` bytes of an expert and
    `seconds` that a token takes with every expert resident (0: not known). Raises UsageError."""

    model: str
    experts: int
    ids: np.ndarray
    starts: np.ndarray
    scores: np.ndarray | None = None
    inputs: np.ndarray | None = None
    record: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        _check(self)

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def layers(self) -> int:
        return self.ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.ids.shape[2]

    @property
    def sequences(self) -> list[slice]:
        """The tokens of each."""
        ends = [*self.starts[1:].tolist(), self.tokens]
        return [slice(start, end) for start, end in zip(self.starts.tolist(), ends, strict=True)]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file, whole or not at all. Raises StorageError."""
        description = json.dumps({
            "model": self.model, "experts": self.experts, "tokens": self.tokens, "layers": self.layers,
            "top_k": self.top_k, "sequences": len(self.starts), "scores": self.scores is not None,
            "hidden": 0 if self.inputs is None else self.inputs.shape[2], "record": self.record,
            "seconds": self.seconds,
        }).encode()  # fmt: skip
        target, scratch = Path(path), None
        try:
            descriptor, scratch = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
            with os.fdopen(descriptor, "wb") as file:
                begin = MAGIC + len(description).to_bytes(4, "little") + description
                file.write(begin + bytes(-len(begin) % 8))
                for array in (self.starts, self.ids, self.scores, self.inputs):
                    if array is not None:
                        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
                        file.write(little.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
            scratch = None
        except OSError as error:
            why = f"{error.strerror or error}."
            raise StorageError(f"{target} could not be written.", why, "Free space, or mend the folder.") from None
        finally:
            if scratch is not None:
                with suppress(OSError):
                    os.unlink(scratch)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Trace":
        """Reads a file that `save` wrote; its arrays stay mapped. Raises UsageError where it is anything else."""
        name = os.fspath(path)
        try:
            with open(name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                begin = file.read(len(MAGIC) + 4)
                length = int.from_bytes(begin[len(MAGIC) :], "little")
                if len(begin) != len(MAGIC) + 4 or not begin.startswith(MAGIC):
                    raise _refuse(f"{name} is no trace", "It does not begin as one")
                if length > min(_HEADER, size):
                    raise _refuse(f"{name} cannot be used", f"Its description would have {length} bytes")
                description = _description(name, file.read(length))
        except (OSError, ValueError) as error:
            raise _refuse(f"{name} cannot be read", f"{error}") from None
        count = [description[field] for field in ("sequences", "tokens", "layers", "top_k", "experts", "hidden")]
        sequences, tokens, layers, top_k, experts, hidden = count
        shapes = [("<i8", (sequences,)), ("<i2", (tokens, layers, top_k))]
        shapes += [("<f2", (tokens, layers, experts))] if description["scores"] else []
        shapes += [("<f2", (tokens, layers, hidden))] if hidden else []
        at = -(-(len(begin) + length) // 8) * 8
        expected = at + sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in shapes)
        if expected != size:
            raise _refuse(f"{name} is damaged", f"It has {size} bytes, not {expected}")
        arrays = []
        for kind, shape in shapes:
            arrays.append(np.memmap(name, kind, "r", at, shape))
            at += arrays[-1].nbytes
        starts, ids, *others = arrays
        scores = others.pop(0) if description["scores"] else None
        inputs = others.pop(0) if hidden else None
        model, record, seconds = description["model"], description["record"], description["seconds"]
        return cls(model, experts, ids, np.array(starts), scores, inputs, record, seconds)


class Recorder:
    """Gathers a trace in memory, step by step."""

    def __init__(self, model: str, experts: int, *, record: int = 0):
        self._model, self._experts, self._record = model, experts, record
        self._ids: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._inputs: list[np.ndarray] = []
        self._starts: list[int] = []
        self._tokens = 0

    def begin(self) -> None:
        """What is added from now on is another sequence."""
        if not self._starts or self._starts[-1] < self._tokens:
            self._starts.append(self._tokens)

    def add(self, ids: np.ndarray, scores: np.ndarray | None = None, inputs: np.ndarray | None = None) -> None:
        """Some tokens, in their order: ids int [tokens, layers, top_k], scores [tokens, layers, experts] and inputs
        [tokens, layers, hidden] as Trace has them, of every step or of none."""
        if not self._starts:
            self.begin()
        self._ids.append(np.asarray(ids, np.int16))
        self._tokens += len(ids)
        for to, given in ((self._scores, scores), (self._inputs, inputs)):
            if given is not None:
                to.append(np.clip(given, -_LARGEST, _LARGEST).astype(np.float16))

    def trace(self, seconds: float = 0.0) -> Trace:
        """What was added. Raises UsageError where that is nothing, or does not fit together."""
        starts = [start for start in self._starts if start < self._tokens]
        if not self._tokens:
            raise _refuse("There is no trace", "No token was recorded")
        try:
            scores, inputs = (np.concatenate(some) if some else None for some in (self._scores, self._inputs))
            ids = np.concatenate(self._ids)
        except ValueError as error:
            raise _refuse("The trace does not fit together", f"{error}") from None
        begin = np.array(starts, np.int64)
        return Trace(self._model, self._experts, ids, begin, scores, inputs, self._record, seconds)


def _description(name: str, data: bytes) -> dict:
    try:
        raw = json.loads(data)
        found = {field: raw[field] for field in (*_MOST, "model", "scores", "seconds")}
    except Exception as error:  # whatever a hostile JSON makes go wrong
        why = f"Its description is not what shoal writes ({type(error).__name__}: {error!s:.80})"
        raise _refuse(f"{name} cannot be used", why) from None
    for field, most in _MOST.items():
        least = 0 if field in ("hidden", "record") else 1
        if type(found[field]) is not int or not least <= found[field] <= most:
            raise _refuse(f"{name} cannot be used", f"It has {found[field]!r:.40} {field}")
    if type(found["model"]) is not str or len(found["model"]) > 1000 or type(found["scores"]) is not bool:
        raise _refuse(f"{name} cannot be used", "Its description has other types than shoal writes")
    if type(found["seconds"]) not in (int, float):
        raise _refuse(f"{name} cannot be used", f"A token takes {found['seconds']!r:.40} seconds")
    return found


def _check(trace: Trace) -> None:
    """Raises UsageError where a value could not have been recorded."""
    ids, starts = trace.ids, trace.starts
    if ids.ndim != 3 or ids.dtype != np.int16 or not ids.size or starts.ndim != 1 or starts.dtype != np.int64:
        raise _refuse("The trace cannot be used", f"Its ids are {ids.dtype} of shape {ids.shape}")
    if trace.layers > MAX_LAYERS or not 1 <= trace.experts <= MAX_EXPERTS or trace.top_k > trace.experts:
        why = f"It has {trace.top_k} of {trace.experts} experts in {trace.layers} layers"
        raise _refuse("The trace cannot be used", why)
    if not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= trace.tokens:
        raise _refuse("The trace cannot be used", "Its sequences do not follow each other")
    rows = ids.reshape(-1, trace.top_k)
    for at in range(0, len(rows), step := max(_STEP // trace.top_k, 1)):
        part = np.sort(rows[at : at + step], axis=1)
        if part.min() < -1 or part.max() >= trace.experts:
            raise _refuse("The trace cannot be used", f"It names an expert that is not among {trace.experts}")
        if ((part[:, 1:] == part[:, :-1]) & (part[:, 1:] >= 0)).any():
            raise _refuse("The trace cannot be used", "A token goes to the same expert twice")
    for name, array in (("scores", trace.scores), ("inputs", trace.inputs)):
        if array is None:
            continue
        if array.dtype != np.float16 or array.ndim != 3 or array.shape[:2] != ids.shape[:2] or not array.shape[2]:
            raise _refuse("The trace cannot be used", f"Its {name} are {array.dtype} of shape {array.shape}")
        flat = array.reshape(-1)
        if not all(np.isfinite(flat[at : at + _STEP]).all() for at in range(0, len(flat), _STEP)):
            raise _refuse("The trace cannot be used", f"Its {name} are not all finite")
    if trace.scores is not None and trace.scores.shape[2] != trace.experts:
        raise _refuse("The trace cannot be used", f"It has {trace.scores.shape[2]} scores for {trace.experts} experts")
    if not (math.isfinite(trace.seconds) and 0 <= trace.seconds < 1e6 and trace.record >= 0):
        raise _refuse("The trace cannot be used", f"A token takes {trace.seconds!r:.40} seconds")


def _refuse(what: str, why: str) -> UsageError:
    return UsageError(f"{what}.", f"{why}.", "Record it again with shoal experts trace.")
