"""One graph, one cache: token ids and positions in, logits out.

Prefill and decode are the same graph with other shapes. Everything it reads and writes lies in buffers that are made
once and bound: the cache in place, rotary tables, and for each shape in use the small inputs and the logits. It knows
nothing about text, sampling or requests.
"""

from collections import OrderedDict

import numpy as np

from ..card import Card, Rope
from ..errors import BackendError
from ..session import Session
from .cache import Cache

_KEPT = 8  # shapes whose bindings stay: decode batches and the full chunk


class Decoder:
    """`graph` is an open session of the decode role; `chunk` is the most tokens that one prefill step takes."""

    def __init__(self, graph: Session, card: Card, cache: Cache, chunk: int):
        self.graph, self.card, self.cache, self.chunk = graph, card, cache, chunk
        self._bound: OrderedDict[tuple, _Bound] = OrderedDict()
        self.tables = [rotary(rope, cache.context) for rope in card.ropes]
        self.logits = np.zeros((cache.slots, card.vocab), np.float32)

    def forward(self, slot: int, tokens: np.ndarray, starts: list[int], rows: list[int]) -> np.ndarray:
        """Runs tokens int64 [batch, n], row b of them at positions starts[b].. of slot + b.

        Returns fp32 logits [len(rows), vocab] of the chosen flattened positions; the next call writes over them.
        Raises BackendError where the model gives what is not a number.
        """
        batch, count = tokens.shape
        key = (slot, batch, count, len(rows))
        bound = self._bound.get(key)
        if bound is None:
            while len(self._bound) >= _KEPT:
                self._bound.popitem(last=False)
            bound = self._bound[key] = _Bound(self, *key)
        self._bound.move_to_end(key)
        bound.tokens[...] = tokens
        bound.rows[...] = rows
        bound.last[...] = [start + count - 1 for start in starts]
        bound.total[0] = max(starts) + count
        bound.binding.run()
        if rows and not np.isfinite(bound.logits[:, 0]).all():
            raise BackendError(
                "The model gave logits that are not numbers.", "An activation overflowed or a weight is damaged.",
                "Verify the bundle (shoal inspect --verify); convert again with a wider format.",
            )  # fmt: skip
        return bound.logits

    def resize(self, context: int) -> None:
        """Changes the cache's length; bindings of the old buffers are dropped first, so that they are freed."""
        self._bound.clear()
        self.cache.resize(context)
        self.tables = [rotary(rope, context) for rope in self.card.ropes]

    def close(self) -> None:
        self._bound.clear()
        self.graph.close()


class _Bound:
    """The inputs and outputs of one shape, bound."""

    def __init__(self, decoder: Decoder, slot: int, batch: int, count: int, rows: int):
        self.tokens = np.zeros((batch, count), np.int64)
        self.rows = np.zeros(rows, np.int64)
        self.last = np.zeros(batch, np.int32)
        self.total = np.zeros(1, np.int32)
        # One buffer for every shape; only who measures a model wants more rows than there are slots
        shared = rows <= len(decoder.logits)
        self.logits = decoder.logits[:rows] if shared else np.zeros((rows, decoder.card.vocab), np.float32)
        self.binding = binding = decoder.graph.bind()
        for name, array in (("tokens", self.tokens), ("rows", self.rows), ("last", self.last), ("total", self.total)):
            binding.input(name, array)
        for index, (cos, sin) in enumerate(decoder.tables):
            binding.input(f"cos_{index}", cos)
            binding.input(f"sin_{index}", sin)
        for block, pair in enumerate(decoder.cache.arrays):
            for part, array in zip(("key", "value"), pair, strict=True):
                view = array[slot : slot + batch]
                binding.input(f"past_{part}_{block}", view)
                binding.output(f"present_{part}_{block}", view)
        binding.output("logits", self.logits)


def rotary(rope: Rope, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines fp32 [context, pairs] (Su et al. 2021), angles taken in double."""
    angles = np.outer(np.arange(context, dtype=np.float64), np.array(rope.inverse_frequencies, np.float64))
    return (np.cos(angles) * rope.scale).astype(np.float32), (np.sin(angles) * rope.scale).astype(np.float32)


def rotary_bytes(card: Card, context: int) -> int:
    """Bytes of the rotary tables of all ropes."""
    return sum(2 * 4 * context * len(rope.inverse_frequencies) for rope in card.ropes)
