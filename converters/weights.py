"""The weights on their way from a checkpoint into a bundle's section: each is read, rounded and written once.

Graphs ask for tensors in the order in which they use them; the store reads that tensor in slices of rows, rounds it as
the recipe says, appends it to the section and remembers where it lies. So converting peaks at a slice, not at a model,
and a second graph over the same weights costs nothing. It knows nothing about operators or files' headers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from shoal.runtime.errors import ConvertError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.kernels.layout import PANEL, Codes, LinearFormat, pack

from .bitstack.stacks import Stacks, gated_order
from .quantize import gptq, rtn
from .recipe import Format, Recipe

ALIGNMENT = 64
SLICE_BYTES = 16 << 20  # of fp32, read and rounded at once


class Records(Protocol):
    """Experts that lie elsewhere; see experts/records.py."""

    @property
    def handle(self) -> int: ...
    def add(self, block: int, inputs: np.ndarray, gates: np.ndarray) -> None: ...


class Sink(Protocol):
    """Where bytes go: a section of a bundle in the making, or a scratch file."""

    def write(self, data) -> object: ...
    def tell(self) -> int: ...


@dataclass(frozen=True)
class Stored:
    """A tensor in the section of that name: `offset` and `length` in bytes from the section's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    section: str = "weights"


@dataclass(frozen=True)
class Matrix:
    """A matrix [outputs, inputs]: `values` are fp32 [outputs, inputs], or bytes as `layout` has them, or None where it
    is in the stack, as matrix `stacked` of it with blocks of `rank`. Of one that is `gated` the panels are a gate's and
    its up's in turn."""

    format: Format
    outputs: int
    inputs: int
    values: Stored | None
    layout: LinearFormat | None = None
    gated: bool = False
    stacked: int | None = None
    rank: int = 1


