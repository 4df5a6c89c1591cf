"""A language model as an app sees it: prompts in, tokens out.

    with shoal.load("model.shoal", memory="200MB") as model:
        for token in model.generate("Why is the sky blue?"):
            print(token.text, end="")

Any thread may call `generate`; requests share steps (see scheduler.py). A `Generation` belongs to the thread that
iterates it; its `cancel` may be called from any.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from .. import measure
from ..budget import Plan, parse_size
from ..errors import BudgetError, BusyError, UsageError
from ..experts.trace import Trace
from ..loaded import Loaded
from .decoder import Decoder
from .prompt import Prompt, Prompts
from .sampling import Sampler, Sampling
from .scheduler import Request, Scheduler, Stats, Token
from .stop import StopStrings
from .tokens import Tokenizer

if TYPE_CHECKING:
    from ..bitstack.pressure import Watcher
    from ..static.prefill import Prefill


class LanguageModel(Prompts, Loaded):
    """Made by `shoal.load`. `card`, `plan`, `tokenizer`, `chat_template` say what it is."""

    def __init__(self, parts, tokenizer: Tokenizer, chat_template: str, decoder: Decoder, queue: int = 256):
        super().__init__(parts)
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.scheduler = Scheduler(decoder, queue=queue)
        self._begun: list[int] | None = None  # of the experts' trace: the first token of each sequence
        self._context = self.plan.context  # what is asked for, where a stack's floor leaves room for it
        if self.stack is not None:
            self.stack.between = self.scheduler.reweigh
        if self.experts is not None:
            self.experts.between = self.scheduler.exclusively

    @property
    def prefill(self) -> "Prefill | None":
        """How prompts go through static graphs, and whether their device is lost; None where they do not."""
        return self.scheduler.decoder.prefill

    def generate(
        self, prompt: Prompt, *, max_tokens: int | None = None, stop: str | Sequence[str] = (),
        sampling: Sampling | None = None, overflow: str = "refuse", tools: list | None = None, logprobs: int = 0,
        constraint=None, timeout: float | None = None, raw: bool = False, ignore_end: bool = False,
        **options,
    ) -> "Generation":  # fmt: skip
        """Starts an answer; iterate the result for its tokens.

        `prompt` is a text, token ids, or chat messages ({"role", "content"}). A text goes through the chat template
        where the model has one, unless `raw`. `max_tokens` None means until the model ends or the context is full.
        `overflow` is "refuse" or "slide" (drop the oldest tokens, keep the first four). `logprobs` n gives the n
        likeliest ids of each step. `constraint` comes from `model.constrain`. `timeout` in seconds bounds the whole
        answer. `ignore_end` goes on past the model's end token (benchmarks). `options` are Sampling's fields.
        Raises UsageError, ContextError, BusyError.
        """
        if sampling is not None and options:
            raise UsageError("sampling and single options were both given.", "They overlap.", "Give one of them.")
        sampling = sampling or Sampling.of(options)
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise UsageError(
                f"max_tokens is {max_tokens!r}.", "It must be a whole number of at least 1.", "Correct it."
            )
        if type(logprobs) is not int or not 0 <= logprobs <= 100:
            raise UsageError(f"logprobs is {logprobs!r}.", "It must be from 0 to 100.", "Correct it.")
        if overflow not in ("refuse", "slide"):
            raise UsageError(f"overflow is {overflow!r}.", "It is refuse or slide.", "Name one.")
        request = Request(
            ids=self.prompt_ids(prompt, tools=tools, raw=raw), max_tokens=max_tokens, sampler=Sampler(sampling),
            detokenizer=self.tokenizer.stream(), stop=StopStrings((stop,) if isinstance(stop, str) else tuple(stop)),
            ends=frozenset(() if ignore_end else self.card.eos), slide=overflow == "slide", top=logprobs,
            constraint=constraint,
        )  # fmt: skip
        if self.experts is not None:
            if self._begun is not None:
                self._begun.append(self.experts.recorded(self.card.top_k))
            if self.plan.slots == 1:  # what the last conversation used counts no more
                self.experts.restart()
        self.scheduler.submit(request)
        return Generation(self.scheduler, request, timeout)

    def generate_batch(self, prompts: Sequence[Prompt], **options) -> "list[Generation]":
        """Answers to several prompts, finished, in their order; they share steps as far as there are slots."""
        running = []
        for prompt in prompts:
            while True:
                try:
                    running.append(self.generate(prompt, **options))
                    break
                except BusyError:  # the queue is full of our own: let the oldest that lives go on
                    next((g for g in running if not g.finished), running[0])._advance()
        for generation in running:
            generation.finish()
        return running

    async def agenerate(self, prompt: Prompt, **options) -> AsyncIterator[Token]:
        """`generate` for asyncio: steps run in worker threads, the event loop stays free. Leaving the loop early
        cancels the answer and frees its slot."""
        generation = await asyncio.to_thread(self.generate, prompt, **options)
        try:
            while (token := await asyncio.to_thread(next, generation, None)) is not None:
                yield token
        finally:
            generation.cancel()

    @cached_property
    def _constrainer(self):
        from .constrain import Constrainer

        return Constrainer(self.tokenizer, self.card.vocab, self.card.eos)

    def constrain(self, **grammar):
        """A constraint for one `generate`: json_schema=, regex=, lark= or json_object=True. Needs llguidance."""
        return self._constrainer.constrain(**grammar)

    def set_memory(self, memory: "int | str") -> Plan:
        """Grows or shrinks the elastic rows to a new budget between two steps, while answers go on: the context or, of
        a model that has them, the stack or the slots for experts, and then the context only where not even the fewest
        of these fit beside it.

        Reading and verifying blocks is done beside the steps, by this thread. Raises BudgetError, where live answers
        need more than would remain, and BundleError for a damaged block; nothing has changed then.
        """
        keep = self._context if self.elastic is not None else None
        return self._resize(memory=parse_size(memory), context=None, keep=keep)

    @contextmanager
    def trace_experts(
        self, path: str | PathLike, *, tokens: int = 1 << 16, scores: bool = True, inputs: bool = False
    ) -> Iterator[None]:
        """Records which experts the tokens of this block's work go to, and writes the trace to `path` at its end: of up
        to `tokens` of them, the router's `scores` and the experts' `inputs` where they are wanted (Trace has shapes). A
        sequence is what ran between two calls of generate, so answers should come one after the other.
        Raises UsageError for a model without experts, and for a block in which nothing ran."""
        if self.experts is None:
            raise UsageError("The model has no experts.", "It is not a mixture.", "Name a bundle of one that is.")
        store, card = self.experts, self.card
        store.record_routing(tokens, scores=scores, inputs=inputs)
        self._begun = [0]
        try:
            yield
            kept = store.routing(card.top_k, card.hidden)
            begun = sorted({start for start in self._begun if start < len(kept["ids"])})
        finally:
            store.record_routing(0)
            self._begun = None
        Trace(
            card.name, card.experts, kept["ids"], np.array(begun, np.int64), _half(kept.get("scores")),
            _half(kept.get("inputs")), store.record,
        ).save(path)  # fmt: skip

    def follow_memory(self, **options) -> "Watcher":
        """Lets the budget follow the system's memory from now on, by itself; close() ends it, the model's does too.
        `options` are those of bitstack.pressure.Watcher."""
        from ..bitstack.pressure import Watcher

        watcher = Watcher(self, **options)
        self.parts.kept.append(watcher)
        return watcher.start()

    def set_context(self, context: int) -> Plan:
        """Like set_memory, by the length of the context; within a budget the stack makes room for it."""
        with self._resizing:
            memory = self.plan.memory
            entries = self.plan.entries if memory is None and self.elastic is not None else None
        plan = self._resize(memory=memory, context=context, entries=entries)
        self._context = plan.context
        return plan

    def _resize(self, **wanted) -> Plan:
        with self._resizing:
            self._open()
            # The engine keeps what a chunk took, so its length stays
            before, plan = self.plan, self.parts.replan(**wanted, chunk=self.plan.chunk, loaded=True)
            # What shrinks makes room for what grows
            steps = [self._move_cache, self._move_stack]
            if plan.entries < before.entries:
                self._refuse_shorter(plan)
                steps.reverse()
            try:
                for step in steps:
                    step(plan)
            except BaseException:
                for step in reversed(steps):
                    step(before)
                raise
            self.plan = plan
            return plan

    def _move_stack(self, plan: Plan) -> None:
        if self.elastic is not None and plan.entries != self.elastic.entries:
            self.elastic.set_entries(plan.entries)

    def _move_cache(self, plan: Plan) -> None:
        def work() -> None:
            self._refuse_shorter(plan)
            before = measure.anonymous_bytes()
            self.scheduler.decoder.resize(plan.context)
            after = measure.anonymous_bytes()
            if self.parts.base is not None and before is not None and after is not None:
                self.parts.base += after - before

        if plan.context != self.scheduler.cache.context:
            self.scheduler.exclusively(work)

    def _refuse_shorter(self, plan: Plan) -> None:
        longest = self.scheduler.longest()
        if plan.context <= longest:
            error = BudgetError(
                f"The context cannot shrink to {plan.context} tokens now.", f"An answer under way holds {longest}.",
                "Wait for it to end, cancel it, or allow more memory.",
            )  # fmt: skip
            error.plan = plan  # type: ignore[assignment]
            raise error

    def measure(self) -> dict[str, int | None]:
        found = super().measure() | self.scheduler.decoder.measure()
        if (static := found.get("static weights")) and found.get("weights"):  # of the same file
            found["weights"] = max(0, (found["weights"] or 0) - static)
        return found

    def close(self) -> None:
        if self.closed:
            return
        self.scheduler.close()
        self.scheduler.exclusively(self.scheduler.decoder.close)
        super().close()


def _half(array: np.ndarray | None) -> np.ndarray | None:
    """In fp16, as traces keep it; what is beyond that as its largest."""
    return None if array is None else array.clip(-65504, 65504).astype(np.float16)


class Generation(Iterator[Token]):
    """An answer under way. `text` is what has come so far, `stats` its figures."""

    def __init__(self, scheduler: Scheduler, request: Request, timeout: float | None = None):
        self._scheduler, self._request = scheduler, request
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self.text = ""

    @property
    def stats(self) -> Stats:
        return self._request.stats

    @property
    def finished(self) -> bool:
        """Whether no more tokens will be computed; some may wait to be taken."""
        return self._request.done

    def __next__(self) -> Token:
        request = self._request
        while True:
            if request.ready:
                token = request.ready.popleft()
                self.text += token.text
                return token
            if request.error is not None:
                raise request.error
            if request.done:
                raise StopIteration
            self._advance()

    def _advance(self) -> None:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            self.cancel()
            raise BusyError(
                "The answer took too long.", "Its timeout has passed.", "Allow more time or ask for fewer tokens."
            )
        self._scheduler.pump(self._request, left)

    def finish(self) -> str:
        """Takes the remaining tokens; returns the whole text."""
        for _ in self:
            pass
        return self.text

    def cancel(self) -> None:
        """Ends the answer before its next token; its slot is free at the next step, whoever takes it."""
        self._request.cancelled = True
        self._scheduler.release_cancelled()

    close = cancel

    def __del__(self) -> None:
        self._request.cancelled = True  # nobody can take its tokens any more; the next step frees its slot

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *error) -> None:
        self.cancel()
