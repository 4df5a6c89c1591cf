"""A policy over a trace, without a network and without a model: how often in time, how accurate, how many bytes.

Requests come at intervals; what the client does is repeated in arithmetic on a simulated channel (shaped.py): a mode is
chosen, its head takes its time, the message goes over, and where the answer would be late, the device's own, started
early enough, is given instead. What is late is no longer sent. An answer after the deadline counts as wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .modes import Mode
from .policy import LOCAL, Chooser, Estimate, Knowledge, Situation, Terms
from .shaped import ANSWER, Channel


@dataclass(frozen=True)
class Score:
    """Of `requests`: `missed` were answered late or never, `edge` by the edge; `accuracy` is the mean over all of them,
    0 where missed. `bytes` went up, probes included; `used` says how often each mode was chosen; `switches` how often
    another than before."""

    requests: int
    missed: int
    edge: int
    accuracy: float
    bytes: int
    probes: int
    switches: int
    used: dict[int, int] = field(default_factory=dict)

    @property
    def miss_rate(self) -> float:
        return self.missed / self.requests


def replay(
    choose: Chooser, modes: Sequence[Mode], local: Mode | None, up: Channel, down: Channel, *, deadline: float,
    requests: int, period: float, tail: float = 0.005, fallback: bool = True, terms: Terms | None = None,
    probes: bool = True, prior: Estimate | None = None,
) -> Score:  # fmt: skip
    """`requests` of one image, `period` seconds apart, or as soon as the device is free. `tail` seconds on the edge.
    Without `fallback` a device that sent waits for the edge alone."""
    terms, knowledge = terms or Terms(), Knowledge.prior(prior)
    smallest = min(modes, key=lambda mode: mode.bytes)
    free, current = 0.0, -1
    missed = edge = sent = tried = switches = 0
    gained, used = 0.0, dict.fromkeys([LOCAL, *(mode.id for mode in modes)], 0)
    waiting: list[tuple[float, int, float]] = []  # probes on their way: when they are back, their bytes, their seconds

    def there_and_back(at: float, size: int) -> float:
        return down.arrival(up.arrival(at, size) + tail, ANSWER)

    for number in range(requests):
        now = max(number * period, free)
        due = now + deadline
        for back, size, took in [one for one in waiting if one[0] <= now]:
            knowledge = knowledge.answered(size, took, tail, back, terms)
        waiting = [one for one in waiting if one[0] > now]
        careful, likely = knowledge.estimate(terms.pessimism), knowledge.estimate(terms.reserved)
        said = choose(Situation(modes, careful, deadline, likely, local, 1, max(current, LOCAL), knowledge.gone))
        mode, given_up = said.mode, False
        used[mode.id] += 1
        switches += current not in (-1, mode.id)
        current = mode.id
        alone = local.device_ms / 1000 if local else math.inf
        if mode.id == LOCAL:
            free, accuracy = now + alone, local.accuracy if local else 0.0
            if probes and not waiting and knowledge.due(now, terms):
                back = there_and_back(now, smallest.bytes)
                waiting.append((back, smallest.bytes, back - now))
                tried, sent = tried + 1, sent + smallest.bytes
        else:
            ready = now + mode.device_ms / 1000
            sent += mode.bytes
            back = there_and_back(ready, mode.bytes)
            if back <= due:
                free, accuracy, edge = back, mode.accuracy, edge + 1
                knowledge = knowledge.answered(mode.bytes, back - ready, tail, back, terms)
            else:
                up.drop(due)
                knowledge = knowledge.late(mode.bytes, max(due - ready, 0.0), due, terms)
                if local and fallback:
                    free, accuracy = max(ready, due - terms.guard - alone) + alone, local.accuracy
                else:
                    free, accuracy, given_up = due, 0.0, True
        if free > due or given_up:
            missed += 1
        else:
            gained += accuracy
    return Score(requests, missed, edge, gained / requests, sent, tried, switches, used)
