"""The blocks of a BitStack: what is left of a matrix, as signs times factors of low rank, again and again.

A block is S * (U V), S the signs and U V the leading terms of |residual| (Wang et al. 2024). Three things differ from
the paper's way, each because it was measured to lose less at the same bytes. Signs are chosen with error feedback, as
gptq.py rounds, so that what counts is the error of the product, not of the weights. Weights and inputs are rotated
where their length allows. And the first blocks, without which the model does not run at all, are chosen together: as
the levels of one quantiser, which is wider than the best for them alone, since what comes later cannot reach beyond it,
and chosen again, input by input, given all others.

Channels are weighed by their inputs before factors are taken (the paper's activation-aware scale); V absorbs the scale,
so that no producer has to and grouped heads are no exception. Factors are rounded to fp16 before signs are chosen, so
the next residual makes up for it. It knows nothing about models, files or the order of blocks.
"""

import math
import os
from typing import NamedTuple

import numpy as np

from shoal.runtime import kernels
from shoal.runtime.errors import ConvertError

from ..quantize.gptq import Feedback

RANKS = (1, 2, 4)  # tried where none is asked for
_OVERSAMPLE, _POWER = 8, 2  # of the randomised decomposition (Halko et al. 2011)
# Of normal values the best quantiser of 2, 4, 8, .. levels as signs times these many deviations, each half of the one
# before but for the last (Max 1960)
_LEVELS = {1: (0.798,), 2: (0.996, 0.498), 3: (1.172, 0.586, 0.293), 4: (1.341, 0.670, 0.335, 0.168)}
_MEAN = 0.798  # of the magnitude of normal values, in deviations
_WIDER = 1.1  # of later blocks' use: 1 % worse at the floor, a tenth better two blocks on
_SWEEPS = 2  # of choosing the floor's signs again: 3 to 6 % each time less for the first, half of it for the next
_BLOCK = 256  # inputs whose carried errors are one product
WORTH = 1.01  # by how much the logarithm of an error falls for a bit a weight: -log(1 - 2 / pi), a first block's
_SURE = 0.01  # by how much more a higher rank's has to fall: signs are chosen again later
_LARGEST = 6e4  # of fp16


class Block(NamedTuple):
    """u fp16 [outputs, rank], v fp16 [rank, inputs], signs bool [outputs, inputs]."""

    u: np.ndarray
    v: np.ndarray
    signs: np.ndarray


