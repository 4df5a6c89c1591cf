"""Where a prompt is cut: how many chunks of which lengths, and what is left to the graph that takes any number.

Pure: expected seconds in, pieces out. A chunk may be padded, so a short prompt pays for a whole one only where neither
a smaller graph nor the dynamic one is faster. It knows nothing about graphs or devices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """`count` tokens from `start` on, through the graphs for chunks of `length`; 0 is the dynamic graph."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Costs:
    """Expected seconds: of one chunk of each length, and of the dynamic graph `fixed` and for each token `each`, which
    is infinite where that may not be used."""

    chunks: Mapping[int, float]
    fixed: float = 0.0
    each: float = math.inf

    def of(self, pieces: list[Piece]) -> float:
        """Of all pieces, one after the other."""
        return sum(
            self.chunks[piece.length] if piece.length else self.fixed + self.each * piece.count for piece in pieces
        )


def cut(count: int, costs: Costs) -> list[Piece]:
    """The fastest pieces for `count` tokens, in their order: long chunks, shorter ones, the last of them padded where
    need be, and at the end what goes through the dynamic graph. Of equally fast ways the one of fewest pieces."""
    # least[n]: seconds and number of chunks that hold n tokens or more, and the length of one of them
    least: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    for some in range(1, count + 1):
        ways = [
            (least[max(0, some - length)][0] + seconds, least[max(0, some - length)][1] + 1, -length)
            for length, seconds in costs.chunks.items()
        ]
        least.append(min(ways, default=(math.inf, 0, 0)))

    def whole(chunked: int) -> tuple[float, int, int]:
        seconds, pieces, _ = least[chunked]
        left = count - chunked
        return (seconds + (costs.fixed + costs.each * left if left else 0.0), pieces + bool(left), left)

    chunked = min(range(count + 1), key=whole)
    lengths, held = [], chunked
    while held > 0 and least[held][2]:
        lengths.append(-least[held][2])
        held -= lengths[-1]
    pieces, start = [], 0
    for length in sorted(lengths, reverse=True):
        if start < chunked:
            pieces.append(Piece(start, min(length, chunked - start), length))
            start += pieces[-1].count
    if start < count:
        pieces.append(Piece(start, count - start, 0))
    return pieces
