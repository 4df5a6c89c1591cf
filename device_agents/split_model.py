"""Text from a model that is not all here: the first blocks on the device and the rest on the edge, or all of it there.

    model = SplitModel(front, connect)
    async for token in model.generate("Why is the sky blue?"):
        print(token.text, end="")

A link may die at any byte. What the edge has is never guessed: a request says where its rows begin, after a link that
broke the edge is asked what it holds, and what it lacks the front computes again. `connect` gives a
connection that works, or waits for one; when none comes within `patience` seconds, a whole model that is here goes on
where the edge stopped, if there is one. Every token says where it was computed. It knows nothing about links.
"""

import asyncio
import secrets
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import numpy as np

from shoal.runtime.errors import BusyError, ContextError, LinkError, UsageError
from shoal.runtime.language import streams
from shoal.runtime.language.cache import common_prefix
from shoal.runtime.language.model import LanguageModel
from shoal.runtime.language.part import Part
from shoal.runtime.language.prompt import Prompt
from shoal.runtime.language.sampling import Sampler, Sampling
from shoal.runtime.language.stop import StopStrings

from .language import joint
from .messages import Continue, Continued, Generate, Token, decode
from .states import Priority

Connect = Callable[[], Awaitable[Any]]
_LENGTH = struct.Struct("<I")
_MOST = 64 << 10  # bytes of one Token
_FRUITLESS = 5  # links that die before the next token, one after the other
_PAUSES = (0.05, 0.2, 0.5, 1.0)  # seconds before another try, after which the last one stays


@dataclass(frozen=True)
class Piece:
    """One token of an answer. `where` is "device", or what the edge calls itself: where its last block was run.
    `finish` is stop or length with the last one; `sent` are the positions that went over the link for it."""

    id: int
    text: str
    where: str
    finish: str = ""
    sent: int = 0


