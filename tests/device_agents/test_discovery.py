"""Multicast DNS on the loopback interface: what is announced is found, what is claimed is tamed, no secret leaves."""

import asyncio
import sys

import pytest

from shoal.device_agents import discovery
from shoal.device_agents.links import Address
from shoal.runtime.errors import MissingPackageError, UsageError

LOOPBACK = ["127.0.0.1"]


def test_an_edge_is_found_with_its_window_and_gone_after():
    async def main():
        announcement = await discovery.announce("kitchen.edge", 4711, "ABCD-EFGH-IJKL-MNOP", interfaces=LOOPBACK)
        try:
            found = await discovery.search(0.6, interfaces=LOOPBACK)
            if not found:
                pytest.skip("no multicast on this machine's loopback")
            assert [each for each in found if each.name == "kitchen-edge"] == [
                discovery.Found("kitchen-edge", (Address("tcp", "127.0.0.1", 4711),), "ABCD-EFGH", 1, False)
            ]
            await announcement.pairing(True)
            found = await discovery.search(0.6, interfaces=LOOPBACK)
            assert [each.pairing for each in found if each.name == "kitchen-edge"] == [True]
        finally:
            await announcement.close()
        found = await discovery.search(0.3, interfaces=LOOPBACK)
        assert not [each for each in found if each.name == "kitchen-edge"]

    asyncio.run(main())


class Claim:
    """What an attacker announces."""

    port = 1

    def __init__(self, **properties):
        self.properties = {key.encode(): value for key, value in properties.items()}

    def parsed_scoped_addresses(self):
        return ["10.0.0.1"] * 50


@pytest.mark.parametrize(
    "properties, id, version",
    [
        ({}, "", 0),
        (dict(v=b"9" * 5000, id=b"\xff\0", pairing=None), "", 0),
        (dict(v=b"2", id=b"ABCD-2222\x1b[31m" + b"A" * 900, pairing=b"yes"), "ABCD-2222", 2),
        (dict(v="²".encode(), id=b"a"), "", 0),
    ],
)
def test_claims_are_tamed(properties, id, version):
    found = discovery._read("na\x1b[1mme\n" + "x" * 500 + "." + discovery.SERVICE, Claim(**properties))
    assert found is not None and found.name.isprintable() and len(found.name) <= 63
    assert (found.id, found.version, found.pairing) == (id, version, False)
    assert len(found.addresses) <= 8
    assert discovery._read("\x1b." + discovery.SERVICE, Claim()) is None


def test_without_zeroconf_a_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    with pytest.raises(MissingPackageError):
        asyncio.run(discovery.search(0.1))


def test_a_wrong_port_is_refused():
    with pytest.raises(UsageError):
        asyncio.run(discovery.announce("edge", 0, "", interfaces=LOOPBACK))
