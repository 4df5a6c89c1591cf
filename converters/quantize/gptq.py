"""GPTQ: the rounding errors of some inputs are made up for by those still to be rounded (Frantar et al. 2022).

It minimises ||(W - Q) X||^2 over the calibration inputs X, of which it needs the second moments H alone. The form is
the equivalent one of Chen et al. 2025 ("The geometry of LLM quantization"): with H = R^T R, R upper triangular, the
loss is ||R (w - q)||^2, and from the last input to the first each is rounded to nearest after the errors of those
behind it are carried over: w_j + sum_k>j R_jk / R_jj (w_k - q_k). One Cholesky factor does it, without an inverse.

A span's scale is fixed before, with room for what will be carried into it; a group's multiplier and zero point are
chosen when the group is reached, for the weights as carried, by a search in which an error at input j counts R_jj
times. It knows nothing about models, files or where H comes from.
"""

import math

import numpy as np

from shoal.runtime.errors import ConvertError
from shoal.runtime.kernels.layout import BLOCK, Codes, rotate

from ..recipe import Format
from .rtn import by_rows, code_range, columns, scales, search

_DAMPINGS = (0.01, 0.1, 1.0)  # of the mean diagonal; the paper's first
_BLOCK = 256  # inputs whose carried errors are one product; a multiple of every group
_ROOM = 1.06  # by which carried weights may pass the widest of a span as it was


class Feedback:
    """What inputs with the second moments `hessian`, fp32 [inputs, inputs], which it may overwrite, say about errors:
    `factor` [n, n] is R over its diagonal, `roots` [n]; `scale` [n] is each input's root mean square, but for a factor.
    n is `inputs`, those beyond the hessian's never fired; with `rotated` they are what rotated inputs have.

    Raises ConvertError for moments that cannot be: not square, not finite, or negative beyond what damping mends.
    """

    def __init__(self, hessian: np.ndarray, inputs: int, rotated: bool):
        self.factor = _padded(hessian, inputs)
        if rotated:
            _rotate(self.factor)
        self.scale = np.sqrt(self.factor.diagonal())
        self.roots = _damped_cholesky(self.factor)
        self.factor /= self.roots[:, None]

    def moments(self, inputs: int) -> np.ndarray:
        """The moments of the first inputs again, damped: fp32 [inputs, inputs]."""
        root = self.factor[:inputs, :inputs] * self.roots[:inputs, None]
        return root.T @ root


