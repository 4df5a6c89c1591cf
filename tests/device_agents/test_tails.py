"""Tails on a real network: what is batched equals what is not, everybody gets its own rows, and limits hold."""

import asyncio
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.converters.split.tail import pack_tail
from shoal.device_agents.batching import Job, Waiting
from shoal.device_agents.tails import LateError, Tail, Tails
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BackendError, BudgetError, BundleError, BusyError, UsageError
from shoal.runtime.session import open_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from make_split import build, split  # noqa: E402


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """(digest, path, latents fp32 [12, 16, 8, 8], logits fp32 [12, 10] of the whole network)."""
    made, path = split(), tmp_path_factory.mktemp("tails") / "tail.shoal"
    images = np.random.default_rng(1).random((12, 3, 32, 32), np.float32)
    with open_graph(made.head, {}, threads=1) as head, open_graph(made.whole, {}, threads=1) as whole:
        latents, logits = head.run({"image": images})["latent"], whole.run({"image": images})["logits"]
    return pack_tail(made.tail, path), path, latents, logits


async def ask(tails, device, digest, feeds, deadline=None):
    """One request as the edge makes it: body and all."""
    with tails.admit(device, deadline) as slot:
        tail = await slot.open(digest)
        arrays = [np.asarray(array) for array in feeds.values()]
        layout = tail.layout(list(feeds), [array.dtype.name for array in arrays], [array.shape for array in arrays])
        slot.reserve(layout.nbytes)
        return await slot.run(layout, layout.read(b"".join(array.tobytes() for array in arrays)))


class Gate:
    """Holds the worker before its next run, so that what waits is certain."""

    def __init__(self, tail: Tail):
        self.open, self.reached, self._run = threading.Event(), threading.Event(), tail.run
        tail.run = self.run  # type: ignore[method-assign]

    def run(self, jobs):
        self.reached.set()
        assert self.open.wait(20)
        return self._run(jobs)


async def gated(tails, digest, feeds) -> tuple[Gate, asyncio.Task]:
    """A gate with one request in it."""
    with tails.admit("first") as slot:
        gate = Gate(await slot.open(digest))
    task = asyncio.create_task(ask(tails, "first", digest, feeds))
    await asyncio.to_thread(gate.reached.wait, 20)
    return gate, task


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def test_batched_equals_alone_and_everybody_gets_its_own(network):
    digest, path, latents, logits = network

    async def main():
        tails = Tails(lambda _: Tail(Bundle.open(path), 1), max_batch=8)
        gate, first = await gated(tails, digest, {"latent": latents[:1]})
        spans = [(1, 2), (2, 4), (4, 5), (5, 8), (8, 12)]  # 1 + 2 + 1 + 3 rows fit a batch of 8, 4 more do not
        tasks = [
            asyncio.create_task(ask(tails, f"d{a}", digest, {"latent": latents[a:b]})) for a, b in spans
        ]  # fmt: skip
        await until(lambda: len(tails.waiting) == len(spans))
        gate.open.set()
        answers = [await first, *[await task for task in tasks]]
        for (start, stop), answer in zip([(0, 1), *spans], answers, strict=True):
            np.testing.assert_allclose(answer.outputs["logits"], logits[start:stop], atol=1e-4)
            np.testing.assert_array_equal(answer.outputs["label"], logits[start:stop].argmax(1))
        assert [answer.batch for answer in answers] == [1, 7, 7, 7, 7, 4]
        assert tails.open_tails[digest].served == 6 and tails.open_tails[digest].batches == 3
        assert tails.running == 0 and tails._bytes == 0 and 0 < tails.load(asyncio.get_running_loop().time()) < 1
        await tails.close()

    asyncio.run(main())


def test_the_loop_stays_free_while_a_tail_runs(network):
    digest, path, latents, _ = network

    async def main():
        tails = Tails(lambda _: Tail(Bundle.open(path), 1))
        gate, first = await gated(tails, digest, {"latent": latents[:1]})
        await asyncio.sleep(0)  # would never return if the loop ran the tail
        gate.open.set()
        await first
        await tails.close()

    asyncio.run(main())


