"""Every flow over links that misbehave, real loopback and a real pseudo-terminal pair: it ends inside its deadline, by
success, by going on where it was cut, or by an answer of the device's own; nothing is done twice, nothing is left, and
the same edge then serves a link that works. `--deep` runs every fault with every flow; without it, one of each kind.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass

import flows
import pytest
from faults import Faults
from flows import Bundles, Ground, until

from shoal.device_agents import endpoint
from shoal.device_agents.language import Language
from shoal.device_agents.split_model import EdgeModel
from shoal.runtime.errors import LinkError, TrustError

KB = 1024.0
SLOW = 150.0  # seconds for 100 KB at 1 KB/s, with what comes beside it


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a link. `mild`: every flow must come to its end over it, over those carriers at least."""

    name: str
    forward: Faults
    backward: Faults | None = None
    mild: tuple[str, ...] = ()
    deadline: float = 12.0


BOTH = ("tcp", "serial")
TROUBLES = [
    Trouble("none", Faults(), mild=BOTH),
    Trouble("delay", Faults(delay=0.05), mild=BOTH),
    Trouble("jitter", Faults(delay=0.005, jitter=0.04), mild=BOTH),
    Trouble("64 KB/s", Faults(rate=64 * KB), mild=BOTH),
    Trouble("10 KB/s", Faults(rate=10 * KB), mild=BOTH, deadline=30.0),
    Trouble("1 KB/s", Faults(rate=1 * KB), mild=BOTH, deadline=SLOW),
    Trouble("stalls", Faults(stalls=((300, 0.5), (1500, 0.5), (4000, 1.0), (20_000, 1.0))), mild=BOTH),
    *(
        Trouble(f"errors {rate:g}", Faults(errors=rate, seed=7), mild=BOTH if rate < 1e-5 else ("serial",),
                deadline=12.0 if rate < 1e-3 else 40.0)
        for rate in (1e-6, 1e-5, 1e-4, 1e-3)
    ),
    Trouble("losses", Faults(losses=3e-4, seed=3), mild=("serial",)),
    Trouble("duplicates", Faults(duplicates=0.05, seed=5), mild=("serial",)),
    Trouble("noise", Faults(noise=bytes(range(256))), mild=("serial",)),
    # Over TCP each of these happens to every connection anew; a serial port vanishes for good
    *(Trouble(f"cut {at}", Faults(cut=at)) for at in (0, 5, 200, 1500, 6000)),
    *(Trouble(f"reset {at}", Faults(reset=at)) for at in (0, 5, 200, 1500, 6000, 30_000)),
    *(Trouble(f"cut {at} backward", Faults(), Faults(cut=at)) for at in (5, 200, 1500, 6000)),
    *(Trouble(f"reset {at} backward", Faults(), Faults(reset=at)) for at in (5, 200, 1500, 6000, 30_000)),
    *(Trouble(f"half-open {at}", Faults(swallow=at), deadline=4.0) for at in (5, 200, 1500, 6000)),
    *(Trouble(f"half-open {at} backward", Faults(), Faults(swallow=at), deadline=4.0) for at in (5, 200, 1500, 6000)),
]  # fmt: skip

QUICK = {  # what runs without --deep: each flow, each carrier, each kind
    ("infer", "tcp"): ("jitter", "errors 0.0001", "reset 6000", "half-open 6000 backward"),
    ("infer", "serial"): ("errors 0.0001", "cut 6000"),
    ("pairing", "tcp"): ("delay", "duplicates", "cut 200", "reset 200 backward", "half-open 200 backward"),
    ("pairing", "serial"): ("noise", "errors 0.001"),
    ("fetch", "tcp"): ("64 KB/s", "reset 30000 backward", "half-open 6000 backward"),
    ("fetch", "serial"): ("losses", "duplicates", "reset 6000"),
    ("text", "tcp"): ("delay", "reset 6000", "cut 6000 backward"),
    ("text", "serial"): ("errors 0.0001",),
    ("story", "tcp"): ("reset 6000 backward",),
    ("story", "serial"): ("errors 0.0001",),
    ("update", "tcp"): ("reset 30000 backward",),
    ("update", "serial"): ("losses",),
}


def cells() -> list:
    found = []
    for trouble in TROUBLES:
        for flow, carrier in QUICK:
            marks = () if trouble.name in QUICK[flow, carrier] else pytest.mark.deep
            found.append(pytest.param(flow, carrier, trouble, id=f"{flow}-{carrier}-{trouble.name}", marks=marks))
    return found


@pytest.fixture(scope="module")
def bundles(tiny_folder, tmp_path_factory) -> Bundles:
    made = Bundles.make(tmp_path_factory.mktemp("bundles"), tiny_folder)

    async def once():  # what is opened once a process, such as libraries, is no leak
        async with Ground(tmp_path_factory.mktemp("once"), "tcp", made, Faults()) as ground:
            ground._open = []
            await flows.text(ground, 20.0)
            ground._open = flows.descriptors()

    return made


