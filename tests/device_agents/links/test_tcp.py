"""TCP links on the real loopback, alone and through a proxy that misbehaves."""

import asyncio
import contextlib

import pytest
from faults import Faults, Proxy

from shoal.device_agents.links import Address, connect, listen
from shoal.runtime.errors import LinkError


async def echo(transport):
    while data := await transport.read():
        await transport.write(data)


def run(main):
    async def timed():
        async with asyncio.timeout(20):
            await main()

    asyncio.run(timed())


@contextlib.asynccontextmanager
async def echoing(forward=None, backward=None):
    listener = await listen(Address.parse("127.0.0.1:0"), echo)
    try:
        async with Proxy("127.0.0.1", listener.address.port, forward, backward) as proxy:
            yield Address("tcp", host=proxy.host, port=proxy.port), proxy
    finally:
        listener.close()
        await listener.closed()


async def trip(transport, data):
    writing = asyncio.create_task(transport.write(data))
    back = bytearray()
    while len(back) < len(data) and (more := await transport.read()):
        back += more
    await writing
    return bytes(back)


def test_a_link_carries_counts_and_closes():
    async def main():
        async with echoing() as (address, _):
            transport = await connect(address)
            assert await trip(transport, b"x" * 200_000) == b"x" * 200_000
            assert transport.sent == transport.received == 200_000
            assert transport.name == f"tcp {address}" and transport.rate is None
            transport.close()
            await transport.closed()
            assert await transport.read() == b""
            with pytest.raises(LinkError):
                await transport.write(b"late")

    run(main)


@pytest.mark.parametrize("host", ["", "localhost", "::1", "127.0.0.1"])
def test_every_way_to_listen(host):
    async def main():
        try:
            listener = await listen(Address("tcp", host=host, port=0), echo)
        except LinkError:
            assert host == "::1"  # a machine without IPv6
            return
        assert listener.address.port > 0
        transport = await connect(listener.address)
        assert await trip(transport, b"hello") == b"hello"
        transport.close()
        listener.close()
        await listener.closed()
        with pytest.raises(LinkError, match="cannot be reached"):
            await connect(listener.address)

    run(main)


def test_slow_late_and_stalling_networks_only_take_time():
    async def main():
        faults = Faults(rate=64_000, delay=0.05, jitter=0.05, stalls=((5000, 0.3),))
        async with echoing(faults) as (address, proxy):
            transport = await connect(address)
            data = bytes(range(256)) * 60
            assert await trip(transport, data) == data
            assert proxy.bytes == (len(data), len(data))
            transport.close()

    run(main)


def test_truncation_is_a_clean_end_at_that_byte_and_a_reset_an_error():
    async def main():
        async with echoing(None, Faults(cut=5)) as (address, proxy):
            transport = await connect(address)
            assert await trip(transport, b"0123456789") == b"01234"
            transport.close()
            proxy.become(Faults(), Faults(reset=5))
            transport = await connect(address)
            with pytest.raises(LinkError, match="broke"):
                await trip(transport, b"0123456789")
                await transport.read()
            transport.close()

    run(main)


def test_a_half_open_link_stays_silent():
    async def main():
        async with echoing(None, Faults(swallow=3)) as (address, _):
            transport = await connect(address)
            await transport.write(b"012345")
            assert await transport.read() == b"012"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await transport.read()
            transport.close()

    run(main)


def test_corruption_passes_tcp_and_is_for_those_above():
    async def main():
        async with echoing(Faults(errors=0.01, seed=4)) as (address, proxy):
            transport = await connect(address)
            data = bytes(4000)
            changed = await trip(transport, data)
            assert len(changed) == len(data) and 10 < sum(map(bool, changed)) < 100
            assert proxy.pairs[0][0].changed
            transport.close()

    run(main)


def test_a_port_that_is_taken_and_one_where_nobody_is():
    async def main():
        listener = await listen(Address.parse("127.0.0.1:0"), echo)
        with pytest.raises(LinkError, match="listened"):
            await listen(listener.address, echo)
        listener.close()
        await listener.closed()
        with pytest.raises(LinkError):
            await connect(listener.address)
        with pytest.raises(LinkError):
            await connect(Address.parse("no-such-host.invalid"), timeout=5)

    run(main)


def test_a_peer_that_never_reads_holds_the_writer():
    async def main():
        async def sleep(transport):
            await asyncio.sleep(60)

        listener = await listen(Address.parse("127.0.0.1:0"), sleep)
        transport = await connect(listener.address)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                while True:
                    await transport.write(bytes(65_536))
        transport.abort()
        listener.close()

    run(main)


def test_a_bug_in_accept_is_told_and_ends_that_link_only():
    async def main():
        told = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

        async def accept(transport):
            if await transport.read() == b"bug":
                raise ZeroDivisionError
            raise LinkError("what", "why", "fix")

        listener = await listen(Address.parse("127.0.0.1:0"), accept)
        for word in (b"bug", b"error"):
            transport = await connect(listener.address)
            await transport.write(word)
            assert await transport.read() == b""
            transport.close()
        assert [type(each) for each in told] == [ZeroDivisionError]
        listener.close()

    run(main)


def test_a_reset_of_everything_breaks_both_ends():
    async def main():
        async with echoing() as (address, proxy):
            transport = await connect(address)
            assert await trip(transport, b"up") == b"up"
            proxy.reset_all()
            with pytest.raises(LinkError, match="broke"):
                await transport.read()
            transport.close()

    run(main)
