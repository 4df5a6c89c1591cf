"""Prompts through static graphs on a tiny model: the decode graph's logits for any length and any cut, in company, from
a prefix on, resized; and a device that refuses, dies or hangs."""

import math
import threading
import time

import numpy as np
import pytest

import shoal
from shoal.runtime import backends
from shoal.runtime.backends.provider import Device
from shoal.runtime.errors import BackendError, BundleError, UsageError
from shoal.runtime.providers import CPU, listed
from shoal.runtime.static import prefill as module
from shoal.runtime.static.cut import Piece
from shoal.runtime.static.prefill import Times

C = 8
LENGTHS = (1, C - 1, C, C + 1, 2 * C, 2 * C + 1, 3 * C)
RANDOM = np.random.default_rng(11)


def prompt(length: int) -> list[int]:
    return RANDOM.integers(3, 250, length).tolist()


def taken(model, ids, start=0, slot=0) -> np.ndarray:
    """Logits behind `ids`, and no memory of them."""
    return model.scheduler.decoder.take(slot, ids, start, True).copy()


def keys(model) -> np.ndarray:
    return np.stack([pair[0] for pair in model.scheduler.cache.arrays])


def answer(model, ids, count=12):
    return [token.id for token in model.generate(ids, max_tokens=count, ignore_end=True)]


@pytest.fixture(scope="module")
def static(static_bundle):
    with shoal.load(static_bundle, context=200, slots=2, prefill="static") as model:
        yield model


@pytest.fixture(scope="module")
def plain(tiny_bundle):
    with shoal.load(tiny_bundle, context=200) as model:
        yield model


@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_logits_are_unchunked_ones(static, plain, length):
    ids = prompt(length)
    whole = taken(plain, ids)
    assert np.abs(taken(static, ids) - whole).max() <= 1e-5 * np.abs(whole).max()
    # The cache is the same as well: what decoding goes on from, and nothing of what only filled a chunk up
    found, wanted = keys(static)[:, :1, :, :length], keys(plain)[:, :, :, :length]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_padded_rows_never_touch_the_cache(static):
    for _, array in static.scheduler.cache.arrays:
        array[...] = 7
    taken(static, prompt(C + 3))
    for _, array in static.scheduler.cache.arrays:
        assert (array[0, :, C + 3 :] == 7).all() and (array[1] == 7).all()


@pytest.mark.parametrize("kv", ["fp32", "fp16"])
@pytest.mark.parametrize("bundle", ["static_bundle", "shadowed_bundle"])
def test_where_a_prompt_is_cut_changes_no_bit(request, bundle, kv, monkeypatch):
    ids, found = prompt(3 * C), []
    cuts = ([8, 8, 8], [4, 4, 8, 4, 4], [8, 8, 4, 4], [(3, 8), 8, (5, 8), 8], [(1, 4), 8, 8, (7, 8)])
    with shoal.load(request.getfixturevalue(bundle), context=64, kv=kv, prefill="static") as model:
        for lengths in cuts:
            pieces, at = [], 0
            for length in lengths:
                count, length = length if isinstance(length, tuple) else (length, length)
                pieces.append(Piece(at, count, length))
                at += count
            assert at == len(ids)
            monkeypatch.setattr(module, "cut", lambda count, costs, pieces=pieces: pieces)
            found.append(taken(model, ids))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_threads_of_two_processors_change_no_bit(shadowed_bundle):
    with shoal.load(shadowed_bundle, context=200, prefill="static") as model:
        model.prefill.recordings = []
        for length in (3, C, 4 * C + 1, 9 * C + 5):  # more chunks than lanes
            ids = prompt(length)
            model.prefill.device = "cpu"
            one = taken(model, ids)
            model.prefill.device = "npu"
            for _ in range(5):
                np.testing.assert_array_equal(taken(model, ids), one)
        schedule = model.prefill.recordings[-1].schedule
    assert {run.processor for run in schedule.runs} == {"npu", "cpu"}
    ends = {run.task: run.end for run in schedule.runs}
    assert all(ends[need] <= run.start for run in schedule.runs for need in schedule.tasks[run.task].needs)


def test_without_its_shadows_a_clipped_model_is_visibly_worse(shadowed_bundle, plain, monkeypatch):
    ids = prompt(3 * C)
    whole = taken(plain, ids)

    def error(model):
        return np.abs(taken(model, ids) - whole).max() / np.abs(whole).max()

    with shoal.load(shadowed_bundle, context=64, prefill="static") as model:
        beside = error(model)
        monkeypatch.setattr("shoal.runtime.static.shadow.Outliers.run", lambda self, x, out: out.fill(0))
        alone = error(model)
    assert beside < 0.03 and alone > 4 * beside


