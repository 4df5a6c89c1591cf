"""Which tokens run next: requests share one cache and every step, and no thread of our own does the work.

A request waits for a slot, is prefilled chunk by chunk, then decodes in one batch with all others. Whoever waits for a
token takes the next step on behalf of everybody, so a lone caller pays no hand-over, many callers share steps, and
nothing runs when nobody waits. Sampling, stop strings and constraints belong to a request; a failure in one (a logit
processor that raises) ends that request and no other. It knows nothing about files, chat or HTTP.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..errors import BackendError, BusyError, ContextError, ShoalError
from .cache import Cache, common_prefix
from .decoder import Decoder
from .sampling import Sampler
from .stop import StopStrings
from .tokens import Detokenizer


@dataclass
class Stats:
    """A request's running figures; times in seconds. `finish` is stop, length or cancelled, None while it runs."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    slid_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    time_to_first_token_s: float = 0.0
    finish: str | None = None

    @property
    def prefill_tokens_per_s(self) -> float:
        done = self.prompt_tokens - self.reused_tokens
        return done / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Token:
    """One token of an answer. `text` may be empty (half a character, or a possible stop string); `logprob` is natural,
    of the model's distribution; `top` are the likeliest (id, logprob) where asked for."""

    text: str
    id: int
    logprob: float
    stats: Stats
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    """A prompt on its way to an answer. `ids` grows as tokens are chosen."""

    ids: list[int]
    max_tokens: int | None
    sampler: Sampler
    detokenizer: Detokenizer
    stop: StopStrings
    ends: frozenset[int]
    slide: bool = False
    top: int = 0
    constraint: object = None
    stats: Stats = field(default_factory=Stats)
    ready: deque = field(default_factory=deque)
    error: ShoalError | None = None
    cancelled: bool = False
    done: bool = False
    slot: int = -1
    prompt: int = 0
    mixed: bool = False  # its row was begun with other weights
    begun: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def __post_init__(self):
        self.prompt = self.stats.prompt_tokens = len(self.ids)


