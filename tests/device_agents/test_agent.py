"""The device's daemon against a real edge over real links: with it, without it, and while it goes and comes back."""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faults import Cable, Faults, Proxy
from paired import Pair, linked, run, small_network, until

import shoal
from shoal.device_agents.agent import Agent, Backoff
from shoal.device_agents.discovery import Found
from shoal.device_agents.edge import Edge
from shoal.device_agents.health import Sensors
from shoal.device_agents.links import Address
from shoal.runtime.errors import LinkError, UsageError


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return small_network(tmp_path_factory.mktemp("network"))


def test_backoff_doubles_to_its_most_and_is_never_above_it():
    waits = Backoff(chance=lambda: 1.0)
    assert [round(waits.failed(), 2) for _ in range(7)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    waits.lasted(1.0)
    assert waits.failed() == 2.0
    waits.lasted(5.0)
    assert waits.failed() == 0.1
    chance = random.Random(1)
    waits = Backoff(chance=chance.random)
    assert len({round(waits.failed(), 6) for _ in range(50)}) > 40
    waits.failures = 10**6
    assert 1.0 <= waits.failed() <= 2.0


# Answers


def test_an_app_is_answered_by_the_edge_and_by_the_device_alike(network, tmp_path):
    tail, device, _, images, logits = network

    async def main():
        async with linked(tmp_path, tail, models={"cats": device}) as (pair, agent):
            answer = await agent.infer({"image": images[:1]}, deadline=10.0)
            assert answer.where == "edge" and answer.why == ""
            np.testing.assert_allclose(answer.outputs["logits"], logits[:1], atol=1e-4)
            await pair.stop_edge()
            await until(lambda: agent.connection is None)
            answer = await agent.infer({"image": images[1:2]}, deadline=10.0)
            assert answer.where == "local" and answer.why
            np.testing.assert_allclose(answer.outputs["logits"], logits[1:2], atol=1e-4)

    run(main())


def test_a_device_without_a_local_model_says_so_when_the_edge_is_gone(network, tmp_path):
    tail, _, head, images, _ = network

    async def main():
        async with linked(tmp_path, tail, models={"cats": head}) as (pair, agent):
            assert (await agent.infer({"image": images[:1]}, 10.0)).where == "edge"
            await pair.stop_edge()
            await until(lambda: agent.connection is None)
            with pytest.raises(LinkError, match="no link"):
                await agent.infer({"image": images[:1]}, 10.0)

    run(main())


def test_an_edge_that_swallows_everything_costs_no_deadline(network, tmp_path):
    """Half open: the link looks alive and nothing comes. The device answers inside the deadline, then stops waiting."""
    tail, device, _, images, _ = network

    async def main():
        pair = Pair(tmp_path, models={"cats": device})
        await pair.start_edge(tail)
        async with Proxy("127.0.0.1", pair.port) as proxy, pair.agent(proxy.port) as agent:
            await until(lambda: agent._remote.agreement is not None)
            proxy.become(Faults(), Faults(swallow=0))
            for _ in range(3):
                began = time.monotonic()
                answer = await agent.infer({"image": images[:1]}, deadline=1.0)
                assert answer.where == "local" and time.monotonic() - began < 1.0
            assert "late" in answer.why or "in time" in answer.why
        await pair.stop_edge()

    run(main())


def test_several_models_need_a_name(network, tmp_path):
    _, device, head, images, _ = network

    async def main():
        async with Pair(tmp_path, models={"cats": device, "dogs": head}).agent() as agent:
            await until(lambda: len(agent.models.open) == 2)
            with pytest.raises(UsageError, match="cats, dogs"):
                await agent.infer({"image": images[:1]})
            assert (await agent.infer({"image": images[:1]}, 10.0, "cats")).where == "local"

    run(main())


def test_a_model_that_is_broken_is_left_out_and_the_others_work(network, tmp_path):
    _, device, _, images, _ = network
    (tmp_path / "broken.shoal").write_bytes(b"nothing")

    async def main():
        async with Pair(tmp_path, models={"cats": device, "bad": tmp_path / "broken.shoal"}).agent() as agent:
            await until(lambda: "cats" in agent.models.open)
            assert (await agent.infer({"image": images[:1]}, 10.0)).where == "local"

    run(main())


@pytest.fixture(scope="module")
def writer(tiny_folder, tmp_path_factory) -> Path:
    """A tiny language model, whole."""
    path = tmp_path_factory.mktemp("writer") / "whole.shoal"
    shoal.convert(tiny_folder, path, "fp32", check_parity=False)
    return path


def test_text_comes_from_the_edge_and_goes_on_here_when_the_link_dies_in_the_middle(writer, tmp_path):
    with shoal.load(writer, context=64) as model:
        expected = [token.id for token in model.generate("abc", max_tokens=12)]

    async def main():
        async with linked(tmp_path, models={"story": writer}, memory="64MB") as (pair, agent):
            pair.edge.store.add(writer, "story")
            pieces = [piece async for piece in agent.generate("abc", max_tokens=12)]
            assert [piece.id for piece in pieces] == expected and {piece.where for piece in pieces} == {"edge"}
            assert pieces[-1].finish and not any(piece.finish for piece in pieces[:-1])

            found = []
            async with contextlib.aclosing(agent.generate("abc", max_tokens=12)) as answer:
                async for piece in answer:
                    found.append(piece)
                    if len(found) == 4:
                        await pair.stop_edge()
            assert [piece.id for piece in found] == expected
            assert found[0].where == "edge" and found[-1].where == "local"

    run(main())


# The link


def test_the_device_is_back_within_three_seconds_of_the_edge(network, tmp_path):
    tail, device, _, images, _ = network

    async def main():
        async with linked(tmp_path, tail, models={"cats": device}) as (pair, agent):
            port = pair.port
            await pair.stop_edge()
            await until(lambda: agent.connection is None and agent._backoff.failures > 4)
            spent = time.process_time()
            await asyncio.sleep(1.0)
            assert time.process_time() - spent < 0.25  # idle
            began = time.monotonic()
            await pair.start_edge(port=port)
            await until(lambda: agent._remote.agreement is not None, 10.0)
            assert time.monotonic() - began < 3.0
            assert (await agent.infer({"image": images[:1]}, 10.0)).where == "edge"

    run(main())


def test_the_edge_is_killed_and_started_again(network, tmp_path):
    """kill -9: the link ends at once, the device goes on by itself, and is ready when the new edge is."""
    tail, device, _, images, _ = network
    environment = os.environ | {"SHOAL_HOME": str(tmp_path)}

    def start(port: int) -> tuple[subprocess.Popen, int]:
        command = [sys.executable, "-m", "shoal", "edge", "--listen", f"127.0.0.1:{port}", "--no-discovery"]
        edge = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert edge.stdout
        for line in edge.stdout:
            if line.startswith("listens at"):
                return edge, int(line.split()[2].rsplit(":", 1)[1])
        raise AssertionError("the edge did not start")

    async def main():
        made = Pair(tmp_path, models={"cats": device})
        await made.start_edge(tail)  # for its identity, and to pair
        made.agent()._installer.updater.close()
        await made.stop_edge()
        edge, port = await asyncio.to_thread(start, 0)
        try:
            async with made.agent(port) as agent:
                for _ in range(2):
                    await until(lambda: agent._remote.agreement is not None)
                    assert (await agent.infer({"image": images[:1]}, 10.0)).where == "edge"
                    edge.kill()
                    edge.wait()
                    assert (await agent.infer({"image": images[:1]}, 10.0)).where == "local"
                    edge.stdout.close()
                    edge, _ = await asyncio.to_thread(start, port)
                    began = time.monotonic()
                    await until(lambda: agent._remote.agreement is not None)
                    assert time.monotonic() - began < 3.0
        finally:
            edge.kill()
            edge.wait()
            edge.stdout.close()

    run(main())


def test_a_device_on_a_serial_cable_that_is_cut_and_mended(network, tmp_path):
    tail, device, _, images, logits = network

    async def main():
        async with Cable(Faults(rate=92_160, errors=1e-5)) as cable:
            pair = Pair(tmp_path, models={"cats": device})
            pair.edge = Edge(tmp_path / "edge", [f"serial:{cable.a}?baud=921600"], threads=1, announce=False)
            pair.edge.store.add(tail)
            await pair.edge.start()
            agent = pair.agent()
            agent._address = Address.parse(f"serial:{cable.b}?baud=921600")
            async with agent:
                await until(lambda: agent._remote.agreement is not None)
                answer = await agent.infer({"image": images[:1]}, 10.0)
                assert answer.where == "edge"
                np.testing.assert_allclose(answer.outputs["logits"], logits[:1], atol=1e-4)
                cable.break_off()
                began = time.monotonic()
                assert (await agent.infer({"image": images[:1]}, 1.0)).where == "local"
                assert time.monotonic() - began < 1.0
                cable.become(Faults(rate=92_160))
                async with asyncio.timeout(20):
                    while (await agent.infer({"image": images[:1]}, 10.0)).where != "edge":
                        await asyncio.sleep(0.1)
            await pair.stop_edge()

    run(main())


def test_a_revoked_device_keeps_answering_and_says_why_there_is_no_link(network, tmp_path):
    tail, device, _, images, _ = network

    async def main():
        async with linked(tmp_path, tail, models={"cats": device}) as (pair, agent):
            pair.edge.revoke(agent.identity.fingerprint)
            await until(lambda: agent.connection is None and agent.trouble)
            assert (await agent.infer({"image": images[:1]}, 10.0)).where == "local"
            assert agent.status()["trouble"]

    run(main())


def test_an_agent_that_was_never_paired_waits_for_a_pairing(tmp_path):
    async def main():
        async with Agent(tmp_path / "device", sensors=Sensors(tmp_path)) as agent:
            await until(lambda: "paired" in agent.trouble)

    run(main())


def test_an_edge_that_moved_is_found_by_what_it_says_of_itself(network, tmp_path, monkeypatch):
    """Its address is another one now. A stranger that claims its id costs a try; the edge itself shows its key."""
    tail, device, *_ = network

    async def main():
        pair = Pair(tmp_path, models={"cats": device})
        edge = await pair.start_edge(tail)
        stranger = Address("tcp", "127.0.0.1", 9)
        claims = [
            Found("other", (stranger,), "AAAA-BBBB", 1, False),
            Found("mine", (stranger, edge.addresses[0]), edge.identity.id[:9], 1, False),
        ]

        async def search(seconds):
            return claims

        monkeypatch.setattr("shoal.device_agents.discovery.search", search)
        async with pair.agent(port=1) as agent:
            agent._backoff.most = 0.05
            await until(lambda: agent._remote.agreement is not None)
            assert agent.peers.list()[0].address == str(edge.addresses[0])
        await pair.stop_edge()

    run(main())


def test_an_edge_that_is_revoked_here_loses_the_link(network, tmp_path):
    tail, device, *_ = network

    async def main():
        async with linked(tmp_path, tail, models={"cats": device}) as (pair, agent):
            agent.peers.revoke(agent.peers.list()[0])
            await until(lambda: agent.connection is None)
            assert "revoked" in agent.trouble or "paired" in agent.trouble

    run(main())


def test_the_edge_hears_how_the_device_is(network, tmp_path, monkeypatch):
    tail, device, *_ = network
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 1024 kB\n")
    monkeypatch.setattr("shoal.device_agents.agent.HEALTH", 0.05)

    async def main():
        async with linked(tmp_path, tail, models={"cats": device}) as (pair, agent):
            health = pair.edge.snapshot()["devices"][0]["health"]
            assert health["memory_available"] == 1 << 20 and health["temperature_c"] is None
            (tmp_path / "proc/meminfo").write_text("MemAvailable: 2048 kB\n")
            await until(lambda: pair.edge.snapshot()["devices"][0]["health"]["memory_available"] == 2 << 20)

    run(main())


def test_a_head_that_the_edge_has_is_fetched(network, tmp_path):
    tail, _, head, images, logits = network

    async def main():
        async with linked(tmp_path, tail) as (pair, agent):
            pair.edge.store.add(head, "cats")
            agent._unhappy.set()
            await until(lambda: "cats" in agent.models.open)
            await until(lambda: agent._remote.agreement.tail)
            answer = await agent.infer({"image": images[:1]}, 10.0)
            np.testing.assert_allclose(answer.outputs["logits"], logits[:1], atol=1e-4)

    run(main())
