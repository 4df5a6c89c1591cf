"""Two machines come to trust each other by a code that a person carries from one screen to the other keyboard.

SPAKE2 (Abdalla and Pointcheval; package `spake2`) makes one strong key of the short code, and both certificates, names
and roles go into its transcript: whoever does not know the code, or puts in another certificate, gets another key. The
device proves first that it has the key, so that a stranger who answers for the edge learns nothing from it before it
has made its one guess, and the edge counts those who come to guess: a `Window` answers three conversations, once.

    device -> edge   certificate, name
    edge -> device   certificate, SPAKE2 element, name
    device -> edge   SPAKE2 element, proof
    edge -> device   proof

Each message is one length byte and at most 255 more; certificates are packed (identity.py), proofs are 16 bytes. Where
the edge refuses it sends one byte, the reason, instead. No key of a later session comes from here: TLS pins what was
exchanged. Knows nothing about links or files; `now` is monotonic seconds.
"""

import hashlib
import hmac
import io
import secrets
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shoal.runtime.errors import MissingPackageError, ShoalError, TrustError, UsageError

from .identity import NAME_BYTES, PACKED, Identity, fingerprint, is_name, pack, unpack
from .trust import Peer

SECONDS = 120.0
TRIES = 3
_VERSION = b"shoal pairing 1 "
_ELEMENT = 32  # bytes of an Ed25519 point
_FIELD = 2**255 - 19
_PROOF = 16
_DAMM = (  # a quasigroup of order ten that is totally anti-symmetric (Damm 2004): what makes the check digit sure
    "0317598642", "7092154863", "4206871359", "1750983426", "6123045978",
    "3674209581", "5869720134", "8945362017", "9438617205", "2581436790",
)  # fmt: skip
_REFUSALS = {
    "wrong": (1, "The code is wrong.", "The other side knows another one, or someone stands between the two."),
    "expired": (2, "The code has expired.", f"It holds for {SECONDS:.0f} seconds."),
    "used": (3, "The code was already used.", "It pairs one device, once."),
    "locked": (4, "The code is locked.", f"It was tried {TRIES} times."),
    "malformed": (5, "The pairing went wrong.", "The device sent what does not belong there."),
}
_AGAIN = "Type the code that the edge shows; where it shows none, run there: shoal edge pair"


_T = TypeVar("_T")
_Steps = Generator[Sequence[int], bytes, _T]  # yields the lengths that the next message may have, is sent the message


@dataclass(frozen=True)
class Code:
    """Seven random digits and one that checks them: it catches any wrong digit and any two neighbours swapped."""

    digits: str

    @classmethod
    def new(cls) -> "Code":
        digits = f"{secrets.randbelow(10**7):07}"
        return cls(digits + _check_digit(digits))

    @classmethod
    def parse(cls, text: str) -> "Code":
        """The code that a person typed, with or without the dash. Raises UsageError where it cannot be one."""
        digits = "".join(character for character in text if character not in "- \t")
        if len(digits) != 8 or not (digits.isascii() and digits.isdigit()):
            raise UsageError("This is no pairing code.", "A code is eight digits.", "Type it as the edge shows it.")
        if _check_digit(digits) != "0":  # the digits with their check digit end where they began
            raise UsageError("The code has a typing error.", "Its last digit does not fit.", "Type it again.")
        return cls(digits)

    def __str__(self) -> str:
        return f"{self.digits[:4]}-{self.digits[4:]}"

    def __repr__(self) -> str:
        return "Code(…)"  # it must not come into a log


class Window:
    """The time in which an edge lets one device pair, at most `tries` conversations, right or wrong.

    A try is spent when the edge answers with its element, so conversations at the same time do not get more guesses.
    `tries` counts down. Threads may share a window.
    """

    def __init__(self, code: Code, opened_at: float, seconds: float = SECONDS, tries: int = TRIES):
        self.code, self.opened_at, self.seconds, self.tries = code, opened_at, seconds, tries
        self.used = False
        self._turn = threading.Lock()

    def state(self, now: float) -> str:
        """One of open, expired, used, locked."""
        if self.used:
            return "used"
        if not 0 <= now - self.opened_at < self.seconds:
            return "expired"
        return "open" if self.tries else "locked"

    def close(self) -> None:
        """Nobody can pair with this code any more."""
        self.seconds = 0.0

    def _try(self, now: float) -> str:
        """Spends a try; returns why it may not be spent, "" if it was."""
        with self._turn:
            if (state := self.state(now)) != "open":
                return state
            self.tries -= 1
            return ""

    def _use(self, now: float) -> str:
        """The right code came, in a try that was spent before; returns why it comes too late, "" if it does not."""
        with self._turn:
            if (state := self.state(now)) in ("used", "expired"):
                return state
            self.used = True
            return ""


