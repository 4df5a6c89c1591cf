"""A device and its edge that are paired, real ones, and a small network that is cut between them: for tests.

tail, device, head, images, logits = small_network(folder)
async with linked(tmp_path, tail, models={"cats": device}) as (pair, agent): ...
"""

import asyncio
import contextlib
import sys
from pathlib import Path

import numpy as np

from shoal.converters.split.tail import pack, pack_tail
from shoal.device_agents.agent import Agent
from shoal.device_agents.edge import Edge
from shoal.device_agents.health import Sensors
from shoal.device_agents.trust import Peer
from shoal.runtime.session import open_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from make_split import build, split  # noqa: E402


def small_network(folder: Path):
    """(tail's bundle for the edge, the device's bundle of head and whole, its head alone, images, logits)."""
    made = split()
    images = np.random.default_rng(1).random((4, 3, 32, 32), np.float32)
    with open_graph(made.whole, {}, threads=1) as whole:
        logits = whole.run({"image": images})["logits"]
    pack_tail(made.tail, folder / "tail.shoal", "cats")
    pack({"head": made.head, "local": made.whole}, folder / "device.shoal", "cats")
    pack({"head": made.head}, folder / "head.shoal", "cats")
    return folder / "tail.shoal", folder / "device.shoal", folder / "head.shoal", images, logits


class Pair:
    """An edge and a device in `folder` that are paired; either may be started and stopped."""

    def __init__(self, folder: Path, **options):
        self.folder, self.options = folder, options
        self.edge: Edge | None = None
        self.port = 0

    async def start_edge(self, *bundles: Path, port: int = 0):
        self.edge = Edge(self.folder / "edge", [f"127.0.0.1:{port}"], threads=1, announce=False)
        for bundle in bundles:
            self.edge.store.add(bundle)
        await self.edge.start()
        self.port = self.edge.addresses[0].port
        return self.edge

    async def stop_edge(self):
        if self.edge is not None:
            await self.edge.stop(0.0)
        self.edge = None

    def agent(self, port: int | None = None, **options) -> Agent:
        options = {"threads": 1, "window": 0.2, "sensors": Sensors(self.folder)} | self.options | options
        agent = Agent(self.folder / "device", f"127.0.0.1:{port or self.port or 1}", **options)
        if self.edge is not None:
            own = self.edge.identity
            agent.peers.add(Peer.of(own.certificate, own.name, "edge"))
            mine = agent.identity
            self.edge.peers.add(Peer.of(mine.certificate, "device", "device"))
        return agent


@contextlib.asynccontextmanager
async def linked(folder: Path, *bundles: Path, **options):
    """(pair, agent): both run, and have agreed on something."""
    before = asyncio.all_tasks()
    pair = Pair(folder, **options)
    await pair.start_edge(*bundles)
    try:
        async with pair.agent() as agent:
            await until(lambda: agent._remote.agreement is not None)
            yield pair, agent
    finally:
        await pair.stop_edge()
        assert not asyncio.all_tasks() - before


async def until(condition, seconds: float = 20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def run(main):
    asyncio.run(main)


def broken(path: Path) -> Path:
    """A bundle that opens and computes no number: its graph divides nothing by nothing."""
    body = "zero = Sub (image, image) \n logits = Div (zero, zero)"
    graph = build("broken", "float[n, 3, 32, 32] image", "float[n, 3, 32, 32] logits", body)
    pack({"local": graph}, path)
    return path
