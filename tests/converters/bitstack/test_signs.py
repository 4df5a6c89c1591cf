"""Blocks of signs and factors: anchors from theory, and what each choice is for."""

import numpy as np
import pytest

from shoal.converters.bitstack import signs
from shoal.converters.bitstack.signs import Residual, best_rank
from shoal.converters.bitstack.stacks import Stacks
from shoal.converters.bitstack.work import Work
from shoal.converters.quantize.gptq import Feedback
from shoal.converters.recipe import Ladder
from shoal.runtime import kernels
from shoal.runtime.bitstack.layout import StackFormat, pack, reconstruct
from shoal.runtime.errors import ConvertError
from shoal.runtime.kernels.layout import rotate

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")


def even(inputs: int) -> Feedback:
    """Inputs that are alike and know nothing of each other."""
    return Feedback(np.eye(inputs, dtype=np.float32), inputs, False)


def uneven(inputs: int, seed: int = 0) -> tuple[np.ndarray, Feedback]:
    """Inputs of a few directions and some noise, as activations are: rows of them, and their moments."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2048, inputs // 4)) @ random.standard_normal((inputs // 4, inputs))
    x = (x / np.sqrt(inputs) + 0.3 * random.standard_normal(x.shape[:1] + (inputs,))).astype(np.float32)
    x *= np.exp(random.standard_normal(inputs).astype(np.float32))
    return x, Feedback(x.T @ x, inputs, False)


def gaussian(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


def taken(blocks) -> np.ndarray:
    parts = [np.where(b.signs, 1, -1) * (b.u.astype(np.float32) @ b.v.astype(np.float32)) for b in blocks]
    return np.sum(parts, axis=0)


def test_the_first_block_of_normal_weights_leaves_what_theory_says():
    """|w| of a normal w is best replaced by its mean, which leaves sqrt(1 - 2 / pi) of it."""
    weights = gaussian(1024, 1024)
    block = Residual(weights.copy(), even(1024)).block(1)
    left = np.linalg.norm(weights - taken([block])) / np.linalg.norm(weights)
    assert left == pytest.approx(np.sqrt(1 - 2 / np.pi), abs=2e-3)


def test_the_first_two_together_are_the_best_quantiser_of_four_levels():
    """Max 1960: four even levels leave a mean square error of 0.1188 of a normal value."""
    weights = gaussian(512, 512)
    blocks = Residual(weights.copy(), even(512)).floor(2, 1)
    left = np.square(weights - taken(blocks)).mean()
    assert 0.115 < left < 0.1188 * 1.05, "a tenth wider than the best, for what comes after"
    together, apart = (Residual(weights[:128].copy(), uneven(512)[1]) for _ in range(2))
    together.floor(2, 1, sweeps=0)
    apart.block(1), apart.block(1)
    assert together.error < 0.85 * apart.error


@pytest.mark.parametrize("outputs, inputs, rank", [(48, 64, 1), (33, 100, 2), (256, 320, 4), (5, 7, 1), (1, 64, 1)])
def test_every_block_leaves_less_and_what_is_left_is_what_is_said(outputs, inputs, rank):
    weights, (_, feedback) = gaussian(outputs, inputs), uneven(inputs)
    left = Residual(weights.copy(), feedback)
    errors, blocks = [left.error], []
    for step in range(6):
        blocks += left.floor(2, rank) if step == 0 else [left.block(rank, sweeps=step % 2)]
        assert left.error < errors[-1]
        errors.append(left.error)
    np.testing.assert_allclose(left.left.T, weights - taken(blocks), atol=1e-4)
    damped = np.square(feedback.factor * feedback.roots[:, None] @ left.left).sum()
    assert left.error == pytest.approx(damped, rel=1e-3)
    format = StackFormat(inputs, outputs, blocks[0].u.shape[1])
    payloads = [pack(format, *block) for block in blocks]
    np.testing.assert_allclose(reconstruct(format, payloads), taken(blocks), atol=1e-5)


def test_feedback_and_sweeps_pay_in_the_products_error():
    weights, (x, feedback) = gaussian(256, 256), uneven(256)

    def error(blocks) -> float:
        return float(np.square(x @ (weights - taken(blocks)).T).sum())

    plain = error(Residual(weights.copy(), even(256)).floor(2, 1))
    once = error(Residual(weights.copy(), feedback).floor(2, 1, sweeps=0))
    again = error(Residual(weights.copy(), feedback).floor(2, 1, sweeps=2))
    assert again < once < 0.6 * plain
    left = Residual(weights.copy(), feedback)
    left.floor(2, 1, sweeps=2)
    kept = left.left.copy()
    without, swept = Residual(kept.T.copy(), feedback), Residual(kept.T.copy(), feedback)
    without.block(1)
    swept.block(1, sweeps=1)
    assert swept.error < 0.97 * without.error


def test_the_same_seed_gives_the_same_blocks():
    weights, (_, feedback) = gaussian(96, 128), uneven(128)
    first, second = (Residual(weights.copy(), feedback, seed=3) for _ in range(2))
    for a, b in zip(first.floor(2, 2) + [first.block(2)], second.floor(2, 2) + [second.block(2)], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_rounding_the_factors_is_made_up_for_by_the_next_block(monkeypatch):
    """To eight bits as well: after five blocks the error is that of exact factors, within two percent."""
    weights, (_, feedback) = gaussian(256, 256), uneven(256)

    def left(rounded) -> float:
        monkeypatch.setattr(signs, "_rounded", rounded)
        residual = Residual(weights.copy(), feedback)
        residual.floor(2, 1)
        for _ in range(3):
            residual.block(1)
        return residual.error

    def eight(factors: np.ndarray) -> np.ndarray:
        step = np.abs(factors).max() / 127
        return np.rint(factors / step) * step

    exact = left(lambda factors: factors)
    assert left(lambda factors: factors.astype(np.float16)) == pytest.approx(exact, rel=0.01)
    assert left(eight) < 1.1 * exact


def test_a_higher_rank_is_taken_where_magnitudes_have_one():
    random = np.random.default_rng(1)
    u, v = np.exp(random.standard_normal((256, 2))), np.exp(random.standard_normal((2, 256)))
    weights = (np.sign(gaussian(256, 256)) * (u @ v)).astype(np.float32)
    assert best_rank(weights, even(256), 2) == 2
    assert best_rank(gaussian(512, 512), even(512), 2) == 1
    assert best_rank(gaussian(20, 30), even(30), 2) == 1, "too small for any trial"


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4])
def test_weights_of_any_size_keep_within_fp16(scale):
    weights = gaussian(64, 64) * np.float32(scale)
    block = Residual(weights.copy(), even(64)).block(1)
    left = np.linalg.norm(weights - taken([block])) / np.linalg.norm(weights)
    assert left < 0.63


def test_what_fp16_cannot_hold_is_refused():
    with pytest.raises(ConvertError, match="fp16"):
        Residual(gaussian(64, 64) * np.float32(1e15), even(64)).block(1)


def test_zero_weights_are_blocks_of_zero():
    left = Residual(np.zeros((32, 64), np.float32), even(64))
    assert np.abs(taken([*left.floor(2, 1), left.block(1, sweeps=1)])).max() < 1e-6


def test_matrices_of_one_shape_have_ranks_of_their_own(tmp_path):
    """A model's other matrices say nothing about one whose magnitudes take more than a term (Qwen2.5's down_proj of
    block 5 is 18 times worse with one)."""
    random = np.random.default_rng(1)
    magnitudes = np.exp(random.standard_normal((256, 2))) @ np.exp(random.standard_normal((2, 256)))
    rough = rotate((np.sign(gaussian(256, 256)) * magnitudes).astype(np.float32))  # which stacking undoes
    stacks = Stacks(Ladder(first=2, blocks=1), Work(tmp_path / "model.shoal", {}))
    for name, weights in {"plain": gaussian(256, 256), "rough": rough, "again": gaussian(256, 256, seed=1)}.items():
        moments = [np.eye(256, dtype=np.float32) for _ in stacks.ladder.levels]
        stacks.add(name, lambda weights=weights: weights, moments)
    assert [stacks.rank(at) for at in range(3)] == [1, 2, 1]
    stacks.close()
