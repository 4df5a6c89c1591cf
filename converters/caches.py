"""Static scales of an int8 key-value cache, measured by running the converted model on a text."""

from collections.abc import Mapping

import numpy as np

from shoal.runtime.card import Card
from shoal.runtime.language.cache import Cache
from shoal.runtime.language.decoder import Decoder
from shoal.runtime.session import Session

_MARGIN = 1.25  # what the text did not show; beyond it a key or value is clipped


def cache_scales(graph: Session, card: Card, x: np.ndarray, handles: Mapping[str, int] | None = None) -> np.ndarray:
    """fp32 [blocks, 2, kv_heads * head_dim]: the largest magnitude of each channel of keys and values, with a margin,
    over 127. `x` is what the first block takes, token ids int64 [1, n] or the stream fp32 [1, n, hidden]; blocks that
    are not in the card's part have zeros. A channel that the text leaves near zero gets a share of its block's
    largest. `handles` are those of what lies outside of the graph."""
    cache = Cache(card, x.shape[1], 1)
    Decoder(graph, card, cache, x.shape[1], handles).forward(0, x, [0], [])
    scales = np.zeros((card.blocks, 2, card.kv_heads * card.head_dim), np.float32)
    for block, pair in zip(card.span, cache.arrays, strict=True):
        for index, array in enumerate(pair):
            most = np.abs(array[0]).max(axis=1).ravel()
            scales[block, index] = np.maximum(most * _MARGIN, most.max() / 64 + 1e-6) / 127
    return scales
