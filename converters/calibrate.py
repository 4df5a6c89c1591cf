"""Calibration: what the inputs of matrices look like on a text, block after block.

`smooth` evens out their channels before anything is rounded. `calibrate` rounds with their second moments: a block runs
once as the checkpoint has it, with the input of every matrix tapped, on what the rounded blocks before it give; its
matrices are rounded with the moments seen, and the rounded block makes the next one's input. So each block sees the
errors it has to live with (Frantar et al. 2022), and one block and the hidden states of the calibration tokens are all
that is in memory. It knows nothing about rounding methods or files' formats.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np

from shoal.runtime.card import Card
from shoal.runtime.errors import SourceError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.language.tokens import Tokenizer
from shoal.runtime.session import Place

from .recipe import NAMED, Recipe
from .text import CALIBRATION
from .walk import Names, Scratch, Stored, Walk
from .weights import Factors, Weights

_AT_ONCE = 2048  # tokens whose moments are one product
_ROWS = 4  # of calibration text that smoothing sees: a mean a channel needs no more


def calibration_rows(recipe: Recipe, card: Card, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids int64 [rows, length] of the calibration text, spread over all of it. Raises SourceError where the text
    cannot be read or is shorter than a row."""
    ids, starts, length = _spread(recipe, card, tokenizer)
    return np.array([ids[start : start + length] for start in starts], np.int64)


