"""Serial links over real pseudo-terminals joined by a cable with faults, and over pyserial's URLs."""

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import threading

import pytest
from faults import Cable, Faults

from shoal.device_agents.links import Address, arq, connect, listen
from shoal.runtime.errors import LinkError

BAUD = 921_600


def at(path, baud=BAUD):
    return Address.parse(f"serial:{path}?baud={baud}")


async def read_exactly(transport, count):
    data = bytearray()
    while len(data) < count and (more := await transport.read()):
        data += more
    return bytes(data)


async def echo(transport):
    while data := await transport.read():
        await transport.write(data)


class Ends:
    """What a listener accepted, and how each ended."""

    def __init__(self):
        self.transports, self.errors, self.new = [], [], asyncio.Event()

    async def __call__(self, transport):
        self.transports.append(transport)
        self.new.set()
        try:
            await echo(transport)
            self.errors.append(None)
        except LinkError as error:
            self.errors.append(error)


@contextlib.asynccontextmanager
async def listening(address, accept):
    listener = await listen(address, accept)
    try:
        yield listener
    finally:
        listener.close()
        async with asyncio.timeout(10):
            await listener.closed()


def run(main, seconds=30):
    async def timed():
        async with asyncio.timeout(seconds):
            await main()

    asyncio.run(timed())


@pytest.mark.parametrize(
    "faults",
    [
        Faults(),
        Faults(rate=BAUD / 10),
        Faults(rate=BAUD / 10, errors=1e-3, losses=1e-4, duplicates=0.01, noise=os.urandom(500)),
        Faults(rate=BAUD / 10, delay=0.05, jitter=0.02),
        Faults(rate=10_000, errors=1e-4),
        Faults(rate=BAUD / 10, stalls=((3000, 0.4), (6000, 0.2))),
    ],
    ids=["perfect", "paced", "noisy", "late", "slower than said", "stalling"],
)
def test_a_link_carries_both_ways_and_closes(faults):
    async def main():
        async with Cable(faults) as cable, listening(at(cable.b), ends := Ends()):
            transport = await connect(at(cable.a))
            data = random.Random(1).randbytes(8_000)
            writing = asyncio.create_task(transport.write(data))
            assert await read_exactly(transport, len(data)) == data
            await writing
            transport.close()
            await transport.closed()
            assert await transport.read() == b""
            with pytest.raises(LinkError):
                await transport.write(b"late")
            while not ends.errors:
                await asyncio.sleep(0.01)
            assert ends.errors == [None]
            assert transport.sent > len(data) < transport.received
            assert ends.transports[0].name == f"serial {cable.b} at {BAUD} baud"

    run(main)


def test_little_waits_below_a_write():
    async def main():
        async with Cable(Faults(rate=11_520)) as cable, listening(at(cable.b, 115_200), Ends()):
            transport = await connect(at(cable.a, 115_200))
            for _ in range(20):
                await transport.write(bytes(int(11_520 * 0.045) + 22))
                assert transport.arq.queued == 0
                assert transport.arq.ahead(asyncio.get_running_loop().time()) <= arq.SLACK
            transport.close()
            await transport.closed()

    run(main)


def test_a_peer_that_starts_anew_ends_the_old_link_and_has_a_new_one():
    async def main():
        async with Cable(Faults(rate=BAUD / 10)) as cable, listening(at(cable.b), ends := Ends()):
            first = await connect(at(cable.a))
            await first.write(b"one")
            assert await read_exactly(first, 3) == b"one"
            first._port.close()  # as kill -9 does: no farewell, and another program has the port
            second = await connect(at(cable.a))
            await second.write(b"two")
            assert await read_exactly(second, 3) == b"two"
            assert len(ends.transports) == 2 and "anew" in ends.errors[0].why
            second.close()
            await second.closed()

    run(main)


def test_a_peer_that_was_killed_is_noticed_within_three_seconds():
    program = """if True:
        import asyncio, sys
        from shoal.device_agents.links import Address, connect
        async def main():
            transport = await connect(Address.parse(sys.argv[1]))
            print("up", flush=True)
            while True:
                await transport.write(bytes(100))
                await asyncio.sleep(0.05)
        asyncio.run(main())
    """

    async def main():
        async with Cable() as cable, listening(at(cable.b), ends := Ends()):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, str(at(cable.a)), stdout=subprocess.PIPE
            )
            await process.stdout.readline()
            await ends.new.wait()
            process.kill()
            await process.wait()
            async with asyncio.timeout(arq.SILENCE + 0.5):
                while not ends.errors:
                    await asyncio.sleep(0.01)
            assert "heard" in ends.errors[0].why
            again = await connect(at(cable.a))
            await again.write(b"ready")
            assert await read_exactly(again, 5) == b"ready"
            again.close()
            await again.closed()

    run(main)


def test_a_cut_wire_ends_the_link_and_a_mended_one_takes_the_next():
    async def main():
        async with Cable() as cable, listening(at(cable.b), ends := Ends()):
            transport = await connect(at(cable.a))
            await ends.new.wait()
            cable.break_off()
            await transport.write(b"into the void")
            with pytest.raises(LinkError):
                await transport.read()
            await transport.closed()
            cable.become(Faults())
            second = await connect(at(cable.a))
            await second.write(b"mended")
            assert await read_exactly(second, 6) == b"mended"
            assert isinstance(ends.errors[0], LinkError)
            second.close()
            await second.closed()

    run(main)


