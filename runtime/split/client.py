"""The device's side of a split: images in, an answer by the deadline, from the edge where it can and from here if not.

    with Client("cats.device.shoal", link) as client:
        result = client.run(image, deadline=0.1)
        print(result.where, result.mode, result.bytes, result.seconds.total, result.why)

A head with every encoder is opened once and bound to buffers that stay, so another mode is another integer. What the
head, the codec, the link and the device's own answer take is measured with every run, and policy.py chooses by it. The
device's own answer is begun early enough to be there by the deadline, beside a link that is still awaited, and at once
where the link fails; whichever counts first is given. Every wait ends with the deadline; only an answer of one's own
that does not fit it is waited for longer. It knows nothing about what a link is made of.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..bundle import Bundle
from ..errors import BackendError, BundleError, BusyError, LinkError, ShoalError, UsageError
from ..session import Binding, Session
from . import modes, policy
from .codec import Codec
from .link import Link, Reply, late, latent_shape, open_role
from .modes import ENCODER, SCORE, Mode
from .policy import LOCAL, Average, Chooser, Estimate, Knowledge, Situation, Terms

_SLOTS = 8  # sets of bound buffers that are kept
_LEAST = 1e-6  # seconds
_PROBE = 2.0  # seconds that a link is given to answer where nobody waits for it


@dataclass(frozen=True)
class Seconds:
    """Where the time went. `link` is what the answer took but for the `tail`, which is the edge's word; `local` the
    device's own answer, 0 where none was needed. Parts that ran side by side add up to more than `total`."""

    head: float = 0.0
    encode: float = 0.0
    link: float = 0.0
    tail: float = 0.0
    local: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Result:
    """`where` is "edge" or "local": who computed the outputs; or "filtered": nobody, and there are none, for the head's
    filter found nothing in the images. `mode` and `bytes` are of the message that was sent, both 0 where none was;
    `why` says what kept the edge from answering, "" where nothing did."""

    outputs: dict[str, np.ndarray]
    where: str
    mode: int
    bytes: int
    seconds: Seconds
    why: str


@dataclass
class _Slot:
    """A head bound to buffers: inputs, the encoder's number, the latent. Of one thread at a time."""

    key: tuple
    binding: Binding
    inputs: dict[str, np.ndarray]
    encoder: np.ndarray
    latent: np.ndarray
    score: np.ndarray


