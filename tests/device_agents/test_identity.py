"""Who a machine is: made once, kept, accepted by TLS in both directions, packed into 97 bytes."""

import itertools
import os
import random
import ssl
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from shoal.device_agents import identity
from shoal.device_agents.identity import PACKED, Identity, cleaned, fingerprint, is_name, pack, readable, unpack
from shoal.runtime.errors import StorageError, TrustError


def test_it_is_made_once_and_kept_private(tmp_path):
    first = Identity.open(tmp_path / "device", "thermostat")
    assert first == Identity.open(tmp_path / "device", "thermostat")
    assert first.fingerprint == fingerprint(first.certificate) and first.id == readable(first.fingerprint)
    assert stat.S_IMODE(first.key_path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "device").stat().st_mode) == 0o700
    assert Identity.open(tmp_path / "edge").fingerprint != first.fingerprint


def test_many_at_once_make_one(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: Identity.open(tmp_path / "a").fingerprint, range(8)))
    assert len(set(made)) == 1


def test_the_certificate_needs_no_clock_and_is_no_authority(tmp_path):
    parsed = x509.load_der_x509_certificate(Identity.open(tmp_path).certificate)
    assert parsed.not_valid_before_utc.year < 1970 and parsed.not_valid_after_utc.year == 9999
    assert parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert not parsed.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert all(extension.critical for extension in parsed.extensions)
    assert len(Identity.open(tmp_path).certificate) <= 332


def context(mine: Identity, trusted: list[bytes], server: bool) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_cert_chain(mine.certificate_path, mine.key_path)
    made.load_verify_locations(cadata=b"".join(trusted))
    return made


def shake(device: ssl.SSLContext, edge: ssl.SSLContext) -> tuple[bytes, bytes]:
    """A handshake in memory; the certificate that each side saw. Raises ssl.SSLError."""
    ends = [(ssl.MemoryBIO(), ssl.MemoryBIO()) for _ in range(2)]
    tls = [device.wrap_bio(*ends[0]), edge.wrap_bio(*ends[1], server_side=True)]
    done: set[int] = set()
    for turn in itertools.cycle((0, 1)):
        try:
            tls[turn].do_handshake()
            done.add(turn)
        except ssl.SSLWantReadError:
            pass
        ends[1 - turn][0].write(ends[turn][1].read())
        if len(done) == 2:
            seen = [side.getpeercert(binary_form=True) or b"" for side in tls]
            return seen[0], seen[1]


def test_strict_tls_accepts_it_both_ways_among_many(tmp_path):
    device, edge, *others = (Identity.open(tmp_path / str(number)) for number in range(12))
    crowd = [other.certificate for other in others]
    saw = shake(context(device, [*crowd, edge.certificate], False), context(edge, [*crowd, device.certificate], True))
    assert saw == (edge.certificate, device.certificate)
    for trusted_by_device, trusted_by_edge in ((crowd, [device.certificate]), ([edge.certificate], crowd)):
        with pytest.raises(ssl.SSLError):
            shake(context(device, trusted_by_device, False), context(edge, trusted_by_edge, True))


def test_what_a_pinned_key_signs_is_not_trusted(tmp_path):
    edge, device = Identity.open(tmp_path / "edge"), Identity.open(tmp_path / "device")
    key = serialization.load_pem_private_key(device.key_path.read_bytes(), None)
    other = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.load_der_x509_certificate(device.certificate).subject
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "someone else")])
    made = (
        x509.CertificateBuilder(issuer, name, other.public_key(), 2)
        .not_valid_before(x509.load_der_x509_certificate(device.certificate).not_valid_before_utc)
        .not_valid_after(x509.load_der_x509_certificate(device.certificate).not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    crt, pem = tmp_path / "crt", tmp_path / "key"
    crt.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem.write_bytes(
        other.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    forged = context(device, [edge.certificate], False)
    forged.load_cert_chain(crt, pem)
    with pytest.raises(ssl.SSLError):
        shake(forged, context(edge, [device.certificate], True))
    with pytest.raises(TrustError):
        pack(made.public_bytes(serialization.Encoding.DER))


def test_packed_it_is_97_bytes_and_comes_back(tmp_path):
    for number in range(20):  # signatures of several lengths
        certificate = Identity.open(tmp_path / str(number)).certificate
        packed = pack(certificate)
        assert len(packed) == PACKED == 97
        assert unpack(packed) == certificate


def test_packed_bytes_with_any_change_are_refused_or_another_certificate(tmp_path):
    certificate = Identity.open(tmp_path).certificate
    packed = pack(certificate)
    for position in range(PACKED):
        for change in (1, 0x80):
            with pytest.raises(TrustError):
                unpack(packed[:position] + bytes([packed[position] ^ change]) + packed[position + 1 :])
        with pytest.raises(TrustError):
            unpack(packed[:position])
    with pytest.raises(TrustError):
        unpack(packed + b"\0")
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    twin = unpack(packed[:65] + (order - int.from_bytes(packed[65:], "big")).to_bytes(32, "big"))
    assert fingerprint(twin) != fingerprint(certificate)  # ECDSA has two signatures: the pin tells them apart
    rng = random.Random(1)
    for _ in range(300):
        with pytest.raises(TrustError):
            unpack(rng.randbytes(PACKED))


@pytest.mark.parametrize("data", [b"", b"0", bytes(400), b"\x30\x82\x01\x00" + bytes(256)])
def test_what_is_no_certificate_is_not_packed(data):
    with pytest.raises(TrustError):
        pack(data)


def test_a_certificate_of_another_key_or_form_is_not_packed(tmp_path):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pi")])
    start, end = datetime(2020, 1, 1), datetime(2040, 1, 1)
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()),
                ec.generate_private_key(ec.SECP256R1())):  # fmt: skip
        algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        made = x509.CertificateBuilder(name, name, key.public_key(), 1, start, end).sign(key, algorithm)
        with pytest.raises(TrustError, match="not one of shoal's"):
            pack(made.public_bytes(serialization.Encoding.DER))


def test_the_form_of_the_certificate_never_changes(tmp_path):
    """Old and new versions build the same bytes from a point, or they could not pair: here is one, byte for byte."""
    key = ec.derive_private_key(4707, ec.SECP256R1()).public_key()
    body = identity._form(key).sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).tbs_certificate_bytes
    assert body.hex() == FORM


