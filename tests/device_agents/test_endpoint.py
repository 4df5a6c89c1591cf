"""Devices and an edge on real loopback: pairing, dialling, and who is let in."""

import asyncio
import os

import pytest
from faults import Cable, Faults
from places import Place, run, until

from shoal.device_agents import endpoint, links
from shoal.device_agents.links import Address
from shoal.device_agents.messages import VERSION, Accepted, Hello, Infer, ListModels
from shoal.device_agents.pairing import Code
from shoal.device_agents.trust import Peer
from shoal.runtime.errors import LinkError, ShoalError, TrustError


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_pair_then_dial_under_2_kib(place, monkeypatch):
    async def go():
        opened = []
        connect = links.connect

        async def counted(*arguments):
            opened.append(await connect(*arguments))
            return opened[-1]

        monkeypatch.setattr(links, "connect", counted)
        async with place.listening() as (_, address):
            code = place.open_window()
            edge = await endpoint.pair(address, code, place.device, place.peers)
            assert (edge.name, edge.role, edge.address) == ("edge", "edge", str(address))
            assert place.peers.list() == [edge]
            await until(lambda: place.paired)
            assert place.devices.list() == place.paired and place.paired[0].name == "device"
            async with await place.dial(str(address)) as connection:
                assert (connection.hello.role, connection.peer.name) == ("edge", "edge")
                assert await connection.ask(ListModels()) == Accepted()
                assert place.arrived[0].hello.name == "device" and place.arrived[0].peer.role == "device"
                shake = sum(one.sent + one.received for one in opened)
                print(f"pairing, TLS, Hello both ways and a first question: {shake} bytes")
            with pytest.raises(LinkError, match="used"):  # a code pairs once
                await endpoint.pair(address, code, place.stranger, place.stranger_peers)

    run(go())


def test_the_handshake_is_under_2_kib(place):
    """Preambles, pairing and mutual TLS, counted where nothing else is."""

    async def go():
        async with place.listening() as (_, address):
            counts = []

            async def proxy(transport):
                other = await links.connect(address)
                await asyncio.gather(carry(transport, other), carry(other, transport), return_exceptions=True)
                counts.append(transport.received + other.received)

            front = await links.listen(Address.parse("127.0.0.1:0"), proxy)
            await endpoint.pair(front.address, place.open_window(), place.device, place.peers)
            secure = endpoint.Secure(place.device, place.peers.certificates, server=False)
            transport = await links.connect(front.address)
            await transport.write(endpoint._preamble(b"S") + secure.outgoing())
            await endpoint._shake(transport, secure, await endpoint._answer(transport, b"S"))
            assert secure.ready
            await asyncio.sleep(0.1)
            transport.close()
            await until(lambda: len(counts) == 2)
            print(f"pairing {counts[0]} bytes, session {counts[1]} bytes")
            assert sum(counts) < 2048
            front.close()
            await front.closed()

    run(go())


async def carry(source, target):
    try:
        while data := await source.read():
            await target.write(data)
    finally:
        target.close()


def test_wrong_codes_lock_the_window(place):
    async def go():
        async with place.listening() as (_, address):
            right = place.open_window()
            wrong = next(code for code in iter(Code.new, None) if code != right)
            for _ in range(3):
                with pytest.raises(TrustError, match="wrong"):
                    await endpoint.pair(address, wrong, place.device, place.peers)
            with pytest.raises(LinkError, match="locked"):
                await endpoint.pair(address, right, place.device, place.peers)
            assert not place.devices.list() and not place.peers.list() and not place.paired

    run(go())


def test_a_pairing_that_is_given_up_counts(place):
    """Who asks for the edge's element and goes has had its guess."""

    async def go():
        from shoal.device_agents.pairing import DevicePairing

        async with place.listening() as (listener, address):
            code = place.open_window()
            for _ in range(3):
                transport = await links.connect(address)
                await transport.write(endpoint._preamble(b"P"))
                await endpoint._answer(transport, b"P")
                await transport.write(DevicePairing(place.device, code, seen=2 * endpoint._preamble(b"P")).outgoing())
                await transport.read()
                transport.close()
            await until(lambda: not listener._shaking)
            assert place.window.state(asyncio.get_running_loop().time()) == "locked"
            with pytest.raises(LinkError, match="locked"):
                await endpoint.pair(address, code, place.device, place.peers)

    run(go())


