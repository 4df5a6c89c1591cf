"""Calls between two connections: answers, bodies, pressure, errors."""

import asyncio
import hashlib
import random

import pytest
from linked import echo, pair, run, settled

from shoal.device_agents import call as calls
from shoal.device_agents.identity import Identity
from shoal.device_agents.messages import Accepted, Fetch, Fetched, Generate, Generated, Infer, Inferred, ListModels
from shoal.device_agents.protocol import Limits, Priority
from shoal.runtime import errors
from shoal.runtime.errors import LinkError, RemoteError, ShoalError


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    return [Identity.open(folder / name, name) for name in ("device", "edge")]


def test_requests_and_bodies_both_ways(people):
    async def go():
        async with pair(people) as (one, other):
            one.serve(echo)
            other.serve(echo)
            body = random.Random(1).randbytes(3 << 20)
            for connection in (one, other):
                assert await connection.ask(ListModels()) == Accepted()
                async with connection.request(Infer("t", names=("x",)), body=body) as call:
                    assert await call.reply() == Inferred(names=("x",))
                    assert hashlib.sha256(await call.read(len(body))).digest() == hashlib.sha256(body).digest()
            await settled(one, other)
            while one.rtt is None:
                await asyncio.sleep(0.01)

    run(go())


def test_a_conversation_in_pieces(people):
    async def handler(call):
        await call.answer(Generated())
        while size := await call.exactly(4):
            piece = await call.exactly(int.from_bytes(size, "little"))
            await call.write(piece[::-1])

    async def go():
        async with pair(people) as (one, other):
            other.serve(handler)
            async with one.request(Generate("m"), more=True) as call:
                await call.reply()
                for piece in (b"ab", b"x" * 70_000, b"end"):
                    await call.write(len(piece).to_bytes(4, "little") + piece)
                    assert await call.exactly(len(piece)) == piece[::-1]
                await call.end()
                assert await call.read(0) == b""
            await settled(one, other)

    run(go())


def test_a_body_that_is_cut_or_too_long_is_an_error(people):
    async def handler(call):
        await call.answer(Fetched(5), b"12345")

    async def go():
        async with pair(people) as (one, other):
            other.serve(handler)
            for take in (lambda call: call.read(4), lambda call: call.exactly(6)):
                async with one.request(Fetch("x")) as call:
                    await call.reply()
                    with pytest.raises(LinkError):
                        await take(call)
            await settled(one, other)

    run(go())


FAMILIES = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ShoalError)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_what_a_handler_raises_the_requester_gets(people, family):
    async def handler(call):
        if isinstance(call.message, Fetch):  # in the middle of the answer
            await call.answer(Fetched(9))
            await call.write(b"123")
        error = family("What.", "Why.", "Fix.")
        error.retry_ms = 30
        raise error

    async def go():
        expected = RemoteError if family is ShoalError else family
        async with pair(people) as (one, other):
            other.serve(handler)
            with pytest.raises(ShoalError) as caught:
                await one.ask(ListModels())
            error = caught.value
            assert type(error) is expected
            assert (error.what, error.why, error.fix, error.retry_ms) == ("What.", "Why.", "Fix.", 30)
            with pytest.raises(ShoalError) as caught:
                async with one.request(Fetch("x")) as call:
                    await call.reply()
                    await call.read(10)
            assert type(caught.value) is expected and "Why." in caught.value.why
            with pytest.raises(ShoalError) as caught:  # while the request is still being sent
                async with one.request(Infer("t"), more=True) as call:
                    while True:
                        await call.write(bytes(1 << 16))
            assert type(caught.value) is expected
            await settled(one, other)

    run(go())


def test_a_bug_in_a_handler_is_its_own_affair(people, caplog):
    async def handler(call):
        raise ZeroDivisionError("secret")

    async def go():
        async with pair(people) as (one, other):
            other.serve(handler)
            with pytest.raises(RemoteError) as caught:
                await one.ask(ListModels())
            assert "secret" not in str(caught.value)
            assert "secret" in caplog.text
            await settled(one, other)

    run(go())


