"""A part of a language model: a range of its blocks, with the embedding where it begins and the head where it ends.

Parts of one checkpoint and recipe fit each other bit for bit and carry the same mark; parts of another do not. This
module knows nothing about graphs or files.
"""

import dataclasses
import hashlib
import re

from shoal.runtime.card import Card
from shoal.runtime.errors import UsageError

from .recipe import Recipe


def parse(text: str | range) -> range:
    """Blocks 8 to 29 of "8:30". Raises UsageError."""
    if isinstance(text, range):
        return text
    found = re.fullmatch(r"(\d{1,5}):(\d{1,5})", text)
    if found is None:
        raise UsageError(f"{text!r:.40} is no range of blocks.", "It is FIRST:END.", "Write 0:8 or 8:30.")
    return range(int(found[1]), int(found[2]))


def part(card: Card, blocks: range, recipe: Recipe, source) -> Card:
    """The card of the part that has `blocks` of the model that `card` describes. Raises UsageError where these are no
    part of it."""
    if card.task != "generate":
        raise UsageError(
            "This model has no parts.", "It embeds text, and only language models run in parts.", "Leave --blocks out."
        )
    if not 0 <= blocks.start < blocks.stop <= card.blocks:
        raise UsageError(
            f"There are no blocks {blocks.start}:{blocks.stop}.", f"The model has blocks 0:{card.blocks}.",
            "Ask for one block or more of these.",
        )  # fmt: skip
    if len(blocks) == card.blocks:
        return card
    return dataclasses.replace(
        card, first_block=blocks.start, last_block=blocks.stop, whole=mark(card, recipe, source),
        tokenizer_bytes=card.tokenizer_bytes if blocks.start == 0 else 0,  # only who takes tokens has one
    )  # fmt: skip


def mark(card: Card, recipe: Recipe, source) -> str:
    """What all parts of this checkpoint and recipe share: a digest (hex) of the card, the recipe and all vectors
    and the first row of every matrix, so that a fine-tuned kin has another."""
    digest = hashlib.sha256(dataclasses.replace(card, name="", source="").to_json())
    digest.update(dataclasses.replace(recipe, name="").to_json())
    for name, info in sorted(source.tensors().items()):
        digest.update(f"{name} {tuple(info.shape)}\n".encode())
        digest.update(source.read(name, 0, 1 if len(info.shape) > 1 else None).tobytes())
    return digest.hexdigest()
