"""Sampling against its definitions, written plainly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.errors import BackendError, UsageError
from shoal.runtime.language.sampling import Sampler, Sampling, _drawn, _likeliest

CHANCE = np.random.default_rng(5)


def logits(count: int = 1000, spread: float = 3.0) -> np.ndarray:
    return (CHANCE.standard_normal(count) * spread).astype(np.float32)


def left(values: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> dict[int, float]:
    """Which ids may be drawn, and how probable they are: each step as its paper states it, sorted and in double."""
    order = np.argsort(-values.astype(np.float64), kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp((values[order].astype(np.float64) - values.max()) / temperature)
    share = weights / weights.sum()
    if top_p < 1:
        count = int(np.searchsorted(np.cumsum(share), top_p)) + 1
        order, share = order[:count], share[:count] / share[:count].sum()
    keep = share >= min_p * share.max()
    share = np.where(keep, share, 0) / share[keep].sum()
    return {int(number): float(part) for number, part in zip(order, share, strict=True) if part > 0}


def test_greedy_takes_the_first_of_the_likeliest():
    values = np.zeros(5000, np.float32)
    values[[7, 4000]] = 2.5
    chosen, logprob = Sampler(Sampling()).choose(values)
    assert chosen == 7
    assert logprob == pytest.approx(2.5 - math.log(np.exp(values.astype(np.float64)).sum()), abs=1e-5)


@pytest.mark.parametrize("size", [50, 3000, 70_000])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.1}, {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 2.0, "top_p": 0.999}, {"temperature": 1.0, "top_k": 1},
    ],
)  # fmt: skip
def test_draws_follow_the_distribution(size, options):
    values = logits(size)
    expected = left(values, **options)
    sampler, draws = Sampler(Sampling(seed=11, **options)), 400
    counts: dict[int, int] = {}
    for _ in range(draws):
        chosen, _ = sampler.choose(values)
        counts[chosen] = counts.get(chosen, 0) + 1
    edge = min(expected.values())  # a token at the very edge may fall on either side by rounding
    assert all(number in expected or edge < 1e-3 for number in counts)
    likely = {number: share for number, share in expected.items() if draws * share >= 5}  # the others count as one
    counted = [(counts.get(number, 0), share) for number, share in likely.items()]
    counted.append((draws - sum(count for count, _ in counted), 1 - sum(likely.values())))
    for count, share in counted:
        assert abs(count - draws * share) <= 6 * math.sqrt(draws * max(share * (1 - share), 0)) + 1


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs():
    steps = [logits(2000) for _ in range(30)]
    one, two, other = (Sampler(Sampling(temperature=1.0, seed=seed)) for seed in (9, 9, 10))
    alone = [one.choose(step) for step in steps]
    among = []
    for step in steps:
        other.choose(step)
        among.append(two.choose(step))
    assert alone == among
    assert alone != [Sampler(Sampling(temperature=1.0, seed=10)).choose(step) for step in steps]


def test_log_probabilities_are_the_models_own():
    values = logits(3000)
    double = values.astype(np.float64)
    expected = double - math.log(np.exp(double).sum())
    ban = Sampling(temperature=0.5, top_k=3, repetition_penalty=1.3, seed=1, processors=[lambda ids, row: row - 5])
    for sampling in (Sampling(), ban):
        sampler = Sampler(sampling)
        chosen, logprob = sampler.choose(values, [1, 2, 3])
        assert logprob == pytest.approx(expected[chosen], abs=1e-4)
        top = sampler.top(20)
        assert [number for number, _ in top] == np.argsort(-values, kind="stable")[:20].tolist()
        assert [value for _, value in top] == pytest.approx(np.sort(expected)[::-1][:20].tolist(), abs=1e-4)
        assert sampler.top(0) == []


@settings(max_examples=200)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=400), st.integers(0, 450))
def test_likeliest(values, count):
    row = np.array(values, np.float32)
    assert _likeliest(row, count).tolist() == np.argsort(-row, kind="stable")[:count].tolist()


def test_drawn_covers_every_share():
    weights = np.zeros(5000, np.float32)
    weights[[3, 1023, 1024, 4000]] = [0.1, 0.2, 0.3, 0.4]
    assert [_drawn(weights, share) for share in (0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 1 - 2**-53)] == (
        [3, 3, 1023, 1023, 1024, 1024, 4000, 4000]
    )


def test_repetition_penalty_and_a_history_that_is_cut():
    values = logits(500)
    history = [3, 3, 499, 7]
    sampler = Sampler(Sampling(repetition_penalty=2.0, temperature=1.0, seed=3))
    for ids in (history, [*history, 8], [*history, 8, 9], [5], [5, 6]):  # grows, then slides
        expected = values.copy()
        for number in set(ids):
            expected[number] = expected[number] / 2 if expected[number] > 0 else expected[number] * 2
        np.testing.assert_array_equal(sampler._changed(values, ids), expected)


def test_processors_come_first_in_their_order_and_leave_the_logits_alone():
    values, seen = logits(100), []

    def ban(ids, row):
        seen.append(list(ids))
        row[values.argmax()] = -np.inf
        return row

    kept = values.copy()
    chosen, _ = Sampler(Sampling(processors=(ban, lambda ids, row: row.astype(np.float64) * 2))).choose(values, [1, 2])
    assert chosen == np.argsort(-kept)[1] and seen == [[1, 2]]
    np.testing.assert_array_equal(values, kept)


@pytest.mark.parametrize(
    "result", [None, [0.0] * 10, np.zeros(9, np.float32), np.zeros((1, 10), np.float32), np.zeros(10, int),
               np.full(10, -np.inf), np.full(10, np.nan), np.full(10, np.inf)],
)  # fmt: skip
def test_a_wrong_processor_is_named(result):
    def mine(ids, row):
        return result

    with pytest.raises(UsageError, match="mine"):
        Sampler(Sampling(processors=(mine,))).choose(np.zeros(10, np.float32))


def test_what_cannot_be_sampled():
    row = np.zeros(10, np.float32)
    for bad in (np.nan, np.inf):
        row[4] = bad
        with pytest.raises(BackendError):
            Sampler(Sampling()).choose(row)
    with pytest.raises(BackendError):
        Sampler(Sampling(temperature=1.0)).choose(np.full(10, -np.inf, np.float32))
    row[:] = -np.inf
    row[6] = -1e30
    for temperature in (0, 1e-30, 0.001, 100):
        assert Sampler(Sampling(temperature=temperature, seed=0, top_p=0.5, min_p=0.1)).choose(row)[0] == 6


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": math.nan}, {"temperature": -0.1}, {"temperature": math.inf}, {"temperature": "1"},
        {"temperature": True}, {"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"top_p": 0}, {"top_p": 1.1},
        {"top_p": math.nan}, {"min_p": -1}, {"min_p": 2}, {"repetition_penalty": 0}, {"repetition_penalty": None},
        {"seed": -1}, {"seed": 1.0}, {"seed": 1 << 64}, {"processors": 5}, {"processors": [3]}, {"temprature": 1},
    ],
)  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling.of(options)
