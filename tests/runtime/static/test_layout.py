"""The index of static graphs: what is written comes back, and bytes from outside are refused by the field's name."""

import dataclasses
import json

import pytest

from shoal.runtime.errors import BundleError
from shoal.runtime.static.layout import Attend, Call, Shadow, Static, gives, takes

INDEX = Static(
    backend="npu", chunks=(32, 128),
    widths={"embed": 8, "qkv": 16, "qkv.shadow": 16, "attended": 8, "add": 8},
    steps=(
        Call("embed", 0, ("tokens",), ("embed",), device=False), Call("0.0-qkv", 0, ("embed",), ("qkv",)),
        Shadow(0, "embed", "qkv.shadow", 0.03, 8, 16, 0, 128, (1, 5), 0.25),
        Attend("attend.0", 0, ("qkv", "qkv.shadow"), "attended"), Call("0.1-o", 0, ("attended", "embed"), ("add",)),
    ),
    stream="add", head="head",
)  # fmt: skip


def test_what_is_written_comes_back_and_unknown_keys_are_ignored():
    data = INDEX.to_json()
    assert Static.from_json(data) == INDEX and Static.from_json(data).to_json() == data
    raw = json.loads(data)
    raw["later"] = raw["steps"][0]["later"] = 1
    assert Static.from_json(json.dumps(raw).encode()) == INDEX
    assert INDEX.names == ["0.0-qkv", "0.1-o"]
    assert [(takes(step), gives(step)) for step in INDEX.steps][2] == (("embed",), ("qkv.shadow",))


def changed(*path_and_value) -> bytes:
    raw = json.loads(INDEX.to_json())
    *path, last, value = path_and_value
    at = raw
    for key in path:
        at = at[key]
    at[last] = value
    return json.dumps(raw).encode()


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not JSON"), (b"[" * 100_000, "not JSON"), (b"[]", "not JSON"), (changed("version", 2), "version"),
        (changed("chunks", [128, 32]), "rise"), (changed("chunks", []), "chunks"),
        (changed("chunks", [True]), "chunks"),
        (changed("chunks", [HUGE]), "chunks"), (changed("widths", {}), "widths"), (changed("widths", "qkv", 0), "qkv"),
        (changed("widths", "qkv", HUGE), "qkv"), (changed("widths", {str(n): 1 for n in range(65)}), "widths"),
        (changed("steps", []), "steps"), (changed("steps", 0, "kind", "jump"), "steps[0]"),
        (changed("steps", 1, "takes", ["other"]), "other"), (changed("steps", 1, "takes", "embed"), "takes"),
        (changed("steps", 1, "takes", ["attended"]), "nothing before it gives"),
        (changed("steps", 1, "gives", []), "gives"),
        (changed("steps", 1, "name", "a\x1b[2J"), "name"), (changed("steps", 1, "device", 1), "device"),
        (changed("steps", 1, "block", -1), "block"), (changed("steps", 3, "gives", 7), "gives"),
        (changed("steps", 2, "weights", -1), "offset"), (changed("steps", 2, "inputs", 9), "other widths"),
        (changed("steps", 2, "scale", 0), "scale"), (changed("steps", 2, "scale", float("nan")), "scale"),
        (changed("steps", 2, "importance", "much"), "importance"), (changed("steps", 2, "hot", [8]), "hot"),
        (changed("steps", 2, "hot", {}), "hot"),
        (changed("stream", "none"), "stream"), (changed("stream", "tokens"), "stream"),
        (changed("backend", None), "backend"),
    ],
)  # fmt: skip
def test_bytes_from_outside_are_refused_by_the_field(data, named):
    with pytest.raises(BundleError) as refused:
        Static.from_json(data)
    assert named in refused.value.why and "\x1b" not in str(refused.value)


def test_any_damage_is_refused_or_leaves_an_index():
    import random

    rng, data = random.Random(0), INDEX.to_json()
    for _ in range(2000):
        hurt = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            hurt[rng.randrange(len(hurt))] = rng.choice(b'0123456789[]{}",:-e nul\x00\xff')
        try:
            found = Static.from_json(bytes(hurt))
        except BundleError:
            continue
        assert dataclasses.is_dataclass(found) and found.steps
