"""How far a bundle is from its source: the same tokens through both, the source in fp32.

Neither model is ever whole in private memory. Both are walked block by block: a block is opened, run on every text and
dropped, so what stays is the hidden states of a few thousand tokens. The converted side runs on the bytes that the
bundle stores, and its logits or embeddings come from the very graph that a device runs, as a device runs it. This
module knows nothing about recipes, formats or families.
"""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from shoal.runtime import prepack
from shoal.runtime.card import Card
from shoal.runtime.errors import BundleError, ConvertError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.language.cache import Cache
from shoal.runtime.language.decoder import Decoder, rotary
from shoal.runtime.language.tokens import Tokenizer
from shoal.runtime.session import Place, Session, open_graph

from .graph import GraphBuilder
from .recipe import NAMED
from .weights import Weights

TOKENS = 2048
ROW = 512  # tokens of one stretch of the held-out text
CHUNK = 32  # rows of logits held at once
DIVERGED = 0.5  # relative error of a block's output
PRIVATE = 256 << 20  # bytes of repacked weights beyond which they go to a scratch file

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

    Scratch files lie beside the bundle meanwhile: the source's embedding, head and one block in fp32. Raises
    ConvertError where either model gives what is not a number.
    """
    rows = (_texts if card.task == "embed" else _stretches)(tokenizer, card, text, tokens)
    folder = Path(places["weights"].path).parent
    total = card.blocks + 1 + len(rows)
    exact = all(matrix.format.bits == 32 for matrix in weights.matrices.values())
    stored = _Stored(weights, places, repack=not exact)
    expected, found = _Walk(architecture, card, rows), _Walk(architecture, card, rows)
    errors: list[float] = []
    with _Scratch(source, folder) as ends:
        for block in range(card.blocks):
            progress(Event("parity", block + 1, total, f"block {block}", "steps"))
            with _Scratch(source, folder) as scratch:
                # The embedding comes with the first block, and may be the head as well
                expected.advance(range(block, block + 1), scratch if block else ends)
            found.advance(range(block, block + 1), stored)
            errors.append(_relative_error(expected.hidden, found.hidden, block))

        def step(row: int) -> None:
            progress(Event("parity", card.blocks + 1 + row, total, "logits", "steps"))

        with expected.end(ends) as head, _whole(graph, stored, folder) as opened:
            measure = _embeddings if card.task == "embed" else _logits
            measured = measure(head, opened, expected, rows, step)
    progress(Event("parity", total, total, "", "steps"))
    return Parity(
        texts=len(rows), tokens=sum(map(len, rows)), block_errors=tuple(errors),
        first_divergent_block=next((block for block, error in enumerate(errors) if error > DIVERGED), None), **measured,
    )  # fmt: skip


def _stretches(tokenizer: Tokenizer, card: Card, text: str, tokens: int) -> list[np.ndarray]:
    """Token ids of stretches of the text, spread over it, then of the prompts: the longest first, so that buffers grow
    once."""
    length = min(ROW, card.max_context, tokens)
    start = [card.bos] if card.add_bos and card.bos >= 0 else []
    count = max(1, round(tokens / length))
    found = []
    for index in range(count):
        # No tokenizer here makes fewer than one token of eight characters on prose
        piece = text[index * len(text) // count :][: 8 * length]
        found.append([*start, *tokenizer.encode(piece[piece.find(" ") + 1 :], special=False)][:length])
    found += [tokenizer.encode(prompt)[:length] for prompt in PROMPTS]
    return [np.array(ids, np.int64) for ids in found]


def _texts(tokenizer: Tokenizer, card: Card, text: str, tokens: int) -> list[np.ndarray]:
    """Token ids of the prompts, then of paragraphs of the text, spread over it."""
    paragraphs = [paragraph for paragraph in text.split("\n") if paragraph.strip()]
    found = [tokenizer.encode(prompt) for prompt in PROMPTS]
    count = max(1, tokens // 64)
    for paragraph in paragraphs[:: max(1, len(paragraphs) // count)][:count]:
        found.append(tokenizer.encode(paragraph))
    return [np.array(ids[: card.max_context], np.int64) for ids in found]


@dataclass(frozen=True)
class _Stored:
    """A store and where its bytes are; `repack` says whether ORT should copy them into a layout of its own."""

    weights: Weights
    places: Mapping[str, Place]
    repack: bool


class _Scratch:
    """The same for a source in fp32, over a file that goes when it is left."""

    repack = False  # every weight is read a few times only

    def __init__(self, source, folder: Path):
        self._file = tempfile.NamedTemporaryFile(prefix=".shoal-", dir=folder)
        self.weights = Weights(source, NAMED["fp32"], self._file)

    @property
    def places(self) -> Mapping[str, Place]:
        self._file.flush()
        return {"weights": Place(self._file.name, 0, self._file.tell())}

    def __enter__(self) -> "_Scratch":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()


class _Walk:
    """One model on its way through its blocks: `hidden` fp32 [1, tokens, hidden] of every text, as far as it went."""

    def __init__(self, architecture: ModuleType, card: Card, rows: Sequence[np.ndarray]):
        self.architecture, self.card = architecture, card
        self.hidden = [row[None] for row in rows]

    def advance(self, blocks: range, stored: _Stored | _Scratch) -> None:
        """Runs `blocks` on every text."""
        # A model with a block more gives its last block's stream, and needs no head
        longer = dataclasses.replace(self.card, blocks=self.card.blocks + 1)
        with self._open(longer, blocks, stored) as opened:
            for index, x in enumerate(self.hidden):
                self.hidden[index] = opened.run(self.feeds(x, blocks), ["hidden_out"])["hidden_out"]

    def end(self, stored: _Stored | _Scratch) -> Session:
        """The graph that makes logits or embeddings of the last block's stream."""
        return self._open(self.card, range(self.card.blocks, self.card.blocks), stored)

    def feeds(self, x: np.ndarray, blocks: range) -> dict[str, np.ndarray]:
        """The inputs of a graph of `blocks` for one text from its beginning: tokens int64 or hidden fp32 [1, n, ..]."""
        length = x.shape[1]
        feeds = {"hidden" if x.ndim == 3 else "tokens": x}
        if self.card.task == "embed":
            return feeds | {"mask": np.ones((1, length), np.int64)}
        feeds |= {"last": np.array([length - 1], np.int32), "total": np.array([length], np.int32)}
        for index, rope in enumerate(self.card.ropes):
            feeds[f"cos_{index}"], feeds[f"sin_{index}"] = rotary(rope, length)
        empty = np.zeros((1, self.card.kv_heads, length, self.card.head_dim), np.float32)
        return feeds | {f"past_{part}_{block}": empty for block in blocks for part in ("key", "value")}

    def _open(self, card: Card, blocks: range, stored: _Stored | _Scratch) -> Session:
        g = GraphBuilder(f"blocks {blocks.start} to {blocks.stop}", stored.weights)
        self.architecture.build(g, card, blocks)
        return open_graph(g.serialize(), stored.places, repack=stored.repack)


