import json
import math
import shutil
import struct
import subprocess
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.device_agents import flat, messages
from shoal.device_agents.messages import Failure, Generate, Health, Hello, Infer, Model, Offer, Shape
from shoal.runtime import errors
from shoal.runtime.errors import BusyError, LinkError, ShoalError, UsageError

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
SCALARS = {
    bool: st.booleans(),
    int: INT64,
    float: st.floats(allow_nan=False),
    str: st.text(max_size=40),
    bytes: st.binary(max_size=40),
}
KINDS = [kind for _, kind in sorted(messages.TYPES.items())]


def values(kind):
    """Any value that a message may hold there."""
    if kind in SCALARS:
        return SCALARS[kind]
    return st.builds(kind, *(slot_values(slot) for slot in flat.slots(kind)))


def slot_values(slot):
    if slot.many:
        return st.lists(values(slot.kind), max_size=4).map(tuple)
    return values(slot.kind) | st.none() if slot.default is None else values(slot.kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_sent_is_what_comes(kind, data):
    message = data.draw(values(kind))
    assert messages.decode(messages.encode(message)) == message


def test_a_number_never_changes_its_message():
    given = {
        1: "Hello", 2: "Failure", 3: "Accepted",
        10: "Health", 11: "State", 12: "Agreement", 13: "Renegotiate",
        20: "Infer", 21: "Inferred", 22: "InferCoded",
        30: "Fetch", 31: "Fetched", 32: "ListModels", 33: "Models", 34: "Updates", 35: "Manifest", 36: "Offer",
        40: "Generate", 41: "Generated", 42: "Token", 43: "Continue", 44: "Continued",
    }  # fmt: skip
    assert given == {number: messages.TYPES[number].__name__ for number in given}


def test_a_number_is_given_once():
    @dataclass(frozen=True)
    class Other:
        x: int = 0

    with pytest.raises(TypeError):
        messages.message(1)(Other)


@dataclass(frozen=True)
class Old:
    name: str
    count: int = 7


@dataclass(frozen=True)
class New:
    name: str
    count: int = 7
    shapes: tuple[Shape, ...] = ()
    ratio: float = 0.5
    flag: bool = True
    blobs: tuple[bytes, ...] = ()


def test_a_later_version_is_read_by_an_earlier_one_and_the_other_way_round():
    new = New("a", 3, (Shape((1, 2)),), 0.25, False, (b"x", b""))
    assert flat.unpack(Old, flat.pack(new)) == Old("a", 3)
    assert flat.unpack(New, flat.pack(Old("b"))) == New("b")
    assert flat.unpack(New, flat.pack(new)) == new


def test_defaults_cost_nothing_and_unknown_health_stays_unknown():
    assert len(flat.pack(Health())) <= 16
    health = flat.unpack(Health, flat.pack(Health(battery_percent=50.0)))
    assert health.battery_percent == 50.0 and math.isnan(health.temperature_c) and health.on_power == -1


@dataclass(frozen=True)
class Loose:
    name: str = ""


@pytest.mark.parametrize("kind", [Hello, Model, Infer, Offer])
def test_what_is_required_and_missing_is_named(kind):
    with pytest.raises(LinkError, match=kind.__name__ + r"\.\w+ is missing"):
        flat.unpack(kind, flat.pack(Loose()))


@pytest.mark.parametrize(
    "message",
    [
        Hello(1 << 63, "edge"),
        Hello(1, None),
        Hello("1", "edge"),
        Hello(1, "\ud800"),
        Infer("t", shapes=((1, 2),)),
        Infer("t", names=(1,)),
        Generate("m", text="x" * (1 << 16)),
        Generate("m", tokens=tuple(range(9000))),
    ],
    ids=range(8),
)
def test_what_does_not_fit_is_not_sent(message):
    with pytest.raises(UsageError):
        messages.encode(message)


def test_offsets_that_meet_do_not_unfold_without_end():
    """A thousand strings that are all the same long one: 12 KB that would become 8 MB."""
    count, long = 1000, "x" * 8000
    data = bytearray(flat.pack(Hello(1, "edge", features=("",) * count + (long,))))
    vector = _follow(data, _field(data, _follow(data, 0), 4))
    last = _follow(data, vector + 4 + 4 * count)
    for at in range(vector + 4, vector + 4 + 4 * count, 4):
        struct.pack_into("<I", data, at, last - at)
    with pytest.raises(LinkError, match="features unfolds to more than"):
        flat.unpack(Hello, bytes(data))


def _field(data, table, slot):
    vtable = table - struct.unpack_from("<i", data, table)[0]
    return table + struct.unpack_from("<H", data, vtable + 4 + 2 * slot)[0]


def _follow(data, at):
    return at + struct.unpack_from("<I", data, at)[0]


def test_an_error_comes_out_as_the_same_family():
    families = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ShoalError)]
    for family in families:
        error = messages.decode(messages.encode(Failure.of(family("What.", "Why.", "Fix.")))).error()
        assert type(error) is (errors.RemoteError if family is ShoalError else family)
        assert (error.what, error.why, error.fix) == ("What.", "Why.", "Fix.")
    busy = BusyError("a", "b", "c")
    busy.retry_ms = 40
    assert Failure.of(busy).error().retry_ms == 40
    assert type(Failure(999).error()) is errors.RemoteError


def test_any_error_can_be_sent():
    error = Failure.of(errors.RemoteError("\ud800", "x" * 100_000, "a\nb"))
    assert messages.decode(messages.encode(error)) == error and error.fix == "a b"


def test_a_failure_cannot_move_the_cursor():
    assert "\x1b" not in str(Failure(14, "\x1b[2J", "a\x07b", "\u202e").error())


# The bytes are real FlatBuffers: flatc reads ours, and we read flatc's.

flatc = pytest.mark.skipif(not shutil.which("flatc"), reason="flatc is not installed")


def as_json(message):
    """What flatc prints of a message: every field by name, vectors of bytes as numbers."""
    if isinstance(message, bytes):
        return list(message)
    if isinstance(message, tuple):
        return [{"value": list(one)} if isinstance(one, bytes) else as_json(one) for one in message]
    if is_dataclass(message):
        found = {field.name: getattr(message, field.name) for field in fields(message)}
        return {name: as_json(value) for name, value in found.items() if value is not None and value == value}
    return message


def full(kind):
    """A message with something in every field."""
    sample = {bool: True, int: 5, float: 1.5, str: "grün", bytes: b"\x00\xff"}
    found = []
    for slot in flat.slots(kind):
        one = sample[slot.kind] if slot.kind in sample else full(slot.kind)
        found.append((one, one) if slot.many else one)
    return kind(*found)


@flatc
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_flatc_reads_ours_and_we_read_what_it_writes(kind, tmp_path: Path):
    (tmp_path / "messages.fbs").write_text(messages.schema())
    message = full(kind)
    (tmp_path / "m.bin").write_bytes(messages.encode(message)[2:])
    root = ["--root-type", kind.__name__, "-o", tmp_path]
    read = ["flatc", "--json", "--strict-json", "--raw-binary", *root, tmp_path / "messages.fbs", "--", "m.bin"]
    subprocess.run(read, check=True, cwd=tmp_path)
    assert json.loads((tmp_path / "m.json").read_text()) == as_json(message)
    subprocess.run(["flatc", "--binary", *root, tmp_path / "messages.fbs", "m.json"], check=True, cwd=tmp_path)
    assert flat.unpack(kind, (tmp_path / "m.bin").read_bytes()) == message
