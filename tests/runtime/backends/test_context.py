"""Compiled graphs: whether they fit a device is told without one; QNN, or its emulator, compiles and opens them."""

import dataclasses
import json

import numpy as np
import pytest

from shoal.runtime import backends, onnx_texts, onnx_wire, session
from shoal.runtime.backends import context, soc
from shoal.runtime.backends.context import Binary, Contexts, Made
from shoal.runtime.backends.provider import Device
from shoal.runtime.errors import BackendError, BundleError, UsageError
from shoal.runtime.providers import Listed
from shoal.runtime.session import Place

from .conftest import block, build, helper, value

SDK, INFORMATION = "v2.51.0", "v2:6:2.51.0:5.51.0:75:57:0:0"
HERE = SDK, INFORMATION
MADE = Made("qnn", "sm8650", "0.1.0", SDK, INFORMATION, (32,), "f00d", {"one": (b"wrapper", 0)}, ((6, "0" * 64),))
HEXAGON = Device("npu", "qnn", Listed("QNNExecutionProvider", "npu", "Qualcomm", 1, 2, "0.1.0"))
EMULATOR = dataclasses.replace(HEXAGON, settings=soc.KNOWN["sm8650"].settings, simulated="QNN's HTP emulator")


def test_an_unknown_processor_is_refused_with_the_known_ones():
    assert [one.name for one in soc.parse(["qnn:sm8650", "QNN:SM8550", "qnn:sm8650"])] == ["sm8650", "sm8550"]
    for word in ("qnn:sm9999", "sm8650", "openvino:npu4000", ""):
        with pytest.raises(UsageError, match=r"qnn:sm8450 .*qnn:sm8850") as refused:
            soc.parse([word])
        assert repr(word) in refused.value.what
    assert soc.named(soc.KNOWN["sm8550"].settings) == "sm8550" and soc.named({}) == ""


def test_what_was_compiled_fits_the_processor_the_version_and_the_graphs_it_is_of():
    other = dataclasses.replace
    assert context.refusal(MADE, EMULATOR, "f00d", HERE, "") == ""
    assert context.refusal(MADE, EMULATOR, "beef", HERE, "") == "they were made of other graphs or weights"
    wrong = {
        "compiled by v2.50.0, v2.51.0 is here": other(MADE, sdk="v2.50.0"),
        "for sm8550, this is sm8650": other(MADE, soc="sm8550", information=INFORMATION.replace("75:57", "73:43")),
        "for openvino, this is qnn": other(MADE, provider="openvino"),
        "share a context": other(MADE, graphs={"one": (b"", 0), "two": (b"", 0)}),
    }
    for why, made in wrong.items():
        assert why in context.refusal(made, EMULATOR, "f00d", HERE, "")
    # Of hardware its provider is the judge, and graphs that share a context are what it is for
    shared = wrong["share a context"]
    assert context.refusal(shared, HEXAGON, "f00d", HERE, "optimal") == ""
    for verdict, why in (
        ("prefer_recompilation", "anew"), ("unsupported", "does not support"), ("unknown", "cannot say"),
    ):  # fmt: skip
        assert why in context.refusal(shared, HEXAGON, "f00d", HERE, verdict)
        assert "qnn:sm8650 by v2.51.0" in context.refusal(shared, HEXAGON, "f00d", HERE, verdict)


def test_what_they_are_is_read_again_and_checked():
    assert Made.from_json(MADE.to_json()) == MADE
    raw = json.loads(MADE.to_json())
    for change in (
        {"format": 2}, {"soc": 3}, {"sdk": "a\nb"}, {"chunks": [-1]}, {"chunks": 3}, {"graphs": {}}, {"graphs": []},
        {"graphs": {"one": ["%%", 0]}}, {"graphs": {"one": ["", 1]}}, {"graphs": {"one": ["", True]}},
        {"graphs": {"one": ["", 0, 0]}}, {"binaries": [[6, "00"]]}, {"binaries": [[-1, "0" * 64]]}, {"binaries": 3},
        {"binaries": [[6, "0" * 64]] * 2},
    ):  # fmt: skip
        with pytest.raises(BundleError, match="Compiled graphs"):
            Made.from_json(json.dumps(raw | change).encode())
    with pytest.raises(BundleError, match="index"):
        Made.from_json(b"{")


