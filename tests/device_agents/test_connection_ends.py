"""Every way in which a call or a connection ends, and that nothing is left of it."""

import asyncio
import gc

import pytest
from linked import echo, pair, run, settled, stuck

from shoal.device_agents import call as calls
from shoal.device_agents.connection import Connection
from shoal.device_agents.identity import Identity
from shoal.device_agents.messages import Accepted, Fetch, Fetched, Generate, Infer, ListModels
from shoal.device_agents.protocol import Limits, Priority
from shoal.runtime.errors import BusyError, LinkError


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    return [Identity.open(folder / name, name) for name in ("device", "edge")]


def test_an_answer_that_does_not_come(people):
    cancelled = []

    async def handler(call):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(call)
            raise

    async def go():
        async with pair(people) as (one, other):
            other.serve(handler)
            with pytest.raises(LinkError, match="answer did not come"):
                await one.ask(ListModels(), timeout=0.1)
            await settled(one, other)
            assert len(cancelled) == 1

    run(go())


@pytest.mark.parametrize("where", ["silent", "read", "answered", "written"])
@pytest.mark.parametrize("side", ["requester", "handler", "close", "abort"])
def test_cancellation_in_every_state_leaves_nothing(people, where, side):
    async def request(one):
        async with one.request(Generate("m", where), more=where in ("silent", "read"), timeout=60) as call:
            if where == "silent":
                while True:
                    await call.write(bytes(1 << 16))
            await call.reply()
            if where == "answered":
                await call.read(1)
            await asyncio.sleep(60)  # does not read what is written

    async def go():
        async with pair(people) as (one, other):
            other.serve(stuck)
            task = asyncio.create_task(request(one))
            while not other._tasks:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            if side == "requester":
                task.cancel()
            elif side == "handler":
                for handler in other._tasks.values():
                    handler.cancel()
                if where == "written":
                    task.cancel()  # it waits for nothing, so it hears nothing
            elif side == "close":
                await other.close("Enough.")
                task.cancel()
            else:
                other.transport.abort()
                if where == "written":
                    task.cancel()
            with pytest.raises((LinkError, asyncio.CancelledError)):
                await task
            if side in ("requester", "handler"):
                await settled(one, other)
                other.serve(echo)
                assert await one.ask(ListModels()) == Accepted()
            else:
                await asyncio.gather(one.closed(), other.closed())
                assert not (one._calls or one._tasks or other._calls or other._tasks)

    run(go())


def test_too_many_handlers_are_busy(people):
    async def go():
        async with pair(people, handlers=2) as (one, other):
            let = asyncio.Event()

            async def handler(call):
                await let.wait()

            other.serve(handler)
            tasks = [asyncio.create_task(one.ask(ListModels())) for _ in range(2)]
            while len(other._tasks) < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(BusyError):
                await one.ask(ListModels())
            let.set()
            assert await asyncio.gather(*tasks) == [Accepted()] * 2

    run(go())


def test_a_call_that_is_opened_and_dropped_at_once_harms_nobody(people):
    """Both frames come in one read, and the edge would refuse the call: it is gone by then."""

    async def go():
        async with pair(people, handlers=1) as (one, other):
            other.serve(stuck)
            held = one.request(Generate("m", "silent"))
            while not other._tasks:
                await asyncio.sleep(0.01)
            chunks = b""
            for _ in range(5):
                call = one.request(ListModels())
                chunks += one._protocol.next_chunk(0)
                call.cancel()
                chunks += one._protocol.next_chunk(0)
            one._secure.send(chunks)
            one._wake()
            with pytest.raises(BusyError):
                await one.ask(ListModels())
            held.cancel()
            await settled(one, other)
            other.serve(echo)
            assert await one.ask(ListModels()) == Accepted()

    run(go())


def test_a_late_latent_with_a_body_to_come_is_dropped_alone(people):
    async def go():
        async with pair(people) as (one, other):
            other.serve(echo)
            one.transport.open.clear()
            late = [one.request(Infer("t"), body=bytes(1 << 20), deadline=0.1, timeout=5) for _ in range(4)]
            await asyncio.sleep(0.2)
            one.transport.open.set()
            for call in late:
                with pytest.raises(LinkError, match="dropped"):
                    await call.reply()
            assert await one.ask(ListModels()) == Accepted()
            await settled(one, other)

    run(go())