class _Tries:
    """Does something over a link until it works: another link, or the same after a pause, for `patience` seconds."""

    def __init__(self, connect: Connect, patience: float):
        self._connect, self._patience = connect, patience

    async def __call__(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        """What `work` makes of a connection. Raises LinkError or BusyError when patience ends, and every other error
        at once. `work` says by a LinkError that it wants another try."""
        loop = asyncio.get_running_loop()
        end, tries = loop.time() + self._patience, 0
        while True:
            try:
                async with asyncio.timeout_at(end):
                    connection = await self._connect()
                return await work(connection)
            except TimeoutError:
                raise LinkError(
                    "There is no link to the edge.", f"None came within {self._patience:g} s.", "Check the line."
                ) from None
            except (LinkError, BusyError) as error:
                pause = getattr(error, "retry_ms", 0) / 1000 or _PAUSES[min(tries, len(_PAUSES) - 1)]
                tries += 1
                if loop.time() + pause >= end:
                    raise
                await asyncio.sleep(pause)


class SplitModel:
    """A front (a part from block 0) here and its rest on the edge, in one session; one answer at a time.

    `format` is how the stream travels: float32, float16 or int8 (see runtime/language/streams.py). `rest` names the
    edge's bundle; by default the edge finds what fits the front. `local` is a whole model with the same tokens. The
    front's `slot` is this model's alone.
    """

    def __init__(
        self, front: Part, connect: Connect, *, format: str = "float16", rest: str = "", slot: int = 0,
        timeout: float = 20.0, patience: float = 30.0, local: LanguageModel | None = None,
    ):  # fmt: skip
        if not front.takes_tokens or front.gives_logits:
            raise UsageError(
                "This is no front of a model.", "It has no first blocks only.", "Convert with --blocks 0:n."
            )
        if local is not None and (local.card.vocab, local.card.eos) != (front.card.vocab, front.card.eos):
            raise UsageError("The local model has other tokens.", "It is of another family.", "Use one of the same.")
        streams.row_bytes(front.card.hidden, format)
        self.front, self.local, self.format, self.timeout = front, local, format, timeout
        self.session = secrets.token_hex(8)
        self._rest = rest or joint(front.card, front.card.span.stop)
        self._slot, self._tries = slot, _Tries(connect, patience)
        self._text: list[int] = []  # what was last to be there
        self._alike: float = inf  # of how many rows that the edge may hold it is certain that they are of this text
        self._held = 0  # how many rows the edge said that it has
        self._sure = True  # that nothing happened since
        self._turn = 0
        self._busy = asyncio.Lock()

    async def generate(
        self, prompt: Prompt, *, max_tokens: int = 256, stop: str | Sequence[str] = (), raw: bool = False,
        sampling: Sampling | None = None, ignore_end: bool = False, **options,
    ) -> AsyncIterator[Piece]:  # fmt: skip
        """The answer, token by token; arguments as of LanguageModel.generate.

        The edge samples. With a repetition penalty or processors it sends logits and the device samples. Raises
        UsageError, ContextError, LinkError and BusyError (no edge, and no local model), RemoteError.
        """
        if sampling is not None and options:
            raise UsageError("sampling and single options were both given.", "They overlap.", "Give one of them.")
        sampling = sampling or Sampling.of(options)
        if type(max_tokens) is not int or max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens!r}.", "It must be 1 or more.", "Correct it.")
        ids = self.front.prompt_ids(prompt, raw=raw)
        if len(ids) + max_tokens > self.front.context:
            raise ContextError(
                f"The prompt and its answer do not fit the context of {self.front.context} tokens.",
                f"The prompt has {len(ids)} and the answer may have {max_tokens}.", "Ask for fewer.",
            )  # fmt: skip
        async with self._busy:
            text, stops = self.front.tokenizer.stream(), StopStrings((stop,) if isinstance(stop, str) else tuple(stop))
            ends = frozenset() if ignore_end else frozenset(self.front.card.eos)
            source = self._ids(ids, max_tokens, sampling)
            try:
                made = 0
                async for chosen, where, sent in source:
                    made += 1
                    said = "" if chosen in ends else stops.push(text.push(chosen))
                    finish = "stop" if chosen in ends or stops.found else "length" if made >= max_tokens else ""
                    if finish and not stops.found:
                        said += stops.push(text.flush()) + stops.flush()
                    yield Piece(chosen, said, where, finish, sent)
                    if finish:
                        return
            finally:
                await source.aclose()

    async def _ids(self, ids: list[int], count: int, sampling: Sampling):
        """(id, where, positions sent) of `count` tokens after `ids`, which grows."""
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(62)
        here = Sampler(sampling) if sampling.processors or sampling.repetition_penalty != 1.0 else None
        while count:
            try:
                chosen, where, sent = await self._tries(lambda link: self._step(link, ids, sampling, seed, here))
            except (LinkError, BusyError):
                if self.local is None:
                    raise
                break
            ids.append(chosen)
            count -= 1
            yield chosen, where, sent
        else:
            return
        assert self.local is not None
        answer = self.local.agenerate(ids, max_tokens=count, sampling=sampling, ignore_end=True)
        async for token in answer:
            ids.append(token.id)
            yield token.id, "device", 0

    async def _step(
        self, link, ids: list[int], sampling: Sampling, seed: int, here: Sampler | None
    ) -> tuple[int, str, int]:
        """One token: brings the edge up to date with `ids`."""
        # A text that leaves the last one: until the edge has taken its rows, it may have those of either
        alike = common_prefix(self._text, ids)
        if alike < len(self._text):
            self._alike = min(self._alike, alike)
        self._text = list(ids)
        sent = 0
        while True:
            first = self._first()
            if not self._sure or 0 < first < len(ids) - 1:
                # Many rows would be lost on an edge that has forgotten what is before them
                answer, _ = await self._exchange(link, self._message(first, 0, sampling, seed, "nothing"))
                self._held = answer.held
                first = self._first()
            rows = len(ids) - first
            answer, body = await self._exchange(
                link, self._message(first, rows, sampling, seed, "logits" if here else "")
            )
            sent += rows
            if answer.tokens or answer.rows:
                break
            if answer.held >= first:  # or it would go on for ever
                raise LinkError("The edge's answer makes no sense.", "It lacks nothing and gives nothing.", "Retry.")
            self._held = answer.held
        self._held, self._alike = len(ids), inf
        where = getattr(link.peer, "name", "") or "edge"
        if here is None:
            chosen = answer.tokens[0]
        else:
            logits = np.frombuffer(body, "<f4")
            if len(logits) != self.front.card.vocab:
                raise LinkError("The edge's logits are of another model.", f"There are {len(logits)}.", "Check it.")
            chosen = here.choose(logits, ids)[0]
        if not 0 <= chosen < self.front.card.vocab:
            raise LinkError("The edge's token is of another model.", f"Its id is {chosen}.", "Check the edge's model.")
        return chosen, where, sent

    def _first(self) -> int:
        """The first position that the edge lacks, as far as is known; the last one's logits are needed in any case."""
        return int(max(0, min(self._held, self._alike, len(self._text) - 1)))

    def _message(self, first: int, rows: int, sampling: Sampling, seed: int, want: str) -> Continue:
        self._turn += 1
        return Continue(
            self._rest, self.session, first=first, rows=rows, dtype=self.format, want=want, turn=self._turn,
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
            seed=seed % (1 << 62),
        )  # fmt: skip

    async def _exchange(self, link, message: Continue) -> tuple[Continued, bytes]:
        """Sends the rows that a message announces, computed as they go; returns the answer and its body."""
        self._sure, end = False, message.first + message.rows
        async with link.request(message, priority=Priority.LATENT, timeout=self.timeout, more=message.rows > 0) as call:
            for start in range(message.first, end, self.front.chunk):
                part = self._text[start : min(end, start + self.front.chunk)]
                rows = await asyncio.to_thread(self.front.forward, self._slot, part, start)
                await call.write(streams.pack(rows, self.format))
            if message.rows:
                await call.end()
            answer = await call.reply()
            if not isinstance(answer, Continued):
                raise LinkError("The edge's answer makes no sense.", f"{type(answer).__name__}.", "Upgrade shoal.")
            body = await call.read(4 * self.front.card.vocab)
            self._sure = True
            return answer, body


