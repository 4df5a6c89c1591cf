"""Prepared weights: the same numbers, mapped instead of copied, and never those of other weights."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest

from shoal.runtime import prepack, session
from shoal.runtime.errors import BackendError, BundleError, StorageError
from shoal.runtime.prepack import prepare

TOKENS = np.array([3, 0, 63, 3])
HEAD = 4999


def run(graph, places):
    with session.open_graph(graph, places, threads=1) as opened:
        return opened.run({"tokens": TOKENS})["y"]


def stages(events):
    return [event.detail for event in events if event.detail]


def test_prepared_computes_the_same_and_is_made_once(small, tmp_path):
    expected, events = run(small.graph, small.places), []
    first = prepare(small.graph, small.places, tmp_path / "cache", "k", events.append)
    np.testing.assert_array_equal(run(first.graph, first.places), expected)
    assert sorted(stages(events)) == ["bits", "gemm", "plain"] and events[-1].done == events[-1].total
    again = prepare(small.graph, small.places, tmp_path / "cache", "k", events.append)
    assert len(stages(events)) == 3 and again.path == first.path
    np.testing.assert_array_equal(run(again.graph, again.places), expected)
    guess = prepack.estimate(session.read(small.graph, small.places))
    assert (again.cold, again.private) == (guess.cold, 0)
    assert abs(again.repacked - guess.repacked) <= 0.2 * guess.repacked + 4096  # tiny fp32 weights are padded
    assert guess.direct == small.weights["embed"].nbytes


def test_the_mapped_copy_is_what_runs(small, tmp_path):
    """Zeros written over the copies change the result: nothing was repacked into private memory. Over those of a closed
    session they are found when it is opened."""
    done = prepare(small.graph, small.places, tmp_path)
    graph = done.file.index["graph"]
    with session.open_graph(done.graph, done.places, threads=1) as opened:
        expected = opened.run({"tokens": TOKENS})["y"]
        with open(done.path, "r+b") as file:
            for number, (at, length, _) in enumerate(done.file.index["pieces"]):
                if number < graph - 1:  # the last two are the carrier and the graph
                    file.seek(at)
                    file.write(bytes(length))
        found = opened.run({"tokens": TOKENS})["y"]
    np.testing.assert_array_equal(found, np.broadcast_to(small.weights["b"], found.shape))
    assert not np.array_equal(found, expected)
    assert not done.file.verify()
    with pytest.raises(StorageError, match="damaged"):
        session.open_graph(done.graph, done.places)


def test_copies_of_other_weights_are_never_used(small, tmp_path):
    """A caller's wrong key costs memory, not correctness: ORT compares the hash of what it repacks itself."""
    done = prepare(small.graph, small.places, tmp_path, "same key")
    old = run(done.graph, done.places)
    data = bytearray(small.path.read_bytes())
    data[HEAD + 64 * 64 * 4 : HEAD + 64 * 64 * 4 + 48 * 32] = bytes(range(48)) * 32  # the 4-bit weights
    small.path.write_bytes(data)
    again = prepare(small.graph, small.places, tmp_path, "same key")
    found = run(again.graph, again.places)
    np.testing.assert_array_equal(found, run(small.graph, small.places))
    assert not np.array_equal(found, old)


def test_key_graph_and_device_have_files_of_their_own(small, tmp_path, monkeypatch):
    paths = {prepare(small.graph, small.places, tmp_path, key).path for key in "ab"}
    other = onnx.ModelProto.FromString(small.graph)
    other.doc_string = "another"
    paths.add(prepare(other.SerializeToString(), small.places, tmp_path, "a").path)
    monkeypatch.setattr(prepack, "device", lambda: ("another processor",))
    paths.add(prepare(small.graph, small.places, tmp_path, "a").path)
    assert len(paths) == 4