class Scheduler:
    """Shares `decoder` among requests. `queue` bounds how many may wait for a slot."""

    def __init__(self, decoder: Decoder, *, queue: int = 256):
        self.decoder, self.queue = decoder, queue
        self._turn = threading.Condition()
        self._stepping = False
        self._claims = 0  # who waits to work between two steps, and goes before the next one
        self._closed = False
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []  # the first `_decoding` of the slots decode together

    @property
    def cache(self) -> Cache:
        return self.decoder.cache

    def load(self) -> tuple[int, int]:
        """(requests in slots, requests waiting)."""
        return len(self._active), len(self._waiting)

    def release_cancelled(self) -> None:
        """Frees the slots of cancelled requests now, or at the end of the step that is being taken."""
        with self._turn:
            if self._stepping:
                return
            self._stepping = True
        try:
            self._sweep()
        finally:
            self._release()

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ContextError where it cannot fit and BusyError where the queue is full."""
        context = self.cache.context
        room = context - len(request.ids)
        if not request.slide and room < max(1, request.max_tokens or 1):
            raise ContextError(
                f"The prompt and its answer do not fit the context of {context} tokens.",
                f"The prompt has {len(request.ids)} tokens and the answer may have {request.max_tokens or 1}.",
                "Shorten the prompt, ask for fewer tokens, load with a longer context, or ask for overflow='slide'.",
            )
        with self._turn:
            if self._closed:
                raise BackendError("The model is closed.", "close() was called.", "Load it again.")
            if len(self._waiting) >= self.queue:
                raise BusyError(
                    f"{len(self._waiting)} requests wait already.",
                    "All slots are taken and the queue is full.",
                    "Try later.",
                )
            self._waiting.append(request)

    def pump(self, request: Request, timeout: float | None = None) -> None:
        """Takes one step for everybody, or waits (at most `timeout`, 1 s by default) while another thread takes it."""
        if not self._take(request, timeout or 1.0):
            return
        try:
            self._step()
        except BaseException as error:
            self._fail_all(error)
            if not isinstance(error, ShoalError):
                raise
        finally:
            self._release()

    def exclusively(self, work: Callable[[], object]):
        """Runs `work` between two steps and returns its result: how a cache is resized while it serves."""
        with self._turn:
            self._claims += 1
            try:
                while self._stepping:
                    self._turn.wait(1.0)
                self._stepping = True
            finally:
                self._claims -= 1
        try:
            return work()
        finally:
            self._release()

    def reweigh(self, work: Callable[[], object]):
        """Like `exclusively`, for work that changes the model's weights: answers under way go on from what their rows
        hold, but no later prompt begins with a row that other weights have made."""

        def change() -> object:
            result = work()
            busy = {request.slot for request in self._active}
            for request in self._active:
                request.mixed = True
            for slot, held in enumerate(self.cache.held):
                if slot not in busy:
                    held.clear()
            return result

        return self.exclusively(change)

    def close(self) -> None:
        """Ends every request: whoever still takes its tokens gets a BackendError, and later ones are refused."""
        with self._turn:
            self._closed = True
            for request in (*self._waiting, *self._active):
                if not request.done:
                    request.error = BackendError("The model is closed.", "close() was called.", "Load it again.")
                request.cancelled = True
        self.exclusively(self._sweep)

    def longest(self) -> int:
        """The most positions that a live request holds."""
        return max((len(request.ids) for request in self._active), default=0)

    # One step ---------------------------------------------------------------------------------------------------------

    def _take(self, request: Request, timeout: float) -> bool:
        with self._turn:
            if self._stepping or self._claims:
                self._turn.wait(timeout)
                return False
            if request.ready or request.done:
                return False
            self._stepping = True
            return True

    def _release(self) -> None:
        with self._turn:
            self._stepping = False
            self._turn.notify_all()

    def _step(self) -> None:
        self._sweep()
        self._admit()
        prefilling = [request for request in self._active if self._missing(request) > 1 or not request.first]
        if prefilling:
            self._prefill(min(prefilling, key=lambda request: request.begun))
        decoding = [
            request for request in self._active if request.first and not request.done and self._missing(request) == 1
        ]
        if decoding:
            self._decode(decoding)
        self._sweep()

    def _missing(self, request: Request) -> int:
        return len(request.ids) - len(self.cache.held[request.slot])

    def _sweep(self) -> None:
        """Frees the slots of what has ended; what their rows hold stays for a prompt that begins alike."""
        for request in [*self._active, *self._waiting]:
            if request.cancelled and not request.done:
                self._finish(request, "cancelled")
        for request in self._active:
            if request.done and request.mixed:
                self.cache.held[request.slot].clear()
        self._active = [request for request in self._active if not request.done]
        with self._turn:
            if any(request.done for request in self._waiting):
                self._waiting = deque(request for request in self._waiting if not request.done)

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.cache.slots:
            with self._turn:
                request = self._waiting.popleft()
            context = self.cache.context
            if len(request.ids) >= context:  # only where it may slide, or the cache shrank meanwhile
                if not request.slide:
                    request.error = ContextError(
                        f"The prompt no longer fits the context of {context} tokens.", "The context was made shorter.",
                        "Shorten the prompt or give the model more memory.",
                    )  # fmt: skip
                    self._finish(request, "length")
                    continue
                self._slide(request)
            taken = {other.slot: other for other in self._active}
            free = [slot for slot in range(self.cache.slots) if slot not in taken]
            shared = [
                0 if slot in taken and taken[slot].mixed else common_prefix(held, request.ids)
                for slot, held in enumerate(self.cache.held)
            ]
            # The best row, and among equals the one that holds least
            request.slot = max(free, key=lambda slot: (shared[slot], -len(self.cache.held[slot])))
            best = max(range(self.cache.slots), key=lambda slot: shared[slot])
            if shared[best] > shared[request.slot]:
                self.cache.copy(best, request.slot, shared[best])
            reused = min(max(shared), len(request.ids) - 1)  # the last token's logits are needed
            del self.cache.held[request.slot][reused:]
            request.stats.reused_tokens = reused
            self._active.append(request)

    def _prefill(self, request: Request) -> None:
        held = self.cache.held[request.slot]
        alone = len(self._active) == 1 and not self._waiting
        part = request.ids[len(held) : len(held) + self.decoder.most(alone)]
        last = len(held) + len(part) == len(request.ids)
        started = time.perf_counter()
        logits = self.decoder.take(request.slot, part, len(held), last)
        held.extend(part)
        request.stats.prefill_seconds += time.perf_counter() - started
        if last:
            self._choose(request, logits[0])

    def _decode(self, requests: list[Request]) -> None:
        # The rows that decode together must be the first ones of the cache
        for index, request in enumerate(sorted(requests, key=lambda request: request.slot)):
            if request.slot != index:
                other = next((other for other in self._active if other.slot == index), None)
                self.cache.swap(index, request.slot)
                if other:
                    other.slot = request.slot
                request.slot = index
        requests = sorted(requests, key=lambda request: request.slot)
        lengths = [len(self.cache.held[request.slot]) for request in requests]
        tokens = np.array([[request.ids[-1]] for request in requests], np.int64)
        started = time.perf_counter()
        logits = self.decoder.forward(0, tokens, lengths, list(range(len(requests))))
        for request in requests:
            self.cache.held[request.slot].append(request.ids[-1])
        spent = time.perf_counter() - started
        for request, row in zip(requests, logits, strict=True):
            request.stats.decode_seconds += spent
            self._choose(request, row)

    def _choose(self, request: Request, logits: np.ndarray) -> None:
        started = time.perf_counter()
        try:
            self._append(request, logits)
        except ShoalError as error:
            request.error = error
            self._finish(request, "cancelled")
        except Exception as error:  # a caller's logit processor or constraint
            request.error = ShoalError(
                "A request was ended by its own logit processor.",
                f"{type(error).__name__}: {error}",
                "Mend the processor.",
            )
            self._finish(request, "cancelled")
        if request.stats.generated_tokens > 1:
            request.stats.decode_seconds += time.perf_counter() - started

    def _append(self, request: Request, logits: np.ndarray) -> None:
        stats, constraint = request.stats, request.constraint
        if constraint is not None:
            constraint.mask(logits)  # type: ignore[attr-defined]
        chosen, logprob = request.sampler.choose(logits, request.ids)
        top = tuple(request.sampler.top(request.top)) if request.top else ()
        request.ids.append(chosen)
        stats.generated_tokens += 1
        if not request.first:
            request.first = time.perf_counter()
            stats.time_to_first_token_s = request.first - request.begun
        finish = None
        if chosen in request.ends:
            finish = "stop"
        elif constraint is not None:
            constraint.accept(chosen)  # type: ignore[attr-defined]
            finish = "stop" if constraint.finished else None  # type: ignore[attr-defined]
        text = "" if chosen in request.ends else request.stop.push(request.detokenizer.push(chosen))
        if request.stop.found:
            finish = "stop"
        elif finish is None:
            if request.max_tokens is not None and stats.generated_tokens >= request.max_tokens:
                finish = "length"
            elif len(request.ids) >= self.cache.context:
                if request.slide:
                    self._slide(request)
                else:
                    finish = "length"
        if finish and not request.stop.found:
            text += request.stop.push(request.detokenizer.flush()) + request.stop.flush()
        if finish:
            stats.finish = finish
        request.ready.append(Token(text, chosen, logprob, stats, top))
        if finish:
            self._finish(request, finish)

    def _slide(self, request: Request) -> None:
        """Drops the oldest tokens but the first four, which attention leans on (Xiao et al. 2023), so that half of
        the context is free; what remains is computed again, so the answer is exact for what the model then sees."""
        context = self.cache.context
        first, keep = request.ids[:4], max(1, context // 2 - 4)
        request.stats.slid_tokens += len(request.ids) - len(first) - keep
        request.ids[:] = first + request.ids[-keep:]
        if request.slot >= 0:
            held = self.cache.held[request.slot]
            del held[min(common_prefix(held, request.ids), len(request.ids) - 1) :]  # the last one's logits are needed

    def _finish(self, request: Request, reason: str) -> None:
        request.stats.finish = request.stats.finish or reason
        request.done = True

    def _fail_all(self, error: BaseException) -> None:
        """A step that failed leaves rows half written: their requests end with the reason, the rows are forgotten."""
        failure = error if isinstance(error, ShoalError) else BackendError(
            "A step was interrupted.", f"{type(error).__name__}: {error}", "Ask again."
        )  # fmt: skip
        for request in self._active:
            request.error = failure
            self._finish(request, "cancelled")
            self.cache.held[request.slot].clear()
        self._active.clear()
