"""Language models on the edge: the rest of the blocks for a device that has the first ones, and whole models.

`Continue` brings rows of the stream and gets the next token (or the logits of the last row). It says at which position
its rows begin: behind what the session holds they follow, before it they replace, and a gap is answered with `held`, so
a device that lost the link, or whose session was evicted, sends what is missing and nothing else. A request that is
repeated changes nothing and gets the same token: what is drawn depends on seed and position alone. `Generate` runs a
whole model, and an answer whose reader is gone waits for it for `keep` seconds, two while it is being computed: `first`
says which token comes next. Models are opened when they are first asked for, inside one budget. It knows nothing about
links.
"""

import asyncio
import dataclasses
import struct
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shoal.runtime.budget import DEFAULT_CONTEXT
from shoal.runtime.bundle import Bundle
from shoal.runtime.card import Card
from shoal.runtime.errors import BudgetError, BusyError, ContextError, LinkError, ShoalError, UsageError
from shoal.runtime.language import streams
from shoal.runtime.language.model import LanguageModel
from shoal.runtime.language.part import load_part
from shoal.runtime.language.sampling import Sampler, Sampling
from shoal.runtime.model import load, plan

from .messages import Continue, Continued, Generate, Generated, Token, encode
from .sessions import Rest, Sessions

_ANSWERS = 4  # answers of one device that are under way or kept
_UNREAD = 2.0  # seconds that an answer is computed on while nobody reads it
_LENGTH = struct.Struct("<I")


class Call(Protocol):
    """As connection.Call."""

    message: Any
    peer: Any

    async def answer(self, message: Any = None, body: bytes | None = None) -> None: ...
    async def exactly(self, size: int) -> bytes: ...
    async def write(self, data: bytes) -> None: ...


