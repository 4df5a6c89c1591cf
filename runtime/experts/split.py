"""Which of a layer's experts the CPU computes and which an accelerator does, where a device has both.

After HybriMoE (Zhong et al. 2025): three things run side by side, each doing one thing at a time: the CPU, which has
every expert; the accelerator, which has some, the resident ones; and the link, which brings it others. A layer is over
when the last of them is. HybriMoE's greedy goes once through the experts and looks at one at a time; `split` starts
from it and keeps partial schedules beside each other as long as one may still be the best. This module is pure: costs
are given, and nothing here knows about models, devices or clocks.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

from ..errors import UsageError

EXACT = 10  # experts up to which nothing is left out: at most 2 ** 9 partial schedules wait for the last one
_WIDTH = 64  # partial schedules that are kept beyond that


@dataclass(frozen=True)
class Costs:
    """Seconds. An expert of n rows takes the CPU `cpu` + n `cpu_row`, and `warmup` more if it is the layer's first
    there; the accelerator `accelerator` + n `accelerator_row`; to bring it over takes the link `link`. Raises
    UsageError where one is negative or not finite."""

    cpu: float
    accelerator: float
    link: float
    cpu_row: float = 0.0
    accelerator_row: float = 0.0
    warmup: float = 0.0

    def __post_init__(self):
        if not all(math.isfinite(one) and one >= 0 for one in astuple(self)):
            raise _refuse(f"{self}", "Costs are seconds from 0.", "Correct them.")


@dataclass(frozen=True)
class Split:
    """Experts, by their place in what was asked, in the order in which each computes them; the accelerator computes
    what is resident first, and the link brings the others in their order. `seconds` from the layer's start to its end.
    """

    cpu: tuple[int, ...]
    accelerator: tuple[int, ...]
    transfers: tuple[int, ...]
    seconds: float


def split(rows: Sequence[int], resident: Sequence[bool], costs: Costs) -> Split:
    """The fastest way to compute experts with these `rows` (tokens of each, from 1), of which the accelerator has those
    that are `resident`. Nothing is faster up to ten experts; beyond, it is never slower than `greedy`. Raises
    UsageError.

    One expert after the other goes to the CPU or to the accelerator in every partial schedule. One of these is left
    out if another has the CPU and the accelerator done no later with no more transfers, or if even the work that is
    left, perfectly shared, would end it after the best schedule so far: tens of them at a time, few where all rows are
    alike. O(n^2) beyond ten experts, where at most 64 are kept, evenly from the least busy CPU to the busiest.
    """
    best = greedy(rows, resident, costs)
    order, cpu, accelerator = _ordered(rows, resident, costs)
    left = sum(map(min, cpu, accelerator))
    partial = [(0.0, 0.0, 0, 0)]  # the CPU's end, the accelerator's, transfers, the accelerator's experts as bits
    for expert in order:
        left -= min(cpu[expert], accelerator[expert])
        moved = not resident[expert]
        grown = []
        for busy, end, transfers, chosen in partial:
            grown.append((busy + cpu[expert] + (0 if busy else costs.warmup), end, transfers, chosen))
            begin = max(end, (transfers + 1) * costs.link) if moved else end
            grown.append((busy, begin + accelerator[expert], transfers + moved, chosen | 1 << expert))
        able = [one for one in grown if max(one[0], one[1], (one[0] + one[1] + left) / 2) < best.seconds]
        partial = _undominated(sorted(able), len(order))
        if len(order) > EXACT and len(partial) > _WIDTH:
            partial = [partial[at * (len(partial) - 1) // (_WIDTH - 1)] for at in range(_WIDTH)]
    if not partial:
        return best
    *_, chosen = min(partial, key=lambda one: max(one[:2]))
    return assigned(rows, resident, costs, [expert for expert in order if chosen >> expert & 1])


def greedy(rows: Sequence[int], resident: Sequence[bool], costs: Costs) -> Split:
    """HybriMoE's own: in one queue are the resident experts and then the others, the most rows first in both. Who would
    be done first, the accelerator with the queue's front or the CPU with its back, takes that; ties are the
    accelerator's. Raises UsageError."""
    order, cpu, accelerator = _ordered(rows, resident, costs)
    front, back = 0, len(order)
    busy = end = arrived = 0.0
    while front < back:
        first, last = order[front], order[back - 1]
        arrives = arrived if resident[first] else arrived + costs.link
        ends = max(end, arrives) + accelerator[first]
        busy_until = busy + cpu[last] + (0 if busy else costs.warmup)
        if ends <= busy_until:
            end, arrived, front = ends, arrives, front + 1
        else:
            busy, back = busy_until, back - 1
    return assigned(rows, resident, costs, order[:front])


def assigned(rows: Sequence[int], resident: Sequence[bool], costs: Costs, experts: Collection[int]) -> Split:
    """The fastest way with just these `experts` on the accelerator. Raises UsageError.

    Transfers all take as long, so the order matters only on the accelerator, where a layer ends at the latest of
    (its first j transfers) + (what it computes from the j-th transferred expert on), over all j, and of all that it
    computes. Whoever takes longest first makes each of these sums the least: Johnson's rule (1954).
    """
    order, cpu, accelerator = _ordered(rows, resident, costs)
    on = [expert for expert in order if expert in experts]
    off = [expert for expert in reversed(order) if expert not in experts]
    arrived = end = 0.0
    for expert in on:
        arrived += 0.0 if resident[expert] else costs.link
        end = max(end, arrived) + accelerator[expert]
    busy = sum(cpu[expert] for expert in off) + (costs.warmup if off else 0.0)
    return Split(tuple(off), tuple(on), tuple(one for one in on if not resident[one]), max(busy, end))


def _ordered(rows: Sequence[int], resident: Sequence[bool], costs: Costs) -> tuple[list[int], list[float], list[float]]:
    """The experts that are resident and then the others, the most rows first; seconds of each on CPU, accelerator."""
    if len(rows) != len(resident) or any(count < 1 for count in rows):
        why = f"There are {len(rows)} of them, and {len(resident)} that are resident or not; each has a row at least."
        raise _refuse(f"experts of {list(rows)!r:.60} rows", why, "Leave out who has none.")
    order = sorted(range(len(rows)), key=lambda expert: (not resident[expert], -rows[expert], expert))
    cpu = [costs.cpu + count * costs.cpu_row for count in rows]
    return order, cpu, [costs.accelerator + count * costs.accelerator_row for count in rows]


def _undominated(ascending: list[tuple[float, float, int, int]], most: int) -> list[tuple[float, float, int, int]]:
    """Of partial schedules, the least busy CPU first, those that none before is as good as in all else."""
    kept, least = [], [math.inf] * (most + 1)  # the accelerator's earliest end with at most so many transfers
    for one in ascending:
        _, end, transfers, _ = one
        if end < least[transfers]:
            kept.append(one)
            for more in range(transfers, most + 1):
                if least[more] <= end:
                    break
                least[more] = end
    return kept


def _refuse(what: str, why: str, fix: str) -> UsageError:
    return UsageError(f"A layer cannot be split with {what}.", why, fix)
