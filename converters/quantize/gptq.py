"""GPTQ: the rounding errors of some inputs are made up for by those still to be rounded (Frantar et al. 2022).

It minimises ||(W - Q) X||^2 over the calibration inputs X, of which it needs the second moments H alone. The form is
the equivalent one of Chen et al. 2025 ("The geometry of LLM quantization"): with H = R^T R, R upper triangular, the
loss is ||R (w - q)||^2, and from the last input to the first each is rounded to nearest after the errors of those
behind it are carried over: w_j + sum_k>j R_jk / R_jj (w_k - q_k). One Cholesky factor does it, without an inverse.

A group's scale and zero point are chosen when the group is reached, for the weights as carried, by a search in which
input j weighs R_jj^2, its own share of the loss. It knows nothing about models, files or where H comes from.
"""

import numpy as np

from shoal.runtime.errors import ConvertError

from ..recipe import Format
from .rtn import Codes, grouped

_DAMPINGS = (0.01, 0.1, 1.0)  # of the mean diagonal; the paper's first
_BLOCK = 256  # inputs whose carried errors are one product; a multiple of every group
_SHRINKS = np.linspace(1.0, 0.6, 13, dtype=np.float32)  # of a group's range: clipping a few buys a finer grid


class Rounding:
    """Rounds matrices whose inputs have the second moments `hessian`, fp32 [inputs, inputs], which it may overwrite.

    Inputs that never fired (zero rows) are rounded to nearest. Raises ConvertError for moments that cannot be: not
    square, not finite, or negative beyond what damping mends.
    """

    def __init__(self, hessian: np.ndarray, format: Format):
        self.format = format
        self.factor = _padded(hessian, format.group)
        diagonal = _damped_cholesky(self.factor)
        self.shares = diagonal**2
        self.factor /= diagonal[:, None]

    def quantize(self, rows: np.ndarray) -> Codes:
        """Codes of fp32 [outputs, inputs]; each row is rounded by itself, so a matrix may come in slices."""
        top, group = (1 << self.format.bits) - 1, self.format.group
        # An input is a row here, so that every step below runs over contiguous outputs
        errors = np.ascontiguousarray(grouped(rows, group).reshape(len(rows), -1).T)
        carried = errors.copy()
        codes = np.empty(errors.shape, np.uint8)
        scales = np.empty((len(errors) // group, len(rows)), np.float32)
        zeros = np.empty(scales.shape, np.uint8)
        for stop in range(len(errors), 0, -group):
            start, edge = stop - group, -(-stop // _BLOCK) * _BLOCK
            if stop % _BLOCK == 0 or stop == len(errors):
                block = slice((stop - 1) // _BLOCK * _BLOCK, stop)
                carried[block] += self.factor[block, stop:] @ errors[stop:]
            elif stop < edge:
                carried[start:stop] += self.factor[start:stop, stop:edge] @ errors[stop:edge]
            scale, zero = search(carried[start:stop], self.shares[start:stop], self.format)
            scales[start // group], zeros[start // group] = scale, zero
            inverse, offset = 1 / scale, zero.astype(np.float32)
            for j in range(stop - 1, start - 1, -1):
                code = np.clip(np.rint(carried[j] * inverse + offset), 0, top)
                codes[j] = code
                errors[j] -= (code - offset) * scale
                carried[start:j] += self.factor[start:j, j, None] * errors[j]
        return Codes(np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T))


def search(values: np.ndarray, shares: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """Scales fp32 and zeros uint8 [outputs] of one group fp32 [group, outputs] that cost least, input j weighing
    shares[j]: ranges shrunk in steps, for each the codes, and for the codes the scale in closed form."""
    top = (1 << format.bits) - 1
    if format.symmetric:
        middle = 1 << (format.bits - 1)
        extreme = np.take_along_axis(values, np.abs(values).argmax(0)[None], 0)[0]
        widest, zero = -extreme / middle, np.full(extreme.shape, middle, np.float32)
    else:
        low, high = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
        widest = (high - low) / top
        zero = np.rint(-low / np.where(widest > 0, widest, 1))
    # Where all is zero any scale will do, and it must stay away from denormals
    widest = np.where(np.abs(widest) < 1e-30, np.float32(1), widest)
    weighted = values * shares[:, None]
    best, scale = np.full(widest.shape, -1, np.float32), widest.copy()
    for shrink in _SHRINKS:
        codes = values * (1 / (widest * shrink)) + zero
        np.rint(codes, out=codes)
        np.clip(codes, 0, top, out=codes)
        codes -= zero
        # The loss with scale s is |w|^2 - 2 s <w, c> + s^2 |c|^2: best is s = <w, c> / |c|^2, a gain of s <w, c>
        product = np.einsum("gn,gn->n", weighted, codes)
        square = np.einsum("g,gn,gn->n", shares, codes, codes)
        fitted = product / np.where(square > 0, square, 1)
        gain = fitted * product
        better = (gain > best) & (square > 0) & (np.abs(fitted) > 1e-30)
        best[better], scale[better] = gain[better], fitted[better]
    return scale, zero.astype(np.uint8)


def _padded(hessian: np.ndarray, group: int) -> np.ndarray:
    """The moments with zero rows up to whole groups, checked."""
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise _refuse(f"have shape {list(hessian.shape)}, not a square one")
    padding = -len(hessian) % group
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
