"""What an edge does for a device: pure functions from what both said to an Agreement, and when to agree anew.

Latency of a mode is the sum of its parts (Neurosurgeon, Kang et al. 2017): head, wire, queue, tail, and the way there
and back. A mode is allowed while that fits `Terms.most`; what was allowed before may be a little slower, and what was
not must be clearly faster, so that an agreement does not swing with its link. Both sides may be of different versions:
modes, models and features that one of them does not know are left out, and only what a side requires is refused.
It knows nothing about links, clocks or who runs a tail. Times are seconds, rates bytes a second.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal.runtime.errors import LinkError

from .messages import VERSION, Agreement, Health, Hello, Mode, Model, State

FEATURES = frozenset({"split", "fetch", "generate", "continue", "update"})  # words that this version knows
OLDEST = 1  # version of the conversation that is still understood

_ANSWER = 512  # bytes of a typical answer and of what surrounds a latent
_UNKNOWN_TAIL = 0.010


@dataclass(frozen=True)
class Terms:
    """What an edge's owner sets. `most` is the longest answer that is worth having instead of a local one."""

    most: float = 1.0
    inflight: int = 4  # latents that one device may have on the way
    fetch: float = 3600.0  # longest transfer of a model that is worth beginning
    valid: float = 60.0
    slack: float = 0.25  # how much slower an agreed mode may get, and how much faster a new one must be
    hold: float = 2.0  # seconds that a change must last before it is agreed
    rest: float = 5.0  # seconds between two agreements
    hot: float = 80.0  # degrees Celsius, from where a device is spared
    low: float = 15.0  # percent of battery


@dataclass(frozen=True)
class Offer:
    """What the edge has now. `load` is the busy share of its tails, 0 to 1; `queue` the wait before a tail runs;
    `seconds` what a run of each tail takes, by digest."""

    models: tuple[Model, ...] = ()
    load: float = 0.0
    queue: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """As measured. `rate` in bytes/s, None where nothing is known yet; `rtt` likewise."""

    rate: float | None = None
    rtt: float | None = None


@dataclass(frozen=True)
class _Choice:
    """A head and a tail that belong together, and the modes that are worth it: best first."""

    head: Model
    tail: Model
    modes: tuple[Mode, ...]
    predicted: Mapping[int, float]  # seconds, by mode


