"""Converted models in the open: a store of weights in a file, and any range of blocks over it."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from shoal.converters import architectures
from shoal.converters.graph import GraphBuilder
from shoal.converters.recipe import NAMED, Recipe
from shoal.converters.sources import open_source
from shoal.converters.weights import Weights
from shoal.runtime.card import Card
from shoal.runtime.language.decoder import rotary
from shoal.runtime.session import Place, Session, open_graph

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"


class Converted:
    """A checkpoint on its way: `weights` stores what graphs ask for in `path`."""

    def __init__(self, source, path: Path, recipe: Recipe, architecture: ModuleType, card: Card):
        self.source, self.path, self.architecture, self.card = source, path, architecture, card
        self.file = open(path, "w+b")
        self.weights = Weights(source, recipe, self.file)

    def graph(self, blocks: range | None = None, **options) -> bytes:
        builder = GraphBuilder("test", self.weights, **options)
        self.architecture.build(builder, self.card, range(self.card.blocks) if blocks is None else blocks)
        self.file.flush()
        return builder.serialize()

    @property
    def places(self) -> dict[str, Place]:
        return {"weights": Place(str(self.path), 0, self.path.stat().st_size)}

    def open(self, blocks: range | None = None) -> Session:
        graph = self.graph(blocks)
        return open_graph(graph, self.places)

    def step(self, session: Session, x, starts, past: dict, context: int = 64) -> tuple[np.ndarray, dict]:
        """Runs `x`, token ids int64 [rows, n] or a stream, row b from position starts[b]; `past` is what the last step
        gave, or {}. Returns the logits [rows, n, vocab] or the stream, and the new past."""
        rows, count = x.shape[:2]
        feeds = {
            "tokens" if x.ndim == 2 else "hidden": x, "last": np.array(starts, np.int32) + (count - 1),
            "total": np.array([max(starts) + count], np.int32), "rows": np.arange(rows * count),
        }  # fmt: skip
        for index, rope in enumerate(self.card.ropes):
            feeds[f"cos_{index}"], feeds[f"sin_{index}"] = rotary(rope, context)
        empty = np.zeros((rows, self.card.kv_heads, context, self.card.head_dim), np.float32)
        feeds |= {name: past.get(name, empty) for name in session.inputs if name.startswith("past_")}
        found = session.run({name: feeds[name] for name in session.inputs})
        kept = {name.replace("present", "past"): value for name, value in found.items() if name.startswith("present")}
        if "logits" in found:
            return found["logits"].reshape(rows, count, -1), kept
        return found["hidden_out"], kept


@pytest.fixture
def converted(tmp_path):
    """converted(checkpoint, recipe="fp32") -> Converted."""
    made = []

    def convert(checkpoint, recipe: str | Recipe = "fp32") -> Converted:
        source = open_source(checkpoint)
        architecture, card = architectures.find(source)
        recipe = NAMED[recipe] if isinstance(recipe, str) else recipe
        made.append(Converted(source, tmp_path / f"weights{len(made)}", recipe, architecture, card))
        return made[-1]

    yield convert
    for model in made:
        model.file.close()
        model.source.close()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the random models that tests/data/make_tiny.py describes."""
    return TINY
