"""The experts of an open model: slots in memory for some of them, and threads that read the others from flash in time.

The slots are one row of the budget, elastic: their number may change between two runs, at once, since an expert that
leaves is only forgotten. Reading, waiting, eviction and guesses are the kernels' (runtime/kernels/experts.h); here a
store is opened, checked, counted and closed. It knows nothing about graphs or budgets.
"""

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from .. import kernels
from ..bundle import Bundle
from ..errors import BackendError, BundleError, UsageError
from ..kernels.layout import LinearFormat
from .layout import ALIGNMENT, Index
from .policies import PARAMETERS, POLICIES

MAX_INDEX = 32 << 20  # bytes; 2 x 65,536 checksums are fewer
THREADS = 4  # reads under way at once

Between = Callable[[Callable[[], None]], object]


@dataclass(frozen=True)
class Options:
    """How a store works. `policy` is one of policies.POLICIES but belady, with `parameters` of its own; `threads` read
    at once, at most `rate` bytes a second together (0: as fast as it goes), with `direct` past the page cache where the
    file system can. `guess` reads ahead what the bundle's predictor says, or that of the .npy file `predictor` (fp32
    [layers - 1, experts, hidden], from train_predictor), up to `expand` experts more than a token uses (-1: as many).
    Of an expert that has to be read, and before which the chosen of a token already weigh more than `low`, the low
    precision is read, and above `skip` nothing; 1 is never. Guesses keep to that by rank. Both change results, nothing
    else does; `shoal experts thresholds` finds them for a budget."""

    policy: str = "hobbit"
    parameters: tuple[float, ...] = ()
    threads: int = THREADS
    rate: int = 0
    direct: bool = False
    guess: bool = True
    predictor: str = ""
    expand: int = 0
    low: float = 1.0
    skip: float = 1.0

    def __post_init__(self):
        if self.policy not in POLICIES or self.policy == "belady":
            names = ", ".join(name for name in POLICIES if name != "belady")
            raise UsageError(f"There is no policy {self.policy!r:.40}.", f"There are {names}.", "Name one of these.")
        if len(self.parameters) > PARAMETERS or not np.isfinite(self.parameters).all():
            why = f"There are at most {PARAMETERS}, all finite."
            raise UsageError("The policy's parameters cannot be used.", why, "Correct them.")
        for name, least, most in (("threads", 1, 32), ("rate", 0, 1 << 50), ("expand", -1, 1024), ("low", 0, 1),
                                  ("skip", 0, 1)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise UsageError(f"{name} is {value!r:.40}.", f"It must be from {least} to {most}.", "Correct it.")


@dataclass(frozen=True)
class Counters:
    """What a store did since it was opened. Passes are runs of a layer; of the experts that they asked for `hits` were
    there, `late` ones were guessed and on their way, `misses` were neither, `first_misses` of these never before.
    `guesses` are reads ahead: `useful` were used, late ones among them, `wasted` evicted unused. `waited_ns` is how
    long passes had nothing to compute, `read_ns` how long reads took, added up. `low` and `skipped` count uses of
    experts in low precision, and those that were left out."""

    hits: int
    misses: int
    first_misses: int
    read_records: int
    read_bytes: int
    guesses: int
    useful: int
    late: int
    wasted: int
    waited_ns: int
    read_ns: int
    low: int
    skipped: int
    passes: int

    def since(self, before: "Counters") -> "Counters":
        return Counters(*(getattr(self, one.name) - getattr(before, one.name) for one in fields(self)))

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.late + self.misses, 1)


def read_index(bundle: Bundle) -> Index:
    """The index of a bundle's experts, checked against their sections. Raises BundleError."""
    index = Index.from_json(bundle.bytes(bundle.section("experts", "index"), MAX_INDEX))
    for precision in index.precisions:
        section = bundle.section("experts", precision.section)
        expected = index.layers * index.experts * precision.record
        if section.length != expected:
            raise _refuse(str(bundle.path), f"section {section.name!r} has {section.length} bytes, not {expected}")
        if section.offset % ALIGNMENT:
            raise _refuse(str(bundle.path), f"section {section.name!r} is not at a multiple of {ALIGNMENT}")
    return index


