"""A split network's client over a real pairing: its messages reach the edge's codec by the device's agent, over TCP and
over a cable; what either side may not send is refused; and the link's own rules hold."""

import asyncio
import contextlib
import json
import math
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from faults import Cable, Faults, Proxy
from paired import Pair, linked, run, until

from shoal.converters.split.tail import pack, pack_tail
from shoal.device_agents import messages
from shoal.device_agents.agent import App
from shoal.device_agents.edge import Edge
from shoal.device_agents.negotiate import Terms
from shoal.device_agents.paired_link import PairedLink
from shoal.device_agents.remote import Remote
from shoal.runtime.errors import BusyError, LinkError, UsageError
from shoal.runtime.session import open_graph
from shoal.runtime.split.client import Client
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.policy import Estimate, fixed
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import Tables

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from make_split import slimmable  # noqa: E402

LONG = 20.0  # seconds: no test waits that long, and a busy machine is still in time
FAST = Estimate(1e7, 0.001, 0.001)
BAUD = 460_800


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> SimpleNamespace:
    """A slimmable network with three modes, packed for a device and for an edge, and what each mode must answer."""
    made, folder = slimmable(), tmp_path_factory.mktemp("split")
    images = np.random.default_rng(5).random((6, 3, 32, 32), np.float32)
    modes, codecs, answers, message = [], {}, {}, {}
    with open_graph(made.head, {}, threads=1) as head, open_graph(made.tail, {}, threads=1) as tail:
        for number, (members, bits) in enumerate(((1, 2), (2, 4), (3, 8)), 1):
            latents = head.run({"image": images, "encoder": np.array(members)})["latent"]
            tables = Tables.fit(Quantiser.fit(latents, bits), latents, np.zeros(16, int))
            name, codec = f"e{members}b{bits}", Codec(tables, (16, 8, 8))
            codecs[name], message[number] = tables.to_bytes(), codec.encode(latents[:1])
            answers[number] = tail.run({"latent": codec.decode(codec.encode(latents), most=6)})["logits"]
            modes.append({"id": number, "encoder": members, "codec": name, "bits": bits, "bytes": 130 * bits,
                          "device_ms": 0.1 * members, "accuracy": 0.5 + number / 10})  # fmt: skip
    with open_graph(made.whole, {}, threads=1) as whole:
        own = whole.run({"image": images})["logits"]
    device, alone, edge = (folder / f"{name}.shoal" for name in ("device", "alone", "edge"))
    pack({"head": made.head, "local": made.whole}, device, "cats", modes=modes, codecs=codecs)
    pack({"head": made.head, "tail": made.tail}, alone, "cats", modes=modes, codecs=codecs)
    pack_tail(made.tail, edge, "cats", modes=modes, codecs=codecs)
    return SimpleNamespace(split=made, device=device, alone=alone, edge=edge, modes=modes, codecs=codecs,
                           images=images, answers=answers, message=message, own=own)  # fmt: skip


def client(network, agent, **options) -> Client:
    """One whose device has no answer of its own worth having, so that it asks the edge."""
    link = PairedLink("cats", agent.folder / "agent.sock")
    return Client(network.device, link, **{"threads": 1, "prior": FAST} | options)


def batches(pair: Pair) -> int:
    """How often the edge's tails ran."""
    return sum(tail.batches for tail in pair.edge.tails.open_tails.values())


def test_every_mode_s_message_is_answered_over_tcp(network, tmp_path):
    async def main():
        async with linked(tmp_path, network.edge, models={"cats": network.device}) as (pair, agent):

            def work():
                chosen = iter([1, 2, 3, 1])
                with client(network, agent, choose=lambda now: fixed(next(chosen))(now)) as device:
                    for number, rows in ((1, 1), (2, 1), (3, 6), (1, 2)):
                        result = device.run(network.images[:rows], deadline=LONG)
                        assert (result.where, result.mode, result.why) == ("edge", number, "")
                        np.testing.assert_allclose(result.outputs["logits"], network.answers[number][:rows], atol=1e-4)
                        took = result.seconds
                        assert 0 < took.tail and 0 < took.link and took.local == 0
                    assert device._link.modes == (3, 2, 1)
                    device._link.close()
                with client(network, agent) as device:  # by its own policy: the most accurate
                    assert device.run(network.images[:1], deadline=LONG).mode == 3
                    device._link.close()

            await asyncio.to_thread(work)
            assert batches(pair) == 5
            [said] = pair.edge.snapshot()["devices"]
            assert said["chosen"]["mode"] == 3 and said["requests"]["done"] == 5

    run(main())


