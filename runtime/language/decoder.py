"""One graph, one cache: token ids and positions in, logits out; of a part of a model the stream in, or out, or both.

Prefill and decode are the same graph with other shapes. Everything it reads and writes lies in buffers that are made
once and bound: the cache in place, rotary tables, and for each shape in use the small inputs and the logits. It knows
nothing about text, sampling or requests.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import measure
from ..card import Card, Rope
from ..errors import BackendError
from ..session import Session
from .cache import Cache

if TYPE_CHECKING:
    from ..static.prefill import Prefill

_KEPT = 8  # shapes whose bindings stay: decode batches and the full chunk


class Decoder:
    """`graph` is an open session of the decode role; `chunk` is the most tokens that one prefill step takes; `handles`
    name what lies outside of the graph, by its inputs: the `stack` it multiplies by, the store of its `experts`."""

    def __init__(self, graph: Session, card: Card, cache: Cache, chunk: int, handles: Mapping[str, int] | None = None):
        self.graph, self.card, self.cache, self.chunk = graph, card, cache, chunk
        self.handles = {name: np.array([handle], np.int64) for name, handle in (handles or {}).items()}
        self.prefill: Prefill | None = None  # takes prompts in fixed chunks, where the bundle has graphs for that
        self._bound: OrderedDict[tuple, _Bound] = OrderedDict()
        self.tables = [rotary(rope, cache.context) for rope in card.ropes]
        self.logits = np.zeros((cache.slots if card.has_head else 0, card.vocab), np.float32)
        # What a part takes and gives, one buffer each for every shape
        self.taken, self.given = (np.zeros(size // 4, np.float32) for size in stream_bytes(card, chunk, cache.slots))

    def forward(self, slot: int, x: np.ndarray, starts: list[int], rows: list[int]) -> np.ndarray:
        """Runs `x`, row b of it at positions starts[b].. of slot + b: token ids int64 [batch, n] or, in a part that
        begins later, the stream fp32 [batch, n, hidden].

        Returns fp32 logits [len(rows), vocab] of the chosen flattened positions or, of a part that ends early, the
        stream fp32 [batch, n, hidden]; the next call writes over them. Raises BackendError where the model gives what
        is not a number.
        """
        batch, count = x.shape[:2]
        key = (slot, batch, count, len(rows))
        bound = self._bound.get(key)
        if bound is None:
            while len(self._bound) >= _KEPT:
                self._bound.popitem(last=False)
            bound = self._bound[key] = _Bound(self, *key)
        self._bound.move_to_end(key)
        bound.x[...] = x
        bound.rows[...] = rows
        bound.last[...] = [start + count - 1 for start in starts]
        bound.total[0] = max(starts) + count
        bound.binding.run()
        if not np.isfinite(bound.y[:, 0] if self.card.has_head else bound.y).all():
            raise BackendError(
                "The model gave what is not a number.", "An activation overflowed or a weight is damaged.",
                "Verify the bundle (shoal inspect --verify); convert again with a wider format.",
            )  # fmt: skip
        return bound.y

    def most(self, alone: bool) -> int:
        """The most tokens of a prompt that one `take` should be given, where nobody waits for it but who asks
        (`alone`), or others do."""
        return self.chunk if self.prefill is None else self.prefill.most(alone)

    def take(self, slot: int, ids: Sequence[int], start: int, last: bool) -> np.ndarray:
        """Takes a prompt's `ids` at positions `start`.. of `slot`, and gives logits fp32 [1, vocab] behind the `last`
        one where they are wanted, [0, vocab] elsewhere; the next call writes over them. Errors are forward's."""
        if self.prefill is not None:
            return self.prefill.forward(self, slot, ids, start, last)
        return self.forward(slot, np.array([ids], np.int64), [start], [len(ids) - 1] if last else [])

    def resize(self, context: int) -> None:
        """Changes the cache's length; bindings of the old buffers are dropped first, so that they are freed."""
        self._bound.clear()
        self.cache.resize(context)
        self.tables = [rotary(rope, context) for rope in self.card.ropes]

    def measure(self) -> dict[str, int | None]:
        """Bytes that the rows of the plan that are here hold now, as `Loaded.measure` has them."""
        sizes = [measure.range_rss(*region) for region in self.cache.regions()]
        held = None if None in sizes else sum(size or 0 for size in sizes)
        tables = sum(array.nbytes for pair in self.tables for array in pair)
        own = {} if self.prefill is None else self.prefill.measure()
        return {"key-value cache": held, "rotary tables": tables} | own

    def close(self) -> None:
        self._bound.clear()
        if self.prefill is not None:
            self.prefill.close()
        self.graph.close()


class _Bound:
    """The inputs and outputs of one shape, bound."""

    def __init__(self, decoder: Decoder, slot: int, batch: int, count: int, rows: int):
        card = decoder.card
        stream = (batch, count, card.hidden)
        taken, given = (buffer[: math.prod(stream)] for buffer in (decoder.taken, decoder.given))
        self.x = taken.reshape(stream) if card.span.start else np.zeros((batch, count), np.int64)
        self.rows = np.zeros(rows, np.int64)
        self.last = np.zeros(batch, np.int32)
        self.total = np.zeros(1, np.int32)
        # One buffer for every shape; only who measures a model wants more rows than there are slots
        shared = rows <= len(decoder.logits)
        logits = decoder.logits[:rows] if shared else np.zeros((rows, card.vocab), np.float32)
        self.y = logits if card.has_head else given.reshape(stream)
        self.binding = binding = decoder.graph.bind()
        binding.input("hidden" if card.span.start else "tokens", self.x)
        for name, array in (("last", self.last), ("total", self.total)):
            binding.input(name, array)
        for name, handle in decoder.handles.items():
            binding.input(name, handle)
        for index, (cos, sin) in enumerate(decoder.tables):
            binding.input(f"cos_{index}", cos)
            binding.input(f"sin_{index}", sin)
        for block, pair in zip(card.span, decoder.cache.arrays, strict=True):
            for part, array in zip(("key", "value"), pair, strict=True):
                view = array[slot : slot + batch]
                binding.input(f"past_{part}_{block}", view)
                binding.output(f"present_{part}_{block}", view)
        if card.has_head:
            binding.input("rows", self.rows)
            binding.output("logits", self.y)
        else:
            binding.output("hidden_out", self.y)


def rotary(rope: Rope, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines fp32 [context, pairs] (Su et al. 2021), angles taken in double."""
    angles = np.outer(np.arange(context, dtype=np.float64), np.array(rope.inverse_frequencies, np.float64))
    return (np.cos(angles) * rope.scale).astype(np.float32), (np.sin(angles) * rope.scale).astype(np.float32)


def stream_bytes(card: Card, chunk: int, slots: int) -> tuple[int, int]:
    """Bytes of the buffers for the stream that a part takes and gives."""
    size = 4 * max(chunk, slots) * card.hidden
    return (size if card.span.start else 0), (0 if card.has_head else size)


def rotary_bytes(card: Card, context: int) -> int:
    """Bytes of the rotary tables of all ropes."""
    return sum(2 * 4 * context * len(rope.inverse_frequencies) for rope in card.ropes)
