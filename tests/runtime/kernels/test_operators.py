"""The operators in a graph: they compute what Python's functions do, wherever their weights are, and whatever a graph
or a caller hands them is computed or refused, never read beyond its end."""

import math
import mmap
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.runtime import kernels, measure
from shoal.runtime.errors import BackendError, BundleError, ShoalError
from shoal.runtime.kernels.layout import LinearFormat

pytestmark = pytest.mark.usefixtures("built")

F, I32, I64, U8 = np.float32, np.int32, np.int64, np.uint8
FORMAT = LinearFormat(128, 64, 4, 32, 128, 1)


def numbers(format: LinearFormat, **others) -> dict:
    return {**vars(format), **others}


@pytest.fixture
def x():
    return np.random.default_rng(3).standard_normal((2, 9, 128)).astype(F)


def linear_graph(operator, weights, tensors=(), inputs=(), attributes=None, columns=64):
    """y of x and weights; `weights` and further inputs as `operator` takes them."""
    given = [("x", F, ["b", "n", 128]), weights, *inputs]
    return operator("QuantizedLinear", given, [("y", F, ["b", "n", columns])], attributes or numbers(FORMAT), tensors)


def test_weights_in_a_section_in_an_input_or_behind_a_handle(operator, matrix, opened, x):
    (data, _), (other, _) = matrix(FORMAT), matrix(FORMAT, 2)
    wanted, different = (kernels.linear(FORMAT, w, x.reshape(-1, 128)).reshape(2, 9, 64) for w in (data, other))
    for offset in (0, 4096, 64, 4, 1):  # the last is not where a converter would put it
        graph = linear_graph(operator, "w", {"w": (data, offset)})
        session = opened(graph, bytes(offset) + data.tobytes())
        try:
            np.testing.assert_array_equal(session.run({"x": x})["y"], wanted)
        except BackendError as refused:
            assert offset % 4 and "not aligned" in refused.why
    graph = linear_graph(operator, ("w", U8, ["bytes"]))
    session = opened(graph)
    for weights, y in ((data, wanted), (other, different)):
        np.testing.assert_array_equal(session.run({"x": x, "w": weights})["y"], y)
    with pytest.raises(BackendError, match="need"):
        session.run({"x": x, "w": data[:-1]})
    assert not np.array_equal(wanted, different)


def test_a_buffer_s_contents_may_change_between_runs(operator, matrix, opened, x):
    (data, _), (other, _) = matrix(FORMAT), matrix(FORMAT, 2)
    wanted, different = (kernels.linear(FORMAT, w, x.reshape(-1, 128)).reshape(2, 9, 64) for w in (data, other))
    buffer = kernels.Buffer(data.copy())
    inside = opened(linear_graph(operator, "w", {"w": np.array([buffer.handle], I64)}))
    outside = opened(linear_graph(operator, ("w", I64, [1])))

    def both():
        y = inside.run({"x": x})["y"]
        np.testing.assert_array_equal(outside.run({"x": x, "w": np.array([buffer.handle])})["y"], y)
        return y

    np.testing.assert_array_equal(both(), wanted)
    buffer.set(other)
    np.testing.assert_array_equal(both(), different)
    buffer._data[:] = data  # in place
    np.testing.assert_array_equal(both(), wanted)
    buffer.set(data[:-1])
    with pytest.raises(BackendError, match="need"):
        both()
    buffer.set(data)
    np.testing.assert_array_equal(both(), wanted)
    buffer.close()
    for handle in (buffer.handle, 0, -1, 1 << 62):
        with pytest.raises(BackendError, match="weights"):
            outside.run({"x": x, "w": np.array([handle])})
    with pytest.raises(BackendError):
        inside.run({"x": x})
    with pytest.raises(ShoalError, match="closed"):
        buffer.set(data)
    again = kernels.Buffer(data)
    assert again.handle != buffer.handle, "a handle is never used twice"
    again.close()


