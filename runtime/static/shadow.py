"""The outlier path: what clipping to 8 bits took away, multiplied on the CPU beside the device's product.

With q = round(x / s), half to even as QuantizeLinear rounds, a device multiplies clip(q, -128, 127). The rest
r = q - clip(q) is zero but in few channels J, and y = s * s_w * (r[:, J] @ W[J]) is what is missing: q_main @ W + r @ W
= q @ W, an identity in integers (llm.npu, Xu et al., ASPLOS 2025, whose printed Eq. 1 is none). Rows of W for channels
that calibration found hot are held in memory; a cold one is read from the bundle when it comes. It knows nothing about
chunks or devices.
"""

import numpy as np

from ..errors import BackendError, BundleError
from .layout import Shadow

_LOW, _HIGH = -128.0, 127.0


class Outliers:
    """The product of one shadow step; `section` has the weights of the static graphs, mapped. Threads may share it."""

    def __init__(self, step: Shadow, section: memoryview):
        """Raises BundleError where the weights lie beyond the section."""
        self.step = step
        size = step.inputs * step.outputs
        if step.weights + size > len(section) or step.scales + 4 * step.outputs > len(section):
            raise BundleError(
                "The bundle's static graphs cannot be used.",
                f"The shadow of {step.takes!r:.40} in block {step.block} has its weights beyond their section.",
                "Convert the checkpoint again.",
            )
        self._weights = np.frombuffer(section, np.int8, size, step.weights).reshape(step.inputs, step.outputs)
        self._factors = np.frombuffer(section, np.float32, step.outputs, step.scales) * np.float64(step.scale)
        self._scale = np.float32(step.scale)
        hot = np.unique(np.array(step.hot, np.int64))
        self._hot = self._weights[hot]  # a copy
        self._at = np.full(step.inputs, -1, np.int32)
        self._at[hot] = np.arange(len(hot))

    @property
    def bytes(self) -> int:
        """What is held in memory for it."""
        return self._hot.nbytes + self._at.nbytes + self._factors.nbytes

    @property
    def region(self) -> tuple[int, int]:
        """(address, bytes) of the mapped rows."""
        return self._weights.ctypes.data, self._weights.nbytes

    def residual(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x fp32 [rows, inputs] -> the channels, ascending, where clipping takes something away, and what: whole
        numbers in float64 [rows, channels]. Raises BackendError for what is not a number."""
        top, bottom = x.max(0), x.min(0)
        if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
            raise BackendError(
                "The model gave what is not a number.",
                f"What block {self.step.block} takes as {self.step.takes!r:.40} overflowed, or a weight is damaged.",
                "Verify the bundle (shoal inspect --verify); convert again with a wider format.",
            )
        # Two passes over x, and then a look at the few columns that may be beyond
        near = np.flatnonzero((top >= self._scale * np.float32(_HIGH)) | (bottom <= self._scale * np.float32(_LOW)))
        if not len(near):
            return near, np.zeros((len(x), 0))
        rounded = np.rint(x[:, near].astype(np.float32) / self._scale).astype(np.float64)
        rest = rounded - rounded.clip(_LOW, _HIGH)
        some = rest.any(0)
        return near[some], rest[:, some]

    def accumulate(self, channels: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """rest @ weights[channels], whole numbers in float64 [rows, outputs].

        Exact as an integer sum is while it stays below 2^53: each term is below 2^7 |r|, so for 2^10 channels
        |r| may reach 2^36, and beyond 2^24 x / s itself is no longer known to a whole number.
        """
        at = self._at[channels]
        rows = np.empty((len(channels), self.step.outputs))
        rows[at >= 0] = self._hot[at[at >= 0]]
        rows[at < 0] = self._weights[channels[at < 0]]
        return rest @ rows

    def run(self, x: np.ndarray, out: np.ndarray) -> None:
        """Writes the shadow of x fp32 [rows, inputs] to `out` fp32 [rows, outputs]."""
        channels, rest = self.residual(x)
        if len(channels):
            np.multiply(self.accumulate(channels, rest), self._factors, out=out, casting="unsafe")
        else:
            out.fill(0)
