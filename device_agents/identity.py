"""Who this machine is: a P-256 key and a certificate that it signed itself, made once and kept.

The certificate says nothing but its key. It holds from 1950 on and never ends, so a device without a clock can use it;
it is no authority, so nothing can be signed below it (RFC 5280: basicConstraints and keyUsage, both critical); and its
subject is a hash of its key, so two of them are told apart in a trust store. Since all else in it is fixed, the key's
point and the signature are the whole of it: `pack` gives 97 bytes, `unpack` makes the same certificate of them.

P-256 rather than Ed25519 because hardware keystores have it. Knows nothing about peers, links or TLS.
"""

import base64
import contextlib
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from shoal.runtime.errors import MissingPackageError, StorageError, TrustError

from .home import private_folder, write_atomically

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, utils
except ImportError as error:
    raise MissingPackageError(
        "Agents cannot start.", f"{error}.", "Install what they need: pip install 'shoal[agent]'."
    ) from None

PACKED = 97  # bytes of a packed certificate: a compressed point, and r and s of the signature
NAME_BYTES = 64  # a name's length at most, in UTF-8
_POINT = 33
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"  # base32, RFC 4648
_ID_CHARACTERS = 19  # 95 bits; with its check character five groups of four
_ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")  # AlgorithmIdentifier, RFC 5758
_FILE_BYTES = 1 << 16  # no key or certificate file of ours is nearly as long


@dataclass(frozen=True)
class Identity:
    """This machine in one role. `certificate` is DER, `fingerprint` its SHA-256 in hex, `id` the same for people."""

    name: str
    certificate: bytes = field(repr=False)
    fingerprint: str
    id: str
    certificate_path: Path
    key_path: Path

    @classmethod
    def open(cls, folder: Path, name: str | None = None) -> "Identity":
        """The identity kept in `folder`, made on first use. `name` is what peers will call it from now on; without one
        it is as before, at first the host's name.

        Raises TrustError where key or certificate are damaged, open to others or not each other's, and StorageError.
        """
        folder = private_folder(Path(folder))
        key_path, certificate_path, name_path = (folder / f"identity.{part}" for part in ("key", "crt", "name"))
        with alone_in(folder):
            if not key_path.exists() and not certificate_path.exists():
                pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
                write_atomically(key_path, pem)
            key = _private_key(key_path)
            if not certificate_path.exists():  # first use, or a power cut in the middle of it
                made = _form(key.public_key()).sign(key, hashes.SHA256())
                write_atomically(certificate_path, made.public_bytes(serialization.Encoding.PEM))
            certificate = _own_certificate(certificate_path, key)
            if name:
                write_atomically(name_path, cleaned(name).encode())
            elif name_path.exists():
                name = name_path.read_text("utf-8", "replace")
        printed = fingerprint(certificate)
        shown = cleaned(name or socket.gethostname())
        return cls(shown, certificate, printed, readable(printed), certificate_path, key_path)


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate's DER, in hex: what a pin is compared with."""
    return hashlib.sha256(certificate).hexdigest()


def readable(fingerprint: str) -> str:
    """A fingerprint for people to compare: 95 bits in base32 and a check character, as ABCD-EFGH-IJKL-MNOP-QRST.

    The check character is Damm's construction over GF(32): it catches every wrong character and every two neighbours
    that were swapped.
    """
    text = base64.b32encode(bytes.fromhex(fingerprint)).decode()[:_ID_CHARACTERS]
    check = 0
    for character in text:
        check ^= _ALPHABET.index(character)
        check = check << 1 ^ (0b100101 if check & 16 else 0)  # times x, modulo x^5 + x^2 + 1
    text += _ALPHABET[check]
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def pack(certificate: bytes) -> bytes:
    """`PACKED` bytes that stand for a certificate of ours. Raises TrustError for any other."""
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError
        point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        r, s = utils.decode_dss_signature(parsed.signature)
        packed = point + r.to_bytes(32, "big") + s.to_bytes(32, "big")
        if unpack(packed) != certificate:
            raise ValueError
    except (ValueError, OverflowError, TypeError, x509.UnsupportedGeneralNameType, TrustError):
        raise TrustError(
            "The certificate is not one of shoal's.", "It has another key, form or signature.", "Pair again."
        ) from None
    return packed


def unpack(packed: bytes) -> bytes:
    """The DER of the certificate that `pack` was given. Raises TrustError unless its own key has signed it."""
    try:
        if len(packed) != PACKED:
            raise ValueError
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), packed[:_POINT])
        r, s = (int.from_bytes(packed[start : start + 32], "big") for start in (_POINT, _POINT + 32))
        signature = utils.encode_dss_signature(r, s)
        # Any key may sign the form: all but the signature comes out the same.
        body = _form(key).sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).tbs_certificate_bytes
        key.verify(signature, body, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        raise TrustError(
            "The peer's certificate is refused.", "Its own key has not signed it.", "Pair again over a sound link."
        ) from None
    content = body + _ECDSA_WITH_SHA256 + bytes([3, len(signature) + 1, 0]) + signature  # 3: BIT STRING, no odd bits
    return b"\x30\x82" + len(content).to_bytes(2, "big") + content  # SEQUENCE of 256 to 65535 bytes


def cleaned(name: str, longest: int = NAME_BYTES) -> str:
    """`name` as a peer will accept it: what cannot be shown is left out, and what is too long is cut."""
    shown = "".join(character for character in name if character.isprintable()).strip()
    return shown.encode("utf-8", "ignore")[:longest].decode("utf-8", "ignore").strip() or "unnamed"


def is_name(name: str) -> bool:
    """Whether `name` may stand in a list or on a terminal: short, and nothing in it that moves a cursor or hides."""
    return name == cleaned(name)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other process or thread that asks the same is in here meanwhile. Raises StorageError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise StorageError(f"{folder} cannot be locked.", f"{error}.", "Put it on a local disk.") from None
    try:
        yield
    finally:
        os.close(descriptor)  # gives the lock back


def _form(key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    """All of a certificate but its signature. Each byte follows from `key`; pairing counts on it: never change one."""
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    subject = base64.b32encode(hashlib.sha256(point).digest()).decode()[:16]
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
         "encipher_only", "decipher_only"), False
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key)
        .serial_number(1)
        .not_valid_before(datetime(1950, 1, 1))
        .not_valid_after(datetime(9999, 12, 31, 23, 59, 59))  # RFC 5280, 4.1.2.5: no well-defined end
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
    )


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_FILE_BYTES)
    except OSError as error:
        raise _lost(path, f"{error}") from None


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    data = _read(path)
    if path.stat().st_mode & 0o077:
        raise TrustError(
            f"The key {path} is not private.", "Others on this machine may read it.", f"Run: chmod 600 {path}"
        )
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise _lost(path, f"{error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _lost(path, "It holds no P-256 key")
    return key


def _own_certificate(path: Path, key: ec.EllipticCurvePrivateKey) -> bytes:
    try:
        parsed = x509.load_pem_x509_certificate(_read(path))
        der = parsed.public_bytes(serialization.Encoding.DER)
        pack(der)
    except (ValueError, TrustError):
        raise _lost(path, "It holds no certificate of ours") from None
    if parsed.public_key() != key.public_key():
        raise _lost(path, "It belongs to another key")
    return der


def _lost(path: Path, why: str) -> TrustError:
    return TrustError(
        f"This machine's identity in {path} cannot be used.",
        f"{why.rstrip('.')}.",
        "Restore the file; or remove identity.key and identity.crt, and pair with every peer again.",
    )
