"""rANS (Duda 2013, arXiv:1311.2540) of symbols with fixed integer frequencies: the kernels where they are, and their
twin in Python, byte for byte the same.

A state is an integer x >= 0. To code a symbol with frequency f, of 2^14, whose interval begins at s takes x to
(x // f << 14) + x % f + s, which is undone exactly; so the last symbol is coded first. A state that would pass 32 bits
gives its low 16 away as a word, and takes it back when it falls below 2^16.

Below 2^15 symbols there is one state. It begins at 1021, not at 2^16, and is written in as few bytes as it needs: a
tiny latent does not pay for a state. From 2^15 on there are four, symbol i is coded with state i % 4, each begins at
2^16 and takes 4 bytes: they do not wait for each other, so a processor works on several at once. Bytes: the states,
then the words in the order in which a decoder takes them, all little-endian.

Coded bytes and symbols correspond one to one: a decoder that is not back where the encoder began, with every byte
used, was given what no encoder made, and says so. That is why one state does not begin at 0, which would save some
bits: a state that runs out of words falls, often to 0, and stays, so bytes that were cut would pass; hardly any come
to stay at a certain prime. It knows nothing about messages or latents.
"""

import ctypes

import numpy as np

from .. import kernels
from .tables import PRECISION, Tables

MANY = 1 << 15  # symbols from which on there are LANES states
LANES = 4
_LOW, _ALONE = 1 << 16, 1021
_PIECE = 1 << 16  # symbols whose frequencies the twin has in a list at once; a multiple of LANES


class Coder:
    """Codes symbols uint8 [n, *shape], whose first dimension after n is the channel."""

    def __init__(self, tables: Tables, shape: tuple[int, ...]):
        frequencies = tables.frequencies.astype(np.uint32)
        starts = np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies
        self.shape = shape
        self._bits, self._of = tables.bits, tables.of
        self._symbols = frequencies | starts << 16
        levels = np.tile(np.arange(frequencies.shape[1], dtype=np.uint8), len(frequencies))
        self._slots = np.repeat(levels, frequencies.reshape(-1)).reshape(len(frequencies), -1)

    def encode(self, symbols: np.ndarray) -> bytes:
        """Symbols uint8 [n, *shape], each below 2^bits."""
        symbols = np.ascontiguousarray(symbols, np.uint8)
        if not kernels.available():
            return self._encode(symbols)
        room = np.empty(2 * symbols.size + 4 * lanes(symbols.size), np.uint8)
        size = ctypes.c_int64()
        kernels.call(
            "shoal_rans_encode", *self._format(len(symbols)), _at(self._of), _at(self._symbols), _at(symbols),
            _at(room), ctypes.c_int64(room.size), ctypes.byref(size),
        )  # fmt: skip
        return room[room.size - size.value :].tobytes()

    def decode(self, data, count: int) -> np.ndarray | None:
        """Symbols [count, *shape], or None where no encoder made these bytes."""
        data = np.frombuffer(data, np.uint8)
        symbols = np.empty((count, *self.shape), np.uint8)
        if not kernels.available():
            return symbols if self._decode(data.tobytes(), symbols.reshape(-1)) else None
        right = ctypes.c_int()
        kernels.call(
            "shoal_rans_decode", *self._format(count), _at(self._of), _at(self._symbols), _at(self._slots), _at(data),
            ctypes.c_int64(data.size), _at(symbols), ctypes.byref(right),
        )  # fmt: skip
        return symbols if right.value else None

    def _format(self, count: int) -> tuple:
        inner = ctypes.c_int64(int(np.prod(self.shape[1:], dtype=np.int64)))
        return ctypes.c_int(self._bits), ctypes.c_int64(count), ctypes.c_int64(self.shape[0]), inner

    # The twin

    def _tables(self, first: int, last: int) -> np.ndarray:
        """The table of each element from `first` up to `last`."""
        inner = int(np.prod(self.shape[1:], dtype=np.int64))
        return self._of[np.arange(first, last) // inner % self.shape[0]]

    def _encode(self, symbols: np.ndarray) -> bytes:
        symbols = symbols.reshape(-1)
        many = lanes(symbols.size)
        states, words = _first(many), []
        for first in reversed(range(0, symbols.size, _PIECE)):
            last = min(first + _PIECE, symbols.size)
            packed = self._symbols[self._tables(first, last), symbols[first:last]]
            both = zip(range(last - 1, first - 1, -1), packed[::-1].tolist(), strict=True)
            for i, one in both:
                x, frequency = states[i % many], one & 0xFFFF
                if x >= frequency << 32 - PRECISION:
                    words.append(x & 0xFFFF)
                    x >>= 16
                quotient, rest = divmod(x, frequency)
                states[i % many] = (quotient << PRECISION) + rest + (one >> 16)
        size = (states[0].bit_length() + 7) // 8 if many == 1 else 4
        return b"".join(x.to_bytes(size, "little") for x in states) + np.array(words[::-1], "<u2").tobytes()

    def _decode(self, data: bytes, symbols: np.ndarray) -> bool:
        many, size = lanes(symbols.size), len(data)
        head = 4 * many if many > 1 else size if size <= 4 else 4 - size % 2
        if size < head or (size - head) % 2 or (many == 1 and head and not data[head - 1]):
            return False
        states = [int.from_bytes(data[at : min(at + 4, head)], "little") for at in range(0, 4 * many, 4)]
        if many > 1 and min(states) < _LOW:
            return False
        words = iter(np.frombuffer(data, "<u2", offset=head).tolist())
        mask = (1 << PRECISION) - 1
        slots, packed = self._slots.data.cast("B"), self._symbols.data.cast("B").cast("I")
        for first in range(0, symbols.size, _PIECE):
            last = min(first + _PIECE, symbols.size)
            found = []
            for i, table in zip(range(first, last), self._tables(first, last).tolist(), strict=True):
                x = states[i % many]
                slot = x & mask
                symbol = slots[table << PRECISION | slot]
                one = packed[table << self._bits | symbol]
                x = (one & 0xFFFF) * (x >> PRECISION) + slot - (one >> 16)
                if x < _LOW:
                    word = next(words, None)
                    if word is not None:
                        x = x << 16 | word
                    elif many > 1:
                        return False
                states[i % many] = x
                found.append(symbol)
            symbols[first:last] = found
        return states == _first(many) and next(words, None) is None


def lanes(symbols: int) -> int:
    """States that so many symbols are coded with."""
    return 1 if symbols < MANY else LANES


def _first(many: int) -> list[int]:
    return [_ALONE if many == 1 else _LOW] * many


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
