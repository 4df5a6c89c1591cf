"""Which mode now: the most accurate one that is expected to answer in time. Pure functions over values.

What is expected of a mode is its head's seconds + its bytes / bandwidth + a round trip + the tail's seconds. The last
three are measured by every answer that comes: exponentially weighted means and spreads of their logarithms, of which
the pessimistic side counts (mean minus k standard deviations of the bandwidth, plus k of the times). A mode that is in
use stays until it would be late; a more accurate one has to be early by some of the deadline before it is taken. When
no mode is in time it is the device's own answer, and from time to time a probe finds out whether that is still so.
After the policy of slimmable encoders (Assine et al. 2023) and Neurosurgeon's cost model (Kang et al. 2017). The clock
is the caller's; nothing here knows a link.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .modes import Mode

LOCAL = 0  # the id that stands for the device's own answer


@dataclass(frozen=True)
class Terms:
    """How careful: `margin` is the part of the deadline that may be used, `hysteresis` the part of it that a more
    accurate mode must leave, `pessimism` the k of the module's text and `reserved` the k where the device's own answer
    is in reserve; `guard` seconds are kept between that and the deadline. `alpha` is the weight of the newest
    measurement; after `probe` seconds without any the link is tried, up to 16 times as many while it is silent."""

    margin: float = 0.9
    hysteresis: float = 0.1
    pessimism: float = 1.0
    reserved: float = -0.5
    guard: float = 0.003
    alpha: float = 0.3
    probe: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """What a link and an edge are taken for: bytes/s, and seconds of a round trip and of the tail for one image."""

    rate: float = 125e3
    rtt: float = 0.02
    tail: float = 0.005


@dataclass(frozen=True)
class Situation:
    """What a choice is made from. `estimate` of the link is pessimistic, `likely` is less so, None for the same.
    `local` is the device's own answer, id 0, whose `device_ms` and `accuracy` may be NaN, or None where it has none;
    `deadline` in seconds from now; `images` of one message; `current` the mode in use."""

    modes: Sequence[Mode]
    estimate: Estimate
    deadline: float
    likely: Estimate | None = None
    local: Mode | None = None
    images: int = 1
    current: int = LOCAL
    gone: bool = False  # there is no link


@dataclass(frozen=True)
class Decision:
    """`mode` is the chosen one, id 0 for the device's own answer; `seconds` are what it is expected to take."""

    mode: Mode
    seconds: float
    why: str


Chooser = Callable[[Situation], Decision]


def predict(mode: Mode, estimate: Estimate, images: int = 1) -> float:
    """Seconds from the image to the answer: head + bytes / bandwidth + round trip + tail. Of what is not known the
    head counts as nothing; the tail's seconds are the estimate's, the mode table's only where that has none."""
    head = _head(mode, images)
    if mode.id == LOCAL:
        return head
    tail = estimate.tail if not math.isnan(estimate.tail) else max(0.0, mode.tail_ms / 1000)
    return head + images * (mode.bytes / estimate.rate + tail) + estimate.rtt


def choose(now: Situation, terms: Terms | None = None) -> Decision:
    """The most accurate mode that is in time, the device's own answer among them where its accuracy is known; of equal
    ones the faster. With nothing in time the device's own answer, and without one the mode that is least late."""
    terms = terms or Terms()
    own = [now.local] if now.local is not None else []
    left = reserve(now, terms)
    estimate = now.estimate if math.isinf(left) else now.likely or now.estimate
    seconds = {mode.id: predict(mode, estimate, now.images) for mode in (*now.modes, *own)}
    limit = terms.margin * now.deadline
    known = [mode for mode in own if not math.isnan(mode.accuracy) and not math.isnan(mode.device_ms)]
    able = [mode for mode in known if seconds[mode.id] <= limit]
    if not now.gone:
        able += [mode for mode in now.modes if seconds[mode.id] <= limit and _head(mode, now.images) <= left]

    absent = "There is no link." if now.gone else "No mode is expected in time."

    def merit(mode: Mode) -> tuple:
        return _accuracy(mode), -seconds[mode.id], -mode.id

    if able:
        best = max(able, key=merit)
        held = next((mode for mode in able if mode.id == now.current), None)
        if held is not None and best.id != held.id:
            # Only an accuracy that is higher is worth a change, and only with room to spare
            early = [mode for mode in able if seconds[mode.id] <= limit - terms.hysteresis * now.deadline]
            better = [mode for mode in early if _accuracy(mode) > _accuracy(held)]
            best = max(better, key=merit) if better else held
        why = f"It is expected in {_ms(seconds[best.id])} of {_ms(now.deadline)}."
        if best.id == LOCAL:
            why = "No mode in time is more accurate." if len(able) > 1 else absent
        return Decision(best, seconds[best.id], why)
    if own:
        return Decision(own[0], seconds[LOCAL], absent)
    least = min(now.modes, key=lambda mode: seconds[mode.id])
    return Decision(least, seconds[least.id], "Nothing is expected in time; this is the least late.")