def test_requests_prefill_and_decode_between_each_other_as_if_alone(static_bundle, plain):
    prompts = [prompt(length) for length in (5, 30, 3, 45, 9)]
    alone = [answer(plain, ids) for ids in prompts]
    with shoal.load(static_bundle, context=200, slots=3, prefill="static") as model:
        model.prefill.recordings = []
        running = model.generate_batch(prompts, max_tokens=12, ignore_end=True)
        assert [one._request.ids[one._request.prompt :] for one in running] == alone
        # While others run a long prompt delays them by one chunk at a time
        assert max(sum(p.count for p in one.pieces) for one in model.prefill.recordings) <= C


def test_a_prompt_that_begins_alike_goes_on_behind_it(static, plain):
    ids = prompt(40)
    answer(static, ids[:21])
    generation = static.generate(ids, max_tokens=12, ignore_end=True)
    found = [token.id for token in generation]
    assert generation.stats.reused_tokens == 21
    assert found == answer(plain, ids)


def test_the_context_may_be_resized_between_prompts(static_bundle, plain):
    ids = prompt(40)
    with shoal.load(static_bundle, context=64, prefill="static") as model:
        for context in (200, 60, 128):
            model.set_context(context)
            assert answer(model, ids) == answer(plain, ids)


def test_a_cut_goes_by_the_expected_times(static):
    static.prefill.recordings = []
    try:
        steps = len(static.prefill.static.steps)
        quick = {4: (1e-3 / steps,) * steps, 8: (1.5e-3 / steps,) * steps}
        for each, wanted in ((1e-5, [0]), (1.0, [8, 8, 4]), (2e-4, [8, 8, 0])):
            static.prefill.times = Times(quick, 0.0, each)
            for forced in (False, True):
                static.prefill.forced = forced
                taken(static, prompt(2 * C + 2))
                assert [one.length for one in static.prefill.recordings[-1].pieces] == ([8, 8, 4] if forced else wanted)
    finally:
        static.prefill.times = static.prefill.recordings = None
        static.prefill.forced = True


def test_on_the_cpu_auto_measures_once_and_remembers(static_bundle, plain, monkeypatch):
    ids = prompt(30)
    with shoal.load(static_bundle, context=200) as model:
        first = model.prefill.times
        assert set(first.steps) == {4, 8} and all(
            len(one) == len(model.prefill.static.steps) for one in first.steps.values()
        )
        assert answer(model, ids) == answer(plain, ids)
    monkeypatch.setattr("shoal.runtime.static.profile.measure", lambda *a: pytest.fail("measured again"))
    with shoal.load(static_bundle, context=200) as model:
        assert model.prefill.times == first
    with shoal.load(static_bundle, context=200, prefill="dynamic") as model:
        assert model.prefill is None


def test_what_cannot_be_chosen_is_refused(tiny_bundle, npu_bundle):
    with pytest.raises(BackendError, match="It has no static graphs"):
        shoal.load(tiny_bundle, prefill="static")
    with pytest.raises(UsageError, match="no prefill 'fast'"):
        shoal.load(tiny_bundle, prefill="fast")
    with shoal.load(npu_bundle, context=64) as model:  # made for another one: by itself the CPU leaves them alone
        assert model.prefill is None
    with pytest.raises(BackendError, match="were made for the npu"):
        shoal.plan(npu_bundle, backend="gpu", prefill="static")


def test_the_plan_counts_graphs_and_buffers(npu_bundle, shadowed_bundle):
    rows = {row.name: row for row in shoal.plan(npu_bundle, context=64, backend="npu").rows}
    # 3 blocks of 5 graphs for each of 2 lengths; attention of all blocks is one graph, with embedding and head 5 names
    assert rows["static graphs"].note == "15 for each chunk of 4, 8; 5 for any length"
    assert "static graphs" not in {row.name for row in shoal.plan(npu_bundle, context=64).rows}
    rows = {row.name: row for row in shoal.plan(shadowed_bundle, context=64).rows}
    assert rows["hot shadow rows"].note == "12 channels of 6 products"
    with shoal.load(shadowed_bundle, context=64) as model:
        measured = model.measure()
    assert abs(measured["chunk buffers"] - rows["chunk buffers"].bytes) <= 8 * 4096  # whole pages
    assert measured["hot shadow rows"] == rows["hot shadow rows"].bytes


# A device -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def npu(monkeypatch):
    """A device that is the CPU's provider under another name."""
    device = Device("npu", "qnn", listed(CPU)[0])
    monkeypatch.setattr(backends, "choose", lambda name, *a: None if name in ("auto", "cpu") else device)
    return device


def test_a_device_takes_the_chunks_and_the_cpu_the_answers(npu, npu_bundle, plain):
    events = []
    with shoal.load(npu_bundle, context=200, backend="npu", prefill="static", progress=events.append) as model:
        assert model.prefill.device == "npu" and model.placement.backend == "npu" and model.placement.share == 1
        assert len(model.placement.nodes) < sum(model.backend_nodes.values())
        for length in LENGTHS:
            ids = prompt(length)
            assert answer(model, ids) == answer(plain, ids)
    # Blocks differ in weights alone: of 15 graphs for each of 2 lengths 5 are tried in a child
    assert {event.stage: event.total for event in events}.items() >= {("survey", 10), ("open", 30)}
    events.clear()
    with shoal.load(npu_bundle, context=200, backend="npu", prefill="static", progress=events.append) as model:
        assert "survey" not in {event.stage for event in events}  # it opened them before