def test_norms_biases_and_residuals(operator, matrix, opened, x):
    data, weights = matrix(FORMAT)
    random = np.random.default_rng(5)
    norm, bias = random.standard_normal(128).astype(F), random.standard_normal(64).astype(F)
    residual = random.standard_normal((2, 9, 64)).astype(F)
    tensors = {"w": (data, 0), "norm": norm, "bias": bias}
    inputs = ["norm", "bias", ("residual", F, ["b", "n", 64])]
    session = opened(linear_graph(operator, "w", tensors, inputs, numbers(FORMAT, epsilon=1e-5)), data.tobytes())
    found = session.run({"x": x, "residual": residual})["y"]
    normed = x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-5) * norm
    wanted = normed @ weights.T + bias + residual
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
    plain = kernels.linear(FORMAT, data, normed.reshape(-1, 128).astype(F)).reshape(2, 9, 64) + bias + residual
    assert np.linalg.norm(found - plain) < 2e-3 * np.linalg.norm(plain)  # a code at a boundary may differ by one


@pytest.mark.parametrize("activation", [1, 2, 3, 4])
def test_a_gate_and_its_up_alternate(operator, matrix, opened, x, activation):
    (data, _), x = matrix(FORMAT), x / F(500)  # so that gates are around one
    graph = linear_graph(operator, "w", {"w": (data, 0)}, (), numbers(FORMAT, activation=activation), 32)
    session = opened(graph, data.tobytes())
    y = kernels.linear(FORMAT, data, x.reshape(-1, 128)).astype(float).reshape(2, 9, 2, 2, 16)
    gate, up = y[:, :, :, 0].reshape(2, 9, 32), y[:, :, :, 1].reshape(2, 9, 32)
    erf = np.vectorize(math.erf)
    tanh = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    gelu = gate * (1 + erf(gate / np.sqrt(2))) / 2
    acted = {1: gate / (1 + np.exp(-gate)), 2: gelu, 3: tanh, 4: np.maximum(gate, 0)}[activation]
    found = session.run({"x": x})["y"]
    np.testing.assert_allclose(found, acted * up, rtol=1e-5, atol=2e-6 * np.abs(gate * up).max())


def test_rows_of_a_table(operator, matrix, opened):
    data, weights = matrix(FORMAT)
    graph = operator(
        "QuantizedRows", [("ids", I64, ["b", "n"]), "w"], [("y", F, ["b", "n", 128])], numbers(FORMAT, factor=2.5),
        {"w": (data, 0)},
    )  # fmt: skip
    session = opened(graph, data.tobytes())
    ids = np.random.default_rng(1).integers(0, 64, (3, 41))
    found = session.run({"ids": ids})["y"]
    np.testing.assert_allclose(found, 2.5 * weights[ids], rtol=1e-5, atol=1e-5 * np.abs(weights).max())
    assert session.run({"ids": ids[:, :0]})["y"].shape == (3, 0, 128)
    for wrong in (-1, 64, 1 << 40, -(1 << 63)):
        ids[1, 7] = wrong
        with pytest.raises(BackendError, match="no row"):
            session.run({"ids": ids})


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_of_a_mapped_table_only_panels_in_use_are_resident(operator, matrix, opened, tmp_path):
    format = LinearFormat(1024, 8192, 8, 1024, 1024)
    data, weights = matrix(format)
    inputs, outputs = [("ids", I64, ["n"]), "w"], [("y", F, ["n", 1024])]
    session = opened(operator("QuantizedRows", inputs, outputs, numbers(format), {"w": (data, 0)}), data.tobytes())
    for start in range(0, 8192, 64):
        ids = np.arange(start, start + 64)
        np.testing.assert_array_equal(session.run({"ids": ids})["y"], weights[ids])
    assert measure.mapped_rss(tmp_path / "weights0") < len(data) // 4
    few = np.arange(5, 8192, 1024)
    np.testing.assert_array_equal(session.run({"ids": few})["y"], weights[few])
    assert measure.mapped_rss(tmp_path / "weights0") < 2 * len(few) * (format.panel_bytes + 2 * mmap.PAGESIZE)


