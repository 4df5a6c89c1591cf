"""kill -9 of either side, in every state, real processes: within three seconds the other is idle (under 5 % of a core
over a second) and ready (what is asked of it next works), and no file is damaged. A proxy or a cable that swallows
what comes after byte n holds the two in a state for as long as it takes to kill one.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from faults import Cable, Faults, Proxy
from paired import small_network, until

import shoal
from shoal.device_agents import admin, endpoint, messages
from shoal.device_agents.apps import App
from shoal.device_agents.identity import PACKED, Identity
from shoal.device_agents.local import Local
from shoal.device_agents.store import Store
from shoal.device_agents.trust import Peer, Peers
from shoal.device_agents.update import read_status
from shoal.device_agents.vendor import Vendor
from shoal.runtime.bundle import Bundle, create
from shoal.runtime.errors import LinkError, ShoalError

READY = 3.0
_CARD = 8 + 1 + PACKED + len("dev")  # bytes that a device has sent once the edge has its certificate
_PROOF = _CARD + 1 + 32 + 16
PAIRING = (0, 4, 8, _CARD - 40, _CARD, _PROOF - 20)  # bytes that reach the edge; with its proof it is over
ANSWERS = (0, 4, 8, 100, 8 + 1 + PACKED + 32 + len("oak"), 8 + 1 + PACKED + 32 + len("oak") + 8)  # and the device
SHAKING = (0, 8, 150, 300, 600, 900)  # preamble, ClientHello, certificate and Finished, Hello
deep = pytest.mark.deep


def _some(states, quick):
    names = [" ".join(map(str, state)) for state in states]
    return [
        pytest.param(*state, marks=() if state in quick else deep, id=name)
        for state, name in zip(states, names, strict=True)
    ]


class Machines:
    """A folder for an edge and a device, and the processes that run there."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, 0
        self.running: list[subprocess.Popen] = []
        self._count = 0

    def start(self, home: str, *words: str) -> subprocess.Popen:
        self._count += 1
        path = self.folder / f"{self._count}-{words[0]}.log"
        with open(path, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "shoal", *words], env=os.environ | {"SHOAL_HOME": str(self.folder / home)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        process.log = path  # type: ignore[attr-defined]
        self.running.append(process)
        return process

    async def edge(self, *more: str) -> subprocess.Popen:
        listen = [word for address in (f"127.0.0.1:{self.port}", *more) for word in ("--listen", address)]
        process = self.start("e", "edge", *listen, "--no-discovery", "--threads", "1", "--name", "oak")
        await until(lambda: "listens at" in self.said(process))
        line = next(line for line in self.said(process).splitlines() if line.startswith("listens at"))
        self.port = int(line.split()[2].strip(",").rsplit(":", 1)[1])
        return process

    async def agent(self, address: str, *more: str) -> subprocess.Popen:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "d/device/agent.sock").unlink()
        process = self.start("d", "agent", address, "--threads", "1", "--window", "1", "--name", "dev", *more)
        await until(lambda: "ready for apps" in self.said(process))
        return process

    def said(self, process: subprocess.Popen) -> str:
        assert process.poll() is None, process.log.read_text()  # type: ignore[attr-defined]
        return process.log.read_text()  # type: ignore[attr-defined]

    def code(self) -> tuple[str, contextlib.ExitStack]:
        """A pairing window's code; it is open until the stack is closed."""
        stack, asked = contextlib.ExitStack(), admin.ask(self.folder / "e/edge", "pair")
        stack.callback(asked.close)
        return next(asked)["code"], stack

    def status(self) -> dict:
        return next(iter(admin.ask(self.folder / "e/edge", "status")))

    def app(self) -> App:
        return App(self.folder / "d/device/agent.sock")

    def unharmed(self) -> None:
        """Both folders say what they said, and every model in them is whole."""
        for home in ("e/edge", "d/device"):
            if (self.folder / home / "identity.key").exists():
                Identity.open(self.folder / home)
                Peers.open(self.folder / home / "peers").list()
            for path in (self.folder / home).rglob("*.shoal"):
                with Bundle.open(path) as bundle:
                    bundle.verify()
            if (self.folder / home / "models").exists():
                store = Store(self.folder / home / "models")
                assert all(store.path(entry.digest).exists() for entry in store.list())
        if (self.folder / "d/device/updates").exists():
            read_status(self.folder / "d/device/updates")

    def know_each_other(self) -> None:
        edge, device = self.folder / "e/edge", self.folder / "d/device"
        one, other = Identity.open(edge, "oak"), Identity.open(device, "dev")
        Peers.open(device / "peers").add(Peer.of(one.certificate, "oak", "edge"))
        Peers.open(edge / "peers").add(Peer.of(other.certificate, "dev", "device"))

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.wait()


