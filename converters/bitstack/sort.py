"""The order of a stack as a recipe wants it, and the others that come for nothing or are asked for.

The proxy: the model is measured twice for each matrix on some hundred tokens. With this one alone at its least, what
that costs in divergence for each unit of its products' error says how much the rest of the model minds; the calibrated
error of every other step is known already. With this one alone a step above its least, the first step's gain is seen
among matrices that are at their least too, as it is where this step comes early. Steps go level by level, in a level by
what they gain for each byte. What the least models gain is another thing for every piece of text, so several pieces
make an order each, and text that calibrated nothing says which is best. So it needs some short runs a matrix where
the paper's order needs a longer one for each of its steps.
"""

import math
from collections.abc import Collection, Iterable, Sequence

from shoal.runtime.events import Event, Progress, silent

from . import order
from .measure import Meter
from .stacks import Stacks, step_bytes

_LEAST = 1e-12
_JUDGED = (0.05, 0.1, 0.2)
# What a model half on one rung and half on the next has above the line between the two (measured: 1.6 % of the
# perplexity on Qwen): a rung no further above it than that is still worth stopping at
_MIXED = 0.02


def orders(
    stacks: Stacks, wanted: Collection[str], short: Iterable[Meter], long: Meter, judge: Meter | None = None,
    progress: Progress = silent,
) -> dict[str, list[int]]:  # fmt: skip
    """The orders `wanted`, by name: proxy, of those by each of the `short` meters the one that the `judge` finds best
    (without one the first); average and greedy, which share their runs, by the `long` one; random."""
    first, levels, tops = stacks.floors, stacks.levels, [len(one.steps) for one in stacks.matrices]
    sizes = [step_bytes(one) for one in stacks.matrices]
    found = {}
    if "random" in wanted:
        found["random"] = order.shuffled(first, tops)
    if "proxy" in wanted:
        made = [_proxy(stacks, meter, progress) for meter in short]
        found["proxy"] = _best(stacks, made, judge, progress) if judge is not None and len(made) > 1 else made[0]
    if "average" in wanted or "greedy" in wanted:
        total, done = sum(tops) - sum(first), 0

        def perplexity(counts: list[int]) -> float:
            nonlocal done
            progress(Event("sort", min(done, total), total, "perplexities", "steps"))
            done += 1
            return long.perplexity(counts)

        measured = order.gains(first, levels, perplexity)
        progress(Event("sort", total, total, "", "steps"))
        found["average"] = order.average(first, levels, measured)
        found["greedy"] = order.greedy(first, tops, sizes, measured)
    return found


def _proxy(stacks: Stacks, meter: Meter, progress: Progress) -> list[int]:
    first, tops = stacks.floors, [len(one.steps) for one in stacks.matrices]
    sizes = [step_bytes(one) for one in stacks.matrices]
    weights, begun = sensitivities(stacks, meter, progress)

    def late(matrix: int, count: int) -> float:
        errors = stacks.errors[matrix]
        return weights[matrix] * (errors[count] - errors[count + 1])

    rising = [at for at, top in enumerate(tops) if top > first[at]]
    last = [late(at, first[at]) for at in rising]
    spent = [sizes[at][first[at]] for at in rising]
    begin = dict(zip(rising, order.blended([begun[at] for at in rising], last, spent), strict=True))

    def gain(matrix: int, count: int) -> float:
        return begin[matrix] if count == first[matrix] else late(matrix, count)

    # Each level was made for inputs that the same level gives; gains alone, whatever the level, lose against that
    # (measured: 2 % on Qwen and 7 % on Gemma for a hybrid at three bits, 4 % on Qwen for blocks at two)
    return order.by_level(first, stacks.levels, sizes, gain)


