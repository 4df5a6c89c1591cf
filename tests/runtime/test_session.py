"""ORT through its one door: weights stay where they are, buffers are bound in place, every failure is a ShoalError."""

import dataclasses
import gc
import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper

from shoal.runtime import measure, providers, session
from shoal.runtime.errors import BackendError, BundleError, UsageError
from shoal.runtime.mapped import without
from shoal.runtime.providers import Listed
from shoal.runtime.session import Place, Target, open_graph

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
TOKENS = np.array([3, 0, 63, 3])


def _build(nodes, inputs, outputs, tensors=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _value(name, dtype, dims):
    return helper.make_tensor_value_info(name, dtype, dims)


def _table(path, rows=8192, width=1024):
    """A Gather over an external table of 32 MiB that begins 4096 bytes into its file."""
    table = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    path.write_bytes(bytes(4096) + table.tobytes())
    tensor = TensorProto(name="table", data_type=1, dims=table.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights"), ("offset", "0"), ("length", str(table.nbytes))):
        tensor.external_data.add(key=key, value=value)
    inputs, outputs = [_value("rows", TensorProto.INT64, ["n"])], [_value("y", TensorProto.FLOAT, ["n", width])]
    graph = _build([helper.make_node("Gather", ["table", "rows"], ["y"])], inputs, outputs, [tensor])
    return graph, {"weights": Place(str(path), 4096, table.nbytes)}, table


def test_computes_from_a_section_wherever_the_file_is(small, tmp_path):
    moved = tmp_path / "n\u00e4me with blanks"
    small.path.rename(moved)
    small.path = moved
    with open_graph(small.graph, small.places, threads=1) as graph:
        y = graph.run({"tokens": TOKENS})["y"]
        assert graph.placement() == {session.CPU: 4}
    np.testing.assert_allclose(y, small.expected(TOKENS), atol=0.02 * np.abs(y).max())  # 8-bit activations
    assert graph.inputs["tokens"] == session.Value("tokens", np.dtype(np.int64), ("n",))
    assert graph.outputs["y"].dims == ("n", 16)


def test_two_files_serve_one_graph(tmp_path):
    graph, places, table = _table(tmp_path / "a", 8, 4)
    (tmp_path / "b").write_bytes(b"123" + (table * 2).tobytes())
    parsed = helper.onnx.ModelProto.FromString(graph)
    other = parsed.graph.initializer.add()
    other.CopyFrom(parsed.graph.initializer[0])
    other.name, other.external_data[0].value = "other", "more"
    parsed.graph.node.append(helper.make_node("Gather", ["other", "rows"], ["z"]))
    parsed.graph.output.append(_value("z", TensorProto.FLOAT, ["n", 4]))
    places["more"] = Place(str(tmp_path / "b"), 3, table.nbytes)
    with open_graph(parsed.SerializeToString(), places) as opened:
        found = opened.run({"rows": np.array([5])})
    np.testing.assert_array_equal(found["z"], 2 * found["y"])
    np.testing.assert_array_equal(found["y"], table[[5]])


@linux
def test_a_descriptor_is_followed_and_never_an_impostor(tmp_path):
    path = tmp_path / "w"
    graph, places, table = _table(path, 8, 4)
    with open(path, "rb") as file:
        places["weights"] = Place(str(path), 4096, table.nbytes, file.fileno())
        with open_graph(graph, places) as opened:
            np.testing.assert_array_equal(opened.run({"rows": np.array([7])})["y"], table[[7]])
        os.replace(tmp_path / "w", tmp_path / "moved")  # the same file by another name
        with open_graph(graph, places) as opened:
            np.testing.assert_array_equal(opened.run({"rows": np.array([7])})["y"], table[[7]])
        (tmp_path / "w").write_bytes(bytes(4096 + table.nbytes))
        (tmp_path / "moved").unlink()
        with pytest.raises(BundleError):
            open_graph(graph, places)


@linux
def test_weights_stay_mapped_and_only_the_rows_in_use_are_resident(tmp_path):
    path = tmp_path / "w"
    graph, places, table = _table(path)
    open_graph(graph, places).close()  # ORT's own first-time memory
    before = measure.anonymous_bytes()
    with open_graph(graph, places, threads=1) as opened, open_graph(graph, places, threads=1) as other:
        buffers = opened.bind()
        rows, y = np.zeros(64, np.int64), np.zeros((64, 1024), np.float32)
        buffers.input("rows", rows)
        buffers.output("y", y)
        for start in range(0, 8192, 64):
            rows[:] = np.arange(start, start + 64)
            buffers.run()
            np.testing.assert_array_equal(y, table[start : start + 64])
        held = measure.anonymous_bytes() - before + measure.mapped_rss(path)
        assert held < table.nbytes // 4
        few = opened.run({"rows": np.arange(0, 8192, 512)})["y"]  # scattered: the kernel would bring 16 pages for each
        np.testing.assert_array_equal(few, table[::512])
        assert measure.mapped_rss(path) < 1 << 18 or not _populates()
        with pytest.raises(BackendError):
            opened.run({"rows": np.array([0, 8192])})  # outside the table: ORT refuses it, nothing else is touched
        assert opened._weights.ranges and not set(opened._weights.ranges) & set(other._weights.ranges)
        [address] = [address for address, _ in opened._weights.tables["rows"]]
        assert any(low <= address < high for low, high in opened._weights.ranges)
    opened._weights.release()  # after close: nothing to let go


def _populates() -> bool:
    return tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 14)


def test_release_spares_what_was_mapped_before():
    assert without([(0, 10), (20, 30)], []) == [(0, 10), (20, 30)]
    assert without([(0, 10), (20, 30)], [(20, 30)]) == [(0, 10)]
    assert without([(0, 10)], [(0, 4)]) == [(4, 10)]
    assert without([(0, 10)], [(3, 5), (8, 10)]) == [(0, 3), (5, 8)]


def _attention():
    """GroupQueryAttention of 2 heads of 8 over a cache [slots, 1, 6, 8] that is bound in place."""
    node = helper.make_node(
        "GroupQueryAttention", ["q", "k", "v", "past_k", "past_v", "last", "total"], ["y", "new_k", "new_v"],
        domain="com.microsoft", num_heads=2, kv_num_heads=1,
    )  # fmt: skip
    f = TensorProto.FLOAT
    inputs = [_value("q", f, ["b", 1, 16]), _value("k", f, ["b", 1, 8]), _value("v", f, ["b", 1, 8])]
    inputs += [_value("past_k", f, ["b", 1, "t", 8]), _value("past_v", f, ["b", 1, "t", 8])]
    inputs += [_value("last", TensorProto.INT32, ["b"]), _value("total", TensorProto.INT32, [1])]
    outputs = [_value("y", f, ["b", 1, 16])] + [_value(name, f, ["b", 1, "t", 8]) for name in ("new_k", "new_v")]
    return _build([node], inputs, outputs)


def test_a_cache_is_updated_in_place_for_some_slots():
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((3, 1, 6, 8)).astype(np.float32) for _ in "kv")
    old = keys.copy(), values.copy()
    q, k, v = (rng.standard_normal((2, 1, width)).astype(np.float32) for width in (16, 8, 8))
    y, last = np.zeros((2, 1, 16), np.float32), np.array([4, 2], np.int32)
    with open_graph(_attention(), {}) as graph:
        buffers = graph.bind()
        for name, array in (("q", q), ("k", k), ("v", v), ("last", last), ("total", np.array([5], np.int32))):
            buffers.input(name, array)
        for name, array in (("k", keys[:2]), ("v", values[:2])):
            buffers.input(f"past_{name}", array)
            buffers.output(f"new_{name}", array)
        buffers.output("y", y)
        del array
        gc.collect()
        buffers.run()
    for row, length in enumerate(last):
        np.testing.assert_array_equal(keys[row, 0, length], k[row, 0])
        np.testing.assert_array_equal(np.delete(keys[row, 0], length, 0), np.delete(old[0][row, 0], length, 0))
        scores = q[row].reshape(2, 8) @ keys[row, 0, : length + 1].T / np.sqrt(8)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(y[row].reshape(2, 8), weights @ values[row, 0, : length + 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(keys[2], old[0][2])
    np.testing.assert_array_equal(values[2], old[1][2])


def test_no_rows_are_rows_too(small):
    with open_graph(small.graph, small.places) as graph:
        buffers, y = graph.bind(), np.zeros((0, 16), np.float32)
        buffers.input("tokens", np.zeros(0, np.int64))
        buffers.output("y", y)
        buffers.run()
        assert graph.run({"tokens": np.zeros(0, np.int64)})["y"].shape == (0, 16)


@pytest.mark.parametrize(
    "name, array",
    [
        ("token", TOKENS),
        ("tokens", TOKENS.astype(np.int32)),
        ("tokens", [1, 2]),
        ("tokens", TOKENS[None]),
        ("tokens", np.arange(8)[::2]),
    ],
)
def test_arrays_that_would_be_misread_are_refused(small, name, array):
    with open_graph(small.graph, small.places) as graph:
        with pytest.raises(UsageError):
            graph.bind().input(name, array)
        with pytest.raises(UsageError):
            graph.run({})
        fixed = np.zeros((4, 16), np.float32)
        fixed.flags.writeable = False
        for wrong in (fixed, np.zeros((4, 15), np.float32), np.zeros((16, 4), np.float32).T):
            with pytest.raises(UsageError):
                graph.bind().output("y", wrong)


def test_failures_are_ours_and_quiet(small, tmp_path, capfd):
    unknown = _build([helper.make_node("NoSuchOp", ["x"], ["y"])], [_value("x", 1, [1])], [_value("y", 1, [1])])
    with pytest.raises((BackendError, BundleError)):
        open_graph(unknown, {})
    broken = _build([helper.make_node("Add", ["x", "nowhere"], ["y"])], [_value("x", 1, [1])], [_value("y", 1, [1])])
    with pytest.raises(BundleError):
        open_graph(broken, {})
    for data in (b"", b"\x08\x0a", b"not a model", bytes(8) + b"ORTM" + bytes(64)):
        with pytest.raises(BundleError):
            open_graph(data, {})
    gone = {"weights": Place(str(tmp_path / "absent"), 0, small.size)}
    with pytest.raises(BundleError):
        open_graph(small.graph, gone)
    for kind in ("", "npu"):  # built in, or of a plugin
        absent = Listed("NoSuchExecutionProvider", kind, "", 0, 0, "")
        with pytest.raises(BackendError, match="is gone"):
            open_graph(small.graph, small.places, target=Target(absent, {}))
    graph = open_graph(small.graph, small.places)
    with pytest.raises(BackendError):
        graph.run({"tokens": np.array([64])})  # outside the embedding
    buffers = graph.bind()
    buffers.input("tokens", TOKENS)
    buffers.output("y", np.zeros((3, 16), np.float32))  # four rows come out
    with pytest.raises(BackendError):
        buffers.run()
    graph.close()
    graph.close()
    for use in (buffers.run, graph.bind, graph.placement, lambda: graph.run({"tokens": TOKENS})):
        with pytest.raises(BackendError, match="closed"):
            use()
    out, err = capfd.readouterr()
    assert not out and not err


def test_a_file_shorter_than_its_section_is_refused(small):
    small.path.write_bytes(small.path.read_bytes()[:-100])
    with pytest.raises(BundleError):
        open_graph(small.graph, small.places)


def test_threads_share_a_graph(small):
    with open_graph(small.graph, small.places, threads=1) as graph:
        expected = graph.run({"tokens": TOKENS})["y"]
        found: list[bool] = []

        def work():
            found.extend(np.array_equal(graph.run({"tokens": TOKENS})["y"], expected) for _ in range(50))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 200 and all(found)


def test_a_profile_is_written(small, tmp_path):
    graph = open_graph(small.graph, small.places, profile=str(tmp_path / "times"))
    graph.run({"tokens": TOKENS})
    graph.close()
    [written] = tmp_path.glob("times*.json")
    assert "MatMulNBits" in written.read_text()


def test_versions_name_what_computes():
    assert set(session.versions()) == {"onnxruntime", "build", "numpy"}
    assert session.CPU in providers.offered()


@pytest.fixture
def target():
    """The CPU as another device would be: listed, attached by its list, run in a thread of its own."""
    return Target(providers.listed(session.CPU)[0], {}, patience=60.0)


def test_another_device_runs_a_graph_as_the_cpu_does(small, target):
    with open_graph(small.graph, small.places) as graph, open_graph(small.graph, small.places, target=target) as other:
        np.testing.assert_array_equal(other.run({"tokens": TOKENS})["y"], graph.run({"tokens": TOKENS})["y"])
        assert {node.provider for node in other.assigned()} == {session.CPU}
        y, buffers = np.zeros((len(TOKENS), 16), np.float32), other.bind()
        buffers.input("tokens", TOKENS)
        buffers.output("y", y)
        buffers.run()
        np.testing.assert_array_equal(y, graph.run({"tokens": TOKENS})["y"])


def test_a_device_that_hangs_is_given_up(small, target, monkeypatch):
    go = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(session, "start", lambda *given: go.wait(60))
        with pytest.raises(BackendError, match="did not open the graph within 0.05 s"):
            open_graph(small.graph, small.places, target=dataclasses.replace(target, patience=0.05))
    graph = open_graph(small.graph, small.places, target=dataclasses.replace(target, patience=0.05))
    inner = graph._session
    graph._session = SimpleNamespace(run=lambda *given: go.wait(60))  # a driver that does not answer
    for _ in range(2):  # the second call does not wait again
        with pytest.raises(BackendError, match="did not run the graph"):
            graph.run({"tokens": TOKENS})
    graph.close()
    go.set()
    del inner


def test_open_dimensions_can_be_given_a_length(small):
    with open_graph(small.graph, small.places, dims={"n": 4}) as graph:
        assert [value.dims[0] for value in (*graph.inputs.values(), *graph.outputs.values())] == [4, 4]


def test_a_survey_is_what_opening_would_do(small, target):
    assigned, messages = session.survey(small.graph, small.places, target)
    with open_graph(small.graph, small.places) as graph:
        assert assigned == graph.assigned()
    assert any("Node placements" in message for message in messages)
