"""Two connections over a real loopback socket with real TLS, for tests: `async with pair(people) as (one, other)`."""

import asyncio
import contextlib
import gc

from shoal.device_agents import links
from shoal.device_agents.connection import Connection
from shoal.device_agents.endpoint import _shake
from shoal.device_agents.links import Address
from shoal.device_agents.messages import Fetch, Fetched, Generated, Infer, Inferred
from shoal.device_agents.secure import Secure

LIMIT = 20.0  # seconds in which any of these must be over, on the slowest machine


class Gated:
    """A transport whose line can be stopped, and which counts what it took."""

    def __init__(self, transport):
        self._transport, self.name, self.rate = transport, transport.name, transport.rate
        self.open = asyncio.Event()
        self.open.set()

    async def read(self):
        data = await self._transport.read()
        await self.open.wait()
        return data

    async def write(self, data):
        await self.open.wait()
        await self._transport.write(data)

    def close(self):
        self.open.set()
        self._transport.close()

    async def closed(self):
        await self._transport.closed()

    def abort(self):
        self.open.set()
        self._transport.abort()


@contextlib.asynccontextmanager
async def pair(people, limits=None, handlers=64):
    """(the device's connection, the edge's). Afterwards no task of theirs is left."""
    device, edge = people
    before = asyncio.all_tasks()
    arrived = asyncio.get_running_loop().create_future()

    async def accept(transport):
        arrived.set_result(transport)
        await asyncio.shield(ended)

    ended = asyncio.get_running_loop().create_future()
    listener = await links.listen(Address.parse("127.0.0.1:0"), accept)
    ours = Gated(await links.connect(listener.address))
    theirs = Gated(await arrived)
    client = Secure(device, lambda: [edge.certificate], False)
    server = Secure(edge, lambda: [device.certificate], True)
    _, early = await asyncio.gather(_shake(ours, client, b""), _shake(theirs, server, b""))
    one = Connection(ours, client, True, limits=limits)
    other = Connection(theirs, server, False, limits=limits, early=early, handlers=handlers)
    try:
        yield one, other
    finally:
        await asyncio.gather(one.close(), other.close())
        ended.set_result(None)
        listener.close()
        await listener.closed()
        await asyncio.sleep(0.01)
        assert not asyncio.all_tasks() - before


def run(coroutine):
    async def limited():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        async with asyncio.timeout(LIMIT):
            await coroutine
        gc.collect()  # a task that failed unseen says so when it goes

    problems = []
    asyncio.run(limited())
    assert not problems


async def settled(*connections):
    """Returns when no call, task or stream is left on any of them."""
    while any(one._calls or one._tasks or one._protocol._streams for one in connections):
        await asyncio.sleep(0.005)


async def echo(call):
    if isinstance(call.message, Infer):
        await call.answer(Inferred(names=call.message.names), await call.read(8 << 20))
    elif isinstance(call.message, Fetch):
        await call.answer(Fetched(length=4 << 20))
        for _ in range(4):
            await call.write(bytes(1 << 20))


async def stuck(call):
    """Stops where the message says."""
    where = call.message.session
    if where == "read":
        await call.read(1 << 30)
    elif where == "answered":
        await call.answer(Generated())
        await asyncio.sleep(60)
    elif where == "written":
        await call.answer(Generated())
        while True:
            await call.write(bytes(1 << 16))
    else:
        await asyncio.sleep(60)