@pytest.mark.parametrize("damage", ["header", "index", "graph", "short", "mode", "foreign", "empty"])
def test_a_damaged_file_is_made_anew(small, tmp_path, damage):
    done = prepare(small.graph, small.places, tmp_path)
    expected, path, index = run(done.graph, done.places), done.path, done.file.index
    done.close()
    data = bytearray(path.read_bytes())
    at = {"header": 9, "index": len(data) - 5, "graph": index["pieces"][index["graph"]][0] + 20}.get(damage, 0)
    data[at] ^= 1 if at else 0
    path.write_bytes({"short": data[:-9], "foreign": b"#!/bin/sh\n" * 100, "empty": b""}.get(damage, data))
    if damage == "mode":
        path.chmod(0o666)
    events = []
    again = prepare(small.graph, small.places, tmp_path, progress=events.append)
    assert stages(events) and path.stat().st_mode & 0o777 == 0o600
    np.testing.assert_array_equal(run(again.graph, again.places), expected)


def test_only_the_cache_may_bring_copies(small, tmp_path):
    """The prepared graph in a bundle's place: its entries would hand ORT lengths that nobody checked."""
    done = prepare(small.graph, small.places, tmp_path)
    untrusted = {name: session.Place(place.path, place.offset, place.length) for name, place in done.places.items()}
    with pytest.raises(BundleError, match="cache"):
        session.open_graph(done.graph, untrusted)


def test_equal_copies_are_counted_as_private(small, tmp_path):
    """One weight in two nodes: ORT hands a mapped copy to the first and makes a private one for the second."""
    made = onnx.ModelProto.FromString(small.graph)
    made.graph.node.add(op_type="Neg", input=["h0"], output=["minus"])
    second = made.graph.node.add()
    second.CopyFrom(made.graph.node[1])
    second.name, second.input[0], second.output[0] = "again", "minus", "other"
    made.graph.output.append(onnx.helper.make_tensor_value_info("other", 1, ["n", 48]))
    data = made.SerializeToString()
    done = prepare(data, small.places, tmp_path)
    assert done.private == 48 * 2 * (16 + 8) + 126
    np.testing.assert_array_equal(run(done.graph, done.places), run(data, small.places))


def test_a_graph_without_such_weights_is_prepared_too(tmp_path):
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[4], data_location=1)
    for key, value in (("location", "weights"), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "t"], ["y"])], "g", [x], [y], [tensor])
    data = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "w").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    done = prepare(data.SerializeToString(), {"weights": session.Place(str(tmp_path / "w"), 0, 16)}, tmp_path)
    assert (done.repacked, done.cold, done.private) == (0, 0, 0)
    with session.open_graph(done.graph, done.places) as opened:
        np.testing.assert_array_equal(opened.run({"x": np.ones(4, np.float32)})["y"], [1, 2, 3, 4])


def test_what_cannot_be_opened_is_refused_and_leaves_nothing(small, tmp_path):
    made = onnx.ModelProto.FromString(small.graph)
    made.graph.node[2].op_type = "NoSuchOp"
    with pytest.raises((BackendError, BundleError)):
        prepare(made.SerializeToString(), small.places, tmp_path / "cache")
    with pytest.raises(BundleError):
        prepare(b"nothing", small.places, tmp_path / "cache")
    with pytest.raises(StorageError):
        prepare(small.graph, small.places, small.path / "cache")
    with pytest.raises(StorageError):
        prepare(small.graph, small.places, tmp_path / "cache", limit=1000)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


CHILD = """
import json, os, resource, sys
from shoal.runtime import measure, prepack, session
from shoal.runtime.errors import StorageError
graph, places, folder, mode = open(sys.argv[1], "rb").read(), json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
places = {name: session.Place(*place) for name, place in places.items()}
seen = []
def progress(event):
    seen.append(event.detail)
    if mode == "die" and event.done:
        os._exit(9)
if mode == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    done = prepack.prepare(graph, places, folder, "k", progress)
except StorageError as error:
    print(json.dumps(["StorageError", error.what]))
    sys.exit()
nodes = [item for item in seen if item and not item.startswith("waiting")]
print(json.dumps(["done", len(nodes), done.repacked]))
"""


