"""From logits to one token.

Steps in their order: the caller's processors, repetition penalty (Keskar et al. 2019), temperature, top-k, top-p
(Holtzman et al. 2020), min-p (Nguyen et al. 2024), a draw from a generator of the request's own, so that the same seed
gives the same tokens whatever else runs. The log-probability that is reported is the model's: of the logits as they
came, before any of these steps. It knows nothing about text or models.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BackendError, UsageError

Processor = Callable[[Sequence[int], np.ndarray], np.ndarray]
_FIRST_LOOK = 1024  # likeliest tokens that top-p looks at before it sorts more
_COLD = 1e-5  # a temperature below which only the likeliest token has a chance

_BLOCK, _PART = 1024, 64


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises UsageError for a value of a wrong type or out of range.

    `temperature` 0 takes the likeliest token, of equals the first. `top_k` 0, `top_p` 1, `min_p` 0 and
    `repetition_penalty` 1 change nothing. `seed` None draws from the system's entropy. A processor gets (ids so far,
    prompt included; fp32 logits [vocab], its own to change) and returns logits of that shape.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    processors: tuple[Processor, ...] = ()

    def __post_init__(self):
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _whole("top_k", self.top_k, 1 << 31)
        if self.seed is not None:
            _whole("seed", self.seed, 1 << 64)
        if not isinstance(self.processors, (tuple, list)) or not all(map(callable, self.processors)):
            raise UsageError("processors cannot be used.", "It is not a list of callables.", "Correct it.")
        object.__setattr__(self, "processors", tuple(self.processors))

    @classmethod
    def of(cls, options: dict) -> "Sampling":
        """From keywords; UsageError names one that does not exist."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise UsageError(f"There is no option {name!r:.60}.", f"Options are {', '.join(known)}.", "Correct it.")
        return cls(**options)