def unseen_rows(recipe: Recipe, card: Card, tokenizer: Tokenizer, most: int) -> list[np.ndarray]:
    """Token ids int64 [length] of at most `most` rows of the same text, from the middle of where nothing is between
    calibration rows; none where a text is too short for it. Raises SourceError as those do."""
    ids, starts, length = _spread(recipe, card, tokenizer)
    gaps = [(begin + length, end) for begin, end in pairwise(starts) if end - begin >= 2 * length]
    chosen = gaps[:: -(-len(gaps) // most)] if gaps else []
    return [np.array(ids[(at := (begin + end - length) // 2) : at + length], np.int64) for begin, end in chosen]


def _spread(recipe: Recipe, card: Card, tokenizer: Tokenizer) -> tuple[list[int], list[int], int]:
    """The calibration text's token ids, where the rows begin in it, and how long they are."""
    wanted = recipe.calibration
    text = CALIBRATION
    if wanted.text:
        try:
            text = Path(wanted.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(
                f"The calibration text {wanted.text} cannot be read.", str(error), "Give a UTF-8 file."
            ) from None
    length = min(wanted.length, card.max_context)
    rows = max(1, wanted.tokens // length)
    # A generous cut: no tokenizer here makes more than one token a byte
    ids = tokenizer.encode(text[: rows * length * 16], special=False)
    if len(ids) < length:
        raise SourceError(
            "The calibration text is too short.",
            f"It has {len(ids)} tokens, a row needs {length}.",
            "Give a longer text.",
        )
    count = min(rows, math.ceil(len(ids) / length))
    return ids, np.linspace(0, len(ids) - length, count).astype(int).tolist(), length


def smooth(
    architecture: ModuleType, card: Card, weights: Weights, tokens: np.ndarray, folder: Path,
    progress: Progress = silent, peaks: bool = False,
) -> Factors:  # fmt: skip
    """Factors that change nothing but what rounding costs (SmoothQuant, Xiao et al. 2023): each channel of a product's
    input is divided by the root of its RMS over `tokens`, int64 [rows, length], in the norm or matrix that makes it,
    and the product's columns are multiplied by as much. With `peaks` it is the root of the largest magnitude, which
    decides where one scale serves a whole tensor, and what attentions give is evened out as well, in V. Scratch files
    are in `folder`, one at a time. What is behind a part is left out."""
    walk, factors = Walk(architecture, card, tokens[:: -(-len(tokens) // _ROWS)]), Factors()
    for block in range(card.span.stop):
        progress(Event("smooth", block, card.span.stop, f"block {block}", "blocks"))
        one = range(block, block + 1)
        with Scratch(weights.source, folder, _exact(weights)) as scratch:
            graph = walk.graph(one, scratch.weights)
            producers = graph.producers
            if not producers:
                return factors
            sizes: dict[Names, np.ndarray] = {}
            for inputs in walk.inputs(one, scratch):
                for names in (*producers, *(graph.mixed if peaks else ())):
                    squares, before = np.square(inputs[names]), sizes.get(names, np.float32(0))
                    sizes[names] = np.maximum(before, squares.max(0)) if peaks else before + squares.sum(0)
            walk.advance(one, scratch)
        for names, producer in producers.items():
            factor = _factor(sizes[names])
            factors.rows[producer] = 1 / factor
            factors.columns.update({f"{name}.weight": factor for name in names})
        for names, v in graph.mixed.items() if peaks else ():
            # Heads that share a V share its factors
            factor = _factor(sizes[names].reshape(card.kv_heads, -1, card.head_dim).max(1))
            factors.rows[f"{v}.weight"] = factors.rows[f"{v}.bias"] = 1 / factor.ravel()
            columns = np.repeat(factor[:, None], card.heads // card.kv_heads, 1).ravel()
            factors.columns.update({f"{name}.weight": columns for name in names})
    progress(Event("smooth", card.span.stop, card.span.stop, "", "blocks"))
    return factors


def _factor(squares: np.ndarray) -> np.ndarray:
    """Of channels by the squares of their sizes. One that hardly fires may when others speak: it counts as a hundredth
    of the mean."""
    sizes = np.sqrt(squares)
    return np.sqrt(np.maximum(sizes / sizes.mean(), 0.01)) if sizes.any() else np.ones_like(sizes)


def calibrate(
    architecture: ModuleType, card: Card, weights: Weights, places: Callable[[], Mapping[str, Place]],
    tokens: np.ndarray, folder: Path, progress: Progress = silent,
) -> None:  # fmt: skip
    """Rounds and stores every block's matrices in `weights`, each with the moments of its inputs over `tokens`, int64
    [rows, length], and its experts by those of the tokens that chose them. `places` says where the bytes stored so far
    lie; scratch files are in `folder`, a few at a time."""
    blocks = card.span
    weights.hessians = head = _head_moments(architecture, card, weights, tokens, folder, progress)
    walk = Walk(architecture, card, tokens)
    for block in range(blocks.stop):
        progress(Event("calibrate", block, blocks.stop, f"block {block}", "blocks"))
        one = range(block, block + 1)
        with Scratch(weights.source, folder, _exact(weights), weights.factors) as scratch:
            kept: dict[str, list[np.ndarray]] | None = {} if weights.records is not None else None
            hessians = head | moments(walk, one, scratch, kept)
        if weights.records is not None and kept:
            weights.records.add(block, *(np.concatenate(kept.pop(key)) for key in ("inputs", "gates")))
        with Scratch(weights.source, folder, weights.recipe, weights.factors) as passing:
            # Blocks before a part are rounded as well, so that it sees the errors it would see in the whole
            target = weights if block in blocks else passing.weights
            target.hessians = hessians
            walk.graph(one, target)  # rounds
            target.hessians = head
            walk.advance(one, Stored(weights, places(), repack=True) if target is weights else passing)
    progress(Event("calibrate", blocks.stop, blocks.stop, "", "blocks"))


def stack(
    architecture: ModuleType, card: Card, weights: Weights, places: Callable[[], Mapping[str, Place]],
    tokens: np.ndarray, folder: Path, progress: Progress = silent,
) -> None:  # fmt: skip
    """Makes every block's stacked matrices, and rounds and stores the others, each by the moments of its inputs over
    `tokens`, int64 [rows, length]. Each level of the ladder has a walk of its own, whose blocks are all at that level:
    so a rung is what `calibrate` would make of it. Blocks whose matrices were made before are only walked through."""
    stacks = weights.stacks
    assert stacks is not None
    weights.hessians = head = _head_moments(architecture, card, weights, tokens, folder, progress)
    walks = [Walk(architecture, card, tokens) for _ in stacks.ladder.levels]
    for block in range(card.blocks):
        progress(Event("stack", block, card.blocks, f"block {block}", "blocks"))
        one = range(block, block + 1)
        with Scratch(weights.source, folder, _exact(weights)) as scratch:
            products = walks[0].graph(one, scratch.weights, taps=True).tapped
            stacked = all(weights.recipe.stacks(f"{names[0]}.weight", "linear") for names in products)
            if not (stacked and stacks.done(len(products))):
                weights.levels = [moments(walk, one, scratch) for walk in walks]
                weights.hessians = head | {
                    names: weights.levels[-1].pop(names)
                    for names in list(weights.levels[-1])
                    if not weights.recipe.stacks(names[0], "linear")
                }
        walks[0].graph(one, weights)  # makes them
        weights.hessians, weights.levels = head, []
        for walk, level in zip(walks, stacks.ladder.levels, strict=True):
            stacks.set(stacks.counts(level))
            walk.advance(one, Stored(weights, places(), repack=True))
    progress(Event("stack", card.blocks, card.blocks, "", "blocks"))


def _head_moments(
    architecture: ModuleType, card: Card, weights: Weights, tokens: np.ndarray, folder: Path, progress: Progress
) -> dict[Names, np.ndarray]:
    """The moments of the head's inputs, over a few rows of `tokens`: known before anything is rounded, since a tied
    head is stored first, as the embedding."""
    if card.task != "generate":
        return {}
    walk = Walk(architecture, card, tokens[:: -(-len(tokens) // _ROWS)])
    for block in range(card.blocks):
        progress(Event("survey", block, card.blocks, f"block {block}", "blocks"))
        with Scratch(weights.source, folder, _exact(weights)) as scratch:
            walk.advance(range(block, block + 1), scratch)
    progress(Event("survey", card.blocks, card.blocks, "", "blocks"))
    with Scratch(weights.source, folder, _exact(weights)) as scratch:
        return moments(walk, range(card.blocks, card.blocks), scratch)


def moments(
    walk: Walk, blocks: range, stored: Scratch, kept: dict[str, list[np.ndarray]] | None = None
) -> dict[Names, np.ndarray]:
    """The second moments, fp32 [inputs, inputs], of the inputs of every product of `blocks` over all texts, by the
    tensors' names. What mixtures keep is appended to `kept`."""
    sums: dict[Names, np.ndarray] = {}
    waiting: dict[Names, list[np.ndarray]] = {}

    def add(names: Names, rows: list[np.ndarray]) -> None:
        seen = np.concatenate(rows)
        rows.clear()
        if names in sums:
            sums[names] += seen.T @ seen
        else:
            sums[names] = seen.T @ seen

    for inputs in walk.inputs(blocks, stored, kept):
        for names, seen in inputs.items():
            rows = waiting.setdefault(names, [])
            rows.append(seen)
            if sum(map(len, rows)) >= _AT_ONCE:
                add(names, rows)
    for names, rows in waiting.items():
        if rows:
            add(names, rows)
    return {tuple(f"{name}.weight" for name in names): sums[names] for names in sums}


def _exact(weights: Weights) -> Recipe:
    """fp32, but for the embedding and the head: the stream starts with the rounding errors of the one, the other's
    values do not matter, and they are the largest tensors."""
    return dataclasses.replace(NAMED["fp32"], embedding=weights.recipe.embedding, head=weights.recipe.head)