def child(graph, places, folder, mode):
    """`prepare` in a process of its own: the running process, to be read with `communicate`."""
    path = folder.parent / "graph"
    path.write_bytes(graph)
    plain = json.dumps({name: (place.path, place.offset, place.length) for name, place in places.items()})
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), plain, str(folder), mode], stdout=subprocess.PIPE, text=True
    )


def answer(process):
    out, _ = process.communicate(timeout=120)
    return json.loads(out) if out else process.returncode


def test_processes_share_the_work_die_and_fill_the_disk(small, tmp_path):
    folder = tmp_path / "cache"
    kind, what = answer(child(small.graph, small.places, folder, "full"))
    assert kind == "StorageError" and str(folder) in what
    assert answer(child(small.graph, small.places, folder, "die")) == 9
    assert [path.name[:8] for path in sorted(folder.iterdir())] == [".making-", "lock"]
    both = [child(small.graph, small.places, folder, "") for _ in range(2)]
    found = [answer(process) for process in both]
    assert sorted(made for _, made, _ in found) == [0, 3]
    assert len(list(folder.iterdir())) == 2


MEMORY = textwrap.dedent("""
    import json, sys
    import numpy as np
    from shoal.runtime import measure, prepack, session
    graph, places, folder = open(sys.argv[1], "rb").read(), json.loads(sys.argv[2]), sys.argv[3]
    places = {name: session.Place(*place) for name, place in places.items()}
    def grown(graph, places, path=None):
        before = measure.anonymous_bytes()
        with session.open_graph(graph, places, threads=1) as opened:
            y = opened.run({"x": np.ones((1, 1024), np.float32)})["y"]
            return measure.anonymous_bytes() - before, path and measure.mapped_rss(path), float(y.sum())
    grown(graph, places)
    plain = grown(graph, places)
    done = prepack.prepare(graph, places, folder)
    grown(done.graph, done.places)
    print(json.dumps([done.repacked, plain, grown(done.graph, done.places, done.path)]))
""")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_prepared_weights_are_mapped_not_private(tmp_path):
    rng, tensors, nodes, data = np.random.default_rng(0), [], [], bytearray()
    for layer in range(24):
        names = {}
        for name, array in (("q", rng.integers(0, 256, (1024, 32, 16), np.uint8)),
                            ("s", rng.random((1024, 32), np.float32) * 0.01)):  # fmt: skip
            tensor = onnx.TensorProto(name=f"{name}{layer}", dims=array.shape, data_location=1)
            tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            for key, value in (("location", "weights"), ("offset", len(data)), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            names[name] = tensor.name
            data += array.tobytes()
        nodes.append(onnx.helper.make_node(
            "MatMulNBits", [f"h{layer}" if layer else "x", names["q"], names["s"]],
            ["y" if layer == 23 else f"h{layer + 1}"],
            domain="com.microsoft", K=1024, N=1024, bits=4, block_size=32, accuracy_level=4,
        ))  # fmt: skip
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 1024]) for name in "xy")
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opsets, ir_version=10
    )
    (tmp_path / "weights").write_bytes(data)
    (tmp_path / "graph").write_bytes(made.SerializeToString())
    places = json.dumps({"weights": (str(tmp_path / "weights"), 0, len(data))})
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "graph"), places, str(tmp_path / "cache")]
    repacked, plain, prepared = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert repacked == 24 * (1024 * 32 * (16 + 8) + 126)
    assert plain[0] > 0.9 * repacked > 10 * max(prepared[0], 0)
    assert 0.97 * repacked < prepared[1] < 1.1 * repacked + (1 << 20)
    assert plain[2] == prepared[2]