@contextmanager
def _whole(graph: bytes, stored: _Stored, folder: Path) -> Iterator[Session]:
    """The bundle's graph, opened. Repacked weights that would take much private memory are mapped, as on a device."""
    large = stored.repack and os.name == "posix" and prepack.estimate(graph, stored.places).repacked > PRIVATE
    if not large:
        with open_graph(graph, stored.places, repack=stored.repack) as opened:
            yield opened
        return
    with tempfile.TemporaryDirectory(prefix=".shoal-", dir=folder) as cache:
        prepared = prepack.prepare(graph, stored.places, cache)
        try:
            with open_graph(prepared.graph, prepared.places) as opened:
                yield opened
        finally:
            prepared.close()


def _relative_error(expected: list[np.ndarray], found: list[np.ndarray], block: int) -> float:
    """The mean over all tokens of |found - expected| / |expected|."""
    total, count = 0.0, 0
    for a, b in zip(expected, found, strict=True):
        length = np.linalg.norm(a[0], axis=-1)
        total += float((np.linalg.norm(b[0] - a[0], axis=-1) / np.maximum(length, 1e-30)).sum(dtype=np.float64))
        count += len(length)
    if not math.isfinite(total):
        side = "converted" if all(np.isfinite(a).all() for a in expected) else "source"
        raise ConvertError(
            f"The {side} model cannot be compared.", f"After block {block} it gives what is not a number.",
            "Check the checkpoint; if it runs elsewhere, use a recipe with more bits.",
        )  # fmt: skip
    return total / count


def _logits(head: Session, opened: Session, walk: _Walk, rows: Sequence[np.ndarray], step) -> dict:
    """Figures of a language model: the graph prefills every text in chunks, the source's head takes its last stream."""
    card = walk.card
    decoder = Decoder(opened, card, Cache(card, max(map(len, rows)), 1), CHUNK)
    most = absolute = divergence = 0.0
    agreed = predicted = 0
    losses = np.zeros(2)
    for index, tokens in enumerate(rows):
        step(index)
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            count = len(part)
            feeds = walk.feeds(walk.hidden[index][:, start : start + count], range(0)) | {"rows": np.arange(count)}
            expected = head.run(feeds)["logits"]
            found = decoder.forward(0, part[None], [start], list(range(count)))
            difference = np.abs(found - expected)
            most = max(most, float(difference.max()))
            absolute += float(difference.sum(dtype=np.float64))
            agreed += int((found.argmax(-1) == expected.argmax(-1)).sum())
            for logits in (expected, found):  # in place: they may be the largest things in memory
                logits -= logits.max(-1, keepdims=True)
                logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            np.subtract(expected, found, out=difference)
            difference *= np.exp(expected)
            divergence += float(difference.sum(dtype=np.float64))
            if index < len(rows) - len(PROMPTS):
                targets = tokens[start + 1 : start + count + 1]
                at = np.arange(len(targets))
                losses -= [float(logits[at, targets].sum(dtype=np.float64)) for logits in (found, expected)]
                predicted += len(targets)
    total = sum(map(len, rows))
    perplexity, source_perplexity = np.exp(np.minimum(losses / max(predicted, 1), 700))
    return dict(
        max_abs_difference=most, mean_abs_difference=absolute / (total * card.vocab), kl=max(0.0, divergence / total),
        top1_agreement=agreed / total, perplexity=float(perplexity), source_perplexity=float(source_perplexity),
    )  # fmt: skip


def _embeddings(head: Session, opened: Session, walk: _Walk, rows: Sequence[np.ndarray], step) -> dict:
    """Figures of an encoder."""
    most = absolute = 0.0
    cosine = 1.0
    for index, tokens in enumerate(rows):
        step(index)
        expected = head.run(walk.feeds(walk.hidden[index], range(0)))["embedding"][0]
        found = opened.run(walk.feeds(tokens[None], range(0)))["embedding"][0]
        difference = np.abs(found - expected)
        most, absolute = max(most, float(difference.max())), absolute + float(difference.mean())
        lengths = float(np.linalg.norm(expected) * np.linalg.norm(found))
        cosine = min(cosine, float(expected @ found) / max(lengths, 1e-30))
    return dict(max_abs_difference=most, mean_abs_difference=absolute / len(rows), cosine=cosine)


def _number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
