"""TLS 1.3 between two pinned certificates, without a socket: bytes in, bytes out.

It promises that plaintext only ever comes from, and goes to, a peer whose certificate is one of the pinned ones, byte
for byte: OpenSSL verifies against exactly those, and afterwards the certificate itself is looked up among them, so one
that a pinned key has signed does not pass. There is no lower version, no resumption, no name check, and no clock: a pin
is what is trusted, so a device that believes it is 1970 still gets through. A stream that ends without TLS's own
farewell was cut, and says so.

In TLS 1.3 a client is done before the server has judged its certificate: only plaintext from the server proves that
it has. It knows nothing about links, time or what the plaintext means.
"""

import functools
import hashlib
import ssl
from collections.abc import Callable
from typing import Protocol as Shape

from shoal.runtime.errors import LinkError, ShoalError, TrustError

RECORD = 16 << 10  # most plaintext in a TLS record
OVERHEAD = 22  # bytes that a record adds
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which the ssl module does not name

_PAIR = "Pair the two again: `shoal edge pair` there, `shoal pair` here."
_RETRY = "Check the cable or the network; a device tries again by itself."


class Owner(Shape):
    """What is wanted of an identity: its certificate and key as PEM files. It can be hashed."""

    @property
    def certificate_path(self) -> object: ...
    @property
    def key_path(self) -> object: ...
    def __hash__(self) -> int: ...


class Secure:
    """One side of a session. `certificates()` are the pinned ones (DER), asked for again when the peer shows its own.

    After every call, a failed one too, `outgoing` may hold bytes for the peer: an alert tells it why.
    """

    def __init__(self, identity: Owner, certificates: Callable[[], list[bytes]], server: bool):
        pins = certificates()
        if not pins:
            raise TrustError("No session can be opened.", "No peer is paired.", "Pair first: `shoal edge pair`.")
        context = _context(identity, tuple(pins), server)
        self._certificates = certificates
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)
        self._ended = self._closing = False
        self.ready = False  # the handshake is done, and the peer is one of the pinned
        self.closed = False  # the peer said farewell: what it sent is whole
        self.peer_certificate = b""  # DER, once ready
        self._step()

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the peer's certificate, once ready."""
        return hashlib.sha256(self.peer_certificate).hexdigest()

    def receive(self, ciphertext: bytes) -> bytes:
        """Takes bytes from the link, b"" for its end; returns the plaintext in them. Raises TrustError, LinkError."""
        if self._closing:
            return b""
        if ciphertext:
            self._in.write(ciphertext)
        else:
            self._ended = True
            self._in.write_eof()
        if not self.ready:
            self._step()
        parts = []
        while self.ready and not self.closed and (part := self._read()):
            parts.append(part)
        return b"".join(parts)

    def send(self, plaintext: bytes) -> None:
        """Plaintext for the peer, once ready."""
        if not self.ready or self._closing:
            raise LinkError("Nothing can be sent.", "The session is not open.", _RETRY)
        view = memoryview(plaintext)
        try:
            while view:
                view = view[self._tls.write(view) :]
        except ssl.SSLError as error:
            raise self._failure(error) from None

    def outgoing(self) -> bytes:
        """The bytes for the link that came of all this; b"" if none."""
        return self._out.read()

    def close(self) -> None:
        """Says farewell, so that the peer knows the stream whole. What it still sends is not read. Never raises."""
        if self.ready and not self._closing:
            self._closing = True
            try:
                self._tls.unwrap()
            except ssl.SSLError:  # it waits for the peer's own, and we do not
                pass

    def _step(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            raise self._failure(error) from None
        certificate = self._tls.getpeercert(binary_form=True) or b""
        if certificate not in self._certificates():
            raise TrustError("The peer is not trusted.", "Its certificate is none of the paired ones.", _PAIR)
        self.peer_certificate, self.ready = certificate, True

    def _read(self) -> bytes:
        try:
            data = self._tls.read(RECORD)
            self.closed = not data
            return data
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLZeroReturnError:
            self.closed = True
            return b""
        except ssl.SSLError as error:
            raise self._failure(error) from None

    def _failure(self, error: ssl.SSLError) -> ShoalError:
        self._closing = True  # a session that failed takes nothing more
        reason = error.reason or ""
        if isinstance(error, ssl.SSLCertVerificationError):
            why = f"Its certificate is none of the paired ones ({error.verify_message})."
            return TrustError("The peer is not trusted.", why, _PAIR)
        if "CERTIFICATE_REQUIRED" in reason or "DID_NOT_RETURN" in reason:
            return TrustError("The peer is not trusted.", "A certificate is missing.", _PAIR)
        if "ALERT" in reason and ("UNKNOWN_CA" in reason or "CERTIFICATE" in reason or "ACCESS_DENIED" in reason):
            why = "It does not know this side's certificate, or not any more."
            return TrustError("The peer does not trust this side.", why, _PAIR)
        if "PROTOCOL" in reason:
            return TrustError("The peer is not trusted.", "It does not speak TLS 1.3.", "Upgrade shoal there.")
        if self._ended:
            when = "in mid-stream" if self.ready else "during the handshake"
            return LinkError("The link was cut.", f"It ended {when}.", _RETRY)
        return LinkError("The link is damaged.", f"TLS reports {reason or error}.", _RETRY)


@functools.lru_cache(maxsize=8)
def _context(identity: Owner, pins: tuple[bytes, ...], server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    # One group: newer OpenSSL would send a hybrid share of 1.2 KB each way, 200 ms of a slow serial line.
    context.set_ecdh_curve("prime256v1")
    # The 76 bytes that make TLS 1.3 look like 1.2 to boxes on the way: there are none on a cable.
    context.options &= ~getattr(ssl, "OP_ENABLE_MIDDLEBOX_COMPAT", 1 << 20)
    # A pin is trusted by itself: nothing above it is asked for, and no date.
    context.verify_flags = ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    if server:
        context.num_tickets = 0
    try:
        context.load_cert_chain(str(identity.certificate_path), str(identity.key_path))
        context.load_verify_locations(cadata=b"".join(pins))
    except (ssl.SSLError, OSError) as error:
        raise TrustError(
            "A certificate or the key cannot be used.", f"{error}.", "Remove the damaged file and pair again."
        ) from None
    return context