def kill(process: subprocess.Popen) -> float:
    assert process.poll() is None, process.log.read_text()  # type: ignore[attr-defined]
    process.kill()
    process.wait()
    return time.monotonic()


async def idle(process: subprocess.Popen, since: float) -> None:
    """Under 5 % of a core over a second that begins within three seconds."""
    watched = psutil.Process(process.pid)
    marks: list[tuple[float, float]] = []
    while True:
        marks.append((time.monotonic(), sum(watched.cpu_times()[:2])))
        now, spent = marks[-1]
        if (before := next((mark for mark in reversed(marks) if now - mark[0] >= 1.0), None)) is not None:
            if spent - before[1] < 0.05 * (now - before[0]):
                return
            assert now - since < READY + 1.5, f"{spent - before[1]:.2f} s of CPU in {now - before[0]:.2f} s"
        await asyncio.sleep(0.1)


async def soon(work, since: float):
    """What `work` returns, once it raises no more; within three seconds of `since`."""
    while True:
        try:
            return await work()
        except (ShoalError, AssertionError, TimeoutError):
            if time.monotonic() - since > READY:
                raise
            await asyncio.sleep(0.05)


async def still(line) -> None:
    """Returns when the line has carried something and nothing moves any more."""
    last, at = -1, time.monotonic()
    async with asyncio.timeout(15):
        while last < 1 or time.monotonic() - at < 0.25:
            moved = sum(direction.bytes + direction.passed for pair in line.pairs for direction in pair)
            if moved != last:
                last, at = moved, time.monotonic()
            await asyncio.sleep(0.01)


# What there is to run


