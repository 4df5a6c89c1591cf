"""The trace's file: what is written comes back, and nothing that shoal did not write is used."""

import json

import numpy as np
import pytest

from shoal.runtime.errors import StorageError, UsageError
from shoal.runtime.experts.trace import MAGIC, Recorder, Trace


@pytest.mark.parametrize("hidden", [0, 16])
def test_a_trace_comes_back(routing, tmp_path, hidden):
    trace = routing(40, hidden=hidden, record=4096, seconds=0.01)
    trace.save(tmp_path / "a.trace")
    found = Trace.load(tmp_path / "a.trace")
    for name in ("ids", "starts", "scores", "inputs"):
        assert np.array_equal(getattr(trace, name), getattr(found, name)), name
    assert (found.model, found.experts, found.record, found.seconds) == ("made up", 8, 4096, 0.01)
    assert [part.start for part in found.sequences] == [0, 10, 20, 30] and found.sequences[-1].stop == 40
    trace.save(tmp_path / "a.trace")  # in the place of what is mapped
    assert [path.name for path in tmp_path.iterdir()] == ["a.trace"]


def test_ids_alone_are_a_trace(of_ids, tmp_path):
    of_ids([[[0, -1]], [[2, 1]]], experts=3).save(tmp_path / "a")
    found = Trace.load(tmp_path / "a")
    assert found.ids.tolist() == [[[0, -1]], [[2, 1]]] and found.scores is None and found.inputs is None


def test_a_recorder_puts_steps_together(routing):
    trace = routing(40, hidden=16)
    recorder = Recorder("made up", 8)
    for part in trace.sequences:
        recorder.begin()
        recorder.begin()  # nothing came between
        middle = part.start + 3
        for some in (slice(part.start, middle), slice(middle, part.stop)):
            recorder.add(trace.ids[some], trace.scores[some].astype(np.float32), trace.inputs[some] * np.float32(1))
    recorder.begin()
    found = recorder.trace(seconds=0.5)
    for name in ("ids", "starts", "scores", "inputs"):
        assert np.array_equal(getattr(trace, name), getattr(found, name)), name
    large = Recorder("x", 8)
    large.add(trace.ids[:1], inputs=np.full((1, 3, 4), 1e6, np.float32))
    assert np.isfinite(large.trace().inputs).all()
    with pytest.raises(UsageError):
        Recorder("x", 8).trace()
    large.add(trace.ids[1:2])  # without inputs
    with pytest.raises(UsageError):
        large.trace()


def change(path, **fields):
    """The file with these in its description."""
    data = path.read_bytes()
    length = int.from_bytes(data[8:12], "little")
    raw = json.loads(data[12 : 12 + length])
    raw.update(fields)
    described = json.dumps(raw).encode()
    begin = MAGIC + len(described).to_bytes(4, "little") + described
    arrays = data[-(-(12 + length) // 8) * 8 :]
    path.write_bytes(begin + bytes(-len(begin) % 8) + arrays)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": 1 << 30}, {"tokens": 0}, {"tokens": -1}, {"tokens": True}, {"tokens": "40"}, {"tokens": 39},
        {"layers": 1 << 20}, {"experts": 4}, {"experts": 0}, {"top_k": 1}, {"sequences": 1 << 23}, {"sequences": 5},
        {"hidden": 8}, {"scores": False}, {"scores": 1}, {"model": 5}, {"model": "x" * 2000}, {"seconds": float("nan")},
        {"seconds": "1"}, {"seconds": -1.0}, {"record": -1}, {"record": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_that_lies_is_refused(routing, tmp_path, fields):
    path = tmp_path / "a"
    routing(40).save(path)
    change(path)
    Trace.load(path)  # as it was
    change(path, **fields)
    with pytest.raises(UsageError) as refused:
        Trace.load(path)
    assert len(str(refused.value)) < 600


def test_values_that_nobody_recorded_are_refused(routing, tmp_path):
    good = routing(40, hidden=4)
    for name, at, value in (
        ("ids", (3, 1, 0), 8), ("ids", (3, 1, 0), -2), ("ids", (3, 1, slice(None)), 5), ("starts", 0, 1),
        ("starts", 2, 10), ("starts", 3, 40), ("starts", 1, -5), ("scores", (0, 0, 0), np.nan),
        ("inputs", (39, 2, 3), np.inf),
    ):  # fmt: skip
        good.save(tmp_path / "a")
        array = getattr(good, name).copy()
        array[at] = value
        data = (tmp_path / "a").read_bytes()
        assert data.count(getattr(good, name).tobytes()) == 1
        (tmp_path / "a").write_bytes(data.replace(getattr(good, name).tobytes(), array.tobytes()))
        with pytest.raises(UsageError):
            Trace.load(tmp_path / "a")


def test_whatever_else_is_refused(routing, tmp_path):
    path = tmp_path / "a"
    routing(10).save(path)
    whole = path.read_bytes()
    for data in (b"", b"SHOALTR1", whole[:-1], whole + b"\0", whole[:40], b"PK\3\4" + whole[4:],
                 MAGIC + b"\xff\xff\xff\xff" + whole[12:], MAGIC + b"\4\0\0\0null" + whole[16:],
                 MAGIC + b"\2\0\0\0[]" + whole[14:], MAGIC + b"\2\0\0\0\xff\xfe" + whole[14:]):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(UsageError):
            Trace.load(path)
    for where in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(UsageError):
            Trace.load(where)
    with pytest.raises(StorageError):
        routing(10).save(tmp_path / "none" / "a")


def test_random_damage_is_refused_or_harmless(routing, tmp_path):
    path, random = tmp_path / "a", np.random.default_rng(1)
    routing(20, hidden=4).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(300):
        data = whole.copy()
        places = random.integers(0, len(data) if random.random() < 0.5 else 300, random.integers(1, 4))
        data[places] = random.integers(0, 256, len(places))
        path.write_bytes(data[: random.integers(1, len(data) + 1)] if random.random() < 0.1 else data)
        try:
            found = Trace.load(path)
            assert -1 <= found.ids.min() and found.ids.max() < found.experts
        except UsageError:
            refused += 1
    assert refused > 50
