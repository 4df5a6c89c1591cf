"""Releases on their way to a device: over links that break, tried, watched, rolled back where they do not work."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faults import Faults, Proxy
from paired import Pair, broken, run, small_network, until

from shoal.device_agents import manifest
from shoal.device_agents.agent import Agent
from shoal.device_agents.edge import Edge
from shoal.device_agents.home import private_folder, write_atomically
from shoal.device_agents.update import Updater, boot_id, read_status
from shoal.device_agents.vendor import Vendor
from shoal.runtime.bundle import create
from shoal.runtime.errors import BusyError


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return small_network(tmp_path_factory.mktemp("network"))


@pytest.fixture
def vendor(tmp_path) -> Vendor:
    return Vendor.create(tmp_path / "vendor", time.time())


def publish(vendor: Vendor, edge: Edge):
    for name, target in vendor.models.items():
        edge.store.add(vendor.path(target), name)
    write_atomically(edge.folder / "manifest.json", vendor.encoded())


def trust(folder: Path, vendor: Vendor):
    """As `shoal update trust`, on the device in `folder`."""
    with Updater(private_folder(folder / "device") / "updates", boot_id()) as updater:
        updater.pin(manifest.encode_root(vendor.roots[0]))


def test_a_release_reaches_the_device_and_a_bad_one_is_rolled_back(network, tmp_path, vendor):
    tail, device, _, images, logits = network

    async def main():
        pair = Pair(tmp_path)
        edge = await pair.start_edge(tail)
        vendor.sign({"cats": device}, now=time.time())
        publish(vendor, edge)
        trust(tmp_path, vendor)
        async with pair.agent() as agent:
            await until(lambda: "cats" in agent.models.open and agent._installer.updater.state.active)
            answer = await agent.infer({"image": images[:1]}, 10.0)
            np.testing.assert_allclose(answer.outputs["logits"], logits[:1], atol=1e-4)

            good = agent._installer.updater.state.active
            vendor.sign({"cats": broken(tmp_path / "broken.shoal")}, now=time.time())
            publish(vendor, edge)  # the edge offers it by itself
            await until(lambda: agent._installer.updater.state.refused)
            assert agent._installer.updater.state.active == good and "finite" in agent.status()["updates"]["refused"][0]
            assert np.isfinite((await agent.infer({"image": images[:1]}, 10.0)).outputs["logits"]).all()
        await pair.stop_edge()
        assert read_status(tmp_path / "device/updates")["trial"] is None

    run(main())


def test_a_transfer_that_is_cut_goes_on_where_it_was(network, tmp_path, vendor):
    """The link breaks at every fetch after some tens of kilobytes; what came is kept, and the release arrives."""
    tail, *_ = network
    big = tmp_path / "big.shoal"
    with create(big) as writer:
        writer.add("weights", "weights", np.random.default_rng(0).bytes(3 << 20))
        writer.commit()

    async def main():
        pair = Pair(tmp_path)
        edge = await pair.start_edge(tail)
        vendor.sign({"big": big}, now=time.time())
        publish(vendor, edge)
        trust(tmp_path, vendor)
        async with (
            Proxy("127.0.0.1", pair.port, backward=Faults(reset=1 << 20)) as proxy,
            pair.agent(proxy.port) as agent,
        ):
            have = []
            await until(lambda: _note(have, agent) or agent._installer.updater.state.active, 40.0)
        await pair.stop_edge()
        assert len(have) > 2

    run(main())


def _note(have: list[int], agent: Agent) -> bool:
    updater = agent._installer.updater
    for target in updater.wanted():
        if (staged := updater.staged(target)) not in have:
            assert not have or staged > have[-1]
            have.append(staged)
    return False


def test_without_the_right_an_edge_brings_nothing(network, tmp_path, vendor):
    tail, device, *_ = network

    async def main():
        pair = Pair(tmp_path)
        edge = await pair.start_edge(tail)
        vendor.sign({"cats": device}, now=time.time())
        publish(vendor, edge)
        trust(tmp_path, vendor)
        agent = pair.agent()
        agent.peers.allow(agent.peers.list()[0], {"infer"})
        async with agent:
            await until(lambda: agent._remote.agreement is not None)
            await asyncio.sleep(0.2)
            assert agent._installer.updater.targets == {}
        await pair.stop_edge()

    run(main())


def test_stopping_the_agent_is_no_strike_against_a_trial(network, tmp_path, vendor):
    _, device, *_ = network
    vendor.sign({"cats": device}, now=time.time())
    vendor.publish(tmp_path / "stick")

    async def main():
        trust(tmp_path, vendor)
        for turn in range(4):
            async with Pair(tmp_path, window=60.0).agent() as agent:
                await until(lambda: not turn or "cats" in agent.models.open)  # noqa: B023
                said = await agent.update(tmp_path / "stick")
                assert said == "a release is on trial" and agent._installer.updater.state.trial.strikes == 0
        async with Pair(tmp_path, window=0.1).agent() as agent:
            await until(lambda: agent._installer.updater.state.active)

    run(main())


def test_two_agents_do_not_share_a_folder(tmp_path):
    async def main():
        async with Pair(tmp_path).agent():
            with pytest.raises(BusyError):
                Pair(tmp_path).agent()

    run(main())


def test_an_agent_killed_in_a_trial_comes_back_to_it_once(network, tmp_path, vendor):
    """kill -9 of the daemon, twice inside one window of health: the release is given up, the device works."""
    _, device, *_ = network
    home = tmp_path / "home"
    environment = os.environ | {"SHOAL_HOME": str(home)}

    def shoal(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "shoal", *words], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = str(tmp_path / "signer")
    shoal("update", "keygen", folder)
    shoal("update", "sign", folder, f"cats={device}")
    shoal("update", "publish", folder, "--to", str(tmp_path / "stick"))
    shoal("update", "trust", f"{tmp_path}/stick/root.json")
    assert "on trial" in shoal("update", "apply", str(tmp_path / "stick"))
    for _ in range(3):  # the first start is expected
        agent = subprocess.Popen(
            [sys.executable, "-m", "shoal", "agent", "127.0.0.1:1"], env=environment, stdout=subprocess.PIPE
        )
        assert agent.stdout and b"ready" in agent.stdout.readline()
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        agent.stdout.close()
    assert "refused" in shoal("update", "status")
    assert "on trial" in shoal("update", "status")
