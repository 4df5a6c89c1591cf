"""A device, an edge and a stranger on real loopback, for tests."""

import asyncio
import contextlib
import gc

from shoal.device_agents import endpoint
from shoal.device_agents.identity import Identity
from shoal.device_agents.messages import Accepted
from shoal.device_agents.pairing import Code, Window
from shoal.device_agents.trust import Peer, Peers

LIMIT = 30.0  # seconds in which any of these must be over, on the slowest machine


class Place:
    """A device, a stranger and an edge, each with its own folder; the edge listens."""

    def __init__(self, folder):
        self.device, self.edge, self.stranger = (
            Identity.open(folder / name, name) for name in ("device", "edge", "stranger")
        )
        self.peers, self.stranger_peers, self.devices = (
            Peers.open(folder / f"{name}-peers") for name in ("device", "stranger", "edge")
        )
        self.window = None
        self.paired, self.arrived = [], []

    def know_each_other(self):
        self.peers.add(Peer.of(self.edge.certificate, "edge", "edge"))
        self.devices.add(Peer.of(self.device.certificate, "device", "device"))

    def open_window(self, **options):
        self.window = Window(Code.new(), asyncio.get_running_loop().time(), **options)
        return self.window.code

    async def serve(self, connection):
        async def handler(call):
            await call.read(1 << 20)
            await call.answer(Accepted())

        self.arrived.append(connection)
        connection.serve(handler)

    @contextlib.asynccontextmanager
    async def listening(self, **options):
        before = asyncio.all_tasks()
        listener = endpoint.Listener(
            ["127.0.0.1:0"], self.edge, self.devices, self.serve, lambda: self.window, self.paired.append, **options
        )
        async with listener:
            yield listener, listener.addresses[0]
        await asyncio.sleep(0.01)
        assert not asyncio.all_tasks() - before
        assert not listener.connections and not listener._shaking

    def dial(self, address, timeout=10.0, **options):
        return endpoint.dial(address, self.device, self.peers, timeout, **options)


def run(coroutine):
    async def limited():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        async with asyncio.timeout(LIMIT):
            await coroutine
        gc.collect()  # a task that failed unseen says so when it goes

    problems = []
    asyncio.run(limited())
    assert not problems


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)
