"""An edge among strangers, a device before strange edges, and lines that die in the handshake."""

import asyncio
import contextlib
import os
import struct
import time

import pytest
from places import Place, run, until

from shoal.device_agents import endpoint, links
from shoal.device_agents.links import Address
from shoal.device_agents.messages import Accepted, ListModels
from shoal.device_agents.pairing import Code
from shoal.runtime.errors import LinkError, ShoalError, TrustError


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


async def answering(data, hold=False):
    """A listener that answers every stranger with `data`, then waits or goes."""

    async def accept(transport):
        await transport.read()
        await transport.write(data)
        if hold:
            while await transport.read():
                pass

    return await links.listen(Address.parse("127.0.0.1:0"), accept)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"shoal\x02S\n", r"answers b.shoal.x02S"),
        (b"shoal\x02E\n" + struct.pack("<H", 3) + b"old", "version 2|old"),
        (b"shoal\x01E\n" + struct.pack("<H", 5) + b"a\x1b[2J", r"a \[2J"),
        (b"shoal\x01E\n" + struct.pack("<H", 65535) + b"x" * 600, "xxx"),
        (b"shoal\x01E\n" + struct.pack("<H", 9) + b"cut", "cut"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "another protocol"),
        (b"shoal", "cut"),
        (b"shoal\x01S\n" + b"\x15\x03\x03\x00\x02\x02\x28", "TLS|handshake"),
        (b"shoal\x01S\n" + bytes(100), "TLS"),
    ],
    ids=range(9),
)
def test_what_answers_and_is_no_edge_of_ours(place, data, says):
    async def go():
        place.know_each_other()
        listener = await answering(data)
        with pytest.raises(LinkError, match=says) as caught:
            await place.dial(listener.address)
        assert "\x1b" not in str(caught.value)
        with pytest.raises(LinkError):
            await endpoint.pair(listener.address, Code.new(), place.device, place.peers, 5)
        listener.close()
        await listener.closed()

    run(go())


@pytest.mark.parametrize("data", [b"", b"shoal", b"own", b"shoal\x01E\n"], ids=range(4))
def test_silence_ends_inside_the_deadline(place, data):
    async def go():
        place.know_each_other()
        before = asyncio.all_tasks()
        for purpose, act in (
            (b"S", lambda address: place.dial(address, 0.2)),
            (b"P", lambda address: endpoint.pair(address, Code.new(), place.device, place.peers, 0.2)),
        ):
            answer = endpoint._preamble(purpose) if data == b"own" else data
            listener = await answering(answer, hold=True)
            with pytest.raises(LinkError, match="in time"):
                await act(listener.address)
            listener.close()
            await listener.closed()
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() <= before

    run(go())


@pytest.mark.parametrize(
    "data", [b"", b"sho", b"GET / HTTP/1.1\r\n\r\n", b"shoal\x01S\n", b"shoal\x01P\n", b"shoal\x09X\n", b"\0" * 5000]
)
def test_strangers_cost_a_bounded_time_and_leave_nothing(place, data):
    async def go():
        place.know_each_other()
        async with place.listening(handshake=0.3) as (listener, address):
            place.open_window()
            transports = [await links.connect(address) for _ in range(10)]
            for transport in transports:
                await transport.write(data) if data else None
            for transport in transports:  # the edge ends it, by itself
                with contextlib.suppress(LinkError):
                    while await transport.read():
                        pass
                transport.close()
            await until(lambda: not listener._tasks)
            async with await place.dial(address) as connection:
                assert await connection.ask(ListModels()) == Accepted()

    run(go())


def test_a_slow_crowd_does_not_keep_a_device_out(place):
    """More strangers than there are places, each sending a byte now and then: the oldest gives way."""

    async def go():
        place.know_each_other()
        async with place.listening(most=8, handshake=30) as (listener, address):
            crowd = [await links.connect(address) for _ in range(40)]
            for transport in crowd:
                await transport.write(b"s")
            await until(lambda: len(listener._shaking) == 8)
            async with await place.dial(address) as connection:
                assert await connection.ask(ListModels()) == Accepted()
            assert len(listener._tasks) <= 9
            for transport in crowd:
                transport.close()

    run(go())


