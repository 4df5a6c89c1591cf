"""Guesses which experts the next layer will need, made on a recorded trace as a running model could have made them.

  repeat   the layer's experts of the token before
  popular  the layer's most used experts so far
  gate     what the next layer's router says of this layer's gate input (Fate, 2025): a bundle's `predictor`
  learned  the same with matrices that are fitted to other sequences of the trace
  oracle   what the layer does need: a bound, and what a router that reads before attention gives

None of them knows the first layer's experts but repeat, popular and oracle. It knows nothing about caches or files.
"""

import numpy as np

from ..errors import UsageError
from .trace import Trace

PREDICTORS = ("repeat", "popular", "gate", "learned", "oracle")
REAL = ("repeat", "popular", "gate", "learned")  # that can run
NOBODY = -1
_RIDGE = 1e-2  # of the inputs' mean square
_LEAST = 1e-4  # score: what is below is as good as nothing


def possible(trace: Trace, matrices: np.ndarray | None = None) -> list[str]:
    """The predictors that this trace, with these matrices of a bundle, has what it takes for."""
    gated = trace.inputs is not None and trace.layers > 1
    needs = {"gate": gated and matrices is not None, "learned": gated and trace.tokens > 1}
    return [name for name in PREDICTORS if needs.get(name, True)]


def guesses(trace: Trace, predictor: str, width: int = 0, matrices: np.ndarray | None = None) -> np.ndarray:
    """int32 [tokens, layers, width], the likeliest first, NOBODY where there is no guess. `width` is by default the
    model's top_k; `matrices` fp32 [layers - 1, experts, hidden] are for `gate`. Raises UsageError for a predictor that
    is not among `possible`."""
    width = min(width or trace.top_k, trace.experts)
    if predictor not in possible(trace, matrices):
        why = "There is none of that name, or the trace has no inputs, or the bundle no predictor."
        raise UsageError(f"{predictor!r:.40} cannot be tried on this trace.", why, "Record the inputs too.")
    found = np.full((trace.tokens, trace.layers, width), NOBODY, np.int32)
    if predictor == "repeat":
        wide = min(width, trace.top_k)
        found[1:, :, :wide] = trace.ids[:-1, :, :wide]
        found[trace.starts] = NOBODY
    elif predictor == "oracle":
        wide = min(width, trace.top_k)
        found[:, :, :wide] = trace.ids[:, :, :wide]
    elif predictor == "popular":
        for layer in range(trace.layers):
            _popular(trace.ids[:, layer], trace.experts, found[:, layer])
    elif predictor == "gate":
        _guess(trace, checked(trace, matrices), np.arange(trace.tokens), found)
    else:
        for train, test in _halves(trace):
            _guess(trace, train_predictor(trace, train), test, found)
    return found


def checked(trace: Trace, matrices: np.ndarray | None) -> np.ndarray:
    """Matrices that fit the trace. Raises UsageError."""
    hidden = 0 if trace.inputs is None else trace.inputs.shape[2]
    shape = (trace.layers - 1, trace.experts, hidden)
    if matrices is None or matrices.shape != shape:
        got = "no predictor" if matrices is None else f"a predictor of shape {matrices.shape}"
        raise UsageError("The bundle is not the trace's.", f"It has {got}, not {shape}.", "Name the bundle it is of.")
    return np.asarray(matrices, np.float32)


def train_predictor(trace: Trace, tokens: np.ndarray | None = None) -> np.ndarray:
    """fp32 [layers - 1, experts, hidden]: the matrix at l times the inputs of layer l is by least squares (ridge)
    nearest to the next layer's scores, in logarithms and without what all experts of a token share, as a router's
    logits are; to who was chosen where no scores were recorded. Of all tokens, or of those in `tokens`. Raises
    UsageError for a trace without inputs or of one layer."""
    if trace.inputs is None or trace.layers < 2:
        why = "It has no inputs." if trace.inputs is None else "It has one layer, and none after it."
        raise UsageError("No predictor can be trained on this trace.", why, "Record the inputs too.")
    rows = np.arange(trace.tokens) if tokens is None else tokens
    hidden = trace.inputs.shape[2]
    found = np.empty((trace.layers - 1, trace.experts, hidden), np.float32)
    for layer in range(trace.layers - 1):
        x = trace.inputs[rows, layer].astype(np.float32)
        gram = (x.T @ x).astype(np.float64)
        gram[np.diag_indices(hidden)] += _RIDGE * max(np.trace(gram) / hidden, 1e-12)
        found[layer] = np.linalg.solve(gram, (x.T @ _targets(trace, layer + 1, rows)).astype(np.float64)).T
    return found


def recall(trace: Trace, guessed: np.ndarray) -> float:
    """The share of all uses that were guessed, whether or not their experts were there already."""
    ids = trace.ids.astype(np.int32)
    hits = (ids[..., :, None] == guessed[..., None, :]).any(-1) & (ids >= 0)
    return float(hits.sum() / max((ids >= 0).sum(), 1))


def _targets(trace: Trace, layer: int, rows: np.ndarray) -> np.ndarray:
    if trace.scores is not None:
        scores = np.log(np.maximum(trace.scores[rows, layer].astype(np.float32), _LEAST))
    else:
        scores = np.zeros((len(rows), trace.experts), np.float32)
        token, rank = np.nonzero(trace.ids[rows, layer] >= 0)
        scores[token, trace.ids[rows, layer][token, rank]] = 1
    return scores - scores.mean(1, keepdims=True)


def _halves(trace: Trace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens to train on and those to guess with that: every other sequence, or the halves of one, and the other way
    round, so that each token is guessed from sequences that it is not in."""
    if len(trace.starts) > 1:
        odd = (np.searchsorted(trace.starts, np.arange(trace.tokens), "right") - 1) % 2 == 1
    else:
        odd = np.arange(trace.tokens) >= trace.tokens // 2
    one, other = np.flatnonzero(~odd), np.flatnonzero(odd)
    return [(one, other), (other, one)]


def _guess(trace: Trace, matrices: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
    assert trace.inputs is not None
    for layer in range(trace.layers - 1):
        scores = trace.inputs[rows, layer].astype(np.float32) @ matrices[layer].T
        found[rows, layer + 1] = np.argsort(-scores, axis=1, kind="stable")[:, : found.shape[2]]


def _popular(ids: np.ndarray, experts: int, found: np.ndarray) -> None:
    counts = np.zeros(experts, np.int64)
    for token in range(1, len(ids)):
        chosen = ids[token - 1]
        counts[chosen[chosen >= 0]] += 1
        best = np.argsort(-counts, kind="stable")[: found.shape[1]]
        found[token] = np.where(counts[best] > 0, best, NOBODY)