class Language:
    """The language models of a store (its `find`, `list` and `path`), at most `memory` bytes of them open at once.

    A part serves `slots` sessions and a whole model as many answers, of `context` tokens: by default 4096, or what the
    model and the memory allow. `name` is what tokens say of where they come from. Close it with `close`.
    """

    def __init__(
        self, store, *, memory: int | None = None, slots: int = 8, context: int | None = None, threads: int = 0,
        kv: str = "fp16", hold: float = 10.0, keep: float = 30.0, name: str = "edge",
    ):  # fmt: skip
        self.store, self.memory, self.hold, self.keep, self.name = store, memory, hold, keep, name
        self._context, self._threads_each = context, threads
        self._options: dict[str, Any] = dict(slots=slots, kv=kv)
        self._open: OrderedDict[str, Rest | LanguageModel] = OrderedDict()  # by digest, the longest unused first
        self._answers: dict[tuple[str, str], _Answer] = {}
        self._starting: list[LanguageModel] = []  # what is about to get a request
        self._opening = asyncio.Lock()
        self._threads = ThreadPoolExecutor(slots + 2, "generate")
        self._joints: dict[str, str] = {}  # digest of a part -> its joint, or "" for none
        self._found: dict[str, str] = {}  # joint -> digest

    async def serve(self, call: Call, owner: str) -> None:
        """Answers one Continue or Generate of the device `owner` (its fingerprint). A connection's handler calls it."""
        if isinstance(call.message, Continue):
            await self._continue(call, owner)
        elif isinstance(call.message, Generate):
            await self._generate(call, owner)
        else:
            raise UsageError("This is no request for a language model.", type(call.message).__name__, "Send another.")

    def forget(self, owner: str) -> None:
        """Frees what is kept for a device that was revoked."""
        for model in self._open.values():
            if isinstance(model, Rest):
                model.sessions.forget(owner)
        for key in [key for key in self._answers if key[0] == owner]:
            self._answers.pop(key).cancel()

    def snapshot(self) -> list[dict]:
        """Every open model, for a person."""
        found = []
        for digest, model in self._open.items():
            part = model.part if isinstance(model, Rest) else model
            shown = {"digest": digest, "name": part.card.name, "bytes": part.plan.total, "slots": part.plan.slots,
                     "context": part.plan.context, "blocks": [part.card.span.start, part.card.span.stop]}  # fmt: skip
            if isinstance(model, Rest):
                shown |= {"kind": "part", "sessions": len(model.sessions), "running": model.sessions.calls}
                shown |= {"positions": model.load.positions, "runs": model.load.runs, "seconds": model.load.seconds}
            else:
                running, waiting = model.scheduler.load()
                shown |= {"kind": "model", "running": running, "waiting": waiting}
            found.append(shown)
        return found

    async def close(self) -> None:
        """Ends every answer and frees every model."""
        for answer in self._answers.values():
            answer.cancel()
        await asyncio.gather(*(answer.task for answer in self._answers.values()), return_exceptions=True)
        self._answers.clear()
        async with self._opening:
            while self._open:
                await self._free(next(iter(self._open)))
        self._threads.shutdown(wait=False)

    # The rest of the blocks

    async def _continue(self, call: Call, owner: str) -> None:
        message: Continue = call.message
        now = asyncio.get_running_loop().time
        rest = await self._model(message.model, part=True)
        format, want = message.dtype or "float32", message.want or "token"
        size = streams.row_bytes(rest.part.card.hidden, format)
        if want not in ("token", "logits", "nothing"):
            raise UsageError(f"{want!r:.40} cannot be had.", "It is token, logits or nothing.", "Ask for one of these.")
        first, rows = message.first, message.rows
        if first < 0 or rows < 0:
            raise UsageError("The rows have no place.", f"{rows} from position {first}.", "Correct it.")
        if first + rows > rest.part.context:
            raise ContextError(
                f"{rows} tokens at position {first} do not fit the edge's context of {rest.part.context}.",
                "The cache is full.", "Begin a new text.",
            )  # fmt: skip
        finish = None if want == "nothing" else np.copy if want == "logits" else _chooser(message, first + rows)
        # Who only asks comes after no one: rows that arrived over a link that broke are still to be run
        session = rest.sessions.enter(owner, message.session, message.turn if rows else 0, now())
        try:
            if not rows:
                await rest.settled(session)
            if first > session.held or not rows:
                return await call.answer(Continued(message.session, held=session.held), b"")
            at, seconds = first, 0.0
            result: Any = None
            while at < first + rows:
                count = min(rest.part.chunk, first + rows - at)
                data = await call.exactly(count * size)
                if len(data) != count * size:
                    raise LinkError("The stream ended early.", f"{rows} rows were announced.", "Send them again.")
                x = streams.unpack(data, rest.part.card.hidden, format)
                last = at + count == first + rows
                result, spent = await rest.run(session, message.turn, x, at, finish if last else None)
                at, seconds = at + count, seconds + spent
            answer = Continued(message.session, compute_ms=seconds * 1000, held=session.held)
            if want == "token":
                await call.answer(dataclasses.replace(answer, tokens=(result,)), b"")
            elif want == "logits":
                logits = result.astype("<f4").tobytes()
                await call.answer(dataclasses.replace(answer, rows=1, dtype="float32"), logits)
            else:
                await call.answer(answer, b"")
        finally:
            rest.sessions.leave(session, now())

    # Whole models

    async def _generate(self, call: Call, owner: str) -> None:
        message: Generate = call.message
        request = dataclasses.replace(message, first=0)
        key = owner, message.session
        answer = self._answers.get(key) if message.session else None
        if answer is None or answer.request != request:
            if message.first and message.temperature > 0 and message.seed < 0:
                raise UsageError(
                    "The answer cannot go on.", "It is gone, and without a seed it would be another.", "Ask anew."
                )
            if answer is not None:
                self._answers.pop(key).cancel()
            own = [key for key in self._answers if key[0] == owner]
            if len(own) >= _ANSWERS:
                oldest = next((key for key in own if not self._answers[key].readers), None)
                if oldest is None:
                    raise BusyError(f"{_ANSWERS} answers of this device are under way.", "It asks too much.", "Wait.")
                self._answers.pop(oldest).cancel()
            model = await self._model(message.model, part=False)
            self._starting.append(model)
            try:
                answer = _Answer(request, await self._start(model, message), self._threads)
            finally:
                self._starting.remove(model)
            if not message.session:
                key = owner, f"\0{id(answer)}"  # nobody can come back for it
            self._answers[key] = answer
        answer.readers += 1
        try:
            await call.answer(Generated(message.session, message.model, self.name))
            at = max(0, message.first)
            while (ready := await answer.since(at)) is not None:
                at += len(ready)
                await call.write(b"".join(_LENGTH.pack(len(data)) + data for data in map(encode, ready)))
        finally:
            answer.readers -= 1
            if not answer.readers:
                keep, loop = self.keep if message.session else 0.0, asyncio.get_running_loop()
                loop.call_later(min(keep, _UNREAD), self._drop, key, answer, True)
                loop.call_later(keep, self._drop, key, answer)

    async def _start(self, model: LanguageModel, message: Generate):
        """The generation of a request. Raises what `LanguageModel.generate` does."""
        prompt = list(message.tokens) or message.text
        options = _sampling(message, message.seed if message.seed >= 0 else None)

        def start():
            return model.generate(prompt, max_tokens=max(1, message.max_tokens), stop=message.stop, sampling=options)

        return await asyncio.get_running_loop().run_in_executor(self._threads, start)

    def _drop(self, key: tuple[str, str], answer: "_Answer", unfinished: bool = False) -> None:
        """Ends an answer that nobody reads, or only one that is `unfinished`: the seed gives the same one again."""
        if not answer.readers and self._answers.get(key) is answer and not (unfinished and answer.task.done()):
            self._answers.pop(key).cancel()

    # Opening

    async def _model(self, name: str, part: bool) -> Any:
        """The open Rest (with `part`) or LanguageModel. Raises UsageError, BusyError, and what loading raises."""
        digest = self._found.get(name, name)
        if digest not in self._open:  # or it is a name that people gave, which may have come to mean another
            async with self._opening:
                digest = await asyncio.to_thread(self._digest, name)
                if digest not in self._open:
                    self._open[digest] = await self._load(digest, part)
        model = self._open[digest]
        self._open.move_to_end(digest)
        if isinstance(model, Rest) != part:
            raise UsageError(
                f"{name!r:.80} cannot be used so.", "It is a part of a model." if not part else "It is a whole model.",
                "Ask for another.",
            )  # fmt: skip
        return model

    def _digest(self, name: str) -> str:
        """By digest or name of a bundle, or by the joint of a part, as `joint` gives it."""
        if ":" not in name:
            return self.store.find(name).digest
        for entry in self.store.list():
            if entry.role == "part" and entry.digest not in self._joints:
                with suppress(ShoalError), Bundle.open(self.store.path(entry.digest)) as bundle:
                    card = Card.from_json(bundle.bytes(bundle.section("card")))
                    self._joints[entry.digest] = joint(card, card.span.start) if card.has_head else ""
            if self._joints.get(entry.digest) == name:
                self._found[name] = entry.digest
                return entry.digest
        raise UsageError("The edge lacks the rest of this model.", "No part there goes on.", "Add it: shoal edge add.")

    async def _load(self, digest: str, part: bool) -> Rest | LanguageModel:
        """Opens a model; the longest unused that nobody uses makes room."""
        while True:
            left = None if self.memory is None else self.memory - sum(map(_bytes, self._open.values()))
            try:
                if left is not None and left < 1:
                    raise BudgetError("The model does not fit.", "Others fill the memory.", "Allow the edge more.")
                return await asyncio.to_thread(self._opened, self.store.path(digest), left, part)
            except BudgetError:
                idle = next((digest for digest, model in self._open.items() if not self._used(model)), None)
                if idle is None and self._open:
                    raise BusyError(
                        "The edge has no memory for this model now.", "Others are in use.", "It may work later."
                    ) from None
                if idle is None:
                    raise
                await self._free(idle)

    def _opened(self, path: Path, memory: int | None, part: bool) -> Rest | LanguageModel:
        context = self._context
        if context is None:
            with Bundle.open(path) as bundle:
                most = Card.from_json(bundle.bytes(bundle.section("card"))).max_context
            with suppress(BudgetError):  # then as much as there is room for
                context = plan(path, memory, context=min(most, DEFAULT_CONTEXT), **self._options).context
        options = self._options | {"context": context, "threads": self._threads_each}
        if not part:
            model = load(path, memory, **options)
            if isinstance(model, LanguageModel):
                return model
            model.close()
            raise UsageError("This model writes no text.", "It embeds.", "Ask for another.")
        opened = load_part(path, memory, **options)
        if opened.takes_tokens or not opened.gives_logits:
            opened.close()
            raise UsageError("This is not the rest of a model.", "It begins or ends elsewhere.", "Ask for another.")
        return Rest(opened, Sessions(opened.plan.slots, self.hold))

    def _used(self, model: Rest | LanguageModel) -> bool:
        if isinstance(model, Rest):
            return model.sessions.calls > 0
        return model in self._starting or any(model.scheduler.load())

    async def _free(self, digest: str) -> None:
        model = self._open.pop(digest)
        if isinstance(model, Rest):
            await model.close()
        else:
            await asyncio.to_thread(model.close)


