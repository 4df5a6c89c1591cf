"""The sliding window on a simulated line with a clock of its own: faults cost bytes and time, never a wrong byte."""

import random
from zlib import crc32

import pytest
from faults import damage

from shoal.device_agents.links import arq, cobs
from shoal.device_agents.links.arq import Arq

BAUD_115200, BAUD_921600 = 11_520.0, 92_160.0


class Wire:
    """One direction: FIFO, paced, noisy."""

    def __init__(self, rate=None, errors=0.0, losses=0.0, delay=0.0, duplicates=0.0, seed=0):
        self.rate, self.errors, self.losses, self.delay, self.duplicates = rate, errors, losses, delay, duplicates
        self.rng, self.free, self.items, self.bytes, self.dead = random.Random(seed), 0.0, [], 0, False
        self.record = bytearray()

    def put(self, data, now):
        self.bytes += len(data)
        self.record += data
        self.free = max(self.free, now) + (len(data) / self.rate if self.rate else 0)
        if not self.dead:
            harmed = damage(data, self.errors, self.losses, self.rng)
            self.items.append((self.free + self.delay, harmed * (1 + (self.rng.random() < self.duplicates))))

    def take(self, now):
        out = b""
        while self.items and self.items[0][0] <= now:
            out += self.items.pop(0)[1]
        return out


class Line:
    """Two ends and the wires between them."""

    def __init__(self, rate=None, believed=None, **faults):
        self.now = 0.0
        seed = faults.pop("seed", 0)
        believed = believed or rate
        self.a, self.b = Arq(0.0, believed, opener=True), Arq(0.0, believed, opener=False)
        self.up, self.down = Wire(rate, seed=2 * seed, **faults), Wire(rate, seed=2 * seed + 1, **faults)
        self.at_a, self.at_b = bytearray(), bytearray()
        self.turns = 0

    def run(self, until=lambda: False, seconds=60.0, each=lambda: None):
        """Goes on until `until` holds, or for `seconds`. Returns whether it held."""
        end = self.now + seconds
        while not until():
            each()
            for side, wire in ((self.a, self.up), (self.b, self.down)):
                if data := side.outgoing(self.now):
                    wire.put(data, self.now)
            times = [side.wakeup(self.now) for side in (self.a, self.b)]
            times += [wire.items[0][0] for wire in (self.up, self.down) if wire.items]
            due = min((time for time in times if time is not None), default=end)
            if due >= end:
                held = until()
                self.now = self.now if held else end
                return held
            self.now = max(self.now + 1e-5, due)
            self.turns += 1
            if data := self.up.take(self.now):
                self.at_b += self.b.receive(data, self.now)
            if data := self.down.take(self.now):
                self.at_a += self.a.receive(data, self.now)
        return True

    def open(self):
        assert self.run(lambda: self.a.state == "open" and self.b.state == "open")
        return self


def carried(line, up, down, seconds=120.0):
    """Both sides send; whether exactly that arrives."""
    line.a.send(up)
    line.b.send(down)
    assert line.run(lambda: len(line.at_b) >= len(up) and len(line.at_a) >= len(down), seconds), line.a.why
    return (line.at_b, line.at_a) == (up, down)


def test_both_directions_carry_everything_in_order():
    line = Line(BAUD_921600).open()
    assert carried(line, random.Random(1).randbytes(100_000), bytes(50_000))
    assert line.a.sent_again == line.b.sent_again == 0


