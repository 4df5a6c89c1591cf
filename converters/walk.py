"""A model walked block by block: a few blocks are opened, run on every text and dropped, so what stays in memory is the
hidden states of some thousand tokens, whatever the model's size. It knows nothing about recipes, methods or figures.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from shoal.runtime import kernels
from shoal.runtime.card import Card
from shoal.runtime.language.decoder import rotary
from shoal.runtime.portable import portable
from shoal.runtime.session import Place, Session, open_graph

from .graph import GraphBuilder
from .recipe import NAMED, Recipe
from .weights import Factors, Weights

Names = tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """A store and where its bytes are; `repack` says whether ORT should copy them into a layout of its own."""

    weights: Weights
    places: Mapping[str, Place]
    repack: bool


class Scratch:
    """The same for what `recipe` makes of a source, by default fp32, over a file that goes when it is left."""

    repack = False  # every weight is read a few times only

    def __init__(self, source, folder: Path, recipe: Recipe = NAMED["fp32"], factors: Factors | None = None):
        self._file = tempfile.NamedTemporaryFile(prefix=".shoal-", dir=folder)
        self.weights = Weights(source, recipe, self._file, factors=factors)

    @property
    def places(self) -> Mapping[str, Place]:
        self._file.flush()
        return {"weights": Place(self._file.name, 0, self._file.tell())}

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()


@contextmanager
def opened(graph: bytes, places: Mapping[str, Place], repack: bool) -> Iterator[Session]:
    """The graph, opened. Without the kernels' library it is lowered, over a scratch folder beside the weights."""
    with ExitStack() as stack:
        if not kernels.available():
            beside = Path(places["weights"].path).parent
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".shoal-", dir=beside))
            lowered = portable(graph, places, folder)
            stack.callback(lowered.close)
            graph, places = lowered.graph, lowered.places
        yield stack.enter_context(open_graph(graph, places, repack=repack))


def stream(
    architecture: ModuleType, card: Card, weights: Weights, tokens: Sequence[int], folder: Path
) -> np.ndarray:  # fmt: skip
    """What a card's first block takes as a converted model has it: the token ids, int64 [1, n], or in a later part the
    stream, fp32 [1, n, hidden]. The blocks before are rounded to nearest in scratch files."""
    walk = Walk(architecture, card, [np.array(tokens, np.int64)])
    for block in range(card.span.start):
        with Scratch(weights.source, folder, weights.recipe, weights.factors) as scratch:
            walk.advance(range(block, block + 1), scratch)
    return walk.hidden[0]


class Walk:
    """One model on its way through its blocks: `hidden` fp32 [1, tokens, hidden] of every text, as far as it went, and
    where its routers depend on each other the last one's logits, `routing` fp32 [1, tokens, experts] or None."""

    def __init__(self, architecture: ModuleType, card: Card, rows: Sequence[np.ndarray] | np.ndarray):
        self.architecture, self.card = architecture, card
        self.hidden = [row[None] for row in rows]
        self.routing: list[np.ndarray | None] = [None] * len(self.hidden)

    def advance(self, blocks: range, stored: Stored | Scratch) -> None:
        """Runs `blocks` on every text."""
        graph = self.graph(blocks, stored.weights).serialize()
        with opened(graph, stored.places, stored.repack) as session:
            for index, x in enumerate(self.hidden):
                feeds = self.feeds(x, blocks) | self._others(index, stored.weights, session)
                names = [name for name in ("hidden_out", "routing_out") if name in session.outputs]
                found = session.run(feeds, names)
                self.hidden[index] = found["hidden_out"]
                self.routing[index] = found.get("routing_out", self.routing[index])

    def inputs(
        self, blocks: range, stored: Stored | Scratch, kept: dict[str, list[np.ndarray]] | None = None
    ) -> Iterator[dict[Names, np.ndarray]]:
        """For each text the input, fp32 [tokens, inputs], of every product of `blocks`, by its matrices' names; behind
        the last block, of the head. What a mixture keeps is appended to `kept`: its experts' `inputs` [tokens, hidden]
        and their `gates` [tokens, experts]. Stays where it is."""
        last = blocks.start == self.card.blocks
        g = GraphBuilder("end", stored.weights, taps=True) if last else self.graph(blocks, stored.weights, taps=True)
        if last:
            self.architecture.build(g, self.card, blocks)
        with opened(g.serialize(), stored.places, stored.repack) as session:
            for index, x in enumerate(self.hidden):
                feeds = self.feeds(x, blocks) | ({"rows": np.arange(x.shape[1])} if last else {})
                wanted = {} if kept is None else g.kept
                names = [*g.tapped.values(), *wanted.values()]
                seen = session.run(feeds | self._others(index, stored.weights, session), names)
                if kept is not None:
                    for key, output in wanted.items():
                        kept.setdefault(key, []).append(seen.pop(output).reshape(x.shape[1], -1))
                yield {names: seen.pop(output).reshape(x.shape[1], -1) for names, output in g.tapped.items()}

    def end(self, stored: Stored | Scratch) -> AbstractContextManager[Session]:
        """The graph that makes logits or embeddings of the last block's stream."""
        g = GraphBuilder("end", stored.weights)
        self.architecture.build(g, self.card, range(self.card.blocks, self.card.blocks))
        return opened(g.serialize(), stored.places, stored.repack)

    def graph(self, blocks: range, weights: Weights, taps: bool = False) -> GraphBuilder:
        """The graph of `blocks`, which gives the stream after them; what it needs is stored in `weights`."""
        g = GraphBuilder(f"blocks {blocks.start} to {blocks.stop}", weights, taps=taps)
        # A model with a block more gives its last block's stream, and needs no head
        self.architecture.build(g, dataclasses.replace(self.card, blocks=self.card.blocks + 1), blocks)
        return g

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

    def _others(self, index: int, weights: Weights, session: Session) -> dict[str, np.ndarray]:
        """The inputs that only some graphs have, of those that this one takes."""
        found = dict(weights.feeds)
        if (routing := self.routing[index]) is not None:
            found["routing"] = routing
        return {name: array for name, array in found.items() if name in session.inputs}
