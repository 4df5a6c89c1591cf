"""The runtime's promises on a tiny fp32 model: the same tokens however requests are chunked, batched, interleaved,
reused, slid, resized or cancelled. Reference: one request alone, its prompt in one chunk, no cache from before."""

import asyncio
import threading

import numpy as np
import pytest

import shoal
from shoal.converters.convert import convert
from shoal.runtime.errors import BackendError, BudgetError, BusyError, ContextError, ShoalError, UsageError

RANDOM = np.random.default_rng(3)


def prompt(length: int) -> list[int]:
    return RANDOM.integers(3, 250, length).tolist()


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def bundle(request, tmp_path_factory):
    from pathlib import Path

    source = Path(__file__).resolve().parents[2] / "data" / "tiny" / request.param
    out = tmp_path_factory.mktemp("tiny") / "m.shoal"
    convert(source, out, "fp32", check_parity=False)
    return out


def alone(bundle, ids, count=20, **options):
    with shoal.load(bundle, context=200) as model:
        return list(tokens(model.generate(ids, max_tokens=count, ignore_end=True, **options)))


def tokens(generation):
    return [token.id for token in generation]


def test_chunks_do_not_change_the_answer(bundle):
    for length in (1, 7, 8, 9, 16, 17, 24):  # 1, c-1, c, c+1, 2c, 2c+1, 3c
        ids = prompt(length)
        with shoal.load(bundle, context=200, chunk=8) as model:
            assert tokens(model.generate(ids, max_tokens=20, ignore_end=True)) == alone(bundle, ids)


def test_requests_that_share_steps_get_their_own_answers(bundle):
    prompts = [prompt(length) for length in (5, 30, 3, 17, 9, 26)]
    with shoal.load(bundle, context=200, slots=3, chunk=8) as model:
        running = model.generate_batch(prompts, max_tokens=20, ignore_end=True)
    for ids, generation in zip(prompts, running, strict=True):
        assert generation._request.ids[len(ids) :] == alone(bundle, ids)


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
def test_in_integers_company_changes_no_bit_of_the_logits(tiny_folder, tmp_path, kv):
    """Activations are rounded for each token by itself. In how many chunks a prompt comes may change a rounding."""
    convert(tiny_folder, tmp_path / "m.shoal", "int4", check_parity=False)
    rows = RANDOM.integers(3, 250, (3, 40))
    with shoal.load(tmp_path / "m.shoal", context=64, slots=3, kv=kv) as model:
        decoder = model.scheduler.decoder
        for slot in range(3):
            decoder.forward(slot, rows[slot : slot + 1, :30], [0], [29])
        for at in range(30, 40):
            together = decoder.forward(0, rows[:, at : at + 1], [at] * 3, [0, 1, 2]).copy()
            for slot in range(3):
                one = decoder.forward(slot, rows[slot : slot + 1, at : at + 1], [at], [0])
                np.testing.assert_array_equal(one[0], together[slot])


def test_threads_may_generate_at_once(bundle):
    prompts = [prompt(4 + length) for length in range(6)]
    found = {}
    with shoal.load(bundle, context=200, slots=4) as model:

        def work(index):
            found[index] = tokens(model.generate(prompts[index], max_tokens=12, ignore_end=True))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [found[index] for index in range(6)] == [alone(bundle, ids, 12) for ids in prompts]


def test_a_prompt_that_begins_alike_is_not_computed_again(bundle):
    first = prompt(40)
    second = first[:30] + prompt(10)
    with shoal.load(bundle, context=200, slots=2) as model:
        model.generate(first, max_tokens=1, ignore_end=True).finish()
        again = model.generate(second, max_tokens=20, ignore_end=True)
        assert tokens(again) == alone(bundle, second)
        assert again.stats.reused_tokens == 30
        # From a row that is in use: copied
        busy = model.generate(first, max_tokens=50, ignore_end=True)
        next(busy)
        shared = model.generate(second, max_tokens=20, ignore_end=True)
        assert tokens(shared) == alone(bundle, second)
        assert shared.stats.reused_tokens >= 30
        assert tokens(busy)[:5] == alone(bundle, first, 6)[1:]


def test_an_overflow_is_refused_or_slid_never_silent(bundle):
    ids = prompt(30)
    with shoal.load(bundle, context=64) as model:
        with pytest.raises(ContextError):
            model.generate(prompt(100_000))
        with pytest.raises(ContextError):
            model.generate(ids, max_tokens=60)
        full = model.generate(ids, ignore_end=True)  # until the context is full
        assert len(tokens(full)) == 64 - 30 and full.stats.finish == "length"
        slid = model.generate(ids, max_tokens=80, ignore_end=True, overflow="slide")
        found = tokens(slid)
        assert len(found) == 80 and slid.stats.slid_tokens > 0
        # After a slide the answer is exact for what the model then sees
        seen = ids[:4] + (ids + found[:34])[-28:]
        assert found[34:40] == alone(bundle, seen, 6)
        long = model.generate(prompt(500), max_tokens=3, ignore_end=True, overflow="slide")
        assert len(tokens(long)) == 3