@dataclass(frozen=True)
class Factors:
    """What channels are multiplied by on the way, by tensor name: `rows` [outputs] of a matrix, a norm or a bias,
    `columns` [inputs] of a matrix."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)


class Weights:
    """The store. `source` has tensors() and read(name, start, stop); `factors` apply before anything is rounded;
    `hessians` maps a matrix's names to the inputs' second moments [inputs, inputs], which the recipe's method uses
    where it finds them. What the recipe stacks goes to `stacks`, with the same for each of its `levels`. Experts that
    it rounds are not here but in `records`, which are made before or block by block."""

    def __init__(
        self, source, recipe: Recipe, sink: Sink, progress: Progress = silent, factors: Factors | None = None,
        stacks: Stacks | None = None,
    ):  # fmt: skip
        self.source, self.recipe, self.sink, self.progress = source, recipe, sink, progress
        self.factors, self.stacks = factors or Factors(), stacks
        self.records: Records | None = None
        self.hessians: dict[tuple[str, ...], np.ndarray] = {}
        self.levels: list[dict[tuple[str, ...], np.ndarray]] = []
        self.shapes = {name: info.shape for name, info in source.tensors().items()}
        self.matrices: dict[tuple[str, ...], Matrix] = {}
        self._plain: dict[tuple[str, ...], Stored] = {}
        self._total = sum(math.prod(shape) for shape in self.shapes.values()) * 4
        self._done = 0

    @property
    def handle(self) -> int | None:
        """What a graph's input `stack` is given; None where nothing is stacked."""
        return self.stacks.handle if self.stacks is not None and self.stacks.matrices else None

    @property
    def handles(self) -> dict[str, int]:
        """What graphs over these weights are given beside what every graph is, by the input's name."""
        found = {} if self.handle is None else {"stack": self.handle}
        return found if self.records is None else found | {"experts": self.records.handle}

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        """The same as arrays."""
        return {name: np.array([handle], np.int64) for name, handle in self.handles.items()}

    @property
    def exact(self) -> bool:
        """Whether every matrix stored so far is in fp32."""
        return all(matrix.format.bits == 32 for matrix in self.matrices.values())

    def elsewhere(self, names: Iterable[str]) -> None:
        """Says that these tensors are read by somebody else, so that `progress` does not wait for them."""
        self._total -= sum(math.prod(self.shapes[name]) for name in names) * 4

    def plain(self, name: str, transform: Callable | None = None) -> Stored:
        """The tensor `name` in fp32; the transform is part of the model, so one name has one."""

        def make() -> np.ndarray:
            vector = transform(self.read(name)) if transform else self.read(name)
            return vector * self.factors.rows[name] if name in self.factors.rows else vector

        return self._keep((name,), make)

    def stacked(self, names: tuple[str, ...]) -> Stored:
        """Vectors in fp32, one behind the other."""
        rows = self.factors.rows
        return self._keep(names, lambda: np.concatenate([self.read(name) * rows.get(name, 1) for name in names]))

    def matrix(self, names: tuple[str, ...], role: str = "linear", gated: bool = False) -> Matrix:
        """The matrices `names` [outputs, inputs] stacked by rows, in the recipe's format for the first name. With
        `gated` they are a gate and its up, whose panels alternate where the format has panels and these are whole."""
        if names not in self.matrices:
            self.matrices[names] = self._store(names, role, gated)
        return self.matrices[names]

    def _store(self, names: tuple[str, ...], role: str, gated: bool) -> Matrix:
        format = self.recipe.format(names[0], role)
        inputs = self.shapes[names[0]][1]
        outputs = sum(self.shapes[name][0] for name in names)
        label = "+".join((names[0], *(name.rsplit(".", 2)[-2] for name in names[1:])))
        gated = gated and not self.shapes[names[0]][0] % PANEL
        if self.stacks is not None and self.recipe.stacks(names[0], role):
            return self._stack(self.stacks, names, format, label, gated)
        start = self._align()
        if format.bits == 32:
            for rows in self.slices(names):
                self.sink.write(np.ascontiguousarray(rows, np.float32))
            return Matrix(
                format, outputs, inputs, Stored(label, "float32", (outputs, inputs), start, self.sink.tell() - start)
            )
        layout = format.layout(inputs, outputs)
        for codes in self.rounded(names, format, gated):
            self.sink.write(pack(layout, codes))
        return Matrix(
            format, outputs, inputs, Stored(label, "uint8", (layout.bytes,), start, layout.bytes), layout, gated
        )

    def rounded(self, names: tuple[str, ...], format: Format, gated: bool = False) -> Iterator[Codes]:
        """The matrices `names` in slices of whole panels, of which only the last may be ragged; of a pair that is
        `gated`, whose panels are whole, panels alternate."""
        hessian = self.hessians.get(names)
        rounding = gptq.Rounding(hessian, format) if hessian is not None else None

        def one(names: tuple[str, ...]) -> Iterator[Codes]:
            for rows in self.slices(names):
                yield rounding.quantize(rows) if rounding else rtn.quantize(rows, format)

        return _whole_panels(map(_alternating, one(names[:1]), one(names[1:])) if gated else one(names))

    def _stack(self, stacks: Stacks, names: tuple[str, ...], format: Format, label: str, gated: bool) -> Matrix:
        def rows() -> np.ndarray:
            whole = np.concatenate(list(self.slices(names)))
            return whole[gated_order(len(whole) // 2)] if gated else whole

        at = stacks.add(label, rows, [level.pop(names) for level in self.levels if names in level])
        one = stacks.matrices[at]
        return Matrix(format, one.outputs, one.inputs, None, gated=gated, stacked=at, rank=stacks.rank(at))

    def slices(self, names: tuple[str, ...]) -> Iterator[np.ndarray]:
        """The rows of matrices, fp32 with their factors, a part at a time."""
        for name in names:
            rows, columns = self.shapes[name]
            step = max(PANEL, SLICE_BYTES // (4 * columns) // PANEL * PANEL)
            for start in range(0, rows, step):
                part = self.read(name, start, min(start + step, rows))
                if name in self.factors.columns:
                    part = part * self.factors.columns[name]
                if name in self.factors.rows:
                    part = part * self.factors.rows[name][start : start + step, None]
                yield part
                del part

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a tensor in fp32 as the source has them. Raises ConvertError for what is no number."""
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


def _alternating(gate: Codes, up: Codes) -> Codes:
    """The panels of two matrices in turn."""

    def merge(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([part.reshape(-1, PANEL, part.shape[1]) for part in (a, b)], 1).reshape(-1, a.shape[1])

    return Codes(*map(merge, gate, up))


def _whole_panels(parts: Iterable[Codes]) -> Iterator[Codes]:
    """The same rows in slices of whole panels; only the last may be ragged."""
    held: Codes | None = None
    for codes in parts:
        if held is not None:
            codes = Codes(*map(np.concatenate, zip(held, codes, strict=True)))
        whole = len(codes.values) // PANEL * PANEL
        if whole:
            yield Codes(*(part[:whole] for part in codes))
        held = Codes(*(part[whole:] for part in codes)) if whole < len(codes.values) else None
    if held is not None:
        yield held