def test_several_threads_may_run_one_graph(operator, matrix, opened, x):
    data, _ = matrix(FORMAT)
    session = opened(linear_graph(operator, "w", {"w": (data, 0)}), data.tobytes(), threads=2)
    wanted, found = session.run({"x": x})["y"], []

    def work():
        found.extend(session.run({"x": x})["y"] for _ in range(30))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 120 and all(np.array_equal(y, wanted) for y in found)


# Graphs and callers that lie ------------------------------------------------------------------------------------------

WRONG_FORMATS = [
    {"inputs": 0}, {"inputs": -128}, {"inputs": 1 << 40}, {"inputs": 127}, {"outputs": 0}, {"outputs": 1 << 40},
    {"bits": 5}, {"bits": -4}, {"bits": 1 << 33 | 4}, {"bits": 8}, {"group": 0}, {"group": 48}, {"group": -32},
    {"span": 0}, {"span": 96}, {"span": 1 << 20}, {"span": -64}, {"activation": 5}, {"activation": -1},
    {"outputs": 40, "activation": 1}, {"inputs": 100, "span": 128, "rotated": 1},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_FORMATS, ids=str)
def test_an_impossible_format_is_refused_when_it_is_opened(operator, matrix, opened, wrong):
    data, _ = matrix(FORMAT)
    with pytest.raises((BundleError, BackendError)) as refused:
        opened(linear_graph(operator, "w", {"w": (data, 0)}, (), numbers(FORMAT) | wrong), data.tobytes())
    assert refused.value.why and refused.value.fix


@pytest.mark.parametrize("bigger", [{"outputs": 80}, {"inputs": 192, "span": 192}, {"bits": 8, "group": 128}], ids=str)
def test_weights_that_are_too_short_are_refused(operator, matrix, opened, bigger, x):
    data, _ = matrix(FORMAT)
    format = numbers(FORMAT) | bigger
    x = np.zeros((1, 1, format["inputs"]), F)
    for name, inputs, y in (
        ("QuantizedLinear", [("x", F, [None, None, None]), "w"], ("y", F, [None, None, None])),
        ("QuantizedRows", [("x", I64, [None, None]), "w"], ("y", F, [None, None, None])),
    ):
        session = opened(operator(name, inputs, [y], format, {"w": (data, 0)}), data.tobytes())
        with pytest.raises(BackendError, match="need"):
            session.run({"x": x if name == "QuantizedLinear" else np.zeros((1, 1), I64)})


def test_weights_of_another_type_are_refused(operator, opened, x):
    for array in (np.zeros(9000, np.int8), np.zeros(9000, F), np.zeros((2,), I64), np.zeros(0, I64)):
        with pytest.raises((BundleError, BackendError)):
            opened(linear_graph(operator, "w", {"w": array})).run({"x": x})


@pytest.mark.parametrize("shape", [(2, 9, 127), (2, 128, 9), (128,), (), (0,), (1, 1, 1, 1, 128), (2, 9, 0)], ids=str)
def test_rows_of_another_width_are_refused(operator, matrix, opened, shape):
    data, _ = matrix(FORMAT)
    inputs = [("x", F, [None] * len(shape)), "w"]
    graph = operator("QuantizedLinear", inputs, [("y", F, None)], numbers(FORMAT), {"w": (data, 0)})
    session = opened(graph, data.tobytes())
    if shape == (128,):
        assert session.run({"x": np.ones(shape, F)})["y"].shape == (64,)
        return
    with pytest.raises(BackendError):
        session.run({"x": np.ones(shape, F)})


@pytest.mark.parametrize("index", [2, 3, 4])
def test_further_inputs_of_another_length_are_refused(operator, matrix, opened, x, index):
    data, _ = matrix(FORMAT)
    right = {2: (128,), 3: (64,), 4: (2, 9, 64)}[index]
    for shape in (right, (), (0,), (right[0] - 1, *right[1:]), (1, *right, 2)):
        inputs = [("extra", F, [None] * len(shape)) if at == index else "" for at in (2, 3, 4)]
        session = opened(linear_graph(operator, "w", {"w": (data, 0)}, inputs), data.tobytes())
        if shape == right:
            assert session.run({"x": x, "extra": np.ones(shape, F)})["y"].shape == (2, 9, 64)
            continue
        with pytest.raises(BackendError, match="floats|residual|dimensions"):
            session.run({"x": x, "extra": np.ones(shape, F)})


