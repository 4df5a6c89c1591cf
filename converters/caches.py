"""Static scales of an int8 key-value cache, measured by running the converted model on a text."""

import numpy as np

from shoal.runtime.card import Card
from shoal.runtime.language.cache import Cache
from shoal.runtime.language.decoder import Decoder
from shoal.runtime.session import Session

_MARGIN = 1.25  # what the text did not show; beyond it a key or value is clipped


def cache_scales(graph: Session, card: Card, tokens: list[int]) -> np.ndarray:
    """fp32 [blocks, 2, kv_heads * head_dim]: the largest magnitude of each channel of keys and values, with a margin,
    over 127. A channel that the text leaves near zero gets a share of its block's largest."""
    cache = Cache(card, len(tokens), 1)
    Decoder(graph, card, cache, len(tokens)).forward(0, np.array([tokens], np.int64), [0], [])
    scales = np.empty((card.blocks, 2, card.kv_heads * card.head_dim), np.float32)
    for block, pair in enumerate(cache.arrays):
        for index, array in enumerate(pair):
            most = np.abs(array[0]).max(axis=1).ravel()
            scales[block, index] = np.maximum(most * _MARGIN, most.max() / 64 + 1e-6) / 127
    return scales
