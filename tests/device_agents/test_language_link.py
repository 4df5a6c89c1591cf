"""A model in two parts, and a whole one, over a real edge's real links, which are reset while it speaks."""

import asyncio

import pytest
from faults import Faults, Proxy

import shoal
from shoal.device_agents import endpoint
from shoal.device_agents.edge import Edge
from shoal.device_agents.identity import Identity
from shoal.device_agents.split_model import EdgeModel, SplitModel
from shoal.device_agents.trust import Peer, Peers
from shoal.runtime.errors import LinkError, TrustError
from shoal.runtime.language.part import load_part

PROMPT = [5, 99, 7, 201, 33, 8, 150]


@pytest.fixture(scope="module")
def bundles(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    for name, blocks in (("front", "0:2"), ("rest", "2:3"), ("whole", None)):
        shoal.convert(tiny_folder, folder / name, "fp32", blocks=blocks, check_parity=False)
    return folder


@pytest.fixture(scope="module")
def expected(bundles):
    with shoal.load(bundles / "whole", context=128) as model:
        return [token.id for token in model.generate(PROMPT, max_tokens=40, ignore_end=True)]


class Device:
    """Keeps a link to an edge through a proxy, as an agent does."""

    def __init__(self, edge, proxy, folder, rights=frozenset({"infer"})):
        self.identity, self.peers = Identity.open(folder, "device"), Peers.open(folder / "peers")
        self.peers.add(Peer.of(edge.identity.certificate, edge.identity.name, "edge"))
        edge.peers.add(Peer.of(self.identity.certificate, "device", "device", rights=rights))
        self.proxy, self.links = proxy, []

    async def __call__(self):
        if not self.links or self.links[-1].reason is not None:
            address = f"{self.proxy.host}:{self.proxy.port}"
            self.links.append(await endpoint.dial(address, self.identity, self.peers, 5.0))
        return self.links[-1]

    async def close(self):
        for link in self.links:
            await link.close()


async def talk(bundles, tmp_path, faults, work, **options):
    """Runs `work(device, front, proxy)` against a running edge that has the rest and the whole."""
    edge = Edge(tmp_path / "edge", ["127.0.0.1:0"], name="oak", threads=1)
    for name in ("rest", "whole"):
        edge.store.add(bundles / name, name)
    await edge.start()
    try:
        address = edge.addresses[0]
        async with asyncio.timeout(60), Proxy(address.host, address.port, faults) as proxy:
            device = Device(edge, proxy, tmp_path / "device", **options)
            with load_part(bundles / "front", context=128, chunk=4) as front:
                try:
                    return await work(device, front, proxy)
                finally:
                    await device.close()
    finally:
        await edge.stop(0.0)


@pytest.mark.parametrize("format", ["float32", "float16"])
def test_the_same_tokens_while_links_are_reset(bundles, expected, tmp_path, format):
    async def work(device, front, proxy):
        found = []
        async for piece in SplitModel(front, device, format=format).generate(PROMPT, max_tokens=40, ignore_end=True):
            found.append(piece)
            if len(found) % 7 == 3:
                proxy.reset_all()
        assert [piece.id for piece in found] == expected and {piece.where for piece in found} == {"oak"}
        assert len(device.links) == 7
        found = []
        async for piece in EdgeModel(device, "whole").generate(PROMPT, max_tokens=40):
            found.append(piece.id)
            if len(found) % 7 == 3:
                proxy.reset_all()
        assert found == expected[: len(found)] and len(found) >= 3

    asyncio.run(talk(bundles, tmp_path, Faults(), work))


def test_a_line_that_breaks_after_some_bytes_each_time(bundles, expected, tmp_path):
    """A link that never lives for longer than a handshake and some tokens: the text goes on from where it was."""

    async def work(device, front, proxy):
        pieces = [p async for p in SplitModel(front, device).generate(PROMPT, max_tokens=24, ignore_end=True)]
        assert [piece.id for piece in pieces] == expected[:24]
        assert len(device.links) > 2

    asyncio.run(talk(bundles, tmp_path, Faults(reset=4000), work))


def test_no_link_and_no_right(bundles, tmp_path):
    async def work(device, front, proxy):
        model = SplitModel(front, device, patience=0.3)
        with pytest.raises(TrustError):
            async for _ in model.generate(PROMPT, max_tokens=2):
                pass
        with pytest.raises(TrustError):
            async for _ in EdgeModel(device, "whole", patience=0.3).generate(PROMPT, max_tokens=2):
                pass
        proxy.become(Faults(reset=0))
        proxy.reset_all()
        for broken in (model, EdgeModel(device, "whole", patience=0.3)):
            with pytest.raises(LinkError):
                async for _ in broken.generate(PROMPT, max_tokens=2):
                    pass

    asyncio.run(talk(bundles, tmp_path, Faults(), work, rights=frozenset()))
