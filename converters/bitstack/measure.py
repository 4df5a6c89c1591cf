"""What a stacked model is worth at any of its sizes, before there is a bundle: its perplexity, and how far it is from
itself with all its steps.

The graph is the one that a device runs, by the same kernels. Texts are short, since sorting asks often. It knows
nothing about what its figures are for.
"""

import math
from collections.abc import Sequence

import numpy as np

from shoal.runtime.card import Card
from shoal.runtime.language.cache import Cache
from shoal.runtime.language.decoder import Decoder
from shoal.runtime.session import Session

from .stacks import Stacks

CHUNK = 128  # tokens of a step, and rows of logits held at once


class Meter:
    """`opened` is the whole graph, `rows` token ids int64 [n] of each text; figures are of every `stride`-th token."""

    def __init__(self, opened: Session, card: Card, stacks: Stacks, rows: Sequence[np.ndarray], stride: int = 1):
        self.stacks, self.rows, self.stride = stacks, rows, stride
        cache = Cache(card, max(map(len, rows)), 1)
        self._decoder = Decoder(opened, card, cache, CHUNK, {"stack": stacks.handle})
        self._reference: list[np.ndarray] = []

    def perplexity(self, counts: Sequence[int]) -> float:
        """With the first `counts` steps of each matrix; infinite where the model gives what is not a number."""
        loss, number = 0.0, 0
        for tokens, start, found in self._logits(counts):
            at = np.arange(start, start + len(found) * self.stride, self.stride)
            within = at + 1 < len(tokens)
            losses = found[np.arange(len(found))[within], tokens[at[within] + 1]]
            loss, number = loss - float(losses.sum(dtype=np.float64)), number + int(within.sum())
        mean = loss / max(number, 1)
        return math.exp(mean) if mean < 700 else math.inf

    def divergence(self, counts: Sequence[int]) -> float:
        """KL(all steps || `counts`) in nats a token."""
        if not self._reference:
            tops = [len(one.steps) for one in self.stacks.matrices]
            self._reference = [found.copy() for _, _, found in self._logits(tops)]
        total, number = 0.0, 0
        for (_, _, found), expected in zip(self._logits(counts), self._reference, strict=True):
            total += float((np.exp(expected) * (expected - found)).sum(dtype=np.float64))
            number += len(found)
        return max(total / number, 0.0)

    def _logits(self, counts: Sequence[int]):
        """Of each text and chunk: its tokens, the first position, and log-probabilities fp32 [positions, vocab]."""
        self.stacks.set(counts)
        for tokens in self.rows:
            for start in range(0, len(tokens), CHUNK):
                part = tokens[None, start : start + CHUNK]
                chosen = list(range(0, part.shape[1], self.stride))
                found = self._decoder.forward(0, part, [start], chosen)
                found -= found.max(-1, keepdims=True)
                found -= np.log(np.exp(found).sum(-1, keepdims=True))
                yield tokens, start, found