def test_an_unknown_message_fails_alone(people):
    async def go():
        async with pair(people) as (one, other):
            other.serve(echo)
            stream = one._protocol.open(Priority.CONTROL, b"\xff\xff damaged", end=True)
            call = one._calls[stream] = calls.Call(one, stream, None, Priority.CONTROL, 5)
            call._finishing = call._finished = True
            one._wake()
            with pytest.raises(LinkError, match="type is 65535"):
                await call.reply()
            assert await one.ask(ListModels()) == Accepted()
            await settled(one, other)

    run(go())


def test_32_streams_at_once(people):
    async def go():
        async with pair(people) as (one, other):
            other.serve(echo)
            source = random.Random(2)

            async def ask(number):
                body = source.randbytes(source.randrange(200_000))
                priority = Priority(number % 3)
                async with one.request(Infer("t", names=(str(number),)), body=body, priority=priority) as call:
                    assert (await call.reply()).names == (str(number),)
                    assert await call.read(1 << 20) == body

            for _ in range(3):
                await asyncio.gather(*map(ask, range(32)))
            await settled(one, other)

    run(go())


def test_a_stuck_reader_holds_up_nobody_else(people):
    written = 0

    async def handler(call):
        nonlocal written
        if not isinstance(call.message, Fetch):
            return await echo(call)
        await call.answer(Fetched(64 << 20))
        for _ in range(1024):
            await call.write(bytes(1 << 16))
            written += 1 << 16

    async def go():
        async with pair(people) as (one, other):
            other.serve(handler)
            async with one.request(Fetch("big"), priority=Priority.CONTROL) as stuck:
                await stuck.reply()
                for _ in range(20):
                    async with one.request(Infer("t"), body=bytes(5000), priority=Priority.BULK) as call:
                        await call.reply()
                        assert len(await call.read(5000)) == 5000
                held = sum(map(len, stuck._received))
                assert 0 < held <= Limits().window and written <= held + calls._AHEAD + (1 << 16)
            await settled(one, other)

    run(go())


def test_a_body_of_single_bytes_is_not_held_as_such(people):
    async def go():
        async with pair(people) as (one, other):
            call = calls.Call(one, 1, None, Priority.BULK, 1)
            for number in range(100_000):
                call._on_data(bytes([number % 256]))
            assert len(call._received) < 30
            call._ended = True
            assert await call.exactly(3) == b"\0\1\2"

    run(go())


def test_a_handler_that_does_not_read_holds_up_its_own_writer(people):
    async def handler(call):
        if isinstance(call.message, Fetch):
            await asyncio.sleep(60)

    async def go():
        async with pair(people) as (one, other):
            other.serve(handler)
            with pytest.raises(LinkError, match="Room for the body did not come"):
                async with one.request(Fetch("x"), more=True, timeout=0.3) as call:
                    for _ in range(100):
                        await call.write(bytes(1 << 16))
            assert await one.ask(ListModels()) == Accepted()
            await settled(one, other)  # the other side's handler, too

    run(go())


def test_what_a_handler_did_not_read_is_dropped(people):
    async def handler(call):
        await call.answer(Accepted())

    async def go():
        async with pair(people) as (one, other):
            other.serve(handler)
            async with one.request(Infer("t"), body=bytes(2 << 20)) as call:
                assert await call.reply() == Accepted()
                assert await call.read(0) == b""
            await settled(one, other)

    run(go())


def test_a_body_that_a_slow_line_takes_is_progress(people):
    class Slow:
        def __init__(self, transport):
            self._transport, self.name, self.rate = transport, transport.name, transport.rate

        async def write(self, data):
            await self._transport.write(data)
            await asyncio.sleep(len(data) / 40_000)

        def __getattr__(self, name):
            return getattr(self._transport, name)

    async def handler(call):
        await call.answer(Accepted(), await call.read(1 << 20))

    async def go():
        async with pair(people) as (one, other):
            one.transport = Slow(one.transport)
            other.serve(handler)
            body = bytes(60_000)  # 1.5 s, of which no piece takes half a second
            async with one.request(Infer("t"), body=body, timeout=0.7, priority=Priority.LATENT) as call:
                assert await call.read(1 << 20) == body

    run(go())
