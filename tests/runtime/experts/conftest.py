"""Routing that is made up: alike from token to token as much as a test wants."""

from collections.abc import Callable

import numpy as np
import pytest

from shoal.runtime.experts.trace import Trace


def make_trace(tokens: int = 200, layers: int = 3, experts: int = 8, top_k: int = 2, *, memory: float = 0.8,
               sequences: int = 4, hidden: int = 0, seed: int = 1, **facts) -> Trace:  # fmt: skip
    """Each expert of a layer has a latent that follows an autoregression of first order with `memory`; the largest are
    chosen. With `hidden` the latents are a linear map of one state, which is the input of every layer."""
    random = np.random.default_rng(seed)
    width = (hidden,) if hidden else (layers, experts)
    noise = random.normal(size=(tokens, *width))
    latent = np.empty_like(noise)
    starts = np.linspace(0, tokens, sequences, endpoint=False).astype(np.int64)
    for token in range(tokens):
        fresh = token in starts
        latent[token] = noise[token] if fresh else memory * latent[token - 1] + np.sqrt(1 - memory**2) * noise[token]
    inputs = None
    if hidden:
        inputs = np.repeat(latent[:, None].astype(np.float16), layers, 1)
        latent = np.einsum("th,leh->tle", latent, random.normal(size=(layers, experts, hidden))) / np.sqrt(hidden)
    raised = np.exp(latent)
    scores = (raised / raised.sum(-1, keepdims=True)).astype(np.float16)
    ids = np.argsort(-scores.astype(np.float32), axis=-1, kind="stable")[..., :top_k].astype(np.int16)
    return Trace("made up", experts, ids, starts, scores, inputs, **facts)


@pytest.fixture(scope="session")
def routing() -> Callable[..., Trace]:
    return make_trace


@pytest.fixture(scope="session")
def of_ids() -> Callable[..., Trace]:
    """of_ids(ids, experts, starts=(0,)): a trace of these, ids as nested lists [tokens][layers][top_k]."""

    def of_ids(ids, experts: int, starts=(0,), **facts) -> Trace:
        return Trace("by hand", experts, np.array(ids, np.int16), np.array(starts, np.int64), **facts)

    return of_ids