def test_over_a_cable_and_when_it_is_cut(network, tmp_path):
    async def main():
        before = asyncio.all_tasks()
        async with Cable(Faults(rate=BAUD / 10), Faults(rate=BAUD / 10)) as cable:
            edge = Edge(tmp_path / "edge", [f"serial:{cable.a}?baud={BAUD}"], threads=1, announce=False)
            edge.store.add(network.edge)
            await edge.start()
            pair = Pair(tmp_path)
            pair.edge = edge
            agent = pair.agent(models={"cats": network.device})
            agent._address = type(edge.addresses[0]).parse(f"serial:{cable.b}?baud={BAUD}")
            async with agent:
                await until(lambda: agent._remote.agreement is not None)

                def work():
                    with client(network, agent, prior=Estimate(BAUD / 10, 0.02, 0.005)) as device:
                        for row in range(3):
                            result = device.run(network.images[row : row + 1], deadline=LONG)
                            assert result.where == "edge" and result.mode == 3 and result.bytes < 1100
                            answer = network.answers[3][row : row + 1]
                            np.testing.assert_allclose(result.outputs["logits"], answer, atol=1e-4)
                        cable.become(Faults(swallow=0), Faults(swallow=0))
                        result = device.run(network.images[:1], deadline=0.5)
                        assert result.where == "local" and "in time" in result.why
                        np.testing.assert_allclose(result.outputs["logits"], network.own[:1], atol=1e-4)

                await asyncio.to_thread(work)
            await edge.stop(0.0)
        assert not asyncio.all_tasks() - before

    run(main())


def test_without_an_edge_or_an_agent_the_device_answers_at_once_and_comes_back(network, tmp_path):
    async def main():
        async with linked(tmp_path, network.edge, models={"cats": network.device}) as (pair, agent):
            port = pair.port
            link = PairedLink("cats", agent.folder / "agent.sock")
            assert (await asyncio.to_thread(link.ask, 1, network.message[1], LONG)).outputs["logits"].shape == (1, 10)
            await pair.stop_edge()
            await until(lambda: agent.connection is None)
            with pytest.raises(LinkError, match="no link"):
                await asyncio.to_thread(link.ask, 1, network.message[1], LONG)
            with client(network, agent) as device:
                result = await asyncio.to_thread(device.run, network.images[:1], deadline=LONG)
                assert result.where == "local" and "no link" in result.why and result.seconds.total < LONG / 2
            await pair.start_edge(network.edge, port=port)
            await until(lambda: agent._remote.agreement is not None)
            reply = await asyncio.to_thread(link.ask, 1, network.message[1], LONG)
            np.testing.assert_allclose(reply.outputs["logits"], network.answers[1][:1], atol=1e-4)
            link.close()
            with pytest.raises(LinkError, match="closed"):
                link.ask(1, network.message[1], LONG)

    run(main())
    with pytest.raises(LinkError, match="No agent answers"):
        PairedLink("cats", tmp_path / "nothing.sock").ask(1, b"x", LONG)
    with pytest.raises(BusyError):
        PairedLink("cats", tmp_path / "nothing.sock").ask(1, b"x", 0.0)


def test_an_edge_that_swallows_everything_is_late_by_the_timeout(network, tmp_path):
    async def main():
        pair = Pair(tmp_path, models={"cats": network.device})
        await pair.start_edge(network.edge)
        async with Proxy("127.0.0.1", pair.port) as proxy, pair.agent(proxy.port) as agent:
            await until(lambda: agent._remote.agreement is not None)
            proxy.become(Faults(), Faults(swallow=0))
            link = PairedLink("cats", agent.folder / "agent.sock")
            for _ in range(3):  # a client's own policy says when to leave an edge alone
                began = time.monotonic()
                with pytest.raises(BusyError, match="in time"):
                    await asyncio.to_thread(link.ask, 1, network.message[1], 0.3)
                assert 0.25 < time.monotonic() - began < 1.0
            link.close()
        await pair.stop_edge()

    run(main())