class Sampler:
    """Chooses the tokens of one answer. One request each; not for several threads at once."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._random = np.random.Generator(np.random.Philox(sampling.seed))
        self._seen = np.zeros(0, bool)  # which ids the history holds
        self._counted = 0
        self._scratch = np.zeros(0, np.float32)
        self._logits = self._scratch
        self._normalizer = 0.0  # log of the sum of their exponents

    def choose(self, logits: np.ndarray, history: Sequence[int] = ()) -> tuple[int, float]:
        """Picks a token id; returns it with the natural log of its probability.

        `logits` fp32 [vocab] are only read; a processor gets a copy. `history` are the ids so far, as the penalty and
        the processors see them; it may grow or be cut between calls. Raises BackendError where the logits are not
        numbers and UsageError where a processor returned what cannot be sampled from.
        """
        best = int(logits.argmax())  # the first NaN, where there is one
        highest = float(logits[best])
        if not math.isfinite(highest):
            why = f"The greatest logit is {highest}."
            raise BackendError("No token can be chosen.", why, "Verify the bundle, and the constraint if there is one.")
        if len(self._scratch) != len(logits):
            self._scratch = np.empty(len(logits), np.float32)
        np.subtract(logits, np.float32(highest), out=self._scratch)
        np.exp(self._scratch, out=self._scratch)
        self._logits, self._normalizer = logits, highest + math.log(float(self._scratch.sum()))
        chosen = best
        if self.sampling.processors or self.sampling.repetition_penalty != 1.0:
            logits = self._changed(logits, history)
            chosen = int(logits.argmax())
        if self.sampling.temperature > _COLD:
            chosen = self._draw(logits, logits[chosen])
        return chosen, float(self._logits[chosen]) - self._normalizer

    def top(self, count: int) -> list[tuple[int, float]]:
        """The `count` likeliest (id, log-probability) of the last `choose`, while its logits are as they were."""
        ids = _likeliest(self._logits, count)
        return [(int(number), float(self._logits[number]) - self._normalizer) for number in ids]

    def _changed(self, logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        """A copy of the logits after processors and penalty."""
        count = len(logits)
        logits = np.array(logits, np.float32)
        for processor in self.sampling.processors:
            result = processor(history, logits)
            name = getattr(processor, "__name__", type(processor).__name__)
            if not isinstance(result, np.ndarray) or result.shape != (count,) or result.dtype.kind != "f":
                got = f"{result.dtype} {result.shape}" if isinstance(result, np.ndarray) else type(result).__name__
                why = f"It returned {got} instead of float ({count},)."
                raise UsageError(f"The logit processor {name} is wrong.", why, "Return an array of logits.")
            logits = np.array(result, np.float32)
            if not math.isfinite(logits[logits.argmax()]):
                why = "It left no token, or gave what is no number."
                raise UsageError(f"The logit processor {name} is wrong.", why, "Leave one finite logit at least.")
        penalty = self.sampling.repetition_penalty
        if penalty != 1.0:
            ids = self._used(history, count)
            some = logits[ids]
            logits[ids] = np.where(some > 0, some / penalty, some * penalty)
        return logits

    def _used(self, history: Sequence[int], count: int) -> np.ndarray:
        """The ids that the history holds; only what was added since the last time is looked at."""
        if len(self._seen) != count or len(history) < self._counted:
            self._seen, self._counted = np.zeros(count, bool), 0
        self._seen[np.fromiter(history[self._counted :], np.int64)] = True
        self._counted = len(history)
        return np.flatnonzero(self._seen)

    def _draw(self, logits: np.ndarray, highest: np.float32) -> int:
        """Temperature, top-k, top-p, min-p and the draw."""
        sampling = self.sampling
        ids: np.ndarray | None = None  # None is all, in their order; else those that are left, the likeliest first
        if 0 < sampling.top_k < len(logits):
            ids = _likeliest(logits, sampling.top_k)
            logits = logits[ids]
        weights = np.exp((logits - highest) / np.float32(sampling.temperature))
        if sampling.top_p < 1.0:
            kept = _nucleus(weights, sampling.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if sampling.min_p > 0.0:
            kept = np.flatnonzero(weights >= sampling.min_p)  # the greatest weight is 1
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        place = _drawn(weights, self._random.random())
        return place if ids is None else int(ids[place])


def _drawn(weights: np.ndarray, share: float) -> int:
    """The index at which the running sum of the weights passes `share` of the whole; first the block, then within."""
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    wanted = share * blocks[-1]
    block = min(int(np.searchsorted(blocks, wanted, side="right")), len(blocks) - 1)
    start = block * _BLOCK
    sums = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64) + (blocks[block - 1] if block else 0.0)
    inside = int(np.searchsorted(sums, wanted, side="right"))
    if inside < len(sums):
        return start + inside
    return int(np.flatnonzero(weights[: start + _BLOCK])[-1])  # rounding left `wanted` above the block's last sum


def _likeliest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` greatest values, the greatest first, of equals the first."""
    if count <= 0:
        return np.zeros(0, np.int64)
    ids = np.arange(len(values)) if count >= len(values) else np.flatnonzero(values >= _bound(values, count))
    return ids[np.argsort(-values[ids], kind="stable")[:count]]


def _bound(values: np.ndarray, count: int) -> np.ndarray:
    """Something that at least `count` values reach and few more: of the maxima of equal parts the count-th greatest."""
    parts = len(values) // _PART
    if count <= parts // 2:
        values = values[: parts * _PART].reshape(_PART, parts).max(axis=0)
    return np.partition(values, len(values) - count)[len(values) - count]


def _nucleus(weights: np.ndarray, share: float) -> np.ndarray:
    """Indices of the fewest greatest weights that make up `share` of their sum, the greatest first."""
    wanted = share * float(weights.sum())
    count = _FIRST_LOOK
    while True:
        ids = _likeliest(weights, count)
        sums = np.cumsum(weights[ids], dtype=np.float64)
        if sums[-1] >= wanted or count >= len(weights):
            return ids[: int(np.searchsorted(sums, wanted)) + 1]
        count *= 8


def _number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not right or (above and value == low):
        span = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise UsageError(f"{name} is {value!r:.60}.", f"It must be a number {span}.", "Correct it.")


def _whole(name: str, value: object, limit: int) -> None:
    if type(value) is not int or not 0 <= value < limit:
        raise UsageError(
            f"{name} is {value!r:.60}.", f"It must be a whole number from 0 to {limit - 1}.", "Correct it."
        )
