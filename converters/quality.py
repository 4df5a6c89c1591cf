"""How well a loaded language model predicts a text: perplexity as a conversion's parity figures mean it.

It knows nothing about bundles or recipes.
"""

from collections.abc import Sequence

import numpy as np

from shoal.runtime.errors import BusyError
from shoal.runtime.events import Event, Progress, silent

STEP = 32  # tokens computed at once, as parity.py does: kernels round a little otherwise for other numbers


def perplexity(
    model, rows: Sequence[np.ndarray], step: int = STEP, progress: Progress = silent, done: int = 0, total: int = 0
) -> float:
    """exp of the mean of -log p(next token) over `rows` of token ids, each at most as long as the context of the loaded
    `model`, which must be idle: its first slot's cache is written over. e^700 at most. Raises BusyError, BackendError.
    """
    loss, predicted = 0.0, 0
    for at, row in enumerate(rows):
        loss += model.scheduler.exclusively(lambda row=row: _loss(model.scheduler, row, step))
        predicted += len(row) - 1
        progress(Event("perplexity", done + at + 1, total or len(rows), unit="rows"))
    return float(np.exp(min(loss / predicted, 700)))


def begin(scheduler) -> None:
    """Makes ready for `predict` from position 0 on, inside `exclusively`. Raises BusyError."""
    if scheduler.load() != (0, 0):
        raise BusyError("The model answers requests.", "Measuring needs its cache.", "Measure when it is idle.")
    scheduler.cache.held[0].clear()  # what is written over must not be taken for a prompt's beginning


def predict(scheduler, part: np.ndarray, start: int) -> np.ndarray:
    """Log-probabilities, fp32 [len(part), vocab], of what follows each of the token ids `part`, which stand at `start`
    and on, behind what was predicted before. The next call writes over them. Raises BackendError."""
    logits = scheduler.decoder.forward(0, part[None], [start], list(range(len(part))))
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits


def _loss(scheduler, row: np.ndarray, step: int) -> float:
    """The sum of -log p over the tokens of `row` after its first."""
    begin(scheduler)
    loss = 0.0
    for start in range(0, len(row), step):
        logits = predict(scheduler, row[start : start + step], start)
        targets = row[start + 1 : start + len(logits) + 1]
        loss -= float(logits[np.arange(len(targets)), targets].sum(dtype=np.float64))
    return loss
