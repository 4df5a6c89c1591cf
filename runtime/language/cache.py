"""The key-value cache: allocated once at the planned size, shared in place with every graph, one row a slot.

Layout, for each block: keys and values [slots, kv_heads, context, head_dim], the layout that GroupQueryAttention reads
and writes in place. Pages are touched when they are allocated, so what was planned is what is held, and nothing can
fail later. A slot remembers which tokens its row holds, so that a prompt that begins alike is not computed again.
"""

import mmap

import numpy as np

from ..card import Card
from ..errors import BudgetError

DTYPES: dict[str, np.dtype] = {name: np.dtype(kind) for name, kind in (("fp32", "f4"), ("fp16", "f2"), ("int8", "i1"))}


def cache_bytes(card: Card, context: int, slots: int, kind: str) -> int:
    """Bytes of a cache; each block's keys and values are whole pages."""
    row = slots * card.kv_heads * context * card.head_dim * DTYPES[kind].itemsize
    return len(card.span) * 2 * -(-row // mmap.PAGESIZE) * mmap.PAGESIZE


class Cache:
    """The buffers of the blocks that are here. `arrays[b]` is (keys, values) of the b-th of them; `held[s]` are the
    token ids that slot s holds."""

    def __init__(self, card: Card, context: int, slots: int, kind: str = "fp32"):
        self.card, self.kind, self.slots, self.context = card, kind, slots, 0
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self.resize(context)

    @property
    def bytes(self) -> int:
        return cache_bytes(self.card, self.context, self.slots, self.kind)

    def regions(self) -> list[tuple[int, int]]:
        """(address, bytes) of every buffer, to be looked up in the kernel's own accounting."""
        return [(array.ctypes.data, array.nbytes) for pair in self.arrays for array in pair]

    def resize(self, context: int) -> None:
        """Changes the length of every row, one block at a time; what rows hold below `context` is kept.

        Raises BudgetError, and leaves every block as long as it was, where the system has no memory.
        """
        if not self.arrays:
            self.arrays = [(self._buffer(context), self._buffer(context)) for _ in self.card.span]
        else:
            try:
                for block in range(len(self.arrays)):
                    self._change(block, context)
            except BudgetError:
                for changed in range(block):
                    self._change(changed, self.context)
                raise
        self.context = context
        for tokens in self.held:
            del tokens[context:]

    def _change(self, block: int, context: int) -> None:
        old, new = self.arrays[block], (self._buffer(context), self._buffer(context))
        for slot, tokens in enumerate(self.held):
            used = min(len(tokens), context, old[0].shape[2])
            for source, target in zip(old, new, strict=True):
                target[slot, :, :used] = source[slot, :, :used]
        self.arrays[block] = new

    def swap(self, a: int, b: int) -> None:
        """Exchanges two rows, so that the rows that decode together lie next to each other."""
        if a == b:
            return
        for pair in self.arrays:
            for array in pair:
                length = max(len(self.held[a]), len(self.held[b]))
                kept = array[a, :, :length].copy()
                array[a, :, :length] = array[b, :, :length]
                array[b, :, :length] = kept
        self.held[a], self.held[b] = self.held[b], self.held[a]

    def copy(self, source: int, target: int, length: int) -> None:
        """Gives slot `target` the first `length` positions of slot `source`."""
        for pair in self.arrays:
            for array in pair:
                array[target, :, :length] = array[source, :, :length]
        self.held[target] = self.held[source][:length]

    def _buffer(self, context: int) -> np.ndarray:
        dtype = DTYPES[self.kind]
        shape = (self.slots, self.card.kv_heads, context, self.card.head_dim)
        size = int(np.prod(shape)) * dtype.itemsize
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
            region = mmap.mmap(-1, max(size, 1), flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            what = f"The key-value cache for {context} tokens cannot be allocated."
            raise BudgetError(what, str(error), "Ask for a shorter context.") from None
        array = np.frombuffer(region, dtype, count=size // dtype.itemsize).reshape(shape)
        if not hasattr(mmap, "MAP_POPULATE"):
            array[...] = 0
        return array


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading ids two lists share."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # a[:low] agrees, a[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