@dataclass
class _Race:
    """Between the edge's answer and the device's own: what each came to, once it did."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    reply: Reply | None = None
    failed: ShoalError | None = None
    took: float = 0.0  # seconds until either of these
    own: dict[str, np.ndarray] | None = None
    own_failed: ShoalError | None = None
    own_took: float = 0.0

    def put(self, **found) -> None:
        with self.changed:
            for name, value in found.items():
                setattr(self, name, value)
            self.changed.notify_all()

    def wait(self, until: float, done: Callable[[], object]) -> None:
        """Until `done()`, or that moment if it is earlier."""
        with self.changed:
            self.changed.wait_for(done, None if until == math.inf else max(0.0, until - time.monotonic()))


class Client:
    """A device bundle, open, and the way to its edge, which stays the caller's. Several threads may `run` at once.

    `choose` is the policy, by default policy.choose under `terms`; `prior` what the link is taken for before it was
    measured. At most `inflight` messages are on the way. The device's own answer is the graph "local", or else head and
    tail where the bundle has both. Raises BundleError where there is no head or no mode with a codec, StorageError,
    BackendError.
    """

    def __init__(
        self, bundle: str | os.PathLike, link: Link, *, terms: Terms | None = None, choose: Chooser | None = None,
        prior: Estimate | None = None, threads: int = 0, inflight: int = 4,
    ):  # fmt: skip
        self.terms, self._link, self._inflight = terms or Terms(), link, inflight
        self._choose: Chooser = choose or (lambda now: policy.choose(now, self.terms))
        self.knowledge, self._current = Knowledge.prior(prior), LOCAL
        self._lock, self._closed = threading.Lock(), False
        self._threads: set[threading.Thread] = set()
        self._asking = 0
        self._slots: list[_Slot] = []
        self._took: dict[tuple[int, int], Average] = {}  # seconds of (mode, images) on this device
        self._probe: tuple[Mode, bytes] | None = None  # a message to try the link with
        self._probing = False
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(Bundle.open(bundle))
            self.table = modes.read(file)
            tables = modes.codecs(file, self.table)
            self._head = opened.enter_context(open_role(file, "head", threads))
            roles = {graph.role for graph in file.graphs}
            self._own: Session | None = None
            if alone := next((role for role in ("local", "tail") if role in roles), ""):
                self._own = opened.enter_context(open_role(file, alone, threads))
            self._whole = alone == "local"
            outputs = modes.scored(self._head.outputs, self.table)
            self._shape, self._latent = latent_shape(outputs, "head"), next(iter(outputs))
            self._inputs = [name for name in self._head.inputs if name != ENCODER]
            self.modes = tuple(mode for mode in self.table.modes if mode.codec)
            if not self.modes or not self._inputs:
                what = f"The bundle {file.path} cannot be used by a client."
                raise BundleError(what, "None of its modes names a codec.", "Pack it with modes and codecs.")
            made = {key: Codec(one, self._shape) for key, one in tables.items() if one.channels == self._shape[0]}
            if missing := {mode.codec for mode in self.modes} - made.keys():
                why = f"The codec {min(missing)!r} is for other channels than the latent's {self._shape[0]}."
                raise BundleError("The bundle's codec cannot be used.", why, "Pack the network again.")
            if self._whole and self._own and set(self._own.inputs) != set(self._inputs):
                why = f"It takes {', '.join(self._own.inputs)}; the head takes {', '.join(self._inputs)}."
                raise BundleError("The bundle's local graph is of no use here.", why, "Pack the network again.")
            self._codecs = {mode.id: made[mode.codec] for mode in self.modes}
            self._warm()
            opened.pop_all()
        file.close()

    def run(self, images: np.ndarray | Mapping[str, np.ndarray], *, deadline: float = 1.0) -> Result:
        """The answer to images fp32 [n, ...] (or one, without the n), or to several inputs by name, `deadline` seconds
        from now. Raises UsageError, and where there is no answer of the device's own LinkError or BusyError."""
        began = time.monotonic()
        if not 0 < deadline < math.inf:
            raise UsageError(f"The deadline is {deadline!r} s.", "It is not above 0.", "Correct it.")
        if self._closed:
            raise BackendError("The client is closed.", "close() was called.", "Open it again.")
        feeds, rows = self._feeds(images)
        due = began + deadline
        with self._lock:
            now = self._situation(deadline, rows)
            said = self._choose(now)
            self._current = said.mode.id
            full = self._asking >= self._inflight
            probe = said.mode.id == LOCAL and not full and self._take_probe(began)
        if said.mode.id == LOCAL or (full and self._own is not None):
            if probe:
                self._spawn(self._try_link)
            outputs, took = self._alone(feeds, rows)
            total = time.monotonic() - began
            why = said.why if said.mode.id == LOCAL else f"{self._inflight} messages are on the way already."
            return Result(outputs, "local", 0, 0, Seconds(local=took, total=total), why)
        if full:
            raise BusyError("The link is busy.", f"{self._inflight} messages are on the way.", "Wait for them.")
        message, head, encode = self._message(said.mode, feeds, rows, self.table.threshold)
        race, sent = _Race(), time.monotonic()
        if not message:
            why = f"The filter finds nothing: no score is {self.table.threshold:.3g} or more."
            return Result({}, "filtered", 0, 0, Seconds(head, total=sent - began), why)
        with self._lock:
            self._asking += 1
        self._spawn(self._ask, race, said.mode, message, rows, due - sent)
        if self._own is not None:
            race.wait(self._last_moment(now, said.mode, began, due, sent), lambda: race.reply or race.failed)
            if race.reply is None:
                self._spawn(self._run_alone, race, feeds, rows)
        # Once its own answer is there, the edge's may still come until the deadline
        last = due if self._own is None else due - self.terms.guard / 2  # a thread wakes a little late
        race.wait(last, lambda: race.reply or (race.failed and (self._own is None or race.own or race.own_failed)))
        if race.reply is None and self._own is not None:
            race.wait(math.inf, lambda: race.own or race.own_failed or race.reply)
        with race.changed:
            reply, failed, own, wait = race.reply, race.failed, race.own, race.took
        seconds = Seconds(head, encode, wait, 0.0, race.own_took, time.monotonic() - began)
        if reply is not None:
            tail = min(max(reply.tail_seconds, 0.0), wait)
            seconds = replace(seconds, link=wait - tail, tail=tail)
            return Result(reply.outputs, "edge", said.mode.id, len(message), seconds, "")
        failed = failed or late(due - sent)
        if own is not None:
            return Result(own, "local", said.mode.id, len(message), seconds, f"{failed.what} {failed.why}")
        raise race.own_failed or failed

    def close(self, timeout: float = 5.0) -> None:
        """Waits at most `timeout` seconds for what is under way, and frees all. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            running = list(self._threads)
        end = time.monotonic() + timeout
        for thread in running:
            thread.join(max(0.0, end - time.monotonic()))
        self._slots.clear()
        for session in (self._head, self._own):
            if session is not None:
                session.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Choosing

    def _situation(self, deadline: float, rows: int) -> Situation:
        """What is known now, with this device's own figures in place of the table's."""
        known, terms = self.knowledge, self.terms
        own = None
        if self._own is not None:
            own = replace(self.table.local, device_ms=self._ms(self.table.local, rows))
        allowed = getattr(self._link, "modes", None)  # None: any
        able = [mode for mode in self.modes if allowed is None or mode.id in allowed] or self.modes
        mine = tuple(replace(mode, device_ms=self._ms(mode, rows)) for mode in able)
        careful, likely = known.estimate(terms.pessimism), known.estimate(terms.reserved)
        return Situation(mine, careful, deadline, likely, own, rows, self._current, known.gone)

    def _ms(self, mode: Mode, rows: int) -> float:
        """What an image takes of a message of so many: measured of as many, or of one, or as the bundle says."""
        if (found := self._took.get((mode.id, rows))) is not None:
            return 1000 * found.at(1) / rows
        found = self._took.get((mode.id, 1))
        return 1000 * found.at(1) if found is not None else mode.device_ms

    def _measured(self, mode: int, rows: int, seconds: float) -> None:
        log = math.log(max(seconds, _LEAST))
        with self._lock:
            self._took[mode, rows] = self._took.get((mode, rows), Average(log)).add(log, self.terms.alpha)

    def _last_moment(self, now: Situation, mode: Mode, began: float, due: float, sent: float) -> float:
        """When the device's own answer must begin. One that cannot be in time begins once the edge is overdue."""
        assert now.local is not None
        known = not math.isnan(now.local.device_ms)
        start = due - self.terms.guard - policy.predict(now.local, now.estimate, now.images)
        if known and start >= sent:
            return start
        mine = next((one for one in now.modes if one.id == mode.id), mode)
        return min(due, began + policy.predict(mine, now.estimate, now.images))

    # Computing

    def _warm(self) -> None:
        """Runs everything once on zeros, and once more to measure it, where the lengths of an image are known."""
        feeds = {}
        for name in self._inputs:
            value = self._head.inputs[name]
            lengths = [dim for dim in value.dims[1:] if isinstance(dim, int)]
            if len(lengths) != len(value.dims) - 1:
                return
            feeds[name] = np.zeros((1, *lengths), value.dtype)
        for mode in self.modes:
            self._message(mode, feeds, 1)
        if self._own is not None:
            self._alone(feeds, 1)
        self._took.clear()
        for mode in self.modes:
            self._message(mode, feeds, 1)
        if self._own is not None:
            self._alone(feeds, 1)

    def _feeds(self, images: np.ndarray | Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
        """The head's inputs by name, but for the encoder, and how many images they are. Raises UsageError."""
        feeds = dict(images) if isinstance(images, Mapping) else {self._inputs[0]: images}
        for name, array in feeds.items():
            value = self._head.inputs.get(name)
            if value is not None and isinstance(array, np.ndarray) and array.ndim == len(value.dims) - 1:
                feeds[name] = array[None]
        rows = {array.shape[0] if getattr(array, "shape", ()) else 0 for array in feeds.values()}
        if sorted(feeds) != sorted(self._inputs) or len(rows) != 1 or 0 in rows:
            why = f"The head takes {', '.join(self._inputs)}, of as many images each."
            raise UsageError("These inputs cannot be used.", why, "Pass arrays [n, ...].")
        return feeds, rows.pop()

    def _message(
        self, mode: Mode, feeds: Mapping[str, np.ndarray], rows: int, threshold: float = math.nan
    ) -> tuple[bytes, float, float]:
        """The message of these images, and the seconds of the head and of coding; none where all score less."""
        began = time.monotonic()
        slot = self._slot(feeds, rows)
        try:
            for name, array in feeds.items():
                np.copyto(slot.inputs[name], array)
            slot.encoder[...] = mode.encoder
            slot.binding.run()
            headed = time.monotonic()
            if (slot.score < threshold).all():  # never of NaN
                return b"", headed - began, 0.0
            message = self._codecs[mode.id].encode(slot.latent)
        finally:
            with self._lock:
                self._slots = [slot, *self._slots[: _SLOTS - 1]]
        coded = time.monotonic()
        self._measured(mode.id, rows, coded - began)
        if self._probe is None or len(message) <= len(self._probe[1]):
            self._probe = mode, message
        return message, headed - began, coded - headed

    def _slot(self, feeds: Mapping[str, np.ndarray], rows: int) -> _Slot:
        """A free set of buffers for such inputs, or a new one. Raises UsageError."""
        key = tuple((name, feeds[name].shape, feeds[name].dtype) for name in self._inputs)
        with self._lock:
            for place, slot in enumerate(self._slots):
                if slot.key == key:
                    return self._slots.pop(place)
        binding = self._head.bind()
        inputs = {name: np.empty(feeds[name].shape, feeds[name].dtype) for name in self._inputs}
        encoder, latent = np.zeros((), np.int64), np.empty((rows, *self._shape), np.float32)
        score = np.empty(rows, np.float32)
        for name, array in inputs.items():
            binding.input(name, array)
        if ENCODER in self._head.inputs:
            binding.input(ENCODER, encoder)
        binding.output(self._latent, latent)
        if SCORE in self._head.outputs:
            binding.output(SCORE, score)
        return _Slot(key, binding, inputs, encoder, latent, score)

    def _alone(self, feeds: Mapping[str, np.ndarray], rows: int) -> tuple[dict[str, np.ndarray], float]:
        """The device's own answer and its seconds: the local graph, or the best encoder and the tail."""
        assert self._own is not None
        began = time.monotonic()
        given = dict(feeds)
        if not self._whole:
            if ENCODER in self._head.inputs:
                given[ENCODER] = np.array(max(mode.encoder for mode in self.modes))
            given = {next(iter(self._own.inputs)): self._head.run(given)[self._latent]}
        outputs = self._own.run(given)
        took = time.monotonic() - began
        self._measured(LOCAL, rows, took)
        return outputs, took

    # Threads

    def _run_alone(self, race: _Race, feeds: Mapping[str, np.ndarray], rows: int) -> None:
        try:
            own, took = self._alone(feeds, rows)
            race.put(own=own, own_took=took)
        except ShoalError as error:
            race.put(own_failed=error)

    def _ask(self, race: _Race, mode: Mode, message: bytes, rows: int, timeout: float) -> None:
        """Asks the link, learns from what it did, and says what came of it."""
        began = time.monotonic()
        try:
            reply = self._link.ask(mode.id, message, timeout)
            if not reply.outputs or any(array.shape[:1] != (rows,) for array in reply.outputs.values()):
                raise LinkError("The edge's answer makes no sense.", f"It is not of {rows} images.", "Check the edge.")
            found: dict = {"reply": reply}
        except ShoalError as error:
            found = {"failed": error}
        except Exception as error:  # a link of somebody else's
            why = " ".join(str(error).split())[:300] or type(error).__name__
            found = {"failed": LinkError("The link failed.", f"{type(error).__name__}: {why}", "Mend the link.")}
        now = time.monotonic()
        took = now - began
        with self._lock:
            self._asking -= 1
            known, size = self.knowledge, len(message)
            if isinstance(found.get("failed"), LinkError):
                self.knowledge = known.lost(now)
            elif "failed" in found:
                self.knowledge = known.late(size, took, now, self.terms)
            else:
                self.knowledge = known.answered(size, took, reply.tail_seconds, now, self.terms, rows)
        race.put(**found, took=took)

    def _take_probe(self, now: float) -> bool:
        """Whether the link is to be tried now, by the caller. The lock is held."""
        if self._probe is None or self._probing or not self.knowledge.due(now, self.terms):
            return False
        self._probing = True
        self._asking += 1
        return True

    def _try_link(self) -> None:
        assert self._probe is not None
        mode, message = self._probe
        try:
            self._ask(_Race(), mode, message, 1, _PROBE)
        finally:
            self._probing = False

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        """A thread that is waited for by close()."""

        def body() -> None:
            try:
                work(*arguments)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=body, name="shoal-split", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()