def reserve(now: Situation, terms: Terms) -> float:
    """Seconds that a head may take so that the device's own answer still is in time; infinite where that never is."""
    if now.local is None or math.isnan(now.local.device_ms):
        return math.inf
    left = now.deadline - terms.guard - predict(now.local, now.estimate, now.images)
    return left if left >= 0 else math.inf


def fixed(number: int) -> Chooser:
    """The mode of that id whatever happens: what the policy is compared with."""

    def always(now: Situation) -> Decision:
        mode = next(mode for mode in now.modes if mode.id == number)
        return Decision(mode, predict(mode, now.estimate, now.images), "It is the only one.")

    return always


def local_only(now: Situation) -> Decision:
    """The device's own answer whatever happens."""
    if now.local is None:
        raise ValueError("there is no local answer")
    return Decision(now.local, predict(now.local, now.estimate, now.images), "It is the only one.")


@dataclass(frozen=True)
class Average:
    """Of a positive number: the mean and the variance of its logarithm, and how much was measured."""

    log: float
    variance: float = 0.0
    weight: float = 0.0

    def add(self, log: float, alpha: float, share: float = 1.0) -> "Average":
        """With one more measurement, of which `share` is about this number. The first ones count more, as in a mean."""
        alpha = max(alpha, 1.0 / (self.weight + 1.0)) * share
        off = log - self.log
        return Average(self.log + alpha * off, (1 - alpha) * (self.variance + alpha * off * off), self.weight + share)

    def at(self, deviations: float) -> float:
        """The number, so many standard deviations above its mean."""
        return math.exp(min(60.0, max(-60.0, self.log + deviations * math.sqrt(self.variance))))


@dataclass(frozen=True)
class Knowledge:
    """What was measured of a link: bytes/s, seconds of a round trip and of the tail for one image. `heard` is when it
    last answered, `tried` when it was last asked; `silent` how often in a row it did not; `gone` where it said so."""

    rate: Average
    rtt: Average
    tail: Average
    heard: float = -math.inf
    tried: float = -math.inf
    silent: int = 0
    gone: bool = False

    @classmethod
    def prior(cls, estimate: Estimate | None = None) -> "Knowledge":
        """Before anything was measured."""
        taken = estimate or Estimate()
        return cls(*(Average(math.log(number)) for number in (taken.rate, taken.rtt, taken.tail)))

    def estimate(self, k: float = 0.0) -> Estimate:
        """The pessimistic side, k standard deviations from the mean."""
        return Estimate(self.rate.at(-k), self.rtt.at(k), self.tail.at(k))

    def answered(
        self, size: int, seconds: float, tail: float, now: float, terms: Terms | None = None, images: int = 1
    ) -> "Knowledge":
        """After an answer: a message of `size` bytes took `seconds`, of which the tail says `tail`."""
        terms = terms or Terms()
        tail = min(tail, seconds) if tail > 0 else 1e-6  # an edge may say anything
        known = self._took(size, max(seconds - tail, 1e-6), terms)
        each = self.tail.add(math.log(max(tail / max(images, 1), 1e-6)), terms.alpha)
        return replace(known, tail=each, heard=now, tried=now, silent=0, gone=False)

    def late(self, size: int, waited: float, now: float, terms: Terms | None = None) -> "Knowledge":
        """After `waited` seconds without an answer, which then would have taken longer: twice as long is assumed."""
        terms = terms or Terms()
        expected = size / self.rate.at(0) + self.rtt.at(0)
        known = self._took(size, 2 * max(waited - self.tail.at(0), expected), terms)
        return replace(known, tried=now, silent=self.silent + 1)

    def lost(self, now: float) -> "Knowledge":
        """After the link said that there is none."""
        return replace(self, tried=now, silent=self.silent + 1, gone=True)

    def due(self, now: float, terms: Terms | None = None) -> bool:
        """Whether it is time for a probe, where nothing else is sent."""
        return now - self.tried >= (terms or Terms()).probe * 2 ** min(self.silent, 4)

    def _took(self, size: int, net: float, terms: Terms) -> "Knowledge":
        """One number was measured and two are wanted: both are off by the same factor, each as much the more of the
        time it was expected to be. So a small message says something about the round trip, a large one about bytes."""
        sending, trip = size / self.rate.at(0), self.rtt.at(0)
        factor, share = math.log(net / (sending + trip)), sending / (sending + trip)
        rate = self.rate.add(self.rate.log - factor, terms.alpha, share)
        rtt = self.rtt.add(self.rtt.log + factor, terms.alpha, 1 - share)
        return replace(self, rate=rate, rtt=rtt)


def _head(mode: Mode, images: int) -> float:
    return 0.0 if math.isnan(mode.device_ms) else images * mode.device_ms / 1000


def _accuracy(mode: Mode) -> float:
    return -1.0 if math.isnan(mode.accuracy) else mode.accuracy


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
