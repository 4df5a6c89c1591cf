"""What both sides of a split must share to the bit: how a latent is quantised and how often each symbol comes.

A bundle carries these tables as bytes, in integers and fp32, so that nothing is computed again on the other side. They
are read as hostile: lengths are compared before anything is made of them. Frequencies of a table are at least 1 and
add up to 2^14, so every symbol can be coded. Nothing here opens files or codes anything.

Little-endian, nothing between the parts and nothing behind them:
  header       20 bytes: magic, uint8 bits, uint8 (14: frequencies add up to 2^14), uint16 tables, uint32 channels,
               uint32 scales (1: one for all channels, or as many as channels)
  scales       fp32 [scales], then offsets fp32 [scales]
  of           uint16 [channels]: which table a channel's symbols have
  frequencies  uint16 [tables][2^bits]
"""

import hashlib
import struct
from functools import cached_property

import numpy as np

from ..errors import BundleError, ShoalError, UsageError
from .quantise import MAX_BITS, Quantiser

MAGIC = b"shcodec\x01"
PRECISION = 14  # of 2^12, 256 frequencies of at least 1 would take one part in 16: up to 0.8 % more bytes at 8 bits
MAX_TABLES = 1 << 10
MAX_CHANNELS = 1 << 16
_HEADER = struct.Struct("<8sBBHII")


class Tables:
    """A `quantiser` and, of each channel, `of` uint16 [channels], a row of `frequencies` uint16 [tables, 2^bits]."""

    def __init__(self, quantiser: Quantiser, of: np.ndarray, frequencies: np.ndarray):
        """Raises UsageError where they do not belong together."""
        self.quantiser = quantiser
        self.of = np.array(of, np.uint16, ndmin=1)
        self.frequencies = np.array(frequencies, np.uint16, ndmin=2)
        if problem := self._problem():
            raise UsageError("These tables cannot be used.", f"They have {problem}.", "Make them with Tables.fit.")
        for array in (self.of, self.frequencies):
            array.flags.writeable = False  # the digest says what they are

    @classmethod
    def fit(cls, quantiser: Quantiser, latents: np.ndarray, groups: np.ndarray | None = None) -> "Tables":
        """The frequencies in samples fp32 [n, channels, ...] under `quantiser`: a table for each channel, or for each
        group of channels that have the same number in `groups` [channels], from 0. Raises UsageError."""
        symbols = quantiser.quantise(latents)
        channels, levels = symbols.shape[1], 2**quantiser.bits
        of = np.arange(channels) if groups is None else np.asarray(groups)
        if of.shape != (channels,) or of.min() < 0 or of.max() >= MAX_TABLES:
            limits = f"{MAX_TABLES} tables for {channels} channels"
            raise UsageError("The channels' groups are impossible.", f"There may be {limits}.", "Group channels.")
        counts = np.zeros((int(of.max()) + 1, levels), np.int64)
        for channel, group in enumerate(of):
            counts[group] += np.bincount(symbols[:, channel].reshape(-1), minlength=levels)
        return cls(quantiser, of, np.stack([frequencies(row) for row in counts]))

    @property
    def channels(self) -> int:
        return len(self.of)

    @property
    def bits(self) -> int:
        return self.quantiser.bits

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the bytes: which tables these are."""
        return hashlib.sha256(self.to_bytes()).digest()

    def cost(self, symbols: np.ndarray) -> float:
        """Bits that symbols uint8 [n, channels, ...] take if nothing is lost: the sum of -log2 of their frequencies'
        parts. What a message has beyond that is its overhead."""
        bits = PRECISION - np.log2(self.frequencies.astype(np.float64))
        return float(sum(bits[table][symbols[:, channel]].sum() for channel, table in enumerate(self.of)))

    def to_bytes(self) -> bytes:
        """As the module says."""
        scales = self.quantiser.scales
        header = _HEADER.pack(MAGIC, self.bits, PRECISION, len(self.frequencies), self.channels, len(scales))
        parts = (scales.astype("<f4"), self.quantiser.offsets.astype("<f4"), self.of.astype("<u2"))
        return header + b"".join(part.tobytes() for part in (*parts, self.frequencies.astype("<u2")))

    @classmethod
    def from_bytes(cls, data) -> "Tables":
        """Reads untrusted bytes. Raises BundleError that says what is wrong."""
        view = memoryview(data).cast("B")
        if len(view) < _HEADER.size or view[: len(MAGIC)] != MAGIC:
            raise _refuse("do not begin as tables do")
        _, bits, precision, tables, channels, scales = _HEADER.unpack_from(view)
        if not 1 <= bits <= MAX_BITS or precision != PRECISION:
            raise _refuse(f"have {bits} bits and frequencies of {precision}")
        if not (1 <= tables <= MAX_TABLES and 1 <= channels <= MAX_CHANNELS and scales in (1, channels)):
            raise _refuse(f"have {tables} tables and {scales} scales for {channels} channels")
        counts = (4 * scales, 4 * scales, 2 * channels, 2 * tables << bits)
        if len(view) != _HEADER.size + sum(counts):
            raise _refuse(f"have {len(view)} bytes, not {_HEADER.size + sum(counts)}")
        at, parts = _HEADER.size, []
        for count, kind in zip(counts, ("<f4", "<f4", "<u2", "<u2"), strict=True):
            parts.append(np.frombuffer(view[at : at + count], kind))
            at += count
        try:
            return cls(Quantiser(bits, parts[0], parts[1]), parts[2], parts[3].reshape(tables, -1))
        except ShoalError as error:
            raise _refuse(f"are none: {error.what} {error.why}") from None

    def _problem(self) -> str:
        levels, scales = 2**self.bits, len(self.quantiser.scales)
        if self.of.ndim != 1 or not 1 <= self.channels <= MAX_CHANNELS or scales not in (1, self.channels):
            return f"{scales} scales for {self.of.shape} channels"
        if self.frequencies.ndim != 2 or not 1 <= len(self.frequencies) <= MAX_TABLES:
            return f"frequencies of shape {self.frequencies.shape}"
        if self.frequencies.shape[1] != levels:
            return f"{self.frequencies.shape[1]} frequencies for {self.bits} bits"
        if self.of.max() >= len(self.frequencies):
            return "a channel without a table"
        if not self.frequencies.all() or (self.frequencies.sum(1, np.uint64) != 1 << PRECISION).any():
            return f"frequencies that are 0 or do not add up to {1 << PRECISION}"
        return ""


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Integers of at least 1 that add up to 2^14, in proportion to `counts` int64 [levels] as far as that leaves room;
    all alike where nothing was counted. The largest remainders get what is left, of equal ones the first."""
    shares = [int(count) for count in counts]
    shares = shares if any(shares) else [1] * len(shares)
    total, room = sum(shares), (1 << PRECISION) - len(shares)
    found = [1 + share * room // total for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda level: (-(shares[level] * room % total), level))
    for level in by_remainder[: (1 << PRECISION) - sum(found)]:
        found[level] += 1
    return np.array(found, np.uint16)


def _refuse(problem: str) -> BundleError:
    return BundleError("The bundle's codec cannot be used.", f"Its tables {problem}.", "Convert the checkpoint again.")