CACHED = dict(heads=4, kv_heads=2, head_dim=32, window=0, scale=0.2, epsilon=1e-5, half=0)


def attention_graph(operator, given: dict, **attributes):
    """A graph that takes what `given` has, of any lengths."""
    inputs = [(name, array.dtype, [None] * array.ndim) for name, array in given.items()]
    inputs[7:7] = ["", ""]  # norms
    kind = given["keys"].dtype
    outputs = [("y", F, None), ("new_keys", kind, None), ("new_values", kind, None)]
    return operator("CachedAttention", inputs, outputs, CACHED | attributes)


def feeds(kind=F, batch=2, length=3, context=16, last=None, **changed) -> dict:
    random = np.random.default_rng(7)
    cache = np.zeros((batch, 2, context, 32), kind)
    found = {
        "qkv": random.standard_normal((batch, length, 256)).astype(F), "keys": cache, "values": cache.copy(),
        "last": np.full(batch, length - 1 if last is None else last, I32), "total": np.array([length], I32),
        "cos": np.ones((context, 16), F), "sin": np.zeros((context, 16), F),
    }  # fmt: skip
    return found | changed


WRONG_FEEDS = {
    "rows too narrow": {"qkv": np.zeros((2, 3, 255), F)},
    "rows of another batch": {"qkv": np.zeros((3, 3, 256), F)},
    "another number of heads": {"keys": np.zeros((2, 3, 16, 32), F), "values": np.zeros((2, 3, 16, 32), F)},
    "another head": {"keys": np.zeros((2, 2, 16, 30), F), "values": np.zeros((2, 2, 16, 30), F)},
    "an odd head": {"keys": np.zeros((2, 2, 16, 31), F), "values": np.zeros((2, 2, 16, 31), F)},
    "no head": {"keys": np.zeros((2, 2, 16, 0), F), "values": np.zeros((2, 2, 16, 0), F)},
    "values shorter than keys": {"values": np.zeros((2, 2, 15, 32), F)},
    "no cache": {"keys": np.zeros((2, 2, 0, 32), F), "values": np.zeros((2, 2, 0, 32), F)},
    "a last position beyond the cache": {"last": np.array([2, 16], I32)},
    "far beyond": {"last": np.array([2, 2**31 - 1], I32)},
    "before the rows": {"last": np.array([1, 2], I32)},
    "below zero": {"last": np.array([-1, 2], I32)},
    "too few last positions": {"last": np.array([2], I32)},
    "no last position": {"last": np.zeros(0, I32)},
    "tables shorter than the last position": {"cos": np.ones((2, 16), F), "sin": np.ones((2, 16), F)},
    "tables of more pairs": {"cos": np.ones((16, 17), F), "sin": np.ones((16, 17), F)},
    "tables that differ": {"sin": np.ones((16, 15), F)},
    "no tables": {"cos": np.ones((0, 0), F), "sin": np.ones((0, 0), F)},
    "tables of one dimension": {"cos": np.ones(16, F), "sin": np.ones(16, F)},
}


@pytest.mark.parametrize("case", WRONG_FEEDS)
def test_attention_refuses_what_does_not_fit_together(operator, opened, case):
    right, wrong = feeds(), feeds() | WRONG_FEEDS[case]
    assert opened(attention_graph(operator, right)).run(right)["y"].shape == (2, 3, 128)
    with pytest.raises(BackendError):
        opened(attention_graph(operator, wrong)).run(wrong)