def test_apps_that_ask_for_an_answer_get_it_by_the_agreed_mode_s_codec(network, tmp_path):
    """App.infer, too: the agent's own head and codec, in the best mode that is agreed."""

    async def main():
        async with linked(tmp_path, network.edge, models={"cats": network.alone}) as (pair, agent):
            answer = await agent.infer({"image": network.images[:1]}, deadline=LONG)
            assert answer.where == "edge"
            np.testing.assert_allclose(answer.outputs["logits"], network.answers[3][:1], atol=1e-4)
            [said] = pair.edge.snapshot()["devices"]
            assert said["chosen"]["mode"] == 3
            explicit = await agent.infer({"image": network.images[:1], "encoder": np.array(3)}, deadline=LONG)
            np.testing.assert_allclose(explicit.outputs["logits"], network.answers[3][:1], atol=1e-4)
            agent.models.open["cats"].probe()
            await pair.stop_edge()
            await until(lambda: agent.connection is None)
            answer = await agent.infer({"image": network.images[:1]}, deadline=LONG)  # its best encoder, and its tail
            assert answer.where == "local"
            np.testing.assert_allclose(answer.outputs["logits"], network.answers[3][:1], atol=0.2)

    run(main())


def test_a_tail_with_other_tables_is_never_asked(network, tmp_path):
    other = {key: Tables.from_bytes(data) for key, data in network.codecs.items()}
    moved = other["e1b2"].quantiser
    scales = Quantiser(2, moved.scales * np.float32(2), moved.offsets)
    latents = np.random.default_rng(0).standard_normal((4, 16, 8, 8)).astype(np.float32)
    codecs = network.codecs | {"e1b2": Tables.fit(scales, latents, np.zeros(16, int)).to_bytes()}
    pack_tail(network.split.tail, tmp_path / "other.shoal", "cats", modes=network.modes, codecs=codecs)

    async def main():
        async with linked(tmp_path, tmp_path / "other.shoal", models={"cats": network.device}) as (pair, agent):
            assert agent._remote.agreement.tail == "" and "belongs" in agent._remote.agreement.why
            link = PairedLink("cats", agent.folder / "agent.sock")
            with pytest.raises(BusyError, match="belongs to a model of this device"):
                await asyncio.to_thread(link.ask, 1, network.message[1], LONG)
            assert link.modes == () and not pair.edge.tails.open_tails
            # One that asks all the same is refused by the edge
            digest, connection = pair.edge.store.list()[0].digest, agent.connection
            for tables in ("", agent.models.open["cats"].model.tables):
                asked = messages.InferCoded(digest, 1, tables, len(network.message[1]))
                with pytest.raises(UsageError, match="other tables"):
                    async with connection.request(asked, body=network.message[1]) as call:
                        await call.reply()
            link.close()

    run(main())


def test_a_mode_that_is_not_agreed_is_not_sent_and_a_client_takes_another(network, tmp_path):
    async def main():
        async with linked(tmp_path, network.edge, models={"cats": network.device}) as (pair, agent):
            agreed = agent._remote.agreement
            agent._remote.agree(messages.Agreement(agreed.tail, agreed.encoder, (2, 1), 1000, 4, valid_s=60))
            with client(network, agent) as device:
                first, second = [
                    await asyncio.to_thread(device.run, network.images[:1], deadline=LONG) for _ in range(2)
                ]
                assert first.where == "local" and "Mode 3 is not agreed; 2, 1 are" in first.why
                assert (second.where, second.mode) == ("edge", 2)
            assert batches(pair) == 1

    run(main())