def negotiate(
    state: State, offer: Offer, link: Link, terms: Terms | None = None, held: Agreement | None = None
) -> Agreement:
    """The agreement with a device that says `state`; `held` is the one that stands."""
    terms = terms or Terms()
    valid = max(1, round(terms.valid))
    health = state.health or Health()
    if offer.load >= (1.0 if held and held.tail else 0.9):
        return Agreement(valid_s=max(1, valid // 6), why="The edge is busy; compute here and ask again.")
    pairs = [(head, tail) for tail in offer.models for head in state.models if _belong(head, tail)]
    fetch = tuple(model.digest for model in _wanted(state, offer, link, terms, health, pairs))
    choices = [_choice(head, tail, offer, link, terms, health, held) for head, tail in pairs]
    choices = [choice for choice in choices if choice.modes]
    if not choices:
        why = _nothing(state, offer, pairs, fetch, terms)
        return Agreement(fetch=fetch, valid_s=valid, why=why)
    best = max(choices, key=lambda choice: _merit(choice, held))
    slowest = max(best.predicted[mode.id] for mode in best.modes)
    deadline = min(2 * slowest + 0.02, 2 * terms.most)
    return Agreement(
        tail=best.tail.digest, encoder=best.head.encoder, modes=tuple(mode.id for mode in best.modes),
        deadline_ms=max(1, math.ceil(1000 * deadline)), inflight=_inflight(best, offer, link, terms), fetch=fetch,
        valid_s=valid, why=f"{_named(best.tail)} answers in about {_ms(best.predicted[best.modes[0].id])}.",
    )  # fmt: skip


def seconds(mode: Mode, tail: str, offer: Offer, link: Link) -> float:
    """How long a latent of `mode` takes from the image to the answer. What is not known counts as nothing."""
    wire = (max(mode.bytes, 0) + _ANSWER) / link.rate if link.rate else 0.0
    head = mode.device_ms / 1000 if mode.device_ms > 0 else 0.0  # not for NaN
    return head + wire + (link.rtt or 0.0) + offer.queue + offer.seconds.get(tail, _UNKNOWN_TAIL)


def _belong(head: Model, tail: Model) -> bool:
    """A head's latents are this tail's: both are the same bundle, or the encoder and its tables are the same, or,
    where neither names one, the model's name is."""
    if "tail" not in _roles(tail):
        return False
    if head.digest == tail.digest:
        return bool(tail.digest)
    if _roles(head) == {"tail"}:
        return False
    if head.encoder or tail.encoder:
        return head.encoder == tail.encoder and head.tables == tail.tables
    return bool(head.name) and head.name == tail.name and head.tables == tail.tables


def _roles(model: Model) -> set[str]:
    return set(model.role.split("+"))


def _choice(
    head: Model, tail: Model, offer: Offer, link: Link, terms: Terms, health: Health, held: Agreement | None
) -> _Choice:
    """The modes that both sides know and that are fast enough. The device's own figures count before the bundle's."""
    known = {mode.id: mode for mode in tail.modes}
    mine = {mode.id: mode for mode in head.modes}
    both = [_merged(mode, known[number]) for number, mode in mine.items() if _alike(mode, known.get(number))]
    if not head.modes and not tail.modes:
        both = [Mode(0)]  # one way of working, which needs no table
    agreed = held.modes if held and held.tail == tail.digest else None
    allowed, predicted = [], {}
    for mode in both:
        took = seconds(mode, tail.digest, offer, link)
        if agreed is None:
            most = terms.most
        else:
            most = terms.most * (1 + terms.slack) if mode.id in agreed else terms.most * (1 - terms.slack)
        if took <= most:
            allowed.append(mode)
            predicted[mode.id] = took
    if health.temperature_c >= terms.hot or (health.battery_percent <= terms.low and health.on_power != 1):
        cheapest = min((_cost(mode) for mode in allowed), default=0.0)
        allowed = [mode for mode in allowed if _cost(mode) <= 1.5 * cheapest]
    allowed.sort(key=lambda mode: (-_accuracy(mode), predicted[mode.id], mode.id))
    return _Choice(head, tail, tuple(allowed), predicted)


def _alike(mode: Mode, other: Mode | None) -> bool:
    """Both mean the same by a mode's number; a zero says nothing."""
    return other is not None and all(
        not mine or not theirs or mine == theirs
        for mine, theirs in ((mode.bits, other.bits), (mode.bytes, other.bytes))
    )


def _merged(mode: Mode, other: Mode) -> Mode:
    return Mode(
        mode.id, mode.bits or other.bits, mode.bytes or other.bytes,
        other.device_ms if math.isnan(mode.device_ms) else mode.device_ms,
        mode.accuracy if math.isnan(other.accuracy) else other.accuracy,
    )  # fmt: skip


def _cost(mode: Mode) -> float:
    """What a mode costs the device: its milliseconds, as a stand-in for energy."""
    return mode.device_ms if mode.device_ms > 0 else 0.0


def _accuracy(mode: Mode) -> float:
    return -1.0 if math.isnan(mode.accuracy) else mode.accuracy


def _merit(choice: _Choice, held: Agreement | None) -> tuple:
    """The more accurate tail, then the one that stands, then the faster one."""
    first = choice.modes[0]
    stands = held is not None and choice.tail.digest == held.tail
    return _accuracy(first), stands, -choice.predicted[first.id], choice.tail.digest


def _inflight(choice: _Choice, offer: Offer, link: Link, terms: Terms) -> int:
    """Enough latents on the way that the slowest stage of the line never waits, fewer while the edge is loaded."""
    mode = choice.modes[0]
    wire = (mode.bytes + _ANSWER) / link.rate if link.rate else 0.0
    stage = max(_cost(mode) / 1000, wire, offer.seconds.get(choice.tail.digest, _UNKNOWN_TAIL), 1e-3)
    most = max(1, round(terms.inflight * (1 - 0.75 * min(1.0, max(0.0, offer.load)))))
    return max(1, min(most, math.ceil(choice.predicted[mode.id] / stage)))


def _wanted(state: State, offer: Offer, link: Link, terms: Terms, health: Health, pairs) -> Iterable[Model]:
    """Heads in the edge's store that would make one of its tails usable, if they can come over in time and fit."""
    served = {tail.digest for _, tail in pairs}
    have = {model.digest for model in state.models}
    for tail in offer.models:
        if "tail" not in _roles(tail) or tail.digest in served:
            continue
        for head in offer.models:
            fits = health.memory_available < 0 or head.length <= health.memory_available
            soon = link.rate is None or head.length / link.rate <= terms.fetch
            if _roles(head) != {"tail"} and head.digest not in have and _belong(head, tail) and fits and soon:
                yield head
                break


def _nothing(state: State, offer: Offer, pairs, fetch, terms: Terms) -> str:
    if fetch:
        return "The edge has a head that fits one of its tails; fetch it first."
    if not any("tail" in _roles(model) for model in offer.models):
        return "The edge has no tail."
    if not pairs:
        return "None of the edge's tails belongs to a model of this device."
    if all(not _shared(head, tail) for head, tail in pairs):
        return "Device and edge have no mode in common."
    return f"Over this link no mode answers within {_ms(terms.most)}; compute here."


def _shared(head: Model, tail: Model) -> bool:
    return bool({mode.id for mode in head.modes} & {mode.id for mode in tail.modes}) or not (head.modes or tail.modes)


def _named(model: Model) -> str:
    return model.name or model.digest[:12]


def _ms(value: float) -> str:
    return f"{1000 * value:.0f} ms"


class Renegotiation:
    """When an agreement is worth replacing: what would be agreed now differs, has done so for `Terms.hold`, and the
    last agreement is `Terms.rest` ago. A tail that is gone does not wait."""

    def __init__(self, held: Agreement, now: float, terms: Terms | None = None):
        self.held, self._terms = held, terms or Terms()
        self._since, self._differs = now, math.inf

    def observe(self, candidate: Agreement, now: float, gone: bool = False) -> str:
        """Why the device should state itself again, or "". `candidate` is negotiate(..., held=self.held) of now;
        `gone` says that the agreed tail is no longer served."""
        if not differs(self.held, candidate):
            self._differs = math.inf
            return ""
        self._differs = min(self._differs, now)
        if gone or (now - self._differs >= self._terms.hold and now - self._since >= self._terms.rest):
            self._differs, self._since = math.inf, now  # said once; it may be said again if nobody listens
            return candidate.why or "What the edge can do has changed."
        return ""


def differs(one: Agreement, other: Agreement) -> bool:
    """The device would act differently. Deadlines follow the link and are no reason."""
    return (one.tail, one.encoder, set(one.modes), set(one.fetch)) != (
        other.tail, other.encoder, set(other.modes), set(other.fetch)
    ) or other.inflight < one.inflight  # fmt: skip


def version(hello: Hello, features: Iterable[str] = FEATURES) -> int:
    """The version of the conversation that both sides speak: the older one's. Raises LinkError where there is none,
    or where the peer requires a feature that is unknown here; unknown features that it only has are no matter."""
    if hello.version < OLDEST:
        why = f"It speaks version {hello.version}; this shoal understands {OLDEST} to {VERSION}."
        raise LinkError("The peer is too old.", why, "Upgrade shoal there.")
    if unknown := set(hello.required) - set(features):
        why = f"It requires {min(unknown)!r:.40}, which this version does not know."
        raise LinkError("The peer is too new.", why, "Upgrade shoal here.")
    return min(hello.version, VERSION)
