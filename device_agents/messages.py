"""What device and edge say to each other: one frozen dataclass per message, sent as a type number and a FlatBuffer.

To add a message is to add a class with a number that was never used; to change one is to add fields at its end, each
with a default. Nothing is removed or retyped, so both sides may be of different versions: an unknown field is ignored,
a missing one has its default, an unknown message is answered with a Failure, and what cannot be ignored is a word in
`Hello.required`. Digests are hex SHA-256, times whole milliseconds, tensors row-major and little-endian in the body.

A number is not a fact: what a field says is checked by whoever acts on it. It knows nothing about links.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal.runtime import errors
from shoal.runtime.errors import LinkError, ShoalError

from . import flat

VERSION = 1  # of the conversation; it grows when a side has to know which one it talks to

Message = Any  # an instance of a class below

TYPES: dict[int, type] = {}
_NUMBERS: dict[type, int] = {}
_NUMBER = struct.Struct("<H")

T = TypeVar("T", bound=type)


def message(number: int) -> Callable[[T], T]:
    """Makes a frozen dataclass a message of this number, for good."""

    def register(kind: T) -> T:
        flat.slots(kind)  # a class that cannot be a table is found out when it is imported
        if TYPES.setdefault(number, kind) is not kind or not 0 < number < 1 << 16:
            raise TypeError(f"message {number} is {TYPES.get(number)}")
        _NUMBERS[kind] = number
        return kind

    return register


def encode(value: Message) -> bytes:
    """The bytes of a message, at most 64 KiB. Raises UsageError where a field does not fit its type."""
    return _NUMBER.pack(_NUMBERS[type(value)]) + flat.pack(value)


def decode(data: bytes) -> Message:
    """The message that `encode` made these bytes of, checked. Raises LinkError."""
    number = _NUMBER.unpack_from(data)[0] if len(data) >= 2 else 0
    kind = TYPES.get(number)
    if kind is None:
        raise LinkError(
            "A message of the peer cannot be read.", f"Its type is {number}, unknown here.", "Upgrade shoal."
        )
    return flat.unpack(kind, data[2:])


def schema() -> str:
    """All messages as an .fbs, for another language; the type number of each is in the comment before it."""
    numbers = "".join(f"// {number} {kind.__name__}\n" for number, kind in sorted(TYPES.items()))
    return numbers + "\n" + flat.schema(TYPES.values())


# Both ways


@message(1)
@dataclass(frozen=True)
class Hello:
    """The first message each way. `required` names what the other side must know (`features`) to go on."""

    version: int
    role: str  # device or edge
    name: str = ""
    software: str = ""
    features: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    clock_ms: int = 0  # Unix time; a hint, nothing is decided by it


_FAMILIES: dict[int, type[ShoalError]] = {
    family.code: family
    for family in vars(errors).values()
    if isinstance(family, type) and issubclass(family, ShoalError) and family is not ShoalError
}


@message(2)
@dataclass(frozen=True)
class Failure:
    """A request failed: a ShoalError on its way. `retry_ms` is when it may be worth another try (0: not said)."""

    code: int
    what: str = ""
    why: str = ""
    fix: str = ""
    retry_ms: int = 0

    @classmethod
    def of(cls, error: ShoalError) -> "Failure":
        """`error`, for the other side. A `retry_ms` that it has goes along."""
        what, why, fix = (printable(text, _SENTENCE) for text in (error.what, error.why, error.fix))
        return cls(error.code, what, why, fix, getattr(error, "retry_ms", 0))

    def error(self) -> ShoalError:
        """The error again, of the same family (RemoteError if unknown here), with `retry_ms`."""
        family = _FAMILIES.get(self.code, errors.RemoteError)
        error = family(*(printable(sentence, _SENTENCE) for sentence in (self.what, self.why, self.fix)))
        error.retry_ms = max(self.retry_ms, 0)  # type: ignore[attr-defined]
        return error


_SENTENCE = 2000


def printable(text: str, most: int = 255) -> str:
    """What a peer wrote, fit for a terminal: no control characters or escape sequences, at most `most` characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:most])


@message(3)
@dataclass(frozen=True)
class Accepted:
    """Done; there is nothing more to say."""


# Negotiation


@message(10)
@dataclass(frozen=True)
class Health:
    """How a device is. NaN, -1 and "" where it has no sensor."""

    battery_percent: float = float("nan")
    on_power: int = -1  # 0, 1
    temperature_c: float = float("nan")
    memory_available: int = -1  # bytes
    memory_pressure: float = float("nan")  # stalled share of the last 10 s, percent
    cpu_percent: float = float("nan")
    link_rate: float = float("nan")  # bytes/s


@dataclass(frozen=True)
class Mode:
    """An operating point of a split: `bytes` of a latent, `device_ms` of the head, `accuracy` as the bundle states."""

    id: int
    bits: int = 0
    bytes: int = 0
    device_ms: float = float("nan")
    accuracy: float = float("nan")


