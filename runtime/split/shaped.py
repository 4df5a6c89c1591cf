"""A link simulator: bandwidth that changes, delay, jitter, loss, stalls and cuts, between a device and a real edge.

Nothing here is a network. A `Channel` says when a message that is sent at a moment has arrived, by a trace of bytes a
second; `Shaped` puts that time between a caller and another link, in real time or on a `VirtualClock`, on which hours
pass in milliseconds. All chance is seeded. Each direction is one queue: what is sent later arrives later. A lost packet
costs the retransmission timeout, which is what a small message pays whose packet was its last.

The `synthetic` traces are Markov chains with the means and swings that 3G, LTE and Wi-Fi uplinks have, not recordings.
"""

import bisect
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from ..errors import LinkError, UsageError
from .link import Link, Reply, late

PACKET = 1400  # bytes
ANSWER = 256  # bytes that come back, unless said otherwise


class Clock(Protocol):
    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...


class RealClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))


class VirtualClock:
    """Time that passes only by sleeping; for one thread."""

    def __init__(self, start: float = 0.0):
        self._now = start

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += max(0.0, seconds)


class Trace:
    """Bandwidth over time: segments (seconds, bytes/s), again from the first when the last has ended. `stalls` are
    (start, seconds) of the whole in which nothing moves. Raises UsageError."""

    def __init__(self, segments: Iterable[tuple[float, float]] | float, stalls: Iterable[tuple[float, float]] = ()):
        listed = [(1.0, float(segments))] if isinstance(segments, int | float) else [tuple(s) for s in segments]
        right = listed and all(0 < seconds < np.inf and 0 <= rate < np.inf for seconds, rate in listed)
        if not right or not any(rate for _, rate in listed):
            raise UsageError("A trace cannot be used.", "It has no segments, or a length or rate of no sense, or "
                             "carries nothing.", "Give (seconds, bytes/s).")  # fmt: skip
        lengths, rates = np.array(listed, np.float64).T
        edges = np.concatenate([[0.0], np.cumsum(lengths)])
        for start, seconds in stalls:
            marks = np.clip([start, start + seconds], 0.0, edges[-1])
            cut = np.unique(np.concatenate([edges, marks]))
            middles = (cut[1:] + cut[:-1]) / 2
            rates = rates[np.searchsorted(edges, middles, side="right") - 1]
            rates = np.where((middles > marks[0]) & (middles < marks[1]), 0.0, rates)
            edges = cut
        if not rates.any():
            raise UsageError("A trace cannot be used.", "Its stalls leave nothing.", "Shorten them.")
        carried = np.concatenate([[0.0], np.cumsum(np.diff(edges) * rates)])
        # Lists: a message asks for two places of it, which bisect finds faster than numpy
        self._edges, self._rates, self._carried = edges.tolist(), rates.tolist(), carried.tolist()
        self.seconds, self.mean = self._edges[-1], self._carried[-1] / self._edges[-1]

    def rate(self, at: float) -> float:
        """Bytes/s at that moment."""
        return self._rates[bisect.bisect_right(self._edges, at % self.seconds) - 1]

    def after(self, at: float, size: float) -> float:
        """When `size` bytes that begin at `at` are through."""
        rounds, phase = divmod(at, self.seconds)
        place = bisect.bisect_right(self._edges, phase) - 1
        wanted = self._carried[place] + (phase - self._edges[place]) * self._rates[place] + size
        more, wanted = divmod(wanted, self._carried[-1])
        if wanted == 0.0 and more:  # exactly at an end: not after the stall that may follow
            more, wanted = more - 1, self._carried[-1]
        place = min(bisect.bisect_left(self._carried, wanted), len(self._carried) - 1)
        before = max(0, place - 1)
        gained = wanted - self._carried[before]
        inside = gained / self._rates[before] if self._rates[before] else 0.0
        return max(at, (rounds + more) * self.seconds + self._edges[before] + inside)


