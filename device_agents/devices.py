"""What an edge knows of a device that is paired with it, and how it says so in a snapshot.

Values only: what the device stated, what was agreed, what it asked and how that ended. It knows nothing about how a
request is answered.
"""

import math
from datetime import datetime

from . import messages, snapshot
from .connection import Connection
from .figures import Counter, Timings
from .negotiate import Link, Renegotiation
from .trust import Peer

_LARGE = 16 << 10  # bytes of a body from where its transfer says how fast the link is


class Device:
    """A paired device. `connections` are open, the newest last; most of it is empty until the device has said it."""

    def __init__(self, peer: Peer):
        self.peer = peer
        self.connections: list[Connection] = []
        self.since = 0.0  # Unix seconds, of the newest connection
        self.state: messages.State | None = None
        self.health: messages.Health | None = None
        self.agreement: messages.Agreement | None = None
        self.watch: Renegotiation | None = None
        self.mode: int | None = None  # of the last latent
        self.requests, self.timings = Counter(), Timings()
        self.told = False  # that it should state itself again
        self._rate: float | None = None
        self._sent = self._received = 0  # of connections that have ended

    def opened(self, connection: Connection, now: float) -> None:
        self.connections.append(connection)
        self.since = now

    def closed(self, connection: Connection) -> None:
        sent, received = _moved(connection)
        self._sent, self._received = self._sent + sent, self._received + received
        self.connections.remove(connection)
        if not self.connections:  # what is agreed ends with the link; health and figures stay
            self.state = self.agreement = self.watch = None

    def transferred(self, size: int, seconds: float) -> None:
        """A body of `size` bytes came in `seconds`: what the link carries, at least."""
        if size >= _LARGE and seconds > 0.002:
            rate = size / seconds
            self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate

    @property
    def link(self) -> Link:
        """The newest connection's rate and round trip, as far as they are known."""
        if not self.connections:
            return Link()
        newest = self.connections[-1]
        said = self.health.link_rate if self.health else math.nan
        rate = newest.transport.rate or self._rate or (said if said > 0 else None)
        return Link(rate, newest.rtt)

    def say(self, models: dict[str, messages.Model], now: float) -> snapshot.Device:
        """`models` by digest name what was chosen; `now` is the loop's time."""
        moved = [_moved(connection) for connection in self.connections]
        return {
            "fingerprint": self.peer.fingerprint, "id": self.peer.id, "name": self.peer.name,
            "rights": sorted(self.peer.rights), "paired_at": _unix(self.peer.paired_at) or 0.0,
            "seen_at": _unix(self.peer.seen_at), "link": self._link(), "health": _health(self.health),
            "chosen": self._chosen(models), "requests": self.requests.say(), "latency": self.timings.say(now),
            "sent": self._sent + sum(sent for sent, _ in moved),
            "received": self._received + sum(received for _, received in moved),
        }  # fmt: skip

    def _link(self) -> snapshot.Link | None:
        if not self.connections:
            return None
        transport = self.connections[-1].transport
        sent, received = _moved(self.connections[-1])
        return {
            "name": transport.name, "kind": "serial" if transport.name.startswith("serial") else "tcp",
            "since": self.since, "rate": self.link.rate, "rtt": self.link.rtt, "sent": sent, "received": received,
        }  # fmt: skip

    def _chosen(self, models: dict[str, messages.Model]) -> snapshot.Chosen | None:
        agreed = self.agreement
        if agreed is None or not agreed.tail:
            return None
        number = self.mode if self.mode in agreed.modes else agreed.modes[0]
        model = models.get(agreed.tail) or messages.Model(agreed.tail)
        mode = next((mode for mode in model.modes if mode.id == number), messages.Mode(number))
        return {
            "model": model.name or agreed.tail[:12], "tail": agreed.tail, "mode": number, "bits": mode.bits,
            "bytes": mode.bytes, "accuracy": _known(mode.accuracy), "allowed": list(agreed.modes),
            "deadline": agreed.deadline_ms / 1000, "inflight": agreed.inflight, "why": agreed.why,
        }  # fmt: skip


def _health(said: messages.Health | None) -> snapshot.Health | None:
    if said is None:
        return None
    pressure = _known(said.memory_pressure)
    return {
        "battery_percent": _known(said.battery_percent),
        "on_power": None if said.on_power not in (0, 1) else bool(said.on_power),
        "temperature_c": _known(said.temperature_c),
        "memory_available": said.memory_available if said.memory_available >= 0 else None,
        "memory_pressure": None if pressure is None else min(1.0, max(0.0, pressure / 100)),
        "cpu_percent": _known(said.cpu_percent),
    }  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _moved(connection: Connection) -> tuple[int, int]:
    return getattr(connection.transport, "sent", 0), getattr(connection.transport, "received", 0)


def _unix(moment: str) -> float | None:
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return None
