"""Latents as a message, and back: quantised, rANS-coded, under a tag that says with which tables.

A message is 4 bytes of tag, the number of latents, and coded symbols (rans.py). The tag is the beginning of a SHA-256
over the tables and the latent's shape, so a side with others refuses at once; nothing else about the latents is on the
wire, and the number is compared with what the caller expects before anything is allocated. A message that decodes is
one that an encoder makes of what it decodes to; that nobody changed it on its way is for the link to say, which is
authenticated. After the entropic student (Matsubara et al. 2022), whose tables are fixed when the model is converted.
It opens no files and no connections.
"""

import hashlib
import math

import numpy as np

from ..errors import LinkError, UsageError
from .quantise import checked
from .rans import Coder
from .tables import Tables

TAG = 4  # bytes
MAX_ELEMENTS = 1 << 28  # of one latent
MAX_COUNT = 1 << 28  # of latents in a message: four bytes of seven bits


class Codec:
    """Latents fp32 [n, *shape]; shape is (channels, ...), of any rank from 1. Free to be used by several threads."""

    def __init__(self, tables: Tables, shape: tuple[int, ...]):
        """Raises UsageError where `tables` are of other channels, or the shape is impossible."""
        shape = tuple(shape)
        if not shape or min(shape) < 1 or math.prod(shape) > MAX_ELEMENTS or len(shape) > 8:
            raise UsageError(f"A latent cannot have the shape {shape}.", "Of each dimension there is at least 1, and "
                             f"{MAX_ELEMENTS} elements are the most.", "Correct the shape.")  # fmt: skip
        if shape[0] != tables.channels:
            raise UsageError(f"The tables have {tables.channels} channels.", f"The latent has {shape[0]}.",
                             "Use the tables of this latent.")  # fmt: skip
        self.tables, self.shape = tables, shape
        said = tables.digest + np.array(shape, "<u4").tobytes()
        self.tag = hashlib.sha256(said).digest()[:TAG]
        self._coder = Coder(tables, shape)

    def encode(self, latents: np.ndarray) -> bytes:
        """The message of latents fp32 [n, *shape], n from 1. Raises UsageError for anything else, NaN and infinities
        too; values beyond the quantiser's range are clipped to it."""
        latents = checked(latents)
        if latents.shape[1:] != self.shape or len(latents) >= MAX_COUNT:
            wanted = f"[n, {', '.join(map(str, self.shape))}]"
            raise UsageError(f"The latents have shape {list(latents.shape)}.", f"It must be {wanted}.", "Reshape them.")
        return self.tag + _number(len(latents)) + self._coder.encode(self.tables.quantiser.quantise(latents))

    def decode(self, data, most: int = 1) -> np.ndarray:
        """The latents fp32 [n, *shape] of a message from a peer, n at most `most`: the levels of their symbols. Raises
        LinkError for anything that `encode` of the same tables and shape does not make."""
        count, at = self._begin(data, most)
        symbols = self._coder.decode(memoryview(data).cast("B")[at:], count)
        if symbols is None:
            raise _refuse(f"does not decode to {count} latents of shape {list(self.shape)}")
        return self.tables.quantiser.dequantise(symbols)

    def count(self, data, most: int = 1) -> int:
        """How many latents a message says that it holds, before any is decoded. Raises LinkError where its tag is not
        these tables' and shape's, or there are more than `most`."""
        return self._begin(data, most)[0]

    def longest(self, count: int) -> int:
        """Bytes that a message of `count` latents can have at most: a symbol takes up to 14 bits, a state 4 bytes."""
        return TAG + 4 + 16 + 2 * count * math.prod(self.shape)

    def _begin(self, data, most: int) -> tuple[int, int]:
        """(number of latents, where their symbols begin)"""
        view = memoryview(data).cast("B")
        if view[:TAG] != self.tag:
            raise _refuse("was made with other tables, for another shape, or is no latent", "Give both sides the same "
                          "version of the model.")  # fmt: skip
        count, at = 0, TAG
        while at < min(len(view), TAG + 4):
            count |= (view[at] & 127) << 7 * (at - TAG)
            at += 1
            if view[at - 1] < 128:
                break
        else:
            raise _refuse("does not say how many latents it holds")
        if not count or view[at - 1] == 0:
            raise _refuse("says in an impossible way how many latents it holds")
        if count > most:
            raise _refuse(f"says it holds {count} latents, and {most} were expected at most")
        return count, at


def _number(value: int) -> bytes:
    """Seven bits a byte, the low ones first, the highest bit set where more follow."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _refuse(problem: str, fix: str = "Send the latent again.") -> LinkError:
    return LinkError("A peer's latent cannot be decoded.", f"The message {problem}.", fix)