def test_without_graphs_for_it_a_device_is_refused_and_says_what_to_convert(npu, tiny_bundle):
    with pytest.raises(BackendError, match="cannot run on the npu yet") as refused:
        shoal.load(tiny_bundle, context=64, backend="npu", require={"npu": 0})
    assert "static graphs" in refused.value.why


def test_a_device_that_is_gone_is_an_error_or_as_asked_the_cpu(monkeypatch, npu_bundle, plain):
    def gone(name, *a):
        raise BackendError("There is no npu here.", "It was unplugged.", "Plug it in.")

    monkeypatch.setattr(backends, "choose", gone)
    with pytest.raises(BackendError, match="no npu"):
        shoal.load(npu_bundle, context=64, backend="npu")
    said = []
    with shoal.load(npu_bundle, context=64, require={"npu": 0}, progress=said.append) as model:
        assert model.prefill is None and "static graphs" not in {row.name for row in model.plan.rows}
        assert any("prompts stay on the cpu: There is no npu here." in event.detail for event in said)
        ids = prompt(20)
        assert answer(model, ids) == answer(plain, ids)


def test_graphs_that_do_not_open_are_an_error_or_as_asked_the_cpu(monkeypatch, npu, npu_bundle):
    def refuses(*a, **k):
        raise BackendError("The graph cannot be opened.", "No context.", "Reinstall.")

    monkeypatch.setattr(backends, "open_graphs", refuses)
    with pytest.raises(BackendError, match="cannot be opened"):
        shoal.load(npu_bundle, context=64, backend="npu")
    said = []
    with shoal.load(npu_bundle, context=64, require={"npu": 0}, progress=said.append) as model:
        assert model.prefill is None and "static graphs" not in {row.name for row in model.plan.rows}
    assert any("prompts stay on the cpu: The graph cannot be opened." in event.detail for event in said)


class Broken:
    """A session of the device that works some times and then raises or hangs."""

    def __init__(self, session, times: int, hang: threading.Event | None):
        self.session, self.times, self.hang = session, times, hang

    def bind(self):
        binding = self.session.bind()
        real = binding.run

        def run():
            self.times -= 1
            if self.times < 0 and self.hang is not None:
                self.hang.wait(60)
            if self.times < 0:
                raise BackendError("The model could not be run.", "The device is off.", "Restart.")
            real()

        binding.run = run
        return binding

    def close(self):
        self.session.close()


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_a_device_that_dies_or_hangs_ends_what_runs_and_no_more(npu, npu_bundle, plain, hangs, asked):
    """Within its patience; from then on prompts fail at once or, as asked, go through the CPU's graph."""
    said, end = [], threading.Event()
    options = {"require": {"npu": 0}} if asked else {"backend": "npu", "prefill": "static"}
    with shoal.load(npu_bundle, context=200, progress=said.append, **options) as model:
        steps = len(model.prefill.static.steps)
        model.prefill.times = Times({4: (0.0,) * steps, 8: (0.0,) * steps}, 0.0, math.inf)
        calls = model.prefill.graphs.calls
        calls["1.mlp", 8] = Broken(calls["1.mlp", 8], 3, end if hangs else None)
        model.prefill.patience = 0.5
        ids = prompt(60)
        started = time.monotonic()
        with pytest.raises(BackendError, match="did not finish 1/1.mlp" if hangs else "could not be run"):
            answer(model, ids)
        assert time.monotonic() - started < 30
        assert any("the npu is lost" in event.detail for event in said)
        if asked:
            assert answer(model, ids) == answer(plain, ids)
        else:
            with pytest.raises(BackendError, match="The npu is lost"):
                answer(model, ids)
        end.set()


def test_what_is_not_a_number_is_an_error(shadowed_bundle):
    with shoal.load(shadowed_bundle, context=64, prefill="static") as model:
        steps = model.prefill.static.steps
        first = next(number for number, step in enumerate(steps) if type(step).__name__ == "Shadow")
        run = model.prefill.graphs.shadows[first].run

        def overflow(x, out):
            x[0, 0] = np.inf
            run(x, out)

        model.prefill.graphs.shadows[first].run = overflow
        with pytest.raises(BackendError, match="not a number"):
            answer(model, prompt(5))
        model.prefill.graphs.shadows[first].run = run
        assert len(answer(model, prompt(5))) == 12


def test_an_index_that_does_not_fit_the_model_is_refused(static_bundle, monkeypatch):
    from shoal.runtime.static import graphs

    real = graphs.Static.from_json

    def other(data):
        found = real(data)
        object.__setattr__(found, "steps", found.steps[:-4])  # the last block attends no more
        return found

    monkeypatch.setattr(graphs.Static, "from_json", other)
    with pytest.raises(BundleError, match="attends in blocks"):
        shoal.load(static_bundle, context=64)
