"""Where graphs can be cut: what separates, what it costs, and which node prevents it. No torch is needed."""

import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.converters.sources.onnx import cuts, graph
from shoal.converters.split import graph as graphs
from shoal.converters.split.write import fold, write
from shoal.runtime.errors import ConvertError, UsageError
from shoal.runtime.session import open_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from make_split import build, split  # noqa: E402


def made(body, x="float[n, 4, 8, 8] x", y="float[n, 4, 8, 8] y", **shapes):
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return build("g", x, y, body, weights, tuple(weights))


BRANCHES = "a = Relu (x) b = Sigmoid (a) c = Tanh (a) d = Add (b, c) e = Exp (d) y = Mul (e, a)"


def test_cuts_are_the_values_that_everything_goes_through():
    found = cuts(split().whole)
    assert [cut.value for cut in found] == ["a", "r", "c", "latent", "f", "pooled", "flat"]
    latent = found[3]
    assert (latent.shape, latent.bytes, latent.op, latent.path) == ((16, 8, 8), 4096, "Relu", "")
    head, tail = 8 * 16 * 16 * 27 + 16 * 64 * 72, 16 * 64 * 144 + 160
    assert (latent.macs_before, latent.macs_after) == (head, tail)
    assert all(cut.macs_before + cut.macs_after == head + tail for cut in found)


def test_cuts_agree_with_removing_each_value():
    """On random graphs a value is a cut exactly if without it no output can be reached from an input."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        names, lines = ["x"], []
        for i in range(12):
            recent = names[-3:]
            one, other = (recent[int(k)] for k in rng.integers(0, len(recent), 2))
            lines.append(f"v{i} = Relu ({one})" if rng.random() < 0.6 else f"v{i} = Add ({one}, {other})")
            names.append(f"v{i}")
        network = graph(made(" ".join([*lines, f"y = Add ({names[-1]}, {names[-2]})"])))
        expected = set()
        for name in names[1:]:
            reached = {"x"}
            for node in network.nodes:
                if name not in node.outputs and reached.intersection(node.inputs):
                    reached.update(node.outputs)
            if "y" not in reached and any(name in node.outputs for node in network.nodes):
                expected.add(name)
        try:
            assert {cut.value for cut in graphs.cuts(network)} == expected
        except ConvertError:
            assert not expected


@pytest.mark.parametrize(("cut", "why"), [
    ("b", r"The Add node .*, behind it, also reads 'c' from before it"),
    ("e", r"The Mul node .*, behind it, also reads 'a' from before it"),
    ("x", "input or an output"), ("y", "input or an output"), ("k", "depends on no input"),
    ("nothing", "No name is near"), ("i", "not fp32"),
])  # fmt: skip
def test_what_is_not_a_cut_is_refused_by_the_node_that_prevents_it(cut, why):
    body = BRANCHES.replace("y = Mul (e, a)", "k = Relu (w) i = ArgMax (e) j = Cast <to = 1> (i) "
                            "f = Mul (e, a) g = Add (f, k) y = Add (g, j)")  # fmt: skip
    with pytest.raises(ConvertError, match=why):
        graphs.halves(graph(made(body, w=(1, 4, 1, 1))), cut)


def test_a_network_without_a_cut_says_why():
    with pytest.raises(ConvertError, match="the Add node .* also reads 'x'"):
        cuts(made("a = Relu (x) b = Exp (a) c = Tanh (b) y = Add (c, x)"))


def test_an_output_beside_the_cut_is_named():
    network = graph(made("a = Relu (x) y = Exp (a) z = Tanh (x)", y="float[n, 4, 8, 8] y, float[n, 4, 8, 8] z"))
    with pytest.raises(ConvertError, match="The output 'z' does not depend on it"):
        graphs.halves(network, "a")


def test_a_value_without_the_batch_in_front_is_no_cut():
    body = "a = Relu (x) t = Transpose <perm = [1, 0, 2, 3]> (a) u = Exp (t) y = Transpose <perm = [1, 0, 2, 3]> (u)"
    assert [cut.value for cut in cuts(made(body))] == ["a"]


def test_open_lengths_are_asked_for():
    data = made("a = Add (x, k) y = Relu (a)", "float[n, 4, h, w] x", "float[n, 4, h, w] y", k=(4, 1, 1))
    with pytest.raises(UsageError, match="'h', 'w'"):
        cuts(data)
    assert cuts(data, {"x": (4, 3, 5)})[0].shape == (4, 3, 5)
    with pytest.raises(ConvertError, match="ONNX Runtime says"):
        cuts(data, {"x": (5, 3, 5)})


def test_halves_written_compute_what_the_whole_does():
    whole = graph(split().whole)
    head, tail = graphs.halves(whole, "latent")
    x = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    data = write(tail, dims={"latent": (None, 16, 8, 8)})
    with open_graph(split().whole, {}) as one, open_graph(write(head), {}) as two, open_graph(data, {}) as three:
        expected, made = one.run({"image": x}), three.run(two.run({"image": x}))
    assert made.keys() == expected.keys()
    for name in made:
        np.testing.assert_allclose(made[name], expected[name], atol=1e-5)
    assert data == write(graphs.halves(graph(split().whole), "latent")[1], dims={"latent": (None, 16, 8, 8)})


def test_batch_norms_are_folded():
    """Into a convolution and a transposed one of groups; not where something else reads between."""
    body = ("v0 = Exp (v) a = Conv <pads = [1, 1, 1, 1]> (x, w, b) n = BatchNormalization (a, s, t, m, v0) "
            "c = ConvTranspose <group = 2> (n, u) d = BatchNormalization <epsilon = 0.1> (c, s, t, m, v1) "
            "e = Conv (d, k) f = BatchNormalization (e, s, t, m, v1) y = Add (f, e)")  # fmt: skip
    shapes = {"w": (4, 4, 3, 3), "b": (4,), "u": (4, 2, 1, 1), "k": (4, 4, 1, 1), "v": (4,), "v1": (4,)}
    network = graph(made(body, **shapes, **{name: (4,) for name in "stm"}))
    network.tensors["v1"] = np.abs(network.tensors["v1"])
    folded = fold(network)
    assert [node.op for node in folded.nodes].count("BatchNormalization") == 2  # of computed variance; of two readers
    x = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)
    with open_graph(write(network), {}) as one, open_graph(write(folded), {}) as other:
        expected = one.run({"x": x})["y"]
        np.testing.assert_allclose(other.run({"x": x})["y"], expected, atol=1e-5 * np.abs(expected).max())
