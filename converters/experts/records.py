"""Experts as records: each in one piece, in the order of runtime/experts/layout.py, rounded a slice at a time.

While a model is being converted its graphs run on the very records that the bundle is going to have. It knows nothing
about operators, and of a model only where its experts are.
"""

import dataclasses
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np

from shoal.runtime.card import Card
from shoal.runtime.errors import ConvertError, UsageError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.experts.layout import Index, Precision
from shoal.runtime.experts.store import Store
from shoal.runtime.kernels.layout import GATHERED_BITS, PANEL, Codes, gather_down, gather_up, pack

from ..recipe import Format, Recipe
from ..weights import Weights
from .moments import moments
from .names import NORM, Names, all_experts

SECTIONS = ("records", "low")
MAX_ORDINARY = 2048  # experts that are ordinary matrices: more make a graph that no reader takes
_SLOTS_BYTES = 256 << 20  # of experts that are in memory while a model is measured
_LEAST = 1e-3  # of the mean: a channel that a norm all but removes says nothing about the next router's input
_STEP = 4 << 20  # bytes copied at once


def stored(recipe: Recipe, card: Card, architecture: ModuleType) -> Names | None:
    """What the experts are called of which this recipe makes records; None for a card without, or where they stay in
    fp32. Raises UsageError or ConvertError for a mixture that this recipe cannot convert."""
    if not card.experts:
        return None
    names: Names = architecture.EXPERTS
    if recipe.ladder is not None:
        raise UsageError(
            f"The recipe {recipe.name!r} cannot be used.",
            "It stacks matrices, and experts are read whole.",
            "Name a recipe in integers, such as int4-gptq.",
        )
    if card.is_part:
        raise UsageError(
            "A mixture of experts has no parts.", "Its experts are one store.", "Leave the range of blocks out."
        )
    if _formats(recipe, card, names)[0].bits == 32:
        number = card.experts * len(card.routed_blocks)
        if number > MAX_ORDINARY:
            raise ConvertError(
                f"The model's {number} experts cannot stay in fp32.", f"Only up to {MAX_ORDINARY} of them can.",
                "Name a recipe that rounds experts, such as int8.",
            )  # fmt: skip
        return None
    if card.expert_ffn % PANEL:
        raise ConvertError(
            f"Experts of {card.expert_ffn} channels cannot be rounded.", f"They are no whole panels of {PANEL}.",
            "Use a recipe that leaves experts in fp32: experts = { bits = 32 }.",
        )  # fmt: skip
    return names


def precisions(recipe: Recipe, card: Card, names: Names) -> tuple[Precision, ...]:
    """How this recipe stores experts."""
    found = []
    for section, used in zip(SECTIONS, _recipes(recipe), strict=False):
        gate_up, down = _formats(used, card, names)
        layouts = gate_up.layout(card.hidden, 2 * card.expert_ffn), down.layout(card.expert_ffn, card.hidden)
        found.append(Precision(section, *layouts, used.gathered))
    return tuple(found)