class _Pairing:
    """One conversation. Bytes in, bytes out; over as soon as it returned a Peer or raised."""

    def __init__(self, identity: Identity, seen: bytes):
        self._identity, self._seen = identity, seen
        self._inbox, self._outbox = bytearray(), bytearray()
        self._now = 0.0
        self._over = False
        self._steps = self._converse()
        self._expected = next(self._steps)

    def outgoing(self) -> bytes:
        """What is to be sent now; also after an error, for the other side learns the reason from it."""
        out = bytes(self._outbox)
        self._outbox.clear()
        return out

    def receive(self, data: bytes, now: float) -> Peer | None:
        """The other side's bytes, in any pieces. The peer, once it has proved itself, else None. Raises TrustError."""
        if self._over:
            raise TrustError("The pairing is over.", "Nothing more belongs to it.", _AGAIN)
        self._now = now
        try:
            # The two take turns, so more than one message is never under way.
            room = 1 + max(self._expected) - len(self._inbox)
            self._inbox += data[: room + 1]
            if not self._inbox:
                return None
            length = self._inbox[0]
            if length not in self._expected or len(self._inbox) > 1 + length:
                raise self._refuse("malformed")
            if len(self._inbox) < 1 + length:
                return None
            message = bytes(self._inbox[1:])
            self._inbox.clear()
            try:
                self._expected = self._steps.send(message)
            except StopIteration as stop:
                self._over = True
                return stop.value
            return None
        except ShoalError:
            self._over = True
            raise

    def _converse(self) -> _Steps[Peer]:
        raise NotImplementedError

    def _refuse(self, reason: str) -> TrustError:
        _, what, why = _REFUSALS[reason]
        return TrustError(what, why, _AGAIN)

    def _say(self, message: bytes) -> None:
        self._outbox += bytes([len(message)]) + message

    def _card(self, element: bytes = b"") -> bytes:
        return pack(self._identity.certificate) + element + self._identity.name.encode()

    def _peer(self, card: bytes, role: str) -> Peer:
        """The other side as it says it is; nothing of it is believed before its proof."""
        certificate = unpack(card[:PACKED])
        try:
            name = card[PACKED:].decode()
        except UnicodeDecodeError:
            name = ""
        if not is_name(name):
            raise self._refuse("malformed")
        if fingerprint(certificate) == self._identity.fingerprint:
            raise TrustError("The pairing went wrong.", "The other side sent this machine's own certificate.", _AGAIN)
        return Peer.of(certificate, name, role)

    def _transcript(self, role: bytes, party: Peer | Identity) -> bytes:
        """What the key shall depend on besides the code, of one side: idA or idB of SPAKE2."""
        digests = (hashlib.sha256(data).digest() for data in (party.certificate, self._seen))
        return _VERSION + role + b" " + b"".join(digests) + party.name.encode()


class DevicePairing(_Pairing):
    """The device's side, which speaks first. `seen`: what both sent in clear before, so that nobody can alter it."""

    def __init__(self, identity: Identity, code: Code, seen: bytes = b""):
        self._code = code
        super().__init__(identity, seen)

    def _converse(self) -> _Steps[Peer]:
        self._say(self._card())
        answer = yield from self._answer(range(PACKED + _ELEMENT + 1, PACKED + _ELEMENT + NAME_BYTES + 1))
        element = answer[PACKED : PACKED + _ELEMENT]
        edge = self._peer(answer[:PACKED] + answer[PACKED + _ELEMENT :], "edge")
        parties = self._transcript(b"device", self._identity), self._transcript(b"edge", edge)
        spake = _Spake(self._code, *parties, is_device=True)
        if not spake.finish(element):
            raise self._refuse("wrong")
        self._say(spake.element + spake.proof("device"))
        proof = yield from self._answer(range(_PROOF, _PROOF + 1))
        if not hmac.compare_digest(proof, spake.proof("edge")):
            raise self._refuse("wrong")
        return edge

    def _answer(self, lengths: range) -> _Steps[bytes]:
        """A message of the edge's, or the TrustError for the refusal that it sent instead."""
        message = yield (1, *lengths)
        if len(message) == 1:
            for number, what, why in _REFUSALS.values():
                if message[0] == number:
                    raise TrustError(what, f"The edge says so. {why}", _AGAIN)
            raise TrustError("The edge refuses to pair.", f"It gives reason {message[0]}, unknown here.", _AGAIN)
        return message


