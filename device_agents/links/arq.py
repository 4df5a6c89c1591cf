"""Reliable, ordered bytes over a serial line: a sliding window with selective repeat. Without IO and without a clock.

Promises: what `receive` gives out is exactly what the peer's `send` was given, in order, from the first byte of this
session on, until the session ends with a reason; noise, loss, a cable that stalls, a peer that starts anew and bytes
left over from an earlier session change nothing of that. It knows nothing of ports, threads or time: `now` is passed
in, in monotonic seconds.

A frame (see cobs.py) is `seq ack payload` with seq and ack modulo 128, or a control frame, first byte 0x81 and up:

    SYN version delay nonce              opener -> listener, until it is answered
    SYN_ACK version delay nonce nonce    listener -> opener; both nonces together make the session's keys
    ACK ack bitmap                       the next seq expected, and which later ones are here; also the heartbeat
    PIECES seq ack index count payload   a sixteenth or more of a frame that never gets through whole
    FIN ack seq, FIN_ACK                 the end, after everything was acknowledged

The keys are a direction's own, so neither a frame of another session nor an echo of one's own is ever genuine, and the
listener takes a new session only when the opener has proved that it lives in it: a stale SYN costs an answer, no more.

The line is FIFO. So what was sent before a frame that is acknowledged, and is not acknowledged itself, is lost, and is
sent again at once; the timer is for the last frames of a burst. `delay` (units of 2 ms) says how long this side may
hold an acknowledgement back: a single one a few frames is cheap.

Priorities live above, so little may queue below: where the line's rate is known, `outgoing` gives out a frame only when
the line is about to be free, and `ahead` says how long a byte sent now would wait.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

from . import cobs

VERSION = 1
PAYLOAD = 1024  # bytes of a frame at most
WINDOW = 64  # frames under way at most: half of what seq can tell apart
SLACK = 0.002  # seconds before the line is free at which the next frame is given out
HEARTBEAT = 0.8  # seconds of saying nothing
SILENCE = 2.5  # seconds of hearing nothing after which the peer is gone
STUCK = 30.0  # seconds in which the peer is heard and yet nothing gets through
LINGER = 2.0  # seconds without progress that the last bytes get after close()

_SYN, _SYN_ACK, _ACK, _FIN, _FIN_ACK, _PIECES = range(0x81, 0x87)
_OPEN_KEY = crc32(b"shoal arq")  # of frames outside a session
_LONGEST = PAYLOAD + 6 + (PAYLOAD + 6) // 254 + 1  # a frame without its delimiter
_EAGER = 4  # frames that one acknowledgement answers
_WHOLE, _PIECE = 3, 64  # tries that a frame gets whole; bytes of a piece of it after that
_SMALLEST, _FIRST, _STEP = 48, 128, 8  # the payload size: where it ends under noise, begins, and how it grows


@dataclass(slots=True)
class _Frame:
    payload: bytes
    number: int  # of its last transmission, counted over all frames
    sent: float  # when its last byte left, as far as we know
    tries: int = 0
    lost: bool = False  # waits to be sent again


@dataclass(slots=True)
class _Offer:
    """A session that the listener has answered and whose opener has not yet proved itself."""

    nonce: bytes
    answer: bytes
    delay: float
    receive_key: int
    send_key: int
    made: float
    due: float


class Arq:
    """One session. `state`: "listen" or "syn" -> "open" -> "closing" -> "closed"; "lost" or "reset" with a `why`.

    The owner calls `receive` with what arrives, then `outgoing` after each call and when `wakeup` says so.
    `successor` is the next session's Arq where a peer has dialled meanwhile; in "reset" (it proved itself) `rest` is
    what that begins with.
    `rate` is the line's bytes a second or None; `hold` set by the owner refuses payload that nobody reads.
    """

    def __init__(
        self,
        now: float,
        rate: float | None = None,
        *,
        opener: bool,
        nonce: Callable[[], bytes] = lambda: secrets.token_bytes(4),
    ):
        self.state, self.why = ("syn" if opener else "listen"), ""
        self.rate, self.hold = rate, False
        self.successor: Arq | None = None
        self.rest = b""
        self.sent_again = self.damaged = 0  # frames
        self._make_nonce, self._nonce = nonce, nonce() if opener else b""
        self._offer: _Offer | None = None
        self._receive_key = self._send_key = 0
        self._partial, self._skipping = b"", False
        self._control: list[tuple[bytes, int]] = []
        self._line_free = self._last_sent = self._heard = self._progress = now
        self._syn_due, self._syn_wait = now, 0.1
        # what goes out
        self._unsent = bytearray()
        self._flight: dict[int, _Frame] = {}
        self._base = self._next = self._number = 0
        self._size, self._growing, self._shrunk_at = _FIRST, True, 0
        self._largest = PAYLOAD if rate is None else max(64, min(PAYLOAD, int(rate / 4)))
        self._smooth: float | None = None  # round trip, seconds
        self._varies, self._least, self._backoff = 0.0, 0.3, 1.0
        # what comes in
        self._expected = 0
        self._early: dict[int, bytes] = {}
        self._pieces: dict[int, dict[int, bytes]] = {}  # of frames that come cut
        self._unanswered, self._ack_due = 0, float("inf")
        self._ack_delay = 0.02 if rate is None else min(0.2, _EAGER * PAYLOAD / rate)
        self._peer_delay = 0.2
        self._fin_due = self._fin_until = float("inf")
        # A short frame shows the peer that we live in this session, again and again until it has shown it too
        self._prove_due, self._met = float("inf"), False
        self._heartbeat = now  # short, and so what still gets through where frames of payload do not

    # ---- for the owner

    @property
    def queued(self) -> int:
        """Bytes that were given to `send` and have not left once."""
        return len(self._unsent)

    @property
    def unacknowledged(self) -> int:
        """Bytes that were given to `send` and are not known to have arrived."""
        return len(self._unsent) + sum(len(frame.payload) for frame in self._flight.values())

    @property
    def round_trip(self) -> float | None:
        return self._smooth

    def ahead(self, now: float) -> float:
        """Seconds for which a byte sent now would wait; infinite while the window is full."""
        if self._unsent:
            return max(self._line_free - now, 0) + len(self._unsent) / self.rate if self.rate else float("inf")
        return max(self._line_free - now, 0) if self.rate else 0.0

    def waiting(self, count: int, now: float) -> None:
        """The port says that `count` bytes still wait in it: the line is free no sooner than after them."""
        if self.rate and count:
            self._line_free = max(self._line_free, now + count / self.rate)

    def send(self, data: bytes) -> None:
        """Queues payload. Allowed while `state` is "open"."""
        if self.state != "open":
            raise ValueError(f"a session in state {self.state} takes no payload")
        self._unsent += data

    def close(self, now: float) -> None:
        """Ends the session in order: after what is queued has arrived, or LINGER without progress."""
        if self.state == "open":
            self.state, self._fin_due, self._progress = "closing", now, now
        elif self.state in ("listen", "syn"):
            self.state = "closed"

    def abandon(self, why: str) -> None:
        """The line is gone: the session is lost at once."""
        if self.state not in ("closed", "lost", "reset"):
            self._end("lost", why)

    # ---- bytes in

    def receive(self, data: bytes, now: float) -> bytes:
        """The payload that `data` completes. Never raises: what is not genuine is dropped and counted."""
        *frames, rest = (self._partial + data).split(b"\0")
        payload: list[bytes] = []
        for index, frame in enumerate(frames):
            if self._skipping or not frame or len(frame) > _LONGEST:
                self.damaged += self._skipping or bool(frame)
                self._skipping = False
                continue
            self._take(frame, now, payload)
            if self.state == "reset":
                self.rest = b"\0".join([*frames[index:], rest])
                return b"".join(payload)
        self._partial = rest
        if len(rest) > _LONGEST:
            self._partial, self._skipping = b"", True
        return b"".join(payload)

    def _take(self, frame: bytes, now: float, payload: list[bytes]) -> None:
        opened = cobs.unseal(frame)
        if opened is None:
            self.damaged += 1
            return
        body, check = opened
        if self.state in ("open", "closing") and cobs.genuine(body, check, self._receive_key):
            self._heard = now
            self._met = True
            self._session(body, now, payload)
        elif self._offer is not None and cobs.genuine(body, check, self._offer.receive_key):
            if self.state == "listen":
                self._begin(self._offer.receive_key, self._offer.send_key, self._offer.delay, now)
                self._met = True
                self._session(body, now, payload)
            elif self.state in ("open", "closing"):
                self._end("reset", "the peer started anew")
        elif cobs.genuine(body, check, _OPEN_KEY):
            self._greeting(body, now)
        else:
            self.damaged += 1

    def _begin(self, receive_key: int, send_key: int, delay: float, now: float) -> None:
        self.state, self._offer = "open", None
        self._receive_key, self._send_key, self._peer_delay = receive_key, send_key, delay
        self._heard = self._progress = now
        self._prove_due = now

    def _greeting(self, body: bytes, now: float) -> None:
        kind, version = body[0], body[1] if len(body) > 1 else 0
        if kind == _SYN and len(body) == 7:
            nonce = body[3:7]
            if self._nonce:
                if self.state == "syn":
                    self.why = "the line gives back what is sent" if nonce == self._nonce else "the peer dials as well"
                return
            if self._offer is None or self._offer.nonce != nonce:
                own = self._make_nonce()
                up, down = _keys(nonce + own)
                answer = bytes([_SYN_ACK, VERSION, round(self._ack_delay * 500)]) + nonce + own
                self._offer = _Offer(nonce, answer, body[2] / 500, up, down, now, now)
            self._offer.due = self._offer.made = now
        elif kind == _SYN_ACK and len(body) == 11 and body[3:7] == self._nonce:
            if self.state == "syn" and version != VERSION:
                self._end("lost", f"the peer speaks version {version} of the line protocol and this side {VERSION}")
            elif self.state == "syn":
                up, down = _keys(body[3:11])
                self._begin(down, up, body[2] / 500, now)
            elif self.state == "open":
                self._prove_due = now  # our first word was lost

    def _session(self, body: bytes, now: float, payload: list[bytes]) -> None:
        kind = body[0]
        if kind < 0x80 and len(body) > 2 and body[1] < 0x80:
            self._acknowledged(body[1], b"", now)
            self._data(kind, body[2:], now, payload)
        elif kind == _ACK and len(body) > 1 and body[1] < 0x80:
            self._acknowledged(body[1], body[2:], now)
        elif kind == _PIECES and 5 < len(body) <= 5 + _PIECE and body[3] < body[4] <= PAYLOAD // _PIECE:
            self._acknowledged(body[2], b"", now)
            self._piece(body[1], body[3], body[4], body[5:], now, payload)
        elif kind == _FIN and len(body) == 3:
            self._acknowledged(body[1], b"", now)
            if body[2] == self._expected & 0x7F and not self._early:
                self._control += [(bytes([_FIN_ACK]), self._send_key)] * 2  # nobody is left to ask for a lost one
                self._end("closed", "")
        elif kind == _FIN_ACK and self._fin_until < float("inf"):
            self._end("closed", "")

    def _piece(self, seq: int, index: int, count: int, data: bytes, now: float, payload: list[bytes]) -> None:
        ahead = (seq - self._expected) & 0x7F
        pieces = self._pieces.setdefault(self._expected + ahead, {}) if ahead < WINDOW else {}
        pieces[index] = data
        if ahead >= WINDOW or len(pieces) >= count:  # what is here already is for _data to say so
            self._data(seq, b"".join(pieces[each] for each in sorted(pieces)), now, payload)

    def _data(self, seq: int, data: bytes, now: float, payload: list[bytes]) -> None:
        ahead = (seq - self._expected) & 0x7F
        if ahead >= WINDOW or self._expected + ahead in self._early:
            self._ack_due = now  # it is here already: the acknowledgement was lost
            return
        if self.hold:
            return
        self._early[self._expected + ahead] = data
        while self._expected in self._early:
            payload.append(self._early.pop(self._expected))
            self._pieces.pop(self._expected, None)
            self._expected += 1
        self._unanswered += 1
        prompt = self._early or self._unanswered >= _EAGER
        self._ack_due = min(self._ack_due, now if prompt else now + self._ack_delay)

    def _acknowledged(self, ack: int, bitmap: bytes, now: float) -> None:
        base = self._base + ((ack - self._base) & 0x7F)
        if base > self._next:
            return  # an older one than the last
        seqs = list(range(self._base, base))
        if bitmap:
            bits = int.from_bytes(bitmap[: WINDOW // 8], "little")
            seqs += [base + 1 + bit for bit in range(WINDOW) if bits >> bit & 1]
        self._base = base
        arrived = [frame for seq in seqs if (frame := self._flight.pop(seq, None))]
        if not arrived:
            return
        self._progress, self._backoff = now, 1.0
        more = self._size if self._growing else _STEP * len(arrived)
        self._size = min(self._largest, self._size + more)
        newest = max(arrived, key=lambda frame: frame.number)
        if newest.tries == 1:
            self._measured(max(now - newest.sent, 0.0))
        for frame in self._flight.values():
            if frame.number < newest.number and not frame.lost:
                frame.lost = True
                self._shrink(frame)

    def _measured(self, trip: float) -> None:
        """RFC 6298, section 2."""
        self._least = trip if self._smooth is None else min(self._least, trip)
        if self._smooth is None:
            self._smooth, self._varies = trip, trip / 2
        self._varies += (abs(self._smooth - trip) - self._varies) / 4
        self._smooth += (trip - self._smooth) / 8

    def _shrink(self, frame: _Frame) -> None:
        """Under noise short frames get through: once a round trip at most, for what was sent at the present size."""
        if frame.number > self._shrunk_at:
            self._size, self._growing, self._shrunk_at = max(_SMALLEST, self._size // 2), False, self._number

    # ---- bytes out

    def outgoing(self, now: float) -> bytes:
        """What the line may have now: whole frames, and no more than keeps it busy until the next call is due."""
        self._expire(now)
        out = []
        while not self.rate or self._line_free - now <= SLACK + 1e-9:
            if not (frame := self._next_frame(now)):
                break
            out.append(frame)
        return b"".join(out)

    def wakeup(self, now: float) -> float | None:
        """When to call `outgoing` again if nothing arrives before; None where nothing is to come."""
        if self._control or (self.state in ("open", "closing") and self._has_data()):
            return max(now, self._line_free - SLACK) if self.rate else now
        if self.state == "syn":
            return self._syn_due
        if self.state == "listen":
            return self._offer.due if self._offer else None
        if self.state in ("open", "closing"):
            timer = min((frame.sent for frame in self._flight.values()), default=float("inf")) + self._timeout
            offer = self._offer.due if self._offer else float("inf")
            idle = not self._flight and not self._unsent
            due = min(self._ack_due, self._prove_due, self._heartbeat, offer, self._fin_due if idle else float("inf"))
            if self.rate:
                due = max(due, self._line_free - SLACK)
            return min(due, timer, self._heard + SILENCE, self._fin_until)
        return None

    @property
    def _timeout(self) -> float:
        """Seconds after which a frame that nobody spoke of is lost."""
        if self._smooth is None:
            return self._backoff
        return (self._smooth + max(4 * self._varies, 0.02) + self._peer_delay) * min(self._backoff, 4.0)

    def _expire(self, now: float) -> None:
        if self.state == "syn" and now >= self._syn_due:
            self._control.append((bytes([_SYN, VERSION, round(self._ack_delay * 500)]) + self._nonce, _OPEN_KEY))
            self._syn_due, self._syn_wait = now + self._syn_wait, min(self._syn_wait * 1.5, 0.5)
        if self._offer is not None and now >= self._offer.due:
            self._control.append((self._offer.answer, _OPEN_KEY))
            self._offer.due = now + 0.3
            if now - self._offer.made > SILENCE:
                self._offer = None
        if self.state not in ("open", "closing"):
            return
        if now - self._heard > SILENCE:
            return self._end("lost", f"nothing has been heard of the peer for {SILENCE:g} seconds")
        if self._flight and now - self._progress > (LINGER if self.state == "closing" else STUCK):
            return self._end("lost", "the peer is there and yet nothing gets through to it")
        if now > self._fin_until:
            return self._end("closed", "")
        late = [frame for frame in self._flight.values() if not frame.lost and frame.sent + self._timeout <= now]
        for frame in late:
            frame.lost = True
            self._shrink(frame)
        if late and (self._smooth is None or self._heard < min(frame.sent for frame in late)):
            self._backoff = min(self._backoff * 2, 8.0)  # a peer that speaks is on a noisy line, not on a slow one
        if self.state == "closing" and not self._flight and not self._unsent and now >= self._fin_due:
            self._control.append((bytes([_FIN, self._expected & 0x7F, self._next & 0x7F]), self._send_key))
            self._fin_due = now + max(0.1, min(self._timeout, 0.5))
            self._fin_until = min(self._fin_until, now + LINGER / 2)

    def _next_frame(self, now: float) -> bytes:
        if self._control:
            return self._emit(*self._control.pop(0), now)
        if self.state not in ("open", "closing"):
            return b""
        answer = now >= self._ack_due and (self._early or not self._has_data())
        if answer or now >= self._prove_due or now >= self._heartbeat:
            self._heartbeat = now + HEARTBEAT
            self._prove_due = float("inf") if self._met else now + 0.2
            return self._emit(bytes([_ACK, self._answer()]) + self._bitmap(), self._send_key, now)
        if not self._has_data():
            return b""
        frame = next((item for item in self._flight.items() if item[1].lost), None)
        if frame is not None:
            seq, again = frame
            again.lost = False
            self.sent_again += 1
        else:
            seq, again = self._next, _Frame(bytes(self._unsent[: self._size]), 0, 0.0)
            del self._unsent[: self._size]
            if not self._flight:
                self._progress = now
            self._flight[seq] = again
            self._next += 1
        self._number += 1
        again.number = self._number
        again.tries += 1
        ack = self._expected & 0x7F if self._early else self._answer()
        if again.tries > _WHOLE and len(again.payload) > 2 * _PIECE:
            sealed = self._emit_pieces(seq & 0x7F, ack, again.payload, now)
        else:
            sealed = self._emit(bytes([seq & 0x7F, ack]) + again.payload, self._send_key, now)
        again.sent = self._line_free if self.rate else now
        return sealed

    def _emit_pieces(self, seq: int, ack: int, payload: bytes, now: float) -> bytes:
        """A frame cut when the line was good, that is too long for it now: the listener collects its pieces."""
        pieces = [payload[start : start + _PIECE] for start in range(0, len(payload), _PIECE)]
        heads = [bytes([_PIECES, seq, ack, index, len(pieces)]) for index in range(len(pieces))]
        return b"".join(
            self._emit(head + piece, self._send_key, now) for head, piece in zip(heads, pieces, strict=True)
        )

    def _has_data(self) -> bool:
        """Whether a frame of payload may go out as soon as the line is free."""
        if any(frame.lost for frame in self._flight.values()):
            return True
        if not self._unsent or self._next - self._base >= WINDOW:
            return False
        if self.rate is None:
            return True
        # A line slower than it was said to be fills what lies between: no more than a round trip's worth is under way
        room = self.rate * (self._least + self._peer_delay + 0.1)
        return sum(len(frame.payload) for frame in self._flight.values()) < room

    def _answer(self) -> int:
        self._unanswered, self._ack_due = 0, float("inf")
        return self._expected & 0x7F

    def _bitmap(self) -> bytes:
        bits = sum(1 << (seq - self._expected - 1) for seq in self._early)
        return bits.to_bytes((bits.bit_length() + 7) // 8, "little")

    def _emit(self, body: bytes, key: int, now: float) -> bytes:
        frame = cobs.seal(body, key)
        if now - self._last_sent > 0.05 or body[0] in (_SYN, _SYN_ACK):
            frame = b"\0" + frame  # noise on the idle line does not cost us this frame
        self._last_sent = now
        if self.rate:
            self._line_free = max(self._line_free, now) + len(frame) / self.rate
        return frame

    def _end(self, state: str, why: str) -> None:
        self.state, self.why = state, why
        self._flight.clear()
        self._unsent.clear()
        if self._offer is not None:  # a peer that has just dialled does not wait for this session's end
            self.successor = Arq(self._offer.made, self.rate, opener=False, nonce=self._make_nonce)
            self.successor._offer, self._offer = self._offer, None
        if state != "closed":
            self._control.clear()


def _keys(nonces: bytes) -> tuple[int, int]:
    """What seals frames towards the listener, and towards the opener."""
    return crc32(b"to the listener" + nonces), crc32(b"to the opener" + nonces)