class Store:
    """`slots` experts at most are in memory, registered under `handle`; at first none are.

    `between` runs a piece of work between two runs of the graphs that use the store; whoever has such graphs sets it.
    """

    def __init__(self, bundle: Bundle, slots: int, options: Options = Options()):  # noqa: B008 (frozen)
        """Reads the index, and no expert. Raises BundleError, UsageError, and BackendError without the kernels."""
        index, predictor = read_index(bundle), None
        if options.guess and options.predictor:
            predictor = _trained(options.predictor, index)
        elif options.guess and (found := bundle.find("experts", "predictor")) is not None:
            predictor = _predictor(bundle.bytes(found), index, bundle.path)
        offsets = [bundle.section("experts", one.section).offset for one in index.precisions]
        self._open(bundle.fileno(), str(bundle.path), index, offsets, slots, options, predictor)

    @classmethod
    def over(cls, path: str | Path, offset: int, index: Index, slots: int = 0, low: int | None = None) -> "Store":
        """Over records that begin at byte `offset` of a file, those of the lower precision at `low`: of a bundle in the
        making. `slots` 0 is room for all."""
        store = cls.__new__(cls)
        offsets = [offset] if low is None else [offset, low]
        index = Index(index.blocks, index.experts, index.precisions[: len(offsets)], index.checksums[: len(offsets)])
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            store._open(file, str(path), index, offsets, slots or index.layers * index.experts, Options(), None)
        finally:
            os.close(file)
        return store

    def _open(self, file: int, path: str, index: Index, offsets: Sequence[int], slots: int, options: Options,
              predictor: np.ndarray | None) -> None:  # fmt: skip
        self.index, self.options, self._predictor = index, options, predictor
        self.between: Between = lambda work: work()
        formats = [number for one in index.precisions
                   for number in (*_numbers(one.gate_up), *_numbers(one.down), one.gathered)]  # fmt: skip
        checksums = [np.array(one, np.uint32) for one in index.checksums]
        parameters = (*options.parameters, *[0.0] * (PARAMETERS - len(options.parameters)))
        self._slots = slots
        self.handle = kernels.open_experts(
            ctypes.c_int(file), ctypes.c_int(index.layers), ctypes.c_int(index.experts),
            ctypes.c_int(len(index.precisions)), (ctypes.c_int64 * len(offsets))(*offsets),
            (ctypes.c_int64 * len(formats))(*formats),
            (ctypes.c_void_p * len(checksums))(*(one.ctypes.data for one in checksums)), ctypes.c_int(slots),
            ctypes.c_int(POLICIES.index(options.policy)),
            (ctypes.c_double * PARAMETERS)(*parameters) if options.parameters else None, ctypes.c_int(options.threads),
            ctypes.c_int64(options.rate), ctypes.c_int(options.direct),
            None if predictor is None else ctypes.c_void_p(predictor.ctypes.data), ctypes.c_int(options.expand),
            ctypes.c_float(options.low), ctypes.c_float(options.skip),
        )  # fmt: skip
        if self.handle < 0:
            why = os.strerror(-self.handle)
            raise BackendError(f"The experts of {path} cannot be opened.", f"{why}.", "Ask for fewer slots.")

    @property
    def record(self) -> int:
        """Bytes of a slot."""
        return max(one.record for one in self.index.precisions)

    @property
    def entries(self) -> int:
        """How many experts there is room for."""
        return self._slots

    @property
    def bytes(self) -> int:
        """Of all slots."""
        return self._slots * self.record

    def set_entries(self, slots: int) -> None:
        """Makes room for `slots` experts from the next run on. Raises UsageError for fewer than one or more than there
        are."""
        if type(slots) is not int or not 1 <= slots <= self.index.layers * self.index.experts:
            why = f"There are {self.index.layers * self.index.experts} experts."
            raise UsageError(f"Slots for {slots!r:.20} experts are asked for.", why, "Ask for some of them.")

        def work() -> None:
            if not kernels.experts_do("shoal_experts_resize", self.handle, ctypes.c_int(slots)):
                raise BackendError("The model is closed.", "close() was called.", "Load it again.")
            self._slots = slots

        self.between(work)

    def counters(self) -> Counters:
        found = (ctypes.c_int64 * len(fields(Counters)))()
        if not kernels.experts_do("shoal_experts_counters", self.handle, found):
            raise BackendError("The model is closed.", "close() was called.", "Load it again.")
        return Counters(*found)

    def restart(self) -> None:
        """A new conversation begins: what was used in the last one counts no more."""
        kernels.experts_do("shoal_experts_restart", self.handle)

    def record_routing(self, tokens: int, *, scores: bool = False, inputs: bool = False) -> None:
        """From the next run on keeps the routing of up to `tokens` tokens, with the router's scores and the experts'
        inputs if they are wanted; 0 ends it and forgets them."""
        kernels.experts_do(
            "shoal_experts_trace", self.handle, ctypes.c_int64(tokens), ctypes.c_int(scores), ctypes.c_int(inputs)
        )

    def recorded(self, top_k: int) -> int:
        """How many whole tokens were kept so far."""
        return max(kernels.traced_experts(self.handle, self.index.layers - 1, 0, None), 0) // top_k

    def routing(self, top_k: int, hidden: int) -> dict[str, np.ndarray]:
        """What was kept: `ids` int16 [tokens, layers, top_k] (-1: not one of these experts), and if they were wanted
        `scores` fp32 [tokens, layers, experts] and `inputs` fp32 [tokens, layers, hidden]; of whole tokens."""
        widths = {"ids": (top_k, np.int16), "scores": (self.index.experts, np.float32), "inputs": (hidden, np.float32)}
        found = {}
        for kind, (name, (width, dtype)) in enumerate(widths.items()):
            layers = []
            for layer in range(self.index.layers):
                count = kernels.traced_experts(self.handle, layer, kind, None)
                array = np.empty(max(count, 0), dtype)
                if count > 0:
                    kernels.traced_experts(self.handle, layer, kind, array)
                layers.append(array.reshape(-1, width))
            tokens = min(map(len, layers))
            if tokens or name == "ids":
                found[name] = np.stack([layer[:tokens] for layer in layers], 1)
        return found

    def resident(self) -> int | None:
        """Bytes that the slots hold at most now: those that were ever used since they were made."""
        used = min(self._slots, self.counters().read_records)
        return used * self.record

    def close(self) -> None:
        """Frees everything; a graph that still uses it is refused at its next run."""
        kernels.experts_do("shoal_experts_close", self.handle)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _numbers(format: LinearFormat) -> list[int]:
    return [format.inputs, format.bits, format.group, format.span, format.rotated]


