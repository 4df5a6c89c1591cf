"""How far a bundle is from its source: the same tokens through both, the source in fp32.

Neither model is ever whole in private memory. Both are walked block by block: a block is opened, run on every text and
dropped, so what stays is the hidden states of a few thousand tokens. The converted side runs on the bytes that the
bundle stores, and its logits or embeddings come from the very graph that a device runs, as a device runs it. This
module knows nothing about recipes, formats or families.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from shoal.runtime import kernels, prepack
from shoal.runtime.card import Card
from shoal.runtime.errors import ConvertError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.language.cache import Cache
from shoal.runtime.language.decoder import Decoder
from shoal.runtime.language.tokens import Tokenizer
from shoal.runtime.portable import portable
from shoal.runtime.session import Place, Session, open_graph, read

from .report import Parity
from .walk import Scratch, Stored, Walk
from .weights import Weights

TOKENS = 2048
ROW = 512  # tokens of one stretch of the held-out text
CHUNK = 32  # rows of logits held at once
DIVERGED = 0.5  # relative error of a block's output, beyond what rounding to four bits does to a healthy model
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


def compare(
    source, architecture: ModuleType, card: Card, weights: Weights, graph: bytes, places: Mapping[str, Place],
    tokenizer: Tokenizer, text: str, folder: Path, progress: Progress = silent, *, tokens: int = TOKENS,
) -> Parity:  # fmt: skip
    """Compares the bundle's `graph`, whose external data is in `places` and was stored through `weights`, with `source`
    on fixed prompts and about `tokens` tokens of `text`.

    Scratch files lie in `folder` meanwhile: the source's embedding, head and one block in fp32. Raises
    ConvertError where either model gives what is not a number. Where `card` is a part's, its blocks are fed what the
    source's blocks before them give, and where it ends early what is compared last is the stream.
    """
    rows = (_texts if card.task == "embed" else _stretches)(tokenizer, card, text, tokens)
    blocks = card.span
    total = blocks.stop + 1 + len(rows)
    stored = Stored(weights, places, repack=not weights.exact)
    expected, found = Walk(architecture, card, rows), Walk(architecture, card, rows)
    given: list[np.ndarray] = []  # what the first block takes: token ids or, in a later part, the stream
    errors: list[float] = []
    with Scratch(source, folder) as ends:
        for block in range(blocks.stop):
            progress(Event("parity", block + 1, total, f"block {block}", "steps"))
            if block == blocks.start:
                found.hidden, given = list(expected.hidden), list(expected.hidden)
            with Scratch(source, folder) as scratch:
                # The embedding comes with the first block, and may be the head as well
                expected.advance(range(block, block + 1), scratch if block else ends)
            if block in blocks:
                found.advance(range(block, block + 1), stored)
                errors.append(_relative_error(expected.hidden, found.hidden, block))

        def step(row: int) -> None:
            progress(Event("parity", blocks.stop + 1 + row, total, "logits", "steps"))

        with whole(graph, weights, places, folder) as opened:
            if not card.has_head:
                measured = _streams(opened, expected, given, step)  # no part has a stack
            else:
                with expected.end(ends) as head:
                    if card.task == "embed":
                        measured = _embeddings(head, opened, expected, rows, given, step)
                    else:
                        measured = _logits(head, opened, expected, rows, given, step, weights.handles)
    progress(Event("parity", total, total, "", "steps"))
    divergent = (block for block, error in zip(blocks, errors, strict=True) if error > DIVERGED)
    return Parity(
        texts=len(rows), tokens=sum(map(len, rows)), block_errors=tuple(errors),
        first_divergent_block=next(divergent, None), **measured,
    )  # fmt: skip


def stretches(tokenizer: Tokenizer, card: Card, text: str, tokens: int, length: int = ROW) -> list[np.ndarray]:
    """Token ids of stretches of the text, each of `length` at most, spread over it."""
    length = min(length, card.max_context, tokens)
    start = [card.bos] if card.add_bos and card.bos >= 0 else []
    count = max(1, round(tokens / length))
    found = []
    for index in range(count):
        # No tokenizer here makes fewer than one token of eight characters on prose
        piece = text[index * len(text) // count :][: 8 * length]
        found.append([*start, *tokenizer.encode(piece[piece.find(" ") + 1 :], special=False)][:length])
    return [np.array(ids, np.int64) for ids in found]


def _stretches(tokenizer: Tokenizer, card: Card, text: str, tokens: int) -> list[np.ndarray]:
    """Stretches, then the prompts: the longest first, so that buffers grow once."""
    found = stretches(tokenizer, card, text, tokens)
    prompts = [np.array(tokenizer.encode(prompt)[: len(found[0])], np.int64) for prompt in PROMPTS]
    return found + prompts


def _texts(tokenizer: Tokenizer, card: Card, text: str, tokens: int) -> list[np.ndarray]:
    """Token ids of the prompts, then of paragraphs of the text, spread over it."""
    paragraphs = [paragraph for paragraph in text.split("\n") if paragraph.strip()]
    found = [tokenizer.encode(prompt) for prompt in PROMPTS]
    count = max(1, tokens // 64)
    for paragraph in paragraphs[:: max(1, len(paragraphs) // count)][:count]:
        found.append(tokenizer.encode(paragraph))
    return [np.array(ids[: card.max_context], np.int64) for ids in found]


@contextmanager
def whole(graph: bytes, weights: Weights, places: Mapping[str, Place], folder: Path) -> Iterator[Session]:
    """The bundle's graph, opened as on a device: without the kernels' library it is lowered, and repacked weights that
    would take much private memory are mapped. Both files lie in `folder`; opening the same graph again finds them."""
    key = places["weights"].path
    with ExitStack() as stack:
        if not kernels.available():
            lowered = portable(graph, places, folder, key)
            stack.callback(lowered.close)
            graph, places = lowered.graph, lowered.places
        repack = not weights.exact
        if repack and os.name == "posix" and prepack.estimate(read(graph, places)).repacked > PRIVATE:
            prepared = prepack.prepare(graph, places, folder, key)
            stack.callback(prepared.close)
            graph, places = prepared.graph, prepared.places
        yield stack.enter_context(open_graph(graph, places, repack=repack))


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


def _streams(opened: Session, walk: Walk, given: Sequence[np.ndarray], step) -> dict:
    """Figures of a part without a head: the graph takes what it is `given` of every text, in chunks."""
    card = walk.card
    decoder = Decoder(opened, card, Cache(card, max(x.shape[1] for x in given), 1), CHUNK)
    most = absolute = 0.0
    for index, x in enumerate(given):
        step(index)
        for start in range(0, x.shape[1], CHUNK):
            part = x[:, start : start + CHUNK]
            expected = walk.hidden[index][:, start : start + CHUNK]
            difference = np.abs(decoder.forward(0, part, [start], []) - expected)
            most = max(most, float(difference.max()))
            absolute += float(difference.sum(dtype=np.float64))
    values = sum(x.shape[1] for x in given) * card.hidden
    return dict(max_abs_difference=most, mean_abs_difference=absolute / values)


def _logits(
    head: Session, opened: Session, walk: Walk, rows: Sequence[np.ndarray], given: Sequence[np.ndarray], step,
    handles: Mapping[str, int],
) -> dict:  # fmt: skip
    """Figures of a language model: the graph takes what it is `given` of every text (the tokens or, of a later part,
    the stream) in chunks, the source's head takes its last stream."""
    card = walk.card
    decoder = Decoder(opened, card, Cache(card, max(map(len, rows)), 1), CHUNK, handles)
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
            found = decoder.forward(0, given[index][:, start : start + count], [start], list(range(count)))
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


def _embeddings(
    head: Session, opened: Session, walk: Walk, rows: Sequence[np.ndarray], given: Sequence[np.ndarray], step
) -> dict:
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