def hostile(network):
    """What no device of this model sends: (mode, message, what is said of it)."""
    rng, good = np.random.default_rng(3), network.message[1]
    yield 1, b"", "bytes"
    yield 1, bytes(400_000), "bytes"  # longer than a message of that many latents can be
    yield 1, rng.bytes(200), "other tables"
    yield 3, good, "other tables"  # another mode's
    yield 1, good[:-1], "does not decode"
    yield 1, good + b"\0", "does not decode"
    yield 1, good[:4] + b"\xff\xff\xff\x7f" + good[5:], "latents"  # of 268 million
    yield 1, good[:4] + b"\x09" + good[5:], "9 latents"


def test_an_edge_computes_nothing_of_a_message_that_its_codec_would_not_make(network, tmp_path):
    async def main():
        async with linked(tmp_path, network.edge, models={"cats": network.device}) as (pair, agent):
            link = PairedLink("cats", agent.folder / "agent.sock")
            for mode, message, said in hostile(network):
                with pytest.raises(LinkError, match=said):
                    await asyncio.to_thread(link.ask, mode, message, LONG)
            digest, tables = agent._remote.agreement.tail, agent.models.open["cats"].model.tables
            for asked, body in (
                (messages.InferCoded(digest, 9, tables, 10), bytes(10)),  # a mode that there is none of
                (messages.InferCoded(digest, -1, tables, 10), bytes(10)),
                (messages.InferCoded(digest, 1, tables, -5), b""),
                (messages.InferCoded(digest, 1, tables, 1 << 40), bytes(10)),
                (messages.InferCoded(digest, 1, tables, 10), bytes(100)),  # more than it said
            ):
                with pytest.raises((LinkError, UsageError)):
                    async with agent.connection.request(asked, body=body) as call:
                        await call.reply()
            assert batches(pair) == 0 and pair.edge.tails._bytes == 0
            rng, good = np.random.default_rng(7), bytearray(network.message[2])
            for _ in range(60):  # damage anywhere: refused, or another latent, and the link lives
                damaged = bytearray(good)
                for _ in range(int(rng.integers(1, 4))):
                    damaged[rng.integers(0, len(damaged))] ^= 1 << int(rng.integers(0, 8))
                with contextlib.suppress(LinkError):
                    await asyncio.to_thread(link.ask, 2, bytes(damaged), LONG)
            reply = await asyncio.to_thread(link.ask, 2, network.message[2], LONG)
            np.testing.assert_allclose(reply.outputs["logits"], network.answers[2][:1], atol=1e-4)
            link.close()

    run(main())


class Lying:
    """A connection whose edge answers as it is told."""

    def __init__(self, answer, body: bytes = b""):
        self.answer, self.body = answer, body

    def request(self, message, **options):
        return self

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        pass

    async def reply(self, timeout):
        return self.answer

    async def read(self, limit):
        if len(self.body) > limit:
            raise LinkError("too long", "w", "f")
        return self.body


@pytest.mark.parametrize("answer, body", [
    (messages.Accepted(), b""),
    (messages.Inferred(("a",), ("object",), (messages.Shape((1,)),)), b""),
    (messages.Inferred(("a",), ("float32",), (messages.Shape((1 << 30, 1 << 30)),)), b""),
    (messages.Inferred(("a",), ("float32",), (messages.Shape((-1,)),)), b""),
    (messages.Inferred(("a", "a"), ("float32",) * 2, (messages.Shape((1,)),) * 2), bytes(8)),
    (messages.Inferred(("a",), ("float32",), (messages.Shape((2,)),)), bytes(4)),
    (messages.Inferred(("a",), ("float32",), (messages.Shape((2,)),)), bytes(400)),
])  # fmt: skip
def test_a_device_believes_no_length_of_an_answer(answer, body):
    remote = Remote(lambda: None)
    remote.agree(messages.Agreement("t" * 64, "", (1,), 100, 4, valid_s=60))
    with pytest.raises(LinkError):
        asyncio.run(remote.ask(Lying(answer, body), b"message", 1.0, None, 1))