def test_a_handler_may_close_its_connection(people):
    async def go():
        async with pair(people) as (one, other):

            async def handler(call):
                await other.close("Enough of it.")

            other.serve(handler)
            with pytest.raises(LinkError, match="Enough"):
                await one.ask(ListModels())
            await other.closed()

    run(go())


def test_what_comes_before_serve_waits_for_it(people):
    async def go():
        async with pair(people) as (one, other):
            asked = asyncio.create_task(one.ask(ListModels()))
            gone = asyncio.create_task(one.ask(ListModels(), timeout=0.05))
            with pytest.raises(LinkError):
                await gone
            while len(other._waiting) != 1:
                await asyncio.sleep(0.01)
            other.serve(echo)
            assert await asked == Accepted()

    run(go())


def test_a_latent_too_late_is_dropped(people):
    async def go():
        async with pair(people) as (one, other):
            seen = []

            async def handler(call):
                seen.append(call.message.tail)

            other.serve(handler)
            one.transport.open.clear()
            big = one.request(Infer("big"), body=bytes(1 << 16), priority=Priority.LATENT)  # takes the line's place
            await asyncio.sleep(0.05)
            with pytest.raises(LinkError, match="dropped"):
                late = one.request(Infer("late"), body=bytes(99), priority=Priority.LATENT, deadline=0.05)
                asyncio.get_running_loop().call_later(0.1, one.transport.open.set)
                await late.reply(5)
            assert await big.reply(5) == Accepted()
            assert await one.ask(Infer("next")) == Accepted()
            assert seen == ["big", "next"]
            await settled(one, other)

    run(go())


def test_drain_lets_calls_end(people):
    async def go():
        async with pair(people) as (one, other):
            let = asyncio.Event()

            async def handler(call):
                await let.wait()
                await call.answer(Fetched(1 << 20), bytes(1 << 20))

            other.serve(handler)
            call = one.request(Fetch("x"))
            while not other._tasks:
                await asyncio.sleep(0.01)
            draining = asyncio.create_task(other.drain(10, "It moves house."))
            while not one.going_away:
                await asyncio.sleep(0.01)
            with pytest.raises(BusyError, match="moves house"):
                one.request(ListModels())
            let.set()
            await call.reply()
            assert len(await call.read(1 << 20)) == 1 << 20
            await draining
            assert "moves house" in (await one.closed()).why

    run(go())


def test_drain_does_not_wait_for_ever(people):
    async def go():
        async with pair(people) as (one, other):
            other.serve(stuck)
            call = one.request(Generate("m", "silent"))
            while not other._tasks:
                await asyncio.sleep(0.01)
            await other.drain(0.1)
            with pytest.raises(LinkError):
                await call.reply()

    run(go())


def test_a_link_that_breaks_ends_everything_at_once(people):
    async def go():
        async with pair(people) as (one, other):
            ends = []
            one.on_closed = other.on_closed = ends.append
            other.serve(stuck)
            waiting = [asyncio.create_task(one.request(Generate("m", "silent")).reply()) for _ in range(5)]
            while len(other._tasks) < 5:
                await asyncio.sleep(0.01)
            other.transport.abort()
            for result in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(result, LinkError)
            await asyncio.gather(one.closed(), other.closed())
            assert len(ends) == 2 and not other._tasks
            with pytest.raises(LinkError):
                one.request(ListModels())

    run(go())


def test_a_silent_peer_is_noticed(people):
    """The line is there and takes nothing and brings nothing: a cable that was pulled."""

    async def go():
        async with pair(people, Limits(keep_alive=0.1, silence=0.5)) as (one, other):
            other.serve(stuck)
            call = one.request(Generate("m", "silent"), timeout=60)
            await asyncio.sleep(0.3)  # keep-alives hold it
            assert one.reason is None
            one.transport.open.clear()
            with pytest.raises(LinkError, match="nothing for"):
                await call.reply()
            await other.closed()

    run(go())


def test_garbage_under_tls_ends_the_connection_on_both_sides(people):
    async def go():
        async with pair(people) as (one, other):
            one._secure.send(b"\xff" * 50)
            one._wake()
            assert isinstance(await other.closed(), LinkError)
            assert isinstance(await one.closed(), LinkError)

    run(go())


def test_nothing_is_left_behind(people):
    """Connections that ended are garbage."""

    async def go():
        for _ in range(3):
            async with pair(people) as (one, other):
                other.serve(echo)
                await one.ask(ListModels())

    run(go())
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, (Connection, calls.Call))]