@pytest.mark.parametrize(("seconds", "reason"), [(None, "not open"), (0, "expired")])
def test_no_window_no_pairing(place, seconds, reason):
    async def go():
        async with place.listening() as (_, address):
            if seconds is not None:
                place.open_window(seconds=seconds)
            with pytest.raises(LinkError, match=f"window is {reason}"):
                await endpoint.pair(address, Code.new(), place.device, place.peers)

    run(go())


def test_an_unknown_device_is_refused_though_its_tls_was_done(place):
    """The trap of TLS 1.3: the device's own handshake succeeds; `dial` must not."""

    async def go():
        place.devices.add(Peer.of(place.device.certificate, "device", "device"))
        place.stranger_peers.add(Peer.of(place.edge.certificate, "edge", "edge"))
        async with place.listening() as (_, address):
            for _ in range(5):
                with pytest.raises(TrustError, match="does not trust this side"):
                    await endpoint.dial(address, place.stranger, place.stranger_peers)
            assert not place.arrived

    run(go())


def test_an_unknown_edge_is_refused(place):
    async def go():
        place.devices.add(Peer.of(place.device.certificate, "device", "device"))
        place.peers.add(Peer.of(place.stranger.certificate, "other", "edge"))
        async with place.listening() as (_, address):
            with pytest.raises(TrustError, match="none of the paired"):
                await place.dial(address)

    run(go())


def test_who_pairs_as_a_device_is_no_edge(place):
    async def go():
        place.know_each_other()
        place.devices.add(Peer.of(place.device.certificate, "device", "edge"))
        async with place.listening() as (_, address):
            with pytest.raises(ShoalError):
                await place.dial(address)
        place.peers.add(Peer.of(place.edge.certificate, "edge", "device"))
        async with place.listening() as (_, address):
            with pytest.raises(TrustError, match="paired as a device"):
                await place.dial(address)

    run(go())


def test_a_revoked_device_loses_its_connection_and_gets_no_other(place, monkeypatch):
    monkeypatch.setattr(endpoint, "_SWEEP", 0.05)

    async def go():
        place.know_each_other()
        async with place.listening() as (_, address):
            connection = await place.dial(address)
            await until(lambda: place.arrived)
            kept = place.devices.get(place.device.fingerprint)
            place.devices.rename(kept, "camera")
            await until(lambda: place.arrived[0].peer.name == "camera")
            place.devices.revoke(kept)
            assert "revoked" in (await connection.closed()).why
            assert isinstance(await place.arrived[0].closed(), TrustError)
            with pytest.raises(LinkError, match="No device is paired"):
                await place.dial(address)
            place.devices.add(Peer.of(place.stranger.certificate, "other", "device"))
            with pytest.raises(TrustError, match="does not trust this side"):
                await place.dial(address)

    run(go())


def test_hello_is_judged_on_both_sides(place):
    async def go():
        place.know_each_other()
        needs = Hello(VERSION, "edge", required=("telepathy",))
        async with place.listening(hello=lambda: needs) as (_, address):
            with pytest.raises(LinkError, match="telepathy"):
                await place.dial(address)
            knows = Hello(VERSION + 7, "device", features=("telepathy", "more"))
            async with await place.dial(address, hello=knows) as connection:
                assert connection.hello == needs
        async with place.listening() as (_, address):
            with pytest.raises(LinkError, match="telepathy"):
                await place.dial(address, hello=Hello(VERSION, "device", required=("telepathy",)))
            with pytest.raises(TrustError, match="edge"):
                await place.dial(address, hello=Hello(VERSION, "edge"))
            with pytest.raises(LinkError, match="no Hello"):
                await place.dial(address, hello=ListModels())
            (await place.dial(address)).transport.close()

    run(go())


def test_the_same_over_a_noisy_serial_cable(place):
    """Pairing, then session after session over one port, on a line that damages one byte in five thousand."""

    async def go():
        async with Cable(Faults(errors=2e-4, seed=5).of(921_600)) as cable:
            listener = endpoint.Listener(
                [f"serial:{cable.b}?baud=921600"], place.edge, place.devices, place.serve, lambda: place.window
            )
            async with listener:
                address = f"serial:{cable.a}?baud=921600"
                await endpoint.pair(address, place.open_window(), place.device, place.peers)
                for _ in range(3):
                    async with await place.dial(address) as connection:
                        body = os.urandom(32 << 10)
                        async with connection.request(Infer("t"), body=body) as call:
                            assert await call.reply() == Accepted()
                        assert await connection.ask(ListModels()) == Accepted()

    run(go())