class Residual:
    """What is left of `weights`, fp32 [outputs, inputs] (rotated, if their blocks will be), which it takes over.
    `feedback` has the moments of the inputs, alike; the same `seed` gives the same blocks."""

    def __init__(self, weights: np.ndarray, feedback: Feedback, seed: int = 0):
        self.left = np.ascontiguousarray(weights.T)  # an input is a row, so that each step runs over contiguous outputs
        self._random = np.random.default_rng(seed)
        self.weigh(feedback)

    def weigh(self, feedback: Feedback) -> None:
        """From here on the inputs are those of `feedback`."""
        self.feedback = feedback
        scale = feedback.scale[: len(self.left)]
        # The root: all of it gives channels that hardly fire so little that later blocks have to make up for it
        self.scale = np.sqrt(np.maximum(scale, scale.mean() * np.float32(1e-4) + np.float32(1e-30)))[:, None]
        self.error = self.energy()

    def energy(self) -> float:
        """||left X||^2 over the inputs X, exactly as their moments have it."""
        total = 0.0
        for start in range(0, self.left.shape[1], 512):
            inputs = len(self.left)
            shaped = self.feedback.factor[:inputs, :inputs] @ self.left[:, start : start + 512]
            total += float(np.square(shaped * self.feedback.roots[:inputs, None]).sum(dtype=np.float64))
        return total

    def take(self, weights: np.ndarray) -> None:
        """Leaves what `weights` fp32 [outputs, inputs], a rung, does not give."""
        self.left -= weights.T
        self.error = self.energy()

    def floor(self, count: int, rank: int, sweeps: int = _SWEEPS) -> list[Block]:
        """The first `count` (1 to 4) blocks, chosen together."""
        u, v = self._factors(rank)
        width = np.float32((_WIDER if count > 1 else 1.0) / _MEAN)
        pairs = [(u * np.float32(level) * width, v) for level in _LEVELS[count]]
        return self._choose(pairs, sweeps)

    def block(self, rank: int, sweeps: int = 0) -> Block:
        """The next block. A sweep makes it 5 % better and those after it no worse, for three times the work."""
        return self._choose([self._factors(rank)], sweeps)[0]

    def _factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """u fp32 [outputs, rank] and v [rank, inputs] of the leading terms of |left|, channels weighed."""
        a = np.abs(self.left)
        a *= self.scale
        inputs, outputs = a.shape
        rank = min(rank, inputs, outputs)
        many = min(rank + _OVERSAMPLE, inputs, outputs)
        probe = a @ self._random.standard_normal((outputs, many), np.float32)
        for _ in range(_POWER):
            probe = a @ (a.T @ np.linalg.qr(probe)[0])
        basis = np.linalg.qr(probe)[0]
        left, values, right = np.linalg.svd(basis.T @ a, full_matrices=False)
        roots = np.sqrt(values[:rank])
        u, v = right[:rank].T * roots, (basis @ left[:, :rank] * roots / self.scale).T
        # Both sides of one size, whatever the scale's
        balance = np.sqrt(np.maximum(np.abs(v).max(1), 1e-30) / np.maximum(np.abs(u).max(0), 1e-30))
        return u * balance, v / balance[:, None]

    def _choose(self, pairs: list[tuple[np.ndarray, np.ndarray]], sweeps: int = 0) -> list[Block]:
        """The signs that go with factors (u, v), chosen together where there are several, and their blocks taken."""
        factors = [(_rounded(u), _rounded(v)) for u, v in pairs]
        sizes = [np.ascontiguousarray((u.astype(np.float32) @ v.astype(np.float32)).T) for u, v in factors]
        signs = [np.empty(self.left.shape, np.uint8) for _ in pairs]
        carried, left = self.left.copy(), self.left
        factor = self.feedback.factor[: len(left), : len(left)]
        total = 0.0
        for stop in range(len(left), 0, -_BLOCK):
            block = slice(max(0, stop - _BLOCK), stop)
            if stop < len(left):
                carried[block] += factor[block, stop:] @ left[stop:]
            total += kernels.choose_signs(
                carried[block], left[block], factor[block, block], self.feedback.roots[block],
                [size[block] for size in sizes], [chosen[block] for chosen in signs], os.cpu_count() or 1,
            )  # fmt: skip
        self.error = total
        if sweeps:
            self._again(sizes, signs, sweeps)
        return [Block(u, v, s.T.astype(bool)) for (u, v), s in zip(factors, signs, strict=True)]

    def _again(self, sizes: list[np.ndarray], signs: list[np.ndarray], sweeps: int) -> None:
        """Chooses each input's signs again for what all other inputs' errors make best, `sweeps` times over."""
        left, moments = self.left, self.feedback.moments(len(self.left))
        pull = moments @ left
        for start in (start for _ in range(sweeps) for start in range(0, len(left), _BLOCK)):
            block = slice(start, start + _BLOCK)
            moved = kernels.choose_signs_again(
                pull[block], left[block], moments[block, block], [size[block] for size in sizes],
                [chosen[block] for chosen in signs], os.cpu_count() or 1,
            )  # fmt: skip
            pull -= moments[:, block] @ moved
        self.error = float(np.einsum("ij,ij->", pull, left, dtype=np.float64))


def best_rank(weights: np.ndarray, feedback: Feedback, floor: int) -> int:
    """Of RANKS the one whose first `floor` blocks of `weights` (as Residual takes them) lose least for their bytes,
    tried until one is no better than the one before. Each matrix has its own, found on all of its rows: two rows in a
    hundred may have nearly all of the error, which a second term takes away (down_proj of Qwen2.5's block 5)."""
    outputs, inputs = weights.shape
    best, least = 1, math.inf
    for rank in RANKS:
        if rank * 64 > min(outputs, inputs):
            break
        trial = Residual(weights.copy(), feedback)
        trial.floor(floor, rank, sweeps=0)
        loss = math.log(max(trial.error, 1e-30)) + WORTH * floor * 16 * rank * (outputs + inputs) / (outputs * inputs)
        if loss > least - _SURE:
            break
        best, least = rank, loss
    return best


def _rounded(factors: np.ndarray) -> np.ndarray:
    if not np.isfinite(factors).all() or np.abs(factors).max(initial=0) > _LARGEST:
        raise ConvertError(
            "The weights cannot be stacked.", "Their factors are beyond what fp16 holds.",
            "Use another recipe for this checkpoint.",
        )  # fmt: skip
    return factors.astype(np.float16)