@pytest.mark.parametrize("said, found", [(math.nan, 0.0), (math.inf, 0.0), (-5e9, 0.0), (1e300, 1.0), (20.0, 0.02)])
def test_what_an_edge_says_of_its_time_is_held_to_the_wait(said, found):
    remote = Remote(lambda: None)
    remote.agree(messages.Agreement("t" * 64, "", (1,), 100, 4, valid_s=60))
    answer = messages.Inferred(("a",), ("float32",), (messages.Shape((1, 2)),), compute_ms=said)
    reply = asyncio.run(remote.ask(Lying(answer, bytes(8)), b"message", 1.0, None, 1))
    assert reply.tail_seconds == pytest.approx(found) and reply.outputs["a"].shape == (1, 2)


def test_an_agent_refuses_what_no_link_asks(network, tmp_path):
    message = {"message": np.zeros(4, np.uint8)}
    cases = [
        ({"mode": 1}, {}),
        ({"mode": "1"}, message),
        ({"mode": 1.5}, message),
        ({"mode": -1}, message),
        ({"mode": 1}, {"message": np.zeros(4, np.float32)}),
        ({"mode": 1}, {"message": np.zeros((2, 2), np.uint8)}),
        ({"mode": 1}, message | {"more": np.zeros(4, np.uint8)}),
        ({"mode": 1, "model": "dogs"}, message),
        ({"mode": 1, "model": 7}, message),
    ]

    async def main():
        async with linked(tmp_path, network.edge, models={"cats": network.device}) as (pair, agent):
            with App(agent.folder / "agent.sock") as app:

                def work(request, tensors) -> str:
                    try:
                        until = app._begin({"op": "ask", "deadline": LONG, **request}, tensors, LONG)
                        return app._frame(until)[0]["refused"]["what"]
                    except UsageError as error:
                        return error.what

                for request, tensors in cases:
                    assert await asyncio.to_thread(work, request, tensors)
            assert batches(pair) == 0

    run(main())


@pytest.mark.parametrize("said", [{}, {"modes": 3}, {"modes": [], "tail_seconds": "soon"}, {"modes": [], "error": 5},
                                  {"modes": [], "refused": 5}, {"modes": [], "tensors": [{"name": "a"}]}])  # fmt: skip
def test_a_link_refuses_what_no_agent_answers(tmp_path, said):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s"))
    server.listen()

    def answer():
        connection, _ = server.accept()
        with connection:
            connection.recv(1 << 16)
            data = json.dumps(said).encode()
            connection.sendall(struct.pack("<I", len(data)) + data)

    thread = threading.Thread(target=answer)
    thread.start()
    with PairedLink("", tmp_path / "s") as link, pytest.raises(LinkError):
        link.ask(1, b"message", LONG)
    thread.join()
    server.close()


def test_several_threads_ask_at_once(network, tmp_path):
    async def main():
        async with linked(tmp_path, network.edge, models={"cats": network.device}) as (_, agent):
            with PairedLink("", agent.folder / "agent.sock") as link:

                async def one(turn: int) -> bool:
                    mode = 1 + turn % 3
                    try:
                        reply = await asyncio.to_thread(link.ask, mode, network.message[mode], LONG)
                    except BusyError as error:  # more than were agreed to be on the way
                        assert "on their way" in error.why
                        return False
                    np.testing.assert_allclose(reply.outputs["logits"], network.answers[mode][:1], atol=1e-4)
                    return True

                found = await asyncio.gather(*(one(turn) for turn in range(24)))
                assert sum(found) >= 1 and len(link._idle) <= 8

    run(main())


def test_what_the_edge_thinks_too_slow_is_refused_with_its_reason(network, tmp_path):
    async def main():
        pair = Pair(tmp_path)
        edge = pair.edge = Edge(tmp_path / "edge", ["127.0.0.1:0"], threads=1, announce=False, terms=Terms(most=1e-6))
        edge.store.add(network.edge)
        await edge.start()
        async with pair.agent(edge.addresses[0].port, models={"cats": network.device}) as agent:
            await until(lambda: agent._remote.agreement is not None)
            with client(network, agent) as device:
                result = await asyncio.to_thread(device.run, network.images[:1], deadline=LONG)
            assert result.where == "local" and "no mode answers" in result.why
        await pair.stop_edge()

    run(main())
