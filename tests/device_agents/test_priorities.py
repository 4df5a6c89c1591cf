"""A serial line by the clock: what is urgent passes what is not, whatever is queued. Nothing here waits or is timed."""

import random

import pytest

from shoal.device_agents import frames
from shoal.device_agents.protocol import Answered, Data, Ended, Opened, Priority, Protocol, Reset

BAUD = 115_200
RATE = BAUD / 10  # bytes a second: a start and a stop bit each
AROUND = 22 + 10  # what TLS and the serial line's own frame add to a chunk


class Line:
    """One direction of a cable. It holds one chunk, and takes the next when the last bit of that is out."""

    def __init__(self, source: Protocol, target: Protocol):
        self.source, self.target = source, target
        self.free = 0.0
        self.chunk = b""
        self.began: dict[int, float] = {}  # when each stream's first frame went out
        self.busy = 0.0
        self._watch = frames.Decoder()

    def unload(self, now: float) -> list:
        """What the other side reports of the chunk that is out by now."""
        if self.free > now:
            return []
        chunk, self.chunk = self.chunk, b""
        return self.target.receive(chunk, now) if chunk else []

    def load(self, now: float) -> None:
        if self.free <= now and not self.chunk:
            self.chunk = self.source.next_chunk(now)
            if self.chunk:
                self.free = now + (len(self.chunk) + AROUND) / RATE
                self.busy += self.free - now
                self._watch.feed(self.chunk)
                for frame in iter(self._watch.next, None):
                    self.began.setdefault(frame.stream, now)


class Cable:
    """Both directions, and a clock that goes from one thing that happens to the next."""

    def __init__(self):
        self.now = 0.0
        self.device, self.edge = Protocol(True, 0.0, rate=RATE), Protocol(False, 0.0, rate=RATE)
        self.lines = Line(self.device, self.edge), Line(self.edge, self.device)
        self.events = {self.device: [], self.edge: []}

    def run(self, until: float) -> None:
        while True:
            for line in self.lines:
                for event in line.unload(self.now):
                    self.heard(line.target, event)
            for line in self.lines:
                line.load(self.now)
            due = [line.free for line in self.lines if line.free > self.now]
            if not due or min(due) > until:
                self.now = until
                return
            self.now = min(due)

    def heard(self, side: Protocol, event) -> None:
        self.events[side].append((self.now, event))
        if isinstance(event, Data):
            side.consumed(event.stream, len(event.data))
        if isinstance(event, Opened) and event.priority is Priority.CONTROL:
            side.answer(event.stream, b"answer", end=True)


@pytest.fixture
def cable() -> Cable:
    """With bulk both ways for longer than any test looks."""
    cable = Cable()
    for side in cable.device, cable.edge:
        for _ in range(3):
            stream = side.open(Priority.BULK, b"fetch")
            side.write(stream, bytes(1 << 20))
    return cable


def test_control_is_never_behind_more_than_50_ms_of_bulk(cable):
    rng = random.Random(8)
    asked = {}
    for _ in range(300):
        cable.run(cable.now + rng.expovariate(5))
        asked[cable.device.open(Priority.CONTROL, rng.randbytes(rng.randrange(200)), end=True)] = cable.now
    cable.run(cable.now + 1)
    waits = [cable.lines[0].began[stream] - when for stream, when in asked.items()]
    assert 0.04 < max(waits) <= 0.05
    answered = {event.stream: when for when, event in cable.events[cable.device] if isinstance(event, Answered)}
    assert answered.keys() == asked.keys()
    # Waits for one chunk each way; neither it (at most 206 bytes) nor its answer (10) is filled up with bulk
    most = 0.05 + (206 + AROUND) / RATE + 0.05 + (10 + AROUND) / RATE
    assert max(answered[stream] - when for stream, when in asked.items()) <= most + 1e-9
    assert all(line.busy > 0.98 * cable.now for line in cable.lines)  # and bulk had all the rest of the line


def test_a_latent_passes_bulk_and_control_passes_a_latent(cable):
    cable.run(1.0)
    latent = cable.device.open(Priority.LATENT, b"infer", deadline=2.0)
    cable.device.write(latent, bytes(6900))
    cable.device.end(latent)
    cable.run(1.2)
    control = cable.device.open(Priority.CONTROL, b"health", end=True)
    cable.run(3.0)
    when = {(type(event), event.stream): at for at, event in cable.events[cable.edge]}
    assert when[Ended, control] - 1.2 <= 0.1
    # 6.9 kB, one chunk of bulk ahead and one of control amid: what is around them included
    assert when[Ended, latent] - 1.0 <= 6900 * (1 + 45 / 515) / RATE + 0.1
    assert not any(isinstance(event, Reset) for _, event in cable.events[cable.edge])


def test_a_latent_that_cannot_be_in_time_leaves_the_line_to_the_next(cable):
    late = cable.device.open(Priority.LATENT, b"", deadline=1.0)
    cable.device.write(late, bytes(27_600))  # 2.4 s of the line
    cable.run(0.9)
    fresh = cable.device.open(Priority.LATENT, b"", deadline=2.0)
    cable.device.write(fresh, bytes(6900))
    cable.device.end(fresh)
    cable.run(3.0)
    heard = [(type(event), event.stream) for _, event in cable.events[cable.edge]]
    assert (Reset, late) in heard and (Ended, fresh) in heard and (Ended, late) not in heard


def test_a_bulk_transfer_costs_little_more_than_its_bytes():
    for rate, most in (92_160, 0.01), (11_520, 0.075):
        device, edge = Protocol(True, 0.0, rate=rate), Protocol(False, 0.0, rate=rate)
        stream = device.open(Priority.BULK, b"offer")
        device.write(stream, bytes(65_536))
        device.end(stream)
        forth = back = 0
        while device.queued(stream):
            while chunk := device.next_chunk(0.0):
                forth += len(chunk) + AROUND
                for event in edge.receive(chunk, 0.0):
                    if isinstance(event, Data):
                        edge.consumed(stream, len(event.data))
            while chunk := edge.next_chunk(0.0):
                back += len(chunk) + AROUND
                device.receive(chunk, 0.0)
        assert forth + back <= 65_536 * (1 + most)
