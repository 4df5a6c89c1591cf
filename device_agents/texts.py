"""Text for apps: from the edge, from this device and the edge together, or from this device alone.

A bundle of role `part` here computes the first blocks and the edge the rest; a whole model here answers when the edge
has none, cannot be reached, or falls silent in the middle: then it goes on from the text so far. One model is loaded
at a time. It knows nothing about sockets or who asks.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from shoal.runtime.errors import LinkError, ShoalError, UsageError

from .apps import Piece
from .local import Local

_PATIENCE = 2.0  # seconds without a link after which a model of our own takes over
_ALONE = 30.0  # and where there is none
_SILENT, _SILENT_ALONE = 10.0, 60.0  # seconds in which an edge that has a link says nothing, likewise


class Texts:
    """`connect` gives the link, or waits for one. `memory` is what a model of ours may use."""

    def __init__(self, connect: Callable[[], Any], memory: int | str | None = None, threads: int = 0):
        self._connect, self._memory, self._threads = connect, memory, threads
        self._loaded: tuple[Path, Any] | None = None
        self._loading = threading.Lock()
        self._turn = asyncio.Lock()  # a front's cache is one answer's

    async def generate(
        self, local: Local | None, model: str, text: str, *, max_tokens: int = 256, stop: tuple[str, ...] = (),
        temperature: float = 0.0, top_p: float = 1.0, seed: int = -1,
    ) -> AsyncGenerator[Piece, None]:  # fmt: skip
        """Pieces of the answer to `text`. Raises ShoalError where neither side can."""
        from .split_model import EdgeModel, SplitModel

        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": None if seed < 0 else seed}
        whole = local if local is not None and "decode" in local.roles else None
        if local is None and not model:
            raise UsageError("Which model?", "This device has none that writes text.", "Name one of the edge's.")
        said, ids = "", list[int]()
        try:
            if local is not None and "part" in local.roles:
                async with self._turn:
                    front = await asyncio.to_thread(self._open, local)
                    pieces = SplitModel(front, self._connect, patience=_ALONE).generate(
                        text, max_tokens=max_tokens, stop=stop, **options
                    )
                    async for piece in pieces:
                        where = "local" if piece.where == "device" else "edge"
                        yield Piece(piece.text, piece.id, where, piece.finish)
                return
            silent, patience = (_SILENT, _PATIENCE) if whole else (_SILENT_ALONE, _ALONE)
            edge = EdgeModel(self._connect, model or local.name, timeout=silent, patience=patience)  # type: ignore[union-attr]
            async for piece in edge.generate(text, max_tokens=max_tokens, stop=stop, **options):
                said, ids = said + piece.text, [*ids, piece.id]
                yield Piece(piece.text, piece.id, "edge", piece.finish)
                if piece.finish:
                    return
            raise LinkError("The answer ended early.", "The edge did not say why.", "Try again.")
        except ShoalError:
            if whole is None or len(ids) >= max_tokens:
                raise
        mine = await asyncio.to_thread(self._open, whole)
        if not _says(mine.tokenizer, ids, said, stop):  # the edge's model has other tokens
            ids = mine.tokenizer.encode(said, special=False)
        prompt = [*mine.prompt_ids(text), *ids]
        answer = mine.generate(prompt, max_tokens=max_tokens - len(ids), stop=stop, **options)
        made, finish = 0, ""
        try:
            while (token := await asyncio.to_thread(next, answer, None)) is not None:
                made += 1
                # The figures are the whole answer's, which may have ended while its tokens wait to be read
                finish = (token.stats.finish or "") if made == token.stats.generated_tokens else ""
                yield Piece(token.text, token.id, "local", finish)
            if not finish:
                yield Piece("", -1, "local", answer.stats.finish or "stop")
        finally:
            answer.cancel()

    def forget(self, paths: set[Path]) -> None:
        """These models are gone."""
        with self._loading:
            if self._loaded and self._loaded[0] in paths:
                self._loaded[1].close()
                self._loaded = None

    def close(self) -> None:
        if self._loaded:
            self.forget({self._loaded[0]})

    def _open(self, local: Local) -> Any:
        from shoal.runtime.language.part import load_part
        from shoal.runtime.model import load

        with self._loading:
            if self._loaded and self._loaded[0] != local.path:
                self._loaded[1].close()
                self._loaded = None
            if self._loaded is None:
                opened = load_part if "part" in local.roles else load
                self._loaded = (local.path, opened(local.path, self._memory, threads=self._threads))
            return self._loaded[1]


def _says(tokenizer: Any, ids: list[int], said: str, stop: tuple[str, ...]) -> bool:
    """Whether these tokens make the text that was heard. A character or a stop that has only begun was not heard."""
    stream = tokenizer.stream()
    whole = "".join(map(stream.push, ids))
    return whole.startswith(said) and len(whole) - len(said) <= max(map(len, stop), default=0)