def test_attention_over_an_int8_cache_needs_its_scales(operator, opened):
    fit = np.full(64, 0.05, F)
    given = feeds(np.int8, k_scale=fit, v_scale=fit)
    assert np.isfinite(opened(attention_graph(operator, given)).run(given)["y"]).all()
    for wrong in (fit[:-1], fit[:0], np.ones((64, 2), F)):
        given = feeds(np.int8, k_scale=fit, v_scale=wrong)
        with pytest.raises(BackendError, match="floats"):
            opened(attention_graph(operator, given)).run(given)
    given = feeds(np.int8)
    with pytest.raises(BackendError, match="no scales"):
        opened(attention_graph(operator, given)).run(given)


@pytest.mark.parametrize(
    "name, wrong", [("heads", 0), ("heads", 3), ("heads", 1 << 40), ("kv_heads", 0), ("kv_heads", -2), ("window", -1)]
)
def test_impossible_heads_are_refused(operator, opened, name, wrong):
    with pytest.raises((BundleError, BackendError)):
        opened(attention_graph(operator, feeds(), **{name: wrong}))


def test_an_operator_that_nobody_knows_is_refused(operator, opened):
    with pytest.raises(BundleError):
        opened(operator("Reticulate", [("x", F, [1])], [("y", F, [1])], {}))


LENGTHS = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 192])
WILD = st.sampled_from(
    [-(2**63), -(2**31), -1, 0, 1, 2, 3, 4, 8, 16, 31, 32, 48, 64, 96, 128, 192, 2**20, 2**31, 2**62]
)
SHAPES = st.lists(LENGTHS, max_size=5).map(tuple).filter(lambda shape: np.prod(shape) <= 1 << 16)
CALM = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@CALM
@given(
    st.fixed_dictionaries({key: WILD for key in numbers(FORMAT, activation=0)}),
    st.integers(0, 3), SHAPES, st.lists(SHAPES, max_size=3), st.integers(0, 20_000), st.booleans(),
)  # fmt: skip
def test_no_format_or_shape_breaks_a_product(operator, opened, attributes, kept, shape, further, length, rows):
    """Whatever comes, there is an answer or a refusal; a crash would end this process."""
    sane = [*numbers(FORMAT, activation=0).items()]
    attributes |= dict(sane[: 2 * kept + 1] if kept else [])
    dims, names = [None] * len(shape), ("norm", "bias", "residual")[: len(further)]
    if rows:
        graph = operator("QuantizedRows", [("x", I64, dims), ("w", U8, [None])], [("y", F, None)], attributes)
        given = {"x": np.ones(shape, I64), "w": np.zeros(length, U8)}
    else:
        given = {"x": np.ones(shape, F), "w": np.zeros(length, U8)}
        given |= {name: np.ones(shape, F) for name, shape in zip(names, further, strict=True)}
        others = [(name, F, [None] * given[name].ndim) for name in names]
        inputs = [("x", F, dims), ("w", U8, [None]), *others]
        graph = operator("QuantizedLinear", inputs, [("y", F, None)], attributes)
    try:
        with opened(graph) as session:
            session.run(given)
    except ShoalError:
        pass


@CALM
@given(
    st.fixed_dictionaries({}, optional={key: WILD for key in ("heads", "kv_heads", "head_dim", "window")}),
    st.fixed_dictionaries({}, optional={name: SHAPES for name in ("qkv", "keys", "cos", "last", "k_scale")}),
    st.sampled_from([F, np.float16, np.int8]), st.sampled_from([-(2**31), -1, 0, 2, 15, 16, 2**31 - 1]),
)  # fmt: skip
def test_no_shape_breaks_attention(operator, opened, attributes, shapes, kind, last):
    given = feeds(kind, last=last, k_scale=np.full(64, 0.1, F), v_scale=np.full(64, 0.1, F))
    for name, shape in shapes.items():
        for each in {"keys": ("keys", "values"), "cos": ("cos", "sin")}.get(name, (name,)):
            given[each] = np.ones(shape, given[each].dtype)
    try:
        with opened(attention_graph(operator, given, **attributes)) as session:
            session.run(given)
    except ShoalError:
        pass
