"""TLS between pinned certificates, both sides in one process and every byte between them ours to spoil."""

import contextlib
import datetime
import random
import ssl
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shoal.device_agents.identity import Identity
from shoal.device_agents.secure import OVERHEAD, RECORD, Secure
from shoal.runtime.errors import LinkError, TrustError


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    return [Identity.open(folder / name, name) for name in ("device", "edge", "stranger")]


def sides(device, edge, device_pins=None, edge_pins=None):
    device_pins = [edge.certificate] if device_pins is None else device_pins
    edge_pins = [device.certificate] if edge_pins is None else edge_pins
    return Secure(device, lambda: device_pins, False), Secure(edge, lambda: edge_pins, True)


def shake(client, server):
    """Carries flights to and fro until there are none; returns how many bytes each side sent."""
    sent = [0, 0]
    while True:
        forth = client.outgoing()
        if forth:
            server.receive(forth)
        back = server.outgoing()
        if back:
            client.receive(back)
        if not forth and not back:
            return sent
        sent = [sent[0] + len(forth), sent[1] + len(back)]


def test_a_session(people):
    device, edge, stranger = people
    client, server = sides(device, edge, edge_pins=[stranger.certificate, device.certificate])
    sent = shake(client, server)
    assert client.ready and server.ready
    assert (client.fingerprint, server.fingerprint) == (edge.fingerprint, device.fingerprint)
    assert sum(sent) < 1600  # the rest of 2 KiB is for the pairing
    data = random.Random(1).randbytes(100_000)
    client.send(data)
    wire = client.outgoing()
    assert len(wire) == len(data) + OVERHEAD * -(-len(data) // RECORD)
    assert server.receive(wire) == data
    server.send(b"back")
    assert client.receive(server.outgoing()) == b"back"


def test_byte_by_byte(people):
    client, server = sides(*people[:2])
    for _ in range(3):
        for byte in client.outgoing():
            assert server.receive(bytes([byte])) == b""
        for byte in server.outgoing():
            assert client.receive(bytes([byte])) == b""
    client.send(b"hello")
    assert b"".join(server.receive(bytes([byte])) for byte in client.outgoing()) == b"hello"


def test_the_client_is_done_before_the_server_has_judged(people):
    """The trap of TLS 1.3, as it is: whoever stops here believes in a session that never was."""
    device, edge, stranger = people
    client, server = sides(device, edge, edge_pins=[stranger.certificate])
    server.receive(client.outgoing())
    client.receive(server.outgoing())
    assert client.ready
    with pytest.raises(TrustError, match="The peer is not trusted"):
        server.receive(client.outgoing())
    with pytest.raises(TrustError, match="does not trust this side"):
        client.receive(server.outgoing())


def test_a_wrong_server_is_refused_and_hears_of_it(people):
    device, edge, stranger = people
    client, server = sides(device, edge, device_pins=[stranger.certificate])
    server.receive(client.outgoing())
    with pytest.raises(TrustError, match="The peer is not trusted"):
        client.receive(server.outgoing())
    assert not client.ready
    with pytest.raises(TrustError, match="does not trust this side"):
        server.receive(client.outgoing())


def test_one_revoked_during_the_handshake_is_refused(people):
    device, edge, stranger = people
    pins = [device.certificate, stranger.certificate]
    client = Secure(device, lambda: [edge.certificate], False)
    server = Secure(edge, lambda: list(pins), True)
    server.receive(client.outgoing())
    client.receive(server.outgoing())
    pins.remove(device.certificate)
    with pytest.raises(TrustError):
        server.receive(client.outgoing())
    assert not server.ready


def test_nobody_paired_is_said_at_once(people):
    with pytest.raises(TrustError, match="No peer is paired"):
        Secure(people[0], lambda: [], False)


@dataclass(frozen=True)
class Forged:
    certificate: bytes
    certificate_path: Path
    key_path: Path


def forge(folder, key=None, issuer=None, issuer_key=None, ca=False, first=1990, last=2040):
    """A certificate as anybody could make one."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"forged {random.random()}")])
    parent = x509.load_der_x509_certificate(issuer).subject if issuer else name
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(parent)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(datetime.datetime(first, 1, 1))
        .not_valid_after(datetime.datetime(last, 1, 1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(issuer_key or key, hashes.SHA256())
    )
    folder.mkdir()
    pem, private = folder / "c.pem", folder / "k.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return Forged(certificate.public_bytes(serialization.Encoding.DER), pem, private)


@pytest.mark.parametrize("ca", [False, True], ids=["leaf", "authority"])
def test_what_a_pinned_key_has_signed_is_not_the_pin(people, tmp_path, ca):
    edge = people[1]
    key = ec.generate_private_key(ec.SECP256R1())
    pinned = forge(tmp_path / "pinned", key, ca=ca)
    child = forge(tmp_path / "child", issuer=pinned.certificate, issuer_key=key)
    client, server = sides(child, edge, edge_pins=[pinned.certificate])
    server.receive(client.outgoing())
    client.receive(server.outgoing())
    with pytest.raises(TrustError):
        server.receive(client.outgoing())
    assert not server.ready


@pytest.mark.parametrize(("first", "last"), [(1990, 2001), (2900, 2950)], ids=["expired", "not yet"])
def test_no_clock_is_asked(people, tmp_path, first, last):
    device = forge(tmp_path / "d", first=first, last=last)
    client, server = sides(device, people[1])
    shake(client, server)
    assert client.ready and server.ready


class Lowered:
    """A peer that speaks TLS 1.2 and no later."""

    def __init__(self, identity, peer, server):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(identity.certificate_path, identity.key_path)
        context.load_verify_locations(cadata=peer.certificate)
        self.into, self.out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.into, self.out, server_side=server)

    def step(self, data=b""):
        self.into.write(data)
        try:
            self.tls.do_handshake()
        except ssl.SSLError:
            pass
        return self.out.read()


def test_tls_1_2_is_refused(people):
    device, edge, _ = people
    _, server = sides(device, edge)
    with pytest.raises(TrustError, match=r"TLS 1\.3"):
        server.receive(Lowered(device, edge, False).step())
    client, _ = sides(device, edge)
    with pytest.raises(TrustError, match=r"TLS 1\.3"):
        client.receive(Lowered(edge, device, True).step(client.outgoing()))
    assert not client.ready and not server.ready


def flights(people):
    """The bytes of one handshake: client, server, client."""
    client, server = sides(*people[:2])
    first = client.outgoing()
    server.receive(first)
    second = server.outgoing()
    client.receive(second)
    return len(first), len(second), len(client.outgoing())


def test_a_handshake_cut_at_every_byte_ends_on_both_sides(people):
    """Whoever gets a part and then the end raises a LinkError, and is never ready."""
    first, second, third = flights(people)
    # Signatures differ by a byte or two in length, so later flights are cut from their end.
    for left in range(1, first):
        client, server = sides(*people[:2])
        cut_short(server, client.outgoing()[:-left])
    for left in range(1, second + 1):
        client, server = sides(*people[:2])
        server.receive(client.outgoing())
        cut_short(client, server.outgoing()[:-left])
    for left in range(1, third + 1):
        client, server = sides(*people[:2])
        server.receive(client.outgoing())
        client.receive(server.outgoing())
        cut_short(server, client.outgoing()[:-left])


def cut_short(side, data):
    if data:
        side.receive(data)
    assert not side.ready
    with pytest.raises(LinkError, match="during the handshake"):
        side.receive(b"")
    assert not side.ready


def test_a_damaged_handshake_never_succeeds(people):
    source = random.Random(4)
    for number in range(150):
        client, server = sides(*people[:2])
        where = [source.randrange(200), source.randrange(760), source.randrange(530)]
        with contextlib.suppress(LinkError, TrustError):
            for flight, (sender, receiver) in enumerate([(client, server), (server, client), (client, server)]):
                data = bytearray(sender.outgoing())
                if flight == number % 3:
                    data[where[flight]] ^= 1 << source.randrange(8)
                receiver.receive(bytes(data))
        assert not (client.ready and server.ready)


def test_a_stream_without_farewell_was_cut(people):
    client, server = sides(*people[:2])
    shake(client, server)
    server.send(b"all of it")
    assert client.receive(server.outgoing()) == b"all of it"
    with pytest.raises(LinkError, match="mid-stream"):
        client.receive(b"")
    assert not client.closed
    with pytest.raises(LinkError):
        client.send(b"more")
    client.close()


def test_a_farewell_makes_it_whole(people):
    client, server = sides(*people[:2])
    shake(client, server)
    server.send(b"all of it")
    server.close()
    assert client.receive(server.outgoing()) == b"all of it"
    assert client.closed
    assert client.receive(b"") == b""
    client.close()
    assert client.outgoing()
    assert server.receive(b"anything") == b""  # it has closed: nothing is read any more
    with pytest.raises(LinkError):
        server.send(b"more")


def test_a_damaged_record_ends_the_session(people):
    for at in (0, 3, 10, -1):
        client, server = sides(*people[:2])
        shake(client, server)
        client.send(b"hello")
        data = bytearray(client.outgoing())
        data[at] ^= 1
        with pytest.raises(LinkError):
            server.receive(bytes(data))
            server.receive(b"")
        with pytest.raises(LinkError):
            server.send(b"more")
        server.close()