def wrapper(**attributes):
    """A compiled graph that names its binary, with further attributes."""
    said = {"main_context": 1, "embed_mode": 0, "ep_cache_context": "../../secret", "source": "QNNExecutionProvider"}
    node = helper.make_node(
        "EPContext", ["x"], ["y"], name="n", domain="com.microsoft", **said | {"partition_name": "p"} | attributes
    )
    return build([node], [value("x", [1, 4])], [value("y", [1, 4])])


def test_a_compiled_graph_reaches_its_binary_and_no_other_file(tmp_path):
    def pointed(graph):
        return context._pointed(graph, "proc/self/fd/7", "QNNExecutionProvider")

    model = onnx_wire.read(pointed(wrapper()), {})
    assert onnx_texts.texts(model, model.nodes[0])["ep_cache_context"] == "proc/self/fd/7"
    assert onnx_texts.texts(model, model.nodes[0])["partition_name"] == "p" and b"secret" not in model.data
    plain = build([helper.make_node("Neg", ["x"], ["y"])], [value("x", [1, 4])], [value("y", [1, 4])])
    for graph, why in (
        (wrapper(ep_dlc_context="../x"), "may name a file"), (wrapper(embed_mode=1), "holds its binary itself"),
        (wrapper(source="OtherExecutionProvider"), "is not QNNExecutionProvider's"), (plain, "not one EPContext"),
    ):  # fmt: skip
        with pytest.raises(BundleError, match=why):
            pointed(graph)


def test_a_binary_is_handed_out_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before" + b"binary" * 1000 + b"after")
    whole = context._file(path)
    inside = Binary(Place(str(path), 6, 6000), context.hashlib.sha256(b"binary" * 1000).hexdigest())
    with context._held(inside) as found, open(f"/{found}", "rb") as file:
        assert file.read() == b"binary" * 1000
    for damaged in (
        dataclasses.replace(inside, sha256=whole.sha256),  # other bytes
        dataclasses.replace(inside, place=Place(str(path), 6, 6001)),
        dataclasses.replace(whole, place=Place(str(path), 0, path.stat().st_size + 1)),  # cut short
    ):
        with pytest.raises(BundleError, match="is damaged"), context._held(damaged):
            pass
    with pytest.raises(BackendError, match="No such file"), context._held(Binary(Place("/nowhere/x", 0, 1), "")):
        pass


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """Graphs of 32 and of 128 rows over the same weights: (graphs by name, places)."""
    path = tmp_path_factory.mktemp("blocks") / "weights"
    graphs = {}
    for rows in (32, 128):
        graphs[f"static.{rows}.ffn"], weights = block(rows, location="static")
    path.write_bytes(weights)
    return graphs, {"static": Place(str(path), 0, len(weights))}


@pytest.fixture(scope="module")
def compiled(qnn, blocks, tmp_path_factory):
    """Both of them, compiled for the device at hand."""
    return context.compile_contexts(
        qnn, *blocks, None, tmp_path_factory.mktemp("compiled"), source="f00d", chunks=(32, 128)
    )


def test_a_compiled_graph_computes_bit_for_bit_what_it_was_compiled_of(qnn, blocks, compiled):
    assert compiled.made.chunks == (32, 128) and compiled.made.sdk and compiled.made.source == "f00d"
    assert (compiled.made.sdk, compiled.made.information) == context.identity(qnn)
    opened, placement = context.open_contexts(qnn, compiled)
    assert placement.share == 1 and {node.op for node in placement.nodes} == {"EPContext"}
    for name, graph in blocks[0].items():
        direct, _ = backends.open_graph(qnn, graph, blocks[1])
        with direct, opened[name] as one:
            feeds = {"x": np.random.default_rng(2).standard_normal(one.inputs["x"].dims).astype(np.float32)}
            expected, found = direct.run(feeds)["sum.d"], one.run(feeds)["sum.d"]
            assert np.ptp(expected) > 1 and one.placement() == {qnn.listed.provider: 1}
            np.testing.assert_array_equal(found, expected)


