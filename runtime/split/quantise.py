"""A latent's values as small integers: uniform steps of 1 to 8 bits, for a whole tensor or for each channel.

What lies beyond the first or the last step is clipped to it: that is the definition, and why the coder behind needs no
escape. Every operation is one that IEEE 754 rounds in one way (fp32 subtraction, division, rounding to even,
multiplication, addition), so all machines agree to the bit. It knows nothing about coding or wires.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

MAX_BITS = 8


@dataclass(frozen=True, eq=False)
class Quantiser:
    """Level q of channel c is offsets[c] + scales[c] * q, q from 0 to 2^bits - 1; both are fp32, [channels] or, for
    the whole tensor, [1]. Raises UsageError unless every level, in fp32, is the nearest to itself."""

    bits: int
    scales: np.ndarray
    offsets: np.ndarray

    def __post_init__(self):
        if self.bits not in range(1, MAX_BITS + 1):
            raise UsageError(
                f"A quantiser has {self.bits} bits.", f"They are 1 to {MAX_BITS}.", "Choose some of these."
            )
        for name in ("scales", "offsets"):
            object.__setattr__(self, name, np.array(getattr(self, name), np.float32, ndmin=1, order="C"))
        if self.scales.ndim != 1 or self.scales.shape != self.offsets.shape:
            shapes = f"Scales have shape {self.scales.shape}, offsets {self.offsets.shape}"
            raise UsageError(f"{shapes}.", "Both have one number a channel, or one.", "Give them the same length.")
        for array in (self.scales, self.offsets):
            array.flags.writeable = False
        levels, steps = self.levels(), np.arange(2**self.bits, dtype=np.uint8)
        finite = np.isfinite(levels).all() and (self.scales > 0).all()
        if not finite or (self._nearest(levels, self.scales[:, None], self.offsets[:, None]) != steps).any():
            raise UsageError(
                "A quantiser has steps that fp32 cannot tell apart.",
                "A scale is not above 0, not finite, or too small beside its offset.",
                "Correct the scales.",
            )

    @classmethod
    def fit(cls, latents: np.ndarray, bits: int, *, per_channel: bool = True, clip: float = 0.0) -> "Quantiser":
        """The steps that span samples fp32 [n, channels, ...], of each channel or of all of them; of the values a part
        `clip` (0 to 0.5) may lie beyond at either end. Raises UsageError."""
        latents = checked(latents)
        if not 0 <= clip < 0.5:
            raise UsageError(f"A part of {clip} cannot be clipped.", "It is from 0 to below 0.5.", "Correct it.")
        values = latents.swapaxes(0, 1).reshape(latents.shape[1] if per_channel else 1, -1)
        low, high = np.quantile(values.astype(np.float64), (clip, 1 - clip), axis=1)
        # A channel that never moves gets steps that fp32 can tell apart around it
        least = np.maximum(np.maximum(np.abs(low), np.abs(high)) * 1e-6, 1e-30)
        return cls(bits, np.maximum((high - low) / (2**bits - 1), least), low)

    def levels(self) -> np.ndarray:
        """Every channel's, fp32 [channels or 1, 2^bits]."""
        with np.errstate(over="ignore", invalid="ignore"):
            steps = self.scales[:, None] * np.arange(2**self.bits, dtype=np.float32)
            return self.offsets[:, None] + steps

    def quantise(self, latents: np.ndarray) -> np.ndarray:
        """fp32 [n, channels, ...] to symbols uint8 of the same shape, the nearest level of each (of two, the even one).
        Raises UsageError, for NaN and infinities too."""
        latents = self._channels(checked(latents))
        return self._nearest(latents, *self._along(latents.ndim))

    def dequantise(self, symbols: np.ndarray) -> np.ndarray:
        """The levels of symbols uint8 [n, channels, ...], fp32 of the same shape."""
        scales, offsets = self._along(self._channels(symbols).ndim)
        latents = symbols.astype(np.float32)
        latents *= scales
        latents += offsets
        return latents

    def _nearest(self, values: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # an infinity is clipped as what it came from would be
            steps = values - offsets
            steps /= scales
        np.rint(steps, out=steps)
        return np.clip(steps, 0, 2**self.bits - 1, out=steps).astype(np.uint8)

    def _channels(self, array: np.ndarray) -> np.ndarray:
        if array.ndim < 2 or len(self.scales) not in (1, array.shape[1]):
            wanted = f"[n, {len(self.scales)}, ...]" if len(self.scales) > 1 else "[n, channels, ...]"
            raise UsageError(f"The latents have shape {array.shape}.", f"It must be {wanted}.", "Reshape them.")
        return array

    def _along(self, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (-1, *(1,) * (dimensions - 2))
        return self.scales.reshape(shape), self.offsets.reshape(shape)


def checked(latents: np.ndarray) -> np.ndarray:
    """`latents` as fp32 [n, channels, ...], all finite and at least one. Raises UsageError."""
    latents = np.asarray(latents)
    if latents.dtype != np.float32 or latents.ndim < 2 or not latents.size:
        said = f"The latents are {latents.dtype} {list(latents.shape)}."
        raise UsageError(said, "They must be float32 [n, channels, ...], none of these 0.", "Convert and reshape them.")
    if not np.isfinite(latents).all():
        raise UsageError("The latents hold NaN or infinity.", "No level is near those.", "See what the head computes.")
    return latents
