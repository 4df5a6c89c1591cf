"""An edge answers what its codecs make and refuses the rest; a simulated link does what its trace says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.converters.split.tail import pack, pack_tail
from shoal.runtime.errors import BundleError, BusyError, LinkError, UsageError
from shoal.runtime.session import open_graph
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.link import Direct, Edge, Reply
from shoal.runtime.split.shaped import Channel, Shaped, Trace, VirtualClock, synthetic
from shoal.runtime.split.tables import Tables


@pytest.fixture(scope="module")
def edge(network):
    with Edge(network.edge, threads=1) as edge:
        yield edge


def codec(network, name) -> Codec:
    return Codec(Tables.from_bytes(network.codecs[name]), (16, 8, 8))


def test_an_edge_gives_what_the_tail_makes_of_the_levels(network, edge):
    for mode in network.modes:
        coder = codec(network, mode["codec"])
        message = coder.encode(network.latents[mode["encoder"]])
        reply = Direct(edge).ask(mode["id"], message, 1.0)
        with open_graph(network.split.tail, {}, threads=1) as tail:
            expected = tail.run({"latent": coder.decode(message, most=8)})
        for name, array in expected.items():
            np.testing.assert_allclose(reply.outputs[name], array, atol=1e-5)
        assert reply.tail_seconds > 0


def test_what_no_device_of_this_model_sends_is_refused(network, edge):
    message = codec(network, "e1b2").encode(network.latents[1])
    for mode, data in ((0, message), (99, message), (-1, message), (3, message), (1, b""), (1, message[:-1]),
                       (1, bytes(100)), (1, message + b"\0")):  # fmt: skip
        with pytest.raises(LinkError, match="latent cannot be decoded"):
            edge.answer(mode, data)
    with Edge(network.edge, threads=1, most=7) as small, pytest.raises(LinkError, match="8 latents"):
        small.answer(1, message)
    with pytest.raises(BusyError):
        Direct(edge).ask(1, message, 0.0)


def test_bundles_that_serve_no_codec_are_refused(network, tmp_path):
    with pytest.raises(BundleError, match="no graph of the role 'tail'"):
        Edge(network.device)
    pack({"local": network.split.whole}, tmp_path / "local.shoal")
    with pytest.raises(BundleError, match="role 'tail'"):
        Edge(tmp_path / "local.shoal")
    pack_tail(network.split.tail, tmp_path / "plain.shoal", modes=[{"id": 1, "bits": 32, "bytes": 4096}])
    with Edge(tmp_path / "plain.shoal") as edge, pytest.raises(LinkError, match="there are none"):
        edge.answer(1, b"")


segments = st.lists(st.tuples(st.sampled_from([0.25, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 64.0, 100.0, 1024.0])),
                    min_size=1, max_size=6).filter(lambda found: any(rate for _, rate in found))  # fmt: skip


@given(segments, st.floats(0, 20), st.integers(0, 5000))
def test_a_message_is_through_when_the_trace_has_carried_it(found, at, size):
    trace = Trace(found)
    through = trace.after(at, size)
    assert through >= at
    edges, carried, now = np.cumsum([seconds for seconds, _ in found]), 0.0, at
    while through - now > 1e-12:  # the same by walking from segment to segment
        phase = now % trace.seconds
        place = int(np.searchsorted(edges, phase + 1e-12, side="right"))
        step = min((edges[place] - phase) if place < len(edges) else trace.seconds - phase + edges[0], through - now)
        carried += step * trace.rate(now + step / 2)
        now += max(step, 1e-12)
    assert carried == pytest.approx(size, abs=1e-6 * max(size, 1) + 1e-3)


def test_channels_keep_their_order_and_pay_for_loss_and_stalls():
    channel = Channel(1000.0, delay=0.5)
    assert [channel.arrival(at, 1000) for at in (0.0, 0.0, 10.0)] == [1.5, 2.5, 11.5]
    channel.arrival(20.0, 10_000)
    channel.drop(21.0)
    assert channel.arrival(21.0, 1000) == 22.5  # what was not through is not waited for
    stalled = Trace([(10.0, 1000.0)], stalls=[(2.0, 3.0)])
    assert stalled.after(1.0, 2000) == pytest.approx(6.0) and stalled.mean == pytest.approx(700)
    assert stalled.after(8.0, 7000) == pytest.approx(18.0)
    times = [[Channel(1e6, loss=0.1, timeout=0.2, jitter=0.01, seed=seed).arrival(k, 14_000) - k for k in range(50)]
             for seed in (1, 1, 2)]  # fmt: skip
    assert times[0] == times[1] != times[2]
    lossy = Channel(1e9, loss=0.1, timeout=0.2)
    resent = np.mean([lossy.arrival(k, 14_000) - k for k in range(2000)])
    assert 0.13 < resent < 0.16  # at least one of 10 packets is lost with probability 0.65, and some twice
    for wrong in ({"loss": 1.0}, {"delay": -1.0}, {"jitter": np.nan}):
        with pytest.raises(UsageError):
            Channel(1e3, **wrong)
    for wrong in ([], [(1.0, 0.0)], [(0.0, 1.0)], [(1.0, np.nan)]):
        with pytest.raises(UsageError):
            Trace(wrong)


class Instant:
    """A link that costs nothing."""

    def ask(self, mode: int, message: bytes, timeout: float) -> Reply:
        return Reply({"y": np.zeros((1, 250), np.float32)}, 0.0)


def test_a_shaped_link_waits_on_its_clock_and_not_beyond_the_timeout():
    clock = VirtualClock(1000.0)
    link = Shaped(Instant(), Trace([(2.0, 1000.0), (1.0, 0.0)]), 10_000.0, delay=0.1, cuts=[(50.0, 60.0)], clock=clock)
    link.ask(1, bytes(500), 5.0)
    assert clock.now() == pytest.approx(1000.0 + 0.5 + 0.1 + 0.1 + 0.1)
    before = clock.now()
    with pytest.raises(BusyError, match="within 300 ms"):
        link.ask(1, bytes(5000), 0.3)
    assert clock.now() == pytest.approx(before + 0.3)
    clock.sleep(1049.9 - clock.now())
    with pytest.raises(LinkError, match="cut"):
        link.ask(1, bytes(5000), 30.0)
    assert clock.now() == pytest.approx(1050.0)
    with pytest.raises(LinkError):
        link.ask(1, b"", 1.0)
    clock.sleep(10.0)
    link.ask(1, b"", 1.0)


def test_a_real_edge_answers_through_a_simulated_link(network, edge):
    message = codec(network, "e2b8").encode(network.latents[2][:1])
    clock = VirtualClock()
    slow = Shaped(Direct(edge), 1e4, delay=0.05, clock=clock)
    reply = slow.ask(4, message, 10.0)
    np.testing.assert_array_equal(reply.outputs["logits"], edge.answer(4, message).outputs["logits"])
    assert clock.now() > 0.1 + len(message) / 1e4
    real = Shaped(Direct(edge), 1e6, delay=0.02)  # and in real time
    np.testing.assert_array_equal(real.ask(4, message, 10.0).outputs["logits"], reply.outputs["logits"])


@settings(max_examples=5)
@given(st.sampled_from(["3g", "lte", "wifi"]), st.integers(0, 99))
def test_made_up_traces_are_seeded_and_carry_something(kind, seed):
    one, same, other = synthetic(kind, 60, seed), synthetic(kind, 60, seed), synthetic(kind, 60, seed + 1)
    rates = [[trace.rate(at) for at in np.arange(0, 60, 0.25)] for trace in (one, same, other)]
    assert rates[0] == rates[1] != rates[2] and one.seconds == 60 and 3e3 < one.mean < 1e7