@pytest.mark.parametrize("flow, carrier, trouble", cells())
def test_a_flow_over_a_link_that_misbehaves(flow, carrier, trouble, bundles, tmp_path):
    problems: list[dict] = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        async with Ground(tmp_path, carrier, bundles, trouble.forward, trouble.backward) as ground:
            if "half-open" in trouble.name:
                ground.limits = flows.QUICK
            outcome = await getattr(flows, flow)(ground, trouble.deadline)
            print(outcome)
            late = flow in ("infer", "story") and (trouble.forward.rate or trouble.forward.stalls)
            if carrier in trouble.mild and not late:
                assert outcome in ("done", "resumed")
            await ground.heal()
            await ground.serves()

    asyncio.run(main())
    assert not problems


@pytest.mark.parametrize("step", [101, pytest.param(1, marks=pytest.mark.deep)])
@pytest.mark.parametrize("end", ["cut", "reset"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_handshake_that_ends_at_any_byte(way, end, step, bundles, tmp_path):
    """Pairing and TLS with the first Hello, up to each byte of either side: both ends know at once, and nothing stays.
    An edge that had said its last word in time has paired; the device then pairs again with a new code."""

    async def main():
        async with Ground(tmp_path, "tcp", bundles, Faults()) as ground:
            listener = ground.edge._listener

            async def pair():
                code = ground.edge.open_window().code
                await endpoint.pair(ground.address, code, ground.identity, ground.peers, 5.0)
                for peer in ground.peers.list():
                    ground.peers.revoke(peer)

            async def greet():
                await (await endpoint.dial(ground.address, ground.identity, ground.peers, 5.0)).close()

            for talk in (pair, greet):
                if talk is greet:
                    ground.know_each_other()
                ground.line.become(Faults())
                before = ground.line.bytes
                await talk()
                total = ground.line.bytes[way == "backward"] - before[way == "backward"]
                for at in range(0, total, step):
                    ends = Faults(**{end: at}), Faults()
                    ground.line.become(*(ends if way == "forward" else ends[::-1]))
                    began = time.monotonic()
                    try:
                        await talk()
                        assert at > total - 200, "more was needed"  # farewells and tickets
                    except (LinkError, TrustError):
                        pass
                    assert time.monotonic() - began < 3.0
                    await until(lambda: not listener._shaking and not listener.connections, 3.0)
                    assert len(ground.edge.peers.list()) <= 1
            await ground.heal()
            await ground.serves()

    asyncio.run(main())


def test_an_edge_that_falls_silent_in_a_text_is_not_waited_for(bundles, tmp_path, monkeypatch):
    """Half-open in the middle: the device's own model goes on with the next token, long before the link is given up."""
    monkeypatch.setattr("shoal.device_agents.texts._SILENT", 1.0)

    async def main():
        async with Ground(tmp_path, "tcp", bundles, Faults()) as ground:
            ground.edge.store.add(bundles.whole, "story")
            async with ground.agent(models={"story": bundles.whole}, memory="64MB") as agent:
                await until(lambda: agent._remote.agreement is not None)
                ground.line.become(Faults(), Faults(rate=1000))
                began, pieces = time.monotonic(), []
                async for piece in agent.generate("abc", "story", max_tokens=flows.TOKENS):
                    pieces.append(piece)
                    if len(pieces) == 3:
                        ground.line.become(Faults(), Faults(swallow=0))
                assert time.monotonic() - began < 8.0
                assert [piece.id for piece in pieces] == bundles.story
                assert pieces[0].where == "edge" and pieces[-1].where == "local"
            await ground.heal()
            await ground.serves()

    asyncio.run(main())


def test_an_answer_that_nobody_reads_is_not_computed_to_its_end(bundles, tmp_path, monkeypatch):
    """The device dies in the middle of a long answer: the edge stops within three seconds, and who comes back gets the
    same tokens."""
    start, slow = Language._start, []

    class Slow:
        """A generation that takes its time."""

        def __init__(self, generation):
            self.generation, self.made = generation, 0
            slow.append(self)

        def __next__(self):
            time.sleep(0.15)
            self.made += 1
            return next(self.generation)

        def cancel(self):
            self.generation.cancel()

    async def started(self, model, message):
        return Slow(await start(self, model, message))

    monkeypatch.setattr(Language, "_start", started)

    async def main():
        async with Ground(tmp_path, "tcp", bundles, Faults()) as ground:
            ground.edge.store.add(bundles.whole, "story")
            ground.know_each_other()
            model, found = EdgeModel(ground.link, "story"), []
            async with contextlib.aclosing(model.generate(flows.PROMPT, max_tokens=50)) as answer:
                async for piece in answer:
                    found.append(piece.id)
                    if len(found) == 2:
                        break
                ground.line.reset_all()
                async with asyncio.timeout(3.0):
                    while ground.edge.answers._language._answers:
                        await asyncio.sleep(0.05)
                made = slow[0].made
                await asyncio.sleep(0.4)
                assert slow[0].made - made <= 1 and made < 30
                async for piece in answer:
                    found.append(piece.id)
                    if len(found) == 6:
                        break
            assert found == bundles.tokens[:6]

    asyncio.run(main())
