"""What an edge counts: requests and how long they took. Values and a clock that is passed in; see snapshot.py.

It knows nothing about devices or links.
"""

import bisect
import statistics
from collections import deque

from .snapshot import BUCKETS, Latency, Requests

_SPAN, _SPANS = 5.0, 60
_LAST = 256  # latencies that the percentiles are of


class Counter:
    """Requests, by how they ended."""

    def __init__(self) -> None:
        self.done = self.busy = self.late = self.failed = self.running = 0

    def say(self) -> Requests:
        return {"done": self.done, "busy": self.busy, "late": self.late, "failed": self.failed, "running": self.running}


class Timings:
    """Latencies in seconds: all of them in buckets, the last ones one by one, and medians of spans of five seconds."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._last: deque[float] = deque(maxlen=_LAST)
        self._medians: deque[tuple[int, float]] = deque(maxlen=_SPANS)  # by the number of the span, those that are over
        self._span = 0
        self._current: list[float] = []

    def add(self, seconds: float, now: float) -> None:
        """A request that ended now and took `seconds`."""
        self.count += 1
        self.sum += seconds
        self._buckets[bisect.bisect_left(BUCKETS, seconds)] += 1
        self._last.append(seconds)
        number = int(now // _SPAN)
        if number != self._span:
            if self._current:
                self._medians.append((self._span, statistics.median(self._current)))
            self._span, self._current = number, []
        if len(self._current) < _LAST:
            self._current.append(seconds)

    def say(self, now: float) -> Latency:
        total, cumulative = 0, []
        for count in self._buckets[:-1]:
            total += count
            cumulative.append(total)
        last = sorted(self._last)
        return {
            "count": self.count, "sum": self.sum, "buckets": cumulative,
            "p50": last[len(last) // 2] if last else None,
            "p95": last[min(len(last) - 1, len(last) * 95 // 100)] if last else None,
            "recent": self._recent(now),
        }  # fmt: skip

    def _recent(self, now: float) -> list[float | None]:
        """Medians of the spans from the oldest kept to this one, None for one without a request."""
        medians, this = dict(self._medians), int(now // _SPAN)
        if self._current:
            medians[self._span] = statistics.median(self._current)
        first = max(min(medians, default=this + 1), this - _SPANS + 1)
        return [medians.get(number) for number in range(first, this + 1)]