@pytest.mark.parametrize("delay", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(
    "faults",
    [
        dict(errors=1e-6),
        dict(errors=1e-5),
        dict(errors=1e-4),
        dict(errors=1e-3),
        dict(errors=5e-3),
        dict(losses=1e-3),
        dict(duplicates=0.2),
        dict(errors=1e-3, losses=1e-3, duplicates=0.2),
    ],
    ids=str,
)
def test_noise_and_loss_cost_time_and_nothing_else(faults, delay):
    for seed in range(3):
        line = Line(BAUD_921600, delay=delay, seed=seed, **faults).open()
        assert carried(line, random.Random(seed).randbytes(20_000), random.Random(-seed).randbytes(5_000))


def test_frames_cut_for_a_good_line_get_through_a_bad_one():
    line = Line(BAUD_921600).open()
    assert carried(line, random.Random(1).randbytes(20_000), b"")
    line.a.send(random.Random(2).randbytes(8_000))
    line.a.outgoing(line.now)
    line.up.errors = line.down.errors = 1e-2
    assert line.run(lambda: len(line.at_b) == 28_000, 30)
    assert line.at_b[20_000:] == random.Random(2).randbytes(8_000)


@pytest.mark.deep
def test_a_thousand_random_lines():
    rng = random.Random(1)
    for seed in range(1000):
        rate = rng.choice((None, 960.0, BAUD_115200, BAUD_921600, 300_000.0))
        faults = {name: rng.choice((0, 10 ** rng.uniform(-6, -2.3))) for name in ("errors", "losses", "duplicates")}
        line = Line(rate, seed=seed, delay=rng.choice((0, 0.2 * rng.random())), **faults)
        assert line.run(lambda line=line: line.a.state == line.b.state == "open", 60)
        size = 2000 if rate == 960 else 30_000
        assert carried(line, rng.randbytes(rng.randrange(size)), rng.randbytes(rng.randrange(size)), 600), faults


def test_a_line_of_unknown_rate_is_bounded_by_the_window():
    line = Line(None, delay=0.01, errors=1e-4).open()
    data = random.Random(1).randbytes(300_000)
    line.a.send(data)
    most = 0

    def each():
        nonlocal most
        most = max(most, sum(len(frame.payload) for frame in line.a._flight.values()))

    assert line.run(lambda: len(line.at_b) == len(data), each=each)
    assert line.at_b == data
    assert most <= arq.WINDOW * arq.PAYLOAD


@pytest.mark.parametrize("rate, budget", [(BAUD_921600, 0.04), (BAUD_115200, 0.08)])
def test_overhead(rate, budget):
    """64 KiB as the layers above cut it: chunks of 45 ms of the line, each with 3 + 22 bytes of theirs."""
    line = Line(rate).open()
    line.run(seconds=0.1)
    before = line.up.bytes + line.down.bytes
    chunk = int(rate * 0.045) - 3
    total = 0
    for start in range(0, 65_536, chunk):
        piece = random.Random(start).randbytes(min(chunk, 65_536 - start) + 25)
        total += len(piece)
        line.a.send(piece)
        assert line.run(lambda: line.a.ahead(line.now) <= arq.SLACK + 1e-6)
    assert line.run(lambda: len(line.at_b) == total)
    assert (line.up.bytes + line.down.bytes - before) / 65_536 - 1 <= budget


def test_a_control_message_is_never_behind_50_ms_of_bulk():
    line = Line(BAUD_115200).open()
    chunk = int(BAUD_115200 * 0.045) + 22
    worst = 0.0

    def each():
        nonlocal worst
        worst = max(worst, line.a.ahead(line.now), line.up.free - line.now + line.a.queued / BAUD_115200)

    for _ in range(60):
        line.a.send(bytes(chunk))
        assert line.run(lambda: line.a.ahead(line.now) <= arq.SLACK + 1e-6, each=each)
    assert worst <= 0.050


def test_a_line_slower_than_it_was_said_to_be_does_not_fill_up():
    line = Line(BAUD_115200 / 2, believed=BAUD_115200).open()
    line.a.send(bytes(60_000))
    worst = 0.0

    def each():
        nonlocal worst
        worst = max(worst, line.up.free - line.now)

    assert line.run(lambda: len(line.at_b) == 60_000, each=each)
    assert worst < 1.0 and line.a.sent_again == 0


def test_either_side_may_begin_first():
    for first in ("a", "b"):
        line = Line(BAUD_115200)
        (line.down if first == "a" else line.up).dead = True
        line.run(seconds=5.0)
        line.up.dead = line.down.dead = False
        line.open()


def test_noise_before_the_first_frame():
    line = Line(BAUD_115200)
    for wire in (line.up, line.down):
        wire.put(random.Random(3).randbytes(3000), 0.0)
    line.open()
    line.a.send(b"hello")
    assert line.run(lambda: line.at_b == b"hello")


def test_an_opener_that_starts_anew_ends_the_old_session_and_begins_one():
    line = Line(BAUD_115200).open()
    line.a.send(b"x" * 5000)
    line.run(lambda: len(line.at_b) > 1000)
    old, line.a, line.at_b = line.b, Arq(line.now, BAUD_115200, opener=True), bytearray()
    assert line.run(lambda: old.state == "reset")
    assert "anew" in old.why and old.successor is not None
    line.b = old.successor
    before = len(line.at_b)
    line.at_b += line.b.receive(old.rest, line.now)
    line.a.state == "open" or line.open()
    line.a.send(b"new")
    assert line.run(lambda: line.at_b.endswith(b"new"))
    assert set(line.at_b[before:]) <= set(b"new")


def test_who_dials_while_the_session_before_falls_silent_is_not_kept_waiting():
    """The old session ends between the new peer's first word and its proof: the answer that it has still counts."""
    for steps in range(1, 60):
        line = Line(delay=0.03).open()
        old = line.b
        line.a, line.up.dead = Arq(line.now, opener=True), True
        line.run(seconds=arq.SILENCE - steps * 0.01)  # nobody speaks to the old session
        line.up.dead, line.a = False, Arq(line.now, opener=True)

        def follow(line=line):
            if line.b.state in ("lost", "reset", "closed"):
                rest, line.b = line.b.rest, line.b.successor or Arq(line.now, opener=False)
                line.at_b += line.b.receive(rest, line.now)

        line.at_b.clear()
        assert line.run(lambda line=line: line.a.state == "open", 1.0, follow)
        line.a.send(b"at once")
        assert line.run(lambda line=line: line.at_b == b"at once", 2.0, follow)
        assert old.state in ("lost", "reset")


def test_a_listener_that_starts_anew_is_noticed_and_found_again():
    line = Line(BAUD_115200).open()
    line.b = Arq(line.now, BAUD_115200, opener=False)
    line.a.send(b"lost with the session")
    start = line.now
    assert line.run(lambda: line.a.state == "lost")
    assert line.now - start <= arq.SILENCE + 0.1 and line.b.state == "listen" and not line.at_b
    line.a = Arq(line.now, BAUD_115200, opener=True)
    line.open()
    line.a.send(b"again")
    assert line.run(lambda: line.at_b == b"again")


def test_bytes_of_an_earlier_session_mean_nothing():
    earlier = Line(BAUD_921600).open()
    earlier.a.send(b"old" * 1000)
    earlier.run(lambda: len(earlier.at_b) == 3000)
    earlier.a.close(earlier.now)
    earlier.run(lambda: earlier.b.state == "closed")
    line = Line(BAUD_921600)
    line.up.put(bytes(earlier.up.record), 0.0)
    line.down.put(bytes(earlier.down.record), 0.0)
    line.open()
    line.up.put(bytes(earlier.up.record), line.now)
    line.down.put(bytes(earlier.down.record), line.now)
    line.a.send(b"new")
    line.run(seconds=10)
    assert line.at_b == b"new" and not line.at_a
    assert line.a.state == line.b.state == "open"


def test_an_own_session_recorded_and_played_again_means_nothing():
    """A hub or a driver that repeats: duplicates within half a window of frames are known as such."""
    line = Line(BAUD_921600).open()
    line.a.send(b"once" * 500)
    line.run(lambda: len(line.at_b) == 2000)
    line.up.put(bytes(line.up.record), line.now)
    line.run(seconds=3)
    assert line.at_b == b"once" * 500 and line.b.state == "open"


def test_a_dead_peer_is_noticed_and_waited_for_without_work():
    line = Line(BAUD_115200).open()
    line.run(seconds=20)
    assert line.a.state == line.b.state == "open"  # heartbeats alone hold an idle session
    line.up.dead = line.down.dead = True
    line.turns = 0
    line.a.send(bytes(3000))
    assert line.run(lambda: line.a.state == line.b.state == "lost", seconds=arq.SILENCE + 0.5)
    assert "heard" in line.a.why and line.turns < 100
    assert line.a.wakeup(line.now) is None and not line.a.outgoing(line.now)


def test_a_stall_shorter_than_silence_is_survived():
    line = Line(BAUD_115200).open()
    data = random.Random(1).randbytes(20_000)
    line.a.send(data)
    line.run(seconds=0.5)
    for wire in (line.up, line.down):
        wire.free = line.now + 2.0
        wire.items = [(max(due, wire.free), data) for due, data in wire.items]
    assert line.run(lambda: len(line.at_b) >= len(data)) and line.at_b == data


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("errors", [0.0, 1e-3])
def test_close_delivers_what_was_sent_and_both_sides_end(errors, seed):
    line = Line(BAUD_921600, errors=errors, seed=seed).open()
    data = random.Random(seed).randbytes(10_000)
    line.a.send(data)
    line.a.close(line.now)
    assert line.run(lambda: line.a.state == line.b.state == "closed", 20)
    assert line.at_b == data and not line.a.why and not line.b.why


def test_close_towards_a_dead_peer_ends():
    line = Line(BAUD_921600).open()
    line.up.dead = line.down.dead = True
    line.a.send(b"nobody")
    line.a.close(line.now)
    assert line.run(lambda: line.a.state == "lost", arq.SILENCE + 0.5)


def test_payload_that_nobody_reads_waits_at_the_sender():
    line = Line(BAUD_921600).open()
    line.b.hold = True
    line.a.send(bytes(5000))
    line.run(seconds=10)
    assert not line.at_b and line.a.state == line.b.state == "open" and line.a.unacknowledged == 5000
    line.b.hold = False
    assert line.run(lambda: len(line.at_b) == 5000)


def test_an_echoing_line_and_two_openers_say_so():
    a = Arq(0.0, opener=True)
    a.receive(a.outgoing(0.0), 0.0)
    assert a.state == "syn" and "gives back" in a.why
    a.receive(Arq(0.0, opener=True).outgoing(0.0), 0.0)
    assert a.state == "syn" and "dials as well" in a.why


def test_another_version_is_refused_with_both_numbers():
    a = Arq(0.0, opener=True, nonce=lambda: b"abcd")
    answer = bytes([0x82, 9, 1]) + b"abcdefgh"
    a.receive(cobs.seal(answer, crc32(b"shoal arq")), 0.0)
    assert a.state == "lost" and "version 9" in a.why and str(arq.VERSION) in a.why


def test_noise_is_never_payload_and_never_kept():
    rng = random.Random(7)
    for opener in (True, False):
        side = Arq(0.0, BAUD_115200, opener=opener)
        for step in range(2000):
            noise = rng.choice((rng.randbytes(300), b"\1" * 3000, b"\0" * 9, b"\2x\0" * 20))
            assert side.receive(noise, step * 0.01) == b""
            side.outgoing(step * 0.01)
            assert len(side._partial) <= arq._LONGEST
        assert side.state == ("syn" if opener else "listen")


def test_genuine_frames_with_any_body_break_nothing():
    """A peer that seals what it likes: states end or go on, memory stays under the window's, nothing raises."""
    rng = random.Random(8)
    for _ in range(30):
        line = Line(None).open()
        line.b.send(bytes(3000))
        key = line.b._receive_key
        for _ in range(300):
            body = bytes([rng.choice((rng.randrange(256), *range(0x81, 0x87)))]) + rng.randbytes(rng.randrange(40))
            line.b.receive(cobs.seal(body, rng.choice((key, key, arq._OPEN_KEY))), line.now)
            line.b.outgoing(line.now)
            line.now += 0.001
            assert len(line.b._early) <= arq.WINDOW and len(line.b._control) < 8
            assert line.b.wakeup(line.now) is None or line.b.wakeup(line.now) >= line.now - 1


def test_only_an_open_session_takes_payload():
    with pytest.raises(ValueError):
        Arq(0.0, opener=True).send(b"x")