class _Answer:
    """One answer of a whole model, produced whether or not somebody reads; every token stays until it is dropped."""

    def __init__(self, request: Generate, generation, threads: ThreadPoolExecutor):
        self.request, self.readers = request, 0
        self._generation, self._threads = generation, threads
        self._tokens: list[Token] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def since(self, first: int) -> list[Token] | None:
        """The tokens from `first` on, at least one, waited for; None at the end. Raises what ended the answer."""
        while len(self._tokens) <= first:
            if self.task.done() or self._error:
                if self._error:
                    raise self._error
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._tokens[first:]

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (token := await loop.run_in_executor(self._threads, next, self._generation, None)) is not None:
                last = len(self._tokens) + 1 == token.stats.generated_tokens
                finish = token.stats.finish if last and token.stats.finish else ""
                self._tokens.append(Token(token.id, token.text, finish))
                self._changed.set()
        except Exception as error:
            self._error = error
        finally:
            self._generation.cancel()
            loop.call_soon(self._changed.set)  # once the task is done

    def cancel(self) -> None:
        self._generation.cancel()


def joint(card: Card, block: int) -> str:
    """The name of the place between two parts where block `block` begins: what one gives there the other takes."""
    return f"{card.whole}:{block}"


def _sampling(message: Continue | Generate, seed: int | None) -> Sampling:
    options = {"temperature": message.temperature, "top_k": message.top_k, "top_p": message.top_p}
    return Sampling(**options, min_p=message.min_p, seed=seed)  # type: ignore[arg-type]


def _chooser(message: Continue, position: int) -> Callable[[np.ndarray], int]:
    """Chooses the token for `position`, the same whenever it is asked again."""
    seed = None if message.seed < 0 else (message.seed * 0x9E3779B97F4A7C15 + position) % (1 << 64)
    sampler = Sampler(_sampling(message, seed))
    return lambda logits: sampler.choose(logits)[0]


def _bytes(model: Rest | LanguageModel) -> int:
    return (model.part if isinstance(model, Rest) else model).plan.total