class Rounding:
    """Rounds matrices whose inputs have these moments: as Feedback has them, of the format's groups, or takes them.
    Inputs that never fired (zero rows) are rounded to nearest."""

    def __init__(self, moments: "np.ndarray | Feedback", format: Format):
        self.format = format
        if isinstance(moments, np.ndarray):
            layout = format.layout(max(1, len(moments)), 1)
            moments = Feedback(moments, layout.groups * layout.group, bool(layout.rotated))
        self.factor, self.roots = moments.factor, moments.roots

    def quantize(self, rows: np.ndarray) -> Codes:
        """Codes of fp32 [outputs, inputs], finite; each row is rounded by itself, so a matrix may come in slices."""
        layout = self.format.layout(rows.shape[1], len(rows))
        values = columns(rows, layout)
        steps = scales(values, layout, self.format.symmetric, _ROOM)
        lowest, highest = code_range(layout.bits)
        errors, carried = values.copy(), values.copy()
        codes = np.empty(errors.shape, np.int8 if layout.bits == 8 else np.uint8)
        multipliers = np.empty((layout.groups, errors.shape[1]), np.uint8)
        zeros = np.empty(multipliers.shape, codes.dtype)
        piece = math.gcd(layout.group, _BLOCK)
        for stop in range(len(errors), 0, -piece):
            start, edge = stop - piece, -(-stop // _BLOCK) * _BLOCK
            if stop % _BLOCK == 0 or stop == len(errors):
                block = slice((stop - 1) // _BLOCK * _BLOCK, stop)
                carried[block] += self.factor[block, stop:] @ errors[stop:]
            elif stop < edge:
                carried[start:stop] += self.factor[start:stop, stop:edge] @ errors[stop:edge]
            if stop % layout.group == 0:
                group, scale = slice(stop - layout.group, stop), steps[start // layout.span]
                multiplier, zero = search(carried[group] / scale, layout, self.format.symmetric, self.roots[group])
                multipliers[start // layout.group], zeros[start // layout.group] = multiplier, zero
                unit, origin = scale * multiplier * layout.step, zero / layout.step
            for j in range(stop - 1, start - 1, -1):
                code = np.clip(np.rint(carried[j] / unit + origin), lowest, highest)
                codes[j] = code
                errors[j] -= (code - origin) * unit
                carried[start:j] += self.factor[start:j, j, None] * errors[j]
        return by_rows(codes, multipliers, zeros, steps, layout)


def _rotate(hessian: np.ndarray) -> None:
    """The moments of the rotated inputs, in place and a strip at a time."""
    for start in range(0, len(hessian), BLOCK):
        strip = hessian[start : start + BLOCK]
        strip[:] = rotate(strip.T).T
    for start in range(0, len(hessian), _BLOCK):
        strip = hessian[start : start + _BLOCK]
        strip[:] = rotate(strip)


def _padded(hessian: np.ndarray, inputs: int) -> np.ndarray:
    """The moments with zero rows up to `inputs`, checked."""
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise _refuse(f"have shape {list(hessian.shape)}, not a square one")
    padding = inputs - len(hessian)
    hessian = np.pad(hessian, (0, padding)) if padding else np.ascontiguousarray(hessian, np.float32)
    diagonal = hessian.diagonal()
    if not np.isfinite(hessian.sum(dtype=np.float64)):
        raise _refuse("are not finite: the model overflows on the calibration text")
    if (diagonal < 0).any():
        raise _refuse(f"are negative for input {int(diagonal.argmin())}")
    return hessian


def _damped_cholesky(h: np.ndarray) -> np.ndarray:
    """Replaces symmetric fp32 `h` by upper triangular R, R^T R = h + damping; returns R's diagonal."""
    diagonal = h.diagonal().copy()
    fired = diagonal > 0
    mean = diagonal[fired].mean() if fired.any() else np.float32(1)
    corners = [h[i : i + _BLOCK, i : i + _BLOCK].copy() for i in range(0, len(h), _BLOCK)]
    for damping in _DAMPINGS:
        np.fill_diagonal(h, np.where(fired, diagonal, mean) + damping * mean)
        try:
            _cholesky(h)
        except np.linalg.LinAlgError:
            _restore(h, corners)
            continue
        h[np.tri(len(h), k=-1, dtype=bool)] = 0
        return h.diagonal().copy()
    raise _refuse(f"stay indefinite with {_DAMPINGS[-1]} of their mean added")


def _cholesky(h: np.ndarray) -> None:
    """The upper triangle becomes the factor, strip by strip so that nothing of h's size is needed beside it. Below the
    blocks of the diagonal nothing is touched."""
    for start in range(0, len(h), _BLOCK):
        stop = min(start + _BLOCK, len(h))
        # LAPACK reads the lower triangle, so it is handed the upper one
        corner = np.linalg.cholesky(h[start:stop, start:stop].T.astype(np.float64))
        panel = np.linalg.inv(corner).astype(np.float32) @ h[start:stop, stop:]
        h[start:stop, start:stop], h[start:stop, stop:] = corner.T, panel
        for row in range(stop, len(h), _BLOCK):
            h[row : row + _BLOCK, row:] -= panel[:, row - stop : row - stop + _BLOCK].T @ panel[:, row - stop :]


def _restore(h: np.ndarray, corners: list[np.ndarray]) -> None:
    """Undoes a Cholesky that broke off: the blocks of the diagonal from their copies, the rest from below."""
    for start, corner in zip(range(0, len(h), _BLOCK), corners, strict=True):
        stop = start + len(corner)
        h[start:stop, start:stop], h[start:stop, stop:] = corner, h[stop:, start:stop].T


def _refuse(why: str) -> ConvertError:
    return ConvertError(
        "The weights cannot be rounded with gptq.",
        f"The second moments of a matrix's inputs {why}.",
        "Use other calibration text, or a recipe whose method is rtn.",
    )