def test_a_full_edge_says_so(place):
    async def go():
        place.know_each_other()
        async with place.listening(most=2) as (listener, address):
            first = [await place.dial(address) for _ in range(2)]
            await until(lambda: len(listener.connections) == 2)
            with pytest.raises(LinkError, match="busy"):
                await place.dial(address)
            for connection in first:
                await connection.close()

    run(go())


def test_a_peer_that_comes_again_and_again_loses_its_oldest(place):
    async def go():
        place.know_each_other()
        async with place.listening(most_of_one=2) as (listener, address):
            opened = [await place.dial(address) for _ in range(3)]
            assert "newer" in (await opened[0].closed()).why
            assert await opened[2].ask(ListModels()) == Accepted()
            assert len(listener.connections) == 2
            for connection in opened:
                await connection.close()

    run(go())


def test_a_dial_that_is_cancelled_anywhere_leaves_nothing(place):
    async def go():
        place.know_each_other()
        async with place.listening() as (listener, address):
            started = time.perf_counter()
            await (await place.dial(address)).close()
            length = time.perf_counter() - started
            before = asyncio.all_tasks()
            for step in range(30):
                task = asyncio.create_task(place.dial(address))
                await asyncio.sleep(length * step / 20)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await (await task).close()
            await until(lambda: not listener._tasks)
            await asyncio.sleep(0.05)
            # What is left are the edge's ends of connections that were cut before they were anything.
            assert {one for one in asyncio.all_tasks() - before if "Connection" in repr(one)} == set()

    run(go())


async def cut_dial(place, address, forth, back):
    """Dials through a line that dies after `forth` bytes of ours or `back` bytes of the edge's."""
    left = {"forth": forth, "back": back}

    async def limited(source, target, way):
        try:
            while data := await source.read():
                await target.write(data[: left[way]])
                left[way] -= min(len(data), left[way])
                if not left[way]:
                    break
        except LinkError:
            pass
        finally:
            source.close()
            target.close()

    async def proxy(transport):
        other = await links.connect(address)
        await asyncio.gather(limited(transport, other, "forth"), limited(other, transport, "back"))

    listener = await links.listen(Address.parse("127.0.0.1:0"), proxy)
    try:
        connection = await place.dial(listener.address, 10)
        error = await connection.closed()
    except ShoalError as failed:
        error = failed
    finally:
        listener.close()
        await listener.closed()
    return error


def truncate(place, step):
    async def go():
        place.know_each_other()
        async with place.listening() as (listener, address):
            for cut in range(1, 860, step):
                for forth, back in ((cut, 1 << 20), (1 << 20, cut)):
                    error = await cut_dial(place, address, forth, back)
                    assert isinstance(error, (LinkError, TrustError))
            await until(lambda: not listener._tasks)

    run(go())


def test_a_line_cut_anywhere_in_the_handshake_ends_both_sides(place):
    truncate(place, 29)


@pytest.mark.deep
def test_a_line_cut_at_every_byte_of_the_handshake_ends_both_sides(place, monkeypatch):
    monkeypatch.setattr("places.LIMIT", 600)
    truncate(place, 1)


def test_an_address_that_is_taken_or_does_not_answer(place):
    async def go():
        place.know_each_other()
        async with place.listening() as (_, address):
            other = endpoint.Listener(["127.0.0.1:0", str(address)], place.edge, place.devices, place.serve)
            with pytest.raises(LinkError, match="listened"):
                await other.start()
            assert not other._tasks
        with pytest.raises(LinkError):
            await place.dial(address, 2)

    run(go())


def test_64_devices_at_once_and_no_descriptor_lost(place):
    async def go():
        place.know_each_other()
        async with place.listening(most_of_one=64) as (listener, address):
            await (await place.dial(address)).close()
            await until(lambda: not listener.connections)
            descriptors = len(os.listdir("/proc/self/fd"))

            async def device():
                async with await place.dial(address) as connection:
                    for _ in range(3):
                        assert await connection.ask(ListModels()) == Accepted()

            await asyncio.gather(*(device() for _ in range(64)))
            await until(lambda: not listener._tasks)
            await asyncio.sleep(0.05)
            assert len(os.listdir("/proc/self/fd")) <= descriptors

    run(go())