@pytest.fixture(scope="module")
def bundles(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    tail, device, head, images, logits = small_network(folder)
    shoal.convert(tiny_folder, folder / "story.shoal", "fp32", check_parity=False)
    large, padded = folder / "large.shoal", folder / "padded.shoal"
    filling = np.random.default_rng(1).bytes(400_000)
    with create(large) as writer:
        writer.add("weights", "weights", filling)
        writer.commit()
    with create(padded) as writer, Bundle.open(head) as bundle:  # a head that takes its time on a slow line
        for one in bundle.sections:
            writer.add(one.kind, one.name, bundle.bytes(one), required=one.required)
        writer.add("weights", "filling", filling)
        writer.graph(bundle.graphs[0])
        writer.commit()
    return {"tail": tail, "device": device, "images": images, "logits": logits, "story": folder / "story.shoal",
            "large": large, "padded": padded}  # fmt: skip


@pytest.fixture
def machines(tmp_path):
    made = Machines(tmp_path)
    yield made
    made.close()


class Probe:
    """Another device, in this process, that knows the edge."""

    def __init__(self, machines: Machines):
        edge = Identity.open(machines.folder / "e/edge", "oak")
        self.identity = Identity.open(machines.folder / "p", "probe")
        self.peers = Peers.open(machines.folder / "p/peers")
        self.peers.add(Peer.of(edge.certificate, "oak", "edge"))
        Peers.open(machines.folder / "e/edge/peers").add(Peer.of(self.identity.certificate, "probe", "device"))

    async def __call__(self, address: str, digest: str, latents: np.ndarray, logits: np.ndarray) -> None:
        """Asks the edge for an answer, and looks at it."""
        shape = (messages.Shape(latents.shape),)
        asked = messages.Infer(digest, 0, "", ("latent",), ("float32",), shape, 3000)
        async with await endpoint.dial(address, self.identity, self.peers, 2.5) as connection:
            async with connection.request(asked, body=latents.tobytes(), timeout=2.5) as call:
                await call.reply()
                found = np.frombuffer(await call.read(1 << 16), np.float32)
        np.testing.assert_allclose(found[: logits.size], logits.ravel(), atol=1e-4)


class Scene:
    """Edge and agent run and are linked over a line with faults; `reach` brings them into a state."""

    def __init__(self, machines: Machines, bundles: dict, carrier: str):
        self.machines, self.bundles, self.carrier = machines, bundles, carrier
        self.stack = contextlib.AsyncExitStack()
        self.fetches = False  # the device has no model of its own

    async def __aenter__(self) -> "Scene":
        machines, bundles = self.machines, self.bundles
        machines.know_each_other()
        store = Store(machines.folder / "e/edge/models")
        self.digest = store.add(bundles["tail"]).digest
        store.add(bundles["story"], "story")
        more: tuple[str, ...] = ()
        if self.carrier == "serial":
            self.line = await self.stack.enter_async_context(Cable(Faults(rate=92_160)))
            more, self.address = (f"serial:{self.line.a}?baud=921600",), f"serial:{self.line.b}?baud=921600"
        self.more = more
        self.edge = await machines.edge(*more)
        if self.carrier == "tcp":
            self.line = await self.stack.enter_async_context(Proxy("127.0.0.1", machines.port))
            self.address = f"127.0.0.1:{self.line.port}"
        head = Local(bundles["device"])
        self.latents = head.prepare({"image": bundles["images"][:1]})["latent"]
        head.close()
        self.probe = Probe(machines)
        return self

    async def __aexit__(self, *error) -> None:
        await self.stack.aclose()

    async def start_agent(self) -> None:
        more = () if self.fetches else ("--model", f"cats={self.bundles['device']}")
        self.agent = await self.machines.agent(self.address, *more)

    async def linked(self) -> None:
        await self.start_agent()
        with self.machines.app() as app:
            async with asyncio.timeout(15):
                while not (await asyncio.to_thread(app.status))["agreement"]:
                    await asyncio.sleep(0.05)

    async def infer(self, where: str = "") -> None:
        """An app is answered rightly, by the side that is named; where a device has no model yet, at all."""
        with self.machines.app() as app:
            if self.fetches and where == "local":
                assert await asyncio.to_thread(app.status)
                return
            answer = await asyncio.to_thread(app.infer, {"image": self.bundles["images"][:1]}, 1.0, "cats")
        np.testing.assert_allclose(answer.outputs["logits"], self.bundles["logits"][:1], atol=1e-4)
        assert where in ("", answer.where), f"{answer.where} and not {where}: {answer.why}"

    async def reach(self, state: str) -> None:
        kind, _, number = state.partition(" ")
        if kind in ("sent", "answered"):
            swallow = Faults(swallow=int(number))
            self.line.become(*((swallow, Faults()) if kind == "sent" else (Faults(), swallow)))
            await self.start_agent()
            return await still(self.line)
        if kind == "update":
            self.publish()
        if kind == "update" and number == "trial":
            await self.linked()
            device = self.machines.folder / "d/device/updates"
            return await until(lambda: read_status(device)["trial"])
        if kind == "fetch":
            Store(self.machines.folder / "e/edge/models").add(self.bundles["padded"], "cats")
            self.fetches = True
        if kind in ("update", "fetch") and self.carrier == "tcp":
            self.line.become(Faults(rate=150_000))
        await self.linked()
        if kind in ("infer", "generate") and self.carrier == "tcp":
            self.line.become(Faults(rate=2_000))
        if kind == "infer":
            self.asking = asyncio.ensure_future(self._quietly(self.infer))
            await asyncio.sleep(0.4)
        elif kind == "generate":
            self.asking = asyncio.ensure_future(self._quietly(self._generate))
            await asyncio.sleep(1.0)
        elif kind == "fetch":
            await until(lambda: self.fetched("partial"))
        elif kind == "update":
            await until(lambda: list((self.machines.folder / "d/device/updates/models").glob("*.part")))

    def fetched(self, suffix: str) -> bool:
        found = (self.machines.folder / "d/device/models").glob(f"*.{suffix}")
        return any(path.stat().st_size > 50_000 for path in found)

    async def _quietly(self, work) -> None:
        with contextlib.suppress(ShoalError):
            await work()

    async def _generate(self) -> None:
        def read() -> None:
            with self.machines.app() as app:
                for _ in app.generate("abc", "story", max_tokens=200, deadline=5.0):
                    pass

        await asyncio.to_thread(read)

    def publish(self) -> None:
        """A signed release is on the edge, and the device trusts who signed it."""
        folder = self.machines.folder
        vendor = Vendor.create(folder / "vendor", time.time())
        vendor.sign({"large": self.bundles["large"]}, now=time.time())
        for home, verb, path in (("e", "publish", folder / "vendor"), ("d", "trust", folder / "vendor/root.json")):
            done = self.machines.start(home, "update", verb, str(path))
            assert done.wait(20) == 0, done.log.read_text()  # type: ignore[attr-defined]


SESSION = [
    *((f"sent {at}",) for at in SHAKING), *((f"answered {at}",) for at in SHAKING),
    ("idle",), ("infer",), ("fetch",), ("generate",), ("update",), ("update trial",),
]  # fmt: skip
OFTEN = {"device": [("update",)], "edge": [("answered 900",), ("generate",)]}
WIRED = [("idle",), ("infer",), ("fetch",), ("update",)]


@pytest.mark.parametrize("state", _some(SESSION, OFTEN["device"]))
def test_the_device_dies_and_its_edge_is_ready(state, machines, bundles):
    asyncio.run(_device_dies(state, "tcp", machines, bundles))


@pytest.mark.parametrize("state", _some(WIRED, [("infer",)]))
def test_the_device_dies_at_the_other_end_of_a_cable(state, machines, bundles):
    asyncio.run(_device_dies(state, "serial", machines, bundles))


async def _device_dies(state, carrier, machines, bundles):
    async with Scene(machines, bundles, carrier) as scene:
        await scene.reach(state)
        scene.line.become(Faults() if carrier == "tcp" else Faults(rate=92_160))
        since = kill(scene.agent)
        ask = (scene.digest, scene.latents, bundles["logits"][:1])
        await soon(lambda: scene.probe(scene.address, *ask), since)
        await idle(scene.edge, since)
        assert machines.status()["requests"]["running"] == 0
        links = {device["name"]: device["link"] for device in machines.status()["devices"]}
        assert links.get("dev") is None
        machines.unharmed()
        if state.startswith(("update", "idle", "fetch")):  # and the device goes on where it was
            await scene.linked()
            if state == "fetch":
                await until(lambda: scene.fetched("shoal"))
            await soon(lambda: scene.infer("edge"), time.monotonic())
            if state.startswith("update"):
                await until(lambda: "large" in read_status(machines.folder / "d/device/updates")["active"], 30.0)
                machines.unharmed()


@pytest.mark.parametrize("state", _some(SESSION, OFTEN["edge"]))
def test_the_edge_dies_and_its_device_is_ready(state, machines, bundles):
    asyncio.run(_edge_dies(state, "tcp", machines, bundles))


@pytest.mark.parametrize("state", _some(WIRED, [("infer",)]))
def test_the_edge_dies_at_the_other_end_of_a_cable(state, machines, bundles):
    asyncio.run(_edge_dies(state, "serial", machines, bundles))


async def _edge_dies(state, carrier, machines, bundles):
    async with Scene(machines, bundles, carrier) as scene:
        await scene.reach(state)
        scene.line.become(Faults() if carrier == "tcp" else Faults(rate=92_160))
        since = kill(scene.edge)
        await soon(lambda: scene.infer("local"), since)  # an app is answered all the while
        await idle(scene.agent, since)
        machines.unharmed()
        scene.edge = await machines.edge(*scene.more)
        if state == "fetch":
            await until(lambda: scene.fetched("shoal"))
        await soon(lambda: scene.infer("edge"), time.monotonic())
        if state.startswith("update"):
            await until(lambda: "large" in read_status(machines.folder / "d/device/updates")["active"], 30.0)
            machines.unharmed()


# Pairing


GUESTS = [
    (victim, way, at)
    for victim in ("device", "edge")
    for way, places in (("sent", PAIRING), ("answered", ANSWERS))
    for at in places
]
FEW = [("device", "sent", _CARD), ("edge", "answered", ANSWERS[-1])]


@pytest.mark.parametrize("victim, way, at", _some(GUESTS, FEW))
def test_one_dies_while_they_pair(victim, way, at, machines):
    async def main():
        edge = await machines.edge()
        async with Proxy("127.0.0.1", machines.port) as proxy:
            address = f"127.0.0.1:{proxy.port}"
            swallow = Faults(swallow=at)
            proxy.become(*((swallow, Faults()) if way == "sent" else (Faults(), swallow)))
            code, window = machines.code()
            with window:
                device = machines.start("d", "pair", address, code, "--name", "dev")
                await still(proxy)
                proxy.become(Faults())
                since = kill(device if victim == "device" else edge)
                proxy.reset_all()  # one side may have said its last word, and gone, before
                if victim == "device":
                    await idle(edge, since)
                else:
                    await asyncio.to_thread(device.wait, READY)
                    assert device.returncode == LinkError.code, device.log.read_text()
                    edge = await machines.edge()
            machines.unharmed()
            peers = machines.folder / "d/device/peers"
            assert not peers.exists() or not Peers.open(peers).list()
            code, window = machines.code()  # and a new code pairs
            with window:
                device = machines.start("d", "pair", f"127.0.0.1:{machines.port}", code, "--name", "dev")
                assert await asyncio.to_thread(device.wait, 20) == 0, device.log.read_text()
            assert [peer.name for peer in Peers.open(machines.folder / "e/edge/peers").list()] == ["dev"]
            await idle(edge, time.monotonic())

    asyncio.run(main())
