"""Prefill in fixed chunks: steps of several chunks on the device and the CPU at once, over the decode graph's cache.

A prompt is cut (cut.py), its chunks become tasks (tasks.py), and the executor runs them; what is left goes through the
decode graph. Each chunk in flight has a lane of buffers, one a value. Rows that only fill a chunk up go through the
static graphs like any other and stop there: attention, the one step where rows meet, sees the real ones. It knows
nothing about requests or text.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .. import measure
from ..errors import BackendError, BudgetError, ShoalError
from ..events import Event, Progress, silent
from ..executor import execute
from ..schedule import Run, Schedule, Task
from ..session import PATIENCE, Binding, Session
from .cut import Costs, Piece, cut
from .graphs import Graphs
from .layout import TOKENS, Attend, Call, Shadow, Static
from .tasks import CPU, Place, build

if TYPE_CHECKING:
    from ..language.decoder import Decoder

FLIGHT = 4  # chunks at once: more hide no more waiting, and each has its buffers
_SUM = ""  # in place of a value's name: the sum of several
_GRACE = 10.0  # seconds after which the executor gives up what a session should have given up by itself


@dataclass(frozen=True)
class Times:
    """Expected seconds: of each step by chunk length, and of the decode graph for a step of n tokens, fixed + each * n.
    Nothing but speed depends on them."""

    steps: dict[int, tuple[float, ...]]
    fixed: float
    each: float


@dataclass
class Recording:
    """What ran when during one call of `forward`; `pieces` as it was cut."""

    pieces: list[Piece]
    schedule: Schedule | None


class Lane:
    """The buffers of one chunk in flight, and the device's graphs bound to them."""

    def __init__(self, static: Static):
        rows, widths = static.chunks[-1], {**static.widths, _SUM: sum_width(static)}
        # One block, and filled, so that its pages are there and nothing can fail later
        try:
            self._block = np.full(lane_bytes(static) // 4, 0, np.float32)
        except (MemoryError, ValueError) as error:
            what = f"The buffers for chunks of {rows} tokens cannot be allocated."
            raise BudgetError(what, str(error), "Load it with prefill='dynamic'.") from None
        self._arrays, at = {}, 0
        for name, width in widths.items():
            self._arrays[name] = self._block[at : at + rows * width].reshape(rows, width)
            at += _aligned(rows * width)
        self.tokens = np.zeros(rows, np.int64)
        self.bindings: dict[tuple[str, int], Binding] = {}

    def rows(self, name: str, count: int) -> np.ndarray:
        """The first `count` rows of a value, or [1, count] tokens."""
        return self.tokens[None, :count] if name == TOKENS else self._arrays[name][:count]

    def sum(self, names: Sequence[str], count: int) -> np.ndarray:
        """Of several values, or the only one itself."""
        found = self.rows(names[0], count)
        for name in names[1:]:
            found = np.add(found, self.rows(name, count), out=self._arrays[_SUM][:count])
        return found

    @property
    def region(self) -> tuple[int, int]:
        """(address, bytes) of the buffers."""
        return self._block.ctypes.data, self._block.nbytes


@dataclass
class Prefill:
    """`device` is its name as a processor, cpu for the CPU itself. A prompt is cut by `times`; without them, or where
    it is `forced`, all of it goes through chunks. `fallback`: when the device is lost, prompts go through the decode
    graph from then on, and an event says so; otherwise they fail. `recordings`, where it is a list, gets what runs.

    Its methods are for one thread at a time, the one that takes a step.
    """

    static: Static
    graphs: Graphs
    device: str = CPU
    kv: str = "fp32"
    times: Times | None = None
    forced: bool = False
    fallback: bool = False
    progress: Progress = silent
    patience: float = PATIENCE + _GRACE
    recordings: list[Recording] | None = None
    lost: ShoalError | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.lanes = [Lane(self.static) for _ in range(FLIGHT)]
        self._suffix = "" if self.kv == "fp32" else f".{self.kv}"
        self._calling = False  # the device is at work
        self._beside = threading.Lock()  # the CPU is

    @property
    def costs(self) -> Costs:
        """What a cut goes by."""
        if self.times is None:
            return Costs({length: length + 8.0 for length in self.static.chunks})
        lone = {length: sum(seconds) for length, seconds in self.times.steps.items()}
        return Costs(lone) if self.forced else Costs(lone, self.times.fixed, self.times.each)

    def most(self, alone: bool) -> int:
        """How many tokens one call of `forward` should take: chunks that overlap where nobody waits meanwhile, else
        one."""
        return self.static.chunks[-1] * (FLIGHT if alone else 1)

    def forward(self, decoder: "Decoder", slot: int, ids: Sequence[int], start: int, last: bool) -> np.ndarray:
        """Takes `ids` at positions `start`.. of `slot` into the decoder's cache.

        Returns fp32 logits [1, vocab] behind the `last` of them, [0, vocab] where they are not wanted; the next step
        writes over them. Raises BackendError where the device fails, hangs or gives what is not a number.
        """
        if self.lost is not None and not self.fallback:
            raise BackendError(f"The {self.device} is lost.", f"{self.lost.what} {self.lost.why}", self.lost.fix)
        pieces = cut(len(ids), self.costs) if self.lost is None else [Piece(0, len(ids), 0)]
        chunks = [piece for piece in pieces if piece.length]
        recording = Recording(pieces, None)
        logits = decoder.logits[:0]
        if chunks:
            wanted = last and chunks[-1] is pieces[-1]
            recording.schedule = self._run(decoder, slot, ids, start, chunks, wanted)
            if wanted:
                logits = self._head(decoder, chunks)
        if not pieces[-1].length:
            for at in range(pieces[-1].start, len(ids), decoder.chunk):
                part = ids[at : at + decoder.chunk]
                rows = [len(part) - 1] if last and at + len(part) == len(ids) else []
                logits = decoder.forward(slot, np.array([part], np.int64), [start + at], rows)
        if self.recordings is not None:
            self.recordings.append(recording)
        return logits

    def measure(self) -> dict[str, int | None]:
        """Bytes that the rows of the plan that are here hold now, as `Loaded.measure` has them."""
        sizes = [measure.range_rss(*lane.region) for lane in self.lanes]
        held = None if None in sizes else sum(size or 0 for size in sizes)
        found = {"chunk buffers": held}
        if shadows := self.graphs.shadows.values():
            found["hot shadow rows"] = sum(one.bytes for one in shadows)
        rows = [measure.range_rss(*one.region) for one in shadows]
        read = measure.mapped_rss(*self.graphs.section) if self.graphs.section else None
        # The engine and the shadows map the same pages
        found["static weights"] = None if None in (*rows, read) else max(read or 0, sum(size or 0 for size in rows))
        return found

    def close(self) -> None:
        for lane in self.lanes:
            lane.bindings.clear()
        self.graphs.close()

    def _run(
        self, decoder: "Decoder", slot: int, ids: Sequence[int], start: int, chunks: list[Piece], wanted: bool
    ) -> Schedule:
        tasks, places = build(
            self.static, [piece.length for piece in chunks], [wanted and piece is chunks[-1] for piece in chunks],
            len(self.lanes), self.device, self._expected,
        )  # fmt: skip

        def work(index: int, processor: str) -> None:
            self.run_step(decoder, slot, ids, start, chunks[places[index].chunk], places[index])

        if self.device == CPU:
            return in_order(tasks, work)
        try:
            return execute(tasks, work, patience=self.patience)
        except BackendError as error:
            if (
                self._calling
            ):  # given up while the device was at work: what the CPU is at must not reach the cache later
                self._lose(error)
                if self._beside.acquire(timeout=self.patience):
                    self._beside.release()
            raise

    def _expected(self, length: int, step: int) -> float:
        return self.times.steps[length][step] if self.times else length * 1e-4

    def run_step(
        self, decoder: "Decoder", slot: int, ids: Sequence[int], start: int, piece: Piece, place: Place
    ) -> None:
        """One step of one chunk: `piece` of the `ids`, of which the first is at position `start`."""
        step, lane = self.static.steps[place.step], self.lanes[place.chunk % len(self.lanes)]
        if isinstance(step, Call) and TOKENS in step.takes:
            lane.tokens[: piece.count] = ids[piece.start : piece.start + piece.count]
            lane.tokens[piece.count :] = 0
        if isinstance(step, Call) and step.device:
            self._call(step, lane, piece)
            return
        with self._beside:
            if self.lost is not None:
                raise self.lost
            if isinstance(step, Shadow):
                x, y = (lane.rows(name, piece.count) for name in (step.takes, step.gives))
                self.graphs.shadows[place.step].run(x, y)
            elif isinstance(step, Attend):
                self._attend(decoder, slot, start + piece.start, step, lane, piece.count)
            else:
                self._bind(self.graphs.cpu[step.name], step, lane, piece.count).run()

    def _call(self, step: Call, lane: Lane, piece: Piece) -> None:
        key = (step.name, piece.length)
        if (binding := lane.bindings.get(key)) is None:
            binding = lane.bindings[key] = self._bind(self.graphs.calls[key], step, lane, piece.length)
        self._calling = True
        try:
            binding.run()
        except ShoalError as error:
            self._lose(error)
            raise
        finally:
            self._calling = False

    def _bind(self, opened: Session, step: Call, lane: Lane, rows: int) -> Binding:
        binding = opened.bind()
        for name in step.takes:
            binding.input(name, lane.rows(name, rows))
        for name in step.gives:
            binding.output(name, lane.rows(name, rows))
        return binding

    def _attend(self, decoder: "Decoder", slot: int, start: int, step: Attend, lane: Lane, count: int) -> None:
        """Attention of one block over the rows of one slot; bound anew each time, since the cache may be resized."""
        card = decoder.card
        binding = self.graphs.cpu[step.name + self._suffix].bind()
        binding.input("qkv", lane.sum(step.takes, count)[None])
        binding.input("last", np.array([start + count - 1], np.int32))
        binding.input("total", np.array([start + count], np.int32))
        for name, table in zip(("cos", "sin"), decoder.tables[card.rope_of[step.block]], strict=True):
            binding.input(name, table)
        for part, array in zip(("key", "value"), decoder.cache.arrays[step.block - card.span.start], strict=True):
            view = array[slot : slot + 1]
            binding.input(f"past_{part}", view)
            binding.output(f"present_{part}", view)
        binding.output("y", lane.rows(step.gives, count)[None])
        binding.run()

    def _head(self, decoder: "Decoder", chunks: list[Piece]) -> np.ndarray:
        lane, count = self.lanes[(len(chunks) - 1) % len(self.lanes)], chunks[-1].count
        logits = decoder.logits[:1]
        binding = self.graphs.cpu[self.static.head].bind()
        binding.input("x", lane.rows(self.static.stream, count)[count - 1 :])
        binding.output("logits", logits)
        binding.run()
        if not np.isfinite(logits).all():
            raise BackendError(
                "The model gave what is not a number.", "An activation overflowed or a weight is damaged.",
                "Verify the bundle (shoal inspect --verify); convert again with a wider format.",
            )  # fmt: skip
        return logits

    def _lose(self, error: ShoalError) -> None:
        if self.lost is None:
            self.lost = error
            then = "prompts go through the cpu's graph from now on" if self.fallback else "prompts fail from now on"
            self.progress(Event("prefill", detail=f"the {self.device} is lost, {then}: {error.what} {error.why}"))


def in_order(tasks: Sequence[Task], work) -> Schedule:
    """Runs all tasks in their order, in the caller's thread: what one processor alone can do."""
    began, runs = time.perf_counter(), []
    for index, task in enumerate(tasks):
        start = time.perf_counter() - began
        work(index, task.best)
        runs.append(Run(index, task.best, start, time.perf_counter() - began))
    return Schedule(tuple(tasks), tuple(runs))


def lane_bytes(static: Static) -> int:
    """Of one chunk in flight."""
    widths = [*static.widths.values(), sum_width(static)]
    return 4 * sum(_aligned(static.chunks[-1] * width) for width in widths)


def _aligned(floats: int) -> int:
    return -(-floats // 16) * 16


def sum_width(static: Static) -> int:
    """The width of the buffer for what attention takes in several values; 0 where it takes one."""
    sums = [step for step in static.steps if isinstance(step, Attend) and len(step.takes) > 1]
    return max((static.widths[step.takes[0]] for step in sums), default=0)