def test_chunk_lengths_share_their_weights(qnn, tmp_path):
    """Bytes of both, compiled together for a processor that is not here, and of one alone."""
    for name in ("one", "both", "again"):
        (tmp_path / name).mkdir()
    graphs = {}
    for rows in (32, 128):
        graphs[f"static.{rows}.ffn"], weights = block(rows, 256, 704, location="static")
    (tmp_path / "weights").write_bytes(weights)
    places, target = {"static": Place(str(tmp_path / "weights"), 0, len(weights))}, soc.KNOWN["sm8750"]

    def size(folder, names):
        chosen = {name: graphs[name] for name in names}
        found = context.compile_contexts(qnn, chosen, places, target, tmp_path / folder, source="f00d")
        assert found.made.soc == "sm8750" and ":79:69:" in found.made.information
        return found, sum(binary.place.length for binary in found.binaries)

    one, both = size("one", list(graphs)[:1]), size("both", graphs)
    assert len(weights) < one[1] < both[1] < 1.1 * one[1]
    assert both[0].made.shared and len({wrapper for wrapper, _ in both[0].made.graphs.values()}) == 2
    again = size("again", graphs)  # the same bytes
    assert again[0].made == both[0].made and again[0].binaries[0].sha256 == both[0].binaries[0].sha256


def test_what_is_damaged_is_refused_and_the_process_lives(qnn, compiled, tmp_path):
    binary = compiled.binaries[0]
    with open(binary.place.path, "rb") as file:
        data = bytearray(file.read())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    flipped = dataclasses.replace(binary, place=dataclasses.replace(binary.place, path=str(tmp_path / "flipped")))
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    cut = context._file(tmp_path / "cut")  # with the digest of what is left, so the library gets it
    for bad, kinds in ((flipped, BundleError), (cut, (BackendError, BundleError))):
        for rehearsed in (True, False):
            with pytest.raises((BackendError, BundleError) if not rehearsed else kinds):
                changed = Contexts(compiled.made, (bad, *compiled.binaries[1:]))
                context.open_contexts(qnn, changed, rehearsed=rehearsed)
    opened, _ = context.open_contexts(qnn, compiled, rehearsed=True)  # after all that
    assert len(opened) == 2
    for one in opened.values():
        one.close()


def test_a_library_that_dies_of_a_context_takes_a_child_along(qnn, blocks, tmp_path):
    """QNN's emulator dies of a context of several graphs; a Hexagon opens it."""
    shared = context.compile_contexts(qnn, *blocks, soc.KNOWN["sm8650"], tmp_path, source="f00d")
    if not qnn.simulated:
        pytest.skip("this device opens it")
    with pytest.raises(BackendError, match="dies of SIG"):
        context.open_contexts(qnn, shared)


def test_a_compilation_that_takes_too_long_is_given_up(qnn, blocks, tmp_path):
    with pytest.raises(BackendError, match="does not come back within 0.05 s"):
        context.compile_contexts(qnn, *blocks, None, tmp_path, source="", seconds=0.05)


def test_a_graph_that_the_processor_does_not_take_whole_is_not_compiled(qnn, tmp_path):
    nodes = [helper.make_node("Neg", ["s"], ["n"]), helper.make_node("Det", ["n"], ["d"], name="volume")]
    graph = build(nodes, [value("s", [4, 4])], [value("d", [])])
    with pytest.raises(BackendError, match="'one' cannot be compiled"):
        context.compile_contexts(qnn, {"one": graph}, {}, None, tmp_path, source="")
    with pytest.raises(BundleError):
        context.compile_contexts(qnn, {"one": b"no graph"}, {}, None, tmp_path, source="")


def test_a_session_of_a_compiled_graph_is_one_like_any_other(qnn, compiled):
    opened, _ = context.open_contexts(qnn, compiled, rehearsed=True)
    with opened["static.32.ffn"] as one, opened["static.128.ffn"] as other:
        assert isinstance(one, session.Session) and one.inputs["x"].dims == (32, 64)
        with pytest.raises(UsageError):
            one.run({"x": np.zeros((31, 64), np.float32)})
        assert other.run({"x": np.zeros((128, 64), np.float32)})["sum.d"].shape == (128, 64)