def test_memory_changes_while_an_answer_goes_on(bundle):
    ids = prompt(20)
    expected = alone(bundle, ids, 60)
    with shoal.load(bundle, context=200) as model:
        generation = model.generate(ids, max_tokens=60, ignore_end=True)
        found = [next(generation).id for _ in range(10)]
        assert model.set_context(100).context == 100
        found += [next(generation).id for _ in range(10)]
        with pytest.raises(BudgetError):
            model.set_context(30)
        model.set_context(150)
        assert found + tokens(generation) == expected


def test_a_cancelled_answer_frees_its_slot(bundle):
    with shoal.load(bundle, context=200, slots=1, queue=1) as model:
        first = model.generate(prompt(5), max_tokens=150, ignore_end=True)
        next(first)
        second = model.generate(prompt(5), max_tokens=3, ignore_end=True)
        with pytest.raises(BusyError):
            model.generate(prompt(5), max_tokens=3)
        first.cancel()
        assert len(tokens(second)) == 3
        assert first.stats.finish == "cancelled" and model.scheduler.load() == (0, 0)


def test_a_processor_that_raises_ends_its_own_request_only(bundle):
    def broken(ids, logits):
        raise RuntimeError("mine")

    with shoal.load(bundle, context=200, slots=2) as model:
        ids = prompt(6)
        good = model.generate(ids, max_tokens=10, ignore_end=True)
        bad = model.generate(prompt(6), max_tokens=10, processors=(broken,))
        with pytest.raises(ShoalError, match="processor"):
            tokens(bad)
        assert tokens(good) == alone(bundle, ids, 10)


def test_sampling_is_repeatable_and_independent_of_company(bundle):
    ids = prompt(10)
    options = dict(max_tokens=15, ignore_end=True, temperature=0.9, top_k=40, seed=11)
    with shoal.load(bundle, context=200, slots=3) as model:
        one = tokens(model.generate(ids, **options))
        crowd = [model.generate(prompt(8), max_tokens=15, temperature=1.0, seed=index) for index in range(2)]
        assert tokens(model.generate(ids, **options)) == one
        for generation in crowd:
            generation.cancel()


def test_asyncio(bundle):
    ids = prompt(10)

    async def work(model):
        found = []
        async for token in model.agenerate(ids, max_tokens=8, ignore_end=True):
            found.append(token.id)
        async for _ in model.agenerate(ids, max_tokens=50, ignore_end=True):
            break  # leaving early frees the slot
        return found

    with shoal.load(bundle, context=200) as model:
        assert asyncio.run(work(model)) == alone(bundle, ids, 8)
        assert model.scheduler.load()[0] == 0 or model.generate(ids, max_tokens=1).finish() is not None


def test_an_answer_that_nobody_can_take_any_more_holds_no_slot(bundle):
    async def cancelled_while_it_starts(model):
        async def take():
            async for _ in model.agenerate(prompt(10), max_tokens=150, ignore_end=True):
                pass

        task = asyncio.create_task(take())
        await asyncio.sleep(0)  # its first token is not there yet
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with shoal.load(bundle, context=200, slots=1) as model:
        asyncio.run(cancelled_while_it_starts(model))
        token = next(model.generate(prompt(10), max_tokens=150, ignore_end=True))  # and drops the answer
        steps, forward = [], model.scheduler.decoder.forward
        model.scheduler.decoder.forward = lambda *step: steps.append(step) or forward(*step)
        model.generate(prompt(5), max_tokens=1, ignore_end=True).finish()
        assert token.stats.finish == "cancelled" and len(steps) == 1  # it did not wait for 300 tokens of nobody's


def test_closing_tells_whoever_still_generates(bundle):
    model = shoal.load(bundle, context=200, slots=1)
    running, waiting = (model.generate(prompt(5), max_tokens=150, ignore_end=True) for _ in range(2))
    next(running)
    model.close()
    for generation in (running, waiting):
        with pytest.raises(BackendError, match="closed"):
            generation.finish()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": float("nan")}, {"max_tokens": 0}, {"overflow": "wrap"}, {"nonsense": 1}, {"logprobs": -1},
        {"stop": (1,)},
    ],
)  # fmt: skip
def test_wrong_options_are_named(bundle, wrong):
    with shoal.load(bundle, context=64) as model, pytest.raises(UsageError):
        model.generate([5, 6], **wrong)


def test_wrong_prompts_and_a_closed_model(bundle):
    with shoal.load(bundle, context=64) as model:
        for wrong in ([], [10**6], [-1]):
            with pytest.raises(UsageError):
                model.generate(wrong)
    with pytest.raises(BackendError):
        model.generate([5])
    model.close()


@pytest.mark.parametrize("kv, share, most", [("fp16", 2, 0.03), ("int8", 4, 0.1)])
def test_a_smaller_cache_is_close(bundle, kv, share, most):
    ids = prompt(40)
    with shoal.load(bundle, context=200) as full, shoal.load(bundle, context=200, kv=kv) as small:
        exact = full.scheduler.decoder.forward(0, np.array([ids]), [0], list(range(40))).copy()
        coarse = small.scheduler.decoder.forward(0, np.array([ids]), [0], list(range(40)))
        assert 0 < np.abs(exact - coarse).max() < most * np.abs(exact).max()
        assert small.scheduler.cache.bytes * (share - 0.9) < full.scheduler.cache.bytes