def test_what_is_too_much_is_refused_and_others_are_not_disturbed(network):
    digest, path, latents, logits = network

    async def main():
        tails = Tails(lambda _: Tail(Bundle.open(path), 1), queue=4, inflight=2)
        gate, first = await gated(tails, digest, {"latent": latents[:1]})
        one = {"latent": latents[1:2]}
        tasks = [asyncio.create_task(ask(tails, name, digest, one)) for name in ("first", "b", "c")]
        await until(lambda: tails.running == 4)
        for device, why in (("first", "This device"), ("d", "4 requests wait")):
            with pytest.raises(BusyError, match=why) as caught:
                await ask(tails, device, digest, one)
            assert caught.value.retry_ms > 0
        tasks[2].cancel()  # its device has gone: what it asked is not computed
        await until(lambda: len(tails.waiting) == 2)
        gate.open.set()
        assert (await first).batch == 1
        for task in tasks[:2]:
            answer = await task
            np.testing.assert_allclose(answer.outputs["logits"], logits[1:2], atol=1e-4)
            assert answer.batch == 2
        await tails.close()
        with pytest.raises(BusyError, match="shutting down"):
            await ask(tails, "a", digest, one)

    asyncio.run(main())


def test_what_is_late_is_refused_and_not_computed(network):
    digest, path, latents, _ = network

    async def main():
        loop = asyncio.get_running_loop()
        tails = Tails(lambda _: Tail(Bundle.open(path), 1))
        with pytest.raises(LateError):
            await ask(tails, "a", digest, {"latent": latents[:1]}, loop.time() - 0.001)
        gate, first = await gated(tails, digest, {"latent": latents[:1]})
        late = asyncio.create_task(ask(tails, "a", digest, {"latent": latents[:1]}, loop.time() + 0.05))
        kept = asyncio.create_task(ask(tails, "b", digest, {"latent": latents[:1]}, loop.time() + 60))
        await until(lambda: len(tails.waiting) == 2)
        await asyncio.sleep(0.06)
        gate.open.set()
        with pytest.raises(LateError):
            await late
        assert (await kept).batch == 1 and (await first).batch == 1
        assert tails.open_tails[digest].served == 2
        await tails.close()

    asyncio.run(main())


def test_one_bad_request_takes_no_other_along(tmp_path):
    rows = build("tail", "int64[n] row", "float[n, 4] y", "y = Gather (w, row)", {"w": np.eye(4, dtype=np.float32)},
                 ("w",))  # fmt: skip
    digest = pack_tail(rows, tmp_path / "t.shoal")

    async def main():
        tails = Tails(lambda _: Tail(Bundle.open(tmp_path / "t.shoal"), 1))
        gate, first = await gated(tails, digest, {"row": np.array([0])})
        tasks = [asyncio.create_task(ask(tails, str(row), digest, {"row": np.array([row])})) for row in (1, 99, 3)]
        await until(lambda: len(tails.waiting) == 3)
        gate.open.set()
        await first
        found = await asyncio.gather(*tasks, return_exceptions=True)
        np.testing.assert_array_equal(found[0].outputs["y"], np.eye(4, dtype=np.float32)[[1]])
        np.testing.assert_array_equal(found[2].outputs["y"], np.eye(4, dtype=np.float32)[[3]])
        assert isinstance(found[1], BackendError)
        await tails.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "names, dtypes, shapes",
    [
        ((), (), ()),
        (("x",), ("float32",), ((1, 16, 8, 8),)),
        (("latent", "latent"), ("float32",) * 2, ((1, 16, 8, 8),) * 2),
        (("latent",), ("float64",), ((1, 16, 8, 8),)),
        (("latent",), ("float32",), ((1, 16, 8),)),
        (("latent",), ("float32",), ((1, 16, 8, 9),)),
        (("latent",), ("float32",), ((0, 16, 8, 8),)),
        (("latent",), ("float32",), ((-1, 16, 8, 8),)),
        (("latent",), ("float32",), ((1 << 40, 16, 8, 8),)),
        (("latent",), ("float32",), ((1 << 20, 16, 8, 8),)),
        (("latent",), ("float32",), ()),
        (("latent",), (), ((1, 16, 8, 8),)),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_they_come(network, names, dtypes, shapes):
    with pytest.raises(UsageError), Bundle.open(network[1]) as bundle:
        Tail(bundle, threads=1).layout(names, dtypes, shapes)


def test_a_server_elsewhere_takes_several_batches_at_a_time(network):
    digest, path, latents, logits = network
    together = threading.Barrier(3)

    class Elsewhere:
        def __init__(self, session):
            self.session, self.inputs = session, session.inputs

        def run(self, feeds):
            together.wait(20)  # three runs at once, or none ends
            return self.session.run(feeds)

        def close(self):
            self.session.close()

    def opened(_):
        session = open_graph(split().tail, {}, threads=1)
        return Tail(Bundle.open(path), remote=Elsewhere(session), where="http://10.0.0.3:8000")

    async def main():
        tails = Tails(opened, max_batch=1)
        asked = [ask(tails, str(row), digest, {"latent": latents[row : row + 1]}) for row in range(3)]
        for row, answer in enumerate(await asyncio.gather(*asked)):
            np.testing.assert_allclose(answer.outputs["logits"], logits[row : row + 1], atol=1e-4)
        await tails.close()

    asyncio.run(main())


def test_tails_share_the_memory_and_what_is_no_tail_is_refused(network, tmp_path):
    digest, path, latents, _ = network
    paths = {digest: path}
    for seed in (1, 2):
        paths[pack_tail(split(seed).tail, tmp_path / f"{seed}.shoal")] = tmp_path / f"{seed}.shoal"

    def sized(wanted):
        tail = Tail(Bundle.open(paths[wanted]), 1)
        tail.resident = 100  # the system's count of so small a network is chance
        return tail

    async def main():
        tails, (a, b, c) = Tails(sized, memory=250), paths
        for wanted in (a, b, a, c):
            await ask(tails, "x", wanted, {"latent": latents[:1]})
        assert set(tails.open_tails) == {a, c}
        gate, first = await gated(tails, a, {"latent": latents[:1]})
        with tails.admit("y") as slot:
            await slot.open(c)
            with pytest.raises(BusyError, match="memory"):  # both are in use
                await ask(tails, "z", b, {"latent": latents[:1]})
        await ask_free(tails, b, latents)
        gate.open.set()
        await first
        assert set(tails.open_tails) == {a, b}
        tails.memory = 99
        with pytest.raises(BudgetError):
            await ask(tails, "x", c, {"latent": latents[:1]})
        await tails.close()

    async def ask_free(tails, wanted, latents):
        """Opens the tail without running it: the worker is held."""
        with tails.admit("w") as slot:
            await slot.open(wanted)

    asyncio.run(main())
    from shoal.runtime.bundle import Graph, create

    with create(tmp_path / "other.shoal") as writer:
        writer.add("graph", "g", b"")
        writer.graph(Graph("g", "decode", "cpu", 0, 0, 0, "g"))
        writer.commit()
    with Bundle.open(tmp_path / "other.shoal") as bundle, pytest.raises(BundleError, match="no tail"):
        Tail(bundle)


pauses, patiences = st.floats(0, 0.02), st.floats(-0.01, 0.1)
requests = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("kl"), st.integers(1, 9), pauses, patiences), max_size=25
)


