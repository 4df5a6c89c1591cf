"""The weights on their way from a checkpoint into a bundle's section: each is read, rounded and written once.

Graphs ask for tensors in the order in which they use them; the store reads that tensor in slices of rows, rounds it as
the recipe says, appends it to the section and remembers where it lies. So converting peaks at a slice, not at a model,
and a second graph over the same weights costs nothing. It knows nothing about operators or files' headers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from shoal.runtime.errors import ConvertError
from shoal.runtime.events import Event, Progress, silent

from .quantize import gptq, rtn
from .recipe import Format, Recipe

ALIGNMENT = 64
SLICE_BYTES = 16 << 20  # of fp32, read and rounded at once


class Sink(Protocol):
    """Where bytes go: a section of a bundle in the making, or a scratch file."""

    def write(self, data) -> object: ...
    def tell(self) -> int: ...


@dataclass(frozen=True)
class Stored:
    """A tensor in the section: `offset` and `length` in bytes from the section's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def reshaped(self, name: str, shape: tuple[int, ...]) -> "Stored":
        """The same bytes under another name and shape."""
        return dataclasses.replace(self, name=name, shape=shape)

    def rows(self, start: int, stop: int) -> "Stored":
        """Rows [start:stop]."""
        row = self.length // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return Stored(
            f"{self.name}[{start}:{stop}]", self.dtype, shape, self.offset + start * row, (stop - start) * row
        )

    def flat(self) -> "Stored":
        return self.reshaped(f"{self.name}.flat", (math.prod(self.shape),))


