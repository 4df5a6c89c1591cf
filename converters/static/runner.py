"""A bundle's static prefill on this machine's CPU, one step after another: what the steps mean, for measuring and as
what a device's runtime is compared with. Nothing here is fast. It knows nothing about how scales were chosen.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import numpy as np

from shoal.runtime.bundle import Bundle
from shoal.runtime.card import Card
from shoal.runtime.language.cache import DTYPES
from shoal.runtime.language.decoder import rotary
from shoal.runtime.session import Place, Session, open_graph
from shoal.runtime.static.layout import KIND, SECTION, TOKENS, Attend, Call, Shadow, Static, graph_name, takes

_CACHES = {"fp32": "", "fp16": ".fp16", "int8": ".int8"}
Watch = Callable[[Call | Attend | Shadow, Mapping[str, np.ndarray]], None]  # a step that was run, and all values


class Runner:
    """The steps of the open `bundle` for chunks of `chunk` tokens over a cache of `context` tokens. Close it."""

    def __init__(self, bundle: Bundle, chunk: int, context: int, cache: str = "fp32"):
        self.card = Card.from_json(bundle.bytes(bundle.section("card", "")))
        self.index = Static.from_json(bundle.bytes(bundle.section(KIND, "index")))
        self.chunk = chunk
        self._graphs = {graph.name: graph.section for graph in bundle.graphs}
        self._opened: dict[str, Session] = {}
        self._close = ExitStack()
        self._bundle, self._suffix = bundle, _CACHES[cache]
        self.places = {
            section.name: Place(str(bundle.path), section.offset, section.length)
            for section in bundle.sections if section.kind == "weights"
        }  # fmt: skip
        static = bundle.section("weights", SECTION)
        self._weights = np.memmap(bundle.path, np.uint8, "r", static.offset, static.length) if static.length else None
        shape = (1, self.card.kv_heads, context, self.card.head_dim)
        self.cache = [tuple(np.zeros(shape, DTYPES[cache]) for _ in "kv") for _ in range(self.card.blocks)]
        self._tables = [rotary(rope, context) for rope in self.card.ropes]

    def run(self, tokens: np.ndarray, start: int = 0, watch: Watch | None = None) -> np.ndarray:
        """Logits fp32 [n, vocab] of the token ids int64 [n], which stand at `start` and on, in chunks of which the last
        may be short."""
        found = []
        for at in range(0, len(tokens), self.chunk):
            x = self.stream(tokens[at : at + self.chunk], start + at, watch)
            found.append(self.open(self.index.head).run({"x": x})["logits"])
        return np.concatenate(found)

    def stream(self, tokens: np.ndarray, start: int, watch: Watch | None = None) -> np.ndarray:
        """What one chunk's last block gives, fp32 [n, hidden]; the rest of a short chunk are zeros."""
        values: dict[str, np.ndarray] = {}
        real = len(tokens)
        for step in self.index.steps:
            if isinstance(step, Attend):
                values[step.gives] = self._padded(self._attend(step, values, start, real))
            elif isinstance(step, Shadow):
                values[step.gives] = self.shadow(step, values[step.takes])
            elif step.device:
                feeds = {name: values[name] for name in step.takes}
                values |= self.open(graph_name(step.name, self.chunk)).run(feeds)
            else:
                values[step.gives[0]] = self._padded(self.open(step.name).run({TOKENS: tokens[None]})[step.gives[0]])
            if watch is not None:
                watch(step, values)
        return values[self.index.stream][:real]

    def shadow(self, step: Shadow, x: np.ndarray) -> np.ndarray:
        """What clipping took away of x fp32 [rows, inputs], multiplied: fp32 [rows, outputs]."""
        assert self._weights is not None
        matrix = self._weights[step.weights :][: step.inputs * step.outputs].view(np.int8)
        scales = self._weights[step.scales :][: 4 * step.outputs].view(np.float32)
        q = np.rint(x / np.float32(step.scale))
        left = q - np.clip(q, -128, 127)
        channels = np.flatnonzero(left.any(0))
        sums = left[:, channels] @ matrix.reshape(step.inputs, step.outputs)[channels].astype(np.float32)
        return sums * (np.float32(step.scale) * scales)

    def open(self, name: str) -> Session:
        """The session of a graph, opened once a section."""
        section = self._graphs[name]
        if section not in self._opened:
            data = self._bundle.bytes(self._bundle.section("graph", section))
            self._opened[section] = self._close.enter_context(open_graph(data, self.places, repack=False))
        return self._opened[section]

    def close(self) -> None:
        self._close.close()

    def _attend(self, step: Attend, values: Mapping[str, np.ndarray], start: int, real: int) -> np.ndarray:
        qkv = np.sum([values[name][:real] for name in takes(step)], axis=0)[None]
        keys, stored = self.cache[step.block]
        cos, sin = self._tables[self.card.rope_of[step.block]]
        feeds = {
            "qkv": qkv, "past_key": keys, "past_value": stored, "last": np.array([start + real - 1], np.int32),
            "total": np.array([start + real], np.int32), "cos": cos, "sin": sin,
        }  # fmt: skip
        found = self.open(step.name + self._suffix).run(feeds)
        self.cache[step.block] = found["present_key"], found["present_value"]
        return found["y"][0]

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows, np.zeros((self.chunk - len(rows), rows.shape[1]), np.float32)])