def _predictor(data: bytes | memoryview, index: Index, path) -> np.ndarray:
    """fp32 [layers - 1, experts, hidden]."""
    hidden = index.precisions[0].gate_up.inputs
    expected = 4 * (index.layers - 1) * index.experts * hidden
    if len(data) != expected:
        raise _refuse(str(path), f"predictor has {len(data)} bytes, not {expected}")
    found = np.frombuffer(data, "<f4").reshape(index.layers - 1, index.experts, hidden)
    if not np.isfinite(found).all():
        raise _refuse(str(path), "predictor has what is not a number")
    return np.ascontiguousarray(found)


def _trained(path: str, index: Index) -> np.ndarray:
    """fp32 [layers - 1, experts, hidden] of a .npy file."""
    shape = (index.layers - 1, index.experts, index.precisions[0].gate_up.inputs)
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is of another version")
            found, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
            if (found, by_columns, dtype) != (shape, False, np.dtype("<f4")):
                raise ValueError(f"it has {found} of {dtype}, not {shape} of float32")
            array = np.frombuffer(file.read(4 * math.prod(shape)), "<f4").reshape(shape)
        if not np.isfinite(array).all():
            raise ValueError("it has what is not a number")
        return array
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        fix = "Make it of this model: `shoal experts predictor`."
        raise UsageError(f"The predictor {path} cannot be used.", f"{why[:300]}.", fix) from None


def _refuse(path: str, problem: str) -> BundleError:
    return BundleError(
        f"The bundle {path} cannot be used.", f"Its experts' {problem}.", "Convert the checkpoint again."
    )
