"""A part of a language model: a range of its blocks with a key-value cache of its own, run by position.

    front, rest = load_part("front.shoal"), load_part("rest.shoal")
    stream = front.forward(0, front.prompt_ids("The capital of France is"), 0)
    logits = rest.forward(0, stream, 0)

Positions are the caller's: a step says where it begins, and what a slot held from there on is forgotten, so that going
back after a lost link, or to another text, is nothing but a step. It knows nothing about links, sessions or sampling.
"""

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ContextError, UsageError
from ..loaded import Loaded, Parts
from .decoder import Decoder
from .prompt import Prompts
from .tokens import Tokenizer


class Step(NamedTuple):
    """One position of one slot: a token id, or a row fp32 [hidden] of the stream."""

    slot: int
    x: "int | np.ndarray"
    position: int


class Part(Prompts, Loaded):
    """Made by `load_part`. Threads may share it; they take turns. `lengths[s]` is how many positions slot s holds."""

    def __init__(self, parts: Parts, tokenizer: Tokenizer | None, chat_template: str, decoder: Decoder):
        super().__init__(parts)
        self._tokenizer, self.chat_template, self._decoder = tokenizer, chat_template, decoder
        self.lengths = [0] * decoder.cache.slots
        self._turn = threading.RLock()
        if self.stack is not None:
            self.stack.between = self._between

    def _between(self, work: Callable[[], None]) -> None:
        """Runs what changes the stack between two steps; what slots hold stays, and is the caller's to go back from."""
        with self._turn:
            work()

    @property
    def takes_tokens(self) -> bool:
        return self.card.span.start == 0

    @property
    def gives_logits(self) -> bool:
        return self.card.has_head

    @property
    def context(self) -> int:
        return self._decoder.cache.context

    @property
    def chunk(self) -> int:
        """The most positions of one step of the engine; `forward` takes any number."""
        return self._decoder.chunk

    @property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        """Raises UsageError where this part sees no text."""
        if self._tokenizer is None:
            raise UsageError("This part has no tokenizer.", "It begins later than the text.", "Ask the first part.")
        return self._tokenizer

    def forward(self, slot: int, x: "Sequence[int] | np.ndarray", position: int, rows: int = 1) -> np.ndarray:
        """Runs `x` at positions `position`.. of `slot`: n token ids or, in a part that begins later, the stream fp32
        [n, hidden]. What the slot held from `position` on is forgotten.

        Returns the stream fp32 [n, hidden] or, of a part that has the head, fp32 logits [rows, vocab] of the last
        `rows` positions (at most n). Raises UsageError for what does not fit this part or leaves a gap behind what the
        slot holds, ContextError beyond the context and BackendError where the model gives what is not a number.
        """
        x = self._checked(x)
        count = len(x)
        self._place(slot, position, count)
        if not 0 <= rows <= count and self.gives_logits:
            raise UsageError(f"Logits of {rows} positions are asked for.", f"{count} are given.", "Ask for fewer.")
        found = []
        with self._turn:
            self._open()
            for start in range(0, count, self.chunk):
                part = x[start : start + self.chunk]
                # Positions of this step whose logits are wanted, counted in it
                wanted = list(range(max(0, count - rows - start), len(part))) if self.gives_logits else []
                self.lengths[slot] = position + start  # a step that fails leaves what is before it
                found.append(self._decoder.forward(slot, part[None], [position + start], wanted).copy())
                self.lengths[slot] += len(part)
        return np.concatenate([y.reshape(-1, y.shape[-1]) for y in found])

    def step(self, steps: Sequence[Step]) -> list[np.ndarray]:
        """One position of each of several slots, in as few runs as neighbouring slots allow: what `forward` gives,
        fp32 [vocab] or [hidden], in their order. Errors are `forward`'s, and then none of a run's slots has moved."""
        for step in steps:
            self._place(step.slot, step.position, 1)
        if len({step.slot for step in steps}) != len(steps):
            raise UsageError("A slot was given twice.", "A step is one position of it.", "Take one step after another.")
        found: dict[int, np.ndarray] = {}
        with self._turn:
            self._open()
            for run in self._runs(sorted(steps, key=lambda step: step.slot)):
                first, count = run[0].slot, run[-1].slot - run[0].slot + 1
                # A slot between two others is run as well, at a position that it does not hold yet
                starts = self.lengths[first : first + count]
                shape = (count, 1) if self.takes_tokens else (count, 1, self.card.hidden)
                x = np.zeros(shape, np.int64 if self.takes_tokens else np.float32)
                for step in run:
                    x[step.slot - first] = self._checked(np.asarray(step.x)[None])
                    starts[step.slot - first] = self.lengths[step.slot] = step.position
                rows = list(range(count)) if self.gives_logits else []
                y = self._decoder.forward(first, x, starts, rows).reshape(count, -1)
                for step in run:
                    found[step.slot] = y[step.slot - first].copy()
                    self.lengths[step.slot] = step.position + 1
        return [found[step.slot] for step in steps]

    def _runs(self, steps: list[Step]) -> list[list[Step]]:
        """Neighbours together; one slot between two that has room for a position does not part them."""
        runs = [[step] for step in steps[:1]]
        for before, step in pairwise(steps):
            between = range(before.slot + 1, step.slot)
            if len(between) <= 1 and all(self.lengths[slot] < self.context for slot in between):
                runs[-1].append(step)
            else:
                runs.append([step])
        return runs

    def truncate(self, slot: int, position: int = 0) -> None:
        """Forgets what a slot holds from `position` on."""
        self._place(slot, min(position, self.lengths[slot]), 0)
        with self._turn:
            self.lengths[slot] = min(self.lengths[slot], position)

    def _place(self, slot: int, position: int, count: int) -> None:
        if type(slot) is not int or not 0 <= slot < len(self.lengths):
            raise UsageError(f"There is no slot {slot!r}.", f"There are {len(self.lengths)}.", "Load it with more.")
        if type(position) is not int or not 0 <= position <= self.lengths[slot]:
            raise UsageError(
                f"Position {position!r} cannot come next.", f"The slot holds {self.lengths[slot]} positions.",
                "Go on from there, or go back.",
            )  # fmt: skip
        if position + count > self.context:
            raise ContextError(
                f"{count} tokens at position {position} do not fit the context of {self.context}.",
                "The cache is full.", "Shorten the text, or load the part with a longer context.",
            )  # fmt: skip

    def _checked(self, x: "Sequence[int] | np.ndarray") -> np.ndarray:
        if self.takes_tokens:
            ids = np.asarray(x)
            right = ids.ndim == 1 and len(ids) and ids.dtype.kind in "iu"
            if not right or ids.min() < 0 or ids.max() >= self.card.vocab:
                why = f"Ids are whole numbers from 0 to {self.card.vocab - 1}, at least one."
                raise UsageError("These are no token ids of this model.", why, "Correct them.")
            return ids.astype(np.int64)
        rows = np.asarray(x)
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != self.card.hidden or rows.dtype != np.float32:
            why = f"It takes fp32 [n, {self.card.hidden}], and got {rows.dtype} {list(rows.shape)}."
            raise UsageError("This is no stream for this part.", why, "Give what the part before it returns.")
        if not np.isfinite(rows).all():
            raise UsageError("The stream has values that are not numbers.", "It was damaged.", "Make it again.")
        return rows

    def measure(self) -> dict[str, int | None]:
        return super().measure() | self._decoder.measure()

    def close(self) -> None:
        with self._turn:
            if self.closed:
                return
            self._decoder.close()
        super().close()  # without the turn, for which who grows the stack may wait


def load_part(path: str | Path, memory: int | str | None = None, **options) -> Part:
    """Opens a part of a language model (`shoal convert --blocks`), or a whole one as the part that has all blocks.
    Arguments and errors are those of `shoal.load`."""
    from ..model import load

    part = load(path, memory, part=True, **options)
    assert isinstance(part, Part)
    return part
