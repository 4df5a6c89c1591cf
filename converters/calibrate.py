"""Calibration: the blocks are walked one by one, so that a model's second moments and activations never meet in memory.

A block runs once as the checkpoint has it, with the input of every matrix tapped, on what the rounded blocks before it
give; its matrices are rounded with the moments seen, and the rounded block makes the next one's input. So each block
sees the errors it has to live with (Frantar et al. 2022). What stays in memory is one block and the hidden states of
the calibration tokens. It knows nothing about rounding methods or files' formats.
"""

import dataclasses
from types import ModuleType

import numpy as np

from shoal.runtime.card import Card
from shoal.runtime.events import Event, Progress, silent

from .graph import GraphBuilder
from .recipe import NAMED
from .weights import Weights


def calibrate(
    architecture: ModuleType, card: Card, source, weights: Weights, tokens: np.ndarray, progress: Progress = silent
) -> None:
    """Rounds and stores every block's matrices in `weights`, each with the moments of its inputs over `tokens`, int64
    [rows, length]."""
    # A model with a block more gives its last block's stream, and needs no head
    longer = dataclasses.replace(card, blocks=card.blocks + 1)
    # Embeddings as they will be: the table is the largest tensor, and the stream starts with its rounding errors
    exact = dataclasses.replace(NAMED["fp32"], embedding=weights.recipe.embedding)
    hidden: np.ndarray | None = None
    for block in range(card.blocks):
        blocks = range(block, block + 1)
        with Scratch() as scratch:
            g = GraphBuilder("tapped", Weights(source, exact, scratch), taps=True)
            architecture.build(g, longer, blocks)
            weights.hessians = moments(...)
        with Scratch(weights.sink) as scratch:
            g = GraphBuilder("rounded", weights)
            architecture.build(g, longer, blocks)
        progress(Event("calibrate", block + 1, card.blocks, f"block {block}", "blocks"))