class Channel:
    """One direction. `delay` seconds, `jitter` seconds more of an exponential's mean, `loss` a part of the packets,
    each of which costs `timeout` seconds. Free to be used by several threads."""

    def __init__(
        self, trace: Trace | float, *, delay: float = 0.0, jitter: float = 0.0, loss: float = 0.0,
        timeout: float = 0.2, seed: int = 0,
    ):  # fmt: skip
        if not (0 <= delay < np.inf and 0 <= jitter < np.inf and 0 <= loss < 1 and 0 <= timeout < np.inf):
            raise UsageError(
                "A channel cannot be used.", "A delay, jitter, loss or timeout makes no sense.", "Correct."
            )
        self.trace = trace if isinstance(trace, Trace) else Trace(trace)
        self._delay, self._jitter, self._loss, self._timeout = delay, jitter, loss, timeout
        self._random, self._free, self._turn = np.random.default_rng(seed), 0.0, threading.Lock()

    def arrival(self, at: float, size: int) -> float:
        """When the last byte of a message that is sent at `at` is there."""
        with self._turn:
            through = self._free = self.trace.after(max(at, self._free), size)
            extra = self._random.exponential(self._jitter) if self._jitter else 0.0
            if self._loss:
                packets = -(-max(size, 1) // PACKET)
                while packets := int(self._random.binomial(packets, self._loss)):  # those may be lost again
                    extra += self._timeout
            return through + self._delay + extra

    def drop(self, at: float) -> None:
        """What is not through by then is not sent any more."""
        with self._turn:
            self._free = min(self._free, at)


class Shaped:
    """`link` behind two channels: a simulator. `up` and `down` are Channels, or bytes a second. The `cuts` are
    (from, to) of the clock's seconds since it began, in which there is no link: LinkError at once."""

    def __init__(
        self, link: Link, up: Channel | Trace | float, down: Channel | Trace | float | None = None, *,
        delay: float = 0.0, cuts: Sequence[tuple[float, float]] = (), clock: Clock | None = None,
    ):  # fmt: skip
        """`delay` is for each direction that is no Channel yet; without `down` it is as fast as `up`, by itself."""
        self._link, self._clock, self.cuts = link, clock or RealClock(), list(cuts)
        self._up = up if isinstance(up, Channel) else Channel(up, delay=delay)
        if down is None:
            down = self._up.trace
        self._down = down if isinstance(down, Channel) else Channel(down, delay=delay)
        self._began = self._clock.now()

    def ask(self, mode: int, message: bytes, timeout: float) -> Reply:
        clock, sent = self._clock, self._clock.now() - self._began
        end = sent + timeout
        self._until(self._up.arrival(sent, len(message)), end, timeout)
        reply = self._link.ask(mode, message, end - (clock.now() - self._began))
        size = sum(array.nbytes for array in reply.outputs.values()) or ANSWER
        self._until(self._down.arrival(clock.now() - self._began, size), end, timeout)
        return reply

    def _until(self, moment: float, end: float, timeout: float) -> None:
        """Waits until that moment, or as long as there is a link, but not past the end."""
        now = self._clock.now() - self._began
        cut = min((max(start, now) for start, stop in self.cuts if stop > now), default=np.inf)
        self._clock.sleep(min(moment, end, cut) - now)
        if cut <= min(moment, end):
            raise LinkError("There is no link to the edge.", "The simulator has cut it.", "Wait until it is back.")
        if moment > end:
            self._up.drop(end)
            raise late(timeout)


# Of each kind: the rates of a chain's states in kB/s, how often it changes (a second), and the swing within a state
_KINDS = {
    "3g": ((8.0, 40.0, 90.0, 180.0), 0.25, 0.35),
    "lte": ((60.0, 300.0, 900.0, 2200.0), 0.35, 0.30),
    "wifi": ((15.0, 800.0, 2500.0, 6000.0), 0.15, 0.20),
}


def synthetic(kind: str, seconds: float = 600.0, seed: int = 0, step: float = 0.25) -> Trace:
    """A made-up trace of "3g", "lte" or "wifi": a Markov chain over four states of the signal, of which each has a mean
    rate and log-normal swings every `step` seconds, and now and then none at all: no recording. Raises UsageError."""
    if kind not in _KINDS:
        raise UsageError(f"There is no trace {kind!r}.", f"There are {', '.join(_KINDS)}.", "Choose one.")
    rates, changes, swing = _KINDS[kind]
    random, state, segments = np.random.default_rng([seed, len(kind), ord(kind[0])]), 2, []
    for _ in itertools.repeat(None, max(1, round(seconds / step))):
        if random.random() < changes * step:
            state = int(np.clip(state + random.choice([-1, 1]), 0, len(rates) - 1))
        stalled = random.random() < 0.004
        rate = 0.0 if stalled else 1000 * rates[state] * float(random.lognormal(-(swing**2) / 2, swing))
        segments.append((step, rate))
    return Trace(segments)
