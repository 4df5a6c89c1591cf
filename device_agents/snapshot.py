"""What an edge says of itself at one moment: the shape that the dashboard draws and `metrics` counts.

Plain values only, so that a snapshot is JSON as it stands. Sizes are bytes, durations seconds, moments Unix seconds,
rates bytes a second; None is "unknown" (no sensor, not measured yet), never zero. Lists are in the order to show.
It knows nothing about who makes a snapshot or who reads it.
"""

import asyncio
from typing import Literal, Protocol, TypedDict

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds, of a latency


class Latency(TypedDict):
    """How long requests took on the edge, from their last byte in to their first byte out."""

    count: int
    sum: float
    buckets: list[int]  # len(BUCKETS): how many took at most that long (cumulative, as Prometheus wants them)
    p50: float | None  # of the last few hundred
    p95: float | None
    recent: list[
        float | None
    ]  # the median of each of the last (at most 60) spans of 5 s, oldest first; None: no request


class Requests(TypedDict):
    """Counted since the edge started, but for `running`."""

    done: int
    busy: int  # refused: the queue was full
    late: int  # dropped: their deadline passed
    failed: int
    running: int


class Link(TypedDict):
    """A connection that stands."""

    name: str  # as links.Transport.name
    kind: Literal["tcp", "serial"]
    since: float
    rate: float | None
    rtt: float | None
    sent: int  # on the wire, as the edge sees it; of this connection
    received: int


class Health(TypedDict):
    """What the device last reported."""

    battery_percent: float | None
    on_power: bool | None
    temperature_c: float | None
    memory_available: int | None
    memory_pressure: float | None  # 0 to 1
    cpu_percent: float | None


class Chosen(TypedDict):
    """What was agreed with a device: one mode in use, of those allowed."""

    model: str  # name, for people
    tail: str  # digest
    mode: int
    bits: int
    bytes: int  # of one latent
    accuracy: float | None  # 0 to 1
    allowed: list[int]
    deadline: float
    inflight: int
    why: str  # one sentence


class Device(TypedDict):
    """A paired device, connected or not."""

    fingerprint: str
    id: str
    name: str
    rights: list[str]
    paired_at: float
    seen_at: float | None
    link: Link | None  # None: not connected
    health: Health | None
    chosen: Chosen | None
    requests: Requests
    latency: Latency
    sent: int  # of all its connections since the edge started
    received: int


class Model(TypedDict):
    """A bundle in the edge's store."""

    digest: str
    name: str
    role: str  # "tail", "decode", ...
    bytes: int
    resident: int | None  # bytes it takes in memory; None: not loaded
    used_at: float | None
    served: int  # requests since the edge started
    batches: int  # runs of the graph; served / batches is the mean batch
    queued: int
    where: str  # "" here, else the URL that serves it


class Round(TypedDict):
    """A round of federated training."""

    name: str  # of the job
    number: int  # from 1
    rounds: int  # of the job
    state: Literal["waiting", "training", "aggregating", "done", "failed"]
    started_at: float
    ended_at: float | None
    asked: int  # devices
    answered: int
    bytes: int
    metric: str  # "" if none, e.g. "loss"
    value: float | None
    why: str  # "" unless it failed


class Pairing(TypedDict):
    """The last pairing window. `code` and `text` are secrets while it is open, and empty afterwards."""

    state: Literal["open", "used", "expired", "locked", "closed"]
    code: str
    text: str  # what the QR code holds
    address: str  # where a device reaches this edge
    opened_at: float
    closes_at: float
    tries_left: int
    paired: str  # name of the device that used it, else ""


class Memory(TypedDict):
    used: int
    limit: int | None


class Snapshot(TypedDict):
    name: str
    id: str
    version: str
    time: float  # now, by the edge's clock: ages are counted from here
    started_at: float
    addresses: list[str]
    draining: bool
    memory: Memory
    requests: Requests  # of all devices, those revoked since included
    latency: Latency
    devices: list[Device]
    models: list[Model]
    rounds: list[Round]  # newest first, at most 50
    pairing: Pairing | None


class Watched(Protocol):
    """The face of an edge that `web` needs. Methods raise ShoalError; all are called from the edge's event loop."""

    def snapshot(self) -> Snapshot: ...

    def subscribe(self) -> asyncio.Queue[object]:
        """A queue of at most a few items; anything put there (put_nowait, dropped when full) says "look again"."""

    def unsubscribe(self, queue: asyncio.Queue[object]) -> None: ...

    def open_window(self) -> object: ...

    def close_window(self) -> None: ...

    def rename(self, fingerprint: str, name: str) -> None: ...

    def revoke(self, fingerprint: str) -> None: ...
