"""The stacked matrices of a model on their way into a bundle: made as graphs ask for them, put in order at the end.

Each is read whole, turned into its steps (rungs and blocks, as the recipe says) by what its inputs look like, and put
away in a work folder, so that one matrix is in memory at a time. `set` makes any steps of each the current ones, for
the same kernels as on a device, so that a model can be measured at every size before there is a bundle. It knows
nothing about graphs, orders or perplexities.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from shoal.runtime import kernels
from shoal.runtime.bitstack.layout import Index, Stacked, StackFormat, Step, entry_bytes, header, pack
from shoal.runtime.errors import BackendError, ConvertError
from shoal.runtime.kernels.layout import BLOCK, PANEL, Codes, LinearFormat, dequantize, rotate
from shoal.runtime.kernels.layout import pack as pack_linear

from ..quantize import gptq
from ..recipe import Ladder
from .signs import WORTH, Residual, best_rank
from .work import Work

_SWEPT = 2  # blocks after the floor that are chosen twice
_ROWS = 1024  # of a rung, rounded at once


class Stacks:
    """All stacked matrices of one conversion. `handle` names them to a graph's input `stack`; `errors` has for each
    matrix ||left X||^2 over its calibration inputs with 0, 1, 2, .. of its steps, `levels` to which level of the ladder
    each of its steps brings it."""

    def __init__(self, ladder: Ladder, work: Work):
        if not kernels.available():
            raise BackendError(
                "A stacked model cannot be made here.", f"It is measured by the kernels, and {kernels.missing()}.",
                "Install a C++ compiler and shoal again.",
            )  # fmt: skip
        self.ladder, self.work = ladder, work
        self.matrices: list[Stacked] = []
        self.errors: list[list[float]] = []
        self.levels: list[list[int]] = []
        self._payloads: list[list[np.ndarray]] = []
        self._registry: kernels.Stack | None = None
        self._counts: list[int] = []

    def done(self, count: int) -> bool:
        """Whether the next `count` matrices are in the work folder already."""
        return all(self.work.has(len(self.matrices) + at) for at in range(count))

    def add(self, label: str, rows: Callable[[], np.ndarray], moments: list[np.ndarray]) -> int:
        """Makes the next matrix, or takes it from the work folder, and returns its number. `rows()` gives it whole,
        fp32 [outputs, inputs]; `moments` are its inputs' second moments [inputs, inputs] at each of the ladder's
        levels, which it takes over."""
        at = len(self.matrices)
        kept = self.work.load(at)
        if kept is None:
            if len(moments) != len(self.ladder.levels):
                raise ConvertError(f"{label} cannot be stacked.", "Nothing is known of its inputs.", "Convert again.")
            payloads, kept = self._make(rows(), moments)
            self.work.save(at, payloads, kept)
            kept = self.work.load(at)
            if kept is None:
                raise ConvertError(f"{label} was not stored.", "Its file changed.", "Convert again.")
        inputs, outputs, rotated = kept["inputs"], kept["outputs"], kept["rotated"]
        steps = tuple(_step(raw, inputs, outputs, rotated) for raw in kept["steps"])
        self.matrices.append(Stacked(label, inputs, outputs, rotated, steps))
        self.errors.append(kept["errors"])
        self.levels.append(kept["levels"])
        self._payloads.append(self.work.payloads(at, kept["lengths"]))
        return at

    def rank(self, matrix: int) -> int:
        """Of a matrix's blocks: all have one."""
        return next((step.rank for step in self.matrices[matrix].steps if isinstance(step, StackFormat)), 1)

    @property
    def floors(self) -> list[int]:
        """How many steps each matrix needs at least."""
        return self.counts(self.ladder.floor)

    def counts(self, level: int) -> list[int]:
        """How many steps each matrix has where none is beyond `level`."""
        return [sum(one <= level for one in own) for own in self.levels]

    @property
    def handle(self) -> int:
        """What names the matrices as they are `set`, at first with all their steps."""
        if self._registry is None or len(self._counts) < len(self.matrices):
            if self._registry is not None:
                self._registry.close()
            self._registry = kernels.Stack(len(self.matrices))
            self._counts = [0] * len(self.matrices)
            self.set([len(one.steps) for one in self.matrices])
        return self._registry.handle

    def set(self, counts: Sequence[int]) -> None:
        """From the next run on each matrix has its first `counts` steps."""
        self.handle  # noqa: B018 (makes the registry)
        assert self._registry is not None
        for matrix, count in enumerate(counts):
            if count == self._counts[matrix]:
                continue
            one, payloads = self.matrices[matrix], self._payloads[matrix]
            live = one.live(count)
            rung = next((at for at in live if isinstance(one.steps[at], LinearFormat)), None)
            blocks = [at for at in live if at != rung]
            base = (one.steps[rung], payloads[rung]) if rung is not None else None
            self._registry.set(matrix, [payloads[at] for at in blocks], base)  # type: ignore[arg-type]
            self._counts[matrix] = count

    def drop(self, level: int) -> None:
        """Leaves out what brings matrices from less to `level`, a rung between two others; who has it at least keeps
        it."""
        for at, levels in enumerate(self.levels):
            floor = sum(one <= self.ladder.floor for one in levels)
            if level in levels[floor:]:
                step = levels.index(level)
                one = self.matrices[at]
                self.matrices[at] = replace(one, steps=one.steps[:step] + one.steps[step + 1 :])
                del self.levels[at][step], self._payloads[at][step], self.errors[at][step + 1]
        self._counts = [-1] * len(self._counts)  # whatever is set now is set anew

    def write(self, sink, index: Index) -> None:
        """Writes the stack's entries in the order of `index`."""
        for entry in index.entries():
            step, payload = self.matrices[entry.matrix].steps[entry.step], self._payloads[entry.matrix][entry.step]
            sink.write(header(entry.matrix, entry.step, step, payload))
            sink.write(payload)

    def close(self) -> None:
        if self._registry is not None:
            self._registry.close()
            self._registry = None
        self._payloads.clear()
        self.work.close()

    def _make(self, weights: np.ndarray, moments: list[np.ndarray]) -> tuple[list, dict]:
        outputs, inputs = weights.shape
        ladder, rotated = self.ladder, int(inputs % BLOCK == 0)
        domain = rotate(weights) if rotated else weights

        def next_level() -> gptq.Feedback:
            return gptq.Feedback(moments.pop(0), -(-inputs // BLOCK) * BLOCK, bool(rotated))

        feedback = next_level()
        rank = ladder.rank or best_rank(domain, feedback, ladder.first or 1)
        left = Residual(domain.copy(), feedback)
        format = StackFormat(inputs, outputs, rank, rotated)
        whole, stops = left.error, list[_Stop]()
        if ladder.first:
            blocks = [pack(format, *block) for block in left.floor(ladder.first, rank)]
            stops.append(_Stop(len(blocks) * entry_bytes(format), left.error, {"rank": rank}, blocks))
        for rung in ladder.rungs:
            feedback = next_level() if stops else feedback
            layout = rung.layout(inputs, outputs)
            rounding = gptq.Rounding(feedback, rung)
            parts = [rounding.quantize(weights[start : start + _ROWS]) for start in range(0, outputs, _ROWS)]
            codes = Codes(*(np.concatenate(part) for part in zip(*parts, strict=True)))
            left = Residual(domain.copy(), feedback)
            left.take(_in_domain(layout, codes))
            raw = {"bits": layout.bits, "group": layout.group, "span": layout.span}
            stops.append(_Stop(entry_bytes(layout), left.error, raw, [pack_linear(layout, codes)]))
        payloads, steps, levels, errors = list[bytearray | np.ndarray](), list[dict](), list[int](), [whole]
        for at in worthwhile([(stop.bytes, stop.error) for stop in stops], weights.size, ladder.rivals):
            stop, level = stops[at], ladder.floor + at if steps else ladder.floor
            levels += range(level - len(stop.payloads) + 1, level + 1)
            # The first blocks come together: what one of them alone would leave is never seen
            errors += [whole] * (len(stop.payloads) - 1) + [stop.error]
            steps += [stop.raw] * len(stop.payloads)
            payloads += stop.payloads
        for at in range(ladder.blocks):
            levels.append(ladder.floor + len(stops) + at)
            if moments and levels[-1] > ladder.levels[-1 - len(moments)]:
                left.weigh(next_level())
            swept = 1 if at < _SWEPT else 0
            payloads.append(pack(format, *left.block(rank, swept)))
            errors.append(left.error)
            steps.append({"rank": rank})
        return payloads, {
            "inputs": inputs, "outputs": outputs, "rotated": rotated, "rank": rank, "steps": steps, "errors": errors,
            "levels": levels,
        }  # fmt: skip


class _Stop(NamedTuple):
    """A model of one matrix by itself: its first blocks, or a rung. What its steps are, without their payloads, is
    `raw`."""

    bytes: int
    error: float
    raw: dict
    payloads: Sequence[bytearray | np.ndarray]


def worthwhile(stops: Sequence[tuple[int, float]], weights: int, rivals: int = 0) -> list[int]:
    """Which of a matrix's models (bytes, error) to keep. Of the first and its `rivals`, the next so many, a rival comes
    instead where it has half the error, as in a few matrices where channels outdo all others, which leaves blocks many
    times the error of integers. Where less is between them, errors compare badly, whatever the bytes (Gemma 3, with
    integers in six matrices for having less of it, had 13 % more perplexity): a rival that is larger and has less error
    then comes after the first, and `Stacks.drop` takes it away where the whole model gains nothing by it. The last
    rival comes if only it is larger, so that the whole model can be the ordinary one of its bits (Qwen with blocks in
    three matrices instead, for their less error, had 1.3 % more perplexity). Of two others of which the later is no
    larger, the one with less error for its bytes. The last always."""

    def loss(at: int) -> float:
        size, error = stops[at]
        return math.log(max(error, 1e-30)) + WORTH * 8 * size / weights

    kept = [0]
    for at in range(1, len(stops)):
        no_larger, last = stops[at][0] <= stops[kept[-1]][0], at == len(stops) - 1
        if at <= rivals and not last and kept == [0]:
            if 2 * stops[at][1] <= stops[0][1]:
                kept[-1] = at
            elif not no_larger and (at == rivals or stops[at][1] < stops[0][1]):
                kept.append(at)
        elif not no_larger:
            kept.append(at)
        elif last or loss(at) < loss(kept[-1]):
            kept[-1] = at
    return kept


def step_bytes(matrix: Stacked) -> list[int]:
    """What each step adds to what must be resident."""
    held, found = 0, []
    for step in matrix.steps:
        now = entry_bytes(step) + (0 if isinstance(step, LinearFormat) else held)
        found.append(now - held)
        held = now
    return found


def _in_domain(layout: LinearFormat, codes: Codes) -> np.ndarray:
    """A rung's weights as its blocks go on top of them: not rotated back."""
    plain = LinearFormat(layout.inputs, layout.outputs, layout.bits, layout.group, layout.span)
    return dequantize(plain, codes)


def _step(raw: dict, inputs: int, outputs: int, rotated: int) -> Step:
    if "rank" in raw:
        return StackFormat(inputs, outputs, raw["rank"], rotated)
    return LinearFormat(inputs, outputs, raw["bits"], raw["group"], raw["span"], rotated)


def gated_order(rows: int) -> np.ndarray:
    """For a gate and its up of `rows` outputs each, stacked: which row comes where so that their panels alternate."""
    return np.arange(2 * rows).reshape(2, -1, PANEL).transpose(1, 0, 2).reshape(-1)
