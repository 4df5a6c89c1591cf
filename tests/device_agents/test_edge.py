"""The edge's daemon on real links, with real TLS and a real network: devices get what is theirs, and nothing else."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faults import Cable, Faults

import shoal
from shoal.converters.split.tail import pack_tail
from shoal.device_agents import admin, endpoint, messages
from shoal.device_agents.edge import Edge
from shoal.device_agents.identity import Identity
from shoal.device_agents.messages import Fetch, Health, Infer, ListModels, Model, Shape, State
from shoal.device_agents.negotiate import Terms
from shoal.device_agents.pairing import Code
from shoal.device_agents.split_model import EdgeModel
from shoal.device_agents.states import Priority
from shoal.device_agents.store import Store
from shoal.device_agents.trust import Peer, Peers
from shoal.runtime.errors import BusyError, LinkError, TrustError, UsageError
from shoal.runtime.session import open_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from make_split import split  # noqa: E402

HEAD = Model("d1" * 32, "cats", "encoder")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """(path of the tail's bundle, its digest, latents [16, ...], logits [16, 10] of the whole network)."""
    made, path = split(), tmp_path_factory.mktemp("edge") / "cats.shoal"
    images = np.random.default_rng(1).random((16, 3, 32, 32), np.float32)
    with open_graph(made.head, {}, threads=1) as head, open_graph(made.whole, {}, threads=1) as whole:
        latents, logits = head.run({"image": images})["latent"], whole.run({"image": images})["logits"]
    return path, pack_tail(made.tail, path, "cats"), latents, logits


class Device:
    """A device that is paired with `edge` already."""

    def __init__(self, edge: Edge, folder: Path, name: str = "device", rights=frozenset({"infer", "update"})):
        self.edge = edge
        self.identity, self.peers = Identity.open(folder, name), Peers.open(folder / "peers")
        own = edge.identity
        self.peers.add(Peer.of(own.certificate, own.name, "edge"))
        edge.peers.add(Peer.of(self.identity.certificate, name, "device", rights=rights))

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    async def dial(self, address=None):
        return await endpoint.dial(address or self.edge.addresses[0], self.identity, self.peers)


@contextlib.asynccontextmanager
async def running(folder: Path, *bundles: Path, listen=("127.0.0.1:0",), **options):
    before = asyncio.all_tasks()
    edge = Edge(folder / "edge", listen, threads=1, **options)
    for bundle in bundles:
        edge.store.add(bundle)
    await edge.start()
    try:
        yield edge
    finally:
        await edge.stop(0.0)
        left = asyncio.all_tasks() - before
        assert not [task for task in left if "faults.py" not in repr(task)]  # a cable works on


async def infer(connection, digest, latent, deadline_ms=20_000, timeout=20.0):
    """(Inferred, outputs by name)."""
    asked = Infer(digest, 0, "", ("latent",), (latent.dtype.name,), (Shape(latent.shape),), deadline_ms)
    body = latent.tobytes()
    async with connection.request(asked, priority=Priority.LATENT, body=body, timeout=timeout) as call:
        said = await call.reply()
        body, at, found = await call.read(1 << 20), 0, {}
        for name, dtype, shape in zip(said.names, said.dtypes, said.shapes, strict=True):
            found[name] = np.frombuffer(body, dtype, int(np.prod(shape.dims)), at).reshape(shape.dims)
            at += found[name].nbytes
        assert at == len(body)
    return said, found


async def until(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_devices_share_batches_and_each_gets_its_own_rows(network, tmp_path):
    path, digest, latents, logits = network

    async def main():
        async with running(tmp_path, path, max_wait=0.05) as edge:
            devices = [Device(edge, tmp_path / str(index), f"d{index}") for index in range(6)]
            connections = [await device.dial() for device in devices]
            batches = []

            async def work(index, connection):
                for turn in range(4):
                    row = (index + 3 * turn) % 16
                    said, found = await infer(connection, digest, latents[row : row + 1])
                    np.testing.assert_allclose(found["logits"], logits[row : row + 1], atol=1e-4)
                    assert found["label"] == logits[row].argmax() and said.where == edge.identity.name
                    batches.append(said.batch)

            await asyncio.gather(*(work(index, connection) for index, connection in enumerate(connections)))
            assert max(batches) > 2
            seen = edge.snapshot()
            assert json.loads(json.dumps(seen)) == seen
            assert seen["requests"] == {"done": 24, "busy": 0, "late": 0, "failed": 0, "running": 0}
            assert [device["requests"]["done"] for device in seen["devices"]] == [4] * 6
            model = seen["models"][0]
            assert model["served"] == 24 > model["batches"] and model["name"] == "cats"
            assert seen["latency"]["count"] == 24 == seen["latency"]["buckets"][-1]
            assert all(device["link"]["received"] > 4 * latents[:1].nbytes for device in seen["devices"])
            for connection in connections:
                await connection.close()
            await until(lambda: not any(device.connections for device in edge.devices.values()))

    asyncio.run(main())


def test_a_serial_cable_carries_latents(network, tmp_path):
    path, digest, latents, logits = network

    async def main():
        async with Cable(Faults().of(921_600)) as cable:
            serial = f"serial:{cable.b}?baud=921600"
            async with running(tmp_path, path, listen=(serial, "127.0.0.1:0")) as edge:
                connection = await Device(edge, tmp_path / "d").dial(f"serial:{cable.a}?baud=921600")
                agreed = await connection.ask(State("d", (HEAD,)))
                assert agreed.tail == digest
                _, found = await infer(connection, digest, latents[:1])
                np.testing.assert_allclose(found["logits"], logits[:1], atol=1e-4)
                link = edge.snapshot()["devices"][0]["link"]
                assert link["kind"] == "serial" and link["rate"] == 92_160
                await connection.close()

    asyncio.run(main())


def test_what_is_agreed_follows_what_the_edge_has(network, tmp_path):
    path, digest, *_ = network

    async def main():
        async with running(tmp_path, terms=Terms(hold=0.1, rest=0.2)) as edge:
            connection, told = await Device(edge, tmp_path / "d").dial(), asyncio.Queue()

            async def listen(call):
                told.put_nowait(call.message)

            connection.serve(listen)
            first = await connection.ask(State("d", (HEAD,), Health(battery_percent=50.0, temperature_c=30.0)))
            assert first.tail == "" and first.why == "The edge has no tail."
            await asyncio.to_thread(Store(edge.folder / "models").add, path)  # as `shoal edge add` does
            async with asyncio.timeout(20):
                assert isinstance(await told.get(), messages.Renegotiate)
            second = await connection.ask(State("d", (HEAD,)))
            assert second.tail == digest and second.deadline_ms > 0
            said = edge.snapshot()["devices"][0]
            assert said["chosen"]["model"] == "cats" and said["health"]["battery_percent"] == 50.0
            await connection.ask(Health(temperature_c=70.0))
            assert edge.snapshot()["devices"][0]["health"]["temperature_c"] == 70.0
            edge.store.remove(digest)
            async with asyncio.timeout(20):
                assert "no tail" in (await told.get()).why
            with pytest.raises(UsageError, match="no model"):
                await infer(connection, digest, np.zeros((1, 16, 8, 8), np.float32))
            await connection.close()

    asyncio.run(main())


def test_a_model_comes_whole_though_the_link_is_cut(network, tmp_path):
    path, digest, *_ = network
    data = path.read_bytes()

    async def main():
        async with running(tmp_path, path) as edge:
            device, store = Device(edge, tmp_path / "d"), Store(tmp_path / "d" / "models")
            cuts = 0
            while store.get(digest) is None:
                connection = await device.dial()
                with store.partial(digest, len(data)) as partial:
                    fetch = Fetch(digest, partial.offset)
                    async with connection.request(fetch, priority=Priority.BULK) as call:
                        said = await call.reply()
                        assert (said.length, said.digest, said.offset) == (len(data), digest, partial.offset)
                        while piece := await call.exactly(min(4000, len(data) - partial.offset)):
                            partial.write(piece)
                            if cuts < 3:
                                break
                    if partial.offset == len(data):
                        partial.finish()
                await connection.close()
                cuts += 1
            assert store.path(digest).read_bytes() == data and cuts == 4
            connection = await device.dial()
            models = await connection.ask(ListModels())
            assert [(model.digest, model.length) for model in models.models] == [(digest, len(data))]
            for wrong in (Fetch(digest, len(data) + 1), Fetch(digest, -1), Fetch("ab" * 32), Fetch("../../x")):
                with pytest.raises(UsageError):
                    await connection.ask(wrong)
            await connection.close()

    asyncio.run(main())


def test_rights_are_asked_for_each_request_and_a_revoked_device_is_gone_at_once(network, tmp_path):
    path, digest, latents, _ = network

    async def main():
        async with running(tmp_path, path) as edge:
            device = Device(edge, tmp_path / "d", rights=frozenset())
            connection = await device.dial()
            with pytest.raises(TrustError, match="infer"):
                await infer(connection, digest, latents[:1])
            with pytest.raises(TrustError):
                await connection.ask(Fetch(digest))
            with pytest.raises(TrustError, match="update"):
                await connection.ask(messages.Updates(0))
            with pytest.raises(UsageError, match="no request"):
                await connection.ask(messages.Accepted())
            edge.peers.allow(edge.peers.get(device.fingerprint), {"infer"})  # as `shoal peers allow` does
            await until(lambda: edge.devices[device.fingerprint].peer.may("infer"))
            await infer(connection, digest, latents[:1])
            edge.rename(device.fingerprint, "kitchen")
            assert edge.snapshot()["devices"][0]["name"] == "kitchen"
            edge.revoke(device.fingerprint)
            async with asyncio.timeout(5):
                await connection.closed()
            seen = edge.snapshot()
            assert not seen["devices"] and seen["requests"]["done"] == 1
            with pytest.raises((LinkError, TrustError)):
                await device.dial()
            with pytest.raises(UsageError):
                edge.revoke(device.fingerprint)

    asyncio.run(main())


def test_busy_and_late_reach_the_device_as_such(network, tmp_path):
    path, digest, latents, _ = network

    async def main():
        async with running(tmp_path, path, inflight=1) as edge:
            connection = await Device(edge, tmp_path / "d").dial()
            await infer(connection, digest, latents[:1])
            # The body of this one does not come, so its place stays taken
            asked = Infer(digest, 0, "", ("latent",), ("float32",), (Shape(latents[:1].shape),))
            async with connection.request(asked, more=True):
                await until(lambda: edge.tails.running == 1)
                with pytest.raises(BusyError, match="busy") as caught:
                    await infer(connection, digest, latents[:1])
                assert caught.value.retry_ms > 0
            await until(lambda: edge.tails.running == 0)
            asked = messages.Infer(digest, 0, "", ("latent",), ("float32",), (Shape(latents[:1].shape),), 30)
            async with connection.request(asked, more=True) as call:
                await asyncio.sleep(0.05)
                await call.write(latents[:1].tobytes())
                with pytest.raises(BusyError, match="too late"):
                    await call.end()
                    await call.reply()
            with pytest.raises(UsageError, match="other tables"):
                await connection.ask(messages.Infer(digest, 0, "ab" * 32))
            with pytest.raises(UsageError, match="tensors"):
                await infer(connection, digest, latents[:1, :1])
            counted = edge.snapshot()["devices"][0]["requests"]
            assert (counted["busy"], counted["late"], counted["done"], counted["running"]) == (1, 1, 1, 0)
            await connection.close()

    asyncio.run(main())


def test_a_drain_lets_requests_end_and_takes_no_others(network, tmp_path):
    path, digest, latents, logits = network

    async def main():
        edge = Edge(tmp_path / "edge", ["127.0.0.1:0"], threads=1)
        edge.store.add(path)
        await edge.start()
        device = Device(edge, tmp_path / "d")
        connection = await device.dial()
        await infer(connection, digest, latents[:1])
        address = edge.addresses[0]
        asked = Infer(digest, 0, "", ("latent",), ("float32",), (Shape(latents[:1].shape),))
        async with connection.request(asked, more=True) as call:
            await until(lambda: edge.tails.running == 1)
            stopping = asyncio.create_task(edge.stop(20))
            await until(lambda: connection.going_away)
            with pytest.raises(BusyError):
                await infer(connection, digest, latents[:1])
            await call.write(latents[:1].tobytes())
            await call.end()
            await call.reply()
            assert np.frombuffer((await call.read(100))[:40], np.float32) == pytest.approx(logits[0], abs=1e-4)
        async with asyncio.timeout(5):
            await stopping
        with pytest.raises(LinkError):
            await device.dial(address)
        with pytest.raises(UsageError):
            edge.open_window()
        await connection.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not admin.socket_path(edge.folder).exists()

    asyncio.run(main())


def test_updates_are_handed_out_and_offered_when_they_are_new(tmp_path):
    from test_manifest import Vendor

    async def main():
        async with running(tmp_path) as edge:
            connection, told = await Device(edge, tmp_path / "d").dial(), asyncio.Queue()

            async def listen(call):
                told.put_nowait(call.message)

            connection.serve(listen)
            assert (await connection.ask(messages.Updates(0))).data == b""
            data = Vendor().manifest().encode()
            (edge.folder / "manifest.json").write_bytes(data)
            async with asyncio.timeout(20):
                assert (await told.get()).manifest == data
            assert (await connection.ask(messages.Updates(0))).data == data
            assert (await connection.ask(messages.Updates(1))).data == b""
            await connection.close()

    asyncio.run(main())


def test_the_owner_pairs_a_device_through_the_socket(tmp_path):
    async def main():
        async with running(tmp_path) as edge:
            lines: asyncio.Queue = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def owner():
                for line in admin.ask(edge.folder, "pair", seconds=30):
                    loop.call_soon_threadsafe(lines.put_nowait, line)

            watching = asyncio.create_task(asyncio.to_thread(owner))
            opened = await lines.get()
            assert opened["state"] == "open" and opened["address"] == str(edge.addresses[0])
            assert edge.snapshot()["pairing"]["code"] == opened["code"]
            identity, peers = Identity.open(tmp_path / "d", "kitchen"), Peers.open(tmp_path / "d" / "peers")
            wrong = Code.new()
            assert str(wrong) != opened["code"]
            with pytest.raises(TrustError):
                await endpoint.pair(opened["address"], wrong, identity, peers)
            assert (await lines.get())["tries_left"] == 2
            await endpoint.pair(opened["address"], Code.parse(opened["code"]), identity, peers)
            used = await lines.get()
            while used["state"] == "open":  # the try that succeeded is spent before
                used = await lines.get()
            assert used["state"] == "used" and used["paired"] == "kitchen" and used["code"] == ""
            await watching
            assert opened["code"] not in json.dumps(edge.snapshot())
            connection = await endpoint.dial(edge.addresses[0], identity, peers)
            await connection.close()
            with pytest.raises((LinkError, TrustError)):  # the code is burned
                await endpoint.pair(opened["address"], Code.parse(opened["code"]), identity, peers)

    asyncio.run(main())


def test_the_socket_refuses_what_it_does_not_know_and_closes_the_window_of_who_hangs_up(tmp_path):
    def raw(folder: Path, data: bytes, wait: bool = True) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(admin.socket_path(folder)))
            client.sendall(data)
            return client.makefile("rb").readline() if wait else b""

    async def main():
        async with running(tmp_path) as edge:
            assert admin.socket_path(edge.folder).stat().st_mode & 0o777 == 0o600
            for data in (b"nonsense\n", b"[]\n", b"{}\n", b'{"verb": 1}\n', b'{"verb": "pair", "seconds": "x"}\n',
                         b"[" * 5000 + b"\n", b"\xff\n"):  # fmt: skip
                said = json.loads(await asyncio.to_thread(raw, edge.folder, data))
                assert said["error"]["code"] == UsageError.code
            assert await asyncio.to_thread(raw, edge.folder, b"x" * (1 << 17) + b"\n") == b""
            first = await asyncio.to_thread(raw, edge.folder, b'{"verb": "pair"}\n')
            assert json.loads(first)["state"] == "open"
            await until(lambda: edge.window is None)
            assert edge.pairing()["state"] == "closed"
            with pytest.raises(UsageError, match="Another one"):
                await Edge(edge.folder, ["127.0.0.1:0"]).start()

    asyncio.run(main())
    with pytest.raises(LinkError, match="does not run"):
        next(admin.ask(tmp_path / "edge", "status"))


def test_an_edge_that_is_killed_is_found_again_by_its_devices(network, tmp_path):
    path, digest, latents, logits = network
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"SHOAL_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "shoal", "edge", "--listen", f"127.0.0.1:{port}", "--threads", "1",
               "--no-discovery", "--drain", "1"]  # fmt: skip
    edge = Edge(tmp_path / "edge", [])  # for its identity and peers; the daemon is another process
    edge.store.add(path)
    device = Device(edge, tmp_path / "device")

    async def main():
        for end in (signal.SIGKILL, signal.SIGTERM):
            daemon = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            assert "Edge" in daemon.stdout.readline() and "listens" in daemon.stdout.readline()
            connection = await device.dial(f"127.0.0.1:{port}")
            _, found = await infer(connection, digest, latents[:1])
            np.testing.assert_allclose(found["logits"], logits[:1], atol=1e-4)
            asked = Infer(digest, 0, "", ("latent",), ("float32",), (Shape(latents[:1].shape),))
            call = connection.request(asked, more=True)
            daemon.send_signal(end)
            began = time.monotonic()
            with pytest.raises((LinkError, BusyError)):
                await call.write(latents[:1].tobytes()[:100])
                await call.reply()
            assert time.monotonic() - began < 10  # a second to drain, and never a hang
            await connection.close()
            assert daemon.wait(20) == (0 if end == signal.SIGTERM else -signal.SIGKILL)

    asyncio.run(main())


def test_a_language_model_answers_over_the_link(tiny_bundle, tmp_path):
    async def main():
        async with running(tmp_path, memory=1 << 30) as edge:
            digest = edge.store.add(tiny_bundle, "tiny").digest
            connection = await Device(edge, tmp_path / "d").dial()

            async def connect():
                return connection

            pieces = [piece async for piece in EdgeModel(connect, "tiny").generate([5, 99, 7, 201], max_tokens=6)]
            with shoal.load(tiny_bundle) as model:
                expected = [token.id for token in model.generate([5, 99, 7, 201], max_tokens=6)]
            assert [piece.id for piece in pieces] == expected
            assert {piece.where for piece in pieces} == {edge.identity.name}
            seen = edge.snapshot()
            assert [model["resident"] > 0 for model in seen["models"] if model["digest"] == digest] == [True]
            assert 0 < seen["memory"]["used"] <= seen["memory"]["limit"] == 1 << 30
            await until(lambda: edge.snapshot()["requests"]["done"] == 1)
            await connection.close()

    asyncio.run(main())
