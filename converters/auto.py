"""The recipe `auto`: whichever recipe predicts held-out text best within a budget, found by making and measuring them.

What cannot fit is left out before anything is read, by the sizes alone; of the recipes in integers only the one with
most bits that fits is tried, since fewer are never better. It knows nothing about how recipes work.
"""

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from shoal.runtime.bitstack.layout import StackFormat, entry_bytes
from shoal.runtime.budget import plan
from shoal.runtime.card import Card
from shoal.runtime.errors import BudgetError, UsageError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.language.tokens import Tokenizer
from shoal.runtime.model import load, sizes
from shoal.runtime.session import Place

from . import architectures, parity
from .experts import records
from .graph import GraphBuilder
from .quality import perplexity
from .recipe import NAMED, Recipe
from .report import Report
from .sources import open_source
from .text import HELDOUT
from .weights import ALIGNMENT, Matrix, Stored, Weights

STACKS = ("hybrid", "bitstack")
INTEGERS = ("int8", "int4-gptq", "int3-gptq", "int2-gptq")  # by falling size
CONTEXT = 1024  # tokens that must have room beside the weights
TOKENS = 1024


def best(
    source: str | Path, out: str | Path, memory: int | None, convert: Callable[..., Report], *, overwrite: bool,
    progress: Progress = silent, **options,
) -> Report:  # fmt: skip
    """The bundle of the best recipe that fits `memory` bytes, at `out`; `convert` makes one, and gets `options`.

    Raises UsageError without a budget and for what has no perplexity, BudgetError where nothing fits, and what
    converting raises. What was made and not taken is gone afterwards.
    """
    if memory is None:
        raise UsageError("The recipe 'auto' was given no memory.", "It is best at a size.", "Add --memory SIZE.")
    target = Path(out)
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists.", "It would be replaced.", "Choose another name, or overwrite it.")
    fitting = _fitting(source, memory)
    candidates = [name for name in STACKS if name in fitting]
    candidates += [name for name in INTEGERS if name in fitting][:1]
    folder = target.absolute().with_name(f".{target.name}.auto")
    found: dict[str, tuple[float, Report]] = {}
    with contextlib.ExitStack() as undo:
        folder.mkdir(mode=0o700, exist_ok=True)
        undo.callback(_leave, folder)
        for at, name in enumerate(candidates):
            progress(Event("auto", at, len(candidates), name, "recipes"))
            made = folder / f"{name}.shoal"
            report = convert(source, made, name, overwrite=True, progress=progress, **options)
            found[name] = _quality(made, memory), report
        progress(Event("auto", len(candidates), len(candidates), "", "recipes"))
        chosen = min(found, key=lambda name: (found[name][0], candidates.index(name)))
        os.replace(folder / f"{chosen}.shoal", target)
    report = found[chosen][1]
    tried = {name: value for name, (value, _) in found.items()}
    return dataclasses.replace(report, bundle=str(out), tried=tried)


def _fitting(source: str | Path, memory: int) -> set[str]:
    """The recipes whose bundle could be loaded within `memory` bytes. Raises BudgetError where there are none."""
    fits, refused = set(), None
    with open_source(source) as checkpoint:
        architecture, card = architectures.find(checkpoint)
        if card.task != "generate":
            raise UsageError("The recipe 'auto' cannot be used.", "The model generates no text.", "Name a recipe.")
        tokenizer = Tokenizer.from_json(checkpoint.tokenizer())
        card = dataclasses.replace(card, tokenizer_bytes=tokenizer.nbytes)
        for name in (*(STACKS if not card.experts else ()), *INTEGERS):
            try:
                _plan(architecture, card, checkpoint, NAMED[name], memory)
                fits.add(name)
            except BudgetError as error:
                refused = error
    if not fits:
        assert refused is not None
        raise refused
    return fits


def _plan(architecture: ModuleType, card: Card, checkpoint, recipe: Recipe, memory: int) -> None:
    weights = _Sized(checkpoint, recipe)
    builder = GraphBuilder(card.name, weights)
    architecture.build(builder, card, card.span)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(weights.end)  # a hole: nothing of it is read
        found = sizes(card, builder.serialize(), {"weights": Place(file.name, 0, weights.end)})
    if recipe.ladder is not None:
        found = dataclasses.replace(found, stack=(0, weights.floor), floor=1)
    if (names := records.stored(recipe, card, architecture)) is not None:  # at least a token's experts of one layer
        record = max(one.record for one in records.precisions(recipe, card, names))
        slots = range(0, (card.experts * len(card.routed_blocks) + 1) * record, record)
        found = dataclasses.replace(found, stack=slots, floor=min(card.top_k, len(slots) - 1), pool="experts")
    plan(card, found, memory=memory, context=min(CONTEXT, card.max_context))


def _quality(bundle: Path, memory: int) -> float:
    with load(bundle, memory=memory, context=None) as model:
        length = min(parity.ROW, model.plan.context - 1)
        rows = [row[:length] for row in parity.stretches(model.tokenizer, model.card, HELDOUT, TOKENS)]
        return perplexity(model, rows)


def _leave(folder: Path) -> None:
    """Removes what was not taken, but not what a stack's conversion goes on from."""
    for path in folder.glob("*.shoal"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


class _Sized(Weights):
    """Weights that say where everything would lie, and read none of it. `end` are the bytes of the section, `floor`
    those of the stack's first entries."""

    def __init__(self, source, recipe: Recipe):
        super().__init__(source, recipe, None)  # type: ignore[arg-type]
        self.end = self.floor = 0

    def _store(self, names: tuple[str, ...], role: str, gated: bool) -> Matrix:
        inputs, outputs = self.shapes[names[0]][1], sum(self.shapes[name][0] for name in names)
        format, ladder = self.recipe.format(names[0], role), self.recipe.ladder
        if ladder is not None and self.recipe.stacks(names[0], role):
            # Which of these a matrix begins with shows as it is made
            least = [ladder.first * entry_bytes(StackFormat(inputs, outputs, 1))] if ladder.first else []
            least += [entry_bytes(rung.layout(inputs, outputs)) for rung in ladder.rungs[:1]]
            self.floor += min(least)
            return Matrix(format, outputs, inputs, None, gated=gated, stacked=0)
        layout = None if format.bits == 32 else format.layout(inputs, outputs)
        shape = (outputs, inputs) if layout is None else (layout.bytes,)
        stored = self._lay(names[0], "float32" if layout is None else "uint8", shape)
        return Matrix(format, outputs, inputs, stored, layout, gated)

    def _keep(self, names: tuple[str, ...], make) -> Stored:
        return self._lay(".".join(names), "float32", (sum(math.prod(self.shapes[name]) for name in names),))

    def _lay(self, name: str, dtype: str, shape: tuple[int, ...]) -> Stored:
        start = -(-self.end // ALIGNMENT) * ALIGNMENT
        length = math.prod(shape) * (4 if dtype == "float32" else 1)
        self.end = start + length
        return Stored(name, dtype, shape, start, length)