def test_a_port_that_is_pulled_ends_the_link_at_once():
    async def main():
        async with Cable() as cable:
            listener = await listen(at(cable.b), ends := Ends())
            transport = await connect(at(cable.a))
            await ends.new.wait()
            cable.unplug()
            with pytest.raises(LinkError, match="port"):
                await transport.read()
            await asyncio.sleep(0.05)
            assert "port" in ends.errors[0].why
            listener.close()
            await listener.closed()

    run(main)


def test_a_listener_takes_a_port_that_comes_back(tmp_path):
    """As a USB adapter under a stable name, /dev/serial/by-id/…"""

    async def main():
        name = tmp_path / "adapter"
        async with Cable() as cable:
            name.symlink_to(cable.b)
            listener = await listen(at(name), Ends())
            cable.unplug()
        async with Cable() as cable:
            name.unlink()
            name.symlink_to(cable.b)
            transport = await connect(at(cable.a))
            await transport.write(b"back")
            assert await read_exactly(transport, 4) == b"back"
            transport.close()
            await transport.closed()
            listener.close()
            await listener.closed()

    run(main)


def test_nobody_there_a_port_in_use_and_no_port_say_so():
    async def main():
        async with Cable() as cable:
            with pytest.raises(LinkError, match="did not answer"):
                await connect(at(cable.a), timeout=0.3)
            async with listening(at(cable.b), Ends()):
                with pytest.raises(LinkError, match="cannot be opened"):
                    await listen(at(cable.b), Ends())
            with pytest.raises(LinkError, match="cannot be opened"):
                await connect(at("/dev/no-such-port"))

    run(main)


def test_a_dialer_may_come_before_its_listener():
    async def main():
        async with Cable() as cable:
            dialing = asyncio.create_task(connect(at(cable.a)))
            await asyncio.sleep(0.5)
            async with listening(at(cable.b), Ends()):
                transport = await dialing
                transport.close()
                await transport.closed()

    run(main)


def test_close_delivers_what_was_written_last():
    async def main():
        got = asyncio.get_running_loop().create_future()

        async def accept(transport):
            data = bytearray()
            while more := await transport.read():
                data += more
            got.set_result(bytes(data))

        async with Cable(Faults(rate=BAUD / 10, errors=1e-3)) as cable, listening(at(cable.b), accept):
            transport = await connect(at(cable.a))
            await transport.write(b"a" * 5000)
            await transport.write(b"the end")
            transport.close()
            await transport.closed()
            assert await got == b"a" * 5000 + b"the end"

    run(main)


def test_a_reader_that_sleeps_holds_the_writer_back(monkeypatch):
    from shoal.device_agents.links import serial

    monkeypatch.setattr(serial, "_UNREAD", 2000)

    async def main():
        awake, got = asyncio.Event(), bytearray()

        async def accept(transport):
            await awake.wait()
            while more := await transport.read():
                got.extend(more)

        async with Cable() as cable, listening(at(cable.b), accept):
            transport = await connect(at(cable.a))
            data = random.Random(2).randbytes(30_000)
            writing = asyncio.create_task(transport.write(data))
            await asyncio.sleep(0.5)
            assert transport.arq.unacknowledged > 20_000
            awake.set()
            await writing
            transport.close()
            await transport.closed()
            assert got == data

    run(main)


@contextlib.asynccontextmanager
async def server_of(path, telnet):
    """A serial device server: one TCP client is joined to the port at `path`, in the clear or by RFC 2217."""
    import serial
    from serial import rfc2217

    class Terminal(serial.Serial):
        cts = dsr = ri = cd = dtr = rts = False  # a pseudo-terminal has no modem lines

    port = Terminal(path, timeout=0.05)
    waiting = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve():
        client, _ = waiting.accept()
        client.settimeout(0.05)

        class Connection:
            def write(self, data):
                client.sendall(data)

        manager = rfc2217.PortManager(port, Connection()) if telnet else None

        def to_client():
            while not over.is_set():
                if data := port.read(max(1, port.in_waiting)):
                    client.sendall(b"".join(manager.escape(data)) if manager else data)

        reading = threading.Thread(target=to_client)
        reading.start()
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                if not (data := client.recv(4096)):
                    break
                port.write(b"".join(manager.filter(data)) if manager else data)
        over.set()
        reading.join()
        client.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield waiting.getsockname()[1]
    finally:
        over.set()
        await asyncio.to_thread(thread.join)
        port.close()
        waiting.close()


@pytest.mark.parametrize("scheme", ["socket", "rfc2217"])
def test_urls_of_device_servers(scheme):
    async def main():
        async with Cable(Faults(errors=1e-4)) as cable, listening(at(cable.b), Ends()):
            async with server_of(cable.a, scheme == "rfc2217") as port:
                transport = await connect(Address.parse(f"serial:{scheme}://127.0.0.1:{port}"))
                data = random.Random(3).randbytes(6_000) + b"\xff" * 300 + b"\0\x11\x13"
                writing = asyncio.create_task(transport.write(data))
                assert await read_exactly(transport, len(data)) == data
                await writing
                transport.close()
                await transport.closed()

    run(main)


def test_a_device_server_that_goes_ends_the_link():
    async def main():
        async with Cable() as cable, listening(at(cable.b), Ends()):
            async with server_of(cable.a, False) as port:
                transport = await connect(Address.parse(f"serial:socket://127.0.0.1:{port}"))
            with pytest.raises(LinkError):
                await transport.read()

    run(main)