@dataclass(frozen=True)
class Model:
    """A model that a side has."""

    digest: str
    name: str = ""
    role: str = ""
    encoder: str = ""  # digest of what makes the latents
    tables: str = ""  # digest of the entropy coder's tables
    modes: tuple[Mode, ...] = ()
    length: int = 0  # bytes


@message(11)
@dataclass(frozen=True)
class State:
    """What a device has and how it is. Answered with an Agreement."""

    device_id: str
    models: tuple[Model, ...] = ()
    health: Health | None = None
    features: tuple[str, ...] = ()


@message(12)
@dataclass(frozen=True)
class Agreement:
    """What the edge will do for the device, for `valid_s` seconds; `tail` is "" where it will do nothing, and `why`."""

    tail: str = ""
    encoder: str = ""
    modes: tuple[int, ...] = ()
    deadline_ms: int = 0
    inflight: int = 0
    fetch: tuple[str, ...] = ()  # digests that the device should have first
    valid_s: int = 0
    why: str = ""


@message(13)
@dataclass(frozen=True)
class Renegotiate:
    """From the edge: what was agreed holds no more. The device states itself again."""

    why: str = ""


# Tails


@dataclass(frozen=True)
class Shape:
    """The shape of one tensor."""

    dims: tuple[int, ...] = ()


@message(20)
@dataclass(frozen=True)
class Infer:
    """Runs a tail. Body: the tensors in order. Answered with Inferred."""

    tail: str
    mode: int = 0
    tables: str = ""
    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = ()
    deadline_ms: int = 0  # from when it was sent
    trace: str = ""


@message(21)
@dataclass(frozen=True)
class Inferred:
    """What the tail gave. Body: the tensors in order."""

    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = ()
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    batch: int = 0
    where: str = ""


@message(22)
@dataclass(frozen=True)
class InferCoded:
    """Runs a tail on latents that the codec of `mode` wrote. Body: that message, of `length` bytes. Answered with
    Inferred, whose compute_ms then has the decoding in it."""

    tail: str
    mode: int = 0
    tables: str = ""
    length: int = 0
    deadline_ms: int = 0  # from when it was sent
    trace: str = ""


# Models and updates


@message(30)
@dataclass(frozen=True)
class Fetch:
    """Asks for a model from byte `offset` on. Answered with Fetched."""

    digest: str
    offset: int = 0


@message(31)
@dataclass(frozen=True)
class Fetched:
    """`length` bytes in all; body: those from `offset`."""

    length: int
    digest: str = ""
    offset: int = 0


@message(32)
@dataclass(frozen=True)
class ListModels:
    """Answered with Models."""


@message(33)
@dataclass(frozen=True)
class Models:
    """What the edge has."""

    models: tuple[Model, ...] = ()


@message(34)
@dataclass(frozen=True)
class Updates:
    """Is there anything newer than manifest `version`? Answered with Manifest."""

    version: int = 0


@message(35)
@dataclass(frozen=True)
class Manifest:
    """A signed manifest as it was published; empty where there is none newer."""

    data: bytes = b""


@message(36)
@dataclass(frozen=True)
class Offer:
    """From the edge, unasked: a manifest that the device may want, with signatures that came apart from it."""

    manifest: bytes
    signatures: tuple[bytes, ...] = ()


# Language models


@message(40)
@dataclass(frozen=True)
class Generate:
    """Continues `tokens`, or `text` where there are none. Answered with Generated."""

    model: str
    session: str = ""
    tokens: tuple[int, ...] = ()
    text: str = ""
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = -1  # -1: any
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    first: int = 0  # how many tokens of this answer the device has already


@message(41)
@dataclass(frozen=True)
class Generated:
    """Body: Tokens as they come, each after its length (u32)."""

    session: str = ""
    model: str = ""
    where: str = ""


@message(42)
@dataclass(frozen=True)
class Token:
    """One token; `finish` is "" until the last one."""

    id: int
    text: str = ""
    finish: str = ""


@message(43)
@dataclass(frozen=True)
class Continue:
    """Runs the rest of a model's blocks. Body: hidden states, `rows` of them from position `first`."""

    model: str
    session: str = ""
    first: int = 0
    rows: int = 0
    dtype: str = ""  # "": float32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = -1
    top_k: int = 0
    min_p: float = 0.0
    want: str = ""  # "": the next token; logits: those of the last row, as the body
    turn: int = 0  # grows with each Continue of a session; one that comes after a later one is refused


@message(44)
@dataclass(frozen=True)
class Continued:
    """What came of it: the next token of each row asked for, or a body with `rows` of `dtype`."""

    session: str = ""
    tokens: tuple[int, ...] = ()
    rows: int = 0
    dtype: str = ""
    compute_ms: float = 0.0
    held: int = 0  # positions that the edge has now; with no token and no rows, where to go on from
