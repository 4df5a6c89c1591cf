"""What streams and a connection can be: their states as tables, what is said about them, and what bounds them.

docs/protocol.md shows the tables to people; protocol.py moves along them. This module knows no frame and no clock.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum, auto

MAX_HEAD = 64 << 10
FIRST_CREDIT = 32 << 10  # body bytes that a side may send on a stream before it was granted any


class Priority(IntEnum):
    """Of a stream, both ways; strict: the lower number always goes first."""

    CONTROL = 0
    LATENT = 1
    BULK = 2


class Code(IntEnum):
    """Why a stream was reset. Above 100 it is the application: 100 and the family's code of docs/errors.md."""

    CANCELLED = 0
    BUSY = 1  # too much is under way: not a byte of it was looked at
    STALE = 2  # its deadline passed before it was sent
    GOING_AWAY = 3  # opened after its peer said that it leaves: not a byte of it was looked at
    DONE = 4  # the answer is whole, and the rest of the request is not wanted


class Half(Enum):
    """One direction of a stream: a head, then a body, then the end."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    ENDED = auto()


class State(Enum):
    """Of the connection."""

    OPEN = auto()
    LEAVING = auto()  # one side goes away: what is under way is finished, nothing is begun
    CLOSED = auto()


# begin: OPEN or ANSWER. whole: the head's last byte. What is not in a table is refused: by a ProtocolError where the
# peer did it, by a UsageError where the caller did. RESET takes a stream out of any state.
HALVES: dict[Half, dict[str, Half]] = {
    Half.IDLE: {"begin": Half.HEAD},
    Half.HEAD: {"bytes": Half.HEAD, "whole": Half.BODY},
    Half.BODY: {"bytes": Half.BODY, "end": Half.ENDED},
    Half.ENDED: {},
}
CONNECTION: dict[State, dict[str, State]] = {
    State.OPEN: {"go away": State.LEAVING, "close": State.CLOSED},
    State.LEAVING: {"go away": State.LEAVING, "close": State.CLOSED},
    State.CLOSED: {},
}


@dataclass(frozen=True)
class Limits:
    """What one side holds for its peer, in bytes, and how long it waits, in seconds."""

    streams: int = 256  # alive at once, whoever opened them
    window: int = 256 << 10  # of one stream: granted and not yet consumed
    buffered: int = 8 << 20  # all windows and heads together
    keep_alive: float = 10.0  # a side that sent nothing for so long sends a ping
    silence: float = 30.0  # a line that brought, or took, nothing for so long is over


@dataclass(frozen=True)
class Opened:
    stream: int
    priority: Priority
    head: bytes


@dataclass(frozen=True)
class Answered:
    stream: int
    head: bytes


@dataclass(frozen=True)
class Data:
    """Counts against the stream's window until `consumed` says otherwise."""

    stream: int
    data: bytes


@dataclass(frozen=True)
class Ended:
    """The peer's half is whole."""

    stream: int


@dataclass(frozen=True)
class Reset:
    """The stream is gone, both halves; after Ended it means that the peer wants no more of this side's half."""

    stream: int
    code: int
    why: str


@dataclass(frozen=True)
class RoundTrip:
    seconds: float


@dataclass(frozen=True)
class GoingAway:
    """The peer takes no new streams; those alive go on."""

    why: str


@dataclass(frozen=True)
class Closed:
    """The connection is over and every stream with it."""

    why: str


Event = Opened | Answered | Data | Ended | Reset | RoundTrip | GoingAway | Closed
