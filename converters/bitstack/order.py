"""In which order the steps of a stack come, so that every prefix of it is the best model of its size.

Pure functions over counts: how many steps each matrix has. `first` are the counts of the smallest model, `tops` those
of the whole, `bytes_of` what each step of each matrix adds, `levels` which level of the ladder it brings the matrix to:
not every one stops at all of them. What must be measured comes in as a function of counts. A matrix's own steps always
keep their order. They return the matrices of all steps, those of the smallest model first.
"""

import heapq
import math
import random
from collections.abc import Callable, Sequence

Counts = Sequence[int]
Measure = Callable[[list[int]], float]


def shuffled(first: Counts, tops: Counts, seed: int = 0) -> list[int]:
    """At random: the least that any other order has to beat."""
    rest = _repeat([top - start for start, top in zip(first, tops, strict=True)])
    random.Random(seed).shuffle(rest)
    return _repeat(first) + rest


def gains(
    first: Counts, levels: Sequence[Counts], perplexity: Measure
) -> dict[tuple[int, int], tuple[float, float]]:  # fmt: skip
    """What `average` and `greedy` sort by: for each matrix and its count c the perplexities of the model in which every
    matrix is at the same level (or as near to it as it may), and of that in which this one has c + 1."""
    found = {}
    for level in sorted({one for start, own in zip(first, levels, strict=True) for one in own[start:]}):
        counts = [max(start, sum(one < level for one in own)) for start, own in zip(first, levels, strict=True)]
        before = perplexity(counts)
        for at, (count, own) in enumerate(zip(counts, levels, strict=True)):
            if level in own[count:]:
                raised = [one + (at == other) for other, one in enumerate(counts)]
                found[at, count] = before, perplexity(raised)
    return found


def average(
    first: Counts, levels: Sequence[Counts], measured: dict[tuple[int, int], tuple[float, float]]
) -> list[int]:  # fmt: skip
    """The paper's: level by level, and in a level whichever step leaves the lowest perplexity first (Wang et al. 2024),
    so that matrices differ by one level at most. What is not a number comes last."""
    order = sorted(measured, key=lambda step: (levels[step[0]][step[1]], _number(measured[step][1]), step[0]))
    return _repeat(first) + [matrix for matrix, _ in order]


def greedy(
    first: Counts, tops: Counts, bytes_of: Sequence[Counts], measured: dict[tuple[int, int], tuple[float, float]]
) -> list[int]:
    """Whichever step took most off the logarithm of the perplexity for each byte first, whatever its level."""

    def gain(matrix: int, count: int) -> float:
        before, after = measured[matrix, count]
        return _number(math.log(before) - math.log(after), -math.inf) if before > 0 and after > 0 else -math.inf

    return by_gain(first, tops, bytes_of, gain)


def by_gain(
    first: Counts, tops: Counts, bytes_of: Sequence[Counts], gain: Callable[[int, int], float]
) -> list[int]:  # fmt: skip
    """Steps by what they gain for each byte, `gain(matrix, count)` for the step after `count`. Steps of one matrix that
    gain more than those before them are taken as one with these, so that none waits behind a poor one."""
    waiting = [_falling(gain, matrix, range(start, top), bytes_of[matrix])
               for matrix, (start, top) in enumerate(zip(first, tops, strict=True))]  # fmt: skip
    order = _repeat(first)
    heads = [(-own[0][0] / own[0][1], matrix, 0) for matrix, own in enumerate(waiting) if own]
    heapq.heapify(heads)
    while heads:
        _, matrix, at = heapq.heappop(heads)
        order += [matrix] * waiting[matrix][at][2]
        if at + 1 < len(waiting[matrix]):
            more, size, _ = waiting[matrix][at + 1]
            heapq.heappush(heads, (-more / size, matrix, at + 1))
    return order


def by_level(
    first: Counts, levels: Sequence[Counts], bytes_of: Sequence[Counts], gain: Callable[[int, int], float]
) -> list[int]:  # fmt: skip
    """Like `by_gain`, but level by level as `average`: matrices differ by one level at most."""
    steps = [
        (own[count], -gain(matrix, count) / bytes_of[matrix][count], matrix)
        for matrix, (low, own) in enumerate(zip(first, levels, strict=True))
        for count in range(low, len(own))
    ]
    return _repeat(first) + [matrix for *_, matrix in sorted(steps)]


def blended(early: Sequence[float], late: Sequence[float], bytes_of: Sequence[float]) -> list[float]:
    """What steps of different matrices gain where they are taken one after the other: `early` before all others, `late`
    after them. A share of the bytes t into it, a step gains (1 - sqrt t) early + sqrt t late, and whichever gains most
    for each byte comes next. Measured on Gemma 3 and Qwen2.5: early alone is best near the floor and worst beyond."""
    left, gone, total = set(range(len(early))), 0.0, float(sum(bytes_of)) or 1.0
    found, least = [0.0] * len(early), math.inf
    while left:
        share = math.sqrt(gone / total)
        rates = {at: ((1 - share) * early[at] + share * late[at]) / bytes_of[at] for at in left}
        best = max(left, key=lambda at: (rates[at], -at))
        least = min(least, rates[best])  # who comes later never seems to gain more
        found[best] = least * bytes_of[best]
        gone += bytes_of[best]
        left.remove(best)
    return found


def _falling(gain, matrix: int, counts: range, bytes_of: Counts) -> list[tuple[float, int, int]]:
    """A matrix's steps as runs (gain, bytes, steps) that fall in what they gain for each byte."""
    runs: list[tuple[float, int, int]] = []
    for count in counts:
        runs.append((gain(matrix, count), bytes_of[count], 1))
        while len(runs) > 1 and runs[-1][0] * runs[-2][1] >= runs[-2][0] * runs[-1][1]:
            (more, size, steps), (less, before, earlier) = runs.pop(), runs.pop()
            runs.append((less + more, before + size, earlier + steps))
    return runs


def _repeat(counts: Counts) -> list[int]:
    return [matrix for matrix, count in enumerate(counts) for _ in range(count)]


def _number(value: float, otherwise: float = math.inf) -> float:
    return value if math.isfinite(value) else otherwise
