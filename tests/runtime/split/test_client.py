"""A client with real threads: the edge's answer where it comes in time, the device's own by the deadline where not."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shoal.converters.split.tail import pack
from shoal.runtime.errors import BackendError, BundleError, BusyError, LinkError, UsageError
from shoal.runtime.session import open_graph
from shoal.runtime.split.client import Client
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.link import Direct, Edge, Reply
from shoal.runtime.split.policy import LOCAL, Decision, Estimate, Terms, fixed
from shoal.runtime.split.shaped import Channel, Shaped, Trace
from shoal.runtime.split.tables import Tables

LONG = 20.0  # seconds: no test waits that long, and a busy machine is still in time
FAST = Estimate(1e7, 0.001, 0.001)


@pytest.fixture(scope="module")
def edge(network):
    with Edge(network.edge, threads=1) as edge:
        yield edge


def client(network, link, **options) -> Client:
    return Client(network.device, link, **{"threads": 1, "prior": FAST} | options)


class Scripted:
    """A link that does what it is told: an error to raise, a thing to wait for, a reply to give."""

    def __init__(self, *acts):
        self.acts, self.asked, self.stopped = list(acts), [], threading.Event()

    def ask(self, mode: int, message: bytes, timeout: float) -> Reply:
        self.asked.append((mode, message, timeout))
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        if isinstance(act, Exception):
            raise act
        if act == "silence":
            if self.stopped.wait(timeout):
                raise LinkError("gone", "the test is over", "none")
            raise BusyError("late", "nothing came", "none")
        if act == "hang":  # a link that forgets its timeout
            self.stopped.wait(LONG)
            raise LinkError("gone", "the test is over", "none")
        return act


@pytest.fixture(scope="module")
def expected(network):
    """expected(mode, images): what must come of it, head, the message there and back, tail, each by itself."""
    with open_graph(network.split.head, {}, threads=1) as head, open_graph(network.split.tail, {}, threads=1) as tail:

        def expected(mode: int, images: np.ndarray) -> dict[str, np.ndarray]:
            said = network.modes[mode - 1]
            codec = Codec(Tables.from_bytes(network.codecs[said["codec"]]), (16, 8, 8))
            latent = head.run({"image": images, "encoder": np.array(said["encoder"])})["latent"]
            return tail.run({"latent": codec.decode(codec.encode(latent), most=64)})

        yield expected


def test_every_mode_gives_its_own_answer_in_any_order_and_batch(network, edge, expected):
    turns = [(number, rows) for rows in (1, 3, 8) for number in (1, 6, 2, 5, 3, 4, 1)]
    chosen = iter([number for number, _ in turns])
    with client(network, Direct(edge), choose=lambda now: fixed(next(chosen))(now)) as device:
        heads = device._head
        for number, rows in turns:
            result = device.run(network.images[:rows], deadline=LONG)
            assert (result.where, result.mode, result.why) == ("edge", number, "")
            for name, array in expected(number, network.images[:rows]).items():
                np.testing.assert_allclose(result.outputs[name], array, atol=1e-4)
            took = result.seconds
            assert took.local == 0 and min(took.head, took.encode, took.tail, took.link) > 0
            assert took.head + took.encode + took.link + took.tail <= took.total
        assert device._head is heads and len(device._slots) == 3  # opened once; buffers for each batch, for all modes
        one = device.run(network.images[0], deadline=LONG) if (chosen := iter([1])) else None
        assert one.outputs["logits"].shape == (1, 10) and 0 < one.bytes < 300


def test_the_policy_takes_the_most_accurate_mode_and_the_local_answer_where_none_is_in_time(network, edge):
    with client(network, Direct(edge)) as device:
        assert device.run(network.images[:1], deadline=LONG).mode == 6
    slow = Shaped(Direct(edge), 1e4, delay=0.3)
    with client(network, slow, prior=Estimate(500.0, 0.6, 0.001)) as device:
        result = device.run(network.images, deadline=0.5)
    assert (result.where, result.mode, result.bytes) == ("local", 0, 0) and "No mode is expected" in result.why
    np.testing.assert_array_equal(result.outputs["logits"], network.whole["logits"])
    assert result.seconds.total < 0.5 and result.seconds.local > 0


@pytest.mark.parametrize("act", [LinkError("It broke.", "w", "f"), BusyError("It is full.", "w", "f"),
                                 RuntimeError("a bug"), Reply({}, 0.0), Reply({"logits": np.zeros((7, 10))}, 0.0)],
                         ids=["gone", "busy", "bug", "nothing", "others"])  # fmt: skip
def test_a_link_that_fails_is_replaced_at_once(network, act):
    with client(network, Scripted(act)) as device:
        result = device.run(network.images, deadline=LONG)
        assert device.knowledge.silent == 1
    assert result.where == "local" and result.mode == 6 and result.bytes > 0 and result.why
    np.testing.assert_array_equal(result.outputs["logits"], network.whole["logits"])
    assert result.seconds.total < LONG / 2


@pytest.mark.parametrize("act", ["silence", "hang"])
def test_silence_costs_no_deadline(network, act):
    link = Scripted(act)
    with client(network, link, terms=Terms(guard=0.1)) as device:
        result = device.run(network.images, deadline=0.6)
        assert result.where == "local" and result.mode == 6 and "did not answer in time" in result.why
        assert 0.4 < result.seconds.total < 0.6  # it waited for the edge as long as it could
        np.testing.assert_array_equal(result.outputs["logits"], network.whole["logits"])
        link.stopped.set()
    assert not [thread for thread in threading.enumerate() if thread.name == "shoal-split"]


def test_a_link_that_hangs_is_left_alone_once_its_places_are_taken(network):
    link = Scripted("hang")
    with client(network, link, inflight=2, choose=fixed(1)) as device:
        for _ in range(4):
            assert device.run(network.images, deadline=0.2).where == "local"
        assert len(link.asked) == 2 and "2 messages" in device.run(network.images, deadline=0.2).why
        link.stopped.set()


def test_a_link_that_dies_between_two_answers_and_comes_back(network, edge):
    link = Shaped(Direct(edge), 1e7)
    with client(network, link, terms=Terms(probe=0.05)) as device:
        assert device.run(network.images, deadline=LONG).where == "edge"
        link.cuts.append((0.0, math.inf))
        first, second = (device.run(network.images, deadline=LONG) for _ in range(2))
        assert (first.where, first.mode, second.where, second.mode) == ("local", 6, "local", 0)
        assert "no link" in second.why and first.seconds.total < LONG / 2
        link.cuts.clear()
        deadline = time.monotonic() + LONG
        while (result := device.run(network.images, deadline=LONG)).where == "local":  # a probe finds it
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert result.mode == 6


def test_without_an_answer_of_its_own_the_error_comes_by_the_deadline(network, edge, tmp_path):
    path = tmp_path / "head.shoal"
    pack({"head": network.split.head}, path, "cats", modes=network.modes, codecs=network.codecs)
    link = Scripted("silence", LinkError("It broke.", "w", "f"), "hang")
    with Client(path, link, threads=1, prior=FAST) as device:
        with pytest.raises(BusyError, match="did not answer in time|late"):
            device.run(network.images, deadline=0.1)
        with pytest.raises(LinkError, match="It broke"):
            device.run(network.images, deadline=LONG)
        with pytest.raises(BusyError):
            device.run(network.images, deadline=0.1)
        link.stopped.set()
    with Client(path, Direct(edge), threads=1, prior=FAST) as device:
        assert device.run(network.images, deadline=LONG).where == "edge"


def test_head_and_tail_answer_where_there_is_no_local_graph(network, tmp_path):
    pack({"head": network.split.head, "tail": network.split.tail}, tmp_path / "d.shoal", modes=network.modes,
         codecs=network.codecs)  # fmt: skip
    with Client(tmp_path / "d.shoal", Scripted(LinkError("It broke.", "w", "f")), threads=1, prior=FAST) as device:
        result = device.run(network.images, deadline=LONG)
    with open_graph(network.split.tail, {}, threads=1) as tail:
        expected = tail.run({"latent": network.latents[3]})["logits"]
    assert result.where == "local"
    np.testing.assert_allclose(result.outputs["logits"], expected, atol=1e-5)


def test_several_threads_get_their_own_answers(network, edge, expected):
    link = Shaped(Direct(edge), Channel(1e6, delay=0.001, jitter=0.002), Channel(1e6, delay=0.001, jitter=0.002))

    def ask(turn: int):
        rows = slice(turn % 6, turn % 6 + 1 + turn % 2)
        return rows, device.run(network.images[rows], deadline=LONG)

    with client(network, link, inflight=8) as device, ThreadPoolExecutor(6) as pool:
        for rows, result in pool.map(ask, range(60)):
            assert result.where == "edge"
            for name, array in expected(result.mode, network.images[rows]).items():
                np.testing.assert_allclose(result.outputs[name], array, atol=1e-4)
    assert not [thread for thread in threading.enumerate() if thread.name == "shoal-split"]


def test_over_a_link_that_stalls_every_answer_comes_and_the_mode_follows(network, edge, expected):
    trace = Trace([(0.3, 2e6), (0.3, 6e3), (0.2, 0.0)])
    with client(network, Shaped(Direct(edge), trace, delay=0.002), terms=Terms(guard=0.02, probe=0.1)) as device:
        results = [device.run(network.images[:1], deadline=0.12) for _ in range(60)]
    assert {result.where for result in results} == {"edge", "local"}
    for result in results:
        if result.where == "local":
            np.testing.assert_allclose(result.outputs["logits"], network.whole["logits"][:1], atol=1e-5)
        else:
            answer = expected(result.mode, network.images[:1])
            np.testing.assert_allclose(result.outputs["logits"], answer["logits"], atol=1e-4)


def test_what_cannot_be_run_is_refused(network, edge, tmp_path):
    with client(network, Direct(edge)) as device:
        for images, deadline in ((network.images, 0.0), (network.images, math.inf), (network.images[:0], 1.0),
                                 (network.images.astype(np.float64), 1.0), (network.images[:, :2], 1.0),
                                 ({"picture": network.images}, 1.0), ({}, 1.0), (None, 1.0)):  # fmt: skip
            with pytest.raises(UsageError):
                device.run(images, deadline=deadline)
        assert device.run({"image": network.images}, deadline=LONG).where == "edge"
    with pytest.raises(BackendError, match="closed"):
        device.run(network.images)
    device.close()
    with pytest.raises(BundleError, match="role 'head'"):
        Client(network.edge, Direct(edge))
    pack({"head": network.split.head}, tmp_path / "plain.shoal", modes=[{"id": 1, "encoder": 1}])
    with pytest.raises(BundleError, match="names a codec"):
        Client(tmp_path / "plain.shoal", Direct(edge))


def test_a_policy_may_be_given_and_sees_this_device_s_own_times(network, edge):
    seen = []

    def choose(now):
        seen.append(now)
        return Decision(now.local, 0.0, "the test says so")

    with client(network, Direct(edge), choose=choose) as device:
        assert device.run(network.images, deadline=0.5).why == "the test says so"
    [now] = seen
    assert now.images == 8 and now.deadline == 0.5 and now.local.id == LOCAL and now.local.accuracy == 0.52
    assert all(mode.device_ms != said["device_ms"] for mode, said in zip(now.modes, network.modes, strict=True))
