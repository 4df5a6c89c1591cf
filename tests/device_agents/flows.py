"""What a device does with its edge, flow by flow, over a link that may misbehave: for tests.

    async with Ground(folder, "tcp", bundles, faults) as ground:
        outcome = await fetch(ground, deadline=12.0)      # "done", "resumed", "local", or the name of an error's family

A flow ends by its deadline, checks that what came is right and that nothing was done twice, and leaves nothing.
"""

import asyncio
import contextlib
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from faults import Cable, Faults, Proxy
from paired import small_network

import shoal
from shoal.device_agents import endpoint, install, manifest, messages
from shoal.device_agents.agent import Agent, App
from shoal.device_agents.edge import Edge
from shoal.device_agents.health import Sensors
from shoal.device_agents.home import private_folder, write_atomically
from shoal.device_agents.identity import Identity
from shoal.device_agents.protocol import Limits
from shoal.device_agents.split_model import SplitModel
from shoal.device_agents.store import Store
from shoal.device_agents.trust import Peer, Peers
from shoal.device_agents.update import Updater, boot_id
from shoal.device_agents.vendor import Vendor
from shoal.runtime.bundle import create
from shoal.runtime.errors import LinkError, ShoalError, TrustError
from shoal.runtime.language.part import load_part

PROMPT, TOKENS = [5, 99, 7, 201, 33, 8, 150], 12
BAUD = 921_600
GRACE = 1.5  # seconds that a crowded machine may take to notice that a deadline has passed
QUICK = Limits(keep_alive=0.5, silence=2.0)  # for who cannot wait half a minute for a half-open link to be noticed


@dataclass(frozen=True)
class Bundles:
    """What edge and device have: paths, and what an undisturbed run answers."""

    tail: Path
    device: Path
    images: np.ndarray
    logits: np.ndarray
    front: Path
    rest: Path
    whole: Path
    tokens: list[int]
    story: list[int]
    some: Path  # a bundle of some tens of kilobytes
    some_more: Path

    @classmethod
    def make(cls, folder: Path, tiny: Path) -> "Bundles":
        tail, device, _, images, logits = small_network(folder)
        for name, blocks in (("front", "0:2"), ("rest", "2:3"), ("whole", None)):
            shoal.convert(tiny, folder / name, "fp32", blocks=blocks, check_parity=False)
        with shoal.load(folder / "whole", context=64) as model:
            tokens = [token.id for token in model.generate(PROMPT, max_tokens=TOKENS, ignore_end=True)]
            story = [token.id for token in model.generate("abc", max_tokens=TOKENS)]
        for name, size in (("some", 40_000), ("more", 100_000)):
            with create(folder / f"{name}.shoal") as writer:
                writer.add("weights", "weights", np.random.default_rng(size).bytes(size))
                writer.commit()
        parts = (folder / name for name in ("front", "rest", "whole"))
        return cls(tail, device, images, logits, *parts, tokens, story, folder / "some.shoal", folder / "more.shoal")


def descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}").split(":[")[0])
    return sorted(found)


class Ground:
    """A real edge that listens on loopback and on a cable, and a device whose way there, `address`, has faults."""

    def __init__(self, folder: Path, carrier: str, bundles: Bundles, forward: Faults, backward: Faults | None = None):
        self.folder, self.carrier, self.bundles = folder, carrier, bundles
        self.identity, self.peers = Identity.open(folder / "device", "device"), Peers.open(folder / "device/peers")
        self.links: list = []
        self.limits: Limits | None = None
        self._faults = forward, backward or forward
        self.rate = forward.rate
        self._baud = round(forward.rate * 10) if forward.rate else BAUD

    async def __aenter__(self) -> "Ground":
        gc.collect()
        self._tasks, self._open = asyncio.all_tasks(), descriptors()
        self._stack = contextlib.AsyncExitStack()
        listen = ["127.0.0.1:0"]
        if self.carrier == "serial":
            paced = [faults if faults.rate else faults.of(BAUD) for faults in self._faults]
            self.line = await self._stack.enter_async_context(Cable(*paced))
            listen.append(f"serial:{self.line.a}?baud={self._baud}")
            self.address = f"serial:{self.line.b}?baud={self._baud}"
            self.line.become(paced[1], paced[0])  # the device is at its far end
        self.edge = Edge(self.folder / "edge", listen, name="oak", threads=1, announce=False)
        for path in (self.bundles.tail, self.bundles.rest, self.bundles.some):
            self.edge.store.add(path)
        await self.edge.start()
        self._stack.push_async_callback(self.edge.stop, 0.0)
        self.direct = str(self.edge.addresses[0])
        if self.carrier == "tcp":
            port = self.edge.addresses[0].port
            self.line = await self._stack.enter_async_context(Proxy("127.0.0.1", port, *self._faults))
            self.address = f"127.0.0.1:{self.line.port}"
        return self

    async def __aexit__(self, *error) -> None:
        for link in self.links:
            await link.close()
        await self._stack.aclose()
        if error[0] is None:
            # Threads that close what they read from may take their time on a busy machine
            until = time.monotonic() + 2
            while (asyncio.all_tasks() - self._tasks or descriptors() != self._open) and time.monotonic() < until:
                await asyncio.sleep(0.02)
                gc.collect()
            left = asyncio.all_tasks() - self._tasks
            assert not left, left
            assert descriptors() == self._open

    def know_each_other(self) -> None:
        own = self.edge.identity
        self.peers.add(Peer.of(own.certificate, own.name, "edge"))
        self.edge.peers.add(Peer.of(self.identity.certificate, "device", "device", rights={"infer", "update"}))

    async def link(self, timeout: float = 5.0):
        """The device's link, dialled anew where it broke."""
        if not self.links or self.links[-1].reason is not None:
            self.links.append(await endpoint.dial(self.address, self.identity, self.peers, timeout, limits=self.limits))
        return self.links[-1]

    @contextlib.asynccontextmanager
    async def agent(self, **options):
        self.know_each_other()
        options = {"threads": 1, "window": 0.2, "sensors": Sensors(self.folder)} | options
        async with Agent(self.folder / "device", self.address, **options) as agent:
            yield agent

    @property
    def unplugged(self) -> bool:
        return self.carrier == "serial" and not self.line._masters

    async def heal(self) -> None:
        """The line works from now on; one that was unplugged is left alone."""
        for link in self.links:
            await link.close()
        self.line.become(Faults() if self.carrier == "tcp" else Faults(rate=self._baud / 10))
        if self.carrier == "tcp":
            self.line.reset_all()

    async def serves(self) -> None:
        """The edge still serves whoever comes over a link that works, and nothing of before is under way."""
        await until(lambda: not self.edge.snapshot()["requests"]["running"], 5.0)
        self.know_each_other()
        for address in {self.direct, self.direct if self.unplugged else self.address}:
            async with asyncio.timeout(10.0):
                async with await endpoint.dial(address, self.identity, self.peers) as connection:
                    listed = await connection.ask(messages.ListModels())
                    assert len(listed.models) == len(self.edge.store.list())


async def until(condition, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def within(seconds: float):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + GRACE


# Flows. Each returns how it ended.


async def infer(ground: Ground, deadline: float) -> str:
    """Three pictures by an app: every answer is right and in time, from the edge or from here."""
    bundles, where = ground.bundles, []
    async with ground.agent(models={"cats": bundles.device}) as agent:
        with App(agent.folder / "agent.sock") as app:
            with contextlib.suppress(TimeoutError):
                await until(lambda: agent._remote.agreement is not None, min(3.0, deadline / 3))
            for index in range(3):
                image = {"image": bundles.images[index : index + 1]}
                with within(1.0):
                    answer = await asyncio.to_thread(app.infer, image, 1.0)
                np.testing.assert_allclose(
                    answer.outputs["logits"], bundles.logits[index : index + 1], atol=1e-4, strict=True
                )
                where.append(answer.where)
            await ground.heal()
            if not ground.unplugged:  # and back to the edge by itself
                longer = 1.0 if ground.rate is None or ground.rate > 8192 else 10.0  # 4 KB of latent take their time
                async with asyncio.timeout(45.0):
                    while (await asyncio.to_thread(app.infer, image, longer)).where != "edge":
                        await asyncio.sleep(0.1)
    return "done" if where == ["edge"] * 3 else "local"


async def pairing(ground: Ground, deadline: float) -> str:
    """A code, then another where that failed: never two peers, and no device that believes what the edge does not."""
    paired, tell = [], ground.edge._paired

    def count(peer):
        paired.append(peer)
        tell(peer)

    ground.edge._listener._on_paired = count
    window = ground.edge.open_window()
    until_then, outcome = time.monotonic() + deadline, ""
    while not outcome:
        try:
            left = until_then - time.monotonic()
            with within(left):
                await endpoint.pair(ground.address, window.code, ground.identity, ground.peers, min(4.0, left))
            assert len(paired) == 1 and len(ground.peers.list()) == 1
            outcome = "done"
        except (LinkError, TrustError) as error:
            assert not ground.peers.list() and len(paired) == window.used <= 1
            await asyncio.sleep(0.05)
            if window.state(asyncio.get_running_loop().time()) != "open" or time.monotonic() > until_then - 0.2:
                outcome = type(error).__name__
    await ground.heal()
    if outcome != "done":
        address = ground.direct if ground.unplugged else ground.address
        await endpoint.pair(address, ground.edge.open_window().code, ground.identity, ground.peers, 10.0)
    assert [peer.fingerprint for peer in ground.edge.peers.list()] == [ground.identity.fingerprint]
    return outcome


async def fetch(ground: Ground, deadline: float) -> str:
    """A bundle, gone on with from where it was cut, never begun again; its bytes are those of the edge."""
    ground.know_each_other()
    store = Store(ground.folder / "device/models")
    digest = next(entry.digest for entry in ground.edge.store.list() if entry.role == "")
    partial, offsets, outcome = store.path(digest).with_suffix(".partial"), [0], ""
    until_then = time.monotonic() + deadline
    while not outcome:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + until_then - time.monotonic()):
                await install.fetch(await ground.link(), store, digest)
            outcome = "resumed" if len(offsets) > 1 else "done"
        except (TimeoutError, ShoalError) as error:
            assert not isinstance(error, ShoalError) or isinstance(error, LinkError | TrustError)
            have = partial.stat().st_size if partial.exists() else 0
            assert have >= offsets[-1]
            if have > offsets[-1]:
                offsets.append(have)
            if ground.unplugged or time.monotonic() > until_then - 0.1:
                outcome = type(error).__name__
            await asyncio.sleep(0.05)
    assert time.monotonic() - until_then < GRACE
    if outcome in ("done", "resumed"):
        assert store.path(digest).read_bytes() == ground.bundles.some.read_bytes()
        assert [entry.digest for entry in store.list()] == [digest] and not partial.exists()
    return outcome


async def text(ground: Ground, deadline: float) -> str:
    """Blocks here, the rest there: the tokens of an undisturbed run, and no position of the edge's cache twice."""
    ground.know_each_other()
    ids, outcome = [], "done"
    with load_part(ground.bundles.front, context=64, chunk=4) as front:
        model = SplitModel(front, ground.link, timeout=deadline, patience=deadline)
        try:
            with within(deadline):
                async with asyncio.timeout(deadline):
                    async for piece in model.generate(PROMPT, max_tokens=TOKENS, ignore_end=True):
                        ids.append(piece.id)
        except (TimeoutError, LinkError, TrustError) as error:
            outcome = type(error).__name__
        assert ids == ground.bundles.tokens[: len(ids)] and (outcome != "done" or len(ids) == TOKENS)
        links = len(ground.links)
        await ground.heal()
        language = ground.edge.answers._language
        for rest in language._open.values() if language else ():
            [session] = rest.sessions._table.values()
            await until(lambda: not session.calls)  # noqa: B023
            assert session.held <= len(PROMPT) + TOKENS - 1 and (outcome != "done" or session.held >= TOKENS)
    return "resumed" if outcome == "done" and links > 1 else outcome


async def story(ground: Ground, deadline: float) -> str:
    """An app's text from the edge's model: every token, by the edge or from there on by the same model here."""
    bundles, seconds = ground.bundles, max(deadline, 30.0)
    ground.edge.store.add(bundles.whole, "story")
    async with ground.agent(models={"story": bundles.whole}, memory="64MB") as agent:
        with contextlib.suppress(TimeoutError):
            await until(lambda: agent.connection is not None, 2.0)

        def read() -> list:
            with App(agent.folder / "agent.sock") as app:
                return [*app.generate("abc", "story", max_tokens=TOKENS, deadline=seconds)]

        with within(seconds):
            pieces = await asyncio.to_thread(read)
        assert [piece.id for piece in pieces] == bundles.story and pieces[-1].finish
        places = [piece.where for piece in pieces]
        assert places == sorted(places)  # the edge, and from some place on here
    return "done" if places[-1] == "edge" else "local"


async def update(ground: Ground, deadline: float) -> str:
    """A signed release: whole and switched to once, or not at all."""
    vendor = Vendor.create(ground.folder / "vendor", time.time())
    target = vendor.sign({"more": ground.bundles.some_more}, now=time.time()).targets.content.models["more"]
    ground.edge.store.add(vendor.path(target), "more")
    write_atomically(ground.edge.folder / "manifest.json", vendor.encoded())
    with Updater(private_folder(ground.folder / "device") / "updates", boot_id()) as updater:
        updater.pin(manifest.encode_root(vendor.roots[0]))
    async with ground.agent() as agent:
        updater, done = agent._installer.updater, []
        for step in ("switch", "confirm", "fail"):
            setattr(updater, step, _counted(getattr(updater, step), done, step))
        outcome = "done"
        try:
            await until(lambda: updater.state.active, deadline)
        except TimeoutError:
            outcome = "TimeoutError"
        await ground.heal()
        if not ground.unplugged:
            await until(lambda: updater.state.active, 60.0)
            assert done == ["switch", "confirm"] and updater.state.active == {"more": target.digest}
            assert updater.models["more"].read_bytes() == ground.bundles.some_more.read_bytes()
            assert len(list((ground.folder / "device/updates/models").iterdir())) == 1
    return outcome


def _counted(step, done: list[str], name: str):
    def work(*arguments):
        done.append(name)
        return step(*arguments)

    return work
