"""Thresholds of a store for a budget of bytes: a path of pairs, and the least of them that fits.

HOBBIT (Tang et al. 2024) publishes one pair, low 0.6 and skip 0.9. What a pair saves depends on how alike a router's
weights are and on who is resident, so here it is found by what it reads. This module is pure: what a pair reads is
measured by whoever asks, and nothing here knows about models, stores or text.
"""

from collections.abc import Callable

STEPS = 50  # places on the path: HOBBIT's pair is one of them, and thresholds have few digits


def pair(thrift: float, has_low: bool) -> tuple[float, float]:
    """(low, skip) of a store's options at `thrift`, from 0, which gives up nothing, to 1. With a low precision misses
    are read in it, and skipped a quarter as eagerly: 0.4 is HOBBIT's pair. Without one they are only skipped."""
    if has_low:
        return round(1 - thrift, 4), round(1 - thrift / 4, 4)
    return 1.0, round(1 - thrift, 4)


def least(read: Callable[[float], float], budget: float, steps: int = STEPS) -> float | None:
    """The least thrift whose `read` (bytes) is at most `budget`, by bisection between 0 and 1 in `steps` steps; None if
    1 is not enough. `read` should fall as thrift rises, and need not fall strictly. Where it falls only by and large,
    since it was measured, what is returned was still measured to fit; at most 2 + log2(steps) + 1 calls."""
    if read(0.0) <= budget:
        return 0.0
    if read(1.0) > budget:
        return None
    above, fits = 0, steps
    while fits - above > 1:
        middle = (above + fits) // 2
        if read(middle / steps) <= budget:
            fits = middle
        else:
            above = middle
    return fits / steps
