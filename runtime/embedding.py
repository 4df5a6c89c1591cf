"""An encoder as an app sees it: texts in, one vector each out."""

import contextlib
import threading
from collections.abc import Callable, Sequence

import numpy as np

from .errors import UsageError
from .language.tokens import Tokenizer
from .loaded import Loaded, Parts


class EmbeddingModel(Loaded):
    """Made by `shoal.load` from an encoder's bundle. Threads may share it."""

    def __init__(self, parts: Parts, tokenizer: Tokenizer, graph):
        super().__init__(parts)
        self.tokenizer, self.graph = tokenizer, graph
        # Beside a run nobody may change a stack
        self._turn = threading.Lock() if self.stack else contextlib.nullcontext()
        self._stack = {"stack": np.array([self.stack.handle], np.int64)} if self.stack else {}
        if self.stack is not None:
            self.stack.between = self._between

    def _between(self, work: Callable[[], None]) -> None:
        with self._turn:
            work()

    def embed(self, texts: str | Sequence[str]) -> np.ndarray:
        """fp32 [texts, hidden]; a text beyond the model's context is cut at its end, as the original does.

        Texts of like length run together, so padding costs little. Raises UsageError for what is not text.
        """
        self._open()
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not all(isinstance(text, str) for text in texts):
            raise UsageError("embed takes texts.", "Something else was given.", "Give a string or a list of strings.")
        encoded = [self._cut(self.tokenizer.encode(text)) for text in texts]
        found = np.empty((len(texts), self.card.hidden), np.float32)
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
        while order:
            # Texts come shortest first: as many as stay within the planned tokens of a step
            count = 1
            while count < len(order) and (count + 1) * len(encoded[order[count]]) <= self.plan.chunk:
                count += 1
            chosen, order = order[:count], order[count:]
            length = max(1, len(encoded[chosen[-1]]))
            tokens = np.full((len(chosen), length), max(self.card.pad, 0), np.int64)
            mask = np.zeros((len(chosen), length), np.int64)
            for row, index in enumerate(chosen):
                tokens[row, : len(encoded[index])] = encoded[index]
                mask[row, : len(encoded[index])] = 1
            with self._turn:
                found[chosen] = self.graph.run({"tokens": tokens, "mask": mask, **self._stack})["embedding"]
        return found

    def count_tokens(self, text: str) -> int:
        """How many tokens of a text the model sees."""
        return len(self._cut(self.tokenizer.encode(text)))

    def _cut(self, ids: list[int]) -> list[int]:
        most = self.plan.context
        return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]  # the closing token stays

    def close(self) -> None:
        if not self.closed:
            with self._turn:
                self.graph.close()
        super().close()
