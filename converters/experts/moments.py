"""What the inputs of one expert's matrices look like: second moments over the tokens that chose it, each counted by the
square of its weight, since that is how much of an error reaches the stream.

An expert that few tokens chose would be rounded for these few alone. It borrows others, at a small weight, until it has
seen as many tokens as its inputs have channels. It knows nothing about files, rounding or routers.
"""

import math

import numpy as np

_BORROWED = 0.1  # of the mean weight of those that chose the expert
_ROWS = 4096  # tokens that are multiplied at once


def moments(
    inputs: np.ndarray, gates: np.ndarray, gate: np.ndarray, up: np.ndarray, activation: str
) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [hidden, hidden] of the inputs of `gate` and `up`, and [ffn, ffn] of their gated product, which is down's
    input. `inputs` fp32 [tokens, hidden] are all tokens, `gates` fp32 [tokens] the weight that each gives the expert, 0
    where it did not choose it; `gate` and `up` are fp32 [ffn, hidden]."""
    chosen = np.flatnonzero(gates)
    weights = np.abs(gates[chosen])
    missing = max(up.shape) - len(chosen)
    if missing > 0:
        others = np.flatnonzero(gates == 0)
        others = others[:: max(1, -(-len(others) // missing))]
        mean = weights.mean() if len(weights) else np.float32(1)
        weights = np.concatenate([weights, np.full(len(others), _BORROWED * mean, np.float32)])
        chosen = np.concatenate([chosen, others])
    into = np.zeros((up.shape[1],) * 2, np.float32)
    between = np.zeros((up.shape[0],) * 2, np.float32)
    for start in range(0, len(chosen), _ROWS):
        share = weights[start : start + _ROWS, None]
        x = inputs[chosen[start : start + _ROWS]]
        y = _ACTIVATIONS[activation](x @ gate.T) * (x @ up.T) * share
        x = x * share
        into += x.T @ x
        between += y.T @ y
    return into, between


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.clip(x, -80, 80)))


def _gelu(x: np.ndarray) -> np.ndarray:
    """By its approximation, which is near enough for what this is for."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_ACTIVATIONS = {
    "silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu, "relu": lambda x: np.maximum(x, 0)
}  # fmt: skip