@dataclass(frozen=True)
class Matrix:
    """A matrix [outputs, inputs]: `values` are fp32 [outputs, inputs] or codes uint8 [outputs, groups, bytes of a
    group], low nibble first; `scales` fp32 and `zeros` (packed like the codes) are [outputs, ..]:
    w = scale * (code - zero)."""

    format: Format
    outputs: int
    inputs: int
    values: Stored
    scales: Stored = None  # type: ignore[assignment]
    zeros: Stored | None = None

    def split(self, most: int) -> "list[Matrix]":
        """The matrix in pieces of whole rows whose values are at most `most` bytes each."""
        step = -(-self.outputs // -(-self.values.length // most))
        if step >= self.outputs:
            return [self]
        found = []
        for start in range(0, self.outputs, step):
            stop = min(start + step, self.outputs)
            parts = [part.rows(start, stop) for part in self.parts()]
            found.append(Matrix(self.format, stop - start, self.inputs, *parts))
        return found

    def parts(self) -> tuple[Stored, ...]:
        return tuple(part for part in (self.values, self.scales, self.zeros) if part is not None)


@dataclass(frozen=True)
class Factors:
    """What channels are multiplied by on the way, by tensor name: `rows` [outputs] of a matrix or entries of a norm,
    `columns` [inputs] of a matrix."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)


class Weights:
    """The store. `source` has tensors() and read(name, start, stop); `factors` apply before anything is rounded;
    `hessians` maps a matrix's names to the inputs' second moments [inputs, inputs], which the recipe's method uses
    where it finds them."""

    def __init__(
        self, source, recipe: Recipe, sink: Sink, progress: Progress = silent, factors: Factors | None = None
    ):  # fmt: skip
        self.source, self.recipe, self.sink, self.progress = source, recipe, sink, progress
        self.factors = factors or Factors()
        self.hessians: dict[tuple[str, ...], np.ndarray] = {}
        self.shapes = {name: info.shape for name, info in source.tensors().items()}
        self.matrices: dict[tuple[str, ...], Matrix] = {}
        self._plain: dict[tuple[str, ...], Stored] = {}
        self._total = sum(math.prod(shape) for shape in self.shapes.values()) * 4
        self._done = 0

    @property
    def exact(self) -> bool:
        """Whether every matrix stored so far is in fp32."""
        return all(matrix.format.bits == 32 for matrix in self.matrices.values())

    def plain(self, name: str, transform: Callable | None = None) -> Stored:
        """The tensor `name` in fp32; the transform is part of the model, so one name has one."""

        def make() -> np.ndarray:
            vector = transform(self._read(name)) if transform else self._read(name)
            return vector * self.factors.rows[name] if name in self.factors.rows else vector

        return self._keep((name,), make)

    def stacked(self, names: tuple[str, ...]) -> Stored:
        """Vectors in fp32, one behind the other."""
        return self._keep(names, lambda: np.concatenate([self._read(name) for name in names]))

    def matrix(self, names: tuple[str, ...], role: str = "linear") -> Matrix:
        """The matrices `names` [outputs, inputs] stacked by rows, in the recipe's format for the first name."""
        if names not in self.matrices:
            self.matrices[names] = self._store(names, self.recipe.format(names[0], role))
        return self.matrices[names]

    def _store(self, names: tuple[str, ...], format: Format) -> Matrix:
        inputs = self.shapes[names[0]][1]
        outputs = sum(self.shapes[name][0] for name in names)
        label = "+".join((names[0], *(name.rsplit(".", 2)[-2] for name in names[1:])))
        start = self._align()
        if format.bits == 32:
            for rows in self._slices(names):
                self.sink.write(np.ascontiguousarray(rows, np.float32))
            return Matrix(
                format, outputs, inputs, Stored(label, "float32", (outputs, inputs), start, self.sink.tell() - start)
            )
        scales, zeros = [], []
        hessian = self.hessians.get(names)
        rounding = gptq.Rounding(hessian, format) if hessian is not None else None
        for rows in self._slices(names):
            codes = rounding.quantize(rows) if rounding else rtn.quantize(rows, format)
            self.sink.write(rtn.pack(codes.values, format.bits))
            scales.append(codes.scales)
            zeros.append(codes.zeros)
        groups = -(-inputs // format.group)
        blob = format.group * format.bits // 8
        values = Stored(f"{label}.codes", "uint8", (outputs, groups, blob), start, self.sink.tell() - start)
        stored_scales = self._write(f"{label}.scales", np.concatenate(scales))
        stored_zeros = (
            None if format.symmetric else self._write(f"{label}.zeros", rtn.pack(np.concatenate(zeros), format.bits))
        )
        return Matrix(format, outputs, inputs, values, stored_scales, stored_zeros)

    def _slices(self, names: tuple[str, ...]) -> Iterator[np.ndarray]:
        for name in names:
            rows, columns = self.shapes[name]
            step = max(1, SLICE_BYTES // (4 * columns))
            for start in range(0, rows, step):
                part = self._read(name, start, min(start + step, rows))
                if name in self.factors.columns:
                    part = part * self.factors.columns[name]
                if name in self.factors.rows:
                    part = part * self.factors.rows[name][start : start + step, None]
                yield part
                del part

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = self.source.read(name, start, stop)
        if not np.isfinite(rows).all():
            raise ConvertError(
                f"The tensor {name} cannot be converted.", "It has values that are not finite numbers.",
                "Download the checkpoint again; if it was published so, take one in BF16 or F32.",
            )  # fmt: skip
        self._done += rows.nbytes
        self.progress(Event("convert", self._done, max(self._total, self._done), name, "B"))
        return rows

    def _keep(self, names: tuple[str, ...], make: Callable[[], np.ndarray]) -> Stored:
        if names not in self._plain:
            label = names[0] if len(names) == 1 else f"{names[0]}.stacked"
            self._plain[names] = self._write(label, np.ascontiguousarray(make(), np.float32))
        return self._plain[names]

    def _write(self, name: str, array: np.ndarray) -> Stored:
        start = self._align()
        self.sink.write(np.ascontiguousarray(array))
        return Stored(name, array.dtype.name, array.shape, start, array.nbytes)

    def _align(self) -> int:
        self.sink.write(bytes(-self.sink.tell() % ALIGNMENT))
        return self.sink.tell()
