"""Scales of activations in 8 bits: what is clipped adds up to what was there, and few channels are."""

import numpy as np
import pytest

from shoal.converters.static.scales import Seen, even, largest, quantise, round_weights, with_shadow, without_shadow


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_main_and_residual_multiply_to_the_whole_bitwise(rng):
    x = (rng.standard_normal((64, 256)) * np.where(rng.random(256) < 0.03, 50, 1)).astype(np.float32)
    weights = rng.integers(-127, 128, (256, 96))
    for scale in (0.01, 0.03, 1.0):
        main, residual = quantise(x, scale)
        assert residual.any() == (np.abs(x).max() > 127.5 * scale) and main.min() >= -128 and main.max() <= 127
        whole = np.rint(x / np.float32(scale)).astype(np.int64) @ weights
        parts = main.astype(np.int64) @ weights + residual.astype(np.int64) @ weights
        np.testing.assert_array_equal(parts, whole)
        # The authors' printed Eq. 1 takes multiples of 128 away, which is another number
        eq1 = np.floor(x / np.float32(scale) / 128) * 128 * (residual != 0)
        assert not residual.any() or ((main + eq1).astype(np.int64) @ weights != whole).any()


def injected(rng):
    """Inputs [256, 1024] of a product with six channels of 20 to 60 times the size, as language models have them."""
    x = rng.standard_normal((256, 1024)).astype(np.float32)
    x[:, rng.choice(1024, 6, replace=False)] *= np.linspace(20, 60, 6, dtype=np.float32)
    return x, rng.standard_normal((512, 1024)).astype(np.float32) / 32


def product_error(x, weights, scale, restored):
    main, residual = quantise(x, scale)
    found = (main + residual * restored) * np.float32(scale) @ weights.T
    return np.linalg.norm(found - x @ weights.T) / np.linalg.norm(x @ weights.T)


def test_with_injected_outliers_the_error_explodes_without_a_shadow_and_recovers_with_one(rng):
    x, weights = injected(rng)
    seen = Seen()
    for part in np.split(x, 4):
        seen.add(part, 4)
    shadow, alone = with_shadow(seen, weights, np.ones(512)), without_shadow(seen, weights, np.ones(512))
    assert len(shadow.hot) == 6 and shadow.beyond <= 0.01
    recovered = product_error(x, weights, shadow.scale, 1)
    clipped = product_error(x, weights, shadow.scale, 0)
    absmax = product_error(x, weights, largest(seen), 0)
    best = product_error(x, weights, alone.scale, 0)
    assert recovered < 0.004 and clipped > 0.5 and min(absmax, best) > 8 * recovered
    np.testing.assert_allclose([shadow.error**0.5, alone.error**0.5], [recovered, best], rtol=0.15)


def test_rows_of_every_size_keep_their_steps_once_they_are_even(rng):
    sizes = 10 ** rng.uniform(-2, 2, (256, 1))
    x = (rng.standard_normal((256, 512)) * sizes).astype(np.float32)
    x[7] = 0
    weights = rng.standard_normal((64, 512)).astype(np.float32)
    assert not even(x)[7].any() and np.isfinite(even(x)).all()

    def worst(rows):
        seen = Seen()
        seen.add(rows, 1)
        scale = with_shadow(seen, weights, np.ones(64)).scale
        return max(product_error(row[None], weights, scale, 1) for row in np.delete(rows, 7, 0))

    assert worst(even(x)) < 0.02 and worst(x) > 0.5


def test_without_outliers_a_shadow_is_worth_nothing(rng):
    x, weights = rng.uniform(-1, 1, (256, 512)).astype(np.float32), rng.standard_normal((64, 512)).astype(np.float32)
    seen = Seen()
    seen.add(x, 1)
    shadow, alone = with_shadow(seen, weights, np.ones(64)), without_shadow(seen, weights, np.ones(64))
    assert shadow.hot == () and alone.error == pytest.approx(shadow.error, rel=0.05)


def test_nothing_that_was_seen_is_clipped_by_the_largest_scale_and_a_dead_input_has_one(rng):
    seen = Seen()
    seen.add(rng.standard_normal((40, 64)).astype(np.float32) * 7, 1)
    main, residual = quantise(seen.sample, largest(seen))
    assert not residual.any() and np.abs(main).max() == 127
    dead = Seen()
    dead.add(np.zeros((4, 8), np.float32), 1)
    assert largest(dead) > 0 and with_shadow(dead, np.ones((3, 8), np.float32), np.ones(3)).error == 0


def test_the_sample_has_the_rows_with_the_largest_values(rng):
    x = rng.standard_normal((500, 16)).astype(np.float32)
    x[123] *= 100
    seen = Seen()
    seen.add(x, 8)
    assert len(seen.sample) < 40 and (seen.sample == x[123]).all(1).any()
    np.testing.assert_array_equal(seen.maxima.max(0), np.abs(x).max(0))


def test_weights_round_to_within_half_a_step(rng):
    rows = rng.standard_normal((5, 64)).astype(np.float32) * np.array([[1e-3], [1], [10], [0], [5]], np.float32)
    codes, scales = round_weights(rows)
    assert codes.dtype == np.int8 and np.abs(codes).max() == 127
    assert (np.abs(codes * scales[:, None] - rows) <= scales[:, None] * 0.5001).all()