class EdgePairing(_Pairing):
    """The edge's side. Raises TrustError at once where the window is not open."""

    def __init__(self, identity: Identity, window: Window, now: float, seen: bytes = b""):
        self._window = window
        super().__init__(identity, seen)
        self._now = now
        if (state := window.state(now)) != "open":
            self._over = True
            raise self._refuse(state)

    def receive(self, data: bytes, now: float) -> Peer | None:
        try:
            return super().receive(data, now)
        except ShoalError:
            if not self._outbox:
                self._say(bytes([_REFUSALS["malformed"][0]]))
            raise

    def _converse(self) -> _Steps[Peer]:
        device = self._peer((yield range(PACKED + 1, PACKED + NAME_BYTES + 1)), "device")
        if state := self._window._try(self._now):
            raise self._refuse(state)
        parties = self._transcript(b"device", device), self._transcript(b"edge", self._identity)
        spake = _Spake(self._window.code, *parties, is_device=False)
        self._say(self._card(spake.element))
        message = yield range(_ELEMENT + _PROOF, _ELEMENT + _PROOF + 1)
        if not spake.finish(message[:_ELEMENT]) or not hmac.compare_digest(message[_ELEMENT:], spake.proof("device")):
            raise self._refuse("wrong")
        if state := self._window._use(self._now):
            raise self._refuse(state)
        self._say(spake.proof("edge"))
        return device

    def _refuse(self, reason: str) -> TrustError:
        self._outbox.clear()
        self._say(bytes([_REFUSALS[reason][0]]))
        return super()._refuse(reason)


class _Spake:
    """SPAKE2 and the proof of its key. Some 15 ms a side on a PC; not in constant time, so for codes used once."""

    def __init__(self, code: Code, device: bytes, edge: bytes, is_device: bool):
        try:
            from spake2 import SPAKE2_A, SPAKE2_B
        except ImportError as error:
            raise MissingPackageError(
                "Pairing cannot start.", f"{error}.", "Install what it needs: pip install 'shoal[agent]'."
            ) from None
        side, self._other = (SPAKE2_A, b"B") if is_device else (SPAKE2_B, b"A")
        self._state = side(code.digits.encode(), idA=device, idB=edge)
        self.element = self._state.start()[1:]  # the first byte is the side, which both know
        self._key = b""

    def finish(self, element: bytes) -> bool:
        """Takes the other side's element; False where it is none."""
        from spake2 import SPAKEError
        from spake2.ed25519_basic import NotOnCurve

        # The package takes the neutral element in its other spellings: a sign to x = 0, or y + p for y
        if not 1 < int.from_bytes(element, "little") % (1 << 255) < _FIELD:
            return False
        try:
            self._key = self._state.finish(self._other + element)
        except (SPAKEError, NotOnCurve, ValueError):
            return False
        return True

    def proof(self, role: str) -> bytes:
        return hmac.digest(self._key, _VERSION + role.encode() + b" has the key", "sha256")[:_PROOF]


def qr(text: str) -> str:
    """`text` as a QR code of block characters for a dark terminal. Raises MissingPackageError."""
    try:
        import segno
    except ImportError as error:
        raise MissingPackageError(
            "No QR code can be drawn.", f"{error}.", "Type the code, or: pip install 'shoal[agent]'."
        ) from None
    drawn = io.StringIO()
    segno.make(text, error="m", micro=False).terminal(out=drawn, border=2, compact=True)
    return drawn.getvalue()


def _check_digit(digits: str) -> str:
    state = "0"
    for digit in digits:
        state = _DAMM[int(state)][int(digit)]
    return state
