"""How far a bundle is from its source: the same tokens through both, the source in fp32.

Neither model is ever whole in memory but for the graph under test: blocks are built over a scratch file, run on all
texts and dropped, so that what stays is the hidden states of a few thousand tokens. The converted side runs from the
bytes that the bundle stores, and its logits come from the very graph that a device runs. It knows nothing about
recipes, formats or families.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from shoal.runtime import session
from shoal.runtime.card import Card
from shoal.runtime.errors import BundleError, ConvertError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.language.decoder import rotary
from shoal.runtime.language.tokens import Tokenizer
from shoal.runtime.session import Place

from .graph import GraphBuilder
from .recipe import NAMED
from .weights import Weights

TOKENS = 2048
ROW = 512  # tokens of one stretch of the held-out text
CHUNK = 64  # rows of logits held at once
DIVERGED = 0.5

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def greatest(numbers: list[int]) -> int:\n    ",
    "Q: Why does ice float on water?\nA:",
    "2 + 2 = 4, 3 + 5 = 8, 7 + 6 =",
    "Il était une fois une petite fille qui",
    '{"name": "Ada", "born": 1815, "languages": [',
    "The three laws of motion say that",
)


@dataclass(frozen=True)
class Parity:
    """Converted against source in fp32, over `tokens` tokens of `texts` texts.

    Differences are of logits, or of an encoder's embeddings. `block_errors[b]` is |converted - source| / |source| of
    the stream after block b, the mean over tokens, each model fed by its own blocks; `first_divergent_block` is the
    first where it exceeds DIVERGED: beyond what rounding to four bits does to a healthy model, so something is wrong
    there. Language models: `kl` is KL(source || converted) in nats a token, `top1_agreement` the share of tokens after
    which both find the same most likely, perplexities are of the held-out text. Encoders: `cosine` is the smallest.
    """

    texts: int
    tokens: int
    max_abs_difference: float
    mean_abs_difference: float
    block_errors: tuple[float, ...]
    first_divergent_block: int | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    source_perplexity: float | None = None
    cosine: float | None = None

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw) -> "Parity":
        """Reads untrusted values; unknown keys are ignored. Raises BundleError naming the field that is wrong."""
        values = {}
        for item in dataclasses.fields(cls):
            value = raw.get(item.name, item.default) if isinstance(raw, dict) else dataclasses.MISSING
            if item.name == "block_errors" and isinstance(value, list | tuple) and all(map(_number, value)):
                values[item.name] = tuple(map(float, value))
            elif item.name != "block_errors" and (_number(value) or (value is None and item.default is None)):
                values[item.name] = value
            else:
                raise BundleError(
                    "The bundle's parity figures cannot be read.", f"Field {item.name!r} is missing or wrong.",
                    "Convert the checkpoint again.",
                )  # fmt: skip
        return cls(**values)


def to_json(figures: Mapping[str, dict | None]) -> bytes:
    """The bundle's section: figures by name, as `to_dict` gives them."""
    return json.dumps(figures, sort_keys=True, indent=1, allow_nan=False).encode()


def from_json(data: bytes) -> dict[str, Parity | None]:
    """Reads the section, untrusted. Raises BundleError."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise BundleError("The bundle's parity figures cannot be read.", "They are not JSON.", "Convert again.")
    return {name: None if value is None else Parity.from_dict(value) for name, value in raw.items()}


def compare(
    source, architecture: ModuleType, card: Card, weights: Weights, graph: bytes, places: Mapping[str, Place],
    tokenizer: Tokenizer, text: str, progress: Progress = silent, *, tokens: int = TOKENS,
) -> Parity:  # fmt: skip
    """Compares the bundle's `graph`, whose external data is in `places` and was stored through `weights`, with `source`
    on fixed prompts and about `tokens` tokens of `text`.

    Scratch files as large as the source's fp32 embedding and head lie beside the bundle meanwhile. Raises ConvertError
    where either model gives what is not a number.
    """
    rows = _rows(tokenizer, card, text, tokens)
    folder = Path(places["weights"].path).parent
    one, two = _Walk(architecture, card, rows), _Walk(architecture, card, rows)
    errors = []
    with _scratch(source, folder) as (ends, ends_file):
        for block in range(-1, card.blocks):
            progress(Event("parity", block + 1, card.blocks + 1, f"block {block}" if block >= 0 else "embedding", "blocks"))
            blocks = range(block, block + 1) if block >= 0 else range(0)
            if block < 0:
                one.advance(blocks, ends, ends_file)
            else:
                with _scratch(source, folder) as (stored, file):
                    one.advance(blocks, stored, file)
            two.advance(blocks, weights, places)
            if block >= 0:
                errors.append(_relative_error(one.hidden, two.hidden, block))
        head = one.head(ends, ends_file)
        with head:
            measured = (_embeddings if card.task == "embed" else _logits)(head, one, two, graph, places, card, rows)
    progress(Event("parity", card.blocks + 1, card.blocks + 1, "", "blocks"))
    diverged = next((block for block, error in enumerate(errors) if error > DIVERGED), None)
    return Parity(
        texts=len(rows), tokens=sum(len(row.tokens) for row in rows), block_errors=tuple(errors),
        first_divergent_block=diverged, **measured,
    )  # fmt: skip