def _best(stacks: Stacks, orders: Sequence[list[int]], judge: Meter, progress: Progress) -> list[int]:
    """The order of least perplexity at the `_JUDGED` parts of the rungs' bytes, where orders differ most."""
    floors, whole = stacks.floors, stacks.counts(stacks.ladder.floor + max(1, len(stacks.ladder.rungs)))
    sizes = [step_bytes(one) for one in stacks.matrices]
    level = sum(sum(own[low:top]) for own, low, top in zip(sizes, floors, whole, strict=True))
    losses, total = list[float](), len(orders) * len(_JUDGED)
    for found in orders:
        loss = 0.0
        for part in _JUDGED:
            progress(Event("sort", len(losses) * len(_JUDGED), total, "orders", "perplexities"))
            counts, room = list(floors), part * level
            for matrix in found[sum(floors) :]:
                room -= sizes[matrix][counts[matrix]]
                if room < 0:
                    break
                counts[matrix] += 1
            loss += math.log(judge.perplexity(counts))
        losses.append(loss)
    progress(Event("sort", total, total, "", "perplexities"))
    return orders[losses.index(min(losses))]


def drop_rivals(stacks: Stacks, judge: Meter, progress: Progress = silent) -> None:
    """Drops the rungs of no more bits than the first blocks that lie clearly above the line between those beside them,
    bytes against the logarithm of the perplexity of the model that has them everywhere: whoever goes from less to more
    is as well off without. By matrices' errors that is not to be seen (`worthwhile`)."""
    floor, rivals = stacks.ladder.floor, stacks.ladder.rivals
    if not rivals or rivals == len(stacks.ladder.rungs):
        return
    sizes = [step_bytes(one) for one in stacks.matrices]
    levels = range(floor, floor + rivals + 2)  # and the rung after them
    points: list[tuple[int, float, int]] = []
    for level in levels:
        progress(Event("sort", level - floor, len(levels), "rungs", "perplexities"))
        counts = stacks.counts(level)
        size = sum(sum(own[:count]) for own, count in zip(sizes, counts, strict=True))
        points.append((size, math.log(judge.perplexity(counts)), level))
    progress(Event("sort", len(levels), len(levels), "rungs", "perplexities"))
    kept = [points[0]]
    for at in range(1, len(points)):
        while len(kept) > 1 and _above(kept[-1], kept[-2], points[at]):
            kept.pop()
        kept.append(points[at])
    for level in set(levels) - {level for *_, level in kept}:
        stacks.drop(level)


def _above(point: tuple, less: tuple, more: tuple) -> bool:
    """Whether a point (bytes, loss, ..) is clearly above the line between two others, or no line is there."""
    if not less[0] < point[0] < more[0]:
        return True
    share = (point[0] - less[0]) / (more[0] - less[0])
    return not point[1] < less[1] + share * (more[1] - less[1]) + _MIXED


def sensitivities(stacks: Stacks, meter: Meter, progress: Progress = silent) -> tuple[list[float], list[float]]:
    """Nats a token that each unit of a matrix's error costs where all others are whole; and that the step after its
    least takes off where all others are at their least."""
    floors, tops = stacks.floors, [len(one.steps) for one in stacks.matrices]
    least = meter.divergence(floors)
    costs, gains = [], []
    for matrix, first in enumerate(floors):
        progress(Event("sort", matrix, len(tops), stacks.matrices[matrix].name, "matrices"))
        errors = stacks.errors[matrix]
        more = errors[first] - errors[tops[matrix]]
        lowered = [first if at == matrix else top for at, top in enumerate(tops)]
        costs.append(meter.divergence(lowered) / more if more > 0 else 0.0)
        raised = [min(first + 1, tops[at]) if at == matrix else floor for at, floor in enumerate(floors)]
        gains.append(least - meter.divergence(raised))
    progress(Event("sort", len(tops), len(tops), "", "matrices"))
    # A step that seems to cost nothing still comes before one that gives nothing
    smallest = max(max(costs, default=0.0) * 1e-6, _LEAST)
    return [max(value, smallest) for value in costs], gains
