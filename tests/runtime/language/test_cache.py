"""The key-value cache changes its length whole or not at all."""

import numpy as np
import pytest

from shoal.runtime.card import Card, Rope
from shoal.runtime.errors import BudgetError
from shoal.runtime.language.cache import Cache, cache_bytes

CARD = Card(
    name="m", model_type="llama", task="generate", blocks=3, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=9,
    max_context=100, norm_eps=1e-6, activation="silu", ropes=(Rope((1.0, 1.0)),), rope_of=(0,) * 3, windows=(0,) * 3,
)  # fmt: skip


@pytest.mark.parametrize("fails_at", range(6))
def test_no_memory_for_a_longer_one_changes_nothing(monkeypatch, fails_at):
    cache = Cache(CARD, 10, 2)
    cache.held = [[1, 2, 3], [4]]
    for number, array in enumerate(array for pair in cache.arrays for array in pair):
        array[0, :, :3], array[1, :, :1] = number + 1, -number
    buffer, made = Cache._buffer, []

    def scarce(self, context):
        made.append(context)
        if len(made) == fails_at + 1:
            raise BudgetError("No memory.", "None.", "Less.")
        return buffer(self, context)

    with monkeypatch.context() as patch, pytest.raises(BudgetError):
        patch.setattr(Cache, "_buffer", scarce)
        cache.resize(50)
    cache.resize(20)
    assert cache.bytes == cache_bytes(CARD, 20, 2, "fp32") and cache.held == [[1, 2, 3], [4]]
    for number, array in enumerate(array for pair in cache.arrays for array in pair):
        assert array.shape == (2, 2, 20, 4) and not np.any(array[0, :, 3:])
        assert (array[0, :, :3] == number + 1).all() and (array[1, :, :1] == -number).all()
