"""Static scales of the inputs of products in 8 bits, from what calibration text shows of them.

One scale serves a whole tensor, so that few channels with large values take the resolution from all others. With a
shadow (llm.npu, Xu et al., ASPLOS 2025) the scale may clip them: what clipping takes away is multiplied beside the
device. The scale then comes from channels' maxima over stretches of text and not from single values, so that in a
chunk few channels are beyond it: a column is multiplied whole, whether one of its rows needs it or all.
This module is arithmetic on arrays: it knows nothing about graphs, models or files.
"""

from dataclasses import dataclass, field

import numpy as np

SAMPLE = 192  # rows of a product's input on which errors are measured
STRETCH = 256  # tokens of a chunk, as far as scales go
BEYOND = 0.01  # the most channels beyond the clip in a stretch, as a share, in the mean
HOT = 0.01  # the most that are hot
TRIED = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)  # parts of that share
SLACK = 1.1  # of the least error: what more hot channels than needed would save is not worth their time
LEAST_SIZE = 2.0**-14  # of a row: the least normal number of 16 bits, in which devices compute
HEADROOM = 4.0  # what a product may give beyond the largest that was seen
_HALVINGS = 12  # scales tried without a shadow: each a root of two smaller than the one before


@dataclass(frozen=True)
class Fit:
    """A scale of a product's input, and what comes of it: the squared `error` of the product relative to its output,
    rounding of the input alone; the share of channels `beyond` the clip in a stretch, and those that are so often; the
    largest value of the device's sums, with headroom."""

    scale: float
    error: float
    beyond: float
    hot: tuple[int, ...]
    most: float


@dataclass
class Seen:
    """What a text shows of one product's input: each channel's largest magnitude in every stretch, and a sample of
    rows, in which the rows with the largest values are."""

    stretches: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)

    def add(self, x: np.ndarray, share: int) -> None:
        """Takes note of x fp32 [tokens, inputs], one of `share` texts."""
        size = np.abs(x)
        self.stretches += [size[at : at + STRETCH].max(0) for at in range(0, len(x), STRETCH)]
        few = max(1, SAMPLE // share)
        spread = np.linspace(0, len(x) - 1, few).astype(int)
        largest = np.argsort(size.max(1), kind="stable")[-max(1, few // 8) :]
        self.rows.append(x[np.union1d(spread, largest)])

    @property
    def maxima(self) -> np.ndarray:
        """fp32 [stretches, inputs]"""
        return np.stack(self.stretches)

    @property
    def sample(self) -> np.ndarray:
        return np.concatenate(self.rows)


def even(x: np.ndarray) -> np.ndarray:
    """Rows of x fp32 [tokens, inputs], each divided by its root mean square. What a gate gives differs in size from
    token to token, with no norm behind it, and one scale for all tokens leaves most of them few steps. (Measured on
    Gemma 3: perplexity rises by 0.7 % so, by 1.3 % with the mean magnitude and by 1.8 % with the largest.)"""
    return x / np.maximum(np.sqrt(np.square(x).mean(1, keepdims=True)), np.float32(LEAST_SIZE / 1024))


def round_weights(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix fp32 [outputs, inputs] in int8, symmetric, and its scales fp32 [outputs]."""
    scales = np.maximum(np.abs(rows).max(1), 1e-12).astype(np.float32) / np.float32(127)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def quantise(x: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """round(x / scale) in two parts that add up to it, whole numbers in fp32: what 8 bits hold, and what clipping takes
    away (the residual as the authors' code has it; their Eq. 1 is not an identity)."""
    q = np.rint(x / np.float32(scale))
    main = np.clip(q, -128, 127)
    return main, q - main


def largest(seen: Seen) -> float:
    """The scale with which nothing that was seen is clipped."""
    return _scale(float(seen.maxima.max()))


def with_shadow(seen: Seen, weights: np.ndarray, shares: np.ndarray, beyond: float = BEYOND) -> Fit:
    """The scale for a product with the matrix `weights` fp32 [outputs, inputs] where what is clipped is restored. The
    device multiplies each output by its entry of `shares` at last. Of the scales that leave at most the share
    `beyond` of the channels beyond the clip in a stretch, the one with the fewest whose error is hardly more than the
    least."""
    sizes = np.sort(seen.maxima, axis=None)[::-1]
    scales = [_scale(float(sizes[int(part * beyond * sizes.size)])) for part in TRIED]
    fits = _fits(seen, weights, shares, scales, lost=False)
    best = min(fit.error for fit in fits)
    return next(fit for fit in fits if fit.error <= best * SLACK)


def without_shadow(seen: Seen, weights: np.ndarray, shares: np.ndarray) -> Fit:
    """The scale where what is clipped is lost: the one with the least error."""
    scales = [largest(seen) * 2 ** (-halving / 2) for halving in range(_HALVINGS)]
    return min(_fits(seen, weights, shares, scales, lost=True), key=lambda fit: fit.error)


def _fits(seen: Seen, weights: np.ndarray, shares: np.ndarray, scales: list[float], lost: bool) -> list[Fit]:
    x = seen.sample
    y = x @ weights.T
    power = max(float(np.square(y, dtype=np.float64).sum()), 1e-30)
    found = []
    for scale in scales:
        step = np.float32(scale)
        main, residual = quantise(x, scale)
        error = (main if lost else main + residual) * step - x
        missed = error @ weights.T
        given = y + missed  # by the device
        if not lost:
            channels = np.flatnonzero(residual.any(0))
            given -= residual[:, channels] @ weights[:, channels].T * step
        beyond = np.rint(seen.maxima / step) > 127
        often = beyond.sum(0)
        hot = np.argsort(-often, kind="stable")[: max(1, int(HOT * len(often)))]
        hot = np.sort(hot[often[hot] > 1])  # once is no habit
        most = float((np.abs(given) / shares).max()) * HEADROOM
        relative = float(np.square(missed, dtype=np.float64).sum()) / power
        found.append(Fit(scale, relative, float(beyond.mean()), tuple(map(int, hot)), max(most, 1e-6)))
    return found


def _scale(most: float) -> float:
    """With which `most` is the largest that is not clipped."""
    return float(np.float32(max(most, 1e-6) / 127))