FORM = (
    "3081eda003020102020101300a06082a8648ce3d040302301b3119301706035504030c10473644435548373355465a4e494850523020170d"
    "3530303130313030303030305a180f39393939313233313233353935395a301b3119301706035504030c10473644435548373355465a4e49"
    "4850523059301306072a8648ce3d020106082a8648ce3d03010703420004572895c930a802b99a99af656c978657b2f120596b5d8a81aa88"
    "e378633ef77cd263ded049e4e439cf96904a345ba6947e9b6e8a444d590e8e792762fdda9f6ba320301e300c0603551d130101ff04023000"
    "300e0603551d0f0101ff040403020780"
)


def test_damaged_files_are_named(tmp_path):
    mine = Identity.open(tmp_path)
    key, certificate = mine.key_path.read_bytes(), mine.certificate_path.read_bytes()
    stranger = Identity.open(tmp_path / "other")
    foreign = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path, wrong in [
        *((mine.key_path, data) for data in (b"", key[:40], key[:-40], foreign, stranger.key_path.read_bytes())),
        *((mine.certificate_path, data) for data in (b"", certificate[:90], stranger.certificate_path.read_bytes())),
    ]:
        was = path.read_bytes()
        path.write_bytes(wrong)
        with pytest.raises(TrustError, match="identity.(key|crt)"):
            Identity.open(tmp_path)
        path.write_bytes(was)
    mine.key_path.chmod(0o644)
    with pytest.raises(TrustError, match="not private"):
        Identity.open(tmp_path)
    mine.key_path.chmod(0o600)
    mine.key_path.unlink()
    with pytest.raises(TrustError, match="identity.key"):
        Identity.open(tmp_path)


def test_a_power_cut_between_key_and_certificate_is_mended(tmp_path):
    mine = Identity.open(tmp_path)
    key = mine.key_path.read_bytes()
    mine.certificate_path.unlink()
    assert Identity.open(tmp_path).key_path.read_bytes() == key
    assert mine.certificate_path.exists()


def test_a_folder_that_others_may_write_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o777)
    with pytest.raises(StorageError):
        Identity.open(tmp_path / "a")


def test_an_id_has_a_character_that_catches_typing_errors():
    def holds(text: str) -> bool:
        check = 0
        for character in text[:-1]:
            check ^= identity._ALPHABET.index(character)
            check = check << 1 ^ (0b100101 if check & 16 else 0)
        return identity._ALPHABET[check] == text[-1]

    rng = random.Random(2)
    for _ in range(20):
        shown = readable(rng.randbytes(32).hex())
        assert len(shown) == 24 and [len(group) for group in shown.split("-")] == [4] * 5
        text = shown.replace("-", "")
        assert holds(text)
        for position, character in enumerate(text):
            for other in set(identity._ALPHABET) - {character}:
                assert not holds(text[:position] + other + text[position + 1 :])
            if position and text[position - 1] != character:
                assert not holds(text[: position - 1] + character + text[position - 1] + text[position + 1 :])


@pytest.mark.parametrize(
    ("name", "kept"),
    [("pi", "pi"), ("  pi\n", "pi"), ("", "unnamed"), ("\x1b[2Jpi", "[2Jpi"), ("a\u202eb", "ab"), ("\udcff", "unnamed"),
     ("é" * 40, "é" * 32), ("a" * 100, "a" * 64), ("a" * 63 + " b", "a" * 63)],
)  # fmt: skip
def test_names_hold_nothing_that_moves_a_cursor(name, kept):
    assert cleaned(name) == kept and is_name(kept) and is_name(name) == (name == kept)


def test_without_the_package_the_reason_is_said():
    code = "import sys; sys.modules['cryptography'] = None; import shoal.device_agents.identity"
    said = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ).stderr
    assert "MissingPackageError" in said and "shoal[agent]" in said


def test_a_name_that_was_given_stays(tmp_path):
    assert Identity.open(tmp_path).name == Identity.open(tmp_path).name
    assert Identity.open(tmp_path, "kitchen").name == "kitchen"
    assert Identity.open(tmp_path).name == "kitchen", "the agent goes by the name that pairing gave"
    (tmp_path / "identity.name").write_bytes(b"\x1b[2J\xffbath")
    assert Identity.open(tmp_path).name == "[2J\ufffdbath"
