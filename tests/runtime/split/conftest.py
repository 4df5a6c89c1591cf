"""Latents of any shape, and tables for them."""

from collections.abc import Callable

import numpy as np
import pytest

from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import Tables


@pytest.fixture(scope="session")
def made() -> Callable:
    """made(shape, bits) -> (tables, latents fp32 [4, *shape]); a table for every third channel."""

    def made(shape: tuple[int, ...], bits: int, seed: int = 0, count: int = 4) -> tuple[Tables, np.ndarray]:
        rng = np.random.default_rng(seed)
        latents = rng.laplace(0, 1, (count, *shape)).astype(np.float32)
        quantiser = Quantiser.fit(latents, bits, clip=0.01)
        return Tables.fit(quantiser, latents, np.arange(shape[0]) % 3), latents

    return made