class Records:
    """The records of a mixture in the making, in scratch files of `folder`, one a precision. A block's are written by
    `add`, in order; graphs of these blocks run by `handle`. At most an expert is in memory beside what `handle` holds.
    """

    def __init__(
        self, source, recipe: Recipe, card: Card, names: Names, folder: Path, progress: Progress = silent
    ):  # fmt: skip
        self.card, self.names, self._progress = card, names, progress
        self.precisions = precisions(recipe, card, names)
        self._weights: list[tuple[Weights, IO[bytes]]] = []
        self._checksums: list[list[int]] = []
        self._store: Store | None = None
        for used in _recipes(recipe):
            self._checksums.append([])
            file = tempfile.NamedTemporaryFile(prefix=".shoal-", dir=folder)  # noqa: SIM115 (closed with the others)
            self._weights.append((Weights(source, used, file), file))

    @property
    def index(self) -> Index:
        """Of all records; those that are not written yet have no checksum but 0."""
        total = self.card.experts * len(self.card.routed_blocks)
        checksums = tuple(tuple(some + [0] * (total - len(some))) for some in self._checksums)
        return Index(self.card.routed_blocks, self.card.experts, self.precisions, checksums)

    @property
    def handle(self) -> int:
        """What a graph's input `experts` is given; another one after `add`."""
        if self._store is None:
            fitting = _SLOTS_BYTES // self.precisions[0].record
            slots = min(max(fitting, 2 * self.card.top_k), self.card.experts * len(self.card.routed_blocks))
            self._weights[0][1].flush()
            self._store = Store.over(self._weights[0][1].name, 0, self.index, slots=slots)
        return self._store.handle

    @property
    def bytes(self) -> int:
        """Of the experts at their first precision, without what only aligns them."""
        first = self.precisions[0]
        return len(self._checksums[0]) * (first.gate_up.bytes + first.down.bytes)

    @property
    def numbers(self) -> int:
        """How many weights these are."""
        return len(self._checksums[0]) * 3 * self.card.hidden * self.card.expert_ffn

    def add(self, block: int, inputs: np.ndarray | None = None, gates: np.ndarray | None = None) -> None:
        """Writes the records of the next block that has experts: rounded to nearest or, with what the experts were
        given of a text, fp32 [tokens, hidden], and the weight of each, fp32 [tokens, experts], by its moments."""
        blocks, written = self.card.routed_blocks, len(self._checksums[0])
        at = written // self.card.experts
        if blocks[at : at + 1] != (block,):
            why = "It is not the next block that has some."
            raise UsageError(f"The experts of block {block} cannot be written.", why, "Write blocks in order.")
        self._let_go()
        total = self.card.experts * len(blocks)
        for expert in range(self.card.experts):
            if inputs is None:  # otherwise this is a part of something longer, which reports
                self._progress(Event("experts", written + expert, total, f"block {block}, expert {expert}", "experts"))
            names = tuple(f"{name}.weight" for name in self.names.expert(block, expert))
            for at, (weights, file) in enumerate(self._weights):
                if inputs is not None and gates is not None:
                    # Anew for each precision: rounding takes them over
                    weights.hessians = _moments(weights, names, self.card, inputs, gates[:, expert])
                checksum = 0
                for part in _record(weights, self.precisions[at], names):
                    file.write(part)
                    checksum = zlib.crc32(part, checksum)
                weights.hessians = {}
                self._checksums[at].append(checksum)
        if inputs is None:
            self._progress(Event("experts", written + self.card.experts, total, "", "experts"))

    def copy(self, precision: int, sink) -> None:
        """Writes all records of a precision, by its number, to `sink`."""
        file = self._weights[precision][1]
        file.flush()
        file.seek(0)
        while part := file.read(_STEP):
            sink.write(part)

    def close(self) -> None:
        """Lets the store go, and the files."""
        self._let_go()
        for _, file in self._weights:
            file.close()

    def _let_go(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


def predictor(weights: Weights, card: Card, names: Names) -> np.ndarray | None:
    """fp32 [layers - 1, experts, hidden]: at l what makes, of the normed input of layer l's experts, roughly the
    router's logits at l + 1, since the stream hardly changes from one block to the next (Fang et al. 2025, Fate). None
    where the router itself is early, or there is one layer."""
    blocks = card.routed_blocks
    if card.early_routing or len(blocks) < 2:
        return None
    found = np.empty((len(blocks) - 1, card.experts, card.hidden), np.float32)
    scales = [weights.read(f"model.layers.{block}.{NORM}.weight") for block in blocks]
    for layer, block in enumerate(blocks[1:]):
        before, after = scales[layer : layer + 2]
        kept = np.abs(before) >= _LEAST * np.abs(before).mean()
        ratio = np.divide(after, before, out=np.zeros_like(after), where=kept & (before != 0))
        router = weights.read(f"model.layers.{block}.{names.router}.weight", 0, card.experts)
        found[layer] = router * ratio
    return found


def _recipes(recipe: Recipe) -> list[Recipe]:
    """One a precision."""
    if recipe.low is None:
        return [recipe]
    # No rule outranks the low format: it is there to be smaller in every part
    return [recipe, dataclasses.replace(recipe, experts=recipe.low, low=None, rules=())]


def _moments(weights: Weights, names: tuple[str, ...], card: Card, inputs: np.ndarray, gates: np.ndarray) -> dict:
    gate, up, down = names
    into, between = moments(inputs, gates, weights.read(gate), weights.read(up), card.expert_activation)
    return {(gate, up): into, (down,): between}


def _record(weights: Weights, precision: Precision, names: tuple[str, ...]) -> Iterator[bytes]:
    """A record's bytes, in pieces."""
    gate, up, down = names
    formats = [weights.recipe.format(name, "experts") for name in (gate, down)]
    panels = (pack(precision.gate_up, codes) for codes in weights.rounded((gate, up), formats[0], gated=True))
    if precision.gathered:
        yield gather_up(precision.gate_up, np.concatenate(list(panels))).tobytes()
    else:
        yield from (some.tobytes() for some in panels)
    yield bytes(precision.down_at - precision.gate_up.bytes)
    codes = weights.rounded((down,), _down(weights.recipe, formats[1]))
    if precision.gathered:
        yield gather_down(precision.down, Codes(*map(np.concatenate, zip(*codes, strict=True)))).tobytes()
    else:
        yield from (pack(precision.down, some).tobytes() for some in codes)
    yield bytes(precision.record - precision.down_at - precision.down_bytes)


def _down(recipe: Recipe, down: Format) -> Format:
    """How down is rounded: a rotation would leave none of the zeros that a gathered one is for."""
    return dataclasses.replace(down, rotated=False) if recipe.gathered else down


def _formats(recipe: Recipe, card: Card, names: Names) -> tuple[Format, Format]:
    """Of every expert's gate and up, and down. Raises UsageError where they are not all the same."""
    found: dict[str, Format] = {}
    for gate, up, down in all_experts(card, names):
        for part, name in (("gate", gate), ("gate", up), ("down", down)):
            format = recipe.format(name, "experts")
            if found.setdefault(part, format) != format:
                raise _uneven(f"{name} would be {format}, others {found[part]}")
    if (found["gate"].bits == 32) != (found["down"].bits == 32):
        raise _uneven(f"gate and up would be {found['gate']}, down {found['down']}")
    able = card.expert_activation == "relu" and {one.bits for one in found.values()} <= {*GATHERED_BITS}
    if recipe.gathered and not able:
        raise UsageError(
            f"The recipe {recipe.name!r} cannot be used.",
            f"It gathers experts, and these are {found['gate']} with {card.expert_activation} gates.",
            "Gather experts of 8, 4 or 2 bits with relu gates, or leave gathered out.",
        )
    return found["gate"], _down(recipe, found["down"])


def _uneven(why: str) -> UsageError:
    return UsageError(
        "The recipe's rules cannot be followed.", f"Experts are stored in one way, and {why}.",
        "Change the rules, or name the format of all in experts = { bits = .. }.",
    )  # fmt: skip