@settings(max_examples=200, deadline=None)
@given(requests, st.integers(1, 8))
def test_every_request_leaves_once_in_order_and_in_time(asked, most):
    waiting, now, left = Waiting(most, 0.003), 100.0, []

    def take():
        batch, late = waiting.take(now)
        assert len({job.key for job in batch}) <= 1
        assert sum(job.rows for job in batch) <= most or len(batch) == 1
        assert all(job.deadline > now for job in batch) and all(job.deadline <= now for job in late)
        assert [job.arrived for job in batch] == sorted(job.arrived for job in batch)
        left.extend(batch + late)

    jobs = []
    for device, key, rows, pause, patience in asked:
        now += pause
        while (due := waiting.due(now)) is not None and due <= now:
            before = len(left)
            take()
            assert len(left) > before
        jobs.append(Job(device, (key,), rows, {}, now + patience, now))
        waiting.add(jobs[-1])
        assert waiting.due(now) <= now + 0.003
    while (due := waiting.due(now)) is not None:
        now = max(now, due)
        take()
    assert sorted(map(id, left)) == sorted(map(id, jobs)) and not len(waiting)


def test_who_is_alone_never_waits_and_who_is_expected_is_waited_for():
    waiting = Waiting(8, 0.003)
    waiting.add(Job("a", ("k",), 1, {}, None, 10.0))
    assert waiting.due(10.0) == 10.0
    waiting.take(10.0)
    waiting.add(Job("b", ("k",), 1, {}, None, 10.010))  # a asked 10 ms ago and may be back
    assert waiting.due(10.010) == pytest.approx(10.013)
    assert waiting.take(10.011) == ([], [])
    waiting.add(Job("a", ("k",), 1, {}, None, 10.012))  # everybody is here
    assert waiting.due(10.012) == 10.012
    assert [job.device for job in waiting.take(10.012)[0]] == ["b", "a"]
    waiting.add(Job("b", ("k",), 1, {}, None, 11.0))  # a has gone
    assert waiting.due(11.0) == 11.0