class EdgeModel:
    """A whole model that runs on the edge; `model` is its name or digest there."""

    def __init__(self, connect: Connect, model: str, *, timeout: float = 60.0, patience: float = 30.0):
        self.model, self.timeout = model, timeout
        self._tries = _Tries(connect, patience)

    async def generate(
        self, prompt: str | Sequence[int], *, max_tokens: int = 256, stop: str | Sequence[str] = (), **options
    ) -> AsyncIterator[Piece]:
        """The answer, token by token, each once, whatever happens to the link. `options` are temperature, top_k, top_p,
        min_p and seed. Raises LinkError and BusyError when patience ends, RemoteError, and what the edge raises."""
        sampling = Sampling.of(options)
        if sampling.processors or sampling.repetition_penalty != 1.0:
            raise UsageError("The edge takes no such option.", "It has its own sampler.", "Leave it out.")
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(62)
        text, tokens = (prompt, ()) if isinstance(prompt, str) else ("", tuple(prompt))
        request = Generate(
            self.model, secrets.token_hex(8), tokens, text, max_tokens, sampling.temperature, sampling.top_p,
            seed % (1 << 62), (stop,) if isinstance(stop, str) else tuple(stop), sampling.top_k, sampling.min_p,
        )  # fmt: skip
        fruitless = 0
        while True:
            stream = await self._tries(partial(_Stream.open, request, self.timeout))
            try:
                async for token in stream:
                    request, fruitless = replace(request, first=request.first + 1), 0
                    yield Piece(token.id, token.text, stream.where, token.finish)
                    if token.finish:
                        return
                raise LinkError("The edge's answer ended early.", f"{request.first} tokens came.", "Ask again.")
            except LinkError:  # it is asked for again, from where it stopped
                fruitless += 1
                if fruitless > _FRUITLESS:
                    raise
                await asyncio.sleep(_PAUSES[min(fruitless, len(_PAUSES)) - 1])
            finally:
                stream.close()


class _Stream:
    """The tokens of one call."""

    def __init__(self, call, where: str):
        self._call, self.where = call, where

    @classmethod
    async def open(cls, message: Generate, timeout: float, link) -> "_Stream":
        call = link.request(message, timeout=timeout)
        try:
            await call.reply()
        except BaseException:
            call.cancel()
            raise
        return cls(call, getattr(link.peer, "name", "") or "edge")

    async def __aiter__(self) -> AsyncIterator[Token]:
        while header := await self._call.exactly(_LENGTH.size):
            [length] = _LENGTH.unpack(header)
            if length > _MOST:
                raise LinkError("The edge's answer makes no sense.", f"A token has {length} bytes.", "Upgrade shoal.")
            token = decode(await self._call.exactly(length))
            if not isinstance(token, Token):
                raise LinkError("The edge's answer makes no sense.", f"{type(token).__name__}.", "Upgrade shoal.")
            yield token

    def close(self) -> None:
        self._call.cancel()
